r"""Speed as a ratio: two ways to do one thing, timed in turn in one process, so that a drift of the machine cancels.

Each pair of runs gives :math:`r_k = t_k^\text{rival} / t_k^\text{ours}`, so more is better; a :class:`Row` has their
median, smallest and largest value. Rivals in PyTorch run with one thread or with all, whichever is faster here: beside
other work, threads that wait for each other make a small step fifty times slower. A row whose rival's times differ by
more than a factor of two has no ratio.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax

from sims.store.files import write_text

__all__ = [
    "Row",
    "apart",
    "compare",
    "fastest_threads",
    "peak_memory",
    "per_unit",
    "row",
    "seconds",
    "table",
    "temporaries",
    "threads",
    "write_json",
]


class Row(NamedTuple):
    """The result of one comparison; without a rival its fields are None.

    Times are medians in seconds. ``notes`` holds further values of the row, as JSON.
    """

    name: str
    ours_s: float
    rival_s: float | None
    ratio_median: float | None
    ratio_min: float | None
    ratio_max: float | None
    notes: Mapping[str, Any] = {}


def compare(
    name: str,
    ours: Callable[[], object],
    rival: Callable[[], object] | None,
    repeats: int,
    *,
    warm_up: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> Row:
    """Time both in turn ``repeats`` times, each call until its arrays are computed.

    Args:
        name: of the row.
        ours: the function to be timed.
        rival: the function to compare it with, or None.
        repeats: number of pairs of calls, >= 1.
        warm_up: call each once before, so that compilation is not timed.
        notes: of the row.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    if rival is not None and (threads := fastest_threads(rival)):
        notes = {**(notes or {}), "rival_threads": threads}
    if warm_up:
        seconds(ours)
        if rival is not None:
            seconds(rival)
    pairs = [(seconds(ours), None if rival is None else seconds(rival)) for _ in range(repeats)]
    theirs = [their for _, their in pairs if their is not None]
    return row(name, [our for our, _ in pairs], theirs or None, notes=notes)


def threads() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest_threads(rival: Callable[[], object]) -> int:
    """Leave PyTorch with one thread or with one per core, whichever runs ``rival`` faster; returns the number.

    0, and nothing is called, where PyTorch has not been imported.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    times = {}
    for count in {1, threads()}:
        torch.set_num_threads(count)
        # The first call may allocate.
        seconds(rival)
        times[count] = seconds(rival)
    best = min(times, key=lambda count: times[count])
    torch.set_num_threads(best)
    return best


def seconds(function: Callable[[], object]) -> float:
    """The time of one call, until its arrays are computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def row(
    name: str, ours: Sequence[float], rival: Sequence[float] | None, *, notes: Mapping[str, Any] | None = None
) -> Row:
    """A row from given times, the k-th of ``ours`` beside the k-th of ``rival``.

    It has no ratios, and a note that says why, if the rival's times differ by more than a factor of two.
    """
    if rival is not None and max(rival) > 2 * min(rival):
        busy = f"the rival took from {min(rival):.3g} to {max(rival):.3g} s, so the machine is not idle: no ratio"
        medians = statistics.median(ours), statistics.median(rival)
        return Row(name, *medians, None, None, None, {**(notes or {}), "busy": busy})
    if rival is None:
        return Row(name, statistics.median(ours), None, None, None, None, dict(notes or {}))
    ratios = [their / our for our, their in zip(ours, rival, strict=True)]
    medians = (statistics.median(ours), statistics.median(rival), statistics.median(ratios))
    return Row(name, *medians, min(ratios), max(ratios), dict(notes or {}))


def per_unit(total: Row, ours: int, rival: int) -> Row:
    """Times and ratios for one of the ``ours`` and ``rival`` units of work that a call makes."""
    if total.rival_s is None:
        return total._replace(ours_s=total.ours_s / ours)
    median, least, most = (
        None if ratio is None else ratio * ours / rival
        for ratio in (total.ratio_median, total.ratio_min, total.ratio_max)
    )
    return Row(total.name, total.ours_s / ours, total.rival_s / rival, median, least, most, total.notes)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table with aligned columns; notes come last, without lists (curves)."""
    head = ("name", "ours s", "rival s", "ratio", "min", "max", "notes")
    cells = [(r.name, *map(_number, r[1:-1]), _notes(r.notes)) for r in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    rule = tuple("-" * width for width in widths)
    lines = (" | ".join(map(str.ljust, line, widths)) for line in (head, rule, *cells))
    return "\n".join(f"| {line} |" for line in lines)


def write_json(path: str | pathlib.Path, rows: Sequence[Row]) -> None:
    """Write the rows as a list of objects with the fields of :class:`Row`."""
    write_text(pathlib.Path(path), json.dumps([row._asdict() for row in rows], indent=1) + "\n")


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes; call it in a process of its own.

    On Linux it is read from ``/proc/self/status``: getrusage there includes the memory that the parent had when it
    started this process.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs beside its arguments and results; -1 where the backend does not tell."""
    memory = compiled.memory_analysis()
    return -1 if memory is None else memory.temp_size_in_bytes


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _notes(notes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_note(value)}" for name, value in notes.items() if not isinstance(value, list | tuple))


def _note(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
