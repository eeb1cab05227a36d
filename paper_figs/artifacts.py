"""A figure on disk: its picture, its numbers, and what they were computed from, side by side.

``NAME.png`` (or ``.pdf``, ``.svg``) is drawn from ``NAME.npz`` alone, and ``NAME.json`` says by which spec and versions
the numbers were computed.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np

from sims.store.files import replace_file, write_npz, write_text
from sims.store.provenance import environment

__all__ = ["FORMATS", "STYLE", "Arrays", "bars", "legend_above", "load_arrays", "over_seeds", "save"]

FORMATS = ("png", "pdf", "svg")
"""Of pictures."""

Arrays = Mapping[str, np.ndarray]
"""The numbers of a figure, by name."""

STYLE = str(pathlib.Path(__file__).with_name("paper.mplstyle"))


def save(
    name: str,
    figure: matplotlib.figure.Figure,
    arrays: Arrays,
    spec: Mapping[str, Any],
    out: pathlib.Path,
    formats: Sequence[str] = FORMATS[:1],
) -> list[pathlib.Path]:
    """Write numbers, record and a picture of each of ``formats`` into ``out``; returns the paths.

    Equal figures are equal files. ``ValueError`` naming a file that cannot be written.
    """
    paths = [out / f"{name}.{suffix}" for suffix in ("npz", "json", *formats)]
    record = {"figure": name, "spec": spec, "environment": environment()}
    write_npz(paths[0], arrays, compress=True)
    write_text(paths[1], json.dumps(record, indent=1))
    undated: dict[str, Any] = {"pdf": {"metadata": {"CreationDate": None}}, "svg": {"metadata": {"Date": None}}}
    with mpl.rc_context(fname=STYLE), mpl.rc_context({"svg.hashsalt": name}):
        for path, kind in zip(paths[2:], formats, strict=True):
            replace_file(path, lambda partial, kind=kind: figure.savefig(partial, format=kind, **undated.get(kind, {})))
    return paths


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The numbers of a saved figure, to draw it again or differently; never unpickles."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def over_seeds(curves: Arrays) -> dict[str, np.ndarray]:
    """Means over seeds of arrays (points, seeds, ...), and standard errors as ``NAME_se`` if seeds are several.

    ``seeds`` is the number of seeds.
    """
    arrays = {name: values.mean(axis=1) for name, values in curves.items()}
    arrays["seeds"] = np.asarray(max(values.shape[1] for values in curves.values()))
    spread = {f"{k}_se": v.std(axis=1, ddof=1) / v.shape[1] ** 0.5 for k, v in curves.items() if v.shape[1] > 1}
    return arrays | spread


def bars(arrays: Arrays) -> str:
    """What the points and error bars of :func:`over_seeds` are, for a figure's title."""
    seeds = int(arrays["seeds"])
    return (
        f"means over {seeds} seeds; bars: ± one standard error over seeds" if seeds > 1 else "one seed, no error bars"
    )


def legend_above(axis: Any) -> None:
    """A legend in room of its own, above the curves."""
    entries = len(axis.get_legend_handles_labels()[1])
    low, high = axis.get_ylim()
    share = 0.09 * entries + 0.05
    if axis.get_yscale() == "log":
        axis.set_ylim(low, high * (high / low) ** (share / (1 - share)))
    else:
        axis.set_ylim(low, high + (high - low) * share / (1 - share))
    axis.legend(loc="upper right")
