r"""``DiTTransformer2DModel`` of diffusers: the diffusion transformer :cite:`peebles23`, conditioned on a class.

The image (B, C, H, W) becomes one token per patch, plus a fixed position embedding. In each block, an embedding of time
and class determines shifts β, scales γ and gates α of both halves ("adaLN-Zero"):

.. math:: x \leftarrow x + \alpha_1 \, \mathrm{attention}(\beta_1 + (1 + \gamma_1)\, \mathrm{norm}\, x), \qquad
    x \leftarrow x + \alpha_2 \, \mathrm{mlp}(\beta_2 + (1 + \gamma_2)\, \mathrm{norm}\, x)

Every block has its own embedding; the output layer uses the first block's. The released models predict noise and
variance, see :func:`split_variance`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int

from dae_theory.checks import is_concrete
from scaling.models.blocks_transformer import cross_attention
from scaling.models.conditions import batch_of_times, check_image
from scaling.models.config import MAX_LAYERS, Fields
from scaling.models.layers import (
    ACTIVATIONS,
    Params,
    Specs,
    activation,
    conv,
    conv_specs,
    embedding_specs,
    layer_norm,
    linear,
    linear_specs,
    norm_specs,
    sinusoidal_embedding,
    timestep_embedding,
    timestep_embedding_specs,
    to_nchw,
    to_nhwc,
    widened,
)
from scaling.models.taps import Tap

__all__ = ["Config", "apply", "inputs", "parameters", "parse", "position_embedding", "split_variance"]

# Fixed in PyTorch's class, whatever the configuration.
TIME_CHANNELS = 256
ADA_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``DiTTransformer2DModel`` that matter."""

    heads: int
    head_channels: int
    in_channels: int
    out_channels: int
    layers: int
    attention_bias: bool
    sample_size: int
    patch_size: int
    act_fn: str
    classes: int
    norm_affine: bool
    norm_eps: float

    @property
    def channels(self) -> int:
        """Width of the tokens."""
        return self.heads * self.head_channels


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json, also of the class's old name ``Transformer2DModel``.

    ``ValueError`` names an unsupported field and its value.
    """
    fields = Fields("DiTTransformer2DModel", config)
    # Fields of Transformer2DModel's other uses.
    for name, *values in (
        ("norm_type", "ada_norm_zero"),
        ("attention_type", "default"),
        ("caption_channels", None),
        ("cross_attention_dim", None),
        ("double_self_attention", False),
        ("interpolation_scale", None),
        ("num_vector_embeds", None),
        ("only_cross_attention", False),
        ("use_additional_conditions", None, False),
        ("use_linear_projection", False),
    ):
        fields.only(name, *values)
    in_channels = fields.integer("in_channels", 4)
    result = Config(
        heads=fields.integer("num_attention_heads", 16),
        head_channels=fields.integer("attention_head_dim", 72),
        in_channels=in_channels,
        out_channels=fields.optional_integer("out_channels") or in_channels,
        layers=fields.integer("num_layers", 28, maximum=MAX_LAYERS),
        attention_bias=fields.boolean("attention_bias", True),
        sample_size=fields.integer("sample_size", 32),
        patch_size=fields.integer("patch_size", 2),
        act_fn=fields.choice("activation_fn", "gelu-approximate", ("gelu-approximate", "gelu")),
        classes=fields.integer("num_embeds_ada_norm", 1000),
        norm_affine=fields.boolean("norm_elementwise_affine", False),
        norm_eps=fields.number("norm_eps", 1e-5),
    )
    if result.channels % 4:
        raise fields.refusal("attention_head_dim", result.head_channels, "times the heads it must be a multiple of 4")
    if result.patch_size > result.sample_size:
        raise fields.refusal("patch_size", result.patch_size, f"it must not exceed sample_size = {result.sample_size}")
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint; the position embedding is computed and has none."""
    channels, patch = config.channels, config.patch_size
    specs = conv_specs("pos_embed.proj", config.in_channels, channels, kernel=patch)
    for i in range(config.layers):
        block = f"transformer_blocks.{i}"
        emb = f"{block}.norm1.emb"
        specs |= timestep_embedding_specs(f"{emb}.timestep_embedder", TIME_CHANNELS, channels)
        specs |= embedding_specs(f"{emb}.class_embedder.embedding_table", config.classes + 1, channels)
        specs |= linear_specs(f"{block}.norm1.linear", channels, 6 * channels)
        for part in ("to_q", "to_k", "to_v"):
            specs |= linear_specs(f"{block}.attn1.{part}", channels, channels, bias=config.attention_bias)
        specs |= linear_specs(f"{block}.attn1.to_out.0", channels, channels)
        if config.norm_affine:
            specs |= norm_specs(f"{block}.norm3", channels)
        specs |= linear_specs(f"{block}.ff.net.0.proj", channels, 4 * channels)
        specs |= linear_specs(f"{block}.ff.net.2", 4 * channels, channels)
    specs |= linear_specs("proj_out_1", channels, 2 * channels)
    return specs | linear_specs("proj_out_2", channels, patch**2 * config.out_channels)


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shapes of one image, its timestep and its class."""
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    return (jax.ShapeDtypeStruct(shape, dtype), one), {"class_labels": one}


def apply(
    config: Config,
    params: Params,
    tap: Tap,
    x: Float[Array, "b c h w"],
    t: ArrayLike,
    context: None = None,
    class_labels: ArrayLike | None = None,
    added: None = None,
) -> Float[Array, "b o h w"]:
    """The output, with all ``out_channels``, at timesteps ``t``, a scalar or (B,), for classes ``class_labels`` (B,).

    Classes are 0 to ``num_embeds_ada_norm``, the last being the null class of guidance; others raise ``ValueError``, or
    give NaN under a trace. Images are square, and their size is any multiple of the patch size: positions are rescaled
    to the grid of training.
    """
    if context is not None or added is not None:
        raise ValueError("DiTTransformer2DModel takes neither context nor added conditions; leave them out.")
    patch, name, batch = config.patch_size, "pos_embed.proj", x.shape[0]
    check_image("DiTTransformer2DModel", x, config.in_channels, multiple=patch)
    if x.shape[2] != x.shape[3]:
        raise ValueError(f"DiTTransformer2DModel takes square images; got shape {x.shape}.")
    labels = _checked_labels(config, class_labels, batch)
    side = x.shape[2] // patch
    x = to_nhwc(x).astype(params[f"{name}.weight"].dtype)
    x = conv(params, tap, name, x, stride=patch, padding=(0, 0)).reshape(batch, side**2, config.channels)
    wide = widened(x)
    positions = jnp.asarray(position_embedding(config.channels, side, config.sample_size // patch), wide.dtype)
    x = tap("pos_embed", (wide + positions[None, :, :]).astype(x.dtype))

    times = sinusoidal_embedding(batch_of_times(t, batch), TIME_CHANNELS, flip_sin_to_cos=True, freq_shift=1.0)
    first = None
    for i in range(config.layers):
        emb = _embed(config, params, tap, f"transformer_blocks.{i}.norm1.emb", times, labels)
        first = emb if first is None else first
        x = _block(config, params, tap, f"transformer_blocks.{i}", x, emb)

    assert first is not None
    shift, scale = jnp.split(linear(params, tap, "proj_out_1", ACTIVATIONS["silu"](first))[:, None, :], 2, axis=-1)
    x = layer_norm(params, tap, "norm_out", x, eps=ADA_NORM_EPS) * (1 + scale) + shift
    x = linear(params, tap, "proj_out_2", x).reshape(batch, side, side, patch, patch, config.out_channels)
    return to_nchw(jnp.swapaxes(x, 2, 3).reshape(batch, side * patch, side * patch, config.out_channels))


def split_variance(
    config: Config, out: Float[Array, "b o h w"]
) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"] | None]:
    """The prediction, and the learned variance of the reverse step if the output has twice the input's channels."""
    c = config.in_channels
    return (out[:, :c], out[:, c:]) if config.out_channels == 2 * c else (out, None)


