"""One module for each command: ``SUMMARY``, ``add_flags(parser)`` and ``run(args)``, which imports what is heavy."""

__all__ = ["COMMANDS"]

COMMANDS = ("demo", "sweep", "merge", "train", "transitions", "certify", "ask", "show", "repair")
"""In the order of ``--help``."""
