r"""Where starts of the reverse process end, predicted: limits of the flow of memorizing families; derived here.

From high noise, :math:`y = b_2 + \sigma_0 \varepsilon`, and while the unit of one sample alone is on, at a fixed gate
and no penalty, the flow of :func:`dae_theory.basins.unit_flow` ends as

.. math:: v^\top (y - x) \simeq \kappa \left(\frac{\sigma}{\kappa}\right)^{1 - \gamma}
          \left(v^\top \varepsilon - t(\gamma)\right), \qquad
          t(\gamma) = \sqrt\pi\, \frac{\Gamma\left(\frac{\gamma + 1}{2}\right)}{\Gamma\left(\frac{\gamma}{2}\right)},
          \qquad \gamma = \frac{cL}{\kappa}

as σ₀ → ∞ and σ → 0. So the score :math:`v^\top \varepsilon` of a start against t(γ), :func:`separating_score`,
decides. For γ > 1 the start escapes along the ray above it and falls back to b₂ below it. For γ = 1, where t = 1, it
ends at the multiple :math:`v^\top \varepsilon` of x: networks without biases. For γ < 1 it comes to x from beyond, or
from the side of the other samples.

With the best gates, which reach the hull of the others as σ → 0, γ < 1 holds for few sets of samples
(:func:`limit_exponents`). Among them are simplices: n samples none of which depends affinely on the others, each
facing the inside of the opposite face. Their units are barycentric coordinates, ``u_i/D_i``, and the family tends to

.. math:: f(y) = b_2 + \sum_i \left[\frac{u_i}{D_i}\right]_+ (x_i - b_2),

**the identity on the whole hull of the samples.** It returns starts not to the samples but to the hull: a start ends on
the face of those samples whose units are on, and what it still is away from it falls like :math:`\sigma^{w}`, w the
weight of the face in the offset.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import jax.scipy.special
import numpy as np
from jaxtyping import Array, Float
from scipy import integrate, stats

from dae_theory.basins import no_unit_share
from dae_theory.checks import check_data, check_integer, check_level, check_nonnegative, check_positive
from dae_theory.convexity import Hulls, project_on_hulls
from dae_theory.types import Scalar

__all__ = ["PairShares", "limit_exponents", "off_share", "pair_shares", "separating_score", "share_interval"]

SMALL = 1e-7
"""Noise level, in the norm of the smaller of two samples, at which their separatrix has its limit to rounding."""
DIRECTIONS = 2**15
"""Over which :func:`off_share` averages."""


def separating_score(gamma: Scalar | Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""The score v·ε that separates starts which end beyond a memorized sample from those which end short of it.

    .. math:: t(\gamma) = \sqrt\pi\, \Gamma\left(\tfrac{\gamma + 1}2\right) / \Gamma\left(\tfrac\gamma2\right),
              \qquad \gamma = cL/\kappa > 0

    0 as γ → 0, 1 at γ = 1, π/2 at 2, and about :math:`\sqrt{\pi \gamma/2}` for large γ. Exact for one unit; of two
    samples, whose gates pass through one another (γ = 1/2), the share 2Φ(-t) = .549 of starts ends at a sample, and
    the others between them.

    Example:
        >>> round(float(separating_score(0.5)), 4), round(float(separating_score(1.0)), 4)
        (0.5991, 1.0)
    """
    check_positive("gamma", gamma)
    gamma = jnp.asarray(gamma, float)
    log_ratio = jax.scipy.special.gammaln(0.5 * (gamma + 1.0)) - jax.scipy.special.gammaln(0.5 * gamma)
    return math.sqrt(math.pi) * jnp.exp(log_ratio)


def limit_exponents(data: Float[np.ndarray, "n d"], *, hulls: Hulls | None = None) -> Float[np.ndarray, " n"]:
    r"""Which samples of the best memorizing family are returned: exponents of σ as σ → 0, without penalty.

    .. math:: 1 - \gamma_i = 1 - \frac{v_i^\top (x_i - b_2)}{D_i}
              = w_i - \sum_{j \ne i} w_j \frac{v_i^\top (x_i - x_j) - D_i}{D_i}, \qquad
              b_2 = \sum_i w_i x_i, \quad w_i \propto \frac1{D_i^2}

    :func:`dae_theory.basins.return_exponent` with gates at the hull and the offset of
    :func:`dae_theory.affine_gates.memorize` in this limit. All others lie at depths ``v_i·(x_i − x_j) >= D_i`` behind
    the sample: it is returned if they exceed D_i by less than a share w_i on average, so the exponent is at most w_i,
    which simplices attain. Negative where the sample repels the flow; NaN for samples inside the hull of the others,
    which have no unit, and whose mean is then the offset.

    Args:
        data: two samples or more, as rows.
        hulls: those of ``data``, where they are at hand.

    Example:
        >>> limit_exponents(np.array([[3.0, 0.0], [-3.0, 0.0]])).round(3).tolist()
        [0.5, 0.5]
    """
    check_data(data)
    rows = np.asarray(data, np.float64)
    hulls = project_on_hulls(rows) if hulls is None else hulls
    extreme = hulls.distances > 0
    distances = np.where(extreme, hulls.distances, np.nan)
    weights = 1.0 / np.square(distances) if extreme.all() else (~extreme).astype(float)
    offset = weights @ rows / weights.sum()
    return 1.0 - np.sum((rows - hulls.nearest) * (rows - offset), axis=1) / np.square(distances)


