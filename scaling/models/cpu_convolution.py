"""Convolutions of images (B, H, W, C) as matrix products, where the CPU's own routine or its derivative is slow.

:func:`convolution` is the one that layers call; :func:`conv_route` chooses how to compute it from the shapes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from scaling.backend import cpu_aware

__all__ = ["ROUTES", "conv_route", "convolution"]

Product: TypeAlias = Callable[[Array, Array, int, tuple[int, int]], Array]
"""A convolution ``(x, weight, stride, pad)``."""

# Measured on two cores: up to this many output pixels one product beats the convolution, if channels are many or the
# columns, of which there are kernel² as many as inputs, few, and the results not thin. See conv_route.
COLUMNS_PIXELS, COLUMNS_CHANNELS, COLUMNS_ENTRIES, COLUMNS_WIDTH = 256, 256, 1 << 22, 16
# Up to this many entries derivatives are worth the columns, which are kept for them.
DERIVATIVE_ENTRIES = 1 << 24


def convolution(
    x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"], stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    """A convolution with ``pad`` zeros before and after each spatial axis, by the route of :func:`conv_route`."""
    return ROUTES[conv_route(x.shape, weight.shape, stride, pad)](x, weight, stride, pad)


def conv_route(
    x: Sequence[int], weight: Sequence[int], stride: int, pad: tuple[int, int]
) -> Literal["native", "product", "product_derivatives"]:
    r"""How to compute a convolution of these shapes, (B, H, W, I) and (K, K, I, O).

    As one product :math:`\mathrm{columns}(x) W` of a (B H' W', K² I) matrix on a CPU if the image is small; else by
    XLA's own, ``native``, whose derivatives are products on a CPU if the columns are not too many. XLA's derivatives
    take 1 to 5 times as long there, and 10 to 25 times inside a loop such as that of a training run.
    """
    if not cpu_aware():
        return "native"
    pixels = math.prod(_out_size(n, weight[0], stride, pad) for n in x[1:3])
    entries = x[0] * pixels * math.prod(weight[:3])
    few = entries <= COLUMNS_ENTRIES and weight[3] >= COLUMNS_WIDTH
    if pixels <= COLUMNS_PIXELS and (few or min(weight[2:]) >= COLUMNS_CHANNELS):
        return "product"
    return "product_derivatives" if entries <= DERIVATIVE_ENTRIES else "native"


def _out_size(size: int, kernel: int, stride: int, pad: tuple[int, int]) -> int:
    return (size + sum(pad) - kernel) // stride + 1


def _native(
    x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"], stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _product(
    x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"], stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    return _matmul(_columns(x, weight.shape[0], stride, pad), weight.reshape(-1, weight.shape[-1]))


def _matmul(x: Float[Array, "*b i"], weight: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    # As matrices: the derivative in the weights would contract several axes at once, for which the CPU copies first.
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)


def _columns(x: Float[Array, "b h w i"], kernel: int, stride: int, pad: tuple[int, int]) -> Float[Array, "b h2 w2 n"]:
    """The inputs of each output, side by side: kernel² times the channels."""
    # Columns, then rows: two times k passes are fewer than k². Pads that also cut are faster than slices.
    for axis in (2, 1):
        size = x.shape[axis]
        stop = stride * (_out_size(size, kernel, stride, pad) - 1) + 1
        shifted = []
        for i in range(kernel):
            config = [(0, 0, 0)] * x.ndim
            config[axis] = (pad[0] - i, stop - (size + pad[0] - i), 0)
            whole = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
            shifted.append(jax.lax.slice_in_dim(whole, 0, stop, stride, axis))
        x = jnp.concatenate(shifted, axis=-1)
    return x


def _spread_product(
    x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"], stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    """The same with the product first: inputs times the kernel, spread over the outputs; at stride 1 and equal size.

    Else it is :func:`_product`. Transposed, in either argument, it is a product with the columns of the cotangent that
    both arguments share: less to move than the columns of the input once more and their transpose.
    """
    kernel, c_in, c_out = weight.shape[0], *weight.shape[2:]
    if stride != 1 or sum(pad) != kernel - 1:
        return _product(x, weight, stride, pad)
    # Output p takes input p + k - pad times the k-th kernel, so input q has output q - k + pad: flipped columns.
    parts = _matmul(x, jnp.moveaxis(jnp.flip(weight, (0, 1)), 2, 0).reshape(c_in, -1))
    shape = jax.ShapeDtypeStruct((*x.shape[:3], c_out), x.dtype)
    (y,) = jax.linear_transpose(lambda y: _columns(y, kernel, stride, (pad[1], pad[0])), shape)(parts)
    return y


def _with_derivatives(primal: Product, in_both: Product, in_input: Product) -> Product:
    """``primal`` with the derivatives of equal functions of ordinary operations, in both arguments or the input alone.

    So both modes and all orders are JAX's own. Zeros stay symbolic: without a derivative in the weights nothing is kept
    for it.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
    def function(x: Array, weight: Array, stride: int, pad: tuple[int, int]) -> Array:
        return primal(x, weight, stride, pad)

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def derivatives(
        stride: int, pad: tuple[int, int], primals: tuple[Array, Array], tangents: tuple[Any, Any]
    ) -> tuple[Array, Array]:
        (x, weight), (dx, dw) = primals, tangents
        terms = []
        if not isinstance(dx, SymbolicZero):
            tangent = in_input if isinstance(dw, SymbolicZero) else in_both
            terms.append(tangent(dx, weight, stride, pad))
        if not isinstance(dw, SymbolicZero):
            terms.append(in_both(x, dw, stride, pad))
        return function(x, weight, stride, pad), functools.reduce(jnp.add, terms)

    return function


ROUTES: dict[str, Product] = {
    "native": _native,
    "product": _with_derivatives(_product, _spread_product, _spread_product),
    "product_derivatives": _with_derivatives(_native, _spread_product, _product),
}
"""The routes by name: ``(x, weight, stride, pad) -> y``."""
