r"""Layers of all architectures, as functions of the flat dict of parameters and of the layer's name in it.

Every layer is called as ``layer(params, tap, name, x, ...)``, reads its parameters at ``name + ".weight"`` and so on,
and ends in ``tap(name, y)``. Images are (B, H, W, C), tokens (B, T, C). Normalizations and softmax are computed in at
least float32, products in the dtype of the parameters. For each layer another function lists its parameters.

On CPUs, attention is computed in chunks where its matrix is large, and convolutions by the routes of
:mod:`scaling.models.cpu_convolution`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scaling.backend import cpu_aware
from scaling.models.config import ParamSpec
from scaling.models.cpu_convolution import convolution
from scaling.models.taps import Tap

__all__ = [
    "ACTIVATIONS",
    "ACT_FNS",
    "Params",
    "Specs",
    "activation",
    "attention",
    "conv",
    "conv_specs",
    "embedding_specs",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_specs",
    "norm_specs",
    "sinusoidal_embedding",
    "timestep_embedding",
    "timestep_embedding_specs",
    "to_nchw",
    "to_nhwc",
    "widened",
]

Params: TypeAlias = Mapping[str, Array]
Specs: TypeAlias = dict[str, ParamSpec]
# On a CPU, attention matrices of more than CHUNK_FROM entries are computed QUERY_CHUNK rows of one head at a time.
QUERY_CHUNK, CHUNK_FROM = 256, 1 << 22


def to_nhwc(x: Float[Array, "b c h w"]) -> Float[Array, "b h w c"]:
    """Channels last, the layout inside the networks."""
    return jnp.moveaxis(x, 1, -1)


def to_nchw(x: Float[Array, "b h w c"]) -> Float[Array, "b c h w"]:
    """Channels first, the layout of inputs, outputs and taps."""
    return jnp.moveaxis(x, -1, 1)


def linear_specs(name: str, c_in: int, c_out: int, *, bias: bool = True) -> Specs:
    """Parameters of :func:`linear`."""
    specs = {f"{name}.weight": ParamSpec((c_out, c_in), "linear")}
    return specs | {f"{name}.bias": ParamSpec((c_out,), "vector")} if bias else specs


def linear(params: Params, tap: Tap, name: str, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    r"""An affine map of the last axis, :math:`y = x W + b`; linear if there is no bias parameter."""
    return tap(name, _add_bias(params, name, x @ params[f"{name}.weight"]))


def conv_specs(name: str, c_in: int, c_out: int, *, kernel: int = 3) -> Specs:
    """Parameters of :func:`conv`."""
    weight = ParamSpec((c_out, c_in, kernel, kernel), "conv")
    return {f"{name}.weight": weight, f"{name}.bias": ParamSpec((c_out,), "vector")}


def conv(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b h w i"],
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """A convolution; ``padding`` counts zeros before and after each spatial axis and by default keeps the size."""
    weight = params[f"{name}.weight"]
    kernel = weight.shape[0]
    pad = padding or ((kernel - 1) // 2, (kernel - 1) // 2)
    if kernel == stride == 1:
        return tap(name, _add_bias(params, name, x @ weight[0, 0]))
    y = convolution(x, weight, stride, pad)
    return tap(name, _add_bias(params, name, y))


def norm_specs(name: str, channels: int) -> Specs:
    """Parameters of :func:`group_norm`, and of an affine :func:`layer_norm`."""
    return {f"{name}.{part}": ParamSpec((channels,), "vector") for part in ("weight", "bias")}


def group_norm(
    params: Params, tap: Tap, name: str, x: Float[Array, "b *s c"], *, groups: int, eps: float
) -> Float[Array, "b *s c"]:
    r"""Normalization over the positions and the channels of each group, then weight and bias.

    .. math:: y = w \odot (x - \mu_g) / \sqrt{\sigma_g^2 + \epsilon} + b
    """
    batch, channels = x.shape[0], x.shape[-1]
    wide = widened(x).reshape(batch, -1, channels)
    centered = wide - _group_means(wide, groups)
    normal = centered * jax.lax.rsqrt(_group_means(jnp.square(centered), groups) + eps)
    return tap(name, _affine(params, name, normal.reshape(x.shape)).astype(x.dtype))


def layer_norm(params: Params, tap: Tap, name: str, x: Float[Array, "*b c"], *, eps: float) -> Float[Array, "*b c"]:
    r"""Normalization over the last axis, then weight and bias if the layer has these parameters."""
    wide = widened(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    normal = (wide - mean) * jax.lax.rsqrt(variance + eps)
    return tap(name, _affine(params, name, normal).astype(x.dtype))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu-approximate": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""Nonlinearities by their names in configurations; ``gelu`` is exact."""

