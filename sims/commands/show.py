"""``python -m sims show``: the summary of a run."""

from __future__ import annotations

import argparse

from sims.commands.summaries import summary_of

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "the summary of a run, finished or not"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("run_dir", metavar="DIR", help="folder of a sweep")


def run(args: argparse.Namespace) -> None:
    """Print the summary."""
    from sims import store

    print(summary_of(*store.read(args.run_dir)))
