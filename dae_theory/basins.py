r"""Where the reverse process of a memorizing family ends, in closed form and by simulation; derived here.

The probability flow :math:`dy/d\ln\sigma = y - f_\sigma(y)` of networks that memorize, one for each noise level, with
gates that stay where they are. While the unit of sample x is the only one on, with :math:`z = x - b_2`, length L, gate
distance κ, normal v and :math:`c = v \cdot \hat z`, its preactivation :math:`u = \kappa + v^\top (y - x)` follows

.. math:: \frac{du}{d \ln\sigma} = u\,\frac{(1 - \gamma)\,\kappa^2 + \sigma^2}{\kappa^2 + \sigma^2} + c L - \kappa,
          \qquad \gamma = \frac{c\,(\kappa L - l)}{\kappa^2}

and directions orthogonal to ẑ vanish like σ. So the flow returns to x like :math:`\sigma^{1 - \gamma}` if γ < 1, and
leaves it if γ > 1 (:func:`return_exponent`). Without penalty γ = cL/κ. Without biases κ = L and c = 1: γ = 1, nothing
is pulled back along x, and the flow returns a multiple of x (:func:`dae_theory.sampling.closed_form_denoiser`). With
biases and gates beyond the offset, κ > cL, it returns x itself; with gates nearer than that, as of many samples, the
unit amplifies noise along its normal, and all but a set of measure zero ends elsewhere. **Storing samples is not
enough for drawing them.** :mod:`dae_theory.flow_limits` predicts where starts end.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive
from dae_theory.precision import full_precision
from dae_theory.sampling import Step, heun, probability_flow
from dae_theory.steering import steered_in_block
from dae_theory.types import Denoiser, PRNGKey, Scalar

__all__ = [
    "Basins",
    "basin_shares",
    "block_flow",
    "fixed_gates_denoiser",
    "flow_ends",
    "no_unit_share",
    "return_exponent",
    "unit_flow",
]

NODES = 64
"""Of Gauss and Legendre's rule, in the logarithm of the noise level."""


def return_exponent(length: Scalar, gate: Scalar, cosine: Scalar = 1.0, decay: Scalar = 0.0) -> Float[Array, ""]:
    r"""How fast the flow returns to a memorized sample: deviations along its gate's normal fall like σ to this power.

    .. math:: 1 - \gamma, \qquad \gamma = \frac{c\,(\kappa L - l)}{\kappa^2}

    Negative where the sample repels the flow, 0 without biases and penalty.

    Args:
        length: ``L > 0``, distance of the sample from b₂.
        gate: ``κ > 0``, its distance from the gate.
        cosine: c, between the gate's normal and the direction of the sample from b₂.
        decay: ``l = n λ >= 0``.

    Example:
        >>> round(float(return_exponent(3.0, 4.5)), 4), round(float(return_exponent(3.0, 1.5)), 4)
        (0.3333, -1.0)
    """
    check_positive("length", length)
    check_positive("gate", gate)
    check_nonnegative("decay", decay)
    gate = jnp.asarray(gate, float)
    return 1.0 - cosine * (gate * length - decay) / (gate * gate)


@full_precision
def unit_flow(
    y: Float[Array, " d"],
    sigma: Scalar,
    next_sigma: Scalar,
    sample: Float[Array, " d"],
    offset: Float[Array, " d"],
    normal: Float[Array, " d"],
    gate: Scalar,
    decay: Scalar = 0.0,
) -> Float[Array, " d"]:
    r"""The probability flow from ``sigma`` to ``next_sigma`` while the unit of one memorized sample is the only one on.

    .. math:: u(\sigma') = \psi(\sigma') \left[\frac{u(\sigma)}{\psi(\sigma)}
              - (cL - \kappa) \int_{\sigma'}^{\sigma} \frac{ds}{s\, \psi(s)}\right], \qquad
              \psi(s) = s^{1 - \gamma} (\kappa^2 + s^2)^{\gamma/2}

    and from u the component of y along ẑ, where all others shrink in proportion to σ. The integral is by a rule that
    is exact to rounding for noise levels up to e¹² apart.

    Args:
        y: the point at level ``sigma``.
        sigma, next_sigma: noise levels > 0.
        sample: x, not equal to ``offset``.
        offset: b₂.
        normal: v, a unit vector with a positive product with x - b₂.
        gate: ``κ > 0``.
        decay: ``l = n λ >= 0``.
    """
    check_positive("sigma", sigma)
    check_positive("next_sigma", next_sigma)
    check_positive("gate", gate)
    z = sample - offset
    length = jnp.linalg.norm(z)
    unit = z / length
    cosine = normal @ unit
    gamma = 1.0 - return_exponent(length, gate, cosine, decay)
    gate = jnp.asarray(gate, y.dtype)
    begin, end = jnp.log(jnp.asarray(sigma, y.dtype)), jnp.log(jnp.asarray(next_sigma, y.dtype))

    def log_psi(log_s):
        return (1.0 - gamma) * log_s + 0.5 * gamma * jnp.logaddexp(2.0 * jnp.log(gate), 2.0 * log_s)

    nodes, weights = (jnp.asarray(part, y.dtype) for part in np.polynomial.legendre.leggauss(NODES))
    levels = 0.5 * (begin + end) + 0.5 * (begin - end) * nodes
    # Relative to ψ at the end, so that nothing overflows.
    integral = 0.5 * (begin - end) * (weights @ jnp.exp(log_psi(end) - log_psi(levels)))
    away = y - sample
    across = away - unit * (away @ unit)
    u = (gate + normal @ away) * jnp.exp(log_psi(end) - log_psi(begin)) - (cosine * length - gate) * integral
    across = across * jnp.exp(end - begin)
    along = (u - gate - normal @ across) / cosine
    return sample + unit * along + across


