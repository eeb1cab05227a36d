"""Mend a damaged run: what cannot be read is removed, so that the command that made the run computes it anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from sims.store import chunks as on_disk
from sims.store.chunks import RESULTS, Region, Run, StoreError
from sims.store.files import write_text
from sims.store.locking import locked
from sims.store.reading import SPEC, attached, in_use, origin_of, put_back, read_spec, restored, settle
from sims.store.run import Progress, progress

__all__ = ["Repair", "repair"]


class Repair(NamedTuple):
    """What :func:`repair` found."""

    record: str
    """Why the record was replaced by the copy in the results, which has no sessions; empty if it was not."""
    files: list[str]
    """Damaged or lost files of the layout; the command that made the run restores them."""
    units: list[tuple[Region, str]]
    """Damaged units, each with what is wrong; they are computed anew."""
    progress: Progress | None
    """Progress of the run afterwards; None while its layout is incomplete: units were not checked then."""


def repair(out: str | os.PathLike[str], *, dry_run: bool = False) -> Repair:
    """Remove what is damaged in the run at ``out``, or only say what would be removed (``dry_run``).

    A record that cannot be read is replaced by the copy in the results. Files of the layout that do not match their
    digests are removed; the command that made the run restores them. Units are checked only once the layout is whole.
    ``StoreError`` if the folder holds no run, or nothing that can be mended.

    >>> import tempfile
    >>> from sims import store
    >>> template = store.blank({"n": [2, 4]}, {"gap": (("n",), float)})
    >>> with tempfile.TemporaryDirectory() as out:
    ...     with store.open_run(out, {"name": "example"}, template, {"n": 1}) as run:
    ...         for unit in store.pending(run):
    ...             store.write_chunk(run, unit, {"gap": [0.5]})
    ...     _ = Path(out, "results.zarr", "gap", "c", "1").write_bytes(b"damaged")
    ...     found = repair(out)
    >>> [unit for unit, _ in found.units], found.progress
    ([{'n': slice(1, 2, None)}], Progress(done=1, total=2))
    """
    path = Path(out)
    settle(path)
    if not (path / RESULTS).is_dir():
        raise StoreError(f"{path} holds no run: there is no {path / RESULTS}; name the folder that a run was given.")
    with locked(path):
        put_back(path)
        record, reason = _record(path)
        if reason and not dry_run:
            write_text(path / SPEC, json.dumps(record, indent=1))
        whole = on_disk.digests(path / RESULTS, record["variables"])
        files = [name for name, digest in in_use(path, record)["files"].items() if whole.get(name) != digest]
        if files or (reason and dry_run):
            for name in files if not dry_run else ():
                (path / RESULTS / name).unlink(missing_ok=True)
            return Repair(reason, files, [], None)
        run = attached(path)
        units = _damaged(run)
        for unit, _ in units if not dry_run else ():
            on_disk.remove_unit(run, unit)
        return Repair(reason, files, units, progress(run))


def _record(path: Path) -> tuple[dict, str]:
    """The record of the run, and why it is not the one in its file."""
    try:
        return read_spec(path), ""
    except StoreError as error:
        origin = origin_of(path)
        if origin is None:
            raise StoreError(
                f"neither {path / SPEC} nor its copy in {path / RESULTS} can be read: move {path} away, and run the "
                "command that made it again."
            ) from error
        return restored(path, origin), str(error)


def _damaged(run: Run) -> list[tuple[Region, str]]:
    """The finished units that cannot be read, each with what is wrong."""
    bad: list[tuple[Region, str]] = []
    for unit in on_disk.finished(run):
        try:
            on_disk.read_unit(run, unit)
        except StoreError as error:
            bad.append((unit, str(error)))
    return bad