ACT_FNS = ("silu", "swish", "mish", "gelu", "relu")
"""Nonlinearities that diffusers' ``act_fn`` may name."""


def activation(tap: Tap, name: str, kind: str, x: Array) -> Array:
    """The nonlinearity ``kind`` of :data:`ACTIVATIONS`, with its own tap."""
    return tap(name, ACTIVATIONS[kind](x))


def embedding_specs(name: str, count: int, channels: int) -> Specs:
    """Parameters of a table of ``count`` vectors."""
    return {f"{name}.weight": ParamSpec((count, channels), "embedding")}


def sinusoidal_embedding(
    t: Float[Array, " b"], channels: int, *, flip_sin_to_cos: bool, freq_shift: float | int, max_period: float = 10000.0
) -> Float[Array, "b c"]:
    r"""Sines, then cosines (the reverse if ``flip_sin_to_cos``), of t at c/2 geometric frequencies, in float32.

    .. math:: \omega_j = P^{-j / (c/2 - \mathrm{shift})}, \quad j = 0, \dots, c/2 - 1

    An odd c ends in a zero.
    """
    half = channels // 2
    # The exponent is rounded to float32 in PyTorch's order: at t = 1000, one ulp of ω changes the phase by 6e-5.
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = t.astype(jnp.float32)[:, None] * jnp.asarray(frequency)[None, :]
    parts = (jnp.cos(phase), jnp.sin(phase)) if flip_sin_to_cos else (jnp.sin(phase), jnp.cos(phase))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, channels % 2)))


def timestep_embedding_specs(name: str, c_in: int, channels: int, *, condition: int | None = None) -> Specs:
    """Parameters of :func:`timestep_embedding`; ``condition`` is the width of its condition, if it has one."""
    specs = linear_specs(f"{name}.linear_1", c_in, channels) | linear_specs(f"{name}.linear_2", channels, channels)
    return specs | linear_specs(f"{name}.cond_proj", condition, c_in, bias=False) if condition else specs


def timestep_embedding(
    params: Params,
    tap: Tap,
    name: str,
    x: Float[Array, "b i"],
    *,
    act_fn: str = "silu",
    post_act: str | None = None,
    condition: Float[Array, "b k"] | None = None,
) -> Float[Array, "b o"]:
    """Linear, nonlinearity, linear.

    Args:
        params: all parameters.
        tap: called after each module.
        name: of the module.
        x: the sinusoidal embedding.
        act_fn: the nonlinearity.
        post_act: a nonlinearity of the output, if any.
        condition: projected and added to ``x``, if given.
    """
    if condition is not None:
        x = x + linear(params, tap, f"{name}.cond_proj", condition)
    x = activation(tap, f"{name}.act", act_fn, linear(params, tap, f"{name}.linear_1", x))
    x = linear(params, tap, f"{name}.linear_2", x)
    return tap(name, x if post_act is None else activation(tap, f"{name}.post_act", post_act, x))


