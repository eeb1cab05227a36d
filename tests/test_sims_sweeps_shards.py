"""Job arrays: shards and their merge equal the undivided run, whole or in part; bad input is refused."""

import shutil

import numpy as np
import pytest
import xarray as xr

from sims import __main__ as cli
from sims import store
from sims.sweeps import shards

TINY = (
    "--dataset mixture:modes=2,dim=3 --num-samples 3,6 --sigma 0.3,0.6 --seeds 2 --width 4 --steps 6 --eval-samples 5 "
    "--eval-draws 2 --held-out 20 --measures train_error,gap --quiet"
).split()


def run(*argv):
    """The exit code of a command in this process."""
    args = cli._parse(["sims", *map(str, argv)])
    return args.run(args)


def sweep(out, *argv):
    return run("sweep", *TINY, "--out", out, *argv)


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    out = tmp_path_factory.mktemp("undivided") / "run"
    assert sweep(out) == 0
    return out


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Four units in three shards: two, one, one."""
    out = tmp_path_factory.mktemp("three") / "run"
    assert [sweep(out, "--shard", f"{i}/3") for i in (1, 2, 3)] == [0, 0, 0]
    return out


@pytest.fixture
def copied(tmp_path, three):
    return shutil.copytree(three, tmp_path / "copy")


def assert_same(out, undivided):
    """Bit for bit, but for times."""
    loaded, other = (store.load(folder).drop_vars("wall_s") for folder in (out, undivided))
    assert loaded.done.all()
    xr.testing.assert_identical(loaded, other)


def test_shards_merged_are_the_undivided_run(copied, undivided, capsys):
    assert [int(store.load(shards.folder(copied, (i, 3))).done.sum()) for i in (1, 2, 3)] == [2, 1, 1]
    assert run("merge", copied) == 0
    printed = capsys.readouterr()
    assert "8 networks on mixture" in printed.out
    assert (copied / "summary.md").read_text() in printed.out
    assert_same(copied, undivided)
    times = store.load(copied).wall_s
    assert np.all(times > 0)
    parts = [store.load(shards.folder(copied, (i, 3))).wall_s for i in (1, 2, 3)]
    np.testing.assert_array_equal(times, np.nanmax([part.values for part in parts], axis=0))
    record = store.read_spec(copied)
    assert [session["chunks"] for session in record["sessions"]] == [4]
    assert [session["chunks"] for session in record["sessions"][0]["shards"]] == [2, 1, 1]
    assert record["spec"] == store.read_spec(undivided)["spec"]


def test_a_merge_again_changes_nothing(copied, undivided):
    steps = []
    assert shards.merge(copied, on_unit=lambda *step: steps.append(step)) == (4, 4)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = {file: file.stat().st_mtime_ns for file in (copied / "results.zarr").rglob("*")}
    assert shards.merge(copied, on_unit=lambda *step: steps.append(step)) == (4, 4)
    assert len(steps) == 4
    assert before == {file: file.stat().st_mtime_ns for file in (copied / "results.zarr").rglob("*")}
    assert sweep(copied) == 0
    assert_same(copied, undivided)


def test_a_missing_shard_is_told_and_merged_later(copied, undivided, tmp_path, capsys):
    last = shards.folder(copied, (1, 3))
    last.rename(tmp_path / "away")
    assert run("merge", copied, "--quiet") == 2
    assert "2 of 4 units of work are in no shard yet" in capsys.readouterr().err
    half, whole = store.load(copied), store.load(undivided)
    assert int(half.done.sum()) == 2
    for name in ("train_error", "gap"):
        there = half.done.broadcast_like(half[name])
        np.testing.assert_array_equal(half[name].where(there), whole[name].where(there))
        assert half[name].where(~there).isnull().all()
    (tmp_path / "away").rename(last)
    assert run("merge", copied, "--quiet") == 0
    assert_same(copied, undivided)


def test_the_sweep_itself_finishes_what_shards_left(copied, undivided):
    shutil.rmtree(shards.folder(copied, (1, 3)))
    assert shards.merge(copied) == (2, 4)
    assert sweep(copied) == 0
    assert_same(copied, undivided)


def test_shards_of_other_counts_may_overlap(copied, undivided):
    shutil.rmtree(shards.folder(copied, (1, 3)))
    # Units 0 and 2, of which the third of three shards has the latter; then 1 and 3.
    assert sweep(copied, "--shard", "1/2") == 0
    assert shards.merge(copied) == (3, 4)
    assert sweep(copied, "--shard", "2/2") == 0
    assert shards.merge(copied) == (4, 4)
    assert_same(copied, undivided)


def test_a_shard_resumes_and_refuses_another_experiment(copied, three, capsys):
    part = shards.folder(copied, (1, 3))
    (part / "results.zarr" / "done" / "c" / "0" / "0" / "0").unlink()
    assert int(store.load(part).done.sum()) == 1
    assert sweep(copied, "--shard", "1/3") == 0
    xr.testing.assert_identical(
        *(store.load(shards.folder(out, (1, 3))).drop_vars("wall_s") for out in (copied, three))
    )
    assert sweep(copied, "--shard", "1/3", "--steps", "7", "--record-steps", "7") == 2
    assert "steps is 6 there and 7 here" in capsys.readouterr().err


def test_shards_of_different_experiments_are_refused(copied, capsys):
    assert sweep(copied, "--penalty", "0.5", "--shard", "1/4") == 0
    assert run("merge", copied) == 2
    error = capsys.readouterr().err
    assert "1-of-4" in error
    assert "hold different experiments; move one of them away" in error
    assert not (copied / "results.zarr").exists()
    shutil.rmtree(shards.folder(copied, (1, 4)))
    assert run("merge", copied, "--quiet") == 0


def test_a_run_of_another_experiment_beside_the_shards_is_refused(copied, capsys):
    assert sweep(copied, "--penalty", "0.5") == 0
    before = store.load(copied)
    assert run("merge", copied) == 2
    assert "penalty is [0.5] there and [0.001] here" in capsys.readouterr().err
    xr.testing.assert_identical(store.load(copied), before)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "lost"])
def test_a_damaged_chunk_of_a_shard_is_named_and_others_are_merged_later(copied, undivided, damage, capsys):
    part = shards.folder(copied, (2, 3))
    (done,) = [file for file in (part / "results.zarr" / "done" / "c").rglob("*") if file.is_file()]
    file = part / "results.zarr" / "gap" / "c" / done.relative_to(part / "results.zarr" / "done" / "c")
    (file,) = [path for path in file.rglob("*") if path.is_file()]
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-3], "flipped": bytes([content[0] ^ 1]) + content[1:], "lost": b""}[damage])
    if damage == "lost":
        file.unlink()
    assert run("merge", copied) == 2
    error = capsys.readouterr().err
    assert f"{file} is damaged or lost (chunk " in error
    assert f"run `python -m sims repair {part}`" in error
    assert run("repair", part) == 0
    assert "The command that made the run computes" in capsys.readouterr().out
    assert not done.exists()
    assert sweep(copied, "--shard", "2/3") == 0
    assert run("merge", copied, "--quiet") == 0
    assert_same(copied, undivided)


def test_an_empty_shard_is_refused(tmp_path, capsys):
    assert sweep(tmp_path, "--shard", "5/5") == 2
    assert "shard 5/5: there are 4 units of work; use at most as many shards" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_nothing_to_merge(tmp_path, undivided, capsys):
    for out in (tmp_path, tmp_path / "missing", undivided):
        assert run("merge", out) == 2
        assert f"{out / 'shards'} holds no shards; run the sweep with --shard I/N" in capsys.readouterr().err


def test_shards_are_numbered_from_one():
    assert shards.parse_shard("3/8") == (3, 8)
    assert shards.parse_shard("1/1") == (1, 1)


@pytest.mark.parametrize("text", ["0/3", "4/3", "-1/3", "1/0", "1", "1/2/3", "a/b", "1.5/3", ""])
def test_bad_shards_are_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep(tmp_path, f"--shard={text}")
    assert stopped.value.code == 2
    assert "a shard is I/N with 1 <= I <= N, such as 3/8" in capsys.readouterr().err
