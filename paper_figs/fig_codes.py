"""A code of a memorized and of a generalized sample as bars, and histograms of their spikiness, after Fig. 4.

A memorized sample is a training row of a network that stored its few rows; a generalized one is a held-out row of a
network trained on many. Only the training set differs between the two networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from matplotlib import pyplot as plt

from dae_theory import encode, merge_parallel_columns, spikiness
from paper_figs.artifacts import Arrays
from paper_figs.networks import train
from sims.sweeps.spec import Spec

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "a memorized and a generalized code, and histograms of spikiness (Fig. 4)"

_COMMON = {
    "dataset": "digits",
    "center": True,
    "width": 64,
    "sigma": 0.5,
    "penalty": 0.1,
    "schedule": "cosine",
    "steps": 20000,
    "batch_size": 128,
    "seeds": 1,
}
SPEC: dict[str, Any] = {
    "noisy": 400,
    "cases": {
        "memorized": _COMMON | {"separable": 8, "num_samples": 8},
        "generalized": _COMMON | {"num_samples": 1024},
    },
}
"""The number of noisy codes in a histogram, and a spec for each network."""

QUICK = SPEC | {"noisy": 50, "cases": {name: case | {"steps": 200} for name, case in SPEC["cases"].items()}}


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Codes of noisy rows by each network, parallel units merged; training rows if memorized, held-out if
    generalized."""
    results: dict[str, np.ndarray] = {}
    for number, (name, case) in enumerate(spec["cases"].items()):
        experiment = Spec.from_dict(case)
        trained = train(experiment)
        rows = trained.train if name == "memorized" else trained.held_out
        picked = rows[np.arange(spec["noisy"]) % len(rows)]
        key = jax.random.fold_in(jax.random.key(experiment.seed), number)
        noisy = picked + experiment.sigma[0] * np.asarray(jax.random.normal(key, picked.shape, picked.dtype))
        dae = merge_parallel_columns(trained.dae, tolerance=0.01)
        codes = jax.vmap(lambda y, dae=dae: encode(dae, y))(noisy)
        results[f"{name}_code"] = np.asarray(codes[0])
        results[f"{name}_caption"], results[f"{name}_n"] = np.array(trained.caption), np.array(len(trained.train))
        results[f"{name}_image"] = picked[0].reshape(trained.image_shape)
        for measure in ("std", "l4_over_l2"):
            results[f"{name}_{measure}"] = np.asarray(jax.vmap(spikiness.MEASURES[measure])(codes))
    return results


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Refuse: the figure trains its own networks."""
    raise ValueError(f"the figure `codes` trains its own networks, not those of {folder}; leave --run out.")


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Top: one code each, with its clean image. Bottom: histograms of std and of l4/l2 over noisy rows."""
    figure, axes = plt.subplots(2, 2, figsize=(6.6, 4.0))
    names = ("memorized", "generalized")
    rows = {"memorized": "training rows", "generalized": "held-out rows"}
    for axis, name, color in zip(axes[0], names, ("C1", "C0"), strict=True):
        code = np.sort(arrays[f"{name}_code"])[::-1]
        axis.bar(np.arange(code.size), code, width=1.0, color=color)
        axis.set(
            title=f"code of one of the {rows[name]}\n{arrays[f'{name}_caption']}",
            xlabel="unit, in order of size",
            ylabel="activation",
        )
        inset = axis.inset_axes((0.72, 0.5, 0.26, 0.5))
        inset.imshow(arrays[f"{name}_image"])
        inset.set(xticks=[], yticks=[])
    for axis, measure, label in zip(axes[1], ("std", "l4_over_l2"), ("std of code", "l4/l2 of code"), strict=True):
        values = [arrays[f"{name}_{measure}"] for name in names]
        edges = np.histogram_bin_edges(np.concatenate(values), 30)
        for value, name, color in zip(values, names, ("C1", "C0"), strict=True):
            axis.hist(value, edges, alpha=0.7, color=color, label=f"{rows[name]}, n = {int(arrays[f'{name}_n']):,}")
        axis.set(xlabel=label, ylabel="noisy samples")
    # Room above the bars.
    axes[1, 1].set_ylim(0, 1.4 * axes[1, 1].get_ylim()[1])
    axes[1, 1].legend(loc="upper right")
    return figure
