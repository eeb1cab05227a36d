"""Every command against what may happen to its folder: other files, links, full disks, kills, damage.

What is not its own is refused and not touched; what is finished stays, and the same command goes on.
"""

import errno
import functools
import importlib
import os
import pathlib
import re
import shutil
import sys
import threading
import zipfile
import zlib

import jax
import numpy as np
import pytest
import scaling_commands

from scaling.study import examination, series
from sims import __main__ as cli
from sims.store import chunks, files

pytestmark = pytest.mark.tiny

SWEEP = "--dataset digits --num-samples 2 --sigma 1 --width 2 --steps 2 --seeds 1 --held-out 4 --quiet"
COMMANDS = {
    "sims sweep": (SWEEP, ["spec.json", "results.zarr", ".spec.json.partial", ".layout", "summary.md"]),
    "sims demo": ("--num-samples 2 --sigma 1 --width 2 --steps 2 --seeds 1 --quiet", ["spec.json", "summary.md"]),
    "sims train": (
        f"{SWEEP} --learning-rate 0.01",
        ["spec.json", "state.safetensors", "weights.safetensors", "course.json"],
    ),
    "sims certify": ("--num-samples 2 --sigma 0.3 --width 2 --quiet", ["certificate.json", "certificate.md"]),
    "sims ask": ("--num-samples 3 --sigma 0.3 --quiet", ["ask.json", "ask.md"]),
    "scaling sample": ("digits-10 --num 1 --steps 1 --quiet", ["spec.json", "images", "sheet.png", "samples.npz"]),
    "scaling extract": ("digits-10 --images digits --taps mid_block --quiet", ["spec.json", "results.zarr"]),
    "scaling jacobian": ("digits-10 --images digits --num 1 --rank 1 --quiet", ["spec.json", "right_0.png"]),
    "scaling detect": (
        "digits-10 --train digits --num 4 --detectors std,error --draws 1 --sigma 1 --batch-size 4 --quiet",
        ["spec.json", "results.zarr", "summary.md", "scores.csv", "evaluation.csv", "sheet.png"],
    ),
    "scaling ablate": (
        "digits-10 --train digits --num 4 --layers mid_block --timesteps 50 --batch-size 4 --quiet",
        ["spec.json", "results.zarr", "map.csv", "summary.md"],
    ),
    "scaling stress": (
        "digits --train digits --num 8 --layers mid_block --timesteps 50 --pools max --draws 1 --sigma 1 --quiet",
        ["spec.json", "results.zarr", "loss", "variants", "stress.csv", "summary.md", "alterations.png"],
    ),
    "scaling audit": (
        "digits-10 --train digits --samples 4 --steps 2 --batch-size 4 --detectors std --scored 4 --quiet",
        ["spec.json", "results.zarr", "scores", "audit.json", "audit.md", "audit.html"],
    ),
    "scaling train": ("--steps 1 --batch-size 1 --channels 8 --quiet", ["training.json", "unet", "model_index.json"]),
    "scaling duplication": (
        "--duplicates 2x2 --singles 2 --steps 1,2 --seeds 1 --channels 8 --batch-size 1 --quiet",
        ["spec.json", "models", "summary.md"],
    ),
    "scaling transition": (
        "--num-samples 2 --seeds 1 --steps 1 --channels 8 --batch-size 1 --quiet",
        ["spec.json", "models", "two_layer"],
    ),
}
"""Arguments of each command that writes a run, and names that it writes."""


def run(command, *more):
    package, name = command.split()
    argv = [name, *COMMANDS[command][0].split(), *map(str, more)]
    if package == "scaling":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(series, "examine", examined)
            return scaling_commands.run(*argv)
    args = cli._parse(["sims", *argv])
    return args.run(args)


def examined(key, pipeline, corpus, setting, captions):
    """In place of an examination, which writes no files and takes minutes: numbers that depend on every weight."""
    weights = sum(float(np.abs(np.asarray(leaf, float)).sum()) for leaf in jax.tree.leaves(pipeline.network.params))
    blank = examination.template(setting, corpus.images.shape[1:])
    return blank.map(lambda variable: variable.copy(data=np.full(variable.shape, weights).astype(variable.dtype)))


