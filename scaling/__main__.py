"""``python -m scaling``: inspect diffusion models, turn images into codes, sample, and train small models."""

from __future__ import annotations

from sims.interrupts import end_quietly_during_imports


def main() -> None:
    """Run the command line and exit: 0 done, 1 done but of no use, 2 bad input, 3 above a limit, 130 interrupted."""
    end_quietly_during_imports()
    from scaling.commands import COMMANDS
    from sims.terminal import run_commands

    run_commands("python -m scaling", __doc__, "scaling.commands", COMMANDS, before=_prepare)


def _prepare() -> None:
    # Here, for it imports JAX, which --help does without.
    from scaling.backend import limit_blas_threads

    limit_blas_threads()


if __name__ == "__main__":
    main()
