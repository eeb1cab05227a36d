"""The loop that fills a run's folder (:mod:`sims.store.run`): pending units are computed, written and reported.

:func:`fill_units` is the loop itself, for units of any shape that are finished in any order; :func:`fill` computes
numbered items in batches of one size. A run's identity is what its numbers depend on: digests of arrays, not the paths
at which they lie, and not the size of batches.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import xarray as xr
from jaxtyping import Int

from sims.store import chunks as on_disk
from sims.store import run as store
from sims.store.chunks import BOOKKEEPING
from sims.store.reading import attached
from sims.store.run import Region, Run

__all__ = ["Computed", "batch_rows", "checksum", "fill", "fill_units"]

Computed: TypeAlias = tuple[Region, Mapping[str, Any], float]
"""Where a unit lies, the values of every variable there, and the seconds that it took."""


def fill_units(
    run: Run,
    compute: Callable[[list[Region]], Iterable[Computed]],
    *,
    regions: Sequence[Region] | None = None,
    on_unit: Callable[[int, int, Region | None], None] | None = None,
) -> None:
    """Compute the pending units of an open run, and write each when it is finished.

    ``compute`` is called once, with the regions of all pending units (perhaps none), and yields units in any order;
    those that it leaves out stay pending. ``regions`` restricts the work to these units. ``on_unit(done, total,
    region)`` is called at the start, with None for the region, and after each unit; it counts units of ``regions``.
    """
    considered = on_disk.units(run) if regions is None else regions
    todo = [region for region in considered if not on_disk.is_finished(run, region)]
    done, total = len(considered) - len(todo), len(considered)
    if on_unit is not None:
        on_unit(done, total, None)
    for region, values, wall_s in compute(todo):
        store.write_chunk(run, region, values, wall_s=wall_s)
        done += 1
        if on_unit is not None:
            on_unit(done, total, region)


def fill(
    out: str | Path,
    spec: Mapping[str, Any],
    template: xr.Dataset,
    batch_size: int,
    compute: Callable[[Int[np.ndarray, " b"]], Mapping[str, Any]],
    *,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Compute what the run in ``out`` still lacks, ``batch_size`` items of the template's first dimension at a time.

    Args:
        out: the run's folder; the same call resumes.
        spec: the identity of the run, as JSON.
        template: the data set to fill (:func:`sims.store.run.blank`); items lie along its first dimension.
        batch_size: items of a batch; a run that resumes keeps the size with which it began.
        compute: from the numbers of a batch's items to their values. Every batch has the same size: the last one
            repeats its last item.
        provenance: recorded beside the environment.
        on_batch: ``(done, total)``, called with the number of finished items at the start and after each batch.

    ``ValueError`` for a folder that holds something else.
    """
    dim, total = next(iter(template.sizes.items()))
    dim = str(dim)
    provenance = {**store.environment(), **(provenance or {})}
    with store.open_run(out, spec, template, {dim: min(batch_size, total)}, provenance) as run:
        size = run.chunks[dim]
        done = total - sum(region[dim].stop - region[dim].start for region in store.pending(run))

        def batches(todo: list[Region]) -> Iterator[Computed]:
            for region in todo:
                part, begin = region[dim], time.perf_counter()
                batch = jax.device_get(dict(compute(batch_rows(part.start, size, total))))
                values = {name: value[: part.stop - part.start] for name, value in batch.items()}
                yield region, values, time.perf_counter() - begin

        def report(_: int, __: int, region: Region | None) -> None:
            nonlocal done
            done += 0 if region is None else region[dim].stop - region[dim].start
            if on_batch is not None:
                on_batch(done, total)

        fill_units(run, batches, on_unit=report)


def not_finite(out: str | Path, dim: str) -> list[int]:
    """The finished items along ``dim`` of which some value is NaN or infinite; reads a unit at a time.

    ``StoreError`` as for :func:`sims.store.reading.load`.
    """
    run, bad = attached(out), []
    for unit in on_disk.finished(run):
        part = unit[dim]
        for name, values in on_disk.read_unit(run, unit).items():
            dims = on_disk.dims(run.arrays[name])
            if name in BOOKKEEPING or dim not in dims or values.dtype.kind not in "fc":
                continue
            others = tuple(axis for axis, of in enumerate(dims) if of != dim)
            bad.extend((part.start + np.flatnonzero(~np.isfinite(values).all(axis=others))).tolist())
    return sorted(set(bad))


def batch_rows(start: int, size: int, total: int) -> Int[np.ndarray, " size"]:
    """The items of a batch; the last item is repeated if there are fewer than ``size``."""
    return np.minimum(np.arange(start, start + size, dtype=np.int32), np.int32(total - 1))


def checksum(array: Any) -> str:
    """A digest of an array's shape, dtype and values; it detects mix-ups, not forgery."""
    array = np.ascontiguousarray(array)
    # CRC-32 takes a second or two for gigabytes, SHA-256 ten.
    crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
    return f"{array.dtype}{list(array.shape)}:{crc:08x}"
