"""``python -m sims transitions``: where a measure of a run crosses a level."""

from __future__ import annotations

import argparse
import json
import math
import pathlib

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "where a measure of a run crosses a level, with intervals"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the measure, the level and the axis."""
    add = parser.add_argument
    add("run_dir", metavar="DIR", help="folder of a sweep")
    add("--measure", default="gap", metavar="NAME", help="a measure of the run (default: gap)")
    add("--level", type=float, default=0.5, metavar="L", help="the level to cross (default: 0.5)")
    add(
        "--along", default="num_samples", metavar="AXIS", help="the axis along which to cross it (default: num_samples)"
    )
    add("--json", metavar="FILE", type=pathlib.Path, help="write the rows to this file too")


def run(args: argparse.Namespace) -> None:
    """Print a table, tabs between its columns, a row for each combination of the other axes."""
    from sims import store
    from sims.store.files import write_text
    from sims.study import report

    rows = report.transition_table(store.load(args.run_dir), measure=args.measure, level=args.level, along=args.along)
    print("\t".join(rows[0]))
    for row in rows:
        print("\t".join(value if isinstance(value, str) else f"{value:.6g}" for value in row.values()))
    if args.json:
        # JSON has neither NaN nor infinity.
        plain = [{name: value if _is_plain(value) else None for name, value in row.items()} for row in rows]
        write_text(args.json, json.dumps(plain, indent=1))


def _is_plain(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
