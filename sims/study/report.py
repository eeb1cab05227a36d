"""The one-page summary of a run, as Markdown made from its arrays and its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from sims.store.provenance import differences
from sims.study.tables import markdown, mean_and_error
from sims.study.transitions import Crossing, transition

__all__ = ["summary", "transition_table"]


def transition_table(
    results: xr.Dataset, *, measure: str = "gap", level: float = 0.5, along: str = "num_samples"
) -> list[dict[str, Any]]:
    """Crossings as rows: the value of every other axis, then the fields of :class:`sims.study.transitions.Crossing`.

    Measures are those at the last recorded step. Axes of one value are left out. ``ValueError`` as in
    :func:`sims.study.transitions.transition`.
    """
    last = results[[measure] if measure in results else []].isel(step=-1, drop=True)
    table = transition(last, measure=measure, level=level, along=along)
    axes = [dim for dim in table.estimate.dims if table.sizes[dim] > 1]
    flat = table.squeeze(drop=True).stack(row=axes) if axes else table.squeeze(drop=True).expand_dims("row")
    rows = []
    for i in range(flat.sizes["row"]):
        row = flat.isel(row=i)
        labels = {axis: row[axis].item() for axis in axes}
        rows.append(labels | {name: float(row[name]) for name in Crossing._fields})
    return rows


def summary(
    results: xr.Dataset,
    spec: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    sessions: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown: what was run, how many cells finished, where the transition is, and the ends of the main curves.

    It says so if ``sessions`` computed parts of the run on different machines, versions or devices.
    """
    sizes = {dim: size for dim, size in results.sizes.items() if dim in spec or dim in ("seed", "step")}
    networks = math.prod(size for dim, size in sizes.items() if dim != "step")
    last = results.isel(step=-1)
    # Runs begun by earlier versions have no record of it.
    bad = last["diverged"] if "diverged" in last else _not_finite(last)
    diverged = int((bad & last["done"]).sum())
    missing = round(networks * float(1 - last["done"].mean()))
    names = [f"{one['name']} (d = {one['dim']})" for one in facts]
    lines = [
        "# Summary",
        "",
        f"{networks} networks on {' and '.join(names) or 'unrecorded data'}: "
        + ", ".join(f"{size} {dim}" for dim, size in sizes.items() if size > 1)
        + ".",
        f"Training: {_listed(spec['optimizer'])}, {spec['steps']} steps, width {_listed(spec['width'])}, "
        f"penalty {_listed(spec['penalty'])}, learning rate {_listed(spec['learning_rate'])}, "
        f"batch {_listed(size or 'full' for size in spec['batch_size'])}.",
        f"Diverged: {diverged} of {networks}." + (f" Not computed yet: {missing}." if missing else ""),
        *_origin_lines(sessions),
        "",
    ]
    if "gap" in results and results.sizes["num_samples"] > 1:
        lines += _transition_lines(results)
    lines += _ends_lines(results)
    return "\n".join(lines) + "\n"


