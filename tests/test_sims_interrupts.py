"""Programs that are interrupted, and whose outputs are closed, full or not Unicode."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LOADING = "interrupted while modules were loaded; the same command again begins or resumes."


def python(*argv, shell="", interrupt=signal.default_int_handler, **env):
    """A program that starts with this handler of interrupts, as from a terminal; ``shell`` redirects."""
    command = " ".join([f"'{sys.executable}'", *argv, shell])
    return subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
        check=False,
    )


@pytest.fixture
def program(tmp_path):
    """Interrupts itself inside an import, then outside."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(9): pass\n"
    )
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\n"
        "from sims.interrupts import end_quietly_during_imports\n"
        "end_quietly_during_imports()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('ignored')\n"
        "except KeyboardInterrupt:\n"
        "    print('caught')\n"
        "sys.stdout.flush()\n"
        "import interrupted\n"
        "print('imported')\n"
    )
    return str(tmp_path / "program.py")


def test_an_interrupt_inside_an_import_is_one_line(program):
    ended = python(program)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "caught\n", LOADING)


def test_an_ignored_interrupt_stays_ignored(program):
    """As for programs that a script has started in the background."""
    ended = python(program, interrupt=signal.SIG_IGN)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ignored\nimported\n", "")


@pytest.mark.parametrize("package", ["sims", "scaling", "paper_figs"])
def test_every_program_installs_it_before_it_imports_anything(package):
    """Nothing but the standard library's small modules is loaded until then."""
    loaded = python("-X", "importtime", "-m", package, "--help").stderr
    names = [line.rpartition("|")[2].strip() for line in loaded.splitlines()]
    before = names[: names.index("sims.interrupts")]
    assert not {"absl", "argparse", "numpy", "jax", "tqdm", "matplotlib"} & {name.split(".")[0] for name in before}
    assert "argparse" in names


def test_outputs_that_fail_are_no_traceback():
    # A buffered output fails when it is flushed, which Python would do at exit; an unbuffered one fails at once.
    for unbuffered in ("", "1"):
        full = python("-m", "paper_figs", "list", shell="> /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert (full.returncode, full.stderr) == (2, "error: No space left on device\n")
        gone = python("-m", "paper_figs", "list", shell="| true", PYTHONUNBUFFERED=unbuffered)
        assert gone.stderr == ""
    # η has no letter in ASCII.
    plain = python("-m", "scaling", "zoo", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert plain.returncode == 0
    assert "(\\u03b7 = 0)" in plain.stdout


def test_closed_streams_are_not_taken_by_files(tmp_path):
    """Without standard streams the next files would have their numbers, and what is printed would go into them."""
    script = (
        "import os, sys; from sims.terminal import repair_streams; repair_streams(); "
        f"file = open('{tmp_path / 'data'}', 'w'); print('lost'); sys.stderr.write('lost'); os.write(1, b'lost'); "
        "file.write('kept'); file.close(); sys.exit(7)"
    )
    ended = python("-c", f'"{script}"', shell="<&- >&- 2>&-")
    assert ended.returncode == 7
    assert (tmp_path / "data").read_text() == "kept"