def content(folder):
    """Names and bytes of everything below a folder, links unfollowed."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            else:
                found[path] = pathlib.Path(path).read_bytes() if os.path.isfile(path) else None
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_other_files_is_refused_untouched(command, tmp_path, capsys):
    """Also where a name is one that the command would write."""
    for name in ("notes.txt", COMMANDS[command][1][-1]):
        out = tmp_path / name.replace(".", "_")
        out.mkdir()
        (out / name).write_text("mine")
        before = content(out)
        assert run(command, "--out", out) == 2, capsys.readouterr().out
        assert str(out) in capsys.readouterr().err
        assert {path: found for path, found in content(out).items() if not path.endswith(".lock")} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_no_link_is_followed(command, tmp_path, capsys):
    """At each name that the command writes, to a file and to nowhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    for k, name in enumerate(COMMANDS[command][1]):
        for target in ("file", "nowhere"):
            out = tmp_path / f"{k}{target}"
            out.mkdir()
            (out / name).symlink_to(outside / target)
            assert run(command, "--out", out) == 2, (name, target)
            assert "symbolic link" in capsys.readouterr().err
            assert (out / name).is_symlink()
    assert content(outside) == {str(outside / "file"): b"mine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_place_of_the_folder_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(command, "--out", tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_every_command_that_takes_an_output_folder_stands_in_the_table():
    for package in ("sims", "scaling"):
        commands = importlib.import_module(f"{package}.commands").COMMANDS
        for name in commands:
            module = importlib.import_module(f"{package}.commands.{name}")
            source = pathlib.Path(module.__file__).read_text()
            adds = ("--out", "add_output", "add_pipeline_run", "add_series_run", "add_run_flags")
            writes = any(word in source for word in adds)
            # `merge` joins the shards of a run in its own folder, and `zoo` writes a training and a packed model.
            if writes and name not in ("merge", "zoo"):
                assert f"{package} {name}" in COMMANDS, f"{package} {name}"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("sims sweep", ["--num-samples", "2,3,4,5"]),
        pytest.param("sims train", ["--steps", 40, "--record-steps", "5,10,40"], marks=pytest.mark.slow),
        pytest.param("scaling train", ["--steps", 4, "--save-every", 1], marks=pytest.mark.slow),
        pytest.param("scaling sample", ["--num", 3, "--batch-size", 1], marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_is_taken_away_is_told_at_the_next_write(command, more, tmp_path, capsys, monkeypatch):
    """Not computed to the end, and not made anew with a part of a run in it."""
    out = tmp_path / "run"

    def then_move(function, wanted):
        def moved(*args):
            function(*args)
            if wanted(*args) and out.exists():
                shutil.move(out, tmp_path / "away")

        return moved

    # After the first unit, or after the first checkpoint and its record.
    monkeypatch.setattr(chunks, "_flush", then_move(chunks._flush, lambda run, names, unit: names == ["done"]))
    kept = ("state.safetensors", "checkpoint.safetensors")
    monkeypatch.setattr(os, "replace", then_move(os.replace, lambda _, path: os.path.basename(path) in kept))
    assert run(command, *more, "--out", out) == 2
    assert f"{out} was removed or moved while this command wrote to it" in capsys.readouterr().err
    assert not out.exists()


class Killed(BaseException):
    """Nothing catches it; what would still be cleaned up on the way is left undone."""


def kind_of(path, out):
    """The name of a file below ``out`` as a kind: units of an array, and numbered pictures, count as one.

    So do the variants of a stress test, whose runs are alike.
    """
    parts = os.path.relpath(path, out).split(os.sep)
    if parts[0] == "variants":
        parts[1:2] = ["#"]
    parts = parts[: parts.index("c")] if "c" in parts else parts
    return "/".join(re.sub(r"\d+", "#", part) for part in parts)


def attacked(out, patch, attack):
    """Fail at the first write of a kind that has not failed yet: a full disk at its end, or a kill at its move."""
    seen = set()
    fsync, replace = os.fsync, os.replace

    def hit(path):
        inside = path.startswith(str(out)) and threading.current_thread() is threading.main_thread()
        if not inside or kind_of(path, out) in seen:
            return False
        seen.add(kind_of(path, out))
        return True

    def full(descriptor):
        if hit(os.path.realpath(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def kill(source, target):
        if hit(str(target)):
            raise Killed
        replace(source, target)

    if attack == "full disk":
        patch.setattr(os, "fsync", full)
    else:
        patch.setattr(os, "replace", kill)
        patch.setattr(files, "_remove", lambda _: None)
    return seen


UNEQUAL = (".lock", "spec.json", "seal", "wall_s", "seconds")
"""Files, and parts of their names, that hold times."""


def results_of(out):
    """What a command left in its folder, without times."""

    def plain(path, found):
        if not path.endswith(".npz"):
            return found
        try:
            with np.load(path) as arrays:
                return {name: arrays[name].tobytes() for name in arrays if name != "wall_s"}
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
            return found

    return {
        os.path.relpath(path, out): plain(path, found)
        for path, found in content(out).items()
        if not any(part in path for part in UNEQUAL) and not path.endswith((".md", "course.json", "training.json"))
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What each command leaves when nothing happens, computed when first asked for."""

    @functools.cache
    def folder(command):
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        assert run(command, "--out", out) == 0
        return out

    return folder


QUICK = ("sims train", "scaling sample")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMMANDS]
ATTACKS = [pytest.param(attack, *case.values, marks=case.marks) for attack in ("full disk", "kill") for case in EACH]
# A stress test is many runs of `ablate` and `detect`, which are damaged here; its own files take another five minutes.
DAMAGED = [case for case in EACH if case.values[0] != "scaling stress"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are looked up in /proc")
@pytest.mark.parametrize(("attack", "command"), ATTACKS)
def test_a_full_disk_or_a_kill_at_any_write_costs_nothing_finished(
    command, attack, tmp_path, undisturbed, monkeypatch, capsys
):
    """Each kind of file fails once; the same command goes on, and the end is as if nothing had happened."""
    whole, out = undisturbed(command), tmp_path / "run"
    failures = 0
    with monkeypatch.context() as patch:
        seen = attacked(out, patch, attack)
        for _ in range(60):
            before = len(seen)
            try:
                code = run(command, "--out", out)
            except Killed:
                code = 2
            if len(seen) == before:
                break
            error = capsys.readouterr().err
            # Where a write may fail without harm to the results, the command goes on.
            if code == 2 and attack == "full disk":
                assert "No space left on device" in error, error
                assert "Traceback" not in error
            failures += code == 2
        assert code == 0, capsys.readouterr().err
    assert failures >= 2
    assert results_of(out) == results_of(whole)
    assert not [path for path in out.rglob("*partial*") if path.is_file()]


@pytest.mark.parametrize("command", DAMAGED)
def test_a_damaged_file_is_named_or_made_anew_and_changes_no_other(command, tmp_path, undisturbed, capsys):
    """One byte of a file of each kind, in a finished run: the same command refuses it or replaces it."""
    whole, kinds = undisturbed(command), {}
    for path in sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size):
        kinds.setdefault(kind_of(path, whole), path.relative_to(whole))
    expected = results_of(whole)
    for number, name in enumerate(kinds.values()):
        out = shutil.copytree(whole, tmp_path / str(number))
        raw = bytearray((out / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (out / name).write_bytes(bytes(raw))
        code, error = run(command, "--out", out), capsys.readouterr().err
        assert code in (0, 2), (name, error)
        if code == 2:
            # A digest in the record that is damaged accuses the file that it is of.
            named = str(name) in error or "python -m sims repair" in error
            assert named or "describe different runs" in error or "another" in error, (name, error)
        else:
            found = results_of(out)
            assert {key for key in expected if found.get(key) != expected[key]} <= {str(name)}, name
