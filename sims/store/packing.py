"""Finished runs of many units, packed into few files.

A unit has files of its own so that it is written completely or not at all. Once all are finished that has served its
purpose, and costs: 20,000 cells are 160,000 files, which take half a minute to open. :func:`pack` writes the same
results with larger units beside the run, and moves them into the place of the others; a kill at any moment leaves the
one or the other. :func:`unpack` goes back, for a packed run that lost a unit and is to be computed anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from sims.store import chunks as on_disk
from sims.store.chunks import BOOKKEEPING, RESULTS, Run, StoreError, disk
from sims.store.files import write_text
from sims.store.reading import ASIDE, SPEC, attach, dataset_of, put_back, with_layout

__all__ = ["MANY", "PACKED", "pack", "unpack"]

PACKED = ".packed"
"""Where packed results are written before they are moved."""

MANY = 512
"""Runs of more units are packed."""
FEW = 64
"""Units of packed results, about: so much is computed anew where a packed file is damaged."""
LARGEST = 1 << 30
"""Results of more bytes stay as they are: they would have to fit in memory."""


def pack(run: Run, record: dict[str, Any]) -> None:
    """Pack the finished ``run`` if it has many units; where that fails, it stays as it is.

    The caller holds the folder (:func:`sims.store.locking.locked`); ``record`` is the run's, and gets the new layout.
    """
    size = sum(array.nbytes for array in run.arrays.values())
    packed = run.chunks != record["chunks"]
    if packed or record["format"] < 2 or math.prod(_counts(run)) <= MANY or size > LARGEST:
        return
    chunks = _larger(run)
    try:
        record["packed"] = {"chunks": chunks, "files": _rewrite(run, record, chunks)}
        _exchange(run.path, record)
    except StoreError:
        with contextlib.suppress(StoreError):
            put_back(run.path)
        shutil.rmtree(run.path / PACKED, ignore_errors=True)


def unpack(run: Run, record: dict[str, Any]) -> Run:
    """The packed ``run`` in the units with which it began, open for writing; ``StoreError`` if it is damaged.

    The caller holds the folder; ``record`` gets the new layout.
    """
    record["files"] = _rewrite(run, record, record["chunks"])
    _exchange(run.path, record)
    return attach(run.path, record, "r+")


def _counts(run: Run) -> list[int]:
    """Number of units along each chunked dimension."""
    return [-(-size // chunk) for size, chunk in zip(run.arrays["done"].shape, run.chunks.values(), strict=True)]


def _larger(run: Run) -> dict[str, int]:
    """Sizes of units of which there are about FEW: whole numbers of the run's, whole in the last dimensions."""
    chunks, counts = dict(run.chunks), _counts(run)
    excess = -(-math.prod(counts) // FEW)
    for dim, count in reversed(list(zip(chunks, counts, strict=True))):
        factor = min(count, excess)
        chunks[dim] *= factor
        excess = -(-excess // factor)
    return chunks


def _rewrite(run: Run, record: Mapping[str, Any], chunks: Mapping[str, int]) -> dict[str, str]:
    """Write the finished units of ``run`` beside it, in units of size ``chunks``; returns the digests of the layout."""
    results, folder = dataset_of(run), run.path / PACKED
    template = results.drop_vars(list(BOOKKEEPING), errors="ignore")
    with disk("write in", folder):
        folder.mkdir()
        with with_layout(folder, template, record, chunks) as fresh:
            files = on_disk.digests(fresh, record["variables"])
            os.replace(fresh, folder / RESULTS)
    fresh_run = on_disk.attach(folder, chunks, record["variables"], files, mode="r+")
    for unit in on_disk.units(fresh_run):
        part: xr.Dataset = results.isel(unit)
        if part["done"].all():
            arrays = {str(name): part[name].values for name in template.data_vars}
            on_disk.write_chunk(fresh_run, unit, arrays, wall_s=part["wall_s"].values)
    return files


def _exchange(path: Path, record: Mapping[str, Any]) -> None:
    """Move what :func:`_rewrite` wrote into the place of the results. The record first describes both."""
    write_text(path / SPEC, json.dumps(record, indent=1))
    with disk("write in", path):
        os.replace(path / RESULTS, path / ASIDE)
        os.replace(path / PACKED / RESULTS, path / RESULTS)
        put_back(path)
        shutil.rmtree(path / PACKED, ignore_errors=True)
