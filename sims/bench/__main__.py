"""``python -m sims.bench``: what exact theory and mapped sweeps save beside the rival ways to the same numbers."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app
from absl.flags import argparse_flags

from sims.bench import store, sweeps, theory
from sims.bench.timing import Row, table, write_json
from sims.terminal import guarded

__all__ = ["GROUPS", "main"]

GROUPS: dict[str, dict[str, Callable[[int, bool], Row]]] = {
    "theory": theory.ROWS,
    "sweeps": sweeps.ROWS,
    "store": store.ROWS,
}
"""Benchmarks by group and name: functions of the number of repeats and of ``quick``."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    app.run(lambda args: args.run(args), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(
        prog="python -m sims.bench",
        description=f"{__doc__}\n\n{theory.__doc__}\n\n{sweeps.__doc__}\n\n{store.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = [*GROUPS, *(name for group in GROUPS.values() for name in group)]
    add(
        "--only",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        default=list(GROUPS),
        help=f"groups or names: {', '.join(names)} (default: all)",
    )
    add("--repeats", type=int, default=5, metavar="N", help="paired runs of the short rows, >= 1 (default: 5)")
    add("--quick", action="store_true", help="tiny sizes, which test the benchmark and time nothing")
    add("--json", metavar="FILE", type=pathlib.Path, help="write the rows to this file too")
    parser.set_defaults(run=guarded(_run))
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    with contextlib.suppress(RuntimeError):
        # If JAX has started already, its devices stay as they are.
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    every = {name: function for group in GROUPS.values() for name, function in group.items()}
    wanted = [name for group in args.only for name in GROUPS.get(group, [group])]
    unknown = [name for name in wanted if name not in every]
    if unknown:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; choose among {', '.join([*GROUPS, *every])}.")
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}.")
    rows = []
    for name in dict.fromkeys(wanted):
        rows.append(every[name](args.repeats, args.quick))
        sys.stdout.write(table(rows[-1:]) + "\n")
        sys.stdout.flush()
        if args.json:
            write_json(args.json, rows)


if __name__ == "__main__":
    main()
