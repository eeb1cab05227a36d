"""The arrays of a run on disk: a zarr group whose chunk grid is the grid of units of work.

All variables are chunked alike, so that each unit has files of its own; a file holds little-endian numbers and their
CRC-32C. The layout (metadata and labels) is written once, in one move, and its digests are recorded. A unit is finished
when the file of its ``done`` flag exists: it is written last, after the others have been flushed to the disk. Its
``seal`` is the CRC-32C of the checksums of all its files with their names and places: files that changed places are
noticed. What to compute and who may write is decided in :mod:`sims.store.run`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import os
import shutil
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import google_crc32c
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

__all__ = [
    "AGAIN",
    "BOOKKEEPING",
    "RESULTS",
    "Region",
    "Run",
    "StoreError",
    "attach",
    "blank",
    "digest_or_none",
    "digests",
    "dims",
    "disk",
    "finished",
    "indices",
    "is_finished",
    "labels",
    "layout",
    "pending",
    "read_unit",
    "remove_unit",
    "repair_advice",
    "shown",
    "units",
    "write_chunk",
]

RESULTS = "results.zarr"
BOOKKEEPING = {"wall_s": np.dtype(float), "seal": np.dtype(np.uint32), "done": np.dtype(bool)}
"""Variables over the units: seconds, the seal (which runs made before version 0.1 lack), and whether it is finished."""

AGAIN = "run the same command again: finished chunks are kept"
"""How error messages end where the command can resume."""

Region: TypeAlias = dict[str, slice]
"""Where a unit of work lies: its slice of every chunked dimension, as ``Dataset.isel(region)`` takes it."""


class StoreError(ValueError):
    """The folder of a run cannot be used; the message names the folder or file and says what to do."""


class Run(NamedTuple):
    """An open run."""

    path: Path
    """Its folder."""
    chunks: dict[str, int]
    """Size of a unit along each chunked dimension, fixed when the run began."""
    arrays: dict[str, zarr.Array]
    """The variables, with those of BOOKKEEPING."""


def repair_advice(path: Path) -> str:
    """How error messages end where a run is damaged."""
    return f"run `python -m sims repair {path}`, which removes what is damaged and says what will be computed anew"


def gone(path: Path) -> StoreError:
    """The error for a folder that is no longer there."""
    return StoreError(
        f"{path} was removed or moved while this command wrote to it; run the same command again, in a folder that "
        "stays."
    )


@contextlib.contextmanager
def disk(action: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StoreError` that says "cannot ``action`` ``path``", and what to do."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        todo = f"free some space and {AGAIN}" if full else "choose a folder that can be written"
        raise StoreError(f"cannot {action} {path} ({error}); {todo}.") from error


def blank(coords: Mapping[str, Any], variables: Mapping[str, Sequence[Any]]) -> xr.Dataset:
    """The template of a run: a labeled data set that takes no memory, whatever its size.

    ``coords`` are as for ``xarray.Dataset``; ``variables`` maps names to ``(dims, dtype)`` or ``(dims, dtype, attrs)``.
    Cells are NaN, or 0 or False where the dtype has no NaN. ``StoreError`` if a dimension has no coordinate.
    """
    template = xr.Dataset(coords=dict(coords))
    for name, (dimensions, dtype, *attrs) in variables.items():
        unknown = [dim for dim in dimensions if dim not in template.sizes]
        if unknown:
            raise StoreError(f"variable {name!r} has dimensions {unknown} without a coordinate; add them to coords.")
        shape = tuple(template.sizes[dim] for dim in dimensions)
        template[name] = xr.Variable(dimensions, np.broadcast_to(_fill(np.dtype(dtype)), shape), *attrs)
    return template


@contextlib.contextmanager
def layout(
    path: Path, template: xr.Dataset, chunks: Mapping[str, int], variables: Iterable[str], attrs: Mapping[str, str]
) -> Iterator[Path]:
    """A results store without chunks, in a temporary folder under ``path``, from which it is to be moved.

    It has the labels and variables of the template, those of BOOKKEEPING that are among ``variables`` over the chunked
    dimensions, and the attributes of the template and ``attrs``.
    """
    folder = path / ".layout"
    shutil.rmtree(folder, ignore_errors=True)
    names = set(variables)
    coords = template.coords.to_dataset().assign_attrs({**template.attrs, **attrs})
    # Zarr specifies only text of variable length.
    text = {name: label.astype(object) for name, label in coords.coords.items() if label.dtype.kind == "U"}
    made = {str(name): (array.dims, array.dtype, array.attrs) for name, array in template.data_vars.items()}
    made |= {name: (tuple(chunks), dtype, {}) for name, dtype in BOOKKEEPING.items() if name in names}
    try:
        coords.assign_coords(text).to_zarr(folder, zarr_format=3, consolidated=False)
        group = zarr.open_group(folder, mode="r+")
        for name, (dimensions, dtype, attributes) in made.items():
            group.create_array(
                name,
                shape=tuple(template.sizes[dim] for dim in dimensions),
                chunks=tuple(min(chunks.get(str(dim), sys.maxsize), template.sizes[dim]) for dim in dimensions),
                dtype=dtype,
                dimension_names=[str(dim) for dim in dimensions],
                serializer=BytesCodec(endian="little"),
                compressors=[Crc32cCodec()],
                fill_value=_fill(dtype).item(),
                attributes=attributes,
            )
        with warnings.catch_warnings():
            # Format 3 does not specify consolidated metadata yet, but plain open_zarr warns without them. They stay
            # valid because the layout never changes.
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            zarr.consolidate_metadata(str(folder))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digests(results: Path, variables: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every file of the layout (all but the chunks of ``variables``), by its path under ``results``."""
    chunks = tuple(f"{name}/c" for name in variables)
    names = sorted(file.relative_to(results).as_posix() for file in results.rglob("*") if file.is_file())
    return {name: _digest(results / name) for name in names if not name.startswith(chunks)}