@full_precision
def block_flow(
    y: Float[Array, " d"],
    sigma: Scalar,
    next_sigma: Scalar,
    mean: Float[Array, " d"],
    offset: Float[Array, " d"],
    normal: Float[Array, " d"],
    gate: Scalar,
    axes: Float[Array, "d r"],
    variances: Float[Array, " r"],
    decay: Scalar = 0.0,
) -> Float[Array, " d"]:
    r"""The probability flow while the units of one block with biases are on, and no others.

    .. math:: \frac{dy}{d\ln\sigma} = y - b_2 - \alpha \hat z \left[\kappa + v^\top (y - \bar x)\right]
              - \sum_j q_j u_j u_j^\top (y - \bar x), \qquad q_j = \frac{s_j - l}{s_j + \sigma^2}

    of :mod:`dae_theory.affine_minimizers`. The mean is carried as a memorized sample is (:func:`unit_flow`), kept
    directions shrink like :math:`\sigma^{l/s_j} (s_j + \sigma^2)^{(1 - l/s_j)/2}`
    (:func:`dae_theory.steering.steered_in_block` without steering), and all others like σ. So whether the block
    returns its mean depends on its gate, and its spread does not.

    Args:
        y: the point at level ``sigma``.
        sigma, next_sigma: noise levels > 0.
        mean: x̄ of the cluster, not equal to ``offset``.
        offset: b₂.
        normal: v of the gate, a unit vector with a positive product with x̄ - b₂.
        gate: ``κ > 0``, its distance from the mean.
        axes: kept directions u_j as columns, orthonormal, and orthogonal to ``normal`` and x̄ - b₂.
        variances: their ``s_j > l`` in the covariance of the cluster.
        decay: ``l = n λ/n_k >= 0``.
    """
    start = axes.T @ (y - mean)
    end = steered_in_block(start, jnp.zeros_like(start), variances, sigma, next_sigma, decay)
    rest = unit_flow(y - axes @ start, sigma, next_sigma, mean, offset, normal, gate, decay)
    return rest + axes @ end


def fixed_gates_denoiser(
    data: Float[Array, "n d"],
    offset: Float[Array, " d"],
    normals: Float[Array, "n d"],
    gates: Float[Array, " n"],
    decay: Scalar = 0.0,
) -> Denoiser:
    r"""The family of memorizing networks with given gates, as a denoiser.

    .. math:: D(y, \sigma) = b_2 + \sum_i \alpha_i(\sigma)\, \hat z_i \left[\kappa_i + v_i^\top (y - x_i)\right]_+,
              \qquad \alpha_i = \frac{(\kappa_i L_i - l)_+}{\kappa_i^2 + \sigma^2}

    ``offset`` 0, ``normals`` along the samples and ``gates`` their lengths give Corollary 3.2 of :cite:`zhang26`. Gates
    of the best networks move with σ, towards the hull as σ falls (:func:`dae_theory.affine_gates.memorize`); here they
    stay.
    """
    check_data(data)
    check_positive("gates", gates)
    return functools.partial(_fixed_gates, data, offset, normals, gates, decay)


