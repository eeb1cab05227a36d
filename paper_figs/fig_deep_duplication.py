"""Deep networks some of whose images repeat, along their training: copies, detection, Jacobians, local fits.

Drawn from a run of ``python -m scaling duplication`` (``--run DIR``), with intervals over its seeds, at its last number
of copies; or of one seed and one time, from the network of digits that comes with the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays, over_seeds
from scaling import zoo
from scaling.measures.local_fits import FITTED
from scaling.study.examination import Setting, examine
from scaling.training.corpus import GROUPS, load
from sims import store

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "deep networks trained on repeated images; --run DIR draws a `duplication`"

SPEC: dict[str, Any] = {
    "model": "digits",
    "data": {"name": "digits", "duplicates": "60x40", "singles": 1200},
    "steps": 4000,
    "setting": Setting()._asdict(),
}
"""A network of the zoo, its images and training time, and how much is looked at."""

QUICK = SPEC | {
    "setting": Setting(samples=4, sampler_steps=2, images=8, jacobians=2, draws=2, fits=1, units=(1,))._asdict()
}

SHOWN = {"duplicated": "repeated images", "train": "single images", "held_out": "held-out images"}


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Look at the zoo's network."""
    setting = Setting(**spec["setting"])
    found = examine(jax.random.key(0), zoo.load(spec["model"]), load(**spec["data"]), setting)
    return _reduced(np.asarray([spec["steps"]]), setting, {name: value[None, None] for name, value in found.items()})


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Means and standard errors over seeds of a finished ``duplication``; ``ValueError`` if it is something else."""
    results = store.load(folder)
    if "duplicates" not in results.dims or "copied" not in results or not bool(results.done.all()):
        raise ValueError(f"{folder} is no finished run of `python -m scaling duplication`.")
    setting = Setting(**store.read_spec(folder)["spec"]["setting"])
    last = results.drop_vars("done").isel(duplicates=-1).transpose("steps", "seed", ...)
    found = {str(name): values.values for name, values in last.data_vars.items()}
    return _reduced(results.steps.values, setting, found)


def _reduced(steps: np.ndarray, setting: Setting, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of arrays (steps, seed, ...) means over seeds, and standard errors where there are several."""
    repeated = GROUPS.index("duplicated")
    curves = {
        "copies": found["copy_share"],
        "auroc_std": found["auroc_std"][:, :, repeated, 0],
        "auroc_l4_over_l2": found["auroc_l4_over_l2"][:, :, repeated, 0],
        "auroc_error": found["auroc_error"][:, :, repeated, 0],
        "kept": found["jacobian_kept"][..., 0],
        "fit_error": found["fit_error"][:, :, :, FITTED.index("denoiser"), 0],
    }
    arrays = {"steps": steps, "etas": np.asarray(setting.etas), "units": np.asarray(setting.units[0])}
    arrays["sigma"] = np.asarray(setting.sigmas[0])
    return arrays | over_seeds(curves)


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Copies of either sampler; AUROC of three scores; singular values above 1/2; error of few units; over training."""
    figure, axes = plt.subplots(2, 2, figsize=(6.8, 4.6), sharex=True)
    samplers = [f"η = {eta:g}{', DDIM' if eta == 0 else ''}" for eta in arrays["etas"]]
    scores = {"auroc_std": "std of codes", "auroc_l4_over_l2": "l4/l2 of codes", "auroc_error": "denoising error"}
    sigma, units = float(arrays["sigma"]), int(arrays["units"])
    _curves(axes[0, 0], arrays, [("copies", k, label) for k, label in enumerate(samplers)])
    axes[0, 0].set(title="copies among samples", ylim=(0, None))
    _curves(axes[0, 1], arrays, [(name, None, label) for name, label in scores.items()])
    axes[0, 1].axhline(0.5, color="0.6", linewidth=0.6)
    axes[0, 1].set(title="AUROC, repeated against held-out images", ylim=(0, 1.03))
    groups = [(GROUPS.index(name), label) for name, label in SHOWN.items()]
    _curves(axes[1, 0], arrays, [("kept", k, label) for k, label in groups])
    axes[1, 0].set(title=f"singular values of the Jacobian above 1/2, σ = {sigma:g}", ylim=(0, None))
    _curves(axes[1, 1], arrays, [("fit_error", k, label) for k, label in groups])
    unit = "one ReLU unit" if units == 1 else f"{units} ReLU units"
    axes[1, 1].set(title=f"relative error of {unit} fitted to the denoiser", yscale="log")
    for axis in axes[1]:
        axis.set_xlabel("training steps")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xticks(arrays["steps"], [f"{n:,}" for n in arrays["steps"]])
        axis.set_xticks([], minor=True)
        axis.legend()
    return figure


def _curves(axis: Any, arrays: Arrays, curves: list[tuple[str, int | None, str]]) -> None:
    for name, column, label in curves:
        at = ... if column is None else (..., column)
        spread = arrays[f"{name}_se"][at] if f"{name}_se" in arrays else None
        axis.errorbar(arrays["steps"], arrays[name][at], spread, marker="o", capsize=2, label=label)
