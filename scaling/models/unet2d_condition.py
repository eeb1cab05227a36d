"""UNet2DConditionModel: the latent UNet of Stable Diffusion 1, 2 and XL :cite:`rombach22,podell24`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from scaling.models.blocks import (
    ImageTransformer,
    Plan,
    Sampler,
    Stage,
    check_plan,
    down_stages,
    mid_stage,
    unet,
    unet_specs,
    up_stages,
)
from scaling.models.blocks_resnet import ResnetStyle
from scaling.models.conditions import (
    LabelKind,
    batch_of_times,
    check_image,
    embed_labels,
    label_inputs,
    label_kind,
    label_specs,
)
from scaling.models.config import MAX_CHANNELS, MAX_LAYERS, Fields, per_block
from scaling.models.layers import (
    ACT_FNS,
    Params,
    Specs,
    activation,
    linear,
    linear_specs,
    sinusoidal_embedding,
    timestep_embedding,
    timestep_embedding_specs,
    to_nchw,
    to_nhwc,
)
from scaling.models.taps import Tap

__all__ = ["Config", "apply", "inputs", "parameters", "parse"]

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
LABELS = (None, "timestep", "identity", "projection", "simple_projection")

# For the shapes of an example: tokens of a prompt, and the numbers in SDXL's original size, crop and target size; its
# refiner has an aesthetic score in place of the target size.
TEXT_TOKENS, TIME_IDS, REFINER_IDS = 77, 6, 5


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``UNet2DConditionModel`` that the forward pass needs; None for components that the model lacks."""

    plan: Plan
    context: int | None
    encoder_width: int | None
    center_input_sample: bool
    flip_sin_to_cos: bool
    freq_shift: int
    time: int
    time_condition: int | None
    post_act: str | None
    time_act: str | None
    labels: LabelKind | None
    num_class_embeds: int | None
    concatenate_labels: bool
    projected: int | None
    added_time: int | None
    sample_size: tuple[int, int]


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; ``ValueError`` names an unsupported field and its value."""
    fields = Fields("UNet2DConditionModel", config)
    widths = fields.integers("block_out_channels", (320, 640, 1280, 1280))
    layers = per_block(fields, "layers_per_block", 2, len(widths))
    act_fn = fields.choice("act_fn", "silu", ACT_FNS)
    style = ResnetStyle(
        groups=fields.integer("norm_num_groups", 32),
        eps=fields.number("norm_eps", 1e-5),
        act_fn=act_fn,
        time_scale_shift=fields.choice("resnet_time_scale_shift", "default", ("default", "scale_shift")),
    )
    down, lowest, up = _transformers(fields, layers)
    time = fields.optional_integer("time_embedding_dim") or 4 * widths[0]
    concatenate = fields.boolean("class_embeddings_concat", False)
    samplers: list[Sampler] = ["conv"] * len(widths)
    plan = Plan(
        width_in=fields.integer("in_channels", 4),
        width_out=fields.integer("out_channels", 4),
        time=2 * time if concatenate else time,
        style=style,
        down=down_stages(widths, layers, down, samplers),
        mid=_mid(fields, widths[-1], lowest),
        up=up_stages(widths[::-1], [count + 1 for count in layers[::-1]], up, samplers),
        mid_scale=fields.number("mid_block_scale_factor", 1.0),
        padding=fields.integer("downsample_padding", 1, minimum=0, maximum=1),
        act_out=act_fn,
        kernel_in=fields.choice("conv_in_kernel", 3, (1, 3, 5, 7)),
        kernel_out=fields.choice("conv_out_kernel", 3, (1, 3, 5, 7)),
    )
    check_plan(fields, plan)

    labels = label_kind(fields, LABELS)
    if concatenate and labels is None:
        raise fields.refusal("class_embeddings_concat", True, "the model has no class embedding to concatenate")
    added = fields.choice("addition_embed_type", None, (None, "text_time"))
    projected = fields.optional_integer("projection_class_embeddings_input_dim")
    added_time = fields.optional_integer("addition_time_embed_dim") if added else None
    if projected is None and (added or labels in ("projection", "simple_projection")):
        raise fields.refusal("projection_class_embeddings_input_dim", None, "this class or addition embedding needs it")
    if added and (added_time is None or added_time >= (projected or 0)):
        raise fields.refusal("addition_time_embed_dim", added_time, "text_time needs it, below the projection's width")
    fields.raw("addition_time_embed_dim")

    encoder_width = fields.optional_integer("encoder_hid_dim")
    hid_types = (None, "text_proj") if encoder_width else (None,)
    fields.choice("encoder_hid_dim_type", None, hid_types)
    fields.only("time_embedding_type", "positional")
    fields.only("attention_type", "default")
    fields.only("dual_cross_attention", False, None)
    fields.only("num_attention_heads", None)
    parsed = Config(
        plan=plan,
        context=_context(fields, plan),
        encoder_width=encoder_width,
        center_input_sample=fields.boolean("center_input_sample", False),
        flip_sin_to_cos=fields.boolean("flip_sin_to_cos", True),
        freq_shift=fields.integer("freq_shift", 0, minimum=0, maximum=1),
        time=time,
        time_condition=fields.optional_integer("time_cond_proj_dim"),
        post_act=fields.choice("timestep_post_act", None, (None, *ACT_FNS)),
        time_act=fields.choice("time_embedding_act_fn", None, (None, *ACT_FNS)),
        labels=labels,
        num_class_embeds=fields.optional_integer("num_class_embeds"),
        concatenate_labels=concatenate,
        projected=projected,
        added_time=added_time,
        sample_size=fields.sample_size(2 ** (len(widths) + 1)),
    )
    fields.finish()
    return parsed


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    width, time = config.plan.down[0].widths_in[0], config.time
    specs = unet_specs(config.plan)
    specs |= timestep_embedding_specs("time_embedding", width, time, condition=config.time_condition)
    specs |= label_specs(
        config.labels, count=config.num_class_embeds, width=width, projected=config.projected, time=time
    )
    if config.added_time and config.projected:
        specs |= timestep_embedding_specs("add_embedding", config.projected, time)
    if config.encoder_width and config.context:
        specs |= linear_specs("encoder_hid_proj", config.encoder_width, config.context)
    return specs


def apply(
    config: Config,
    params: Params,
    tap: Tap,
    x: Float[Array, "b i h w"],
    t: ArrayLike,
    context: Float[Array, "#b s k"] | None = None,
    class_labels: ArrayLike | None = None,
    added: Mapping[str, Array] | None = None,
) -> Float[Array, "b o h w"]:
    """The network's output.

    Args:
        config: the configuration.
        params: all parameters.
        tap: called after each module.
        x: noisy images or latents.
        t: timesteps, a scalar or (B,).
        context: states of a text encoder.
        class_labels: for models with classes.
        added: ``text_embeds`` (B, C) and ``time_ids`` (B, n) for models with an embedding of text and sizes (SDXL), and
            optionally ``timestep_cond`` (B, C) for models that take the guidance scale as an embedding.
    """
    check_image("UNet2DConditionModel", x, config.plan.width_in)
    dtype, batch = params["conv_in.weight"].dtype, x.shape[0]
    x = x.astype(dtype)
    if config.center_input_sample:
        x = 2 * x - 1
    added = _checked_added(config, added, batch, dtype)

    sinusoids_of = functools.partial(
        sinusoidal_embedding, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )
    sinusoids = functools.partial(sinusoids_of, channels=config.plan.down[0].widths_in[0])
    time = tap("time_proj", sinusoids(batch_of_times(t, batch))).astype(dtype)
    condition = added.get("timestep_cond")
    act_fn = config.plan.style.act_fn
    emb = timestep_embedding(
        params, tap, "time_embedding", time, act_fn=act_fn, post_act=config.post_act, condition=condition
    )
    labels = embed_labels(params, tap, config.labels, class_labels, emb, sinusoids, act_fn=act_fn)
    if labels is not None:
        emb = jnp.concatenate([emb, labels], axis=-1) if config.concatenate_labels else emb + labels
    if config.added_time:
        sizes = tap("add_time_proj", sinusoids_of(added["time_ids"].reshape(-1), config.added_time))
        both = jnp.concatenate([added["text_embeds"], sizes.reshape(batch, -1).astype(dtype)], axis=-1)
        emb = emb + timestep_embedding(params, tap, "add_embedding", both)
    if config.time_act:
        emb = activation(tap, "time_embed_act", config.time_act, emb)

    context = _checked_context(config, context, batch, dtype)
    if config.encoder_width and context is not None:
        context = linear(params, tap, "encoder_hid_proj", context)
    return to_nchw(unet(params, tap, config.plan, to_nhwc(x), emb, context))


def inputs(config: Config, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shapes of ``x``, ``t``, ``context``, ``class_labels`` and ``added`` for one example."""

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    width = config.encoder_width or config.context
    more = label_inputs(config.labels, projected=config.projected, time=config.time, dtype=dtype)
    if width:
        more["context"] = floats(1, TEXT_TOKENS, width)
    if config.added_time and config.projected:
        ids = min(TIME_IDS, (config.projected - 1) // config.added_time)
        # SDXL's refiner reads one text encoder, whose pooled vector is as wide as its states, and a score for the size.
        if config.projected - (width or 0) == REFINER_IDS * config.added_time:
            ids = REFINER_IDS
        text = config.projected - ids * config.added_time
        more["added"] = {"text_embeds": floats(1, text), "time_ids": floats(1, ids)}
    return (floats(1, config.plan.width_in, *config.sample_size), jax.ShapeDtypeStruct((), jnp.float32)), more


def _transformers(
    fields: Fields, layers: Sequence[int]
) -> tuple[list[ImageTransformer | None], ImageTransformer, list[ImageTransformer | None]]:
    blocks = len(layers)
    # Despite its name this is the number of heads: https://github.com/huggingface/diffusers/issues/2011.
    heads = per_block(fields, "attention_head_dim", 8, blocks)
    context = per_block(fields, "cross_attention_dim", 1280, blocks, maximum=MAX_CHANNELS)
    linear_projection = fields.boolean("use_linear_projection", False)
    only = fields.raw("only_cross_attention", False)
    only = list(only) if isinstance(only, list | tuple) else [bool(only) if only is None else only] * blocks
    if len(only) != blocks or not all(isinstance(item, bool) for item in only):
        raise fields.refusal("only_cross_attention", only, f"it must be true, false or a list of {blocks}")
    depth_down = _depths(fields, "transformer_layers_per_block", 1, layers)
    depth_up = [(depth[0],) * (count + 1) for depth, count in zip(depth_down, layers, strict=True)][::-1]
    if fields.raw("reverse_transformer_layers_per_block") is not None:
        counts = [count + 1 for count in layers[::-1]]
        depth_up = _depths(fields, "reverse_transformer_layers_per_block", None, counts)
    elif any(len(set(depth)) > 1 for depth in depth_down):
        raise fields.refusal(
            "transformer_layers_per_block", depth_down, "lists within it need reverse_transformer_layers_per_block"
        )
    down_types = fields.block_types("down_block_types", (*[DOWN[1]] * 3, DOWN[0]), DOWN, blocks)
    up_types = fields.block_types("up_block_types", (UP[0], *[UP[1]] * 3), UP, blocks)
    all_down = [
        ImageTransformer(heads[i], depth_down[i], context[i], linear_projection, only_cross=only[i])
        for i in range(blocks)
    ]
    all_up = [each._replace(depth=depth) for each, depth in zip(all_down[::-1], depth_up, strict=True)]
    mid = all_down[-1]._replace(depth=all_down[-1].depth[:1], only_cross=False)
    return (
        [each if kind == DOWN[1] else None for each, kind in zip(all_down, down_types, strict=True)],
        mid,
        [each if kind == UP[1] else None for each, kind in zip(all_up, up_types, strict=True)],
    )


def _depths(fields: Fields, name: str, default: int | None, layers: Sequence[int]) -> list[tuple[int, ...]]:
    value = fields.raw(name, default)
    items = list(value) if isinstance(value, list | tuple) else [value] * len(layers)
    pairs = zip(items, layers, strict=False)
    rows = [tuple(item) if isinstance(item, list | tuple) else (item,) * count for item, count in pairs]
    for row, count in zip(rows, layers, strict=False):
        if len(items) != len(layers) or len(row) != count:
            raise fields.refusal(name, value, f"it must be an integer, or have one entry per block of {list(layers)}")
        for item in row:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= MAX_LAYERS:
                raise fields.refusal(name, value, f"its entries must be integers from 0 to {MAX_LAYERS}")
    return rows


def _mid(fields: Fields, width: int, transformer: ImageTransformer) -> Stage | None:
    kind = fields.choice("mid_block_type", MID[0], MID)
    if kind is None:
        return None
    return mid_stage(width, transformer) if kind == MID[0] else mid_stage(width, None, layers=1)


def _context(fields: Fields, plan: Plan) -> int | None:
    stages = (*plan.down, *([plan.mid] if plan.mid else []), *plan.up)
    widths = {stage.attention.context for stage in stages if isinstance(stage.attention, ImageTransformer)}
    if len(widths) > 1:
        raise fields.refusal("cross_attention_dim", sorted(widths), "one context cannot have several widths")
    return widths.pop() if widths else None


def _checked_context(
    config: Config, context: Float[Array, "#b s k"] | None, batch: int, dtype: Any
) -> Float[Array, "b s k"] | None:
    if config.context is None:
        if context is not None:
            raise ValueError("the model has no cross-attention; leave context out.")
        return None
    width = config.encoder_width or config.context
    shape = None if context is None else context.shape
    if context is None or context.ndim != 3 or context.shape[2] != width or context.shape[0] not in (1, batch):
        raise ValueError(f"context must have shape ({batch}, tokens, {width}), states of a text encoder; got {shape}.")
    return jnp.broadcast_to(context.astype(dtype), (batch, *context.shape[1:]))


def _checked_added(config: Config, added: Mapping[str, Array] | None, batch: int, dtype: Any) -> dict[str, Array]:
    needed = {"text_embeds", "time_ids"} if config.added_time else set()
    known = needed | ({"timestep_cond"} if config.time_condition else set())
    given = {name: jnp.asarray(value) for name, value in (added or {}).items()}
    if not needed <= set(given) <= known:
        raise ValueError(f"added must hold {sorted(needed)} and nothing beyond {sorted(known)}; got {sorted(given)}.")
    shapes = {name: value.shape for name, value in given.items()}
    if any(len(shape) != 2 or shape[0] != batch for shape in shapes.values()):
        raise ValueError(f"added conditions must have shape ({batch}, C), one row per image; got {shapes}.")
    if config.added_time:
        width = shapes["text_embeds"][1] + shapes["time_ids"][1] * config.added_time
        if width != config.projected:
            raise ValueError(
                f"the widths of text_embeds and of time_ids times {config.added_time} must add to {config.projected}; "
                f"got {shapes}."
            )
    if "timestep_cond" in given and shapes["timestep_cond"][1] != config.time_condition:
        raise ValueError(
            f"timestep_cond must have {config.time_condition} channels; got shape {shapes['timestep_cond']}."
        )
    # Sizes above 256 are not exact in bfloat16.
    return {name: value.astype(jnp.float32 if name == "time_ids" else dtype) for name, value in given.items()}
