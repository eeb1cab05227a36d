"""What a folder of data holds, without hidden files and those of file managers and operating systems."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["cifar10_folder", "image_files", "natural_order", "visible_files"]

SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
)
"""Names that systems leave in folders; those with a leading dot are hidden anyway."""


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder``, in order of name, except what is hidden or belongs to the system.

    A file is left out if its name, or that of a folder between, begins with a dot (``.ipynb_checkpoints``,
    ``.Trash-1000``, ``._photo.png``) or is in :data:`SYSTEM`.
    """

    def is_visible(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(part.startswith(".") or part in SYSTEM for part in parts)

    return sorted(path for path in folder.rglob("*") if is_visible(path) and not path.is_dir())


def natural_order(names: Iterable[str]) -> list[int]:
    """The order in which people count: ``2.png`` before ``10.png``, as indices into ``names``."""

    def key(name: str) -> list[Any]:
        parts = re.split(r"(\d+)", name)
        # Odd places hold digits; the text itself decides between 1 and 01.
        return [[int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], name]

    keys = [key(name) for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)


def image_files(path: Path) -> tuple[list[Path], np.ndarray]:
    """The images in a folder, in order of name, and the class of each; hidden files and folders are none."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder of images.")
    endings = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
    files = [file for file in visible_files(path) if file.suffix.lower() in endings]
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(endings))}).")
    folders = [file.relative_to(path).parts[0] if file.parent != path else None for file in files]
    names = sorted({folder for folder in folders if folder is not None})
    return files, np.array([-1 if folder is None else names.index(folder) for folder in folders])


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
