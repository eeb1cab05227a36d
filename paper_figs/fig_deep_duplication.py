"""Deep networks trained on repeated images, against training time: copies, detection, Jacobians, local fits.

Drawn from a run of ``python -m scaling duplication`` (``--run DIR``), with intervals over its seeds, at its last number
of copies; or of one seed and one time, from the network of digits that comes with the package.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays, bars, legend_above, over_seeds
from scaling import zoo
from scaling.study.examination import examine
from scaling.study.settings import STANDARD, ExaminationSetting
from scaling.training.corpus import load
from sims import store

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "deep networks trained on repeated images; --run DIR draws a `duplication`"

SPEC: dict[str, Any] = {
    "model": "digits",
    "data": {"name": "digits", "duplicates": "60x40", "singles": 1200},
    "steps": 4000,
    "setting": dataclasses.asdict(STANDARD),
}
"""A network of the zoo, its images, its training time, and the extent of the examination."""

QUICK = SPEC | {
    "setting": dataclasses.asdict(
        ExaminationSetting(samples=4, sampler_steps=2, images=8, jacobians=2, draws=2, fits=1, units=(1,))
    )
}

SHOWN = {"duplicated": "repeated images", "train": "single images", "held_out": "held-out images"}


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Examine the zoo's network."""
    setting = ExaminationSetting(**spec["setting"])
    results = examine(jax.random.key(0), zoo.load(spec["model"]), load(**spec["data"]), setting)
    return _reduced(results.expand_dims(steps=[spec["steps"]], seed=[0]))


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Means and standard errors over seeds of a finished ``duplication``; ``ValueError`` if it is something else."""
    results = store.load(folder)
    if "duplicates" not in results.dims or "copied" not in results or not bool(results.done.all()):
        raise ValueError(f"{folder} is no finished run of `python -m scaling duplication`.")
    return _reduced(results.isel(duplicates=-1))


def _reduced(results: xr.Dataset) -> dict[str, np.ndarray]:
    """Means over seeds, and standard errors where there are several."""
    tap, sigma, units = (results[dim].values[0] for dim in ("tap", "sigma", "units"))
    at = results.sel(tap=tap, sigma=sigma, units=units)
    repeated, of_each = at.sel(group="duplicated"), at.sel(group=list(SHOWN))
    curves = {
        "copies": results.copy_share,
        "auroc_std": repeated.auroc_std,
        "auroc_l4_over_l2": repeated.auroc_l4_over_l2,
        "auroc_error": repeated.auroc_error,
        "kept": of_each.jacobian_kept,
        "fit_error": of_each.fit_error.sel(fitted="denoiser"),
    }
    arrays = {"steps": results.steps.values, "etas": results.eta.values}
    arrays |= {"units": np.asarray(units), "sigma": np.asarray(sigma)}
    return arrays | over_seeds({name: values.transpose("steps", "seed", ...).values for name, values in curves.items()})


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Copies of either sampler; AUROC of three scores; singular values above 1/2; error of few units; over training."""
    figure, axes = plt.subplots(2, 2, figsize=(6.8, 4.6), sharex=True)
    samplers = [f"η = {eta:g}{', DDIM' if eta == 0 else ''}" for eta in arrays["etas"]]
    scores = {"auroc_std": "std of codes", "auroc_l4_over_l2": "l4/l2 of codes", "auroc_error": "denoising error"}
    sigma, units = float(arrays["sigma"]), int(arrays["units"])
    _curves(axes[0, 0], arrays, [("copies", k, label) for k, label in enumerate(samplers)])
    axes[0, 0].set(title="copies among samples", ylabel="share of samples", ylim=(0, None))
    _curves(axes[0, 1], arrays, [(name, None, label) for name, label in scores.items()])
    axes[0, 1].axhline(0.5, color="0.6", linewidth=0.6)
    axes[0, 1].set(title="repeated against held-out images", ylabel="AUROC", ylim=(0, 1.03))
    groups = list(enumerate(SHOWN.values()))
    _curves(axes[1, 0], arrays, [("kept", k, label) for k, label in groups])
    axes[1, 0].set(title=f"Jacobian at σ = {sigma:g}", ylabel="singular values above 1/2", ylim=(0, None))
    _curves(axes[1, 1], arrays, [("fit_error", k, label) for k, label in groups])
    unit = "one ReLU unit" if units == 1 else f"{units} ReLU units"
    axes[1, 1].set(title=f"{unit} fitted to the denoiser", ylabel="relative squared error", yscale="log")
    for axis in axes[1]:
        axis.set_xlabel("training steps")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xticks(arrays["steps"], [f"{n:,}" for n in arrays["steps"]])
        axis.set_xticks([], minor=True)
        legend_above(axis)
    axes[0, 1].set_yticks([0, 0.25, 0.5, 0.75, 1])
    figure.suptitle(bars(arrays), fontsize="small")
    return figure


def _curves(axis: Any, arrays: Arrays, curves: list[tuple[str, int | None, str]]) -> None:
    for name, column, label in curves:
        at = ... if column is None else (..., column)
        spread = arrays[f"{name}_se"][at] if f"{name}_se" in arrays else None
        axis.errorbar(arrays["steps"], arrays[name][at], spread, marker="o", capsize=2, label=label)
