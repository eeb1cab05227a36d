"""A folder with one writer at a time, which notices when it is taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from sims.store.chunks import StoreError, disk, gone
from sims.store.files import refuse_links

__all__ = ["locked"]

LOCK = ".lock"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Hold the folder ``path``, created if needed, as its only writer; a killed process releases it.

    What it yields is to be called before each write: ``StoreError`` if the folder has been removed or moved meanwhile,
    which a write would create again, with a part of a run in it.
    ``StoreError`` if another process holds it, if it cannot be written, or if there is a symbolic link below it:
    through it, files elsewhere would be written or removed.
    """
    with disk("write in", path):
        refuse_links(path)
    lock = filelock.FileLock(path / LOCK, timeout=0)
    with disk("write in", path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise StoreError(f"another process is writing in {path}; wait for it, or choose another folder.") from None
    place = _place(path)

    def check() -> None:
        if _place(path) != place:
            raise gone(path)

    try:
        yield check
    finally:
        lock.release()


def _place(path: Path) -> tuple[int, int] | None:
    """What the folder is to the system, whatever its name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
