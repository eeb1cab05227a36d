"""``python -m sims merge``: one run from the shards of a job array."""

from __future__ import annotations

import argparse
import pathlib

from sims.commands.summaries import write_summary
from sims.terminal import Bar

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "join the runs of sweeps with --shard into one"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folder and ``--quiet``."""
    parser.add_argument("out", metavar="DIR", type=pathlib.Path, help="the --out of the shards")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def run(args: argparse.Namespace) -> None:
    """Copy finished units; write and print the summary. ``ValueError`` if units are in no shard."""
    from sims import store
    from sims.sweeps import shards

    with Bar(args.quiet, "units") as bar:
        done, total = shards.merge(args.out, on_unit=bar.move)
    write_summary(args.out, *store.read(args.out), args.quiet)
    if done < total:
        raise ValueError(
            f"{total - done} of {total} units of work are in no shard yet; run the missing shards, or the sweep "
            f"itself with --out {args.out}, and merge again."
        )
