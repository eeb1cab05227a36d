"""UNet2DModel: the unconditional or class-conditional UNet of DDPM and its relatives :cite:`ho20`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from scaling.models.blocks import (
    Attention,
    ImageAttention,
    Plan,
    Sampler,
    check_plan,
    down_stages,
    mid_stage,
    unet,
    unet_specs,
    up_stages,
)
from scaling.models.blocks_resnet import ResnetStyle, modern_attention_key
from scaling.models.conditions import (
    LabelKind,
    batch_of_times,
    check_image,
    embed_labels,
    label_inputs,
    label_kind,
    label_specs,
)
from scaling.models.config import MAX_LAYERS, Fields
from scaling.models.layers import (
    ACT_FNS,
    Params,
    Specs,
    sinusoidal_embedding,
    timestep_embedding,
    timestep_embedding_specs,
    to_nchw,
    to_nhwc,
)
from scaling.models.taps import Tap

__all__ = ["Config", "apply", "inputs", "parameters", "parse", "rename"]

DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

rename = modern_attention_key


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``UNet2DModel`` that the forward pass needs."""

    plan: Plan
    center_input_sample: bool
    flip_sin_to_cos: bool
    freq_shift: int
    labels: LabelKind | None
    num_class_embeds: int | None
    sample_size: tuple[int, int]


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; ``ValueError`` names an unsupported field and its value."""
    fields = Fields("UNet2DModel", config)
    widths = fields.integers("block_out_channels", (224, 448, 672, 896))
    layers = fields.integer("layers_per_block", 2, maximum=MAX_LAYERS)
    groups = fields.integer("norm_num_groups", 32)
    style = ResnetStyle(
        groups=groups,
        eps=fields.number("norm_eps", 1e-5),
        act_fn=fields.choice("act_fn", "silu", ACT_FNS),
        time_scale_shift=fields.choice("resnet_time_scale_shift", "default", ("default", "scale_shift")),
    )
    head = fields.optional_integer("attention_head_dim") if "attention_head_dim" in config else 8
    mid_groups = fields.optional_integer("attn_norm_num_groups")
    if mid_groups is None and style.time_scale_shift == "default":
        mid_groups = groups

    def attention(width: int, groups: int | None) -> ImageAttention:
        return ImageAttention(heads=width // (head or width), groups=groups)

    def attentions(kinds: tuple[str, ...], widths: tuple[int, ...]) -> list[Attention]:
        pairs = zip(kinds, widths, strict=True)
        return [attention(width, groups) if kind.startswith("Attn") else None for kind, width in pairs]

    # The fields for sampler types apply to blocks with attention only; the names of the others imply the type.
    down = fields.block_types("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3), DOWN, len(widths))
    up = fields.block_types("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D"), UP, len(widths))
    sampler: dict[str, Sampler] = {DOWN[0]: "conv", DOWN[2]: "resnet", UP[0]: "conv", UP[2]: "resnet"}
    sampler["AttnDownBlock2D"] = fields.choice("downsample_type", "conv", ("conv", "resnet", None)) or "conv"
    sampler["AttnUpBlock2D"] = fields.choice("upsample_type", "conv", ("conv", "resnet", None)) or "conv"
    has_mid = fields.choice("mid_block_type", "UNetMidBlock2D", ("UNetMidBlock2D", None)) is not None
    mid_attention = attention(widths[-1], mid_groups) if fields.boolean("add_attention", True) else None
    plan = Plan(
        width_in=fields.integer("in_channels", 3),
        width_out=fields.integer("out_channels", 3),
        time=fields.optional_integer("time_embedding_dim") or 4 * widths[0],
        style=style,
        down=down_stages(widths, [layers] * len(widths), attentions(down, widths), [sampler[kind] for kind in down]),
        mid=mid_stage(widths[-1], mid_attention) if has_mid else None,
        up=up_stages(
            widths[::-1], [layers + 1] * len(widths), attentions(up, widths[::-1]), [sampler[kind] for kind in up]
        ),
        mid_scale=fields.number("mid_block_scale_factor", 1.0),
        padding=fields.integer("downsample_padding", 1, minimum=0, maximum=1),
        act_out="silu",
    )
    check_plan(fields, plan)
    fields.only("time_embedding_type", "positional")
    parsed = Config(
        plan=plan,
        center_input_sample=fields.boolean("center_input_sample", False),
        flip_sin_to_cos=fields.boolean("flip_sin_to_cos", True),
        freq_shift=fields.integer("freq_shift", 0, minimum=0, maximum=1),
        labels=label_kind(fields, (None, "timestep", "identity")),
        num_class_embeds=fields.optional_integer("num_class_embeds"),
        sample_size=fields.sample_size(2 ** (len(widths) + 1)),
    )
    fields.finish()
    return parsed


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    width, time = config.plan.down[0].widths_in[0], config.plan.time
    specs = unet_specs(config.plan) | timestep_embedding_specs("time_embedding", width, time)
    return specs | label_specs(config.labels, count=config.num_class_embeds, width=width, projected=None, time=time)


def apply(
    config: Config,
    params: Params,
    tap: Tap,
    x: Float[Array, "b i h w"],
    t: ArrayLike,
    context: None = None,
    class_labels: ArrayLike | None = None,
    added: None = None,
) -> Float[Array, "b o h w"]:
    """The network's output at timesteps ``t``, a scalar or (B,); ``class_labels`` (B,) where the model has classes."""
    if context is not None or added is not None:
        raise ValueError("UNet2DModel takes neither context nor added conditions; leave them out.")
    check_image("UNet2DModel", x, config.plan.width_in, multiple=2 ** (len(config.plan.down) - 1))
    dtype = params["conv_in.weight"].dtype
    x = x.astype(dtype)
    if config.center_input_sample:
        x = 2 * x - 1

    sinusoids = functools.partial(
        sinusoidal_embedding,
        channels=config.plan.down[0].widths_in[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
    )
    time = tap("time_proj", sinusoids(batch_of_times(t, x.shape[0]))).astype(dtype)
    emb = timestep_embedding(params, tap, "time_embedding", time)
    labels = embed_labels(params, tap, config.labels, class_labels, emb, sinusoids)
    emb = emb if labels is None else emb + labels
    return to_nchw(unet(params, tap, config.plan, to_nhwc(x), emb))


def inputs(config: Config, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shapes of ``x``, ``t`` and ``class_labels`` for one example."""
    x = jax.ShapeDtypeStruct((1, config.plan.width_in, *config.sample_size), dtype)
    labels = label_inputs(config.labels, projected=None, time=config.plan.time, dtype=dtype)
    return (x, jax.ShapeDtypeStruct((), jnp.float32)), labels
