r"""Where a curve crosses a level, with an interval over seeds: the transition from memorization as a number.

The curve is the mean over seeds of a measure along an axis; between grid points it is linear in the logarithm of the
axis. The interval is the jackknife's :cite:`tukey58` with Student's t: if :math:`\theta` is the logarithm of the
crossing of all S seeds, and :math:`\theta_{(i)}` that without seed i,

.. math:: \theta \pm t_{S-1} \sqrt{\tfrac{S-1}{S} \sum_i (\theta_{(i)} - \bar\theta)^2}, \qquad
          \bar\theta = \frac1S \sum_i \theta_{(i)}.

It covers what differs between seeds: training rows, starts and noise. It does not cover the split into training pool
and held-out rows, which all seeds share. Curves that do not cross inside the grid are continued along their first or
last segment for the spread only; an end of the interval that falls outside the grid is open, because nothing was
measured beyond the grid's ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from dae_theory.jackknife import jackknife_reach

__all__ = ["Crossing", "crossing", "crossing_over_seeds", "transition"]


class Crossing(NamedTuple):
    """Where a curve crosses a level, with its interval over seeds."""

    estimate: float
    """NaN if the curve does not cross the level inside the grid."""
    low: float
    """0 if the interval is open below: it reaches below the grid. NaN if there is no interval (one seed)."""
    high: float
    """Infinity if the interval is open above: it reaches above the grid."""
    crossed: float
    """Share of the seeds whose own curve crosses inside the grid."""
    side: float
    """0 if the curve crosses inside the grid, -1 if it is past the level at the grid's lower end already, 1 if it is
    not yet at the upper end; NaN if it was not computed."""


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """The x where y last passes ``level`` from above to below, or from below to above if it ends above its start.

    ``x`` (m,) must be positive and increasing, ``y`` has shape (m,), and the curve is linear in log x between points.
    After the last crossing the curve stays on one side. NaN entries of y are left out. NaN if there is no crossing.
    """
    place, side = _place(x, y, level)
    return float(np.exp(place)) if side == 0 else float("nan")


def crossing_over_seeds(x: np.ndarray, curves: np.ndarray, level: float, *, confidence: float = 0.95) -> Crossing:
    """Crossing of the mean of several curves, and its interval over seeds.

    Args:
        x: the axis, (m,).
        curves: one curve for each seed, (seeds, m); NaN entries are left out of the means. A single seed gives no
            interval: low and high are NaN.
        level: the level to cross.
        confidence: coverage of the interval, in (0, 1).
    """
    curves = np.asarray(curves, float)
    if curves.ndim != 2:
        raise ValueError(f"curves must have shape (seeds, points), got {curves.shape}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    curves = curves[np.isfinite(curves).any(axis=1)]
    place, side = _place(x, _mean(curves), level)
    estimate = float(np.exp(place)) if side == 0 else float("nan")
    inside = [_place(x, curve, level)[1] == 0 for curve in curves]
    crossed = float(np.mean(inside)) if inside else float("nan")
    num = len(curves)
    if num < 2 or np.isnan(side):
        return Crossing(estimate, float("nan"), float("nan"), crossed, side)
    without = np.array([_place(x, _mean(np.delete(curves, i, axis=0)), level)[0] for i in range(num)])
    if not np.all(np.isfinite([place, *without])):
        return Crossing(estimate, 0.0, float("inf"), crossed, side)
    reach = jackknife_reach(without, confidence)
    low, high = np.exp(place - reach), np.exp(place + reach)
    low = min(float(low), float(x[-1])) if low >= x[0] else 0.0
    high = max(float(high), float(x[0])) if high <= x[-1] else float("inf")
    return Crossing(estimate, low, high, crossed, side)


def transition(
    results: xr.Dataset,
    *,
    measure: str = "gap",
    level: float = 0.5,
    along: str = "num_samples",
    confidence: float = 0.95,
) -> xr.Dataset:
    """Crossings of ``measure`` through ``level`` along one axis, for every combination of the other axes but the seed.

    With the defaults: the training-set size at which the train error is half the held-out error.

    Args:
        results: of a sweep, with the dimension ``seed``.
        measure: a variable of the results.
        level: the level to cross.
        along: the axis, with at least two values.
        confidence: coverage of the interval, in (0, 1).

    Returns the fields of :class:`Crossing`, those of places in the units of the axis. ``ValueError`` for an unknown
    measure or axis.

    >>> curves = np.array([[1.0, 0.5, 0.25], [1.0, 0.6, 0.2]])
    >>> results = xr.Dataset({"gap": (("seed", "num_samples"), curves)}, {"num_samples": [1, 10, 100]})
    >>> table = transition(results)
    >>> round(float(table.estimate)), bool(table.low < table.estimate < table.high)
    (14, True)
    """
    if measure not in results:
        names = [str(name) for name in results]
        raise ValueError(f"no measure {measure!r} in these results{nearest(measure, names)}; they have {_some(names)}.")
    curves = results[measure]
    axes = [str(dim) for dim in curves.dims if dim != "seed"]
    if along not in axes:
        known = f"{along!r} is no axis of {measure}" if along != "seed" else "the interval is over the seeds"
        raise ValueError(f"{known}{nearest(along, axes)}; the axes are {_some(axes)}.")
    if curves.sizes[along] < 2:
        raise ValueError(
            f"axis {along!r} needs at least two values to cross a level; the axes are {dict(curves.sizes)}."
        )
    table = xr.apply_ufunc(
        lambda c: np.array(crossing_over_seeds(curves[along].values, c, level, confidence=confidence), dtype=float),
        curves,
        input_core_dims=[["seed", along]],
        output_core_dims=[["field"]],
        vectorize=True,
    )
    fields = xr.Dataset({name: table.isel(field=i, drop=True) for i, name in enumerate(Crossing._fields)})
    return fields.assign_attrs(measure=measure, level=level, along=along, confidence=confidence)


def nearest(name: str, known: Sequence[str]) -> str:
    """``, did you mean gap?`` for a mistyped name; empty if none of ``known`` is near."""
    near = difflib.get_close_matches(name, known, n=2)
    return f", did you mean {' or '.join(near)}?" if near else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _place(x: np.ndarray, y: np.ndarray, level: float) -> tuple[float, float]:
    """Logarithm of the x where y last passes ``level``, and the side of the grid where it lies (see Crossing).

    Outside the grid the curve goes on along its first or last segment; infinite if that leads away from the level.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be vectors of one length, got shapes {x.shape} and {y.shape}.")
    if np.any(x <= 0) or np.any(np.diff(x) <= 0):
        raise ValueError(f"x must be positive and increase, got {x}.")
    finite = np.isfinite(y)
    x, above = np.log(x[finite]), y[finite] - level
    if above.size < 2:
        return float("nan"), float("nan")
    if above[-1] > above[0]:
        above = -above
    crossings = np.flatnonzero((above[:-1] > 0) & (above[1:] <= 0))
    side = 0.0 if crossings.size else (1.0 if above[-1] > 0 else -1.0)
    i = int(crossings[-1]) if crossings.size else (len(x) - 2 if side > 0 else 0)
    fall = above[i] - above[i + 1]
    if fall <= 0:
        return side * float("inf"), side
    return float(x[i] + above[i] / fall * (x[i + 1] - x[i])), side


def _mean(curves: np.ndarray) -> np.ndarray:
    """Mean over seeds that finished; NaN, without a warning, where none did."""
    finite = np.isfinite(curves)
    count = finite.sum(axis=0)
    total = np.where(finite, curves, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
