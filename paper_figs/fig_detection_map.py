"""Where codes tell memorized images: maps of the area under the ROC curve over layers, timesteps and pooling.

Drawn from a run of ``python -m scaling ablate`` (``--run DIR``), against images that were never trained on where there
are any; or of some layers of the network of digits that comes with the package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays
from scaling import zoo
from scaling.study.items import from_record
from scaling.study.maps import rate, score_maps
from sims import store

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run"]

SUMMARY = "AUROC of codes by layer, timestep and pooling; --run DIR draws an `ablate`"

SPEC: dict[str, Any] = {
    "model": "digits",
    "dataset": "digits",
    "num": 100,
    "taps": [],
    "timesteps": [10, 50, 200],
    "pools": ["max", "mean"],
}
"""A network of the zoo, its images, how many of each group, and the places; no taps are all."""

QUICK = SPEC | {"num": 6, "taps": ["mid_block", "up_blocks.0.resnets.0"], "timesteps": [50]}

PREFERRED = ("held_out", "others", "train")
"""Groups of others, of which the first that there is is drawn."""

MEASURES = ("std", "l4_over_l2")
"""Measures of spikiness that are drawn."""


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Score the zoo's network."""
    pipeline = zoo.load(spec["model"])
    items, _ = from_record(spec["dataset"], pipeline, zoo.membership(spec["model"]), num=spec["num"])
    places = {name: spec[name] for name in ("taps", "timesteps", "pools")}
    with tempfile.TemporaryDirectory() as folder:
        return _reduced(score_maps(pipeline, items, folder, **places))


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """The maps of a finished ``ablate``; ``ValueError`` if it is something else, or nothing in it can be rated."""
    spec, results = store.read_spec(folder)["spec"], store.load(folder)
    if spec.get("command") != "ablate" or not bool(results.done.all()):
        raise ValueError(f"{folder} is no finished run of `python -m scaling ablate`.")
    return _reduced(results)


def _reduced(results: xr.Dataset) -> dict[str, np.ndarray]:
    """Areas with intervals over measure, timestep, pooling and layer, against one group of others."""
    places = rate(results)
    against = next((name for name in PREFERRED if any(place.negatives == name for place in places)), None)
    if against is None:
        raise ValueError(
            "no place can be rated: that takes two images that are known to be memorized and two that are not; see "
            "`python -m scaling ablate --help`."
        )
    axes = [results[dim].values.tolist() for dim in ("timestep", "pool", "tap")]
    area = np.full((len(MEASURES), *map(len, axes), 3), np.nan)
    for place in places:
        if place.negatives == against and place.measure in MEASURES:
            where = zip(axes, (place.timestep, place.pool, place.tap), strict=True)
            area[(MEASURES.index(place.measure), *(axis.index(value) for axis, value in where))] = place.area
    first = next(place for place in places if place.negatives == against)
    return {
        "area": area,
        "measures": np.asarray(MEASURES),
        "timesteps": np.asarray(axes[0]),
        "pools": np.asarray(axes[1]),
        "taps": np.asarray(axes[2]),
        "against": np.asarray(against),
        "counts": np.asarray([first.num_positives, first.num_negatives]),
    }


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """One map for each measure, layers from input to output; a dot where the whole interval lies above one half.

    Where the area is near 0, memorized images have the less spiky codes.
    """
    measures, taps = arrays["measures"], [str(tap) for tap in arrays["taps"]]
    figure, axes = plt.subplots(len(measures), 1, figsize=(7.2, 4.6), sharex=True, squeeze=False)
    rows = [f"t = {t}, {pool}" for t in arrays["timesteps"] for pool in arrays["pools"]]
    image = None
    for axis, name, area in zip(axes[:, 0], measures, arrays["area"], strict=True):
        table = area.reshape(len(rows), len(taps), 3)
        image = axis.imshow(table[..., 0], vmin=0, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        y, x = np.nonzero(table[..., 1] > 0.5)
        axis.plot(x, y, "k.", markersize=1.5)
        axis.set_yticks(range(len(rows)), rows, fontsize="x-small")
        axis.set_title(str(name).replace("_", " "), fontsize="small")
    # A tick where a block begins: there are too many layers to name each. Layers outside of blocks are few.
    blocks = [".".join(tap.split(".")[:2]) if "blocks" in tap else tap.split(".")[0] for tap in taps]
    starts = [k for k, block in enumerate(blocks) if block not in blocks[:k] and (len(taps) < 8 or "block" in block)]
    axes[-1, 0].set_xticks(starts, [blocks[k] for k in starts], rotation=35, ha="right", fontsize="x-small")
    assert image is not None
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="AUROC", shrink=0.8)
    group = {"held_out": "never trained on", "train": "trained on once"}.get(str(arrays["against"]), "given as others")
    n, m = arrays["counts"].tolist()
    figure.suptitle(f"{n} memorized images against {m} {group}; dots: 95 % interval above 0.5", fontsize="small")
    return figure
