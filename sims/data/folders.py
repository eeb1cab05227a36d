"""What a folder of data holds, without hidden files and those of file managers and operating systems; names of sources.

Imports no arrays, so that command lines start fast.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "KINDS",
    "cifar10_folder",
    "image_files",
    "kind_of",
    "legible",
    "natural_order",
    "printable",
    "split_name",
    "visible_files",
    "with_options",
]

SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
)
"""Names that systems leave in folders; those with a leading dot are hidden anyway."""

WITHOUT_PATH = ("digits", "mnist5k", "faces", "mixture")
KINDS = (*WITHOUT_PATH, "idx", "cifar10", "npy", "npz", "images", "patches")
"""Kinds of sources, as in the names of :mod:`sims.data.readers`."""

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


def split_name(name: str) -> tuple[str, str, str]:
    """The kind, the path and the options of the source called ``name``; some, such as ``digits``, have no path.

    ``ValueError`` if there is no such path, or if its kind is not recognized.
    """
    kind, colon, what = name.partition(":")
    if kind in WITHOUT_PATH:
        return kind, "", what
    kind = kind if colon and kind in KINDS else ""
    path, options = (what if kind else name), ""
    if "?" in path and not Path(path).exists():
        path, _, options = path.rpartition("?")
    if not path or not Path(path).exists():
        raise ValueError(f"there is no {path!r}; a data set is a path, or one of {', '.join(KINDS)} as in images:PATH.")
    return kind or kind_of(Path(path)), path, options


def kind_of(path: Path) -> str:
    """The kind in :data:`KINDS` of the file or folder ``path``; ``ValueError`` if it is not recognized."""
    if path.is_dir():
        names = {file.name for file in visible_files(path)}
        if any(fnmatch.fnmatch(name, "*images*idx3*") for name in names):
            return "idx"
        return "cifar10" if names & {"data_batch_1.bin", "data_batch_1"} else "images"
    if path.suffix in (".npy", ".npz"):
        return path.suffix[1:]
    if "idx3" in path.name:
        return "idx"
    if path.suffix == ".bin":
        return "cifar10"
    raise ValueError(f"cannot recognize {path}; name its kind, as in npy:{path}. Kinds are {', '.join(KINDS)}.")


def with_options(name: str, **options: str | bool) -> str:
    """The name of a folder of images, or of their patches, with these options; empty ones and False are left out.

    ``ValueError`` for another source, and if the name gives an option another value.

    >>> with_options("images:.?resize=32", color="gray", skip_bad=True)
    'images:.?resize=32&color=gray&skip_bad=1'
    """
    new = {key: "1" if value is True else value for key, value in options.items() if value}
    if not new:
        return name
    kind, path, given = split_name(name)
    if kind not in ("images", "patches"):
        raise ValueError(f"{name} is no folder of images: omit {' and '.join(new)}.")
    for part in filter(None, given.split("&")):
        key, _, value = part.partition("=")
        if new.pop(key, value) != value:
            raise ValueError(f"{name} gives {part}, which contradicts {key}={options[key]}; leave out one of them.")
    return f"{kind}:{path}?{'&'.join([*filter(None, [given]), *(f'{key}={value}' for key, value in new.items())])}"


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
