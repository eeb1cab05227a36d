"""``python -m sims``: sweeps, single runs, and what they show."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sims.commands import COMMANDS
from sims.terminal import parse_command, run_commands

__all__ = ["main"]

ARGUMENTS = ("python -m sims", __doc__, "sims.commands", COMMANDS)


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    run_commands(*ARGUMENTS)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_command(argv[1:], *ARGUMENTS)


if __name__ == "__main__":
    main()
