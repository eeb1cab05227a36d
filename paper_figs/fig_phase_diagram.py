"""The memorization-to-generalization transition over n and σ: the generalization gap, and where it is one half.

Drawn from the results of a sweep (``--run DIR``, values of its other axes by ``--select AXIS=VALUE``), or of the sweep
that :data:`SPEC` describes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays
from sims import store
from sims.presets import DEMO
from sims.study.transitions import nearest, transition
from sims.sweeps.engine import sweep
from sims.sweeps.spec import Spec

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "the transition over n and sigma; --run DIR draws a finished sweep, --select AXIS=VALUE values of other axes"

SPEC: dict[str, Any] = dict(DEMO)
"""The sweep that is run if no finished one is given."""

QUICK = SPEC | {"num_samples": (2, 16, 128), "sigma": (0.5, 1.5), "steps": 100, "seeds": 2}

SELECTS = True
"""``--select`` chooses values of axes."""

MAX_FACETS = 6
_MEASURES = ("gap", "train_error", "held_out_error")
_ENDS = ("transition", "transition_low", "transition_high")
_SHOWN = ("num_samples", "sigma", "seed")
_GAP = "1 - train error/held-out error"


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run the sweep, then reduce it as :func:`from_run` does."""
    return _reduced(sweep(Spec.from_dict(spec), _MEASURES))


def from_run(folder: str | Path, select: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Seed means of the gap and errors, (n, σ) or (facet, n, σ), and the crossings of gap = 1/2, at the last step.

    ``select`` are ``AXIS=VALUE``. Of the axes that are left with several values at most one is drawn, a facet for each
    value. ``ValueError`` if there are more, if the sweep in ``folder`` did not measure the gap and errors, or has fewer
    than two n, and for axes and values that it does not have.
    """
    return _reduced(store.load(folder), select)


def _reduced(results: xr.Dataset, select: Sequence[str] = ()) -> dict[str, np.ndarray]:
    lacking = [name for name in _MEASURES if name not in results]
    if lacking:
        raise ValueError(f"the phase diagram needs the measures {', '.join(lacking)}; sweep again with them.")
    here = results[list(_MEASURES)]
    chosen = dict(_chosen(here, text) for text in select)
    here = here.sel({axis: [value] for axis, value in chosen.items()})
    if "step" not in chosen:
        here = here.isel(step=[-1])
    others = [str(dim) for dim in here.dims if dim not in _SHOWN]
    several = [dim for dim in others if here.sizes[dim] > 1]
    if len(several) > 1 or any(here.sizes[dim] > MAX_FACETS for dim in several):
        values = "; ".join(f"{dim}: {', '.join(map(_label, here[dim].values))}" for dim in several)
        raise ValueError(
            f"the run has more values than a figure has room for ({values}): choose, as in --select "
            f"{several[0]}={_label(here[several[0]].values[0])}, until one axis of at most {MAX_FACETS} values is left."
        )
    fixed = [f"{dim.replace('_', ' ')} {_label(here[dim].values[0])}" for dim in others if here.sizes[dim] == 1]
    # Axes of one value that are no dimension.
    alone = sorted((str(name), value.item()) for name, value in here.coords.items() if not value.ndim)
    fixed += [f"{name.replace('_', ' ')} {_label(value)}" for name, value in alone]
    facet = several[0] if several else ""
    panels = [here.sel({facet: value}) for value in here[facet].values] if facet else [here]
    reduced = [_panel(panel.isel({dim: 0 for dim in others if dim in panel.dims})) for panel in panels]
    stacked = {name: np.stack([panel[name] for panel in reduced]) for name in reduced[0]}
    if not facet:
        stacked = {name: values[0] for name, values in stacked.items()}
    return {
        "num_samples": here.num_samples.values,
        "sigma": here.sigma.values,
        **stacked,
        "facet": np.array(facet),
        "facet_values": np.array([_label(value) for value in here[facet].values] if facet else []),
        # Axes of one value, and the values.
        "fixed": np.array(", ".join(fixed)),
        # Of which anything was computed.
        "seeds": np.array(int(here.gap.notnull().any([dim for dim in here.gap.dims if dim != "seed"]).sum())),
    }


def _chosen(results: xr.Dataset, text: str) -> tuple[str, Any]:
    """An axis and its value from ``AXIS=VALUE``."""
    axis, _, given = text.partition("=")
    axes = [str(dim) for dim in results.dims if dim not in _SHOWN]
    if axis not in axes:
        hint = nearest(axis, axes)
        raise ValueError(
            f"--select {text}: the run has no axis {axis!r} to choose from{hint}; it has {', '.join(axes)}."
        )
    for value in results[axis].values:
        if given == _label(value) or (_is_number(value) and _is_number(given) and float(given) == float(value)):
            return axis, value
    known = ", ".join(map(_label, results[axis].values))
    raise ValueError(f"--select {text}: {axis} has the values {known}.")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _label(value: Any) -> str:
    """A value of an axis as it is written on the command line."""
    if isinstance(value, str):
        return value or "none"
    return f"{value:g}" if isinstance(value, np.floating | float) else str(value)


def _panel(here: xr.Dataset) -> dict[str, np.ndarray]:
    found = transition(here)
    means = here.mean("seed").transpose("num_samples", "sigma")
    return {
        **{name: means[name].values for name in _MEASURES},
        "transition": found.estimate.values,
        "transition_low": found.low.values,
        "transition_high": found.high.values,
    }


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Gap over n × σ with the transition and its interval, and errors against n; or the former for each facet."""
    if str(arrays["facet"]):
        return _facets(arrays)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.1), width_ratios=(1.15, 1))
    mesh = _map(left, arrays, arrays)
    figure.colorbar(mesh, ax=left, label=_GAP)
    left.set_title(_what(arrays))
    n, sigma, seeds = arrays["num_samples"], arrays["sigma"], int(arrays["seeds"])
    shown = np.unique(np.linspace(0, len(sigma) - 1, 3).round().astype(int))
    for color, j in zip(("C0", "C1", "C2"), shown, strict=False):
        right.plot(n, arrays["held_out_error"][:, j], color=color, marker="o", label=f"σ = {sigma[j]:g}")
        right.plot(n, arrays["train_error"][:, j], color=color, marker="o", linestyle="--")
        right.axvline(arrays["transition"][j], color=color, linewidth=0.6, linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="training images n", ylabel="denoising error E‖f(y) - x‖²")
    _plain_ticks(right.xaxis, n)
    over = f", means over {seeds} seeds" if seeds > 1 else ""
    right.set_title(f"solid: held-out, dashed: training{over};\ndotted: gap = 1/2")
    right.legend(loc="lower right", bbox_to_anchor=(1.0, 0.02))
    _caption(figure, arrays)
    return figure


