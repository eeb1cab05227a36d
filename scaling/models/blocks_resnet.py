r"""Convolutional residual blocks, image attention, and down- and upsampling. Images are (B, H, W, C)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling.models.layers import (
    ACTIVATIONS,
    Params,
    Specs,
    attention,
    conv,
    conv_specs,
    group_norm,
    linear,
    linear_specs,
    norm_specs,
)
from scaling.models.taps import Tap

__all__ = [
    "ResnetStyle",
    "downsample_conv",
    "image_attention",
    "image_attention_specs",
    "modern_attention_key",
    "resnet",
    "resnet_specs",
    "upsample_conv",
    "upsample_nearest",
]


class ResnetStyle(NamedTuple):
    """The hyperparameters that all residual blocks of a model share."""

    groups: int
    eps: float
    act_fn: str = "silu"
    time_scale_shift: Literal["default", "scale_shift"] = "default"


def resnet_specs(name: str, c_in: int, c_out: int, *, time: int | None, style: ResnetStyle) -> Specs:
    """Parameters of :func:`resnet`; ``time`` is the width of the time embedding, None if it has none."""
    specs = norm_specs(f"{name}.norm1", c_in) | conv_specs(f"{name}.conv1", c_in, c_out)
    if time is not None:
        width = 2 * c_out if style.time_scale_shift == "scale_shift" else c_out
        specs |= linear_specs(f"{name}.time_emb_proj", time, width)
    specs |= norm_specs(f"{name}.norm2", c_out) | conv_specs(f"{name}.conv2", c_out, c_out)
    return specs | conv_specs(f"{name}.conv_shortcut", c_in, c_out, kernel=1) if c_in != c_out else specs


def resnet(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b h w i"],
    emb: Float[Array, "b e"] | None,
    *,
    style: ResnetStyle,
    scale: float = 1.0,
    sampler: Literal["up", "down"] | None = None,
) -> Float[Array, "b h2 w2 o"]:
    r"""A residual block: norm, nonlinearity and convolution, twice, with the time embedding in between.

    .. math:: y = \big(S x + W_2 * \phi(N_2(W_1 * \phi(N_1 x) + P \phi(e)))\big) / \mathrm{scale}

    The tap ``name + ".nonlinearity"`` follows the second norm: PyTorch's module is called several times, and this is
    its last call.

    Args:
        params: all parameters.
        tap: called after each module.
        name: of the module.
        x: the image.
        emb: the embedding of time and conditions; None for a block without one. It is added before the second norm, or
            scales and shifts its output, as ``style.time_scale_shift`` says.
        style: hyperparameters shared by all blocks.
        scale: divides the output.
        sampler: doubles or halves the size before the first convolution.
    """
    act = ACTIVATIONS[style.act_fn]
    h = act(group_norm(params, tap, f"{name}.norm1", x, groups=style.groups, eps=style.eps))
    if sampler == "up":
        x, h = upsample_nearest(x), tap(f"{name}.upsample", upsample_nearest(h))
    elif sampler == "down":
        x, h = _average_pool(x), tap(f"{name}.downsample", _average_pool(h))
    h = conv(params, tap, f"{name}.conv1", h)

    scale_shift = None
    if f"{name}.time_emb_proj.weight" in params:
        assert emb is not None
        projected = linear(params, tap, f"{name}.time_emb_proj", act(emb))[:, None, None, :]
        if style.time_scale_shift == "scale_shift":
            scale_shift = jnp.split(projected, 2, axis=-1)
        else:
            h = h + projected
    h = group_norm(params, tap, f"{name}.norm2", h, groups=style.groups, eps=style.eps)
    if scale_shift is not None:
        h = h * (1 + scale_shift[0]) + scale_shift[1]
    h = tap(f"{name}.nonlinearity", act(h))
    h = conv(params, tap, f"{name}.conv2", h)
    if f"{name}.conv_shortcut.weight" in params:
        x = conv(params, tap, f"{name}.conv_shortcut", x)
    return tap(name, (x + h) / scale)


def downsample_conv(
    params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"], *, padding: int
) -> Float[Array, "b h2 w2 c"]:
    """A 3x3 convolution of stride 2; ``padding`` 0 pads one row below and one column to the right, as in diffusers."""
    pad = (0, 1) if padding == 0 else (padding, padding)
    return tap(name, conv(params, tap, f"{name}.conv", x, stride=2, padding=pad))


def upsample_conv(
    params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"], *, size: tuple[int, int] | None = None
) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbor upsampling to ``size``, by default twice the size, then a 3x3 convolution."""
    return tap(name, conv(params, tap, f"{name}.conv", upsample_nearest(x, size)))


def upsample_nearest(x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbor upsampling: each pixel is the input's at the same fraction of the size, rounded down."""
    batch, height, width, channels = x.shape
    if size in (None, (2 * height, 2 * width)):
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        return x.reshape(batch, 2 * height, 2 * width, channels)
    for axis, (old, new) in enumerate(zip(x.shape[1:3], size, strict=True), start=1):
        x = jnp.take(x, np.arange(new) * old // new, axis=axis)
    return x


def image_attention_specs(name: str, channels: int, *, norm: bool = True) -> Specs:
    """Parameters of :func:`image_attention`."""
    specs = norm_specs(f"{name}.group_norm", channels) if norm else {}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        specs |= linear_specs(f"{name}.{part}", channels, channels)
    return specs


def image_attention(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b h w c"],
    *,
    heads: int,
    groups: int,
    eps: float,
    scale: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Group norm (if it has parameters) and self-attention among the pixels, plus the input.

    Args:
        params: all parameters.
        tap: called after each module.
        name: of the module.
        x: the image.
        heads: number of heads.
        groups: number of groups of the norm.
        eps: of the norm.
        scale: divides the output.
    """
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    if f"{name}.group_norm.weight" in params:
        # PyTorch's module sees (B, C, T) here, which is no layout of taps, so this norm has no tap.
        tokens = group_norm(params, Tap(), f"{name}.group_norm", tokens, groups=groups, eps=eps)
    q, k, v = (linear(params, tap, f"{name}.{part}", tokens) for part in ("to_q", "to_k", "to_v"))
    mixed = linear(params, tap, f"{name}.to_out.0", attention(q, k, v, heads=heads))
    return tap(name, (x + mixed.reshape(x.shape)) / scale)


def modern_attention_key(key: str) -> str:
    """The present name of a parameter of :func:`image_attention`; in 2022, ``to_q`` was ``query``, and so on."""
    module, _, leaf = key.rpartition(".")
    parent, _, part = module.rpartition(".")
    modern = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{parent}.{modern[part]}.{leaf}" if part in modern and "attentions" in parent else key


def _average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))
