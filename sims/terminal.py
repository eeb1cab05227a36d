"""What command lines share: exit codes, and a progress bar."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import sys
from collections.abc import Callable

from tqdm import tqdm

__all__ = ["Bar", "Log", "guarded"]


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


class Log:
    """Lines with the time, appended to a file; none without a file. ``ValueError`` if it cannot be written."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path = path

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.write("finished" if error is None else f"ended: {type(error).__name__} {error}".rstrip())

    def write(self, line: str) -> None:
        """Append one line."""
        if self._path is None:
            return
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{stamp} {line}\n")
        except OSError as error:
            raise ValueError(f"cannot write the log {self._path}: {error.strerror}; choose another file.") from error
