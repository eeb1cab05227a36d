"""Deep networks against the number of training images, beside two-layer autoencoders: copies, gap, codes, Jacobian.

Drawn from a run of ``python -m scaling transition`` (``--run DIR``), with intervals over its seeds; or of one seed,
from the networks that come with the package, which have no second half to agree with.
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
from scaling.study.examination import examine, gap
from scaling.study.settings import STANDARD, ExaminationSetting
from scaling.training.corpus import load
from sims import Spec, store, sweep
from sims.sweeps.measures import MEASURES

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = (
    "deep networks against the number of training images, beside the two-layer one; --run DIR draws a `transition`"
)

SPEC: dict[str, Any] = {
    "num_samples": (10, 30, 100, 300, 750),
    "setting": dataclasses.asdict(STANDARD),
    "two_layer": {"width": 64, "penalty": 1e-3, "batch_size": 128, "schedule": "cosine", "steps": 2000, "seeds": 3},
}
"""Networks ``digits-N`` of the zoo, the extent of the examination, and the sweep beside them."""

QUICK = SPEC | {
    "num_samples": (10, 300),
    "setting": dataclasses.asdict(
        ExaminationSetting(samples=4, sampler_steps=2, images=8, jacobians=2, draws=2, fits=1, units=(2,))
    ),
    "two_layer": SPEC["two_layer"] | {"steps": 50, "seeds": 2},
}

SHALLOW = ("gap", "std_train", "std_held_out")
HELD_OUT = 297


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Examine the zoo's series, and sweep the two-layer autoencoder."""
    sizes, setting = tuple(spec["num_samples"]), ExaminationSetting(**spec["setting"])
    examined = []
    for n in sizes:
        images = load("digits", num_samples=n, held_out=HELD_OUT)
        results = examine(jax.random.key(0), zoo.load(f"digits-{n}"), images, setting)
        examined.append(results.assign(gap=gap(results)).expand_dims(num_samples=[n], seed=[0]))
    shallow = sweep(
        Spec(num_samples=sizes, sigma=setting.sigmas, held_out=HELD_OUT, **spec["two_layer"]),
        [MEASURES[name] for name in SHALLOW],
    )
    # One data set; the types of xarray allow for a tree of them.
    joined: Any = xr.concat(examined, "num_samples")
    return _reduced(joined, shallow)


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """Means and standard errors over seeds of a finished ``transition``; ``ValueError`` if it is something else."""
    results = store.load(folder)
    if "agreement" not in results or not bool(results.done.all()):
        raise ValueError(f"{folder} is no finished run of `python -m scaling transition`.")
    return _reduced(results.drop_dims("sample").mean("half"), store.load(Path(folder) / "two_layer"))


def _reduced(results: xr.Dataset, shallow: xr.Dataset) -> dict[str, np.ndarray]:
    """Means over seeds, and standard errors where there are several."""
    sigma, tap, eta = results.sigma.values[results.sizes["sigma"] // 2], results.tap.values[0], results.eta.values[0]
    at = results.sel(sigma=sigma, tap=tap, eta=eta)
    train, held_out = (at.sel(group=group, drop=True) for group in ("train", "held_out"))
    two = {name: shallow[name].sel(sigma=sigma) for name in SHALLOW}
    two = {name: v.isel({d: 0 for d in v.dims if d not in ("num_samples", "seed")}) for name, v in two.items()}
    curves = {
        "copies": at.copy_share,
        "gap": at.gap,
        "gap_two_layer": two["gap"],
        "spikiness": train["std"] / held_out["std"],
        "spikiness_two_layer": two["std_train"] / two["std_held_out"],
        "rank_train": train.jacobian_rank,
        "rank_held_out": held_out.jacobian_rank,
        "to_empirical": held_out.distance_to_empirical,
        "to_population": held_out.distance_to_population,
    }
    if "agreement" in results:
        curves |= {"agreement": results.agreement, "chance": results.agreement_unpaired}
    arrays = {"num_samples": results.num_samples.values, "sigma": np.asarray(sigma)}
    return arrays | over_seeds(
        {name: values.transpose("num_samples", "seed").values for name, values in curves.items()}
    )


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Copies, agreement and gap; spikiness; rank of the Jacobian; distances from the optima; all against n."""
    sigma = float(arrays["sigma"])
    figure, axes = plt.subplots(2, 2, figsize=(6.8, 5.0), sharex=True)
    panels = (
        (
            f"copies, agreement, and gap at σ = {sigma:g}",
            "share, cosine, gap",
            {
                "copies": "copies among samples",
                "agreement": "cosine of two halves' samples",
                "chance": "the same by chance",
                "gap": "gap, deep",
                "gap_two_layer": "gap, two layers",
            },
        ),
        (
            "codes of training and held-out images",
            "ratio of their std",
            {"spikiness": "deep, first up block", "spikiness_two_layer": "two layers"},
        ),
        (
            f"Jacobian at σ = {sigma:g}",
            "effective rank",
            {"rank_train": "at training images", "rank_held_out": "at held-out images"},
        ),
        (
            f"distance from the optima at σ = {sigma:g}",
            "E‖D - D'‖² at held-out images",
            {"to_empirical": "D' = training set's optimum", "to_population": "D' = population's (Gaussian)"},
        ),
    )
    axes[0, 1].axhline(1.0, color="0.6", linewidth=0.6)
    for axis, (title, label_y, curves) in zip(axes.flat, panels, strict=True):
        for color, (name, label) in enumerate(curves.items()):
            if name in arrays:
                style = {"linestyle": "--"} if name in ("chance", "gap_two_layer", "spikiness_two_layer") else {}
                axis.errorbar(
                    arrays["num_samples"],
                    arrays[name],
                    arrays.get(f"{name}_se"),
                    marker="o",
                    capsize=2,
                    color=f"C{color}",
                    label=label,
                    **style,
                )
        axis.set(xscale="log", title=title, ylabel=label_y)
        axis.set_xticks(arrays["num_samples"], [str(n) for n in arrays["num_samples"]])
        axis.set_xticks([], minor=True)
        legend_above(axis)
    axes[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    for axis in axes[1]:
        axis.set_xlabel("training images n")
    figure.suptitle(bars(arrays), fontsize="small")
    return figure
