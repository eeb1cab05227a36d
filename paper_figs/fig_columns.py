"""What a network's encoder stores: columns of W₁ as images beside their nearest training images, after the paper's Fig.
3.

Left to right one thing changes at a time: a separable set (where Corollary 3.2 predicts one column a sample), as many
raw images (where it does not apply: all cosines are positive), and many raw images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib import pyplot as plt

from dae_theory import merge_parallel_columns
from paper_figs.artifacts import Arrays
from paper_figs.networks import train
from sims.sweeps.spec import Spec

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "columns of W1 beside their nearest training images, memorized against generalized (Fig. 3)"

_COMMON = {
    "dataset": "digits",
    "width": 32,
    "sigma": 0.5,
    "penalty": 0.1,
    "schedule": "cosine",
    "steps": 20000,
    "batch_size": 128,
    "seeds": 1,
}
SPEC: dict[str, Any] = {
    "columns": 8,
    "cases": {
        "separable images, centered": _COMMON | {"center": True, "separable": 8, "num_samples": 8},
        "as many raw images": _COMMON | {"num_samples": 8},
        "many raw images": _COMMON | {"num_samples": 1024},
    },
}
"""The number of columns to show, and a spec for each case."""

QUICK = SPEC | {"cases": {name: case | {"steps": 200} for name, case in SPEC["cases"].items()}}
"""The same figure in seconds, to try it out."""


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Train each case and return its largest columns (parallel ones merged), the nearest training rows, and cosines."""
    results: dict[str, list[np.ndarray]] = {
        "columns": [],
        "nearest": [],
        "cosines": [],
        "norms": [],
        "captions": [],
        "gaps": [],
    }
    for case in spec["cases"].values():
        trained = train(Spec.from_dict(case))
        merged = merge_parallel_columns(trained.dae, tolerance=0.01)
        norms = np.linalg.norm(merged.w1, axis=0)
        largest = np.argsort(-norms, kind="stable")[: spec["columns"]]
        columns = np.asarray(merged.w1).T[largest]
        cosines = _unit(columns) @ _unit(trained.train).T
        nearest = np.argmax(cosines, axis=1)
        for name, value in (
            ("columns", columns.reshape(-1, *trained.image_shape)),
            ("nearest", trained.train[nearest].reshape(-1, *trained.image_shape)),
            ("cosines", cosines[np.arange(len(nearest)), nearest]),
            ("norms", norms[largest]),
            ("captions", np.array(trained.caption)),
            ("gaps", np.array(trained.gap)),
        ):
            results[name].append(value)
    return {"titles": np.array(list(spec["cases"])), **{name: np.stack(value) for name, value in results.items()}}


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Refuse: the figure trains its own networks."""
    raise ValueError(f"the figure `columns` trains its own networks, not those of {folder}; leave --run out.")


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Two rows of images for each case: columns above, nearest training images below, with cosines."""
    cases, columns = arrays["cosines"].shape
    figure = plt.figure(figsize=(0.75 * columns + 0.5, 2.1 * cases))
    panels = figure.subfigures(cases, 1, squeeze=False)[:, 0]
    for case, panel in enumerate(panels):
        panel.suptitle(f"{arrays['titles'][case]}: {arrays['captions'][case]}", fontsize=8)
        axes = panel.subplots(2, columns, squeeze=False)
        for j in range(columns):
            axes[0, j].imshow(arrays["columns"][case, j])
            axes[0, j].set_title(f"{'cos ' if j == 0 else ''}{arrays['cosines'][case, j]:.2f}", pad=2, fontsize=7)
            axes[1, j].imshow(arrays["nearest"][case, j])
            for axis in axes[:, j]:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        axes[0, 0].set_ylabel("column\nof W₁")
        axes[1, 0].set_ylabel("nearest\nimage")
    return figure


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)
