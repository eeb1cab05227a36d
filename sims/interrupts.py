"""Ctrl-C in the first seconds, while modules are imported: one line and exit code 130, no traceback.

A module that was imported by half cannot be used, nor its import be caught: NumPy's and JAX's turn an interrupt into
other errors, or crash. So an interrupt in the middle of an import ends the program at once, as a kill would; anywhere
else it is Python's usual ``KeyboardInterrupt``.
"""

import os
import signal
from types import FrameType

__all__ = ["INTERRUPTED", "end_quietly_during_imports", "ignore_from_here"]

INTERRUPTED = 130
"""The exit code of an interrupted program."""


def end_quietly_during_imports() -> None:
    """Install the handler; for programs alone, first of all. An ignored interrupt stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)


def ignore_from_here() -> None:
    """Ignore interrupts: everything is written, and what is left is to exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\ninterrupted while modules were loaded; the same command again begins or resumes.\n")
            os._exit(INTERRUPTED)
        at = at.f_back
    signal.default_int_handler(number, frame)