@full_precision
def _fixed_gates(
    data: Array, offset: Array, normals: Array, gates: Array, decay: Scalar, y: Float[Array, " d"], sigma: Scalar, /
) -> Float[Array, " d"]:
    z = data - offset[None, :]
    lengths = jnp.linalg.norm(z, axis=1)
    gains = jnp.maximum(gates * lengths - decay, 0.0) / (gates * gates + sigma * sigma)
    code = jax.nn.relu(gates + normals @ y - jnp.sum(normals * data, axis=1))
    return offset + (gains / lengths * code) @ z


class Basins(NamedTuple):
    """Where the flow ends, as shares of starting points."""

    at_sample: Float[np.ndarray, " n"]
    """Within the tolerance of each sample."""
    along_sample: Float[np.ndarray, " n"]
    """On the ray from the offset through each sample, but not at it: a multiple of it. Of two samples with biases
    these are the ends between them."""
    at_offset: float
    """Within the tolerance of b₂: all units were off at the end."""
    elsewhere: float


def flow_ends(
    key: PRNGKey,
    denoiser: Denoiser,
    sigmas: Float[Array, " m"],
    offset: Float[Array, " d"],
    *,
    num_starts: int,
    step: Step = heun,
) -> Float[Array, "num_starts d"]:
    """Ends of the flow as rows, from starts ``b₂ + σ₀ ε``; start i draws from ``fold_in(key, i)``.

    Other arguments as for :func:`basin_shares`, which counts these ends.
    """
    check_integer("num_starts", num_starts, minimum=1)

    @jax.jit
    def ends(key):
        def one(i):
            noise = jax.random.normal(jax.random.fold_in(key, i), offset.shape, offset.dtype)
            return probability_flow(denoiser, offset + sigmas[0] * noise, sigmas, step=step)

        return jax.vmap(one)(jnp.arange(num_starts))

    return ends(key)


def basin_shares(
    key: PRNGKey,
    denoiser: Denoiser,
    sigmas: Float[Array, " m"],
    data: Float[Array, "n d"],
    offset: Float[Array, " d"],
    *,
    num_starts: int,
    tolerance: float = 0.01,
    step: Step = heun,
) -> Basins:
    """Shares of starting points ``b₂ + σ₀ ε`` that end at each sample, by simulation.

    Args:
        key: start i draws from ``fold_in(key, i)``.
        denoiser: any denoiser.
        sigmas: decreasing noise levels, the first large.
        data: samples as rows.
        offset: b₂, about which starts are drawn.
        num_starts: number of them.
        tolerance: in the largest distance of a sample from the offset.
        step: of the integration.

    :func:`dae_theory.flow_limits.share_interval` is the interval of a share over starts.
    """
    check_data(data)
    check_positive("tolerance", tolerance)
    found = np.asarray(flow_ends(key, denoiser, sigmas, offset, num_starts=num_starts, step=step) - offset[None, :])
    z = np.asarray(data - offset[None, :])
    lengths = np.linalg.norm(z, axis=1)
    near = tolerance * lengths.max()
    at = np.linalg.norm(found[:, None, :] - z[None, :, :], axis=2) <= near
    projection = np.maximum(found @ (z / lengths[:, None]).T, 0.0)
    beside = np.linalg.norm(found[:, None, :] - projection[:, :, None] * (z / lengths[:, None])[None], axis=2)
    middle = np.linalg.norm(found, axis=1) <= near
    # One place for each end: at a sample, in the middle, or on the nearest ray.
    open_ends = ~at.any(axis=1) & ~middle
    nearest = np.arange(len(z))[None, :] == np.argmin(beside, axis=1)[:, None]
    multiple = (beside <= near) & nearest & open_ends[:, None]
    middle &= ~at.any(axis=1)
    rest = open_ends & ~multiple.any(axis=1)
    return Basins(at.mean(axis=0), multiple.mean(axis=0), float(middle.mean()), float(rest.mean()))


def no_unit_share(cosine: Scalar) -> Float[Array, ""]:
    r"""Share of directions in which neither of two units without biases is on: these starts end at the origin.

    .. math:: P = \tfrac14 + \tfrac1{2\pi} \arcsin(\cos(x_1, x_2))

    The flow of bias-free networks shrinks y in proportion to σ where all gates are off, and never opens one.

    Example:
        >>> float(no_unit_share(-1.0)), float(no_unit_share(0.0))
        (0.0, 0.25)
    """
    return 0.25 + jnp.arcsin(jnp.clip(jnp.asarray(cosine, float), -1.0, 1.0)) / (2.0 * jnp.pi)
