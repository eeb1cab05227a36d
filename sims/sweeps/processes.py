"""One sweep on the processes of a cluster, with ``jax.distributed``: every process runs the same command.

All processes have the same number of devices, and groups of cells run on all of them (:mod:`sims.sweeps.programs`). The
first process writes the results; the others compute without output. Flags name the coordinator, or JAX finds it in the
environment of SLURM, Open MPI, Kubernetes or a TPU pod.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from sims.sweeps.meeting import attend, gather, leave, watch

__all__ = ["Company", "join", "share_cores", "split_cores", "together"]

WORKERS = 4
"""Worker threads for each device into which a CPU is split."""


MAX_DEVICES = 1024
"""Devices that a CPU is split into."""


class Company(NamedTuple):
    """The processes of one run: this one's number, their count, and connections to the first one, or to all others."""

    number: int
    count: int
    connections: Mapping[int, socket.socket]


def split_cores(devices: int) -> None:
    """Split a CPU into this number of devices; call it before anything else of JAX.

    Small operations keep one core busy, so cells on one device for each core are faster than cells on one device that
    may use all cores (``python -m sims.bench --only devices_2``). Accelerators are not split. ``ValueError`` if
    ``devices`` is not positive, if the environment sets another number, or if JAX has started.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise ValueError(f"--devices must be from 1 to {MAX_DEVICES}, got {devices}; more than cores are of no use.")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        raise ValueError("XLA_FLAGS sets the number of CPU devices; give --devices or that flag, not both.")
    # The devices of a CPU share a pool of one worker thread a core, and batched linear algebra holds a worker while it
    # waits for others (jaxlib 0.10): with as many devices as workers, all may wait forever. This variable sets a larger
    # pool, so that some stay free.
    os.environ.setdefault("NPROC", str(WORKERS * devices))
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise ValueError(f"--devices must be given before JAX starts: {error}") from error


def share_cores(workers: int) -> None:
    """Take a share of the cores, as one of ``workers`` processes of a machine; call it before anything else of JAX."""
    os.environ.setdefault("NPROC", str(max(1, (os.cpu_count() or 1) // workers)))


def join(
    coordinator: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait: float = 60.0,
    told: Callable[[str], None] = lambda _: None,
) -> Company:
    """Join the other processes.

    Call it before anything else of JAX. ``coordinator`` is HOST:PORT of the first process. If all three are None, JAX
    reads them from the environment. Processes may start ``wait`` seconds apart; ``told`` is given a line that says who
    is awaited. ``ValueError`` if one of the three is missing or out of range, or if somebody does not come.
    """
    connections: dict[int, socket.socket] = {}
    if not 0 < wait < 1e6:
        raise ValueError(f"--wait must be a positive number of seconds, got {wait}.")
    if any(one is not None for one in (coordinator, num_processes, process_id)):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("give --coordinator, --num-processes and --process-id together, or none of them.")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id must lie in [0, {num_processes}), got {process_id}.")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator must be HOST:PORT, such as node1:8476; got {coordinator!r}.")
        if process_id > 0:
            connections = {0: attend(host.strip("[]"), int(port), process_id, num_processes, wait, told, ADVICE)}
            _await(host.strip("[]"), int(port), wait)
        else:
            connections = gather(int(port), num_processes, wait, told)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=max(1, round(wait)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join the other processes: {error}. {ADVICE}") from error
    return Company(jax.process_index(), jax.process_count(), connections)


@contextlib.contextmanager
def together(company: Company) -> Iterator[None]:
    """Work that needs all processes: if one is lost, this one ends with a message, in place of JAX's own abort.

    Of processes that JAX found in its environment the connections are unknown, and JAX's abort remains.
    """
    watch(company.connections)
    try:
        yield
    except BaseException:
        leave(company.connections, failed=True)
        raise
    leave(company.connections)


ADVICE = (
    "Check that the first process runs and can be reached, or name it with --coordinator HOST:PORT --num-processes N "
    "--process-id I."
)


def _await(host: str, port: int, timeout: float) -> None:
    """Return once JAX listens in the first process."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"no process answers at {host}:{port} ({error}). {ADVICE}") from error
        time.sleep(0.1)
