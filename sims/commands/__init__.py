"""One module a command: ``SUMMARY``, ``add_flags(parser)`` and ``run(args)``."""
