"""``python -m sims sweep``: train and measure every combination of a spec's axes."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from typing import TYPE_CHECKING, Any

from sims.commands import options
from sims.commands.summaries import write_summary
from sims.terminal import Bar, Log, tell

if TYPE_CHECKING:
    from sims.sweeps.spec import Spec

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "train and measure every combination of the axes"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sweep."""
    options.add_spec_flags(parser)
    options.add_measures_flag(parser)
    options.add_sweep_flags(parser)
    options.add_run_flags(parser)


def run(args: argparse.Namespace, **defaults: Any) -> None:
    """Compute the sweep, or estimate it (``--dry-run``); write and print its summary. ``defaults`` are of the spec."""
    from sims.store.files import claim_run

    if not args.dry_run and args.shard is None:
        claim_run(args.out)
    from sims.sweeps import processes

    spec, measures = options.spec_from_flags(args, **defaults), options.measures_from_flags(args)
    options.set_precision(spec.dtype)
    if args.devices is not None:
        processes.split_cores(args.devices)
    if args.distributed or any(one is not None for one in (args.coordinator, args.num_processes, args.process_id)):
        company = processes.join(
            args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
            wait=args.wait,
            told=tell(args.quiet),
        )
        args.quiet = args.quiet or company.number > 0
        with processes.together(company):
            _compute(args, spec, measures)
        return
    _compute(args, spec, measures)


def _compute(args: argparse.Namespace, spec: Spec, measures: list[str]) -> None:
    from sims import store
    from sims.sweeps import cluster, engine, plan, shards

    if args.dry_run:
        estimate = plan.plan(
            spec, measures, memory=args.memory, group=args.group, shard=args.shard, told=tell(args.quiet)
        )
        if not args.quiet:
            print(plan.as_text(estimate), end="")
        return
    args.out = pathlib.Path(args.out) if args.shard is None else shards.folder(args.out, args.shard)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(args.quiet, "cells"))
        log = stack.enter_context(Log(args.log))
        executor = None
        if args.scheduler is not None or args.local_workers:
            executor = stack.enter_context(
                cluster.connected(
                    args.scheduler,
                    local_workers=args.local_workers,
                    memory=args.memory,
                    group=args.group,
                    wait=args.wait,
                    told=tell(args.quiet),
                )
            )

        def on_unit(progress: engine.CellProgress) -> None:
            label = ", ".join(f"{axis} {value}" for axis, value in progress.unit.items() if value != "")
            bar.move(progress.done, progress.total, label)
            log.write(f"{progress.done} of {progress.total} cells: {label or 'begin'}")

        results = engine.sweep(
            spec,
            measures,
            out=args.out,
            memory=args.memory,
            group=args.group,
            shard=args.shard,
            executor=executor,
            on_unit=on_unit,
        )
    # Of several processes only the first has a run.
    if "done" in results:
        write_summary(args.out, results, store.read_spec(args.out), args.quiet)
