"""Units of a sweep on a Dask cluster: machines that share nothing but a scheduler.

A unit goes out as one task and comes back as arrays; this process alone writes. A worker that dies is made good by the
scheduler, which gives its unit to another. What a unit computes does not depend on the worker, so the results equal
those of one machine (to the last bit on machines of one kind with groups of one size).

The members of a Dask cluster trust each other: whoever can reach its scheduler can run code on its workers. Keep it in
a private network, or let it speak TLS, whose files Dask's own configuration names::

    distributed:
      comm:
        require-encryption: true
        tls:
          ca-file: ca.pem
          scheduler: {cert: scheduler.pem, key: scheduler.key}
          worker: {cert: worker.pem, key: worker.key}
          client: {cert: client.pem, key: client.key}
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sims.engine import Executor, resolve_measures, worlds_of
from sims.measures import MEASURES, Measure
from sims.programs import Finished, Unit, placement, run_units
from sims.spec import Spec

__all__ = ["connected"]

RETRIES = 3
"""Failures of one unit on as many workers before the sweep gives up."""


@contextlib.contextmanager
def connected(
    address: str | None = None,
    *,
    local_workers: int = 0,
    memory: int = 2 << 30,
    group: int | None = None,
    timeout: float = 30.0,
) -> Iterator[Executor]:
    """An executor for :func:`sims.engine.sweep` on the Dask scheduler at ``address``, such as ``tcp://host:8786``, or
    on ``local_workers`` processes started here.

    ``memory`` and ``group`` are as in :func:`sims.engine.sweep`, for every worker. ``ValueError`` if Dask is not
    installed, both or neither of the two are given, or the scheduler cannot be reached within ``timeout`` seconds or is
    lost: what was finished before is kept.
    """
    try:
        import distributed
    except ImportError:
        raise ValueError("a Dask cluster needs the extra: pip install 'dae-theory[cluster]'.") from None
    if (address is None) == (local_workers < 1):
        raise ValueError("name one scheduler, or a positive number of local workers, not both.")
    with contextlib.ExitStack() as stack:
        try:
            if address is None:
                cluster = distributed.LocalCluster(
                    n_workers=local_workers, threads_per_worker=1, processes=True, dashboard_address=None
                )
                address = stack.enter_context(cluster).scheduler_address
            client = stack.enter_context(distributed.Client(address, timeout=timeout))
        except (OSError, ValueError) as error:
            raise ValueError(f"no Dask scheduler answers at {address} ({error}); start one or correct it.") from error
        yield functools.partial(_compute, client, memory, group)


def _compute(
    client: Any, memory: int, group: int | None, spec: Spec, units: Sequence[Unit], measures: Mapping[str, Measure]
) -> Iterator[Finished]:
    import distributed

    asked = [name if MEASURES.get(name) is measure else measure for name, measure in measures.items()]
    task = functools.partial(_run, spec.to_dict(), bool(jax.config.jax_enable_x64), memory, group)
    futures = client.map(task, list(units), measures=asked, retries=RETRIES, pure=False)
    waiting = {future.key: unit for future, unit in zip(futures, units, strict=True)}
    try:
        for future, found in distributed.as_completed(futures, with_results=True):
            del waiting[future.key]
            yield found
    except (OSError, distributed.CancelledError, distributed.KilledWorker) as error:
        raise ValueError(
            f"the Dask cluster was lost ({type(error).__name__}: {error}); {len(waiting)} units are left. Run the same "
            "command again: finished units are kept."
        ) from error
    if waiting:
        raise ValueError(f"the Dask cluster was lost; {len(waiting)} units are left. Run the same command again.")


def _run(
    spec: dict[str, Any],
    double: bool,
    memory: int,
    group: int | None,
    unit: Unit,
    measures: Iterable[str | Measure],
) -> Finished:
    """One unit, in a worker."""
    asked = Spec.from_dict(spec)
    place = placement(memory=memory, group=group)
    with jax.enable_x64(double):
        (found,) = run_units(asked, [unit], resolve_measures(tuple(measures)), _worlds(asked), place)
    return found._replace(values={name: np.asarray(value) for name, value in found.values.items()})


_worlds = functools.lru_cache(maxsize=4)(worlds_of)
