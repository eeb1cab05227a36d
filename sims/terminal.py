"""What command lines share: the loop over commands, exit codes, a progress bar and a log file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from absl import app, logging
from absl.flags import argparse_flags
from tqdm import tqdm

from sims.interrupts import INTERRUPTED, ignore_from_here

__all__ = [
    "Bar",
    "Log",
    "OverLimitError",
    "UselessResultError",
    "guarded",
    "parse_command",
    "repair_streams",
    "run_commands",
    "run_program",
    "tell",
]


class UselessResultError(Exception):
    """A command has finished and written its files, but some of what they hold is of no use: exit code 1."""


class OverLimitError(Exception):
    """A command has finished, and what it measured lies above the limit that the caller set: exit code 3."""


def run_commands(
    prog: str, doc: str | None, package: str, commands: Iterable[str], *, before: Callable[[], None] | None = None
) -> None:
    """Run the command line of ``package`` and exit: 0 done, 1 done but of no use, 2 bad input, 3 above a limit, 130
    interrupted.

    Each of ``commands`` is a module of ``package`` with ``SUMMARY`` (one line), ``add_flags(parser)`` and
    ``run(args)``. What takes long to import belongs inside ``run``, so that ``--help`` and a mistyped flag answer at
    once. ``before`` is called after parsing, before the command runs.
    """

    def run(args: argparse.Namespace) -> int:
        if before is not None:
            before()
        return args.run(args)

    run_program(run, lambda argv: parse_command(argv[1:], prog, doc, package, commands))


def run_program(
    run: Callable[[argparse.Namespace], int], parse: Callable[[Sequence[str]], argparse.Namespace]
) -> NoReturn:
    """Parse the command line, call ``run`` with it and exit with the code that it returns; 130 if interrupted.

    JAX, which is loaded later, and the processes started from here compute products in full single precision, where
    accelerators would round to TF32 or bfloat16, unless ``JAX_DEFAULT_MATMUL_PRECISION`` is set to something else.
    """
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    logging.set_verbosity(logging.WARNING)
    repair_streams()

    def last(args: argparse.Namespace) -> int:
        code = run(args)
        ignore_from_here()
        return code

    try:
        app.run(last, flags_parser=parse)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted.\n")
        sys.exit(INTERRUPTED)
    raise AssertionError("app.run exits")


def repair_streams() -> None:
    """Let no output fail: characters that the terminal's encoding lacks are escaped, closed streams lead nowhere."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Else the next file that is opened would take the place of the stream, and libraries would write to it.
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parse_command(
    argv: Sequence[str], prog: str, doc: str | None, package: str, commands: Iterable[str]
) -> argparse.Namespace:
    """Parse a command and its flags; ``args.run(args)`` of the result runs it and returns the exit code."""
    parser = argparse_flags.ArgumentParser(prog=prog, description=doc, allow_abbrev=False)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in commands:
        module = importlib.import_module(f"{package}.{name}")
        sub = choices.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        module.add_flags(sub)
        sub.set_defaults(run=guarded(module.run))
    return parser.parse_args(argv)


def guarded(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """Turn bad input into a message and exit code 2, useless results into 1, limits into 3, an interrupt into 130."""

    def shielded(args: argparse.Namespace) -> int:
        try:
            run(args)
            # Here and not at exit, where what fails would be a traceback.
            sys.stdout.flush()
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        except UselessResultError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        except OverLimitError as error:
            sys.stderr.write(f"error: {error}\n")
            return 3
        except BrokenPipeError:
            # The reader (head, less) has closed the pipe.
            _drop_output()
        except OSError as error:
            # What the system refuses and no reader has put into words: names that are too long, files that vanish, a
            # full disk below the standard output.
            name = f"{error.filename}: " if error.filename is not None else ""
            sys.stderr.write(f"error: {name}{error.strerror or error}\n")
            _drop_output()
            return 2
        except KeyboardInterrupt:
            finished = f"; finished cells are in {args.out}" if getattr(args, "out", None) else ""
            sys.stderr.write(f"\ninterrupted{finished}. The same command again resumes.\n")
            return INTERRUPTED
        return 0

    return shielded


def _drop_output() -> None:
    """Send what the standard output still holds, if it cannot be written, nowhere: Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(quiet: bool) -> Callable[[str], None]:
    """A function that writes a line to the standard error, or nothing if ``quiet``."""

    def write(line: str) -> None:
        if not quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    return write


class Bar:
    """A progress bar whose total becomes known when work begins."""

    def __init__(self, quiet: bool, unit: str) -> None:
        self._bar = tqdm(disable=quiet, unit=f" {unit}", dynamic_ncols=True)
        self._begun: int | None = None
        self._compiled = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def move(self, done: int, total: int, label: str = "") -> None:
        """Show ``done`` of ``total``."""
        if self._bar.total is None:
            # What an earlier run finished must not count in the rate.
            self._restart(done, total)
        self._bar.set_postfix_str(label, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._begun is None:
            self._begun = done
        elif done > self._begun and not self._compiled:
            # The first work contains compilation, of which the rest has little: the time left is told by the rest.
            self._compiled = True
            self._restart(done, total)

    def _restart(self, done: int, total: int) -> None:
        self._bar.reset(total=total)
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.refresh()


class Log:
    """Appends lines with the time to a file; does nothing without a file. ``ValueError`` if it cannot be written."""

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