def _facets(arrays: Arrays) -> matplotlib.figure.Figure:
    names, count = arrays["facet_values"], len(arrays["facet_values"])
    columns = 2 if count in (2, 4) else 3
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns + 0.8, 2.5 * lines + 0.4), sharex=True, sharey=True, squeeze=False
    )
    meshes = []
    for k, axis in enumerate(axes.flat):
        if k >= count:
            axis.set_visible(False)
            continue
        of_one = {name: arrays[name][k] for name in (*_MEASURES, *_ENDS)}
        meshes.append(_map(axis, arrays, of_one))
        axis.set_title(f"{str(arrays['facet']).replace('_', ' ')} {names[k]}")
        axis.label_outer()
        if k + columns >= count:
            # No panel below.
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("noise level σ")
    figure.colorbar(meshes[0], ax=axes, label=_GAP)
    _caption(figure, arrays, what=_what(arrays))
    return figure


def _what(arrays: Arrays) -> str:
    seeds = int(arrays["seeds"])
    return (
        f"generalization gap, mean over {seeds} seeds;\nline: gap = 1/2, bars: 95 % interval over seeds"
        if seeds > 1
        else "generalization gap, one seed;\nline: gap = 1/2"
    )


def _caption(figure: matplotlib.figure.Figure, arrays: Arrays, what: str = "") -> None:
    """Above everything: what is drawn, and the axes that have one value."""
    # About as many letters as fit.
    lines = [what.replace("\n", " "), *textwrap.wrap(str(arrays["fixed"]), int(16 * figure.get_figwidth()))]
    figure.suptitle("\n".join(filter(None, lines)), fontsize="small")


def _map(axis: Any, arrays: Arrays, panel: Arrays) -> Any:
    """The gap over n × σ on ``axis``, with the transition and its interval."""
    n, sigma = arrays["num_samples"], arrays["sigma"]
    mesh = axis.pcolormesh(
        _edges(sigma), _edges(n), panel["gap"], cmap="viridis", vmin=0, vmax=1, edgecolors="none", rasterized=True
    )
    inside = np.isfinite(panel["transition"])
    # Ends of intervals that lie outside the grid are open: drawn to its edge.
    low, high = (np.clip(panel[f"transition_{end}"][inside], n[0], n[-1]) for end in ("low", "high"))
    where = panel["transition"][inside]
    spread = np.nan_to_num([where - low, high - where]).clip(0)
    axis.errorbar(sigma[inside], where, spread, color="white", marker="o", capsize=2)
    axis.set(xscale="log", yscale="log", xlabel="noise level σ", ylabel="training images n")
    _plain_ticks(axis.xaxis, sigma)
    _plain_ticks(axis.yaxis, n)
    # Words stand only where the numbers beside them say so.
    if panel["gap"][0, 0] > 0.5:
        axis.text(0.04, 0.04, "memorizes", transform=axis.transAxes, color="black", fontweight="bold")
    if panel["gap"][-1, -1] < 0.5:
        axis.text(0.96, 0.92, "generalizes", transform=axis.transAxes, color="white", fontweight="bold", ha="right")
    return mesh


def _edges(centers: np.ndarray) -> np.ndarray:
    """Edges of cells around points of a logarithmic axis."""
    logs = np.log(centers.astype(float))
    if len(logs) == 1:
        return np.exp([logs[0] - 0.5, logs[0] + 0.5])
    middles = (logs[1:] + logs[:-1]) / 2
    return np.exp([2 * logs[0] - middles[0], *middles, 2 * logs[-1] - middles[-1]])


def _plain_ticks(axis: Any, values: np.ndarray) -> None:
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)
