"""The command line: every command with tiny parameters, messages, exit codes, and what an interrupt keeps."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sims import __main__ as cli
from sims import store
from sims.study import certification
from sims.sweeps import engine

pytestmark = pytest.mark.tiny

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--num-samples 3,12 --width 4 --sigma 0.3,0.6 --seeds 2 --steps 5 --eval-samples 4 --eval-draws 1".split()


def run(*argv):
    """The exit code of a command in this process."""
    args = cli._parse(["sims", *map(str, argv)])
    return args.run(args)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "demo"
    assert run("demo", *TINY, "--quiet", "--out", out) == 0
    return out


def test_demo_writes_results_and_a_summary(demo, capsys):
    assert run("demo", *TINY, "--out", demo) == 0
    printed = capsys.readouterr()
    assert "## Where memorization ends" in printed.out
    assert (demo / "summary.md").read_text() in printed.out
    assert "8/8" in printed.err
    (facts,) = store.read_spec(demo)["sessions"][0]["data"]
    assert facts["name"] == "digits"
    assert len(facts["beta_by_num_samples"]) == 2
    results = store.load(demo)
    assert np.isfinite(results.gap).all()
    assert next(iter(results.condition.values)) == "negative_cosines"


def test_show_and_transitions_read_a_run(demo, capsys, tmp_path):
    assert run("show", demo) == 0
    assert "8 networks on digits (d = 64)" in capsys.readouterr().out
    assert run("transitions", demo, "--measure", "train_error", "--level", "1", "--json", tmp_path / "rows.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["sigma", "estimate", "low", "high", "crossed", "side"]
    assert [row["sigma"] for row in json.loads((tmp_path / "rows.json").read_text())] == [0.3, 0.6]


def test_a_run_that_another_host_went_on_with_says_so(demo, capsys, tmp_path):
    shutil.copytree(demo, tmp_path / "run")
    record = json.loads((demo / "spec.json").read_text())
    (session,) = record["sessions"]
    idle = session | {"host": "idle", "chunks": 0}
    for sessions, told in (
        ([session, idle], []),
        ([session, session | {"host": "elsewhere"}], [f"host: {session['host']}, elsewhere", "equal to rounding only"]),
    ):
        (tmp_path / "run" / "spec.json").write_text(json.dumps(record | {"sessions": sessions}))
        assert run("show", tmp_path / "run") == 0
        printed = capsys.readouterr().out
        assert all(words in printed for words in told)
        assert ("different conditions" in printed) == bool(told)


@pytest.mark.slow
def test_certify_prints_and_writes_conditions_regime_and_certificate(tmp_path, capsys):
    """Eight separable digits: memorized, every condition holds, a strict minimum; the files say what was printed."""
    data = ["--center", "--separable", "8", "--width", "8"]
    assert run("certify", *data, "--sigma", "0.1", "--out", tmp_path) == 0
    printed, told = capsys.readouterr()
    # What takes long is announced before it begins.
    for stage in ("comparing structures of 8 rows", "refining 8 live columns", "curvature by", "zero column grows"):
        assert f"sigma = 0.1: {stage}" in told.replace("searching for directions in which a ", "")
    assert (tmp_path / "certificate.md").read_text() in printed
    found = json.loads((tmp_path / "certificate.json").read_text())
    entry = found["certificates"][0]
    assert entry["regime"] == "memorizing"
    assert all(row["holds"] for row in entry["conditions"])
    certificate = entry["certificate"]
    assert certificate["strict"]
    assert certificate["verdict"] == "strict"
    assert ": memorizing, certified" in printed
    assert certificate["num_live"] == 8
    assert certificate["refined_gradient_norm"] < 1e-12
    np.testing.assert_allclose(certificate["min_curvature"], 4e-3, rtol=1e-3)
    # The main term up to what leaks through gates of margin 0.165.
    np.testing.assert_allclose(certificate["objective"], entry["structures"][0]["objective"], rtol=1e-2)


def test_a_heading_claims_no_more_than_is_known():
    entry = {
        "regime": "memorizing",
        "structures": [{"holds": True}],
        "conditions": [{"holds": True}],
        "certificate": {"strict": True, "verdict": "strict", "distance_sq": 1e-9, "num_live": 8},
    }
    assert certification._heading(entry) == "memorizing, certified"
    failing = {"conditions": [{"holds": False}], "certificate": {"strict": False, "verdict": "negative curvature"}}
    assert certification._heading(entry | failing) == (
        "predicted: memorizing (conditions fail, not certified: negative curvature)"
    )
    nearby = entry | {"conditions": [{"holds": False}]}
    assert certification._heading(nearby).startswith(
        "predicted: memorizing (conditions fail; certified: a strict minimum"
    )
    far = entry | {"certificate": entry["certificate"] | {"distance_sq": 1.5}}
    assert certification._heading(far) == (
        "predicted: memorizing (conditions hold; certified: a strict minimum at squared distance 1.5)"
    )
    assert certification._heading(entry | {"regime": "empty", "certificate": {"left_out": "zero"}}) == "empty"


def test_certify_with_biases_compares_what_they_allow(tmp_path):
    """Points on a circle, beyond the theorem without biases: four are memorized at this price, seven are not, and
    both networks are strict minima; the affine one up to the offset of its units, which are on everywhere."""
    found = {}
    for n in (4, 7):
        turns = 2 * np.pi * np.arange(n + 1) / n
        np.savez(tmp_path / f"{n}.npz", x=3 * np.stack([np.cos(turns), np.sin(turns)], axis=1)[:n])
        data = ["--dataset", f"npz:{tmp_path}/{n}.npz?values=keep", "--held-out", "0.001", "--num-samples", str(n)]
        assert run("certify", "--biases", *data, "--sigma", "0.1", "--width", str(n), "--penalty", "1e-4", "--quiet",
                   "--out", tmp_path / str(n)) == 0  # fmt: skip
        (found[n],) = json.loads((tmp_path / str(n) / "certificate.json").read_text())["certificates"]
        assert "with biases" in (tmp_path / str(n) / "certificate.md").read_text()
    assert [found[n]["regime"] for n in (4, 7)] == ["memorizing", "generalizing"]
    assert all(condition["holds"] for condition in found[4]["conditions"])
    assert found[4]["certificate"]["verdict"] == "strict"
    # Two units that are always on: two rescalings, one rotation and two offsets.
    assert found[7]["certificate"]["num_symmetries"] == 5
    assert found[7]["certificate"]["min_curvature_modulo_symmetry"] > 1e-5


@pytest.mark.slow
def test_certify_reports_what_fails_and_where_nothing_is_left(tmp_path):
    """Raw digits are not separable, their duplicates a block apart; a large penalty leaves nothing to certify."""
    repeated = ["--duplicates", "2x6", "--singles", "4", "--width", "3", "--sigma", "0.3,0.6", "--quiet"]
    assert run("certify", *repeated, "--max-size", "3", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert [entry["sigma"] for entry in found["certificates"]] == [0.3, 0.6]
    entry = found["certificates"][0]
    assert not all(row["holds"] for row in entry["conditions"])
    told = [(row["holds"], row["slack"]) for row in entry["conditions"] if row["slack"] is not None]
    assert all(holds == (slack >= 0) for holds, slack in told)
    assert any(slack > 0 for _, slack in told)
    # Lanczos, for a limit so small. Two units with the same gates turn for nothing: converged or not, it is said.
    certificate = entry["certificate"]
    assert certificate["refined_gradient_norm"] < 1e-7 * certificate["gradient_norm"]
    assert certificate["converged"] == (certificate["refined_gradient_norm"] <= 1e-12)
    assert certificate["num_rotations"] == 1
    assert 0 <= certificate["curvature_error"] < 1e-6
    assert run("certify", "--num-samples", "4", "--penalty", "1e4", "--quiet", "--out", tmp_path / "zero") == 0
    zero = json.loads((tmp_path / "zero" / "certificate.json").read_text())["certificates"][0]
    assert zero["regime"] == "empty"
    assert "minimizer is zero" in zero["certificate"]["left_out"]


@pytest.mark.slow
def test_a_generalizing_mixture_is_told_as_such(tmp_path):
    mixture = ["--dataset", "mixture:modes=2,dim=4,separation=8", "--num-samples", "16", "--width", "6"]
    assert run("certify", *mixture, "--quiet", "--out", tmp_path) == 0
    entry = json.loads((tmp_path / "certificate.json").read_text())["certificates"][0]
    assert entry["regime"] == "generalizing"
    turns = sum(rank * (rank - 1) // 2 for rank in entry["structures"][0]["ranks"])
    assert entry["certificate"]["num_rotations"] == turns > 0
    # The turns of the blocks decide between a strict minimum and less; the heading says which.
    certificate = entry["certificate"]
    assert certificate["strict"] == (certificate["verdict"] == "strict")
    page = (tmp_path / "certificate.md").read_text()
    assert certificate["strict"] or "generalizing, certified" not in page
    if not certificate["strict"]:
        assert certificate["verdict"] in page
        assert "predicted: generalizing (" in page


def test_sweep_and_train(tmp_path, capsys):
    one_size = [*TINY, "--num-samples", "3"]
    assert run("sweep", *one_size, "--measures", "gap", "--memory", "1GiB", "--out", tmp_path / "sweep") == 0
    assert "Written" in capsys.readouterr().out
    one = "--num-samples 4 --width 3 --sigma 0.5 --steps 4 --record-steps 0,4 --eval-samples 4 --eval-draws 1".split()
    assert run("train", *one, "--measures", "train_error,gap", "--out", tmp_path / "one") == 0
    assert "train_error" in capsys.readouterr().out
    assert (tmp_path / "one" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "--sigma", "0", "--out", "OUT"], "sigma must be positive"),
        (["sweep", "--penalty=-1", "--out", "OUT"], "penalty must be zero or more"),
        (["sweep", "--num-samples", "0", "--out", "OUT"], "num_samples must be at least 1"),
        (["sweep", "--width", "0", "--out", "OUT"], "width must be at least 1"),
        (["sweep", "--num-samples", "99999", "--out", "OUT"], "digits has 1438"),
        (["sweep", "--measures", "loss", "--out", "OUT"], "unknown measure 'loss'"),
        (["sweep", "--dataset", "missing.npz", "--out", "OUT"], "missing.npz"),
        (["sweep", "--separable", "8", "--num-samples", "8", "--out", "OUT"], "center"),
        (["sweep", "--spec", "missing.toml", "--out", "OUT"], "missing.toml"),
        (
            "sweep --memory 10B --num-samples 2 --sigma 1 --steps 1 --measures gap --out OUT".split(),
            "raise --memory",
        ),
        (["train", "--out", "OUT"], "a single run needs one num_samples"),
        (["sweep", "--duplicates", "9x9", "--num-samples", "8", "--out", "OUT"], "contradicts duplicates = 9x9"),
        (["sweep", "--optimizer", "lion", "--out", "OUT"], "optimizer must be one of"),
        (["certify", "--num-samples", "2,4", "--out", "OUT"], "only sigma may vary"),
        (["certify", "--sigma", "0", "--out", "OUT"], "sigma must be positive"),
        (["show", "OUT"], "holds no run"),
        (["transitions", "OUT"], "holds no run"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(argv, message, tmp_path, capsys):
    assert run(*(str(tmp_path / "out") if a == "OUT" else a for a in argv)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error


def test_bad_flags_exit_with_2(capsys):
    for argv in (["sweep", "--sigmas", "1"], ["sweep", "--sigma", "x", "--out", "o"], ["sweep"], []):
        with pytest.raises(SystemExit) as stopped:
            run(*argv)
        assert stopped.value.code == 2
        assert "usage" in capsys.readouterr().err


def test_a_corrupted_store_exits_with_2_and_says_what_to_do(demo, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    (copy / "spec.json").write_text("{")
    assert run("show", copy) == 2
    assert "spec.json" in capsys.readouterr().err


def test_an_unwritable_folder_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("sweep", *TINY, "--out", tmp_path / "file" / "out") == 2
    assert "file" in capsys.readouterr().err


def test_another_spec_on_the_same_folder_names_the_difference(demo, capsys):
    assert run("demo", *TINY, "--steps", "6", "--out", demo) == 2
    error = capsys.readouterr().err
    assert "steps" in error
    assert "5" in error


def test_help_explains_every_flag(capsys):
    for command in ("demo", "sweep", "train", "transitions", "show"):
        with pytest.raises(SystemExit) as stopped:
            run(command, "--help")
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--num-samples",
        "--sigma",
        "--width",
        "--penalty",
        "--duplicates",
        "--memory",
        "--separable",
        "--quiet",
    ):
        assert flag in text


def test_an_interrupt_exits_with_130_and_says_what_is_finished(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "sweep", interrupted)
    assert run("sweep", *TINY, "--quiet", "--out", tmp_path) == 130
    assert f"finished cells are in {tmp_path}. The same command again resumes." in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_same_command_resumes(tmp_path):
    out = tmp_path / "run"
    argv = (
        "--num-samples 3,12,24,48 --width 4 --sigma 0.3 --seeds 40 --steps 2000 --eval-samples 4 --eval-draws 1".split()
    )
    # A suite started in the background of a script inherits an ignored SIGINT; a user's terminal does not.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('sims', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "sweep", *argv, "--measures", "gap", "--quiet", "--out", str(out)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_ENABLE_X64": "0"},
    )
    done = out / "results.zarr" / "done" / "c"
    deadline = time.monotonic() + 120
    while not any(done.rglob("*")) if done.exists() else True:
        assert time.monotonic() < deadline, "no unit finished"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "The same command again resumes" in error
    kept = int(store.load(out).done.sum())
    assert 0 < kept < 160


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_ends_as_the_undisturbed_one(tmp_path):
    argv = (
        "--num-samples 6 --width 4 --sigma 0.3,0.6 --seeds 30 --steps 300 --eval-samples 4 --eval-draws 1 "
        "--measures train_error --quiet"
    ).split()
    rng = np.random.default_rng(0)

    def begin(out):
        command = [sys.executable, "-m", "sims", "sweep", *argv, "--out", str(out)]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_ENABLE_X64": "0"})

    begun = time.monotonic()
    assert begin(tmp_path / "whole").wait(timeout=300) == 0
    length = time.monotonic() - begun
    done, kept = tmp_path / "cut" / "results.zarr" / "done" / "c", []
    for _ in range(20):
        process = begin(tmp_path / "cut")
        try:
            # From before the imports are done on; later attempts have less left to do and may come to their end.
            process.wait(timeout=rng.uniform(0.1, 0.9) * length)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kept.append(sum(file.is_file() for file in done.rglob("*")) if done.exists() else 0)
    assert kept == sorted(kept)
    assert begin(tmp_path / "cut").wait(timeout=300) == 0
    whole, cut = store.load(tmp_path / "whole"), store.load(tmp_path / "cut")
    assert bool(cut.done.all())
    np.testing.assert_array_equal(cut.train_error, whole.train_error)


def test_train_prints_measures_that_are_lists_and_show_says_what_its_folder_is(tmp_path, capsys):
    data = "--center --separable 3 --num-samples 3 --width 3 --sigma 0.5 --penalty 0.1 --steps 2".split()
    assert run("train", *data, "--measures", "train_error,conditions_hold", "--out", tmp_path / "one") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("conditions_hold")]
    assert set(line.split()[1:]) <= {"0", "1"}
    assert len(line.split()) > 3
    assert run("show", tmp_path / "one") == 2
    assert "holds a single training run (python -m sims train), not a sweep" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "train", "certify"])
def test_an_empty_name_of_a_folder_is_refused(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(command, "--out", "")
    assert "the name of the folder is empty" in capsys.readouterr().err


def test_repair_says_what_it_does(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "run")
    chunk = next(file for file in (tmp_path / "run" / "results.zarr" / "gap" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(b"")
    assert run("show", tmp_path / "run") == 2
    assert "1 finished unit is damaged" in capsys.readouterr().err
    assert run("repair", tmp_path / "run", "--dry-run") == 0
    assert "would be removed: chunk" in capsys.readouterr().out
    assert run("repair", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert f"{chunk} is damaged or lost" in printed
    assert "computes 1 of 4 units" in printed
    assert run("repair", tmp_path / "run") == 0
    assert "No unit is damaged; 3 of 4 are finished" in capsys.readouterr().out
    assert run("repair", tmp_path) == 2