def _origin_lines(sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    changes = differences([session for session in sessions if session.get("chunks")])
    if not changes:
        return []
    listed = "; ".join(f"{name}: {', '.join(values)}" for name, values in changes.items())
    return [
        f"Cells of this run were computed under different conditions ({listed}): they are equal to rounding only. For "
        "bitwise reproducible results, compute the run again under one of them."
    ]


def _transition_lines(results: xr.Dataset) -> list[str]:
    crossings = transition_table(results)
    axes = [name for name in crossings[0] if name not in Crossing._fields]
    sizes = results.num_samples.values
    outside = {-1.0: f"below {sizes[0]:g}", 1.0: f"above {sizes[-1]:g}"}
    rows = []
    for row in crossings:
        estimate = f"{row['estimate']:.3g}" if row["side"] == 0 else outside.get(row["side"], "not computed yet")
        rows.append([*(_shown(row[axis]) for axis in axes), estimate, _interval(row["low"], row["high"])])
    return [
        "## Where memorization ends",
        "",
        "n* is the training-set size at which the denoising error on training rows is half of that on held-out rows "
        f"(gap = 1/2), with a 95 % interval over {_seeds_done(results)} seeds (jackknife, Student's t), which covers "
        "training rows, starts and noise, not the split into training pool and held-out rows.",
        "",
        markdown([*axes, "n*", "interval"], rows),
        "",
    ]


def _interval(low: float, high: float) -> str:
    """An interval as text; its ends are open where they lie outside the grid."""
    if math.isnan(low) or math.isnan(high):
        return "-"
    if low == 0 and math.isinf(high):
        return "not determined"
    if low == 0:
        return f"below {high:.3g}"
    return f"above {low:.3g}" if math.isinf(high) else f"{low:.3g} to {high:.3g}"


def _not_finite(results: xr.Dataset) -> xr.DataArray:
    """The cells in which a measure that depends on the trained weights is NaN or infinite, whatever was measured."""
    cells = {*results.done.dims, "penalty", "learning_rate", "init_scale", "sigma"}
    bad = xr.zeros_like(results.done, bool)
    for name, values in results.data_vars.items():
        # These are NaN where no closed form exists, and say nothing of the weights.
        if values.dtype.kind == "f" and name not in ("wall_s", "distance_to_closed_form", "conditions_hold"):
            own = [dim for dim in values.dims if dim not in cells]
            bad = bad | ~xr.apply_ufunc(np.isfinite, values).all(own)
    return bad


def _seeds_done(results: xr.Dataset) -> int:
    """The number of seeds of which anything was computed."""
    if "done" not in results:
        return results.sizes["seed"]
    done = results["done"]
    return int(done.any([dim for dim in done.dims if dim != "seed"]).sum())


_ENDS = {
    "train_error": "denoising error, training rows",
    "held_out_error": "denoising error, held-out rows",
    "distance_to_empirical_train": "distance to the empirical optimum, training rows",
    "distance_to_population_held_out": "distance to the mixture optimum, held-out rows",
    "num_aligned_columns": "columns aligned with a training row",
    "num_live_columns": "live columns",
    "l4_over_l2_train": "l4/l2 of codes, training rows",
    "l4_over_l2_held_out": "l4/l2 of codes, held-out rows",
}


def _ends_lines(results: xr.Dataset) -> list[str]:
    """Means over seeds with standard errors: at the smallest and largest n, at the middle σ and the first value of
    other axes, which the heading names; or with one n, over all other axes."""
    names = [name for name in _ENDS if name in results]
    if not names:
        return []
    if results.sizes["num_samples"] < 2:
        return _means_lines(results[names].isel(step=-1))
    middle = results.sizes["sigma"] // 2
    curves = results[names].isel(step=-1, sigma=middle)
    others = [dim for dim in curves.dims if dim not in ("num_samples", "seed")]
    fixed = [f"{dim} = {_shown(curves[dim].values[0].item())}" for dim in others if curves.sizes[dim] > 1]
    curves = curves.isel(dict.fromkeys(others, 0))
    ends = [curves.isel(num_samples=i) for i in (0, -1)]
    rows = [[_ENDS[name], *(mean_and_error(end[name].values) for end in ends)] for name in names]
    return [
        f"## The two ends, at {', '.join([f'sigma = {float(curves.sigma):g}', *fixed])}",
        "",
        markdown(["", *(f"n = {int(end.num_samples)}" for end in ends)], rows),
        "",
    ]


MAX_MEANS = 60
"""Rows of the table of means."""


def _means_lines(results: xr.Dataset) -> list[str]:
    """A table of means over seeds with standard errors, a row for each combination of the axes with several values."""
    axes = [str(dim) for dim in results.dims if dim != "seed" and results.sizes[dim] > 1]
    single = results.isel({dim: 0 for dim in results.dims if dim != "seed" and dim not in axes})
    flat = single.stack(row=axes) if axes else single.expand_dims("row")
    rows = []
    for i in range(min(flat.sizes["row"], MAX_MEANS)):
        row = flat.isel(row=i)
        labels = [_shown(row[axis].item()) for axis in axes]
        rows.append([*labels, *(mean_and_error(row[str(name)].values) for name in results)])
    more = flat.sizes["row"] - len(rows)
    return [
        "## Means over seeds, ± standard errors",
        "",
        markdown([*axes, *(_ENDS[str(name)] for name in results)], rows),
        *([f"and {more} more rows"] if more else []),
        "",
    ]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(_shown(value) for value in values)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value) or "none"
