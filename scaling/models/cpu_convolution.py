"""Convolutions of images (B, H, W, C), as matrix products where XLA's own are slow on CPUs.

Layers call :func:`convolution`; :func:`conv_route` chooses, from the shapes alone, whether the values or only the
derivatives are computed as matrix products. All routes compute the same function.
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

# Measured on two cores: for outputs of at most COLUMNS_PIXELS pixels, the product is faster than the convolution if
# input and output have at least COLUMNS_CHANNELS channels, or if the matrix of columns has at most COLUMNS_ENTRIES
# entries and the output at least COLUMNS_WIDTH channels.
COLUMNS_PIXELS, COLUMNS_CHANNELS, COLUMNS_ENTRIES, COLUMNS_WIDTH = 256, 256, 1 << 22, 16
# Derivatives are products if the matrix of columns, which they store, has at most this many entries.
DERIVATIVE_ENTRIES = 1 << 26


def convolution(
    x: Float[Array, "b h w i"], weight: Float[Array, "k k i o"], stride: int, pad: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    """A convolution with ``pad`` zeros before and after each spatial axis, by the route of :func:`conv_route`."""
    return ROUTES[conv_route(x.shape, weight.shape, stride, pad)](x, weight, stride, pad)


def conv_route(
    x: Sequence[int], weight: Sequence[int], stride: int, pad: tuple[int, int]
) -> Literal["native", "product", "product_derivatives"]:
    r"""The fastest way to compute a convolution of shapes (B, H, W, I) and (K, K, I, O).

    * ``product``, on a CPU for small images: one product :math:`\mathrm{columns}(x) \, W`, where the (B H' W', K² I)
      matrix of columns holds the inputs of each output;
    * ``product_derivatives``, on a CPU if that matrix is not too large: XLA's own convolution, with products as
      derivatives. XLA's derivatives take 1 to 5 times as long, and inside a loop, such as training steps, 10 to 25;
    * ``native``, everywhere else: XLA's own convolution and derivatives.
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
    # As matrices: otherwise the derivative in the weights contracts several axes, which on a CPU copies them first.
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)


def _columns(x: Float[Array, "b h w i"], kernel: int, stride: int, pad: tuple[int, int]) -> Float[Array, "b h2 w2 n"]:
    """The inputs of each output pixel, concatenated: kernel² times the channels."""
    # One axis, then the other: 2k passes instead of k². Padding by negative amounts is faster than slicing.
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
    """The same convolution with the product first: inputs times the kernel, then added up at the outputs.

    Its transposes in both arguments are products with the same matrix, the columns of the cotangent; those of
    :func:`_product` would need the columns of the input again, and their transpose. For strides above 1 and where the
    size changes it is :func:`_product`.
    """
    kernel, c_in, c_out = weight.shape[0], *weight.shape[2:]
    if stride != 1 or sum(pad) != kernel - 1:
        return _product(x, weight, stride, pad)
    # Output p sums inputs p + k - pad times the k-th weight, so input q goes to outputs q - k + pad: flipped columns.
    parts = _matmul(x, jnp.moveaxis(jnp.flip(weight, (0, 1)), 2, 0).reshape(c_in, -1))
    shape = jax.ShapeDtypeStruct((*x.shape[:3], c_out), x.dtype)
    (y,) = jax.linear_transpose(lambda y: _columns(y, kernel, stride, (pad[1], pad[0])), shape)(parts)
    return y


def _with_derivatives(primal: Product, in_both: Product, in_input: Product) -> Product:
    """``primal`` with the derivatives of other implementations of the same function.

    ``in_both`` is differentiated if both arguments have tangents or the weights alone, ``in_input`` if only the input
    has. Both are ordinary JAX functions, so both modes and all orders of derivatives follow. Zero tangents stay
    symbolic: without a derivative in the weights, nothing is stored for one.
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
"""Implementations by name, ``(x, weight, stride, pad) -> y``; see :func:`conv_route`."""
