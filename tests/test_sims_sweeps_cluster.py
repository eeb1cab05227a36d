"""A Dask cluster of real processes: results equal those of one process, workers and schedulers that die, bad input."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import dask
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

import sims
from sims import __main__ as cli
from sims import store
from sims.sweeps import cluster
from sims.sweeps.spec import Spec

pytestmark = pytest.mark.tiny

distributed = pytest.importorskip("distributed")

ROOT = pathlib.Path(__file__).parents[1]
TINY = {"width": 4, "steps": 6, "eval_samples": 5, "eval_draws": 2, "held_out": 20}
SPEC = Spec(dataset="mixture:modes=2,dim=3", num_samples=(3, 6), sigma=(0.3, 0.6), seeds=2, **TINY)
NAMES = ("train_error", "gap")


@pytest.fixture(autouse=True)
def other_tests_read_without_a_cluster():
    """A client makes its cluster the default of everything lazy, and does not take that back if the cluster is lost."""
    yield
    dask.config.config.pop("scheduler", None)


@pytest.fixture(scope="module")
def results():
    return sims.sweep(SPEC, NAMES)


@pytest.fixture(scope="module")
def address():
    """The scheduler of a cluster with two workers."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as started:
        yield started.scheduler_address


def assert_equal(found, results, names=NAMES):
    """Bit for bit: all machines are this one."""
    for name in names:
        np.testing.assert_array_equal(found[name], results[name])


def test_workers_give_what_one_process_gives(results, address, tmp_path):
    done = []
    with cluster.connected(address) as executor:
        found = sims.sweep(SPEC, NAMES, out=tmp_path, executor=executor, on_unit=done.append)
        with distributed.Client(address) as client:
            pids = client.run(os.getpid)
            # Not in this process, whatever the order.
            assert os.getpid() not in pids.values()
            assert client.run(cluster_cache_size) == dict.fromkeys(pids, 1)
    assert [step.done for step in done] == [0, 2, 4, 6, 8]
    assert sorted(step.unit["num_samples"] for step in done[1:]) == [3, 3, 6, 6]
    assert_equal(found, results)
    assert found.done.all()
    assert np.all(found.wall_s > 0)


def cluster_cache_size():
    return cluster._prepared.cache_info().currsize


def test_a_custom_measure_travels(results, address):
    scale = 3.0

    def scaled(params, data, spec):
        return scale * jnp.linalg.norm(params.w1, axis=0)

    with cluster.connected(address) as executor:
        found = sims.sweep(SPEC, [scaled, "gap"], executor=executor)
    local = sims.sweep(SPEC, [scaled, "gap"])
    assert found.scaled.shape[-1] == 4
    assert_equal(found, local, ("scaled", "gap"))
    np.testing.assert_array_equal(found.gap, results.gap)


