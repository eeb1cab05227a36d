"""Transformers over an image's pixels, with cross-attention to a context. Images are (B, H, W, C), tokens (B, T, C)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from scaling.models.layers import (
    ACTIVATIONS,
    Params,
    Specs,
    attention,
    conv,
    conv_specs,
    group_norm,
    layer_norm,
    linear,
    linear_specs,
    norm_specs,
)
from scaling.models.taps import Tap

__all__ = ["cross_attention", "cross_attention_specs", "image_transformer", "image_transformer_specs"]


def image_transformer_specs(
    name: str, channels: int, *, depth: int, context: int, linear_projection: bool, only_cross: bool
) -> Specs:
    """Parameters of :func:`image_transformer`; ``context`` is the width of the context's tokens."""
    specs = norm_specs(f"{name}.norm", channels)
    for part in ("proj_in", "proj_out"):
        if linear_projection:
            specs |= linear_specs(f"{name}.{part}", channels, channels)
        else:
            specs |= conv_specs(f"{name}.{part}", channels, channels, kernel=1)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        specs |= cross_attention_specs(f"{block}.attn1", channels, context if only_cross else channels)
        specs |= cross_attention_specs(f"{block}.attn2", channels, context)
        for norm in ("norm1", "norm2", "norm3"):
            specs |= norm_specs(f"{block}.{norm}", channels)
        specs |= linear_specs(f"{block}.ff.net.0.proj", channels, 8 * channels)
        specs |= linear_specs(f"{block}.ff.net.2", 4 * channels, channels)
    return specs


def image_transformer(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b h w c"],
    context: Float[Array, "b s k"],
    *,
    depth: int,
    heads: int,
    groups: int,
    only_cross: bool,
) -> Float[Array, "b h w c"]:
    """Group norm, projection, transformer blocks over the pixels, projection, plus the input.

    Args:
        params: all parameters.
        tap: called after each module.
        name: of the module.
        x: the image.
        context: tokens to attend to.
        depth: number of transformer blocks.
        heads: number of heads.
        groups: number of groups of the norm.
        only_cross: whether the first attention of each block attends to the context too, instead of to the pixels.
    """
    y = group_norm(params, tap, f"{name}.norm", x, groups=groups, eps=1e-6)
    tokens = (x.shape[0], -1, x.shape[-1])
    if params[f"{name}.proj_in.weight"].ndim == 4:
        y = conv(params, tap, f"{name}.proj_in", y).reshape(tokens)
    else:
        y = linear(params, tap, f"{name}.proj_in", y.reshape(tokens))
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        y = _transformer_block(params, tap, block, y, context, heads=heads, only_cross=only_cross)
    if params[f"{name}.proj_out.weight"].ndim == 4:
        y = conv(params, tap, f"{name}.proj_out", y.reshape(x.shape))
    else:
        y = linear(params, tap, f"{name}.proj_out", y).reshape(x.shape)
    return tap(name, x + y)


def cross_attention_specs(name: str, channels: int, context: int) -> Specs:
    """Parameters of :func:`cross_attention`; ``context`` is the width of the tokens it attends to."""
    specs = linear_specs(f"{name}.to_q", channels, channels, bias=False)
    for part in ("to_k", "to_v"):
        specs |= linear_specs(f"{name}.{part}", context, channels, bias=False)
    return specs | linear_specs(f"{name}.to_out.0", channels, channels)


def cross_attention(
    params: Params, tap: Tap, name: str, x: Float[Array, "b t c"], context: Float[Array, "b s k"], *, heads: int
) -> Float[Array, "b t c"]:
    """Attention of the tokens ``x`` to ``context``; pass ``x`` as the context for self-attention."""
    q = linear(params, tap, f"{name}.to_q", x)
    k, v = (linear(params, tap, f"{name}.{part}", context) for part in ("to_k", "to_v"))
    return tap(name, linear(params, tap, f"{name}.to_out.0", attention(q, k, v, heads=heads)))


def _transformer_block(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b t c"],
    context: Float[Array, "b s k"],
    *,
    heads: int,
    only_cross: bool,
) -> Float[Array, "b t c"]:
    y = layer_norm(params, tap, f"{name}.norm1", x, eps=1e-5)
    x = x + cross_attention(params, tap, f"{name}.attn1", y, context if only_cross else y, heads=heads)
    y = layer_norm(params, tap, f"{name}.norm2", x, eps=1e-5)
    x = x + cross_attention(params, tap, f"{name}.attn2", y, context, heads=heads)
    y = layer_norm(params, tap, f"{name}.norm3", x, eps=1e-5)
    return tap(name, x + _gated_feed_forward(params, tap, f"{name}.ff", y))


def _gated_feed_forward(params: Params, tap: Tap, name: str, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
    hidden, gate = jnp.split(linear(params, tap, f"{name}.net.0.proj", x), 2, axis=-1)
    hidden = tap(f"{name}.net.0", hidden * ACTIVATIONS["gelu"](gate))
    return tap(name, linear(params, tap, f"{name}.net.2", hidden))
