"""One sweep over the processes of a cluster, by ``jax.distributed``: every process runs the same command.

Each process brings its devices, all as many; groups of cells lie on all of them (:mod:`sims.programs`). The first
process writes the results, the others compute along and are silent. Who coordinates is told by flags, or found by JAX
in the environment of SLURM, Open MPI, Kubernetes or a TPU pod.
"""

from __future__ import annotations

import os
import socket
import time

import jax

__all__ = ["join", "split_cores"]

MOST_DEVICES = 8
"""Each needs memory of its own, and compiles for itself."""


def split_cores(devices: int | None = None) -> None:
    """Make of a CPU so many devices, before anything else of JAX is used; None: one a core, at most 8.

    Small operations keep one core busy, so cells side by side on as many devices are faster than one device that is
    free to use all cores (``python -m sims.bench --only devices_2``). Where the environment has a say
    (``JAX_NUM_CPU_DEVICES``, ``XLA_FLAGS``), None leaves it. Accelerators are devices as they are. ``ValueError``
    unless ``devices`` is positive, or if JAX has started.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"--devices must be at least 1, got {devices}.")
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices is None and (told or jax.config.jax_num_cpu_devices > 0):
        return
    if devices is not None and told:
        raise ValueError("XLA_FLAGS says how many devices a CPU has; leave --devices out, or that flag.")
    try:
        jax.config.update("jax_num_cpu_devices", devices or min(MOST_DEVICES, _cores()))
    except RuntimeError as error:
        if devices is not None:
            raise ValueError(f"--devices must be given before JAX starts: {error}") from error


def join(
    coordinator: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> tuple[int, int]:
    """Join the other processes, before anything else of JAX is used; returns this process's number and their count.

    ``coordinator`` is HOST:PORT of the first process; all three None: found in the environment. The others may start
    ``timeout`` seconds apart. ``ValueError`` if a part is missing or out of range, or nobody answers.
    """
    told = (coordinator, num_processes, process_id)
    if any(part is not None for part in told):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("give --coordinator, --num-processes and --process-id together, or none of them.")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id must lie in [0, {num_processes}), got {process_id}.")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator must be HOST:PORT, such as node1:8476; got {coordinator!r}.")
        if process_id > 0:
            # JAX would abort this process, without an exception.
            _await(host.strip("[]"), int(port), timeout)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=round(timeout))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join the other processes: {error}. {ADVICE}") from error
    return jax.process_index(), jax.process_count()


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ADVICE = (
    "Check that the first process runs and can be reached, or name it with --coordinator HOST:PORT --num-processes N "
    "--process-id I."
)


def _await(host: str, port: int, timeout: float) -> None:
    """Return when the first process listens."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"nobody answers at {host}:{port} ({error}). {ADVICE}") from error
        time.sleep(0.1)
