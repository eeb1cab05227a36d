"""Long work in batches of numbered items, written to a run's folder (:mod:`sims.store.run`) as it is done.

A run's identity is what its numbers depend on: digests of arrays, not the paths at which they lie, and not the size of
batches.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from jaxtyping import Int

from sims.store import run as store

__all__ = ["batch_rows", "checksum", "fill"]


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

    ``compute`` takes the numbers of the items, always equally many: the last batch repeats its last item. A run that
    goes on keeps the batches that it began with. ``on_batch(done, total)`` is told the items finished, at the start
    too. ``provenance`` is recorded beside the environment. ``ValueError`` for a folder that holds something else.
    """
    dim, total = next(iter(template.sizes.items()))
    provenance = {**store.environment(), **(provenance or {})}
    with store.open_run(out, spec, template, {str(dim): min(batch_size, total)}, provenance) as run:
        size = run.chunks[str(dim)]
        units = store.pending(run)
        done = total - sum(unit[str(dim)].stop - unit[str(dim)].start for unit in units)
        for unit in units:
            if on_batch is not None:
                on_batch(done, total)
            part, begin = unit[str(dim)], time.perf_counter()
            batch = jax.device_get(dict(compute(batch_rows(part.start, size, total))))
            values = {name: value[: part.stop - part.start] for name, value in batch.items()}
            store.write_chunk(run, unit, values, wall_s=time.perf_counter() - begin)
            done += part.stop - part.start
        if on_batch is not None:
            on_batch(done, total)


def batch_rows(start: int, size: int, total: int) -> Int[np.ndarray, " size"]:
    """The items of a batch, the last one repeated where there are no more."""
    return np.minimum(np.arange(start, start + size, dtype=np.int32), np.int32(total - 1))


def checksum(array: Any) -> str:
    """A digest of an array's shape, dtype and values, against confusion, not against forgery."""
    array = np.ascontiguousarray(array)
    # CRC-32 passes over gigabytes in a second or two, where SHA-256 takes ten.
    crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
    return f"{array.dtype}{list(array.shape)}:{crc:08x}"
