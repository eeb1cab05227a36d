"""Units of a sweep on a Dask cluster: machines that share nothing but a scheduler.

Each unit is one task whose result is its arrays; only this process writes. If a worker dies, the scheduler gives its
unit to another one. The results of a unit do not depend on the worker, so they equal those of one machine (bitwise, on
machines of one kind with groups of one size).

The members of a Dask cluster trust each other: whoever can reach its scheduler can run code on its workers. Keep it in
a private network, or use TLS, whose files are named in Dask's configuration::

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
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from sims.store.chunks import AGAIN
from sims.sweeps.engine import Executor, resolve_measures, worlds_of
from sims.sweeps.measures import MEASURES, Measure
from sims.sweeps.programs import Finished, TrainingSet, placement, run_units
from sims.sweeps.spec import Spec

__all__ = ["connected"]

RETRIES = 3
"""Workers on which one unit may fail before the sweep gives up."""


@contextlib.contextmanager
def connected(
    address: str | None = None,
    *,
    local_workers: int = 0,
    memory: int = 2 << 30,
    group: int | None = None,
    wait: float = 60.0,
    told: Callable[[str], None] = lambda _: None,
) -> Iterator[Executor]:
    """An executor for :func:`sims.sweeps.engine.sweep` that computes on Dask workers.

    Args:
        address: of a Dask scheduler, such as ``tcp://host:8786``.
        local_workers: number of worker processes to start here, instead of an address.
        memory: as in :func:`sims.sweeps.engine.sweep`, for every worker.
        group: as in :func:`sims.sweeps.engine.sweep`.
        wait: seconds to wait for the scheduler, and for its first worker.
        told: given a line that says who is awaited.

    ``ValueError`` if Dask is not installed, if both or neither of address and local workers are given, or if the
    scheduler cannot be reached, has no worker, or is lost; finished units are kept.
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
                # Its annotations allow neither a cluster without dashboard nor one that is not awaited.
                cluster: Any = distributed.LocalCluster(
                    n_workers=local_workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=None,  # pyright: ignore[reportArgumentType]
                )
                address = stack.enter_context(cluster).scheduler_address
            told(f"waiting up to {wait:g} s for the scheduler {address} and a worker")
            if not local_workers and address is not None:
                _await_scheduler(address, wait)
            client = stack.enter_context(distributed.Client(address, timeout=wait))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`, or correct the "
                "address."
            ) from error
        try:
            client.wait_for_workers(1, timeout=wait)
        except TimeoutError:
            raise ValueError(
                f"the Dask scheduler {address} has no worker after {wait:g} s; start some with `dask worker "
                f"{address}`, or wait longer (--wait SECONDS)."
            ) from None
        yield functools.partial(_compute, client, memory, group)


def _await_scheduler(address: str, wait: float) -> None:
    """Return once something speaks at the address, as a Dask scheduler does; ``OSError`` otherwise.

    A client would wait for ever for the answer of a port that accepts connections and says nothing.
    """
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme not in ("", "tcp") or not port.isdecimal():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=wait) as connection:
        connection.settimeout(wait)
        with contextlib.suppress(TimeoutError):
            if connection.recv(1):
                return
    raise OSError(f"something accepts connections and says nothing for {wait:g} s")


def _compute(
    client: Any,
    memory: int,
    group: int | None,
    spec: Spec,
    units: Sequence[TrainingSet],
    measures: Mapping[str, Measure],
) -> Iterator[Finished]:
    import cloudpickle
    import distributed

    chosen = [name if MEASURES.get(name) is measure else measure for name, measure in measures.items()]
    payload = cloudpickle.dumps((spec.to_dict(), chosen, bool(jax.config.read("jax_enable_x64")), memory, group))
    tasks = client.map(functools.partial(_run, payload), list(units), retries=RETRIES, pure=False)
    left = len(units)
    try:
        for future in distributed.as_completed(tasks):
            result = future.result()
            left -= 1
            yield result
    except distributed.KilledWorker as error:
        raise ValueError(
            f"a unit of work ended every worker that took it ({error}); {left} units are left. Give workers more "
            f"memory, or a smaller --memory here, and {AGAIN}."
        ) from error
    except (OSError, distributed.CancelledError) as error:
        raise ValueError(
            f"the Dask cluster was lost ({type(error).__name__}); {left} units are left. Start it again, or leave it "
            f"out, and {AGAIN}."
        ) from error
    except ImportError as error:
        raise ValueError(
            f"a worker of the Dask cluster fails: {error}. Install the same packages on all of its members; a measure "
            "must be importable there, or defined in the script that is run."
        ) from error


def _run(payload: bytes, unit: TrainingSet) -> Finished:
    """One unit, in a worker."""
    (finished,) = _prepared(payload)(unit)
    return finished


@functools.lru_cache(maxsize=4)
def _prepared(payload: bytes) -> Callable[[TrainingSet], Iterator[Finished]]:
    """The function that computes a unit of a sweep in a worker; data sets are loaded once."""
    import cloudpickle

    fields, chosen, double, memory, group = cloudpickle.loads(payload)
    jax.config.update("jax_enable_x64", double)
    spec, measures = Spec.from_dict(fields), resolve_measures(chosen)
    place, worlds = placement(memory=memory, group=group), worlds_of(spec)
    return lambda unit: run_units(spec, [unit], measures, worlds, place)
