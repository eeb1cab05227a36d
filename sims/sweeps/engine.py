"""Sweeps: every combination of a spec's axes trained and measured, as one labeled array.

The work is cut into units, a training set each, whose cells share rows, start and noise (common random numbers) and
one compiled program (:mod:`sims.sweeps.programs`). A unit is computed, written, and then counts; nothing depends on where
units are computed, in which order, or how cells are grouped.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils

from sims import store
from sims.sweeps.measures import DEFAULT, MEASURES, Measure
from sims.sweeps.programs import (
    Finished,
    Unit,
    Worlds,
    fit_cell,
    grid_of,
    others_alive,
    placement,
    run_units,
    segments_of,
    unit_program,
)
from sims.sweeps.spec import LOOP_AXES, OPTIONAL_AXES, VALUE_AXES, Spec
from sims.sweeps.worlds import World, facts, make_world

__all__ = ["Executor", "Progress", "all_units", "resolve_measures", "sweep", "worlds_of"]

Executor: TypeAlias = Callable[[Spec, Sequence[Unit], Mapping[str, Measure]], Iterable[Finished]]
"""Computes units, in any order."""


class Progress(NamedTuple):
    """Where a sweep stands; passed to its ``on_unit`` callback."""

    done: int
    """Cells finished, those of an earlier run too."""
    total: int
    unit: dict[str, int | float | str]
    """The unit just finished, by the value of its axes; empty at the start."""


def sweep(
    spec: Spec,
    measures: Sequence[str | Measure] | None = None,
    *,
    out: str | pathlib.Path | None = None,
    memory: int = 2 << 30,
    group: int | None = None,
    shard: tuple[int, int] | None = None,
    executor: Executor | None = None,
    on_unit: Callable[[Progress], None] | None = None,
) -> xr.Dataset:
    """Train and measure every cell of ``spec``.

    Args:
        spec: the experiment.
        measures: names of :data:`sims.sweeps.measures.MEASURES` or functions ``(params, data, spec) -> array`` of any shape,
            named by their ``__name__`` (default :data:`sims.sweeps.measures.DEFAULT`).
        out: folder where each unit is written when finished; the same call resumes. Without, results stay in memory.
        memory: bound on the temporaries of a compiled program on each device, in bytes: cells are split into groups
            that fit.
        group: cells of a group, if not as many as is fastest: results are equal bit for bit on any number of devices
            and processes where it is the same.
        shard: (I, N), to compute only every N-th unit, from the I-th, counted from 1.
        executor: computes the units instead of this process (:mod:`sims.sweeps.cluster`).
        on_unit: called at the start and after each unit.

    Returns one variable a measure over the dimensions of ``spec.shape``; a custom measure's own dimensions come last,
    and axes of one value that are no dimension are scalar coordinates. Over several processes
    (:mod:`sims.sweeps.processes`) all must call this alike; the first one writes, and the others return what they computed.
    ``ValueError`` for unknown or failing measures and for what the spec, the data set or the store refuse. Cells that
    diverge are NaN or infinite, and stay so.
    """
    chosen = resolve_measures(measures)
    worlds = worlds_of(spec)
    place = placement(memory=memory, group=group)
    template = _template(spec, chosen, worlds)
    dims = _unit_dims(spec)
    cells = spec.cells_per_unit

    def compute(places: Sequence[store.Unit]) -> Iterator[tuple[store.Unit, dict[str, np.ndarray], float]]:
        where = {_unit(spec, place): place for place in places}
        if executor is None:
            found = run_units(spec, list(where), chosen, worlds, place)
        else:
            found = executor(spec, list(where), chosen)
        for unit, values, wall_s in found:
            yield where[unit], _shaped(spec, dims, values), wall_s

    def report(done: int, total: int, place: store.Unit) -> None:
        if on_unit is not None:
            on_unit(Progress(done, total, {axis: template[axis].values[at].item() for axis, at in place.items()}))

    every = _places(spec, shard)
    total = cells * len(every)
    if out is None or jax.process_index() != 0:
        # Only the first process knows what an earlier run has finished.
        todo = _agreed(every, every)
        results = template.map(lambda variable: variable.copy(data=np.array(variable)))
        for done, (at, values, _) in enumerate(compute(todo), 1):
            for name, value in values.items():
                results[name][at] = value
            report(done * cells, total, at)
        return results
    identity = {**spec.to_dict(), "measures": list(chosen)}
    described = [facts(worlds(*source), spec) for source in _sources(spec)]
    with contextlib.ExitStack() as stack:
        try:
            provenance = {**store.environment(), "data": described}
            run = stack.enter_context(store.open_run(out, identity, template, dict.fromkeys(dims, 1), provenance))
        except ValueError:
            _agreed(every, None)
            raise
        pending = {_start(unit) for unit in store.pending(run)}
        todo = _agreed(every, [at for at in every if _start(at) in pending])
        before = total - cells * len(todo)
        report(before, total, {})
        for done, (at, values, wall_s) in enumerate(compute(todo), 1):
            store.write_chunk(run, at, values, wall_s=wall_s)
            report(before + done * cells, total, at)
    return store.load(out)


def resolve_measures(measures: Sequence[str | Measure] | None) -> dict[str, Measure]:
    """Names and functions as one dict from names to functions; ``ValueError`` for unknown or repeated names."""
    chosen: dict[str, Measure] = {}
    for measure in DEFAULT if measures is None else measures:
        name = measure if isinstance(measure, str) else getattr(measure, "__name__", "")
        if isinstance(measure, str):
            if name not in MEASURES:
                raise ValueError(f"unknown measure {name!r}; known are {', '.join(MEASURES)}.")
            measure = MEASURES[name]
        if not name.isidentifier():
            raise ValueError(f"a measure needs a name: give {measure!r} a __name__ that is an identifier.")
        if name in chosen:
            raise ValueError(f"measure {name!r} is listed twice.")
        chosen[name] = measure
    if not chosen:
        raise ValueError("no measures: name at least one.")
    return chosen


def worlds_of(spec: Spec) -> Worlds:
    """The data sets of ``spec``, by name and separation; each is loaded when first asked for."""

    @functools.cache
    def load(dataset: str, separation: float | None) -> World:
        return make_world(spec, dataset, separation)

    return load


def _sources(spec: Spec) -> list[tuple[str, float | None]]:
    return list(itertools.product(spec.dataset, spec.separation or (None,)))


def all_units(spec: Spec, shard: tuple[int, int] | None = None) -> list[Unit]:
    """The units of a sweep, or of one shard of it, in the order in which they are computed."""
    return [_unit(spec, place) for place in _places(spec, shard)]


def _places(spec: Spec, shard: tuple[int, int] | None) -> list[store.Unit]:
    dims = _unit_dims(spec)
    indices = itertools.product(*(range(spec.shape[axis]) for axis in dims))
    every = [dict(zip(dims, (slice(i, i + 1) for i in index), strict=True)) for index in indices]
    return every if shard is None else _shard(every, *shard)


def _unit_dims(spec: Spec) -> list[str]:
    """Dimensions of the results along which the work is cut."""
    return [axis for axis in spec.shape if axis in LOOP_AXES or axis == "seed"]


def _unit(spec: Spec, place: store.Unit) -> Unit:
    at = {axis: part.start for axis, part in place.items()}
    values = {axis: getattr(spec, axis)[at.get(axis, 0)] for axis in LOOP_AXES if getattr(spec, axis)}
    return Unit(**{"separation": None, **values}, seed=at["seed"])


def _template(spec: Spec, measures: Mapping[str, Measure], worlds: Worlds) -> xr.Dataset:
    """The empty results: labels from the spec, shapes and types of the measures from an abstract run of the first
    cell."""
    unit = _unit(spec, {axis: slice(0, 1) for axis in _unit_dims(spec)})
    for source in _sources(spec):
        worlds(*source)
    program, key, data = unit_program(spec, unit, worlds(unit.dataset, unit.separation))
    cell = jax.tree.map(lambda axis: axis[0], grid_of(spec))
    segments = segments_of(spec)
    values = jax.eval_shape(
        lambda key, data, cell: fit_cell(key, data, cell, program, segments, measures)[1], key, data, cell
    )
    coords: dict[str, Any] = {axis: list(getattr(spec, axis)) for axis in spec.shape if axis not in ("seed", "step")}
    coords |= {"seed": list(range(spec.seeds)), "step": list(spec.record_steps)}
    variables = {}
    for name, measure in measures.items():
        shape = values[name].shape[1:]
        plain = {f"{name}_{i}": list(range(size)) for i, size in enumerate(shape)}
        own = {dim: list(labels) for dim, labels in getattr(measure, "labels", plain).items()}
        if tuple(map(len, own.values())) != shape:
            raise ValueError(
                f"measure {name!r} returns shape {shape}, but its labels have lengths "
                f"{tuple(map(len, own.values()))}; correct its labels."
            )
        coords |= own
        summary = (measure.__doc__ or name).strip().splitlines()[0]
        variables[name] = ((*spec.shape, *own), values[name].dtype, {"long_name": summary})
    alone = {axis: getattr(spec, axis)[0] for axis in OPTIONAL_AXES if axis not in spec.shape and getattr(spec, axis)}
    return store.blank(coords | alone, variables)


def _shaped(spec: Spec, dims: Sequence[str], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From (cells, records, ...): the unit's axes have length one, the value axes come apart."""
    front = (*(1 for _ in dims), *(spec.shape[axis] for axis in VALUE_AXES))
    return {name: value.reshape(*front, *value.shape[1:]) for name, value in values.items()}


def _shard(units: list[store.Unit], index: int, count: int) -> list[store.Unit]:
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count} does not exist: the first number counts from 1 to the second.")
    mine = units[index - 1 :: count]
    if not mine:
        raise ValueError(f"shard {index}/{count} is empty: there are {len(units)} units of work; use fewer shards.")
    return mine


def _start(unit: store.Unit) -> tuple[int, ...]:
    return tuple(part.start for part in unit.values())


def _agreed(every: Sequence[store.Unit], todo: Sequence[store.Unit] | None) -> list[store.Unit]:
    """What the first process has to do, in every process; ``ValueError`` in the others if it cannot, with None."""
    if jax.process_count() == 1:
        return list(todo or ())
    ours = {_start(unit) for unit in todo or ()}
    told = np.asarray([todo is not None, *(_start(unit) in ours for unit in every)])
    with others_alive():
        able, *mask = np.asarray(multihost_utils.broadcast_one_to_all(told)).tolist()
    if not able and jax.process_index() != 0:
        raise ValueError("the first process cannot go on; see what it says.")
    return [unit for unit, wanted in zip(every, mask, strict=True) if wanted]
