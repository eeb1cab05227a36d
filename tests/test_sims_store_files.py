"""Files are complete or absent, whatever fails; folders are taken only if empty or of the same run."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors import SafetensorError

from sims import __main__ as cli
from sims import store
from sims.store.files import claim_run, own_folder, replace_file, write_text
from sims.sweeps import single
from sims.sweeps.spec import Spec

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (FULL, "No space left on device; free some space and run the same command again"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "os error 28.*free some space"),
        (OSError("encoder error -2 when writing image file"), "encoder error -2"),
    ],
)
def test_a_failed_write_names_file_and_cause_and_leaves_nothing(tmp_path, failure, message):
    path = tmp_path / "weights.safetensors"
    write_text(path, "before")

    def write(partial: pathlib.Path) -> None:
        partial.write_text("half")
        partial.with_name(f"{partial.name}.partial").write_text("half")
        raise failure

    with pytest.raises(ValueError, match=f"cannot write {path}: .*{message}"):
        replace_file(path, write)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_an_interrupted_write_leaves_nothing_and_what_a_kill_leaves_is_replaced(tmp_path):
    path = tmp_path / "training.json"

    def write(partial: pathlib.Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, write)
    assert not list(tmp_path.iterdir())
    for name in (".training.json.partial", ".training.json.partial.partial"):
        (tmp_path / name).write_text("half")
    assert not own_folder(tmp_path, (path.name,))
    write_text(path, "whole")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".spec.json.partial").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "spec.json", "{}")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["images", "sheet.png", "summary.md", "weights.safetensors", "certificate.md"])
def test_every_command_refuses_a_folder_with_other_files(tmp_path, name, capsys):
    path = tmp_path / name
    path.write_text("mine")
    template = store.blank({"n": [1]}, {"x": (("n",), float)})
    with pytest.raises(ValueError, match=f"holds other files \\({name}\\)"):
        store.fill(tmp_path, {}, template, 1, lambda rows: {"x": np.zeros(len(rows))})
    spec = Spec(num_samples=5, width=4, sigma=0.4, seeds=1, steps=2, eval_samples=2, eval_draws=1)
    with pytest.raises(ValueError, match=f"holds other files \\({name}\\)"):
        single.run(spec, ("train_error",), tmp_path)
    args = cli._parse(["sims", "certify", "--num-samples", "4", "--quiet", "--out", str(tmp_path)])
    assert args.run(args) == 2
    assert f"holds other files ({name})" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} <= {name, ".lock"}


def test_a_certificate_of_other_data_is_refused_and_the_same_is_written_anew(tmp_path, capsys):
    def certify(penalty, sigma="0.5"):
        flags = ["--num-samples", "4", "--penalty", penalty, "--sigma", sigma, "--quiet", "--out", str(tmp_path)]
        args = cli._parse(["sims", "certify", *flags])
        return args.run(args)

    assert certify("1e4") == certify("1e4") == 0
    before = json.loads((tmp_path / "certificate.json").read_text())
    for other in (("2e4",), ("1e4", "0.6")):
        assert certify(*other) == 2
        assert "certificate of other data or noise levels" in capsys.readouterr().err
    assert json.loads((tmp_path / "certificate.json").read_text()) == before


def test_a_foreign_folder_is_refused_before_anything_is_loaded(tmp_path):
    """In a fraction of a second, whatever the data are."""
    (tmp_path / "notes.txt").touch()
    script = (
        "import sys; from sims.__main__ import _parse; "
        f"args = _parse(['sims', 'sweep', '--dataset', 'images:/nowhere', '--out', r'{tmp_path}']); "
        "assert args.run(args) == 2; assert not {'jax', 'xarray', 'zarr'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (
        0,
        f"error: {tmp_path} holds other files (notes.txt): choose another folder.\n",
    )
    # A run's own files, and what a killed process leaves, are no other files.
    for name in ("spec.json", "results.zarr"):
        (tmp_path / name).touch()
        claim_run(tmp_path)
        (tmp_path / name).unlink()
