"""Reading a run: its record, and its results with every file checked.

The record is ``spec.json``; the results have a copy of the part that identifies the run, from which a lost record is
restored. Results that were packed (:mod:`sims.store.packing`) have another layout, which the record describes too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from sims.store import chunks as on_disk
from sims.store.chunks import BOOKKEEPING, RESULTS, Region, Run, StoreError, blank, disk, repair_advice
from sims.store.files import parse_json, read_json
from sims.store.locking import locked

__all__ = [
    "ASIDE",
    "FORMAT",
    "NAME",
    "ORIGIN",
    "SPEC",
    "attach",
    "attached",
    "dataset_of",
    "in_use",
    "load",
    "origin_of",
    "put_back",
    "read",
    "read_spec",
    "read_units",
    "record_of",
    "restored",
    "settle",
    "template_of",
    "with_layout",
]

FORMAT = 2
"""Version of the layout; folders of later versions are refused. Format 1 is never packed."""

SPEC = "spec.json"
ASIDE = ".results.zarr.aside"
"""Where results lie for the moment in which others take their place."""
NAME = r"\w+(\.\w+)*"
"""Names of variables."""

ORIGIN = {"format": int, "spec": dict, "chunks": dict, "variables": list}
FIELDS = ORIGIN | {"files": dict, "sessions": list}


def load(out: str | os.PathLike[str]) -> xr.Dataset:
    """Read a run into memory and check it for damage: finished units as computed, everything else blank.

    Besides the template's variables it has ``done`` and ``wall_s`` (seconds) over the chunked dimensions. Safe while
    another process writes. ``StoreError`` if the folder holds no run, one of a newer format, or a damaged one.

    >>> import tempfile
    >>> from sims import store
    >>> template = store.blank({"n": [2, 4]}, {"gap": (("n",), float)})
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with store.open_run(out, {"name": "example"}, template, {"n": 1}) as run:
    ...         store.write_chunk(run, store.pending(run)[0], {"gap": [0.5]})
    ...     results = store.load(out)
    >>> results.gap.values, results.done.values
    (array([0.5, nan]), array([ True, False]))
    """
    return read(out)[0]


def read(out: str | os.PathLike[str]) -> tuple[xr.Dataset, dict[str, Any]]:
    """A run's results as in :func:`load` and its record as in :func:`read_spec`, each file read once.

    A record that was lost is restored from the results, without sessions. ``StoreError`` as in :func:`load`.
    """
    path = Path(out)
    settle(path)
    before = _which(path)
    try:
        return _read(path)
    except StoreError:
        # The process that writes may have packed the results while they were read.
        if _which(path) == before:
            raise
        return _read(path)


def _read(path: Path) -> tuple[xr.Dataset, dict[str, Any]]:
    record = record_of(path)
    return dataset_of(attach(path, record, "r")), record


def dataset_of(run: Run) -> xr.Dataset:
    """The results of an open run as in :func:`load`; ``StoreError`` for damaged units."""
    dataset = on_disk.labels(run)
    arrays = {name: array for name, array in run.arrays.items() if name != "seal"}
    filled = {name: np.full(array.shape, array.fill_value, array.dtype) for name, array in arrays.items()}

    def keep(unit: Region, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            filled[name][on_disk.indices(arrays[name], unit)] = value

    read_units(run, keep)
    for name, array in arrays.items():
        dataset[name] = xr.Variable(on_disk.dims(array), filled[name], dict(array.attrs))
    return dataset


def attached(out: str | os.PathLike[str]) -> Run:
    """The run at ``out``, open for reading; ``StoreError`` as in :func:`load`."""
    path = Path(out)
    settle(path)
    return attach(path, record_of(path), "r")


def template_of(out: str | os.PathLike[str]) -> xr.Dataset:
    """The template with which the run at ``out`` began; ``StoreError`` as in :func:`load`."""
    run = attached(out)
    labels = on_disk.labels(run)
    arrays = {name: array for name, array in run.arrays.items() if name not in BOOKKEEPING}
    variables = {name: (on_disk.dims(array), array.dtype, dict(array.attrs)) for name, array in arrays.items()}
    return blank({str(name): label for name, label in labels.coords.items()}, variables).assign_attrs(
        {name: value for name, value in labels.attrs.items() if name != "record"}
    )


def read_spec(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The record beside the results: ``format``, ``spec``, ``chunks``, ``variables``, ``files``, ``sessions``.

    ``files`` are digests of every file that is not a chunk. A session has the provenance given to :func:`open_run`, the
    times when it ``started`` and ``ended`` (null if it was killed), and the number of ``chunks`` that it finished.
    ``StoreError`` if the record is missing, damaged, or of a newer format.
    """
    file = Path(out) / SPEC
    if not os.path.lexists(file):
        raise StoreError(f"{out} holds no run: there is no {file}; name the folder that a run was given.")
    try:
        record = read_json(file)
    except ValueError as error:
        raise StoreError(f"cannot read {file} ({error}); {repair_advice(Path(out))}.") from error
    version = record.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(f"{file} has format {version}, this version reads {FORMAT}; update the package.")
    if not _is_whole(record, FIELDS):
        if isinstance(record.get("single"), dict):
            raise StoreError(
                f"{out} holds a single training run (python -m sims train), not a sweep: its measures are in "
                f"{Path(out) / 'course.json'}."
            )
        raise StoreError(f"{file} is damaged: it needs the fields {', '.join(FIELDS)}; {repair_advice(Path(out))}.")
    return record


