"""``python -m sims repair``: remove what is damaged in a run, so that its command computes it anew."""

from __future__ import annotations

import argparse

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "remove what is damaged in a run, and say what will be computed anew"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("run_dir", metavar="DIR", help="folder of a sweep, an extraction or a series")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")


def run(args: argparse.Namespace) -> None:
    """Repair the run and print what was found."""
    from sims.store.chunks import shown
    from sims.store.repair import repair

    found = repair(args.run_dir, dry_run=args.dry_run)
    removed = "would be removed" if args.dry_run else "removed"
    if found.record:
        print("The record could not be read; its copy in the results replaces it. Times of earlier sessions are lost.")
    for name in found.files:
        print(f"{removed}: {name}, which was changed or lost; the command that made the run restores it.")
    for unit, what in found.units:
        print(f"{removed}: {shown(unit)}: {what}.")
    if found.progress is None:
        print("Units were not checked yet: run the command that made the run, and repair again if it asks for it.")
    elif found.units:
        left = found.progress.total - found.progress.done + (len(found.units) if args.dry_run else 0)
        print(f"The command that made the run computes {left} of {found.progress.total} units.")
    else:
        print(f"No unit is damaged; {found.progress.done} of {found.progress.total} are finished.")
