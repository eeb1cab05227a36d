"""Estimates of a sweep before it is run: cells, programs, memory and time.

The cheapest and the most expensive program are compiled and run for a few steps; between them, time is interpolated
linearly in the operations of a step. The error is some tens of percent on an otherwise idle machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sims.sweeps.engine import all_units, resolve_measures, with_divergence, worlds_of
from sims.sweeps.measures import Measure
from sims.sweeps.programs import (
    REMEMBERED,
    Job,
    Numbers,
    Placement,
    alike_units,
    compile_job,
    compile_key,
    grid_of,
    job_of,
    placement,
    segments_of,
)
from sims.sweeps.spec import Spec

__all__ = ["Plan", "as_text", "plan"]

PROBE_STEPS = 20
"""Steps of the first timed run of a probe."""


class Plan(NamedTuple):
    """An estimate, in seconds and bytes."""

    cells: int
    units: int
    """Units of work, each computed and written as a whole."""
    programs: int
    group: int
    """Cells that run together in the most expensive program."""
    memory: int
    """Largest temporaries of a program on each device."""
    compile_s: float
    run_s: float
    results: int
    """Size of the finished results."""


class _Probe(NamedTuple):
    work: float
    group: int
    parts: int
    """Groups of a unit."""
    memory: int
    compile_s: float
    launch_s: float
    """Time of one group without steps: launch, start and measures."""
    step_s: float
    """Time of one step of a group."""
    results: int
    """Size of the results of a group."""


def plan(
    spec: Spec,
    measures: Sequence[str | Measure] | None = None,
    *,
    memory: int = 2 << 30,
    group: int | None = None,
    shard: tuple[int, int] | None = None,
    told: Callable[[str], None] | None = None,
) -> Plan:
    """Estimate a sweep of ``spec`` on this machine, or one of its shards.

    Arguments and errors are those of :func:`sims.sweeps.engine.sweep`; ``told`` is called with a line before whatever
    may take long.
    """
    told = told or (lambda _: None)
    told("reading the data")
    chosen, place = with_divergence(resolve_measures(measures)), placement(memory=memory, group=group)
    worlds = worlds_of(spec)
    kinds = [(job_of(spec, alike[0], worlds), len(alike)) for alike in alike_units(all_units(spec, shard))]
    kinds.sort(key=lambda kind: _work(kind[0]))
    keys = [compile_key(spec, job, chosen, place) for job, _ in kinds]
    told("compiling and timing the unit of the least work")
    least = _probe(spec, kinds[0][0], chosen, place)
    # Compiled a second time, the same program would come from memory and seem to take no time.
    most = least
    if keys[-1] != keys[0]:
        told("compiling and timing the unit of the most work")
        most = _probe(spec, kinds[-1][0], chosen, place)
    programs = len(set(keys)) if len(set(keys)) <= REMEMBERED else len(kinds)
    cells = spec.cells_per_unit
    devices = len(place.devices)

    def seconds(probe: _Probe, units: int) -> float:
        # Devices without work wait for the others.
        return math.ceil(units * probe.parts / devices) * (probe.launch_s + spec.steps * probe.step_s)

    run_s = 0.0
    for job, count in kinds:
        share = (_work(job) - least.work) / max(most.work - least.work, 1.0)
        low, high = seconds(least, count), seconds(most, count)
        run_s += low + share * (high - low)
    units = sum(count for _, count in kinds)
    return Plan(
        cells=cells * units,
        units=units,
        programs=programs,
        group=most.group,
        memory=max(least.memory, most.memory),
        compile_s=programs * (least.compile_s + most.compile_s) / 2,
        run_s=run_s,
        results=cells * units * most.results // most.group,
    )


def as_text(estimate: Plan) -> str:
    """The estimate as text."""
    return (
        f"{estimate.cells:,} cells in {estimate.units:,} units of work; {estimate.programs} compiled programs, "
        f"{estimate.group} cells at a time.\n"
        f"Memory: about {_bytes(estimate.memory)} of temporaries on each device; "
        f"results about {_bytes(estimate.results)}.\n"
        f"Time: about {_duration(estimate.compile_s)} to compile and {_duration(estimate.run_s)} to run.\n"
    )


def _work(job: Job) -> float:
    """Multiplications of a step, up to a constant factor."""
    recipe, (rows, dim) = job.program.recipe, job.data.train.shape
    return float(min(recipe.batch_size or rows, rows) * dim * recipe.width)


def _probe(spec: Spec, job: Job, measures: Mapping[str, Measure], place: Placement) -> _Probe:
    begin = time.perf_counter()
    compiled = compile_job(spec, job, measures, place)
    compile_s = time.perf_counter() - begin
    # A group for every device: devices of one machine share its cores and its memory.
    some = [(job, Numbers(*(axis[: compiled.group] for axis in grid_of(spec))))] * len(place.devices)

    def seconds(steps: int) -> float:
        segments = np.zeros_like(segments_of(spec))
        segments[0] = steps
        began = time.perf_counter()
        compiled.launch(some, segments)
        return time.perf_counter() - began

    values, *_ = compiled.launch(some, np.zeros_like(segments_of(spec)))
    idle, steps = min(seconds(0) for _ in range(3)), PROBE_STEPS
    # Measures may take far longer than a step: take enough steps to be visible beside them.
    while (moving := seconds(steps)) < 1.5 * idle and steps < spec.steps:
        steps *= 4
    return _Probe(
        work=_work(job),
        group=compiled.group,
        parts=math.ceil(spec.cells_per_unit / compiled.group),
        memory=compiled.memory,
        compile_s=compile_s,
        launch_s=idle,
        step_s=max(0.0, moving - idle) / steps,
        results=sum(value.nbytes for value in values.values()),
    )


def _bytes(size: float | int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError


def _duration(seconds: float | int) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
