"""The body of both UNets: a plan that consists of stages, its parameters, and its forward pass.

A stage is one resolution: residual blocks, each followed by an attention if the stage has one, then a downsampler or an
upsampler. The unconditional and the conditional UNet differ only in their configurations and embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from scaling.models.blocks_resnet import (
    ResnetStyle,
    downsample_conv,
    image_attention,
    image_attention_specs,
    resnet,
    resnet_specs,
    upsample_conv,
)
from scaling.models.blocks_transformer import image_transformer, image_transformer_specs
from scaling.models.config import Fields
from scaling.models.layers import ACTIVATIONS, Params, Specs, conv, conv_specs, group_norm, norm_specs
from scaling.models.taps import Tap

__all__ = [
    "Attention",
    "ImageAttention",
    "ImageTransformer",
    "Plan",
    "Sampler",
    "Stage",
    "check_plan",
    "down_stages",
    "mid_stage",
    "unet",
    "unet_specs",
    "up_stages",
]


class ImageAttention(NamedTuple):
    """Self-attention among pixels; ``groups`` are those of the norm before it, None for no norm."""

    heads: int
    groups: int | None


class ImageTransformer(NamedTuple):
    """Transformers with cross-attention to ``context`` channels, of ``depth[i]`` blocks after residual block i."""

    heads: int
    depth: tuple[int, ...]
    context: int
    linear_projection: bool
    only_cross: bool


Attention: TypeAlias = ImageAttention | ImageTransformer | None
Sampler: TypeAlias = Literal["conv", "resnet"]


class Stage(NamedTuple):
    """One resolution: input widths and output width of its residual blocks, their attention, and the last sampler."""

    name: str
    widths_in: tuple[int, ...]
    width: int
    attention: Attention
    sampler: Sampler | None


class Plan(NamedTuple):
    """A UNet without its embeddings; ``time`` is the width of the embedding that the residual blocks take."""

    width_in: int
    width_out: int
    time: int
    style: ResnetStyle
    down: tuple[Stage, ...]
    mid: Stage | None
    up: tuple[Stage, ...]
    mid_scale: float
    padding: int
    act_out: str
    kernel_in: int = 3
    kernel_out: int = 3


def down_stages(
    widths: Sequence[int], layers: Sequence[int], attentions: Sequence[Attention], samplers: Sequence[Sampler]
) -> tuple[Stage, ...]:
    """Stages on the way down, of ``layers`` residual blocks each; the last has no sampler."""
    stages = []
    for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        widths_in = (before, *[width] * (layers[i] - 1))
        sampler = samplers[i] if i < len(widths) - 1 else None
        stages.append(Stage(f"down_blocks.{i}", widths_in, width, attentions[i], sampler))
    return tuple(stages)


def mid_stage(width: int, attention: Attention, *, layers: int = 2) -> Stage:
    """The stage in the middle."""
    return Stage("mid_block", (width,) * layers, width, attention, None)


def up_stages(
    widths: Sequence[int], layers: Sequence[int], attentions: Sequence[Attention], samplers: Sequence[Sampler]
) -> tuple[Stage, ...]:
    """Stages on the way up, from the lowest resolution, of ``layers`` residual blocks each; the last has no sampler.

    Each block takes the previous output concatenated with a skip connection; the last skip of a stage comes from the
    next higher stage on the way down. All arguments, ``widths`` included, are in the order of these stages.
    """
    stages = []
    for i, width in enumerate(widths):
        below = [widths[max(i - 1, 0)], *[width] * (layers[i] - 1)]
        skips = [*[width] * (layers[i] - 1), widths[min(i + 1, len(widths) - 1)]]
        widths_in = tuple(map(sum, zip(below, skips, strict=True)))
        sampler = samplers[i] if i < len(widths) - 1 else None
        stages.append(Stage(f"up_blocks.{i}", widths_in, width, attentions[i], sampler))
    return tuple(stages)


def check_plan(fields: Fields, plan: Plan) -> None:
    """Refuse a configuration whose widths are not divisible by the groups of its norms, or by its heads."""
    for stage in _stages(plan):
        norms = [("norm_num_groups", width, plan.style.groups) for width in (*stage.widths_in, stage.width)]
        if isinstance(stage.attention, ImageAttention) and stage.attention.groups:
            norms.append(("attn_norm_num_groups", stage.width, stage.attention.groups))
        for name, width, groups in norms:
            if width % groups:
                raise fields.refusal(name, groups, f"it must divide the {width} channels of {stage.name}")
        heads = stage.attention.heads if stage.attention else 1
        if not heads or stage.width % heads:
            raise fields.refusal(
                "attention_head_dim",
                fields.raw("attention_head_dim"),
                f"the {stage.width} channels of {stage.name} do not divide into heads",
            )


def unet_specs(plan: Plan) -> Specs:
    """Parameters of :func:`unet`."""
    first = plan.down[0].widths_in[0]
    specs = conv_specs("conv_in", plan.width_in, first, kernel=plan.kernel_in)
    for stage in _stages(plan):
        for i, width_in in enumerate(stage.widths_in):
            specs |= resnet_specs(f"{stage.name}.resnets.{i}", width_in, stage.width, time=plan.time, style=plan.style)
        for i in range(_attentions(stage)):
            specs |= _attention_specs(stage, i)
        sampler = f"{stage.name}.{'up' if stage.name.startswith('up') else 'down'}samplers.0"
        if stage.sampler == "conv":
            specs |= conv_specs(f"{sampler}.conv", stage.width, stage.width)
        elif stage.sampler == "resnet":
            specs |= resnet_specs(sampler, stage.width, stage.width, time=plan.time, style=plan.style)
    specs |= norm_specs("conv_norm_out", first)
    return specs | conv_specs("conv_out", first, plan.width_out, kernel=plan.kernel_out)


def unet(
    params: Params,
    tap: Tap,
    plan: Plan,
    x: Float[Array, "b h w i"],
    emb: Float[Array, "b e"],
    context: Float[Array, "b s k"] | None = None,
) -> Float[Array, "b h w o"]:
    """The output for an image and the embedding of its conditions; upsampling matches the skip connections' sizes."""
    style = plan.style
    x = conv(params, tap, "conv_in", x)
    skips = [x]
    for stage in plan.down:
        for i in range(len(stage.widths_in)):
            x = resnet(params, tap, f"{stage.name}.resnets.{i}", x, emb, style=style)
            x = _attend(params, tap, stage, i, x, context, plan)
            skips.append(x)
        sampler = f"{stage.name}.downsamplers.0"
        if stage.sampler == "conv":
            x = downsample_conv(params, tap, sampler, x, padding=plan.padding)
        elif stage.sampler == "resnet":
            x = resnet(params, tap, sampler, x, emb, style=style, sampler="down")
        if stage.sampler:
            skips.append(x)
        x = tap(stage.name, x)

    if plan.mid:
        for i in range(len(plan.mid.widths_in)):
            if i:
                x = _attend(params, tap, plan.mid, i - 1, x, context, plan, plan.mid_scale)
            x = resnet(params, tap, f"{plan.mid.name}.resnets.{i}", x, emb, style=style, scale=plan.mid_scale)
        x = tap(plan.mid.name, x)

    for stage in plan.up:
        for i in range(len(stage.widths_in)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet(params, tap, f"{stage.name}.resnets.{i}", x, emb, style=style)
            x = _attend(params, tap, stage, i, x, context, plan)
        sampler = f"{stage.name}.upsamplers.0"
        if stage.sampler == "conv":
            _, height, width, _ = skips[-1].shape
            x = upsample_conv(params, tap, sampler, x, size=(height, width))
        elif stage.sampler == "resnet":
            x = resnet(params, tap, sampler, x, emb, style=style, sampler="up")
        x = tap(stage.name, x)

    x = group_norm(params, tap, "conv_norm_out", x, groups=style.groups, eps=style.eps)
    x = tap("conv_act", ACTIVATIONS[plan.act_out](x))
    return conv(params, tap, "conv_out", x)


def _stages(plan: Plan) -> tuple[Stage, ...]:
    return (*plan.down, *([plan.mid] if plan.mid else []), *plan.up)


def _attentions(stage: Stage) -> int:
    if stage.attention is None:
        return 0
    # In the middle between the residual blocks, elsewhere after each.
    return len(stage.widths_in) - (stage.name == "mid_block")


def _attention_specs(stage: Stage, i: int) -> Specs:
    name, attention = f"{stage.name}.attentions.{i}", stage.attention
    if isinstance(attention, ImageAttention):
        return image_attention_specs(name, stage.width, norm=attention.groups is not None)
    assert isinstance(attention, ImageTransformer)
    return image_transformer_specs(
        name,
        stage.width,
        depth=attention.depth[i],
        context=attention.context,
        linear_projection=attention.linear_projection,
        only_cross=attention.only_cross,
    )


def _attend(
    params: Params,
    tap: Tap,
    stage: Stage,
    i: int,
    x: Float[Array, "b h w c"],
    context: Float[Array, "b s k"] | None,
    plan: Plan,
    scale: float = 1.0,
) -> Float[Array, "b h w c"]:
    name, attention, style = f"{stage.name}.attentions.{i}", stage.attention, plan.style
    if attention is None:
        return x
    if isinstance(attention, ImageAttention):
        groups = attention.groups or 1
        return image_attention(params, tap, name, x, heads=attention.heads, groups=groups, eps=style.eps, scale=scale)
    assert context is not None
    return image_transformer(
        params,
        tap,
        name,
        x,
        context,
        depth=attention.depth[i],
        heads=attention.heads,
        groups=style.groups,
        only_cross=attention.only_cross,
    )