def attention(
    q: Float[Array, "b t c"],
    k: Float[Array, "b s c"],
    v: Float[Array, "b s c"],
    *,
    heads: int,
    causal: bool = False,
) -> Float[Array, "b t c"]:
    r"""Attention with ``heads`` heads, which divide the channels.

    .. math:: \mathrm{softmax}\big(q k^\top / \sqrt{c/\mathrm{heads}}\big)\, v

    ``causal`` masks later keys. On a CPU, a matrix of more than ``CHUNK_FROM`` entries is never stored whole:
    ``QUERY_CHUNK`` queries of one head are processed at a time, and recomputed in the backward pass.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, x.shape[-1] // heads) for x in (q, k, v))
    if not cpu_aware():
        # JAX's function raises under strict dtype promotion, which a caller may have set.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(*q.shape[:2], -1)
    batch, tokens, _, channels = q.shape
    positions = jnp.arange(tokens) if causal else None
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    if batch * heads * tokens * k.shape[2] <= CHUNK_FROM:
        mixed = _mix(q, k, v, positions)
    else:
        q, k, v = (x.reshape(batch * heads, -1, channels) for x in (q, k, v))
        mixed = _chunked_mix(q, k, v, positions).reshape(batch, heads, tokens, channels)
    return jnp.moveaxis(mixed, 1, 2).reshape(batch, tokens, -1)


def _chunked_mix(
    q: Float[Array, "n t d"], k: Float[Array, "n s d"], v: Float[Array, "n s d"], positions: Int[Array, " t"] | None
) -> Float[Array, "n t d"]:
    def one_head(qkv: tuple[Array, Array, Array]) -> Float[Array, "t d"]:
        q, k, v = qkv

        @jax.checkpoint
        def one_query(query_at: tuple[Float[Array, " d"], Int[Array, ""] | None]) -> Float[Array, " d"]:
            query, position = query_at
            return _mix(query[None], k, v, None if position is None else position[None])[0]

        return jax.lax.map(one_query, (q, positions), batch_size=QUERY_CHUNK)

    return jax.lax.map(one_head, (q, k, v))


def _mix(
    q: Float[Array, "*n t d"], k: Float[Array, "*n s d"], v: Float[Array, "*n s d"], positions: Int[Array, " t"] | None
) -> Float[Array, "*n t d"]:
    """Attention of queries q; with ``positions``, each query sees only the keys up to its own position."""
    wide, scale = widened(q).dtype, q.shape[-1] ** -0.5
    # In half precision, scaled queries would be rounded once more; otherwise they are the smaller array to scale.
    exact = q.dtype == wide
    logits = jnp.matmul(scale * q if exact else q, jnp.swapaxes(k, -1, -2), preferred_element_type=wide)
    logits = logits if exact else scale * logits
    if positions is not None:
        seen = jnp.arange(k.shape[-2])[None, :] <= positions[:, None]
        logits = jnp.where(jnp.broadcast_to(seen, logits.shape), logits, -jnp.inf)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    # The sum divides the results, not the weights: a pass over the matrix takes about as long as a product.
    mixed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=wide)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


def _group_means(x: Float[Array, "b s c"], groups: int) -> Float[Array, "b 1 c"]:
    batch, _, channels = x.shape
    # Over the positions first: passes over a last axis as short as a group's channels are slow.
    mean = jnp.mean(jnp.mean(x, axis=1).reshape(batch, groups, -1), axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, 1, channels)


def widened(x: Array) -> Array:
    """``x`` in at least float32."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _affine(params: Params, name: str, x: Array) -> Array:
    if f"{name}.weight" not in params:
        return x
    return x * _last_axis(params[f"{name}.weight"], x) + _last_axis(params[f"{name}.bias"], x)


def _add_bias(params: Params, name: str, x: Array) -> Array:
    bias = params.get(f"{name}.bias")
    return x if bias is None else x + _last_axis(bias, x)


def _last_axis(v: Float[Array, " c"], x: Array) -> Array:
    return v.astype(x.dtype).reshape((1,) * (x.ndim - 1) + v.shape)
