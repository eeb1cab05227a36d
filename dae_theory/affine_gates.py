r"""Gates, gains and offset of the network with biases that memorizes every sample it can; derived here.

One unit a sample, at a gate that cuts the sample off from the hull of the others (:mod:`dae_theory.convexity`). The
gates depend on one another: each lets through noise of other samples, and corrects a little of what their own units
miss. They are found together with the offset b₂, in NumPy; :mod:`dae_theory.affine_minimizers` makes the network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from dae_theory.checks import check_level
from dae_theory.convexity import (
    Hulls,
    leaked_costs,
    memorizing_costs,
    memorizing_gains,
    normal_density,
    project_on_hulls,
)
from dae_theory.types import Scalar

__all__ = ["Memorized", "memorize"]

ROUNDS = 50
"""Of the alternation between gates and offset, which agree to ``AGREE`` after about ten."""
AGREE = 1e-6
"""Largest change of a gate and of the offset, in units of their size, at which they count as found."""
GRID = 48
"""Gates tried for each sample, before the best one is refined."""
GOLDEN = 36
"""Steps of that refinement, each of which leaves .618 of the interval: 3e-8 of the distance between two."""
NEIGHBORS = 48
"""Other samples, those nearest to the gate, whose noise is taken to leak through it."""
MARGIN = 1.5
"""Standard deviations between a gate and the hull at least, where the hull is twice as far: of 400 digits, first order
is within 4 % of the exact objective then, and far below it for gates nearer to the hull."""
RATIO = (5**0.5 - 1) / 2


class Memorized(NamedTuple):
    """One unit per sample, each with its gate; from :func:`memorize`. All float64."""

    offset: Float[np.ndarray, " d"]
    """b₂, the output where all units are off."""
    lengths: Float[np.ndarray, " n"]
    """``L_i = ‖x_i − b₂‖``."""
    hulls: Float[np.ndarray, " n"]
    """``D_i``, the distance to the convex hull of the other samples."""
    normals: Float[np.ndarray, "n d"]
    """v_i, the unit normal of the gate: from the hull to the sample; zero where D_i is."""
    gates: Float[np.ndarray, " n"]
    """``κ_i < D_i``, the distance from the sample to its gate; 0 where there is no unit."""
    gains: Float[np.ndarray, " n"]
    """``α_i``, 0 where there is no unit: D_i is 0, or the penalty exceeds what the unit saves."""
    costs: Float[np.ndarray, " n"]
    """What each sample contributes to n times the objective, its penalty and what its unit leaks included; ``L_i²``
    without a unit."""

    @property
    def objective(self) -> float:
        """The objective :cite:`zhang26`, eq. (6), to first order in the leakage: the mean of the costs."""
        return float(np.mean(self.costs))


def memorize(
    data: Float[np.ndarray, "n d"], sigma: Scalar, penalty: Scalar, *, hulls: Hulls | None = None
) -> Memorized:
    r"""Gates, gains and the shared offset of the network that memorizes every sample it can.

    The gate's normal points from the hull of the other samples to the sample, which leaves the others as far behind it
    as possible. Its distance minimizes the main term and what the noise of other samples leaks through it
    (:func:`dae_theory.convexity.gate_distance` says how much, on a sphere). The offset is the weighted mean

    .. math:: b_2 = \frac{\sum_i c_i x_i}{\sum_i c_i}, \qquad
              c_i = \frac{\sigma^2 + n\lambda\,\kappa_i/\|z_i\|}{\kappa_i^2 + \sigma^2}

    with c = 1 for samples without a unit. Gates and offset are alternated until they agree.

    Args:
        data: two samples or more, as rows.
        sigma: noise level > 0.
        penalty: λ >= 0.
        hulls: those of ``data``, where they are at hand.

    ``ValueError`` for one sample, repeated samples, values that are not finite, and a noise level of 0. Samples inside
    the hull of the others have no unit; this is no error.

    Gates stay ``MARGIN`` σ away from the hull. Where first order would have them nearer, the hull is a few σ away, more
    than one unit leaks at a sample, and the result is a network that memorizes but not the best one.

    Example:
        >>> turns = 2 * np.pi * np.arange(5) / 5
        >>> circle = 3 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        >>> found = memorize(circle, 0.1, 1e-3)
        >>> round(float(found.gates[0]), 4), round(float(found.gains[0]), 4)
        (1.9175, 1.5589)
    """
    rows = np.asarray(data, np.float64)
    check_level("sigma", sigma, zero=False)
    check_level("penalty", penalty)
    hulls = project_on_hulls(rows) if hulls is None else hulls
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    if counts.max() > 1:
        example = np.flatnonzero(np.all(rows == rows[first[np.argmax(counts)]], axis=1))[:2]
        raise ValueError(
            f"{len(rows) - len(counts)} samples repeat an earlier one, such as rows {example[0]} and {example[1]}, "
            "which no gate separates: pass distinct rows."
        )
    sigma, decay = float(sigma), len(rows) * float(penalty)
    distances = hulls.distances
    apart = rows - hulls.nearest
    normals = np.where(distances[:, None] > 0, apart / np.where(distances > 0, distances, 1.0)[:, None], 0.0)
    depths = np.sum(normals * rows, axis=1)[:, None] - normals @ rows.T
    np.fill_diagonal(depths, np.inf)
    others = np.argpartition(depths, min(NEIGHBORS, len(rows) - 1) - 1, axis=1)[:, :NEIGHBORS]
    others = others[:, : len(rows) - 1]
    depths = np.take_along_axis(depths, others, axis=1)
    between = np.take_along_axis(normals @ normals.T, others, axis=1)

    offset, gates, gains = rows.mean(axis=0), 0.9 * distances, np.zeros(len(rows))
    leaks = _Leaks(others, depths, between, between)
    for _ in range(ROUNDS):
        z = rows - offset
        lengths = np.linalg.norm(z, axis=1)
        units = z / np.where(lengths > 0, lengths, 1.0)[:, None]
        cosines = np.take_along_axis(units @ units.T, others, axis=1)
        gains = memorizing_gains(lengths, gates, sigma, decay)
        before, old = offset, gates
        leaks = _Leaks(others, depths, cosines, between)
        gates = _best_gates(leaks, lengths, distances, gates, gains, sigma, decay)
        gains = memorizing_gains(lengths, gates, sigma, decay)
        pull = (sigma**2 + decay * gates / np.where(lengths > 0, lengths, 1.0)) / (gates**2 + sigma**2)
        weights = np.where(gains > 0, pull, 1.0)
        offset = weights @ rows / weights.sum()
        settled = np.max(np.abs(gates - old) - AGREE * distances) <= 0
        if settled and np.linalg.norm(offset - before) <= AGREE * np.max(lengths, initial=0.0):
            break
    lengths = np.linalg.norm(rows - offset, axis=1)
    gains = memorizing_gains(lengths, gates, sigma, decay)
    gates = np.where(gains > 0, gates, 0.0)
    costs = memorizing_costs(lengths, gates, sigma, decay)
    costs += leaks.of(gates, gains, lengths - gains * gates, gains, sigma)
    return Memorized(offset, lengths, distances, normals, gates, gains, costs)


class _Leaks(NamedTuple):
    """The samples whose noise may leak through each gate, m of them."""

    others: np.ndarray
    """Their numbers j, shape (n, m)."""
    depths: Float[np.ndarray, "n m"]
    """``v_i·(x_i − x_j)``, at least D_i."""
    cosines: Float[np.ndarray, "n m"]
    """``ẑ_i·ẑ_j``."""
    normals: Float[np.ndarray, "n m"]
    """``v_i·v_j``."""

    def of(
        self,
        gates: Float[np.ndarray, " n"],
        gains: Float[np.ndarray, " n"],
        residuals: Float[np.ndarray, " n"],
        other_gains: Float[np.ndarray, " n"],
        sigma: float,
    ) -> Float[np.ndarray, " n"]:
        """What each unit leaks at all of its samples, which miss ``residuals`` and have units of ``other_gains``."""
        behind = (self.depths - gates[:, None]) / sigma
        others = other_gains[self.others], residuals[self.others]
        return np.sum(leaked_costs(gains[:, None], behind, self.cosines, self.normals, *others, sigma), axis=1)


def _best_gates(
    leaks: _Leaks,
    lengths: Float[np.ndarray, " n"],
    hulls: Float[np.ndarray, " n"],
    gates: Float[np.ndarray, " n"],
    gains: Float[np.ndarray, " n"],
    sigma: float,
    decay: float,
) -> Float[np.ndarray, " n"]:
    r"""The κ of every sample that minimizes its main term and the leakage that depends on it, given all others.

    :func:`dae_theory.convexity.gate_distance` without its sphere: another sample j lies
    :math:`a = (v_i \cdot (x_i - x_j) - \kappa_i)/\sigma` standard deviations behind the gate of unit i, which leaks
    :func:`dae_theory.convexity.leaked_costs` there. κ_i occurs in them both where unit i is on at other samples, and
    where other units are on at i.

    Args:
        leaks: what leaks through which gate.
        lengths: ``‖z_i‖``.
        hulls: ``D_i``, the largest distances of the gates; where 0 so is the result.
        gates, gains: those of the last round.
        sigma: noise level > 0.
        decay: ``n λ >= 0``.
    """
    others = leaks.others
    residuals = lengths - gains * gates
    # What other units let through of sample i's noise, per unit of α_i and of ‖z_i‖ − α_i κ_i.
    a = (leaks.depths - gates[:, None]) / sigma
    through = gains[:, None] * leaks.cosines * special.ndtr(-a)
    moved, missed = np.zeros_like(lengths), np.zeros_like(lengths)
    np.add.at(moved, others, through * leaks.normals)
    np.add.at(missed, others, gains[:, None] * leaks.cosines * normal_density(a) - a * through)

    def cost(gate: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        gain = memorizing_gains(lengths, gate, sigma, decay)
        out = leaks.of(gate, gain, residuals, gains, sigma)
        into = 2 * sigma * (gain * sigma * moved - (lengths - gain * gate) * missed)
        return memorizing_costs(lengths, gate, sigma, decay) + out + into

    # Nearer to the hull than that, more than one unit leaks at a sample, and first order says nothing.
    farthest = np.maximum(hulls - MARGIN * sigma, hulls / 2)
    tried = np.linspace(0.02, 1.0, GRID)
    best = np.argmin([cost(share * farthest) for share in tried], axis=0)
    low = tried[np.maximum(best - 1, 0)] * farthest
    high = tried[np.minimum(best + 1, GRID - 1)] * farthest
    for _ in range(GOLDEN):
        left, right = high - RATIO * (high - low), low + RATIO * (high - low)
        falls = cost(left) < cost(right)
        low, high = np.where(falls, low, left), np.where(falls, right, high)
    return (low + high) / 2
