"""Every command against folders that are not its own, and links where it writes: refused, and nothing is touched."""

import importlib
import os
import pathlib
import shutil

import pytest
import scaling_commands

from sims import __main__ as cli
from sims.store import chunks

SWEEP = "--dataset digits --num-samples 2 --sigma 1 --width 2 --steps 2 --seeds 1 --held-out 4 --quiet"
COMMANDS = {
    "sims sweep": (SWEEP, ["spec.json", "results.zarr", ".spec.json.partial", ".layout", "summary.md"]),
    "sims demo": ("--num-samples 2 --sigma 1 --width 2 --steps 2 --seeds 1 --quiet", ["spec.json", "summary.md"]),
    "sims train": (
        f"{SWEEP} --learning-rate 0.01",
        ["spec.json", "state.safetensors", "weights.safetensors", "course.json"],
    ),
    "sims certify": ("--num-samples 2 --sigma 0.3 --width 2 --quiet", ["certificate.json", "certificate.md"]),
    "scaling sample": ("digits-10 --num 1 --steps 1 --quiet", ["spec.json", "images", "sheet.png", "samples.npz"]),
    "scaling extract": ("digits-10 --images digits --taps mid_block --quiet", ["spec.json", "results.zarr"]),
    "scaling jacobian": ("digits-10 --images digits --num 1 --rank 1 --quiet", ["spec.json", "right_0.png"]),
    "scaling train": ("--steps 1 --batch-size 1 --channels 8 --quiet", ["training.json", "unet", "model_index.json"]),
    "scaling duplication": ("--steps 1 --seeds 1 --quiet", ["spec.json", "models", "summary.md"]),
    "scaling transition": ("--num-samples 2,3 --seeds 1 --steps 1 --quiet", ["spec.json", "models", "two_layer"]),
}
"""Arguments of each command that writes a run, and names that it writes."""


def run(command, *more):
    package, name = command.split()
    argv = [name, *COMMANDS[command][0].split(), *map(str, more)]
    if package == "scaling":
        return scaling_commands.run(*argv)
    args = cli._parse(["sims", *argv])
    return args.run(args)


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
