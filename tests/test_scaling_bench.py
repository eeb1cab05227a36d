"""The benchmark's command: a quick run from end to end, its rows, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from networks import network

from scaling import save_pretrained
from scaling.bench import __main__ as bench
from scaling.bench import setting, unet
from scaling.bench.setting import QUICK, SD14, Bench, check_room
from scaling.bridge.weights import read_header
from scaling.models.layers import QUERY_CHUNK

FIELDS = ["name", "ours_s", "rival_s", "ratio_median", "ratio_min", "ratio_max", "notes"]


def command(*arguments, **variables):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    # Sizes are tiny, so nearly all of the time would be compilation.
    variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | variables
    return subprocess.run(
        [sys.executable, "-m", "scaling.bench", *arguments],
        capture_output=True,
        text=True,
        env=plain | {"JAX_PLATFORMS": "cpu"} | variables,
    )


@pytest.mark.slow
def test_the_command_writes_every_field(tmp_path):
    names = ["attention_memory", "detect"]
    done = command("--quick", "--repeats", "1", "--json", str(tmp_path / "rows.json"), "--only", *names)
    assert done.returncode == 0, done.stderr
    row, detected = json.loads((tmp_path / "rows.json").read_text())
    assert list(row) == FIELDS
    assert [row["name"], detected["name"]] == names
    assert detected["ours_s"] > 0
    assert row["notes"]["quick"] is True
    if "busy" not in row["notes"]:
        assert row["ratio_median"] == pytest.approx(row["rival_s"] / row["ours_s"])
    assert "| attention_memory |" in done.stdout
    memory = row["notes"]
    assert memory["chunk_bytes"] == QUERY_CHUNK * 4096 * 4
    # Some copies of a chunk and of the operands; the rival holds the matrix.
    assert memory["temporary_bytes"] < 4 * memory["chunk_bytes"] + 10 * memory["operand_bytes"]
    assert memory["rival_temporary_bytes"] >= memory["matrix_bytes"]


@pytest.mark.slow
def test_rows_of_small_networks_run_without_the_rival(tmp_path):
    done = command("--quick", "--repeats", "1", "--json", str(tmp_path / "rows.json"), "--only", *sorted(bench.SMALL))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == bench.SMALL
    for row in rows.values():
        assert row["ours_s"] > 0
    for name in ("jacobian_900", "jacobian_unet"):
        notes = rows[name]["notes"]
        # Some singular value lies within the bound of each computed one, and the largest ones stand apart enough.
        assert 0 < notes["top_error"] <= notes["top_bound"]
        assert notes["time_over_limit"] > 0
    assert rows["jacobian_unet"]["notes"]["top_error"] < 1e-3
    # Random images have no equal distances, so both searches find the same.
    assert rows["audit_search"]["notes"]["agreement"] == 1
    assert rows["audit_search"]["notes"]["images"] == 3000
    assert rows["detect_all"]["notes"]["network"] == "digits-10"


def test_loading_does_no_less_than_its_rival(tmp_path):
    model = network(QUICK)
    path = save_pretrained(model, tmp_path) / "diffusion_pytorch_model.safetensors"
    assert unet.load(Bench(tmp_path, QUICK, 1)).notes["file_bytes"] == path.stat().st_size
    # The rival, too, ends with every parameter in JAX's layout.
    arrays = unet._read_and_transpose(path)
    names = sorted(read_header(path).items(), key=lambda item: item[1].start)
    for array, (name, _) in zip(arrays, names, strict=True):
        np.testing.assert_array_equal(array, model.params[name])


def test_bad_flags_are_refused_and_help_is_printed_without_jax(tmp_path):
    # Any import of jax would fail.
    (tmp_path / "jax.py").write_text("raise ImportError('jax is imported')")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = command("--quick", "--repeats", "0", **environment)
    assert done.returncode == 2
    assert "--repeats must be at least 1, got 0" in done.stderr
    done = command("--only", "sd15", **environment)
    assert done.returncode == 2
    assert "invalid choice: 'sd15'" in done.stderr
    done = command("--help", **environment)
    assert done.returncode == 0
    assert all(row in done.stdout for row in bench.ROWS)
    assert "jax is imported" in command("--quick", "--only", "attention_memory", **environment).stderr


def test_every_row_names_its_function():
    for row in bench.ROWS:
        assert callable(bench._function(row))
    assert bench.ROWS.keys() > bench.WITHOUT_WEIGHTS > bench.SMALL


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_machine_without_room_is_refused(kind, monkeypatch):
    check_room(QUICK)
    if kind == "disk":
        monkeypatch.setattr(setting.shutil, "disk_usage", lambda _: type("", (), {"free": 1e9}))
    else:
        monkeypatch.setattr(setting, "_available_memory", lambda: 1e9)
    with pytest.raises(ValueError, match=rf"needs 1?\d\.\d GB of {kind} .*there are 1\.0; try --quick"):
        check_room(SD14)
