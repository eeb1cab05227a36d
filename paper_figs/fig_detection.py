"""Memorization detectors: scores of memorized images and others, ROC curves with bands, and what each detector costs.

Drawn from a run of ``python -m scaling detect`` (``--run DIR``), against images that were never trained on where there
are any; or of two cheap detectors on the network of digits that comes with the package.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays
from scaling import zoo
from scaling.detection.detectors import DETECTORS, DetectionSetting
from scaling.detection.evaluation import auroc_interval, proportion_interval, threshold_at
from scaling.study.detection import rated, read_scores, score_items, sides
from scaling.study.items import from_record
from sims import store

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "memorization detectors, ROC curves and cost; --run DIR draws a `detect`"

SPEC: dict[str, Any] = {
    "model": "digits",
    "dataset": "digits",
    "num": 100,
    "detectors": ["std", "l4_over_l2", "error", "intrinsic_dimension"],
    "setting": dataclasses.asdict(DetectionSetting()),
}
"""A network of the zoo, its images, how many of each group, and the detectors."""

QUICK = SPEC | {"num": 12, "detectors": ["std", "error"], "setting": SPEC["setting"] | {"draws": 1, "sigmas": (0.5,)}}

PREFERRED = ("held_out", "others", "train")
"""Groups of others, of which the first that there is is drawn."""

SHOWN = 6
"""ROC curves in one picture, at most: those of the largest areas, and the std of codes."""


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Score the zoo's network."""
    pipeline = zoo.load(spec["model"])
    items, _ = from_record(spec["dataset"], pipeline, zoo.membership(spec["model"]), num=spec["num"])
    setting = _setting(spec["setting"])
    with tempfile.TemporaryDirectory() as folder:
        results = score_items(pipeline, items, folder, detectors=spec["detectors"], setting=setting)
    return _reduced(results, setting)


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """The scores of a finished ``detect``; ``ValueError`` if it is something else, or nothing in it can be rated."""
    return _reduced(read_scores(folder), _setting(store.read_spec(folder)["spec"]["setting"]))


def _setting(fields: Mapping[str, Any]) -> DetectionSetting:
    """The setting of JSON values, which have lists in place of tuples."""
    plain: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}
    return DetectionSetting(**plain)


def _reduced(results: xr.Dataset, setting: DetectionSetting) -> dict[str, np.ndarray]:
    """Scores of the rated items, areas with intervals, passes, and ROC curves at every rate that the others show."""
    detectors = [detector for name, detector in DETECTORS.items() if name in results]
    positives, others = sides(results, [detector.name for detector in detectors])
    against = next((name for name in PREFERRED if name in others), None)
    found = rated(results, detectors, positives, others[against]) if against else []
    if not found:
        raise ValueError(
            "no detector can be rated: that takes images that are known to be memorized and others that are not, four "
            "of each; see `python -m scaling detect --help`."
        )
    areas = [auroc_interval(each.positives, each.negatives) for each in found]
    rates = np.arange(len(found[0].negatives)) / len(found[0].negatives)
    curves = [
        [
            proportion_interval(int(np.sum(each.positives > threshold_at(each.negatives, rate))), len(each.positives))
            for rate in rates
        ]
        for each in found
    ]
    return {
        "detectors": np.asarray([each.detector.name for each in found]),
        "options": np.asarray([each.option for each in found]),
        "against": np.asarray(against),
        "passes": np.asarray([each.detector.passes(setting) for each in found]),
        "area": np.asarray(areas),
        "rate": rates,
        "found": np.asarray(curves),
        "positives": np.stack([each.positives for each in found]),
        "negatives": np.stack([each.negatives for each in found]),
    }


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Histograms of two scores; ROC curves on a logarithmic axis; areas by rising cost."""
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.4))
    names, area = [str(name).replace("_", " ") for name in arrays["detectors"]], arrays["area"][:, 0]
    order = np.argsort(-area, kind="stable")
    for axis, k in zip(axes[0], dict.fromkeys([0, int(order[0] or order[-1])]), strict=False):
        _histograms(axis, arrays, k, names[k])
    chosen = list(dict.fromkeys([0, *order.tolist()]))[:SHOWN]
    floor = 0.5 / len(arrays["rate"])
    for number, k in enumerate(chosen):
        share, low, high = arrays["found"][k].T
        places = np.append(np.maximum(arrays["rate"], floor), 1.0)
        axes[1, 0].step(places, np.append(share, 1.0), where="post", label=names[k], color=f"C{number}")
        axes[1, 0].fill_between(
            places, np.append(low, 1.0), np.append(high, 1.0), step="post", color=f"C{number}", alpha=0.12, linewidth=0
        )
    axes[1, 0].set(
        xscale="log", xlabel=f"false positive rate (0 drawn at {floor:.2g})", ylabel="memorized found", ylim=(0, 1.02)
    )
    axes[1, 0].legend(loc="lower right", fontsize="x-small")
    # From the cheapest at the top; points of equal cost would lie on one another on an axis of passes.
    ranks = np.lexsort((area, -arrays["passes"]))
    value, low, high = arrays["area"][ranks].T
    heights = np.arange(len(ranks))
    axes[1, 1].errorbar(value, heights, xerr=np.stack([value - low, high - value]), fmt="o", capsize=2)
    axes[1, 1].set_yticks(heights, [f"{names[k]}, {arrays['passes'][k]}" for k in ranks], fontsize="x-small")
    axes[1, 1].axvline(0.5, color="0.6", linewidth=0.6)
    axes[1, 1].set(xlabel="AUROC", xlim=(min(0.4, low.min()), 1.02), title="detector, network passes per item")
    group = {"held_out": "never trained on", "train": "trained on once"}.get(str(arrays["against"]), "given as others")
    counts = arrays["positives"].shape[1], arrays["negatives"].shape[1]
    figure.suptitle(
        f"{counts[0]} memorized items against {counts[1]} {group}; 95 % intervals over items", fontsize="small"
    )
    return figure


def _histograms(axis: Any, arrays: Arrays, k: int, name: str) -> None:
    groups = {"others": arrays["negatives"][k], "memorized": arrays["positives"][k]}
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), 20)
    for label, values in groups.items():
        axis.hist(values, edges, density=True, alpha=0.6, label=label)
    option = str(arrays["options"][k])
    axis.set(xlabel=f"{name}{f' at {option}' if option else ''}", ylabel="density")
    axis.legend()
