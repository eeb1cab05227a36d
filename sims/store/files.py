"""Files that are either complete or absent: written under a temporary name, then moved; and folders of one run.

Settings and records are read by :func:`read_json`, which bounds size, depth and type of what it reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError

__all__ = [
    "claim_run",
    "own_folder",
    "parse_json",
    "read_json",
    "read_small",
    "refuse_links",
    "replace_file",
    "write_bytes",
    "write_npz",
    "write_text",
]

MAX_BYTES = 1 << 24
"""Of a file of settings or text."""


def own_folder(folder: pathlib.Path, records: Collection[str], *, beside: Collection[str] = ()) -> bool:
    """Whether ``folder`` holds one of the files ``records``, by which its run can be identified.

    ``ValueError`` if it holds none of them, but other files; a lock, temporary files of the records and names of
    ``beside`` do not count. ``ValueError`` also for symbolic links below it (:func:`refuse_links`).
    """
    refuse_links(folder)
    if any((folder / name).exists() for name in records):
        return True
    ignored = {".lock", *beside, *(partial.name for name in records for partial in _partials(folder / name))}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ignored) if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds other files ({', '.join(others[:3])}): choose another folder.")
    return False


def claim_run(folder: str | os.PathLike[str]) -> None:
    """``ValueError`` if ``folder`` holds files but no run of a store; quick, before data are read and JAX is loaded.

    Whether a run there is the same one is known only when it is opened.
    """
    # Shards lie below the run that joins them; a killed process leaves the temporary layout.
    own_folder(pathlib.Path(folder), ("spec.json", "results.zarr"), beside=("shards", ".layout", ".packed"))


def refuse_links(folder: pathlib.Path) -> None:
    """``ValueError`` if there is a symbolic link below ``folder``: writing through it would change files elsewhere."""
    waiting = [os.fspath(folder)] if folder.is_dir() else []
    while waiting:
        # A folder may go away meanwhile: the temporary one of another process.
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            # What kind an entry is comes with its name: no file of a large run is asked for.
            for entry in entries:
                if entry.is_symlink():
                    raise ValueError(
                        f"{entry.path} is a symbolic link: nothing is written through links; move it out of {folder}."
                    )
                if entry.is_dir():
                    waiting.append(entry.path)


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Call ``write`` with a temporary path, then move that file to ``path``.

    Temporary files are removed on failure, and those of a killed process before writing. ``ValueError`` that names the
    file and the cause if it cannot be written.
    """
    partials = _partials(path)
    partial = partials[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partials)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        # Errors of Pillow and safetensors have no number.
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in cause
        todo = "free some space and run the same command again" if full else "choose a folder that can be written"
        raise ValueError(f"cannot write {path}: {cause}; {todo}.") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(partials)


def _partials(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The temporary file beside ``path``, and that of a writer that itself moves a complete file into place."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.partial.partial")


def _remove(files: Collection[pathlib.Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write ``text`` in UTF-8; the file is complete or absent."""

    def write(partial: pathlib.Path) -> None:
        partial.write_text(text, encoding="utf-8")

    replace_file(path, write)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write ``data``; the file is complete or absent."""

    def write(partial: pathlib.Path) -> None:
        partial.write_bytes(data)

    replace_file(path, write)


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any], *, compress: bool = False) -> None:
    """Write named arrays as one ``.npz`` file that can be read without pickle; text is stored as text.

    ``ValueError`` for arrays of other Python objects, or if the file cannot be written.
    """
    plain: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    # NumPy would pickle arrays of objects and of strings of variable length (kind T): they become arrays of characters.
    plain = {name: np.asarray(value.tolist()) if value.dtype.kind in "OT" else value for name, value in plain.items()}
    unsafe = [name for name, value in plain.items() if value.dtype == object]
    if unsafe:
        raise ValueError(f"{', '.join(unsafe)}: only numbers and text can be stored in {path}, not Python objects.")

    def write(partial: pathlib.Path) -> None:
        with partial.open("wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **plain)

    replace_file(path, write)


def read_small(path: pathlib.Path) -> bytes:
    """The bytes of a regular file of at most 16 MiB; ``ValueError`` that names it for anything else.

    A pipe or a device would never end, or never begin.
    """
    try:
        if not path.is_file():
            kind = "no regular file" if path.exists() else "no such file"
            raise ValueError(f"{path}: {kind}.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path}: {size} bytes are too many for a file of settings (limit {MAX_BYTES}).")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)[:300]!r}: {error.strerror}.") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a small file (:func:`read_small`); ``ValueError`` for anything else, and for repeated keys."""
    return parse_json(read_small(path), str(path))


def parse_json(text: bytes | str, origin: str) -> dict[str, Any]:
    """A JSON object from text, with or without a byte-order mark; ``ValueError`` that names ``origin`` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise ValueError("a key appears twice")
        return fields

    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{origin}: not valid JSON: nested too deep.") from None
    except ValueError as error:
        raise ValueError(f"{origin}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: must be a JSON object, got {type(value).__name__}.")
    return value
