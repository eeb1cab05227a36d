"""A sweep as a job array: each job computes every N-th unit into a run of its own, and a merge joins these runs.

The run of job I of N is in ``OUT/shards/I-of-N``: an ordinary run of the whole spec, of which the job computes its own
units. Jobs do not communicate.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

from sims import store
from sims.flags import parse_shard
from sims.store.filling import Computed

__all__ = ["folder", "merge", "parse_shard"]


def folder(out: str | pathlib.Path, shard: tuple[int, int]) -> pathlib.Path:
    """The folder of a job's run."""
    return pathlib.Path(out) / "shards" / f"{shard[0]}-of-{shard[1]}"


def merge(out: str | pathlib.Path, *, on_unit: Callable[[int, int], None] | None = None) -> store.Progress:
    """Copy every finished unit of the runs in ``out``/shards into the run at ``out``; returns its progress.

    Units that ``out`` has already are left as they are, so this may be called repeatedly and while jobs run.
    ``ValueError`` if there are no shards, if they are of different experiments, or if a unit of theirs is damaged.
    """
    out = pathlib.Path(out)
    parts = sorted(path for path in (out / "shards").glob("*-of-*") if (path / store.SPEC).exists())
    if not parts:
        raise store.StoreError(f"{out / 'shards'} holds no shards; run the sweep with --shard I/N --out {out} first.")
    records = [store.read_spec(part) for part in parts]
    first = records[0]
    for part, record in zip(parts, records, strict=True):
        if record["spec"] != first["spec"]:
            raise store.StoreError(f"{part} and {parts[0]} hold different experiments; move one of them away.")
    template = store.template_of(parts[0])
    sessions = [session for record in records for session in record["sessions"]]
    provenance = {**store.environment(), "data": sessions[-1]["data"] if sessions else [], "shards": sessions}

    def copied(pending: list[store.Region]) -> Iterator[Computed]:
        sources = [store.load(part) for part in parts]
        for region in pending:
            found = (source.isel(region) for source in sources)
            unit = next((unit for unit in found if unit["done"].all()), None)
            if unit is not None:
                wall_s = float(unit["wall_s"].item())
                yield region, {str(name): unit[name].values for name in template.data_vars}, wall_s

    def report(done: int, total: int, region: store.Region | None) -> None:
        if on_unit is not None and region is not None:
            on_unit(done, total)

    with store.open_run(out, first["spec"], template, first["chunks"], provenance) as run:
        store.fill_units(run, copied, on_unit=report)
        return store.progress(run)
