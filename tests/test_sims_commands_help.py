"""Help and mistyped flags answer at once: what takes long to import is not imported on that road."""

import pathlib
import re
import subprocess
import sys

from sims.commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import contextlib, io, sys
from sims.__main__ import _parse
from sims.commands import COMMANDS

def exit_code(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            _parse(["sims", *argv])
        except SystemExit as stopped:
            assert "usage: python -m sims" in out.getvalue()
            return stopped.code

assert [exit_code("--help"), *(exit_code(name, "--help") for name in COMMANDS)] == [0] * (1 + len(COMMANDS))
assert [exit_code(name, "--no-such-flag") for name in COMMANDS] == [2] * len(COMMANDS)
assert [exit_code(), exit_code("nothing"), exit_code("sweep", "--memory", "x", "--out", "o")] == [2] * 3
heavy = {"jax", "jaxlib", "numpy", "xarray", "zarr", "flax", "optax", "scipy", "sklearn", "PIL"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_help_and_wrong_flags_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_every_command_is_listed():
    files = {path.stem for path in (ROOT / "sims" / "commands").glob("*.py")}
    assert files - set(COMMANDS) == {"__init__", "options", "summaries"}
    shown = subprocess.run(
        [sys.executable, "-m", "sims", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in COMMANDS if not re.search(rf"\n    {name}\s", shown.stdout)] == []
