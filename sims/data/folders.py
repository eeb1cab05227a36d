"""What a folder of data holds, without hidden files and those of file managers and operating systems."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["natural_order", "visible_files"]

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
