"""The price of memory: objectives of memorizing and generalizing as n grows, with what each memorized sample takes.

Drawn from a run of ``python -m sims ask`` (``--run DIR``), at each of its noise levels; or of digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib import pyplot as plt

from paper_figs.artifacts import Arrays
from sims.data import datasets
from sims.store.files import read_json
from sims.study.asking import ask
from sims.study.certification import CLEAR

__all__ = ["QUICK", "SPEC", "SUMMARY", "compute", "draw", "from_run", "spec_of"]

SUMMARY = "price of memory as n grows, with biases, against generalizing; --run DIR draws an `ask`"

SPEC: dict[str, Any] = {
    "dataset": "digits",
    "num_samples": 1024,
    "width": 1024,
    "sigma": [0.1, 0.5, 1.5],
    "penalty": 1e-5,
}
"""Digits with as many units as there are of them."""

QUICK = SPEC | {"num_samples": 16, "width": 16, "sigma": [0.1, 1.5]}

COLUMNS = ("num_samples", "memorizing", "generalizing", "hull", "gate", "gain", "memorizable")
"""Of a price, in the order of the saved array's last axis."""


def compute(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ask about nested sets of the data."""
    data = datasets.load(spec["dataset"], num_samples=spec["num_samples"], dtype=np.float64)
    return _reduced(ask(data.train, sigma=spec["sigma"], width=spec["width"], penalty=spec["penalty"]))


def from_run(folder: str | Path) -> dict[str, np.ndarray]:
    """The answer of a finished ``ask``; ``ValueError`` if the folder holds something else."""
    result = _answer(folder)
    try:
        return _reduced(result)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}/ask.json is damaged ({error}); ask again in another folder.") from error


def spec_of(folder: str | Path) -> dict[str, Any]:
    """What was asked, to be saved with the figure."""
    return dict(_answer(folder)["spec"])


def _answer(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "ask.json"
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no answer of `python -m sims ask` ({error}).") from error
    if not isinstance(result, dict) or not {"spec", "answers", "data"} <= result.keys():
        raise ValueError(f"{path} is no answer of `python -m sims ask`.")
    return result


def _reduced(result: dict[str, Any]) -> dict[str, np.ndarray]:
    prices = [[[price[name] for name in COLUMNS] for price in answer["prices"]] for answer in result["answers"]]
    return {
        "prices": np.asarray(prices, float),
        "columns": np.asarray(COLUMNS),
        "sigma": np.asarray([answer["sigma"] for answer in result["answers"]], float),
        "dim": np.asarray(result["data"]["dim"]),
        "width": np.asarray(result["data"]["width"]),
    }


def draw(arrays: Arrays) -> matplotlib.figure.Figure:
    """Left both objectives over σ², so that a direction kept counts one; right hull and gate in units of σ.

    Points are open where the median hull is nearer than three σ, the line on the right: closed forms are rough there.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, len(arrays["sigma"])))
    for color, sigma, prices in zip(colors, arrays["sigma"], arrays["prices"], strict=True):
        n, memorizing, generalizing, hull, gate, _, _ = prices.T
        left.plot(n, memorizing / sigma**2, "o-", color=color, markersize=3, label=f"σ = {sigma:g}")
        rough = hull < CLEAR * sigma
        left.plot(n[rough], memorizing[rough] / sigma**2, "o", color="white", markeredgecolor=color, markersize=4)
        left.plot(n, generalizing / sigma**2, "--", color=color)
        right.plot(n, hull / sigma, "-", color=color, label=f"σ = {sigma:g}")
        # No gate, no point: a logarithmic axis has no zero.
        right.plot(n, np.where(gate > 0, gate, np.nan) / sigma, ":", color=color)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("samples n")
    left.set_ylabel("objective / σ²")
    right.set_ylabel("median distance / σ")
    right.axhline(CLEAR, color="0.6", linewidth=0.8)
    right.set_ylim(bottom=right.get_ylim()[0] / 4)
    # What the lines are once, and one color a noise level.
    for axis, names in ((left, ("memorizing", "generalizing")), (right, ("hull D", "gate κ"))):
        axis.plot([], [], "o-" if axis is left else "-", color="0.3", markersize=3, label=names[0])
        axis.plot([], [], "--" if axis is left else ":", color="0.3", label=names[1])
        axis.legend(fontsize="x-small", loc="upper left" if axis is left else "lower left", ncols=2)
    left.set_ylim(top=left.get_ylim()[1] * 4)
    figure.suptitle(f"Networks with biases, {int(arrays['width'])} units, d = {int(arrays['dim'])}", fontsize="small")
    return figure
