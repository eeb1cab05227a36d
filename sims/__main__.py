"""``python -m sims``: sweeps, single runs and what they found."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, logging
from absl.flags import argparse_flags

from sims.commands import options as flags
from sims.presets import CERTIFY, DEMO
from sims.store.files import write_text
from sims.terminal import Bar, Log, guarded


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    logging.set_verbosity(logging.WARNING)
    app.run(lambda args: args.run(args), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(prog="python -m sims", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=guarded(run))
        return sub

    demo = command("demo", _sweep, "the phase diagram of the embedded digits: an n x sigma sweep, and its transition")
    demo.set_defaults(preset=DEMO)
    sweep = command("sweep", _sweep, "train and measure every combination of the axes")
    sweep.set_defaults(preset={})
    for sub in (demo, sweep):
        flags.add_spec_flags(sub)
        flags.add_measures_flag(sub)
        flags.add_sweep_flags(sub)
    flags.add_run_flags(demo, default_out="runs/demo")
    flags.add_run_flags(sweep)

    merge = command("merge", _merge, "join the runs of sweeps with --shard into one")
    merge.add_argument("out", metavar="DIR", type=pathlib.Path, help="the --out of the shards")
    merge.add_argument("--quiet", action="store_true", help="no progress bar and no summary")

    train = command("train", _train, "train one network (axes of one value), keep its weights and its course")
    flags.add_spec_flags(train)
    flags.add_measures_flag(train)
    flags.add_run_flags(train)

    transitions = command("transitions", _transitions, "where a measure of a run crosses a level, with intervals")
    transitions.add_argument("run_dir", metavar="DIR", help="folder of a sweep")
    transitions.add_argument("--measure", default="gap", help="a measure of the run (gap)")
    transitions.add_argument("--level", type=float, default=0.5, help="the level to cross (0.5)")
    transitions.add_argument("--along", default="num_samples", help="the axis to cross it on (num_samples)")
    transitions.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the rows there too")

    certify = command("certify", _certify, "what the theorems say of given data: conditions, regime and certificate")
    flags.add_data_flags(certify)
    certify.add_argument(
        "--max-size",
        type=int,
        default=1500,
        help="largest Hessian to diagonalize, in rows; beyond, Lanczos' method (1500)",
    )
    certify.add_argument("--out", metavar="DIR", required=True, type=pathlib.Path, help="certificate.json and .md")
    certify.add_argument("--quiet", action="store_true", help="print nothing")

    show = command("show", _show, "the summary of a run, finished or not")
    show.add_argument("run_dir", metavar="DIR", help="folder of a sweep")
    return parser.parse_args(argv[1:])


def _sweep(args: argparse.Namespace) -> None:
    from sims.sweeps import cluster, engine, plan, processes, shards

    spec = flags.spec_from_flags(args, **args.preset)
    _set_precision(spec.dtype)
    told = (args.coordinator, args.num_processes, args.process_id)
    if args.devices is not None:
        processes.split_cores(args.devices)
    if args.distributed or any(part is not None for part in told):
        first = processes.join(args.coordinator, num_processes=args.num_processes, process_id=args.process_id)[0] == 0
        args.quiet = args.quiet or not first
    if args.dry_run:
        found = plan.plan(spec, args.measures, memory=args.memory, group=args.group, shard=args.shard)
        if not args.quiet:
            print(plan.as_text(found), end="")
        return
    args.out = pathlib.Path(args.out) if args.shard is None else shards.folder(args.out, args.shard)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(args.quiet, "cells"))
        log = stack.enter_context(Log(args.log))
        executor = None
        if args.scheduler is not None or args.local_workers:
            workers = cluster.connected(
                args.scheduler, local_workers=args.local_workers, memory=args.memory, group=args.group
            )
            executor = stack.enter_context(workers)

        def on_unit(progress: engine.CellProgress) -> None:
            label = ", ".join(f"{axis} {value}" for axis, value in progress.unit.items())
            bar.move(progress.done, progress.total, label)
            log.write(f"{progress.done} of {progress.total} cells: {label or 'begin'}")

        results = engine.sweep(
            spec,
            args.measures,
            out=args.out,
            memory=args.memory,
            group=args.group,
            shard=args.shard,
            executor=executor,
            on_unit=on_unit,
        )
    if "done" in results:
        _summarize(args.out, args.quiet)


def _merge(args: argparse.Namespace) -> None:
    from sims.sweeps import shards

    with Bar(args.quiet, "units") as bar:
        done, total = shards.merge(args.out, on_unit=bar.move)
    _summarize(args.out, args.quiet)
    if done < total:
        raise ValueError(
            f"{total - done} of {total} units of work are in no shard yet; run the shards that are left, or the sweep "
            f"itself with --out {args.out}, and merge again."
        )


def _summarize(out: pathlib.Path, quiet: bool) -> None:
    from sims import store
    from sims.study import report

    record = store.read_spec(out)
    text = report.summary(store.load(out), record["spec"], _facts(record), record["sessions"])
    write_text(out / "summary.md", text)
    if not quiet:
        print(text)
        print(f"Written: {out}/results.zarr, {out}/spec.json, {out}/summary.md")


def _train(args: argparse.Namespace) -> None:
    from sims.sweeps import single

    spec = flags.spec_from_flags(args)
    _set_precision(spec.dtype)
    with Bar(args.quiet, "steps") as bar:
        rows = single.run(spec, args.measures, args.out, on_record=bar.move)
    if not args.quiet:
        for name, value in rows[-1].items():
            print(f"{name:34s} {value:.6g}")
        print(f"Written: {args.out}/weights.safetensors, {args.out}/course.json, {args.out}/spec.json")


def _transitions(args: argparse.Namespace) -> None:
    import json

    from sims import store
    from sims.study import report

    rows = report.transition_table(store.load(args.run_dir), measure=args.measure, level=args.level, along=args.along)
    print("\t".join(rows[0]))
    for row in rows:
        print("\t".join(f"{value:.6g}" for value in row.values()))
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))


def _certify(args: argparse.Namespace) -> None:
    import json

    spec = flags.spec_from_flags(args, **CERTIFY)
    _set_precision("float64")
    from sims.study import certification

    found = certification.certification(spec, max_size=args.max_size)
    text = certification.as_text(found)
    write_text(args.out / "certificate.json", json.dumps(found, indent=1) + "\n")
    write_text(args.out / "certificate.md", text)
    if not args.quiet:
        print(text)
        print(f"Written: {args.out}/certificate.json, {args.out}/certificate.md")


def _show(args: argparse.Namespace) -> None:
    from sims import store
    from sims.study import report

    record = store.read_spec(args.run_dir)
    print(report.summary(store.load(args.run_dir), record["spec"], _facts(record), record["sessions"]))


def _facts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What the last session recorded of the data; nothing where the record was lost and made anew."""
    return record["sessions"][-1]["data"] if record["sessions"] else []


def _set_precision(dtype: str) -> None:
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


if __name__ == "__main__":
    main()
