"""What command lines share: exit codes, and a progress bar."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from tqdm import tqdm

__all__ = ["Bar", "guarded"]


def guarded(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """Turn bad input into a message and exit code 2, an interrupt into 130."""

    def shielded(args: argparse.Namespace) -> int:
        try:
            run(args)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        except BrokenPipeError:
            # The reader (head, less) has seen enough; Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            kept = f"; finished cells are in {args.out}" if getattr(args, "out", None) else ""
            sys.stderr.write(f"\ninterrupted{kept}. The same command again resumes.\n")
            return 130
        return 0

    return shielded


class Bar:
    """A progress bar that knows its total only when work begins."""

    def __init__(self, quiet: bool, unit: str) -> None:
        self._bar = tqdm(disable=quiet, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def move(self, done: int, total: int, label: str = "") -> None:
        """Stand at ``done`` of ``total``."""
        if self._bar.total is None:
            # What an earlier run finished must not count in the rate.
            self._bar.reset(total=total)
            self._bar.initial = done
        self._bar.set_postfix_str(label, refresh=False)
        self._bar.update(done - self._bar.n)
