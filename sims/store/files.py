"""Files that are either whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

__all__ = ["replace_file", "write_text"]


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Call ``write`` with a passing name, then put what it wrote in the place of ``path``.

    ``ValueError`` naming the file if it cannot be written.
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
    """Write ``text`` at once, in UTF-8."""

    def write(partial: pathlib.Path) -> None:
        partial.write_text(text, encoding="utf-8")

    replace_file(path, write)
