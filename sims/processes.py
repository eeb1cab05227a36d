"""One sweep over the processes of a cluster, by ``jax.distributed``: every process runs the same command.

Each process brings its devices; together they are one mesh (:mod:`sims.programs`). The first process writes the
results, the others compute along and are silent. Who coordinates is told by flags, or found by JAX in the environment
of SLURM, Open MPI, Kubernetes or a TPU pod.
"""

from __future__ import annotations

import jax

__all__ = ["join"]


def join(
    coordinator: str | None = None, *, num_processes: int | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Join the other processes, before anything else of JAX is used; returns this process's number and their count.

    ``coordinator`` is HOST:PORT of the first process; all three None: found in the environment. ``ValueError`` if a
    part is missing or out of range, or nobody answers.
    """
    told = (coordinator, num_processes, process_id)
    if any(part is not None for part in told):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError("give --coordinator, --num-processes and --process-id together, or none of them.")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id must lie in [0, {num_processes}), got {process_id}.")
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot join the other processes: {error}. Check that the coordinator runs and can be reached, or name it "
            "with --coordinator HOST:PORT --num-processes N --process-id I."
        ) from error
    return jax.process_index(), jax.process_count()
