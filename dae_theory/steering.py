r"""Steering the two-layer DAE: what adding a vector to the hidden layer does along the reverse process.

Steering replaces the hidden layer h by h + a v, and so shifts the output by ``a W₂ v = a g``: in one step nothing has a
threshold. It comes from the reverse process, here the probability flow

.. math:: \frac{dy}{d \ln\sigma} = y - f_\sigma(y) - a g

of minimizers, one for each noise level, from ``sigma_from`` down to ``sigma``. Directions decouple while one block is
on. In the block the shift is linear in a and kept after release (:func:`steered_in_block` with pull 0); outside of it
the shift is erased in proportion to σ (:func:`steered_outside`). A memorizing network steered from one sample to
another resists up to a threshold, :func:`onset_strength`, and jumps at another, :func:`switching_strength`.

Lengths of the last three functions are in units of the samples' norm. Derived here; no formula of it is in
:cite:`zhang26`, who steer deep networks.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.checks import check_nonnegative, check_positive
from dae_theory.precision import full_precision
from dae_theory.types import Scalar

__all__ = ["onset_strength", "onset_time", "steered_in_block", "steered_outside", "switching_strength"]

NODES = 64
"""Of Gauss and Legendre's rule, in the logarithm of the noise level."""

HALVINGS = 60
"""Of the interval that holds a threshold."""

ITERATIONS = 50
"""Of Newton's method for the time of onset, which approaches it from below."""


@full_precision
def steered_in_block(
    start: Float[Array, "*s"],
    pull: Float[Array, "*s"],
    variance: Float[Array, "*s"],
    sigma_from: Scalar,
    sigma: Scalar,
    decay: Scalar = 0.0,
) -> Float[Array, "*s"]:
    r"""Coordinates along a block's principal directions after steering from one noise level down to another.

    .. math:: y_j(\sigma) = \phi_j(\sigma) \left[\frac{y_j(\sigma_0)}{\phi_j(\sigma_0)}
              + \int_\sigma^{\sigma_0} \frac{a g_j}{t\, \phi_j(t)} dt\right], \qquad
              \phi_j(\sigma) = \sigma^{l/s_j} (s_j + \sigma^2)^{(1 - l/s_j)/2}

    with the block's gain ``(s_j - l)/(s_j + σ²)`` :cite:`zhang26`, Corollary 3.3. For l = 0 the integral is
    :math:`(a g_j/\sqrt{s_j}) [\mathrm{asinh}(\sqrt{s_j}/\sigma) - \mathrm{asinh}(\sqrt{s_j}/\sigma_0)]`.

    Args:
        start: coordinates ``y_j`` at ``sigma_from``.
        pull: ``a g_j``, strength times output of the vector; 0 after release.
        variance: eigenvalues ``s_j > 0`` of the block's second moment, above ``decay``: smaller ones are not learned.
        sigma_from: noise level > ``sigma`` at which steering begins.
        sigma: noise level > 0 at which it ends.
        decay: ``l = n λ/n_k >= 0``, the penalty of the block.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones(1)
        >>> kept = steered_in_block(0 * one, 0.1 * one, 4 * one, 2.0, 0.1)  # shifted from 0 ...
        >>> bool(steered_in_block(kept, 0 * one, 4 * one, 0.1, 0.01)[0] > 0.99 * kept[0])  # ... and kept after release
        True
    """
    _check_window(sigma_from, sigma)
    check_positive("variance", variance)
    check_nonnegative("decay", decay)
    points, weights = np.polynomial.legendre.leggauss(NODES)
    share = decay / variance

    def phi(level: Array) -> Float[Array, "*s"]:
        return level**share * (variance + level * level) ** ((1 - share) / 2)

    low, high = (jnp.log(jnp.asarray(level, start.dtype)) for level in (sigma, sigma_from))
    middle, half = (high + low) / 2, (high - low) / 2
    levels = jnp.exp(middle + half * jnp.asarray(points, start.dtype))
    inverse = jax.vmap(lambda level: 1 / phi(level))(levels)
    integral = half * jnp.tensordot(jnp.asarray(weights, start.dtype), inverse, axes=1)
    return phi(jnp.exp(low)) * (start / phi(jnp.exp(high)) + pull * integral)