def off_share(normals: Float[np.ndarray, "n d"], scores: Scalar | Float[np.ndarray, " n"] = 0.0) -> float:
    r"""Share of starts whose score against every unit is below that unit's threshold, a Gaussian orthant probability.

    .. math:: P(v_i^\top \varepsilon < t_i \text{ for all } i)
              = E_u\, P\Big(\chi_r < \min_{i:\, v_i^\top u > 0} \frac{t_i}{v_i^\top u}\Big), \qquad
              \varepsilon \sim N(0, I)

    over directions u of the span of the normals, r dimensions. For thresholds 0 these are the starts at which no unit
    is on, so they end at the origin without biases: of two samples :func:`dae_theory.basins.no_unit_share`, of a
    simplex none. With gates nearer than the offset, γ > 1, and thresholds ``separating_score(γ)`` it is the share that
    ends at b₂, exactly if any two units that are ever on together have orthogonal normals, such as of samples ± R e_j.
    Units at acute angles keep one another on, so otherwise it is only an estimate, from above in all examples: of 5,
    7, 9 and 12 points on a circle (gates for σ = .05) .64, .87, .97 and 1.00, where .44, .67, .83 and .95 are found.

    On a line and in a plane by a rule, to 1e-4; otherwise by ``DIRECTIONS`` of a Sobol sequence, to about 1e-3.

    Args:
        normals: v_i, unit vectors as rows.
        scores: ``t_i >= 0``, one number or one per unit.

    Example:
        >>> round(off_share(np.eye(2)), 3)
        0.25
    """
    check_data(normals, name="normals")
    check_nonnegative("scores", scores)
    rows = np.asarray(normals, np.float64)
    _, singular, axes = np.linalg.svd(rows, full_matrices=False)
    rank = int(np.sum(singular > 1e-9 * singular[0]))
    if rank == 1:
        directions = np.array([[1.0], [-1.0]])
    elif rank == 2:
        angles = 2 * np.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        directions = stats.norm.ppf(stats.qmc.Sobol(rank, rng=0).random(DIRECTIONS))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    slopes = directions @ (rows @ axes[:rank].T).T
    with np.errstate(divide="ignore", invalid="ignore"):
        reaches = np.where(slopes > 0, np.broadcast_to(scores, len(rows)) / slopes, np.inf)
    return float(np.mean(stats.chi.cdf(reaches.min(axis=1), rank)))


class PairShares(NamedTuple):
    """Where starts of the flow of two memorized samples end, without biases."""

    first: float
    """At a multiple of the first sample."""
    second: float
    """At a multiple of the second."""
    neither: float
    """At the origin: no unit is on at the start, and none turns on."""


def pair_shares(norms: tuple[Scalar, Scalar], cosine: Scalar, sigma: Scalar) -> PairShares:
    r"""Shares of starts from noise level ``sigma`` that end at each of two samples, without biases and penalty.

    The flow is homogeneous, so a direction in the plane of the samples decides. Where one unit is on it stays the only
    one; where both are, the scores :math:`u_i = \hat x_i^\top y` obey

    .. math:: \frac{du_i}{d\ln\sigma} = u_i - \alpha_i u_i - c\, \alpha_j u_j, \qquad
              \alpha_i = \frac{N_i}{N_i + \sigma^2}, \quad N_i = \|x_i\|^2

    and the one whose score is larger in the end wins. The ray that neither wins has u₁ = u₂ as σ → 0; it is followed up
    to ``sigma``, where it divides the starts. Equal norms give equal shares, and of two norms the longer sample's is
    larger. The directions of no unit are :func:`dae_theory.basins.no_unit_share`.

    Args:
        norms: of the samples.
        cosine: c between them, in (-1, 0): at acute angles both units stay on, and flows end between the samples.
        sigma: noise level of the start, > 0.

    Example:
        >>> [round(share, 4) for share in pair_shares((3.0, 1.0), -0.3, 100.0)]
        [0.4552, 0.3433, 0.2015]
    """
    first, second = (float(norm) for norm in norms)
    check_positive("norms", np.array([first, second]))
    check_level("sigma", sigma, zero=False)
    if not -1 < cosine < 0:
        raise ValueError(f"cosine must lie between -1 and 0, got {cosine}: at acute angles no sample wins.")
    c = float(cosine)

    def slope(log_sigma: float, share: Float[np.ndarray, " one"]) -> Float[np.ndarray, " one"]:
        noise = math.exp(2 * log_sigma)
        a, b = first**2 / (first**2 + noise), second**2 / (second**2 + noise)
        u, v = share, 1.0 - share
        return v * (u - a * u - c * b * v) - u * (v - b * v - c * a * u)

    low = math.log(min(SMALL * min(first, second), float(sigma) / 2))
    path = integrate.solve_ivp(slope, (low, math.log(float(sigma))), [0.5], rtol=1e-11, atol=1e-13)
    u = path.y[0, -1]
    # The direction with these scores, as an angle from the first sample.
    between = math.acos(c)
    angle = math.atan2((1.0 - u - c * u) / math.sqrt(1.0 - c * c), u)
    turn = 2 * math.pi
    own = (math.pi / 2 + angle) / turn, (math.pi / 2 + between - angle) / turn
    return PairShares(*own, float(no_unit_share(c)))


def share_interval(share: float, num_starts: int, level: float = 0.95) -> tuple[float, float]:
    r"""The interval of Clopper and Pearson :cite:`clopper34` of a simulated share; it covers with ``level`` or more.

    Args:
        share: count over ``num_starts``, of one kind of end.
        num_starts: number of independent starts.
        level: in (0, 1).

    Example:
        >>> [round(end, 4) for end in share_interval(0.5, 100)]
        [0.3983, 0.6017]
    """
    num_starts = check_integer("num_starts", num_starts, minimum=1)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    interval = stats.binomtest(round(share * num_starts), num_starts).proportion_ci(level)
    return float(interval.low), float(interval.high)
