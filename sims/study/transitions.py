r"""Where a curve crosses a level, with an interval over seeds: the transition from memorization as a number.

The curve is the mean over seeds of a measure along an axis; between grid points it is linear in the logarithm of the
axis. The interval is a percentile bootstrap over seeds, so it covers training sets, starts and noise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

__all__ = ["Crossing", "bootstrap_crossing", "crossing", "transition"]


class Crossing(NamedTuple):
    """Where a curve crosses a level, with its bootstrap interval."""

    estimate: float
    """NaN if the curve does not cross the level inside the grid."""
    low: float
    high: float
    crossed: float
    """Share of bootstrap curves that cross inside the grid; the interval is over these only."""


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """The x where y last passes ``level`` from above to below, or from below to above if it ends above its start.

    ``x`` (m,) must be positive and increasing, ``y`` has shape (m,), and the curve is linear in log x between points.
    After the last crossing the curve stays on one side. NaN entries of y are left out. NaN if there is no crossing.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be vectors of one length, got shapes {x.shape} and {y.shape}.")
    if np.any(x <= 0) or np.any(np.diff(x) <= 0):
        raise ValueError(f"x must be positive and increase, got {x}.")
    finite = np.isfinite(y)
    x, above = np.log(x[finite]), y[finite] - level
    if above.size < 2:
        return float("nan")
    if above[-1] > above[0]:
        above = -above
    crossings = np.flatnonzero((above[:-1] > 0) & (above[1:] <= 0))
    if crossings.size == 0:
        return float("nan")
    i = crossings[-1]
    share = above[i] / (above[i] - above[i + 1])
    return float(np.exp(x[i] + share * (x[i + 1] - x[i])))


def bootstrap_crossing(
    x: np.ndarray,
    curves: np.ndarray,
    level: float,
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Crossing:
    """Crossing of the mean of several curves, and its percentile interval over resampled seeds.

    Args:
        x: the axis, (m,).
        curves: one curve for each seed, (seeds, m). A single seed gives no interval: low and high are NaN.
        level: the level to cross.
        seed: of the resampling.
        num_resamples: bootstrap samples.
        confidence: coverage of the interval, in (0, 1).
    """
    curves = np.asarray(curves, float)
    if curves.ndim != 2:
        raise ValueError(f"curves must have shape (seeds, points), got {curves.shape}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    estimate = crossing(x, _mean(curves), level)
    if len(curves) == 1:
        return Crossing(estimate, float("nan"), float("nan"), float(np.isfinite(estimate)))
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(curves), size=(num_resamples, len(curves)))
    resampled = np.array([crossing(x, _mean(curves[pick]), level) for pick in picks])
    inside = resampled[np.isfinite(resampled)]
    if inside.size == 0:
        return Crossing(estimate, float("nan"), float("nan"), 0.0)
    low, high = np.quantile(inside, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Crossing(estimate, float(low), float(high), inside.size / num_resamples)


def transition(
    results: xr.Dataset,
    *,
    measure: str = "gap",
    level: float = 0.5,
    along: str = "num_samples",
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Crossings of ``measure`` through ``level`` along one axis, for every combination of the other axes but the seed.

    With the defaults: the training-set size at which the train error is half the held-out error.

    Args:
        results: of a sweep, with the dimension ``seed``.
        measure: a variable of the results.
        level: the level to cross.
        along: the axis, with at least two values.
        seed: of the bootstrap.
        confidence: coverage of the interval, in (0, 1).

    Returns variables ``estimate``, ``low``, ``high`` (in the units of the axis) and ``crossed``. ``ValueError`` for an
    unknown measure or axis.

    >>> curves = np.array([[1.0, 0.5, 0.25], [1.0, 0.6, 0.2]])
    >>> results = xr.Dataset({"gap": (("seed", "num_samples"), curves)}, {"num_samples": [1, 10, 100]})
    >>> table = transition(results)
    >>> round(float(table.estimate)), bool(table.low < table.estimate < table.high)
    (14, True)
    """
    if measure not in results:
        raise ValueError(f"no measure {measure!r} in these results; they have {', '.join(map(str, results))}.")
    curves = results[measure]
    if along not in curves.dims or curves.sizes[along] < 2:
        raise ValueError(
            f"axis {along!r} needs at least two values to cross a level; the axes are {dict(curves.sizes)}."
        )
    table = xr.apply_ufunc(
        lambda c: np.array(
            bootstrap_crossing(curves[along].values, c, level, seed=seed, confidence=confidence), dtype=float
        ),
        curves,
        input_core_dims=[["seed", along]],
        output_core_dims=[["field"]],
        vectorize=True,
    )
    fields = xr.Dataset({name: table.isel(field=i, drop=True) for i, name in enumerate(Crossing._fields)})
    return fields.assign_attrs(measure=measure, level=level, along=along, confidence=confidence)


def _mean(curves: np.ndarray) -> np.ndarray:
    """Mean over seeds that finished; NaN, without a warning, where none did."""
    finite = np.isfinite(curves)
    count = finite.sum(axis=0)
    total = np.where(finite, curves, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