@full_precision
def steered_outside(
    start: Float[Array, "*s"], pull: Float[Array, "*s"], sigma_from: Scalar, sigma: Scalar
) -> Float[Array, "*s"]:
    r"""Coordinates along directions that no unit outputs, after steering from one noise level down to another.

    .. math:: y(\sigma) = a g + \frac{\sigma}{\sigma_0} \left(y(\sigma_0) - a g\right)

    After release (``pull`` 0) what is left falls in proportion to σ. Arguments as for :func:`steered_in_block`.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(steered_outside(jnp.ones(1), jnp.zeros(1), 1.0, 0.01)[0]), 3)
        0.01
    """
    _check_window(sigma_from, sigma)
    return pull + sigma / sigma_from * (start - pull)


def onset_strength(opposition: Scalar, sigma_from: Scalar, sigma: Scalar) -> float:
    r"""The least strength at which steering towards another memorized sample turns its unit on within the window.

    .. math:: a_\mathrm{on} = \frac{b}{b^2 T + (1 - b^2)(1 - e^{-T})}, \qquad T = \ln(\sigma_0/\sigma)

    Below it the output does not move: the sample that is being generated loses a share ``a b T`` of its length, and
    the shift beside it is erased after release.

    Args:
        opposition: ``b`` in (0, 1), minus the cosine of the two samples, which have equal norms.
        sigma_from: noise level at which steering begins, small beside the samples' norm.
        sigma: noise level > 0 at which it ends, below ``sigma_from``.

    Example:
        >>> round(onset_strength(0.3, 0.2, 0.01), 3)
        0.265
    """
    window = _checked(opposition, sigma_from, sigma)
    return float(opposition / (opposition**2 * window + (1 - opposition**2) * -math.expm1(-window)))


def onset_time(strength: Scalar, opposition: Scalar, sigma_from: Scalar, sigma: Scalar) -> float:
    r"""When the other sample's unit turns on, as :math:`t = \ln(\sigma_0/\sigma)`; infinite if it does not.

    The root of :math:`a b^2 t + a (1 - b^2)(1 - e^{-t}) = b`, whose left side is increasing and concave. Arguments as
    for :func:`onset_strength`.

    Example:
        >>> round(onset_time(0.4, 0.3, 0.2, 0.01), 3)
        1.217
    """
    check_positive("strength", strength)
    b, window = float(opposition), _checked(opposition, sigma_from, sigma)
    t = 0.0
    for _ in range(ITERATIONS):
        value = strength * (b * b * t - (1 - b * b) * math.expm1(-t)) - b
        t -= value / (strength * (b * b + (1 - b * b) * math.exp(-t)))
    return float(t) if t <= window else math.inf


def switching_strength(opposition: Scalar, sigma_from: Scalar, sigma: Scalar) -> float:
    r"""The strength at which the generated sample jumps to the one that is steered to.

    Once both units are on, the difference D of the projections on the two samples obeys

    .. math:: D(t) = D^* + (1 - a b t_\mathrm{on} - D^*) e^{b (t - t_\mathrm{on})}, \qquad D^* = \frac{a (1 + b)}{b}

    which is unstable about D*: the output switches if and only if D < 0 at the end of the window, and a* is the
    strength at which D = 0 there. Between the two thresholds the output returns to its sample after release. The
    simulated flow has its threshold within a share :math:`\sigma_0^2/\|x\|^2` of this. Arguments as for
    :func:`onset_strength`.

    Example:
        >>> round(switching_strength(0.3, 0.2, 0.01), 4)
        0.4456
    """
    b, window = float(opposition), _checked(opposition, sigma_from, sigma)

    def difference(strength: float) -> float:
        on = onset_time(strength, b, sigma_from, sigma)
        fixed = strength * (1 + b) / b
        return fixed + (1 - strength * b * on - fixed) * math.exp(b * (window - on))

    low = onset_strength(b, sigma_from, sigma) * (1 + 1e-12)
    high = 2 * low
    while difference(high) > 0:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) > 0 else (low, middle)
    return (low + high) / 2


def _check_window(sigma_from: Scalar, sigma: Scalar) -> None:
    check_positive("sigma", sigma)
    check_positive("sigma_from", sigma_from)


def _checked(opposition: Scalar, sigma_from: Scalar, sigma: Scalar) -> float:
    """The window, of arguments in their range."""
    _check_window(sigma_from, sigma)
    if not 0 < opposition < 1:
        raise ValueError(f"opposition must lie between 0 and 1, minus the cosine of the samples; got {opposition}.")
    if not sigma < sigma_from:
        raise ValueError(f"sigma must be below sigma_from = {sigma_from}, got {sigma}.")
    return math.log(sigma_from / sigma)
