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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    repair_advice,
    write_chunk,
)
from sims.store.files import claim_run, parse_json, read_json, write_text
from sims.store.locking import locked
from sims.store.provenance import environment

__all__ = [
    "FORMAT",
    "Count",
    "Progress",
    "Region",
    "Run",
    "StoreError",
    "attached",
    "blank",
    "count_finite",
    "environment",
    "load",
    "open_run",
    "pending",
    "progress",
    "read",
    "read_spec",
    "template_of",
    "write_chunk",
]

FORMAT = 1
"""Version of the layout; folders of later versions are refused."""

SPEC = "spec.json"
NAME = r"\w+(\.\w+)*"
"""Names of variables."""

ORIGIN = {"format": int, "spec": dict, "chunks": dict, "variables": list}
FIELDS = ORIGIN | {"files": dict, "sessions": list}


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
        run = _attach(path, record, "r+")
        _check_same(run, template)
        _read_units(run)
        todo = len(pending(run))
        if todo:
            record["sessions"].append(session)
        write_text(path / SPEC, json.dumps(record, indent=1))
        try:
            yield run
        finally:
            if todo:
                session.update(ended=_now(), chunks=todo - len(pending(run)))
                # On a full disk this must not hide the first error.
                with contextlib.suppress(ValueError):
                    check()
                    write_text(path / SPEC, json.dumps(record, indent=1))


def progress(run: Run) -> Progress:
    """Numbers of finished units and of all units."""
    done = len(on_disk.finished(run))
    return Progress(done, done + len(pending(run)))


def load(out: str | os.PathLike[str]) -> xr.Dataset:
    """Read a run into memory and check it for damage: finished units as computed, everything else blank.

    Besides the template's variables it has ``done`` and ``wall_s`` (seconds) over the chunked dimensions. Safe while
    another process writes. ``StoreError`` if the folder holds no run, one of a newer format, or a damaged one.

    >>> import tempfile
    >>> template = blank({"n": [2, 4]}, {"gap": (("n",), float)})
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with open_run(out, {"name": "example"}, template, {"n": 1}) as run:
    ...         write_chunk(run, pending(run)[0], {"gap": [0.5]})
    ...     results = load(out)
    >>> results.gap.values, results.done.values
    (array([0.5, nan]), array([ True, False]))
    """
    return read(out)[0]


def read(out: str | os.PathLike[str]) -> tuple[xr.Dataset, dict[str, Any]]:
    """A run's results as in :func:`load` and its record as in :func:`read_spec`, each file read once.

    A record that was lost is restored from the results, without sessions. ``StoreError`` as in :func:`load`.
    """
    path = Path(out)
    record = _record_of(path)
    run = _attach(path, record, "r")
    dataset = on_disk.labels(run)
    arrays = {name: array for name, array in run.arrays.items() if name != "seal"}
    filled = {name: np.full(array.shape, array.fill_value, array.dtype) for name, array in arrays.items()}

    def keep(unit: Region, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            filled[name][on_disk.indices(arrays[name], unit)] = value

    _read_units(run, keep)
    for name, array in arrays.items():
        dataset[name] = xr.Variable(on_disk.dims(array), filled[name], dict(array.attrs))
    return dataset, record


def attached(out: str | os.PathLike[str]) -> Run:
    """The run at ``out``, open for reading; ``StoreError`` as in :func:`load`."""
    path = Path(out)
    return _attach(path, _record_of(path), "r")


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
    if not results.exists():
        if file.exists():
            raise StoreError(f"{file} exists without {RESULTS}; move it away, or choose another folder.")
        claim_run(path)
        variables = [*map(str, template.data_vars), *BOOKKEEPING]
        record = {"format": FORMAT, "spec": spec, "chunks": chunks, "variables": variables}
        with _layout(path, template, record) as fresh:
            files = on_disk.digests(fresh, variables)
            os.replace(fresh, results)
        return record | {"files": files, "sessions": []}
    record = _record_of(path)
    differences = list(_differences("", record["spec"], spec))
    if differences:
        raise StoreError(f"{path} holds another experiment: {'; '.join(differences)}. Choose another folder.")
    for torn in results.rglob("*.partial"):
        torn.unlink()
    missing = [name for name in record["files"] if not (results / name).exists()]
    if missing:
        with _layout(path, template, record) as fresh:
            mended = on_disk.digests(fresh, record["variables"])
            for name in missing:
                record["files"][name] = mended[name]
                (results / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(fresh / name, results / name)
    return record


def _layout(path: Path, template: xr.Dataset, record: dict[str, Any]) -> contextlib.AbstractContextManager[Path]:
    origin = {field: record[field] for field in ORIGIN}
    return on_disk.layout(path, template, record["chunks"], record["variables"], {"record": json.dumps(origin)})


def _record_of(path: Path) -> dict[str, Any]:
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
    files = [Path(name) for name in record.get("files", ())]
    return (
        all(isinstance(name, str) and re.fullmatch(NAME, name) for name in record["variables"])
        and all(isinstance(size, int) and size >= 1 for size in record["chunks"].values())
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
    return {**origin, "files": on_disk.digests(path / RESULTS, origin["variables"]), "sessions": []}


def _read_units(run: Run, keep: Callable[[Region, Mapping[str, np.ndarray]], None] | None = None) -> None:
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


def _differences(field: str, stored: Any, requested: Any) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(requested, dict):
        for key in sorted(stored.keys() | requested.keys()):
            yield from _differences(f"{field}.{key}".lstrip("."), stored.get(key), requested.get(key))
    elif stored != requested:
        yield f"{field} is {json.dumps(stored)} there and {json.dumps(requested)} here"


def _attach(path: Path, record: dict[str, Any], mode: Literal["r", "r+"]) -> Run:
    return on_disk.attach(path, record["chunks"], record["variables"], record["files"], mode=mode)


def _check_same(run: Run, template: xr.Dataset) -> None:
    variables = {name: array for name, array in run.arrays.items() if name not in BOOKKEEPING}
    stored = {name: (on_disk.dims(array), array.shape, str(array.dtype)) for name, array in variables.items()}
    requested = {str(name): (array.dims, array.shape, str(array.dtype)) for name, array in template.data_vars.items()}
    if stored != requested or not on_disk.labels(run).coords.to_dataset().equals(template.coords.to_dataset()):
        raise StoreError(
            f"{run.path} was begun with other variables or labels under the same spec: {stored} there, {requested} "
            "here. Choose another folder."
        )
