r"""Measures of spikiness of one code ``h`` of shape (p,): few units carry a spiky code, many a balanced one.

All have the signature ``measure(code) -> ()`` and raise ``ValueError`` unless the code is a vector; batch with
``jax.vmap``. All but :func:`std` are invariant to scale;
codes may have either sign. :data:`MEASURES` maps names to functions. For a zero code the value is set by convention, as
each docstring says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.checks import check_example

__all__ = ["MEASURES", "hoyer", "kurtosis", "l4_over_l2", "participation_ratio", "std"]


def std(code: Float[Array, " p"]) -> Float[Array, ""]:
    r"""Population standard deviation over units, the paper's detector :cite:`zhang26`, section 4.

    .. math:: \mathrm{std}(h)^2 = \|h\|_2^2/p - \bar h^2, \qquad \bar h = \|h\|_1/p \text{ for codes } h \ge 0

    In [0, max|h|]; grows with the scale of the input and of the layer. Divides by p (PyTorch's default divides by
    p − 1). 0 for a zero code.
    """
    check_example("code", code)
    # Squares would overflow or underflow. Scaling by a power of two changes no other digit.
    limits = jnp.finfo(code.dtype)
    exponent = jnp.clip(jnp.frexp(_largest(code))[1], limits.minexp + 2, limits.maxexp - 2)
    one = jnp.ones((), code.dtype)
    scale, inverse = jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)
    scaled = code * inverse
    # √ has an infinite derivative at 0, the variance of a constant code: double where.
    variance = jnp.mean(jnp.square(scaled - jnp.mean(scaled)))
    return scale * jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def l4_over_l2(code: Float[Array, " p"]) -> Float[Array, ""]:
    r"""Ratio of norms, from p^{-1/4} (all units equal) to 1 (one-hot).

    .. math:: \|h\|_4 / \|h\|_2

    0 for a zero code.
    """
    check_example("code", code)
    unit, alive = _unit(code)
    fourth = jnp.sum(unit**4)
    return jnp.where(alive, jnp.where(alive, fourth, 1.0) ** 0.25, 0.0)


def participation_ratio(code: Float[Array, " p"]) -> Float[Array, ""]:
    r"""Effective number of active units, from 1 (one-hot) to p (all equal): the inverse of spikiness.

    .. math:: \left(\sum_j h_j^2\right)^2 / \sum_j h_j^4

    0 for a zero code.
    """
    check_example("code", code)
    unit, alive = _unit(code)
    return jnp.where(alive, 1.0 / jnp.where(alive, jnp.sum(unit**4), 1.0), 0.0)


def hoyer(code: Float[Array, " p"]) -> Float[Array, ""]:
    r"""Hoyer's sparsity, from 0 (all equal) to 1 (one-hot) :cite:`hoyer04`.

    .. math:: \left(\sqrt p - \|h\|_1/\|h\|_2\right) / (\sqrt p - 1)

    0 for a zero code, and for p = 1, where every code is both one-hot and constant.
    """
    check_example("code", code)
    unit, alive = _unit(code)
    root = code.size**0.5
    if code.size == 1:
        return jnp.zeros((), code.dtype)
    return jnp.where(alive, (root - jnp.sum(jnp.abs(unit))) / (root - 1.0), 0.0)


def kurtosis(code: Float[Array, " p"]) -> Float[Array, ""]:
    r"""Excess kurtosis over units, at least −2; 0 for a Gaussian spread, about p for a one-hot code.

    .. math:: \frac{\frac1p \sum_j (h_j - \bar h)^4}{\left(\frac1p \sum_j (h_j - \bar h)^2\right)^2} - 3

    −2, the smallest value, for a constant code, including a zero code.
    """
    check_example("code", code)
    scaled, _ = _unit(code)
    unit, alive = _unit(scaled - jnp.mean(scaled))
    # Subtracting the mean of a constant code leaves rounding errors, which are not a spread.
    alive = alive & (jnp.max(jnp.abs(scaled - jnp.mean(scaled))) > 4 * jnp.finfo(code.dtype).eps)
    return jnp.where(alive, code.size * jnp.sum(unit**4) - 3.0, -2.0)


MEASURES: Mapping[str, Callable[[Float[Array, " p"]], Float[Array, ""]]] = MappingProxyType(
    {
        "std": std,
        "l4_over_l2": l4_over_l2,
        "participation_ratio": participation_ratio,
        "hoyer": hoyer,
        "kurtosis": kurtosis,
    }
)


def _unit(code: Float[Array, " p"]) -> tuple[Float[Array, " p"], Array]:
    """The code divided by its norm, and whether that is positive; scaled first against overflow and underflow."""
    largest = _largest(code)
    alive = largest > 0
    scaled = code / jnp.where(alive, largest, 1.0)
    length = jnp.sqrt(jnp.where(alive, jnp.sum(jnp.square(scaled)), 1.0))
    return scaled / length, alive


def _largest(code: Float[Array, " p"]) -> Float[Array, ""]:
    # The result does not depend on the scale that it provides; a derivative through it would overflow for tiny codes.
    return jax.lax.stop_gradient(jnp.max(jnp.abs(code), initial=0.0))
