"""The progress bar: what an estimate of the time left is made of."""

import argparse
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from sims.terminal import Bar, UselessResultError, guarded


def test_compilation_and_earlier_work_are_not_in_the_time_left():
    with Bar(False, "cells") as bar:
        clock = [0.0]
        bar._bar._time = lambda: clock[0]

        def left():
            facts = bar._bar.format_dict
            return None if facts["rate"] is None else (facts["total"] - facts["n"]) / facts["rate"]

        # Ten were there before; the first takes long, for it is compiled.
        bar.move(10, 20)
        clock[0] += 100
        bar.move(11, 20)
        assert left() is None
        for done in range(12, 15):
            clock[0] += 2
            bar.move(done, 20)
        assert abs(left() - 6 * 2) < 1e-9
        assert bar._bar.n == 14


def test_a_quiet_bar_counts_nothing_and_accepts_all():
    with Bar(True, "cells") as bar:
        for done in (0, 1, 5):
            bar.move(done, 5, "label")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("sigma must be positive"), 2, "error: sigma must be positive\n"),
        (UselessResultError("2 of 3 images are not finite"), 1, "error: 2 of 3 images are not finite\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
    ],
)
def test_errors_of_users_and_of_the_system_are_one_line(error, code, line, capsys):
    def run(_args):
        raise error

    assert guarded(run)(argparse.Namespace()) == code
    assert capsys.readouterr().err == line


def test_a_name_that_is_too_long_is_one_line(capsys):
    assert guarded(lambda _args: pathlib.Path("a" * 300).stat())(argparse.Namespace()) == 2
    assert capsys.readouterr().err == f"error: {'a' * 300}: File name too long\n"


@pytest.mark.parametrize("chosen", [None, "tensorfloat32"])
def test_commands_compute_in_full_precision_unless_told_otherwise(chosen):
    """Also the processes that they start: the choice is in the environment before JAX is loaded."""
    code = """
        from absl.flags import argparse_flags
        from sims.terminal import run_program

        def run(args):
            import jax, jax.numpy as jnp
            text = jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text()
            print(jax.config.jax_default_matmul_precision, "HIGHEST" in text)
            return 0

        run_program(run, lambda argv: argparse_flags.ArgumentParser().parse_args(argv[1:]))
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_MATMUL_PRECISION"}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": chosen} if chosen else {}
    root = pathlib.Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=root, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ([chosen, "False"] if chosen else ["highest", "True"])