def record_of(path: Path) -> dict[str, Any]:
    """The record of a run: from spec.json, or if that is lost from the copy in the results."""
    results, file = path / RESULTS, path / SPEC
    origin = origin_of(path)
    if origin is not None and not file.exists():
        return restored(path, origin)
    record = read_spec(path)
    if origin is None:
        # The digest in the record reports the damage later.
        return record
    if origin != {field: record[field] for field in ORIGIN}:
        raise StoreError(
            f"{file} and {results / 'zarr.json'} describe different runs; restore the one that was edited."
        )
    return record


def _is_whole(record: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    """Whether a record read from a file has these fields, and names nothing outside its folder."""
    if not all(isinstance(record.get(field), kind) for field, kind in fields.items()):
        return False
    packed = record.get("packed", {"chunks": {}, "files": {}})
    if not isinstance(packed, dict) or not all(isinstance(packed.get(field), dict) for field in ("chunks", "files")):
        return False
    files = [Path(name) for name in (*record.get("files", ()), *packed["files"])]
    sizes = (*record["chunks"].values(), *packed["chunks"].values())
    return (
        all(isinstance(name, str) and re.fullmatch(NAME, name) for name in record["variables"])
        and all(isinstance(size, int) and size >= 1 for size in sizes)
        and all(isinstance(session, dict) for session in record.get("sessions", ()))
        and not any(file.is_absolute() or ".." in file.parts for file in files)
    )


def origin_of(path: Path) -> dict[str, Any] | None:
    """The copy of a run's record in its results; None if that is lost or damaged."""
    file = path / RESULTS / "zarr.json"
    with contextlib.suppress(ValueError, LookupError, TypeError):
        origin = parse_json(read_json(file)["attributes"]["record"], str(file))
        if _is_whole(origin, ORIGIN):
            return origin
    return None


def restored(path: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run from the copy in its results, without sessions."""
    files = on_disk.digests(path / RESULTS, origin["variables"])
    record = {**origin, "files": files, "sessions": []}
    with contextlib.suppress(ValueError, LookupError, TypeError):
        shape = read_json(path / RESULTS / "done" / "zarr.json")["chunk_grid"]["configuration"]["chunk_shape"]
        chunks = dict(zip(origin["chunks"], shape, strict=True))
        if chunks != origin["chunks"]:
            record |= {"packed": {"chunks": chunks, "files": files}, "files": {}}
    return record


def in_use(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Units and digests of the results as they are now: ``chunks`` and ``files``, packed or as the run began."""
    plain = {"chunks": record["chunks"], "files": record["files"]}
    packed = record.get("packed")
    if packed is None:
        return plain

    found = {name: on_disk.digest_or_none(path / RESULTS / name) for name in plain["files"] | packed["files"]}

    def matching(files: Mapping[str, str]) -> int:
        return sum(found[name] == digest for name, digest in files.items())

    return packed if matching(packed["files"]) > matching(plain["files"]) else plain


def attach(path: Path, record: Mapping[str, Any], mode: Literal["r", "r+"]) -> Run:
    """Open the results of the run with this record; ``StoreError`` for a damaged layout."""
    used = in_use(path, record)
    return on_disk.attach(path, used["chunks"], record["variables"], used["files"], mode=mode)


def with_layout(
    path: Path, template: xr.Dataset, record: Mapping[str, Any], chunks: Mapping[str, int]
) -> contextlib.AbstractContextManager[Path]:
    """A results store of the run with this record, without units (:func:`sims.store.chunks.layout`)."""
    origin = {field: record[field] for field in ORIGIN}
    return on_disk.layout(path, template, chunks, record["variables"], {"record": json.dumps(origin)})


def settle(path: Path) -> None:
    """Put results back whose move was interrupted by a kill: there are none, but others lie aside."""
    for _ in range(100):
        if os.path.lexists(path / RESULTS) or not os.path.lexists(path / ASIDE):
            return
        # Another process that holds the folder is in the middle of that move.
        with contextlib.suppress(StoreError), locked(path):
            put_back(path)
            return
        time.sleep(0.01)


def put_back(path: Path) -> None:
    """As :func:`settle`, in a process that holds the folder; results aside that were replaced are removed."""
    if not os.path.lexists(path / ASIDE):
        return
    with disk("write in", path):
        if os.path.lexists(path / RESULTS):
            shutil.rmtree(path / ASIDE)
        else:
            os.replace(path / ASIDE, path / RESULTS)


def _which(path: Path) -> int | None:
    """Which folder the results are, whatever is in it."""
    try:
        return (path / RESULTS).stat().st_ino
    except OSError:
        return None


def read_units(run: Run, keep: Callable[[Region, Mapping[str, np.ndarray]], None] | None = None) -> None:
    """Read every finished unit; one ``StoreError`` for all that are damaged."""
    bad: list[str] = []
    for unit in on_disk.finished(run):
        try:
            values = on_disk.read_unit(run, unit)
        except StoreError as error:
            bad.append(str(error))
        else:
            if keep is not None:
                keep(unit, values)
    if bad:
        more = f"; and {len(bad) - 8} more" if len(bad) > 8 else ""
        what = "1 finished unit is" if len(bad) == 1 else f"{len(bad)} finished units are"
        raise StoreError(f"{what} damaged: {'; '.join(bad[:8])}{more}. To go on, {repair_advice(run.path)}.")