def test_units_of_one_shape_compile_once_on_a_worker(monkeypatch):
    def gap_of_this_test(params, data, spec):
        return sims.sweeps.measures.gap(params, data, spec)

    compiled = []
    compile_one = jax.stages.Lowered.compile

    def spy(lowered):
        compiled.append(lowered)
        return compile_one(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    client = InThisProcess()
    units = sims.sweeps.engine.all_units(SPEC)
    monkeypatch.setattr(distributed, "as_completed", lambda futures: futures)
    found = list(cluster._compute(client, 2 << 30, None, SPEC, units, {"gap_of_this_test": gap_of_this_test}))
    assert [done.unit for done in found] == units
    assert [unit.num_samples for unit in units] == [3, 3, 6, 6]
    assert len(compiled) == 2


class InThisProcess:
    """A client whose cluster is this process."""

    def map(self, task, units, **_):
        for unit in units:
            future = concurrent.futures.Future()
            future.set_result(task(unit))
            yield future


def deadly(flag, params, data, spec):
    """Ends its worker at the first call, in the middle of a unit; never this process."""
    if os.getpid() != deadly.safe and not flag.exists():
        if flag.name != "never":
            flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return jnp.linalg.norm(params.w1)


def named_deadly(flag):
    safe = os.getpid()

    def norm(params, data, spec):
        deadly.safe = safe
        return deadly(flag, params, data, spec)

    return norm


@pytest.mark.slow
def test_a_killed_worker_is_made_good(address, tmp_path):
    norm = named_deadly(tmp_path / "killed")
    with distributed.Client(address) as client:
        before = set(client.run(os.getpid).values())
        with cluster.connected(address) as executor:
            found = sims.sweep(SPEC, [norm, "gap"], out=tmp_path / "run", executor=executor)
        assert (tmp_path / "killed").exists()
        client.wait_for_workers(2)
        after = set(client.run(os.getpid).values())
    assert len(before & after) == 1
    assert found.done.all()
    assert_equal(found, sims.sweep(SPEC, [norm, "gap"]), ("norm", "gap"))


@pytest.mark.slow
def test_a_unit_that_ends_every_worker_is_given_up(address, tmp_path):
    norm = named_deadly(tmp_path / "never")
    with (
        cluster.connected(address) as executor,
        pytest.raises(ValueError, match=r"a unit of work ended every worker .* units are left\. Give workers more"),
    ):
        sims.sweep(SPEC, [norm], out=tmp_path / "run", executor=executor)


def slow_to_trace(params, data, spec):
    """Takes a while in a worker, once for every program."""
    if os.environ.get("SIMS_TEST_WORKER"):
        time.sleep(1.0)
    return jnp.linalg.norm(params.w1)


VANISHING = """
    import sys, time
    import distributed
    if __name__ == "__main__":
        with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
            print(cluster.scheduler_address, flush=True)
            time.sleep(300)
"""


@pytest.fixture
def vanishing(tmp_path):
    """A cluster in a process group of its own, and its address."""
    script = tmp_path / "cluster.py"
    script.write_text("\n".join(line[4:] for line in VANISHING.splitlines()))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"SIMS_TEST_WORKER": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    yield process, process.stdout.readline().strip()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_scheduler_that_vanishes_keeps_finished_units(vanishing, tmp_path):
    process, address = vanishing
    spec = Spec(dataset="mixture:modes=2,dim=3", num_samples=(3, 4, 5, 6), sigma=0.3, seeds=1, **TINY)
    out = tmp_path / "run"

    def kill(progress):
        if progress.done == 1:
            os.killpg(process.pid, signal.SIGKILL)

    with (
        cluster.connected(address, wait=3.0) as executor,
        pytest.raises(
            ValueError,
            match=r"cluster was lost .* units are left\. .* run the same command again: finished chunks are kept",
        ),
    ):
        sims.sweep(spec, [slow_to_trace], out=out, executor=executor, on_unit=kill)
    kept = int(store.load(out).done.sum())
    assert 1 <= kept < 4
    done = []
    found = sims.sweep(spec, [slow_to_trace], out=out, on_unit=done.append)
    assert [step.done for step in done] == list(range(kept, 5))
    assert_equal(found, sims.sweep(spec, [slow_to_trace]), ("slow_to_trace",))


@pytest.mark.slow
def test_local_workers_from_the_command_line_leave_nothing_behind(results, tmp_path):
    argv = "--dataset mixture:modes=2,dim=3 --num-samples 3 --sigma 0.3,0.6 --seeds 2 --width 4 --steps 6".split()
    argv += "--eval-samples 5 --eval-draws 2 --held-out 20 --measures train_error,gap --local-workers 1 --quiet".split()
    before = set(psutil.Process().children(recursive=True))
    args = cli._parse(["sims", "sweep", *argv, "--out", str(tmp_path)])
    assert args.run(args) == 0
    assert_equal(store.load(tmp_path), results.sel(num_samples=[3]))
    left = set(psutil.Process().children(recursive=True)) - before
    # The resource tracker of multiprocessing lives as long as this process.
    assert not [child for child in left if "resource_tracker" not in " ".join(child.cmdline())]


def test_a_port_that_says_nothing_is_no_scheduler():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(ValueError, match=f"no Dask scheduler answers at {address} .*says nothing for 0.5 s"),
            cluster.connected(address, wait=0.5),
        ):
            pass


def test_a_scheduler_without_workers_is_said(monkeypatch):
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None, protocol="tcp") as idle:
        told = []
        with (
            pytest.raises(ValueError, match=r"has no worker after 0\.5 s; start some with `dask worker tcp://"),
            cluster.connected(idle.scheduler_address, wait=0.5, told=told.append),
        ):
            pass
        assert told == [f"waiting up to 0.5 s for the scheduler {idle.scheduler_address} and a worker"]


def test_no_scheduler_at_the_address(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 .* start one"), \
            cluster.connected("tcp://127.0.0.1:9", wait=0.5):  # fmt: skip
        pass
    for address in ("tcp://127.0.0.1:9", "nowhere"):
        args = cli._parse(["sims", "sweep", "--scheduler", address, "--wait", "0.5", "--out", str(tmp_path / "run")])
        assert args.run(args) == 2
        assert f"no Dask scheduler answers at {address}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_scheduler_or_local_workers(tmp_path, capsys):
    for address, workers in ((None, 0), (None, -1), ("tcp://127.0.0.1:9", 2)):
        with (
            pytest.raises(ValueError, match="name one scheduler, or a positive number of local workers"),
            cluster.connected(address, local_workers=workers),
        ):
            pass
    args = cli._parse(
        ["sims", "sweep", "--scheduler", "tcp://h:1", "--local-workers", "2", "--out", str(tmp_path / "r")]
    )
    assert args.run(args) == 2
    assert "name one scheduler" in capsys.readouterr().err


def test_without_dask_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install 'dae-theory\[cluster\]'"), cluster.connected(local_workers=1):
        pass


def test_what_a_worker_cannot_import_is_named(address, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def norm(params, data, spec):\n    return abs(params.w1).sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # pyright: ignore[reportMissingImports]

    with (
        cluster.connected(address) as executor,
        pytest.raises(ValueError, match="No module named 'only_here'.*Install the same packages"),
    ):
        sims.sweep(SPEC, [only_here.norm], executor=executor)
