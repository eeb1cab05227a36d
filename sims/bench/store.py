"""Rows of ``store``: opening a run of many units.

* ``open_finished``: a finished run, which is packed into few files, against the files in which its units were written.
* ``open_unfinished``: reading a run of which one unit is pending, with every file checked, against plain xarray, which
  checks the same files one by one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xarray as xr

from sims import store
from sims.bench.timing import Row, compare
from sims.store.chunks import RESULTS

__all__ = ["ROWS", "open_run"]

VARIABLES = ("gap", "train_error", "held_out_error", "std_train", "std_held_out")
CELLS = 50
"""Cells of a unit."""


def open_run(finished: bool, repeats: int, quick: bool) -> Row:
    """Seconds to read 2,000 units of 50 cells and five measures, against plain xarray on the unpacked files."""
    total = 600 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        loose, packed = Path(folder) / "loose", Path(folder) / "packed"
        _write(loose, total, total - 1)
        if finished:
            _write(packed, total, total)
        ours = packed if finished else loose
        name = "open_finished" if finished else "open_unfinished"
        notes = {"units": total, "files": sum(file.is_file() for file in (ours / RESULTS).rglob("*"))}
        return compare(name, lambda: store.load(ours), functools.partial(_plain, loose), repeats, notes=notes)


def _write(out: Path, total: int, done: int) -> None:
    values = np.random.default_rng(0).standard_normal((1, CELLS))
    template = store.blank(
        {"unit": range(total), "cell": range(CELLS)}, dict.fromkeys(VARIABLES, (("unit", "cell"), float))
    )

    def computed(pending: list[store.Region]) -> Iterator[tuple[store.Region, dict[str, np.ndarray], float]]:
        for region in pending[:done]:
            yield region, dict.fromkeys(VARIABLES, values), 0.1

    with store.open_run(out, {"name": "bench"}, template, {"unit": 1}) as run:
        store.fill_units(run, computed)


def _plain(out: Path) -> xr.Dataset:
    with xr.open_zarr(out / RESULTS, chunks=None) as results:
        return results.load()


ROWS: dict[str, Callable[[int, bool], Row]] = {
    "open_finished": functools.partial(open_run, True),
    "open_unfinished": functools.partial(open_run, False),
}
"""Functions of the number of repeats and of ``quick``, by name."""
