"""The memorization-to-generalization transition over n and σ: the generalization gap, and where it is one half.

Drawn from the results of a sweep (``--run DIR``), or of the sweep that :data:`SPEC` describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays
from sims import store
from sims.presets import DEMO
from sims.study.transitions import transition
from sims.sweeps.engine import sweep
from sims.sweeps.spec import Spec

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "the transition over n and sigma; --run DIR draws a finished sweep"

SPEC: dict[str, Any] = dict(DEMO)
"""The sweep that is run if no finished one is given."""

QUICK = SPEC | {"num_samples": (2, 16, 128), "sigma": (0.5, 1.5), "steps": 100, "seeds": 2}

_MEASURES = ("gap", "train_error", "held_out_error")


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run the sweep, then reduce it as :func:`from_run` does."""
    return _reduced(sweep(Spec.from_dict(spec), _MEASURES))


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Seed means of the gap and errors (n, σ) and the crossings of gap = 1/2, at the last step and first other values.

    ``ValueError`` if the sweep in ``folder`` did not measure them, or has fewer than two n.
    """
    return _reduced(store.load(folder))


def _reduced(results: xr.Dataset) -> dict[str, np.ndarray]:
    lacking = [name for name in _MEASURES if name not in results]
    if lacking:
        raise ValueError(f"the phase diagram needs the measures {', '.join(lacking)}; sweep again with them.")
    here = results[list(_MEASURES)].isel(step=-1)
    others = [dim for dim in here.dims if dim not in ("num_samples", "sigma", "seed")]
    fixed = [f"{dim} = {here[dim].values[0]}" for dim in others if here.sizes[dim] > 1]
    here = here.isel(dict.fromkeys(others, 0))
    found = transition(here)
    means = here.mean("seed").transpose("num_samples", "sigma")
    return {
        "num_samples": here.num_samples.values,
        "sigma": here.sigma.values,
        **{name: means[name].values for name in _MEASURES},
        "transition": found.estimate.values,
        "transition_low": found.low.values,
        "transition_high": found.high.values,
        # Axes of several values, of which the first is drawn.
        "fixed": np.array(", ".join(fixed)),
        # Of which anything was computed.
        "seeds": np.array(int(here.gap.notnull().any(["num_samples", "sigma"]).sum())),
    }


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Left: gap over n × σ with the transition and its interval. Right: train and held-out error against n."""
    n, sigma = arrays["num_samples"], arrays["sigma"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.9), width_ratios=(1.15, 1))
    mesh = left.pcolormesh(
        _edges(sigma), _edges(n), arrays["gap"], cmap="viridis", vmin=0, vmax=1, edgecolors="none", rasterized=True
    )
    figure.colorbar(mesh, ax=left, label="1 - train error/held-out error")
    inside = np.isfinite(arrays["transition"])
    # Ends of intervals that lie outside the grid are open: drawn to its edge.
    low, high = (np.clip(arrays[f"transition_{end}"][inside], n[0], n[-1]) for end in ("low", "high"))
    where = arrays["transition"][inside]
    spread = np.nan_to_num([where - low, high - where]).clip(0)
    left.errorbar(sigma[inside], where, spread, color="white", marker="o", capsize=2, label=r"gap = 1/2, 95 % interval")
    left.set(xscale="log", yscale="log", xlabel="noise level σ", ylabel="training images n")
    _plain_ticks(left.xaxis, sigma)
    _plain_ticks(left.yaxis, n)
    # Words stand only where the numbers beside them say so.
    if arrays["gap"][0, 0] > 0.5:
        left.text(0.04, 0.04, "memorizes", transform=left.transAxes, color="black", fontweight="bold")
    if arrays["gap"][-1, -1] < 0.5:
        left.text(0.96, 0.92, "generalizes", transform=left.transAxes, color="white", fontweight="bold", ha="right")
    left.set_title("generalization gap; line: gap = 1/2 with 95 % interval")
    if str(arrays["fixed"]):
        figure.suptitle(f"at {arrays['fixed']}, of several values", fontsize="small")
    shown = np.unique(np.linspace(0, len(sigma) - 1, 3).round().astype(int))
    for color, j in zip(("C0", "C1", "C2"), shown, strict=False):
        right.plot(n, arrays["held_out_error"][:, j], color=color, marker="o", label=f"σ = {sigma[j]:g}")
        right.plot(n, arrays["train_error"][:, j], color=color, marker="o", linestyle="--")
        right.axvline(arrays["transition"][j], color=color, linewidth=0.6, linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="training images n", ylabel="denoising error E‖f(y) - x‖²")
    _plain_ticks(right.xaxis, n)
    right.set_title("solid: held-out, dashed: training; dotted: gap = 1/2")
    right.legend()
    return figure


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
