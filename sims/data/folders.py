"""What a folder of data holds, without hidden files and those of file managers and operating systems; names of sources.

Imports no arrays, so that command lines start fast.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["cifar10_folder", "image_files", "legible", "natural_order", "printable", "visible_files", "with_options"]

SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
)
"""Names that systems leave in folders; those with a leading dot are hidden anyway."""

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
"""Endings of images' names."""


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder``, in order of name, except what is hidden or belongs to the system.

    A file is left out if its name, or that of a folder between, begins with a dot (``.ipynb_checkpoints``,
    ``.Trash-1000``, ``._photo.png``) or is in :data:`SYSTEM`.
    """

    def is_visible(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(part.startswith(".") or part in SYSTEM for part in parts)

    return sorted(path for path in folder.rglob("*") if is_visible(path) and not path.is_dir())


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder, in order of name, and the class of each: the inner folder that it is in, or none ("").

    ``ValueError`` if there are no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images.")
    files = [file for file in visible_files(folder) if file.suffix.lower() in ENDINGS]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(ENDINGS))}).")
    return files, [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]


def cifar10_folder(path: Path, batch: str) -> Path:
    """The folder below ``path`` with the batches of CIFAR-10, binary version."""
    files = visible_files(path)
    found = sorted({file.parent for file in files if file.name == batch})
    if len(found) > 1:
        raise ValueError(f"{path} has {batch} in several folders: {', '.join(map(str, found))}; name one of them.")
    if not found and any(file.name == batch.removesuffix(".bin") for file in files):
        raise ValueError(
            f"{path} holds CIFAR-10 as Python pickles, which can run any code and are not read. Get the binary version "
            "(cifar-10-binary.tar.gz), from the page where this one is offered."
        )
    return found[0] if found else path


def with_options(name: str, **options: str | bool) -> str:
    """The name of a source with the options that are not empty or False, unless it gives them already.

    >>> with_options("images:photos?resize=32", color="gray", skip_bad=True)
    'images:photos?resize=32&color=gray&skip_bad=1'
    """
    path, question, given = name.partition("?")
    keys = {part.partition("=")[0] for part in given.split("&")}
    new = {key: "1" if value is True else value for key, value in options.items() if value and key not in keys}
    added = "&".join([*filter(None, [given]), *(f"{key}={value}" for key, value in new.items())])
    return f"{path}?{added}" if added else f"{path}{question}"


@contextlib.contextmanager
def legible() -> Iterator[None]:
    """Errors of the body, or of a decorated function, with the control characters of file names escaped."""
    try:
        yield
    except ValueError as error:
        text = printable(error)
        if text == str(error):
            raise
        raise ValueError(text) from error


def printable(text: object) -> str:
    r"""The text in one line, with control characters escaped: names of files may hold commands to a terminal.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _decoded(str(text)))


def _decoded(text: str) -> str:
    # Bytes of a file's name that are not UTF-8 are surrogates, which cannot be printed.
    return text.encode("utf-8", "backslashreplace").decode()


def natural_order(names: Iterable[str]) -> list[int]:
    """The order in which people count: ``2.png`` before ``10.png``, as indices into ``names``."""

    def key(name: str) -> list[Any]:
        parts = re.split(r"(\d+)", name)
        # Odd places hold digits; the text itself decides between 1 and 01.
        return [[int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], name]

    keys = [key(name) for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)
