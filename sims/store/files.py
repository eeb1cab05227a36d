"""Files that are either complete or absent: written under a temporary name, then moved."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["replace_file", "write_npz", "write_text"]


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Call ``write`` with a temporary path, then move that file to ``path``.

    ``ValueError`` that names the file if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a folder that can be written.") from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Write ``text`` in UTF-8; the file is complete or absent."""

    def write(partial: pathlib.Path) -> None:
        partial.write_text(text, encoding="utf-8")

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
