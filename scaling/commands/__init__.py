"""One module per command: ``SUMMARY``, ``add_flags(parser)`` and ``run(args)``, which imports what takes long."""

COMMANDS = (
    "inspect",
    "extract",
    "sample",
    "jacobian",
    "detect",
    "ablate",
    "stress",
    "audit",
    "train",
    "transition",
    "duplication",
    "zoo",
)
"""In the order of ``python -m scaling --help``."""
