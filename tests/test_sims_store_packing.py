"""Finished runs of many units in few files: the same results, whatever kills, damages or reads them meanwhile."""

import errno
import os
import shutil
import threading

import numpy as np
import pytest
import xarray as xr

from sims import store
from sims.store import files, packing, reading
from sims.store.repair import repair
from sims.store.run import StoreError

SIZES = {"n": 5, "seed": 7}


def make_template():
    values = {"gap": (("seed", "n", "layer"), float), "count": (("n", "seed"), np.int32)}
    return store.blank({"n": np.arange(5), "seed": np.arange(7), "layer": [0, 1]}, values)


def work(out, units=None):
    """Compute at most ``units`` pending units; returns how many were computed."""
    with store.open_run(out, {"name": "many"}, make_template(), {"n": 1, "seed": 1}) as run:
        todo = store.pending(run)[:units]
        for unit in todo:
            n, seed = (unit[dim].start for dim in ("n", "seed"))
            gap = np.full((1, 1, 2), n / 7 + seed)
            store.write_chunk(run, unit, {"gap": gap, "count": [[10 * n + seed]]}, wall_s=n + seed / 10)
    return len(todo)


def count_files(out):
    return sum(path.is_file() for path in (out / "results.zarr").rglob("*"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(packing, "MANY", 10)
    monkeypatch.setattr(packing, "FEW", 4)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    out = tmp_path_factory.mktemp("unpacked") / "run"
    work(out)
    return out


@pytest.fixture(scope="module")
def results(unpacked):
    return store.load(unpacked)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that lacks one unit."""
    out = tmp_path_factory.mktemp("begun") / "run"
    work(out, 34)
    return out


@pytest.fixture
def out(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    out = shutil.copytree(begun, tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MANY", 10)
        patch.setattr(packing, "FEW", 4)
        work(out)
    return out


@pytest.fixture
def packed(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_of_many_units_lies_in_few_files(out, unpacked, results):
    before = count_files(out)
    assert work(out) == 1
    # Five files a unit (two variables, seconds, seal, flag): 35 units there, 3 here.
    assert before - count_files(out) == 5 * (34 - 3)
    assert count_files(unpacked) - count_files(out) == 5 * (35 - 3)
    xr.testing.assert_identical(store.load(out), results)
    assert work(out) == 0
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["results.zarr", "spec.json"]
    plain = xr.open_zarr(str(out / "results.zarr"))
    xr.testing.assert_identical(plain.load().drop_vars("seal"), results)


@pytest.mark.parametrize("count", range(1, 15))
def test_a_kill_at_any_move_of_files_leaves_a_whole_run(out, results, monkeypatch, count):
    moves = {"left": count}

    def killed(action):
        def call(*args, **kwargs):
            # Zarr writes in threads of its own.
            moves["left"] -= threading.current_thread() is threading.main_thread()
            if moves["left"] == 0:
                raise KeyboardInterrupt
            return action(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "replace", killed(os.replace))
        patch.setattr(packing.shutil, "rmtree", killed(shutil.rmtree))
        # What a killed process would not do either.
        patch.setattr(files, "_remove", lambda _: None)
        try:
            work(out)
        except KeyboardInterrupt:
            pass
        else:
            assert moves["left"] > 0
    if (out / reading.ASIDE).exists() and not (out / "results.zarr").exists():
        assert store.load(out).done.sum() == 35
    work(out)
    xr.testing.assert_identical(store.load(out).drop_vars("wall_s"), results.drop_vars("wall_s"))
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["results.zarr", "spec.json"]


def test_a_full_disk_at_the_exchange_puts_the_results_back(out, results, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if os.fspath(source).endswith(os.path.join(packing.PACKED, "results.zarr")):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "replace", refuse)
        assert work(out) == 1
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == ["results.zarr", "spec.json"]
    xr.testing.assert_equal(store.load(out), results)


def test_a_full_disk_leaves_a_finished_run_as_it_is(out, results, monkeypatch):
    write = packing.on_disk.write_chunk

    def refuse(run, *args, **kwargs):
        if run.path.name == packing.PACKED:
            with packing.disk("write in", run.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        write(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(packing.on_disk, "write_chunk", refuse)
        assert work(out) == 1
    assert not (out / packing.PACKED).exists()
    xr.testing.assert_identical(store.load(out), results)
    before = count_files(out)
    assert work(out) == 0
    assert count_files(out) < before


def test_a_damaged_file_costs_its_units_alone(packed, results):
    out = packed
    file = out / "results.zarr" / "gap" / "c" / "0" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="1 finished unit is damaged"):
        store.load(out)
    assert len(repair(out).units) == 1
    kept = store.load(out)
    assert int(kept.done.sum()) == 35 - 14
    xr.testing.assert_identical(kept.where(kept.done, drop=True).gap, results.where(kept.done, drop=True).gap)
    assert work(out, 3) == 3
    assert int(store.load(out).done.sum()) == 35 - 11
    assert work(out) == 11
    xr.testing.assert_identical(store.load(out), results)


@pytest.mark.parametrize("lost", ["spec.json", "results.zarr/gap/zarr.json", "results.zarr/n/c/0"])
def test_what_is_lost_of_a_packed_run_is_restored(packed, results, lost):
    out = packed
    (out / lost).unlink()
    if lost == "spec.json":
        xr.testing.assert_identical(store.load(out), results)
    else:
        assert repair(out).files == [lost.removeprefix("results.zarr/")]
    assert work(out) == 0
    xr.testing.assert_identical(store.load(out), results)


def test_a_reader_does_not_notice(unpacked, tmp_path, results, monkeypatch):
    out = shutil.copytree(unpacked, tmp_path / "run")
    read_units = reading.read_units
    calls = []

    def meanwhile(run, keep=None):
        calls.append(run)
        if len(calls) == 1:
            work(out)
        read_units(run, keep)

    monkeypatch.setattr(reading, "read_units", meanwhile)
    xr.testing.assert_identical(reading.load(out), results)
    assert len(calls) == 2 + 1


def test_runs_of_the_first_format_stay_as_they_are(tmp_path, results, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(store.run, "FORMAT", 1)
        work(out, 20)
    before = count_files(out)
    assert work(out) == 15
    assert count_files(out) == before + 5 * 15
    xr.testing.assert_equal(store.load(out), results)