def attach(
    path: Path,
    chunks: Mapping[str, int],
    variables: Iterable[str],
    files: Mapping[str, str],
    *,
    mode: Literal["r", "r+"],
) -> Run:
    """Open the results under ``path``. ``StoreError`` if a file of the layout does not match its digest in ``files``.

    Args:
        path: folder of the run.
        chunks: size of a unit along each chunked dimension.
        variables: names of the arrays, with those of BOOKKEEPING.
        files: digests (:func:`digests`) by path under the results.
        mode: ``r`` to read, ``r+`` to write.
    """
    results = path / RESULTS
    for name, digest in files.items():
        if digest_or_none(results / name) != digest:
            raise StoreError(f"{results / name} was changed, damaged or lost; {repair_advice(path)}.")
    # Otherwise a chunk of nothing but NaN would leave no file and look lost.
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(results, mode=mode, use_consolidated=False)
        return Run(path, dict(chunks), {name: cast(zarr.Array, group[name]) for name in variables})


def labels(run: Run) -> xr.Dataset:
    """The data set's coordinates and attributes, without its variables, in memory."""
    with xr.open_dataset(run.path / RESULTS, engine="zarr", chunks=None, consolidated=False) as stored:
        return stored.drop_vars(list(run.arrays)).load()


def dims(array: zarr.Array) -> tuple[str, ...]:
    """Names of an array's dimensions."""
    return tuple(cast(Any, array.metadata).dimension_names or ())


