r"""What a two-layer DAE with biases can memorize: samples in convex position, and the price of each.

With biases, :math:`f(y) = W_2 [W_1^\top y + b_1]_+ + b_2`, a unit memorizes a sample x if a hyperplane cuts x off from
all other samples with a margin of a few σ. So the condition of :cite:`zhang26`, Theorem 3.1, that cosines are negative,
becomes that x is an extreme point of the samples' convex hull, at a distance :math:`D \gg \sigma` from the hull of the
others (:func:`hull_distances`). On a sphere every sample is one.

The unit's gate has the distance κ from its sample, and its gain follows from κ (:func:`memorizing_gain`), as does what
memorizing the sample costs (:func:`memorizing_cost`). The objective's main term falls as κ grows, so the gate moves
towards the other samples until their noise leaks through it (:func:`gate_distance`).

Derived here; the paper says only that its theorem extends to biases. ``b2 = 0`` and a gate through it, κ = ‖x‖, give
:cite:`zhang26`, Corollary 3.2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from dae_theory.checks import check_finite, check_level, check_nonnegative, check_positive
from dae_theory.types import Scalar

__all__ = [
    "Hulls",
    "gate_distance",
    "hull_distances",
    "leaked_costs",
    "memorizing_cost",
    "memorizing_costs",
    "memorizing_gain",
    "memorizing_gains",
    "project_on_hulls",
]

STEPS = 400
"""Of the search for the gate, before it is refined."""
MAX_MOVES = 2_000
"""Of weight within the hull, before a sample is solved by itself."""
EPS = float(np.finfo(np.float64).eps)

Elementwise: TypeAlias = Float[np.ndarray, "..."] | float
"""Numbers that broadcast against one another."""


class Hulls(NamedTuple):
    """Each sample beside the convex hull of the others."""

    distances: Float[np.ndarray, " n"]
    """Distance to the hull, 0 for samples inside it and for repeats."""
    nearest: Float[np.ndarray, "n d"]
    """The point of the hull that is nearest to the sample."""


def project_on_hulls(data: Float[np.ndarray, "n d"], *, tolerance: float = 1e-13) -> Hulls:
    r"""Project each sample on the convex hull of the others.

    .. math:: \min_{w \ge 0,\; \sum_j w_j = 1} \Big\| x_i - \sum_{j \ne i} w_j x_j \Big\|^2

    By the pairwise method of Frank and Wolfe :cite:`lacoste15` for all samples at once: weight moves from the worst
    point that has some to the best point, and what remains to gain is known. Samples that take more than ``MAX_MOVES``
    moves, and those in their hull, are solved one by one by non-negative least squares: with ``A = (x_j - x_i)`` the
    minimum over u >= 0 of :math:`\|A u\|^2 + (1 - \sum u)^2` is taken at a multiple of the best weights. Takes
    memory for a few n × n matrices; seconds for 1,000 images of 784 pixels.

    Args:
        data: two samples or more, as rows.
        tolerance: largest relative error of the squared distances.

    ``ValueError`` for one sample, and for values that are not finite.

    Example:
        >>> corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
        >>> project_on_hulls(corners).nearest.round(6).tolist()[0]  # the middle of a diagonal
        [0.0, 0.0]
    """
    rows = np.asarray(data, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"data must be two samples or more, as rows of one matrix; got shape {rows.shape}.")
    check_finite("data", rows)
    centered = rows - rows.mean(axis=0)
    gram = centered @ centered.T
    squares = np.diagonal(gram)
    between = squares[:, None] + squares[None, :] - 2 * gram
    np.fill_diagonal(between, np.inf)
    closest = np.argmin(between, axis=1)
    repeated = np.all(rows == rows[closest], axis=1)

    weights = np.zeros_like(gram)
    weights[np.arange(len(rows)), closest] = 1
    # Half of the gradient, up to a constant of the row.
    slopes = gram[closest] - gram
    np.fill_diagonal(slopes, np.inf)
    left = np.flatnonzero(~repeated)
    for _ in range(MAX_MOVES):
        if not left.size:
            break
        here, used = np.arange(left.size), slopes[left]
        # The sample itself has no weight, and an infinite slope.
        has_weight = weights[left] > 0
        best, worst = np.argmin(used, axis=1), np.argmax(np.where(has_weight, used, -np.inf), axis=1)
        mean = np.sum(weights[left] * np.where(has_weight, used, 0.0), axis=1)
        gap = mean - used[here, best]
        square = squares[left] + mean - np.sum(weights[left] * gram[left], axis=1)
        ends = squares[best] + squares[worst] - 2 * gram[best, worst]
        move = np.minimum(weights[left, worst], (used[here, worst] - used[here, best]) / np.where(ends > 0, ends, 1))
        moving = 2 * gap > np.maximum(tolerance * square, 4 * EPS * squares[left])
        left, best, worst, move = left[moving], best[moving], worst[moving], move[moving]
        weights[left, best] += move
        weights[left, worst] -= move
        slopes[left] += move[:, None] * (gram[best] - gram[worst])
    nearest = weights @ rows
    nearest[repeated] = rows[repeated]
    distances = np.linalg.norm(nearest - rows, axis=1)
    # Distances that rounding of the Gram matrix may have spoiled, too.
    unsure = distances**2 <= max(tolerance, 1e-6) * squares.max()
    for i in np.flatnonzero(~repeated & (unsure | np.isin(np.arange(len(rows)), left))):
        nearest[i] = _nearest_in_hull(rows, i)
        distances[i] = np.linalg.norm(nearest[i] - rows[i])
        # Below the rounding of the differences the sample lies in the hull.
        if distances[i] <= 1e-10 * np.linalg.norm(rows - rows[i], axis=1).max():
            nearest[i], distances[i] = rows[i], 0.0
    return Hulls(distances, nearest)


def _nearest_in_hull(rows: Float[np.ndarray, "n d"], i: int | np.integer) -> Float[np.ndarray, " d"]:
    apart = np.delete(rows, i, axis=0) - rows[i]
    # Distances of order one, on which the rounding of the solver depends.
    unit = np.linalg.norm(apart, axis=1).min()
    weights, _ = optimize.nnls(np.vstack([apart.T / unit, np.ones(len(apart))]), np.append(np.zeros(rows.shape[1]), 1))
    return rows[i] + weights / weights.sum() @ apart


def hull_distances(data: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    r"""Distance of each sample to the convex hull of the others (:func:`project_on_hulls`).

    .. math:: D_i = \min_{w \ge 0,\; \sum_j w_j = 1} \Big\| x_i - \sum_{j \ne i} w_j x_j \Big\|

    0 for samples inside it and for repeats. ``ValueError`` for one sample, and for values that are not finite.

    Example:
        >>> corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
        >>> hull_distances(corners).round(6).tolist()  # corners to the diagonal of the others, and one inside
        [1.414214, 1.414214, 1.414214, 1.414214, 0.0]
    """
    return project_on_hulls(data).distances


def memorizing_gain(length: Scalar, gate: Scalar, sigma: Scalar, decay: Scalar = 0.0) -> float:
    r"""The gain of the unit that memorizes one sample; 0 where the penalty is too large for it.

    .. math:: \alpha = \frac{(\kappa L - l)_+}{\kappa^2 + \sigma^2}

    so that f moves by α times the noise towards the gate. ``gate = length`` gives :cite:`zhang26`, Corollary 3.2.

    Args:
        length: ``L > 0``, the distance of the sample from the offset b₂.
        gate: ``κ > 0``, its distance from the gate.
        sigma: noise level >= 0.
        decay: ``l = n λ >= 0``.

    Example:
        >>> memorizing_gain(3.0, 1.0, 0.0)  # a gate near by takes a steep unit
        3.0
    """
    length, gate, sigma, decay = _checked(length, gate, sigma, decay)
    return float(memorizing_gains(np.array([length]), np.array([gate]), sigma, decay)[0])


def memorizing_cost(length: Scalar, gate: Scalar, sigma: Scalar, decay: Scalar = 0.0) -> float:
    r"""What one memorized sample contributes to n times the objective, its share of the penalty included.

    .. math:: L^2 - \frac{(\kappa L - l)_+^2}{\kappa^2 + \sigma^2}

    For l = 0 it is :math:`\sigma^2 L^2/(\kappa^2 + \sigma^2)`: against a linear block of rank r, whose risk is about
    :math:`r \sigma^2`, memorizing pays only for :math:`L/\kappa < \sqrt r`. Arguments as for :func:`memorizing_gain`.

    Example:
        >>> round(memorizing_cost(3.0, 3.0, 0.1), 5)  # about σ², the risk along one direction
        0.00999
    """
    length, gate, sigma, decay = _checked(length, gate, sigma, decay)
    return float(memorizing_costs(np.array([length]), np.array([gate]), sigma, decay)[0])


def memorizing_gains(
    lengths: Float[np.ndarray, " n"], gates: Float[np.ndarray, " n"], sigma: float, decay: float
) -> Float[np.ndarray, " n"]:
    """:func:`memorizing_gain` of many samples, elementwise and unchecked."""
    return np.maximum(gates * lengths - decay, 0.0) / (gates**2 + sigma**2)


def memorizing_costs(
    lengths: Float[np.ndarray, " n"], gates: Float[np.ndarray, " n"], sigma: float, decay: float
) -> Float[np.ndarray, " n"]:
    """:func:`memorizing_cost` of many samples, elementwise and unchecked; ``L²`` where the gate is 0."""
    return lengths**2 - np.maximum(gates * lengths - decay, 0.0) ** 2 / (gates**2 + sigma**2)


def leaked_costs(
    gains: Elementwise,
    behind: Elementwise,
    cosines: Elementwise,
    normals: Elementwise,
    other_gains: Elementwise,
    residuals: Elementwise,
    sigma: float,
) -> Float[np.ndarray, "*s"]:
    r"""What a memorizing unit adds to n times the objective by being on where another sample's noise crosses its gate.

    .. math:: \alpha_i^2 \sigma^2 \left[(1 + a^2)\,\Phi(-a) - a\,\varphi(a)\right]
              + 2 \alpha_i\, \hat z_i \cdot \hat z_j \left\{\alpha_j \sigma^2\, (v_i \cdot v_j)\, \Phi(-a)
              - (\|z_j\| - \alpha_j \kappa_j)\,\sigma \left[\varphi(a) - a\,\Phi(-a)\right]\right\}

    to first order, elementwise and unchecked.

    Args:
        gains: ``α_i`` of the units.
        behind: a, how many standard deviations behind the gate of unit i the sample j lies.
        cosines: ``ẑ_i·ẑ_j``.
        normals: ``v_i·v_j``.
        other_gains: ``α_j`` of the samples' own units.
        residuals: ``‖z_j‖ − α_j κ_j``, what is missing of the sample.
        sigma: noise level > 0.
    """
    a = np.asarray(behind)
    beyond, density = special.ndtr(-a), normal_density(a)
    square = gains**2 * sigma**2 * ((1 + a * a) * beyond - a * density)
    cross = other_gains * sigma**2 * normals * beyond - residuals * sigma * (density - a * beyond)
    return square + 2 * gains * cosines * cross


def normal_density(a: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """The standard normal density."""
    return np.exp(-a * a / 2) / np.sqrt(2 * np.pi)


def gate_distance(length: Scalar, cosines: Float[np.ndarray, " m"], sigma: Scalar, decay: Scalar = 0.0) -> float:
    r"""Distance of a memorizing unit's gate from its sample, among samples on a sphere about the offset b₂.

    The κ that minimizes :func:`memorizing_cost` plus what the noise of each other sample leaks through the gate. At a
    cosine c, with :math:`a = (L (1 - c) - \kappa)/\sigma` standard deviations between sample and gate, that is

    .. math:: \alpha^2 \sigma^2 \left[(1 + a^2) \Phi(-a) - a \varphi(a)\right]
              + 2 \alpha c \left\{\alpha \sigma^2 c\, \Phi(-a)
              - (L - \alpha\kappa)\, \sigma \left[\varphi(a) - a \Phi(-a)\right]\right\}

    to first order in the leakage (:func:`leaked_costs`). It lies below the distance to the nearest sample,
    ``min L (1 - c)``, by some standard deviations, of order :math:`\sqrt{\ln(1/\sigma)}`.

    Args:
        length: ``L > 0``, the radius.
        cosines: with the other samples, as seen from b₂; below 1.
        sigma: noise level > 0.
        decay: ``l = n λ >= 0``.

    ``ValueError`` for another sample in the same place, and a penalty that leaves no unit: ``decay`` of at least
    ``length`` times the distance to the nearest sample.

    Example:
        >>> turns = 2 * np.pi * np.arange(1, 5) / 5
        >>> round(gate_distance(3.0, np.cos(turns), 0.1, 5e-3), 4)  # five points on a circle, 2.07 from their chords
        1.9175
    """
    check_positive("sigma", sigma)
    length, _, sigma, decay = _checked(length, 1.0, sigma, decay)
    c = np.asarray(cosines, np.float64)
    check_finite("cosines", c)
    if c.ndim != 1 or not c.size or np.any(np.abs(c) > 1) or c.max() >= 1:
        raise ValueError("cosines must be those with one other sample or more, from -1 to below 1; remove repeats.")
    farthest = length * (1 - c.max())
    if decay >= length * farthest:
        raise ValueError(
            f"decay = {decay} leaves no unit: it must be below {length * farthest:.4g}, length times the distance to "
            "the nearest sample."
        )

    def cost(gate: float) -> float:
        gain = memorizing_gain(length, gate, sigma, decay)
        # All samples are alike, and v = ẑ.
        leaked = leaked_costs(gain, (length * (1 - c) - gate) / sigma, c, c, gain, length - gain * gate, sigma)
        return memorizing_cost(length, gate, sigma, decay) + float(np.sum(leaked))

    # The cost may have another, shallower valley: look at all of it first.
    grid = np.linspace(max(decay / length, 0.0), farthest, STEPS + 2)[1:-1]
    best = int(np.argmin([cost(gate) for gate in grid]))
    step = grid[1] - grid[0]
    ends = max(grid[best] - step, grid[0] / 2), min(grid[best] + step, farthest)
    found: Any = optimize.minimize_scalar(cost, bounds=ends, method="bounded", options={"xatol": 1e-12 * farthest})
    return float(found.x)


def _checked(length: Scalar, gate: Scalar, sigma: Scalar, decay: Scalar) -> tuple[float, float, float, float]:
    check_positive("length", length)
    check_positive("gate", gate)
    check_level("sigma", sigma)
    check_nonnegative("decay", decay)
    values = tuple(float(value) for value in (length, gate, sigma, decay))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"length, gate, sigma and decay must be finite; got {values}.")
    return values[0], values[1], values[2], values[3]
