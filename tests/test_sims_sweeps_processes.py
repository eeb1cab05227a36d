"""Devices and processes: real ones, whose results are those of one device bit for bit, and processes that fail."""

import concurrent.futures
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sims import __main__ as cli
from sims import store
from sims.sweeps import meeting, processes

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
    "--dataset mixture:modes=2,dim=3 --num-samples 3 --sigma 0.3,0.6,0.9 --seeds 4 --width 4 --steps 6 "
    "--eval-samples 5 --eval-draws 2 --held-out 20 --measures train_error,gap --group 2 --quiet"
).split()
NAMES = ("train_error", "gap")


def begin(out, *argv, devices=1, env=None):
    command = [sys.executable, "-m", "sims", "sweep", *TINY, "--out", str(out), *map(str, argv)]
    command += ["--devices", str(devices)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, timeout=180):
    """The exit code and what was written to stderr."""
    try:
        _, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, error


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def pair(out, *argv):
    """Two processes of one sweep, killed at the end."""
    port = free_port()
    told = ["--coordinator", f"localhost:{port}", "--num-processes", 2]
    both = [begin(out, *argv, *told, "--process-id", i) for i in (0, 1)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The sweep on one device of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    assert ended(begin(out))[0] == 0
    return out


def assert_same(out, single):
    found, expected = store.load(out), store.load(single)
    assert found.done.all()
    for name in NAMES:
        assert np.isfinite(expected[name]).all()
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_devices_gives_the_same_bits(single, tmp_path, devices):
    """Four units of three cells in groups of two: eight groups, on all devices at once, in pairs, or one by one."""
    assert ended(begin(tmp_path, devices=devices)) == (0, "")
    assert_same(tmp_path, single)
    assert store.read_spec(tmp_path)["sessions"][0]["device"]["count"] == devices


def test_devices_that_cannot_be_had_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--devices must be from 1 to 1024, got 0"):
        processes.split_cores(0)
    jax.devices()
    with pytest.raises(ValueError, match="must be given before JAX starts"):
        processes.split_cores(2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    with pytest.raises(ValueError, match="XLA_FLAGS sets the number of CPU devices"):
        processes.split_cores(2)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_lost_ends_the_other_with_a_message(lost, tmp_path):
    """Killed after the first unit: the other says who is lost, in place of a native abort, and what is done is kept."""
    with pair(tmp_path / "run", "--steps", 2000, "--seeds", 12) as both:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("results.zarr/done/c/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        both[lost].kill()
        began = time.monotonic()
        code, error = ended(both[1 - lost], timeout=60)
    # The connection breaks, or in the same moment the operation that both take part in.
    words = (f"error: process {lost} is lost; what is finished is kept", "error: another process has ended")
    assert code == 2, error
    assert error.strip().splitlines()[-1].startswith(words)
    assert time.monotonic() - began < 30
    assert 1 <= int(store.load(tmp_path / "run").done.sum()) < 12


@pytest.mark.slow
def test_two_processes_that_slurm_started_find_each_other(single, tmp_path):
    """Told by the variables that srun sets, and by nothing else."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    both = [
        begin(tmp_path, "--distributed", env=job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in (0, 1)
    ]
    assert [ended(process) for process in both] == [(0, ""), (0, "")]
    assert_same(tmp_path, single)
    (session,) = store.read_spec(tmp_path)["sessions"]
    assert session["device"]["count"] == 2


@pytest.mark.slow
def test_two_processes_give_the_same_bits_and_one_writes(single, tmp_path):
    with pair(tmp_path) as both:
        assert [ended(process)[0] for process in both] == [0, 0]
    assert_same(tmp_path, single)
    (session,) = store.read_spec(tmp_path)["sessions"]
    assert session["chunks"] == 4
    assert session["device"]["count"] == 2


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_the_other(single):
    """Another experiment in the folder, which the second process never looks at."""
    with pair(single, "--penalty", "0.5") as both:
        (first, told), (second, heard) = [ended(process) for process in both]
    assert (first, second) == (2, 2)
    assert "penalty is [0.001] there and [0.5] here" in told
    assert "the first process has failed" in heard or "process 0 has failed" in heard


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coordinator", "h:1"], "give --coordinator, --num-processes and --process-id together"),
        (["--num-processes", "2"], "give --coordinator, --num-processes and --process-id together"),
        (["--process-id", "0"], "give --coordinator, --num-processes and --process-id together"),
        (["--coordinator", "h:1", "--num-processes", "2"], "together, or none of them"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], r"must lie in [0, 2), got 2"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id=-1"], r"must lie in [0, 2), got -1"),
        (["--coordinator", "h:1", "--num-processes", "0", "--process-id", "0"], r"must lie in [0, 0), got 0"),
        (["--coordinator", "h", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", ":7", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "h:99999", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_exit_with_2(argv, message, tmp_path, capsys):
    args = cli._parse(["sims", "sweep", *TINY, "--out", str(tmp_path / "run"), *argv])
    assert args.run(args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nobody_answers():
    where, told = f"localhost:{free_port()}", []
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"no process answers at {where} within 0.5 s .* Check that the first process"
    ):
        processes.join(where, num_processes=2, process_id=1, wait=0.5, told=told.append)
    assert time.monotonic() - began >= 0.5
    assert told == [f"waiting up to 0.5 s for process 0 at {where}"]


def test_somebody_else_answers():
    for content in (b"", b"HTTP/1.1 400\n"):
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port = stranger.getsockname()[1]

            def answer(stranger=stranger, content=content):
                with contextlib.suppress(OSError):
                    connection, _ = stranger.accept()
                    connection.sendall(content)
                    time.sleep(1)

            threading.Thread(target=answer, daemon=True).start()
            with pytest.raises(ValueError, match="somebody answers, but not as the first process of this run"):
                processes.join(f"127.0.0.1:{port}", num_processes=2, process_id=1, wait=0.4)


def test_peers_that_never_come_are_named():
    port, told = free_port(), []
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"processes 1, 2, 3 of 4 did not come to port {port} within 0.5 s. Start them"
    ):
        processes.join(f"localhost:{port}", num_processes=4, process_id=0, wait=0.5, told=told.append)
    assert time.monotonic() - began < 5
    assert told == [f"waiting up to 0.5 s for processes 1, 2, 3 at port {port}"]
    with pytest.raises(ValueError, match="--wait must be a positive number of seconds, got 0"):
        processes.join(f"localhost:{port}", num_processes=4, process_id=0, wait=0.0)


def test_all_go_on_when_the_last_has_come_and_strangers_do_not_count():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(meeting.gather, port, 3, 20.0, lambda _: None)
        others = [pool.submit(meeting.attend, "localhost", port, 1, 3, 20.0, lambda _: None, "")]
        for said in (b"GET / HTTP/1.1\n", b"dae-theory 7 of 3\n", b"dae-theory 2 of 9\n", b""):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(ConnectionError), socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(said)
                    break
        time.sleep(0.2)
        assert not first.done()
        assert not others[0].done()
        others.append(pool.submit(meeting.attend, "localhost", port, 2, 3, 20.0, lambda _: None, ""))
        here, *there = [one.result(20) for one in (first, *others)]
    # The connections stay open, each to its process.
    assert sorted(here) == [1, 2]
    for number, connection in enumerate(there, 1):
        connection.sendall(bytes([number]))
        assert here[number].recv(1) == bytes([number])
        connection.close()
        here[number].close()
    # The port is free for JAX.
    socket.create_server(("localhost", port)).close()


def test_an_environment_without_a_cluster_says_how_to_name_one(tmp_path):
    code, error = ended(begin(tmp_path / "run", "--distributed"))
    assert code == 2
    assert "cannot join the other processes" in error
    assert "--coordinator HOST:PORT" in error