def units(run: Run) -> list[Region]:
    """All units, finished or not, in the order of the grid."""
    parts = [
        [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
        for size, chunk in zip(run.arrays["done"].shape, run.chunks.values(), strict=True)
    ]
    return [dict(zip(run.chunks, unit, strict=True)) for unit in itertools.product(*parts)]


def pending(run: Run) -> list[Region]:
    """Units that are not finished, in the order of the grid."""
    return [unit for unit in units(run) if not is_finished(run, unit)]


def finished(run: Run) -> list[Region]:
    """Units that are finished, in the order of the grid."""
    return [unit for unit in units(run) if is_finished(run, unit)]


def is_finished(run: Run, unit: Region) -> bool:
    """Whether this unit is finished."""
    return os.path.exists(_path(run, "done", unit))


def indices(array: zarr.Array, unit: Region) -> tuple[slice, ...]:
    """The indices of a unit in ``array``: a slice of every dimension."""
    return tuple(unit.get(dim, slice(0, size)) for dim, size in zip(dims(array), array.shape, strict=True))


def write_chunk(run: Run, unit: Region, arrays: Mapping[str, Any], *, wall_s: Any = math.nan) -> None:
    """Store one finished unit: its arrays, flushed to the disk, then its ``done`` flag.

    ``arrays`` has every variable of the template in the shape that ``template.isel(unit)`` gives it; ``wall_s`` is the
    time in seconds that the unit took, or that each of its cells took. ``StoreError`` if the unit is not pending, if
    names, shapes or dtypes differ from the template's, or if the disk refuses: this unit then stays pending, and
    finished ones stay finished.
    """
    values = {**_checked(run, unit, arrays), "wall_s": np.asarray(wall_s)}
    if not (run.path / RESULTS).is_dir():
        raise gone(run.path)
    try:
        with disk(f"write {shown(unit)} in", run.path):
            for name, value in values.items():
                run.arrays[name][indices(run.arrays[name], unit)] = value
            if "seal" in run.arrays:
                ends = {name: _file(run, name, unit).read_bytes()[-4:] for name in values}
                run.arrays["seal"][indices(run.arrays["seal"], unit)] = _seal(run, unit, ends)
            _flush(run, [name for name in run.arrays if name != "done"], unit)
            run.arrays["done"][indices(run.arrays["done"], unit)] = True
            _flush(run, ["done"], unit)
    except StoreError as error:
        raise error if run.path.exists() else gone(run.path) from error


def read_unit(run: Run, unit: Region) -> dict[str, np.ndarray]:
    """Values of a finished unit: of every variable, and ``wall_s`` and ``done``.

    ``StoreError`` that names the file if one is damaged, lost, or from another place.
    """
    values, ends = {}, {}
    for name in run.arrays:
        values[name], ends[name] = _read_chunk(run, name, unit)
    if "seal" in run.arrays:
        del ends["seal"], ends["done"]
        if (values.pop("seal") != _seal(run, unit, ends)).any():
            raise StoreError(f"files of {shown(unit)} in {run.path / RESULTS} come from other units or variables")
    return values


def remove_unit(run: Run, unit: Region) -> None:
    """Remove the files of a unit, its ``done`` flag first: it becomes pending."""
    for name in reversed(run.arrays):
        file = _file(run, name, unit)
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def shown(unit: Region) -> str:
    """A unit as text for messages, by the indices of its chunk."""
    parts = ", ".join(f"{dim}[{part.start}:{part.stop}]" for dim, part in unit.items())
    return f"chunk {parts}" if parts else "the only chunk"


def _fill(dtype: np.dtype) -> np.ndarray:
    return np.full((), np.nan if dtype.kind == "f" else 0, dtype)


def digest_or_none(file: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    return _digest(file) if file.is_file() else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _file(run: Run, name: str, unit: Region) -> Path:
    return Path(_path(run, name, unit))


def _path(run: Run, name: str, unit: Region) -> str:
    # Text, because a run of many units asks for hundreds of thousands: a Path takes ten times as long.
    return f"{run.path}/{RESULTS}/{name}/{_place(run, name, unit)}"


def _content(path: str) -> bytes:
    """The bytes of a regular file; none of anything else, a link for example."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "rb") as file:
                return file.read()
    except FileNotFoundError:
        pass
    return b""


def _read_chunk(run: Run, name: str, unit: Region) -> tuple[np.ndarray, bytes]:
    """Values of one variable in a finished unit, and the checksum at the end of its file."""
    # The checksum is that of zarr's codec, which could read the chunk too, but takes 15 times as long: half a
    # millisecond, for every unit and variable of a run each time that it is opened.
    array, file = run.arrays[name], _path(run, name, unit)
    raw = _content(file)
    body, checksum = raw[:-4], raw[-4:]
    whole = len(body) == math.prod(array.chunks) * array.dtype.itemsize
    if not whole or google_crc32c.value(body).to_bytes(4, "little") != checksum:
        raise StoreError(f"{file} is damaged or lost ({shown(unit)})")
    values = np.frombuffer(body, array.dtype.newbyteorder("<")).reshape(array.chunks)
    # The last chunk of a dimension is padded.
    return values[(*(slice(part.stop - part.start) for part in indices(array, unit)), ...)], checksum


def _seal(run: Run, unit: Region, checksums: Mapping[str, bytes]) -> int:
    parts = [f"{name}/{_place(run, name, unit)}:".encode() + checksums[name] for name in sorted(checksums)]
    return google_crc32c.value(b"".join(parts))


def _place(run: Run, name: str, unit: Region) -> str:
    array = run.arrays[name]
    place = tuple(unit[dim].start // run.chunks[dim] if dim in unit else 0 for dim in dims(array))
    return array.metadata.encode_chunk_key(place)


def _is_unit(run: Run, unit: Region) -> bool:
    sizes = dict(zip(run.chunks, run.arrays["done"].shape, strict=True))
    return unit.keys() == sizes.keys() and all(
        part.start in range(0, sizes[dim], run.chunks[dim])
        and part == slice(part.start, min(part.start + run.chunks[dim], sizes[dim]))
        for dim, part in unit.items()
    )


def _checked(run: Run, unit: Region, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not _is_unit(run, unit) or is_finished(run, unit):
        raise StoreError(f"{unit} is not pending in {run.path}; write each unit of pending(run) once.")
    wanted = [name for name in run.arrays if name not in BOOKKEEPING]
    if set(arrays) != set(wanted):
        raise StoreError(f"{shown(unit)} needs exactly the variables {wanted}, got {list(arrays)}.")
    values = {name: np.asarray(arrays[name]) for name in wanted}
    for name, value in values.items():
        array = run.arrays[name]
        shape = tuple(part.stop - part.start for part in indices(array, unit))
        if value.shape != shape or not np.can_cast(value.dtype, array.dtype, "same_kind"):
            raise StoreError(
                f"{name!r} of {shown(unit)} must have shape {shape} over {dims(array)} and dtype {array.dtype}, "
                f"got {value.shape} and {value.dtype}."
            )
    return values


def _flush(run: Run, names: Iterable[str], unit: Region) -> None:
    folders = set()
    for name in names:
        file, top = _file(run, name, unit), run.path / RESULTS / name
        folders |= {folder for folder in file.parents if folder.is_relative_to(top)}
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
    for folder in folders if os.name == "posix" else ():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
