"""``python -m scaling`` in this process."""

from scaling.commands import COMMANDS
from sims.terminal import parse_command


def parse(*argv):
    """The parsed command line; ``parse(...).run`` runs it."""
    return parse_command([str(part) for part in argv], "python -m scaling", None, "scaling.commands", COMMANDS)


def run(*argv):
    """The exit code of a command."""
    args = parse(*argv)
    return args.run(args)