def position_embedding(channels: int, side: int, trained_side: int) -> np.ndarray:
    r"""Sines and cosines of the column, then of the row, each in half the channels: (side², channels), float32.

    .. math:: \omega_j = 10^{-4 j / (\mathrm{channels}/4)}, \quad j = 0, \dots, \mathrm{channels}/4 - 1

    Patches are in row-major order; coordinates increase from 0 in steps of ``trained_side / side``.
    """
    omega = 10000.0 ** -(np.arange(channels // 4) / (channels // 4))
    coordinate = np.arange(side, dtype=np.float32) / np.float32(side / trained_side)
    phase = coordinate.astype(np.float64)[:, None] * omega[None, :]
    wave = np.concatenate([np.sin(phase), np.cos(phase)], axis=1)
    column, row = np.tile(wave, (side, 1)), np.repeat(wave, side, axis=0)
    return np.concatenate([column, row], axis=1).astype(np.float32)


def _checked_labels(config: Config, class_labels: ArrayLike | None, batch: int) -> Int[Array, " b"]:
    if class_labels is None:
        raise ValueError(f"DiTTransformer2DModel needs class_labels; {config.classes} is the null class.")
    labels = jnp.asarray(class_labels)
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"class_labels must be ({batch},) integers, got {labels.dtype} of shape {labels.shape}.")
    if is_concrete(labels) and not np.all((np.asarray(labels) >= 0) & (np.asarray(labels) <= config.classes)):
        raise ValueError(f"class_labels must lie in [0, {config.classes}], {config.classes} being the null class.")
    return labels


def _embed(
    config: Config, params: Params, tap: Tap, name: str, times: Float[Array, "b f"], labels: Int[Array, " b"]
) -> Float[Array, "b e"]:
    table = params[f"{name}.class_embedder.embedding_table.weight"]
    times = tap(f"{name}.time_proj", times).astype(table.dtype)
    times = timestep_embedding(params, tap, f"{name}.timestep_embedder", times)
    # Otherwise a negative label would count from the end.
    labels = jnp.where(labels < 0, config.classes + 1, labels)
    vectors = tap(f"{name}.class_embedder.embedding_table", table.at[labels].get(mode="fill", fill_value=jnp.nan))
    return tap(name, times + tap(f"{name}.class_embedder", vectors))


def _block(
    config: Config, params: Params, tap: Tap, name: str, x: Float[Array, "b t e"], emb: Float[Array, "b e"]
) -> Float[Array, "b t e"]:
    modulation = linear(params, tap, f"{name}.norm1.linear", activation(tap, f"{name}.norm1.silu", "silu", emb))
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None, :], 6, axis=-1)
    y = layer_norm(params, tap, f"{name}.norm1.norm", x, eps=ADA_NORM_EPS) * (1 + scale1) + shift1
    y = tap(f"{name}.norm1", y)
    x = x + gate1 * cross_attention(params, tap, f"{name}.attn1", y, y, heads=config.heads)
    y = layer_norm(params, tap, f"{name}.norm3", x, eps=config.norm_eps) * (1 + scale2) + shift2
    y = activation(tap, f"{name}.ff.net.0", config.act_fn, linear(params, tap, f"{name}.ff.net.0.proj", y))
    return tap(name, x + gate2 * tap(f"{name}.ff", linear(params, tap, f"{name}.ff.net.2", y)))
