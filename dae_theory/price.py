r"""The price of memory: what memorizing every sample costs a two-layer DAE, beside generalizing, as n grows.

Both sides are closed forms for the same data, noise and penalty, so which is lower is the prediction of what training
finds. Without biases: one unit a sample :cite:`zhang26`, Corollary 3.2, against one block of all samples,
Theorem 3.1; the former is a minimizer only where all cosines are negative. With biases
(:mod:`dae_theory.affine_minimizers`): one unit a sample at its own gate, against the affine network. A memorized sample
then costs about :math:`\sigma^2 L^2/(\kappa^2 + \sigma^2)`, and r kept directions about :math:`r \sigma^2`, so
memorizing pays while the gates are far, :math:`L/\kappa < \sqrt r`: it ends by geometry, not by counting units
(derived here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import linear_cost
from dae_theory.checks import check_integer
from dae_theory.convexity import Hulls, memorizing_costs, project_on_hulls
from dae_theory.types import Scalar

__all__ = ["Price", "nested_prices", "pays_up_to", "price_of_memory"]


class Price(NamedTuple):
    """Objectives of memorizing and of generalizing, and the geometry behind them; medians are over samples."""

    num_samples: int
    """n."""
    cosine: float
    """β, the largest cosine between two samples; the theorem without biases needs it below 0."""
    plain_memorizing: float
    """Main term of the objective without biases, one unit for each of the longest samples that units suffice for."""
    plain_generalizing: float
    """Main term without biases, one block of all samples."""
    memorizable: int
    """Samples that a network with biases can memorize: outside the hull of the others, and worth the penalty."""
    hull: float
    """Median distance D to the hull of the others."""
    gate: float
    """Median distance κ to the gate."""
    gain: float
    """Median gain α, by which noise towards the gate is multiplied."""
    length: float
    """Median distance L from b₂."""
    memorizing: float
    """Objective with biases, to first order in the leakage: one unit a sample; where there are more samples than units,
    for those that save most."""
    generalizing: float
    """Main term with biases, the affine network of min(p, d) directions."""


def price_of_memory(
    data: Float[np.ndarray, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    width: int | None = None,
    tolerance: float = 1e-6,
    hulls: Hulls | None = None,
) -> Price:
    """Both sides for one data set.

    Args:
        data: two samples or more, as rows.
        sigma: noise level > 0.
        penalty: λ >= 0.
        width: units p >= 1; n by default.
        tolerance: largest relative error of the squared distances to hulls.
        hulls: those of ``data``, where they are at hand.

    ``ValueError`` for one sample, values that are not finite, and numbers out of range.

    Example:
        >>> turns = 2 * np.pi * np.arange(4) / 4
        >>> square = 3 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        >>> price = price_of_memory(square, 0.1, 0.0)
        >>> price.memorizing < price.generalizing, round(price.hull, 3)  # L/κ is about 1.1, below √2
        (True, 3.0)
    """
    rows = np.asarray(data, np.float64)
    n = len(rows)
    width = n if width is None else check_integer("width", width, minimum=1)
    found = memorize(rows, sigma, penalty, hulls=hulls or project_on_hulls(rows, tolerance=tolerance))
    savings = np.sort(found.lengths**2 - found.costs)[::-1]
    energies = np.sum(found.lengths**2) - np.sum(savings[:width])
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    cosines = units @ units.T
    np.fill_diagonal(cosines, -1.0)
    sigma, penalty = float(sigma), float(penalty)
    # Corollary 3.2: the gate of a unit without bias goes through the origin.
    stored = np.sort(lengths**2 - memorizing_costs(lengths, lengths, sigma, n * penalty))[::-1]
    rank = min(width, rows.shape[1])
    kept = found.gains > 0
    return Price(
        n,
        float(cosines.max()),
        float(np.sum(lengths**2) - np.sum(stored[:width])) / n,
        linear_cost(rows, sigma, penalty, rank),
        int(kept.sum()),
        float(np.median(found.hulls)),
        float(np.median(found.gates[kept])) if kept.any() else 0.0,
        float(np.median(found.gains)),
        float(np.median(found.lengths)),
        float(energies) / n,
        linear_cost(rows - rows.mean(axis=0), sigma, penalty, rank),
    )


def nested_prices(
    data: Float[np.ndarray, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    sizes: Sequence[int],
    *,
    width: int | None = None,
    tolerance: float = 1e-6,
) -> list[Price]:
    """:func:`price_of_memory` of the first m rows, for each m of ``sizes``; with n units each if ``width`` is None.

    ``ValueError`` for sizes below 2 or above n, too.
    """
    for size in sizes:
        check_integer("size", size, minimum=2, maximum=len(data))
    return [price_of_memory(data[:size], sigma, penalty, width=width, tolerance=tolerance) for size in sizes]


def pays_up_to(prices: Sequence[Price], *, biases: bool = True) -> int | None:
    """The largest n up to which memorizing has the lower objective at all sizes; None if it has not at the first.

    Without biases it counts only where β < 0, as the theorem needs.
    """
    last = None
    for price in prices:
        if biases:
            pays = price.memorizing < price.generalizing
        else:
            pays = price.plain_memorizing < price.plain_generalizing and price.cosine < 0
        if not pays:
            break
        last = price.num_samples
    return last
