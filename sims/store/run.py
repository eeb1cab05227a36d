"""The results of one run: a labeled array store that survives any kill and resumes.

A run is a folder. Its ``results.zarr`` holds the arrays, readable by plain ``xarray.open_zarr("OUT/results.zarr")``;
its ``spec.json`` records what was computed, and by which versions and machine. Work comes in units, each written
completely or not at all (:mod:`sims.store.chunks`). One process writes at a time; others may read meanwhile. The store
does not interpret the numbers: it takes a specification and a template, and fills the template::

    template = blank({"n": [2, 4], "sigma": [0.1, 0.2, 0.5]}, {"gap": (("n", "sigma"), float)})
    with open_run("runs/a", {"sigma": [0.1, 0.2, 0.5]}, template, {"n": 1}) as run:
        for unit in pending(run):
            write_chunk(run, unit, {"gap": compute(template.isel(unit))})
    gap = load("runs/a").gap
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from sims.store import chunks as on_disk
from sims.store.chunks import (
    BOOKKEEPING,
    RESULTS,
    Region,
    Run,
    StoreError,
    blank,
    disk,
    pending,
    write_chunk,
)
from sims.store.files import claim_run, write_text
from sims.store.locking import locked
from sims.store.packing import PACKED, pack, unpack
from sims.store.provenance import environment
from sims.store.reading import (
    FORMAT,
    NAME,
    SPEC,
    attach,
    in_use,
    put_back,
    read_units,
    record_of,
    with_layout,
)

__all__ = [
    "Count",
    "Progress",
    "Region",
    "Run",
    "StoreError",
    "blank",
    "count_finite",
    "environment",
    "open_run",
    "pending",
    "progress",
    "write_chunk",
]


class Progress(NamedTuple):
    """Progress of a run, in units of work."""

    done: int
    total: int


class Count(NamedTuple):
    """Numbers of cells of one variable. Diverged cells are stored as they are and counted, not averaged away."""

    finite: int
    nonfinite: int
    """Computed, but NaN or infinite."""
    missing: int
    """Not computed yet."""


@contextlib.contextmanager
def open_run(
    out: str | os.PathLike[str],
    spec: Mapping[str, Any],
    template: xr.Dataset,
    chunks: Mapping[str, int],
    provenance: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """Begin a run in the folder ``out``, or resume the run of the same ``spec`` in it.

    Args:
        out: the folder, created if needed.
        spec: what is computed, as JSON: the identity of the run.
        template: the data set to fill (see :func:`blank`); only shapes, labels, dtypes and attributes are read.
        chunks: size of a unit of work along each chunked dimension; every variable must have these dimensions. A run
            that resumes keeps the units with which it began.
        provenance: versions and machine, as JSON; each session with work to do records its own.

    ``StoreError`` if another process writes to the folder, it holds another spec or a newer format, its layout or a
    finished unit is damaged, or it cannot be written.
    """
    path = Path(out)
    spec = _as_json("spec", spec)
    session = {**_as_json("provenance", provenance or {}), "started": _now(), "ended": None, "chunks": 0}
    _check_template(template, chunks)
    with locked(path) as check:
        with disk("write in", path):
            record = _begin(path, spec, template, dict(chunks))
        run = attach(path, record, "r+")
        _check_same(run, template)
        read_units(run)
        if run.chunks != record["chunks"] and pending(run):
            run = unpack(run, record)
        left = todo = len(pending(run))
        if todo:
            record["sessions"].append(session)
        write_text(path / SPEC, json.dumps(record, indent=1))
        try:
            yield run
        finally:
            if todo:
                left = len(pending(run))
                session.update(ended=_now(), chunks=todo - left)
                # On a full disk this must not hide the first error.
                with contextlib.suppress(ValueError):
                    check()
                    write_text(path / SPEC, json.dumps(record, indent=1))
        if not left:
            check()
            pack(run, record)


def progress(run: Run) -> Progress:
    """Numbers of finished units and of all units."""
    done = len(on_disk.finished(run))
    return Progress(done, done + len(pending(run)))


def count_finite(dataset: xr.Dataset) -> dict[str, Count]:
    """Finite, nonfinite and missing cells of each floating-point variable; without ``done`` none is missing."""
    counts = {}
    for name, array in dataset.drop_vars(list(BOOKKEEPING), errors="ignore").data_vars.items():
        if array.dtype.kind == "f":
            done = dataset["done"].broadcast_like(array) if "done" in dataset else xr.ones_like(array, bool)
            computed, finite = int(done.sum()), int((done & np.isfinite(array)).sum())
            counts[str(name)] = Count(finite, computed - finite, array.size - computed)
    return counts


def _as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{name} must be plain JSON with finite numbers: {error}.") from error


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_template(template: xr.Dataset, chunks: Mapping[str, int]) -> None:
    for dim, size in template.sizes.items():
        if size == 0:
            raise StoreError(f"dimension {dim!r} is empty; give it at least one value.")
    for dim, size in chunks.items():
        if dim not in template.sizes or size < 1:
            raise StoreError(f"chunks[{dim!r}] = {size}: chunks are sizes >= 1 along {list(template.sizes)}.")
    for name, array in template.data_vars.items():
        lacking = [dim for dim in chunks if dim not in array.dims]
        if lacking:
            raise StoreError(f"variable {name!r} lacks the chunked dimensions {lacking}: units would share its cells.")
        if array.dtype.kind not in "biuf":
            raise StoreError(f"variable {name!r} has dtype {array.dtype}; the store takes real numbers and booleans.")
        if name in BOOKKEEPING or not re.fullmatch(NAME, str(name)):
            raise StoreError(
                f"variable {name!r} needs another name: words with dots between, not {' or '.join(BOOKKEEPING)}."
            )


def _begin(path: Path, spec: dict[str, Any], template: xr.Dataset, chunks: dict[str, int]) -> dict[str, Any]:
    """The record of the run in ``path``, after creating its layout or restoring missing files of it."""
    results, file = path / RESULTS, path / SPEC
    put_back(path)
    shutil.rmtree(path / PACKED, ignore_errors=True)
    if not results.exists():
        if file.exists():
            raise StoreError(f"{file} exists without {RESULTS}; move it away, or choose another folder.")
        claim_run(path)
        variables = [*map(str, template.data_vars), *BOOKKEEPING]
        record = {"format": FORMAT, "spec": spec, "chunks": chunks, "variables": variables}
        with with_layout(path, template, record, chunks) as fresh:
            files = on_disk.digests(fresh, variables)
            os.replace(fresh, results)
        return record | {"files": files, "sessions": []}
    record = record_of(path)
    differences = list(_differences("", record["spec"], spec))
    if differences:
        raise StoreError(f"{path} holds another experiment: {'; '.join(differences)}. Choose another folder.")
    for root, _, names in os.walk(results):
        for name in names:
            if name.endswith(".partial"):
                os.unlink(os.path.join(root, name))
    used = in_use(path, record)
    if not all((results / name).exists() for name in used["files"]):
        with with_layout(path, template, record, used["chunks"]) as fresh:
            mended = on_disk.digests(fresh, record["variables"])
            # Names that belong to no layout come from a damaged record.
            for name in used["files"].keys() - mended.keys():
                del used["files"][name]
            for name, digest in mended.items():
                if name not in used["files"] or not (results / name).exists():
                    used["files"][name] = digest
                    (results / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(fresh / name, results / name)
    return record


def _differences(field: str, stored: Any, requested: Any) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(requested, dict):
        for key in sorted(stored.keys() | requested.keys()):
            yield from _differences(f"{field}.{key}".lstrip("."), stored.get(key), requested.get(key))
    elif stored != requested:
        yield f"{field} is {json.dumps(stored)} there and {json.dumps(requested)} here"


def _check_same(run: Run, template: xr.Dataset) -> None:
    variables = {name: array for name, array in run.arrays.items() if name not in BOOKKEEPING}
    stored = {name: (on_disk.dims(array), array.shape, str(array.dtype)) for name, array in variables.items()}
    requested = {str(name): (array.dims, array.shape, str(array.dtype)) for name, array in template.data_vars.items()}
    if stored != requested or not on_disk.labels(run).coords.to_dataset().equals(template.coords.to_dataset()):
        raise StoreError(
            f"{run.path} was begun with other variables or labels under the same spec: {stored} there, {requested} "
            "here. Choose another folder."
        )
