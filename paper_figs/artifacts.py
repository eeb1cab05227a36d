"""A figure on disk: its picture, its numbers, and what they were computed from, side by side.

``NAME.png`` is drawn from ``NAME.npz`` alone, and ``NAME.json`` says by which spec and versions the numbers were
computed.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np

from sims.store.files import replace_file, write_npz, write_text
from sims.store.provenance import environment

__all__ = ["STYLE", "Arrays", "load_arrays", "over_seeds", "save"]

Arrays = Mapping[str, np.ndarray]
"""The numbers of a figure, by name."""

STYLE = str(pathlib.Path(__file__).with_name("paper.mplstyle"))


def save(
    name: str, figure: matplotlib.figure.Figure, arrays: Arrays, spec: Mapping[str, Any], out: pathlib.Path
) -> list[pathlib.Path]:
    """Write the three files into ``out`` and return their paths; ``ValueError`` naming a file that cannot be
    written."""
    paths = [out / f"{name}.{suffix}" for suffix in ("npz", "json", "png")]
    record = {"figure": name, "spec": spec, "environment": environment()}
    write_npz(paths[0], arrays, compress=True)
    write_text(paths[1], json.dumps(record, indent=1))
    with mpl.rc_context(fname=STYLE):
        replace_file(paths[2], lambda partial: figure.savefig(partial, format="png"))
    return paths


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The numbers of a saved figure, to draw it again or differently; never unpickles."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def over_seeds(curves: Arrays) -> dict[str, np.ndarray]:
    """Means over seeds of arrays (points, seeds, ...), and standard errors as ``NAME_se`` if seeds are several."""
    arrays = {name: values.mean(axis=1) for name, values in curves.items()}
    spread = {f"{k}_se": v.std(axis=1, ddof=1) / v.shape[1] ** 0.5 for k, v in curves.items() if v.shape[1] > 1}
    return arrays | spread
