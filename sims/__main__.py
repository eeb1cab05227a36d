"""``python -m sims``: sweeps, single runs, and what they show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sims.interrupts import end_quietly_during_imports

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit: 0 done, 1 done but of no use, 2 bad input, 130 interrupted."""
    end_quietly_during_imports()
    from sims.terminal import run_commands

    run_commands(*_arguments())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from sims.terminal import parse_command

    return parse_command(argv[1:], *_arguments())


def _arguments() -> tuple[Any, ...]:
    from sims.commands import COMMANDS

    return "python -m sims", __doc__, "sims.commands", COMMANDS


if __name__ == "__main__":
    main()
