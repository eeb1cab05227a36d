"""Sweeps: every combination of a spec's axes trained and measured, as one labeled array.

The work is cut into units, one training set each, whose cells share rows, start, noise (common random numbers) and one
compiled program (:mod:`sims.sweeps.programs`). A unit counts once it is written. Results do not depend on where units
are computed or in which order, and on the grouping of cells only by rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils
from jaxtyping import ArrayLike

from sims import store
from sims.data.arrays import digest_of, of_array
from sims.data.readers import Source
from sims.store.filling import Computed
from sims.store.run import Region
from sims.sweeps.measures import DEFAULT, MEASURES, Measure, diverged
from sims.sweeps.programs import (
    Finished,
    TrainingSet,
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

__all__ = ["CellProgress", "Executor", "all_units", "resolve_measures", "sweep", "with_divergence", "worlds_of"]

Executor: TypeAlias = Callable[[Spec, Sequence[TrainingSet], Mapping[str, Measure]], Iterable[Finished]]
"""Computes units and yields them in any order."""


class CellProgress(NamedTuple):
    """How far a sweep is; passed to its ``on_unit`` callback."""

    done: int
    """Cells finished, including those of an earlier run."""
    total: int
    unit: dict[str, int | float | str]
    """The unit just finished, as the values of its axes; empty at the start."""


def sweep(
    spec: Spec,
    measures: Sequence[str | Measure] | None = None,
    *,
    data: ArrayLike | Source | None = None,
    out: str | pathlib.Path | None = None,
    memory: int = 2 << 30,
    group: int | None = None,
    shard: tuple[int, int] | None = None,
    executor: Executor | None = None,
    on_unit: Callable[[CellProgress], None] | None = None,
) -> xr.Dataset:
    """Train and measure every cell of ``spec``.

    >>> spec = Spec(dataset="mixture:modes=2,dim=3,size=64", num_samples=4, sigma=(0.3, 0.6), width=2, steps=2, seeds=2)
    >>> results = sweep(spec, ["train_error"])
    >>> results.train_error.squeeze().dims, bool((results.train_error > 0).all())
    (('seed', 'sigma'), True)

    Args:
        spec: the experiment.
        measures: names of :data:`sims.sweeps.measures.MEASURES` or functions ``(params, data, spec) -> array`` of any
            shape, named by their ``__name__`` (default: :data:`sims.sweeps.measures.DEFAULT`).
        data: samples (N, d) or images (N, H, W[, C]), or a source with classes, in place of ``spec.dataset``, which is
            then left out. The results call it ``array:`` and a digest of its values, by which a run resumes.
        out: folder to which each finished unit is written; the same call resumes. Without it results stay in memory.
        memory: bound on the temporaries of a compiled program on each device, in bytes; cells are split into groups
            that fit.
        group: cells of a group (default: as many as fit, with work for every device). With the same value, results are
            bitwise equal on any number of devices and processes.
        shard: (I, N) computes only every N-th unit from the I-th, counted from 1.
        executor: computes the units instead of this process (:mod:`sims.sweeps.cluster`).
        on_unit: called at the start and after each unit.

    Returns one variable for each measure, and ``diverged`` (:func:`sims.sweeps.measures.diverged`), over the dimensions
    of ``spec.shape``, followed by a custom measure's own dimensions; axes of one value that are no dimension are scalar
    coordinates. Several processes (:mod:`sims.sweeps.processes`) must call this with equal arguments: the first one
    writes, and the others return what they computed. ``ValueError`` for unknown or failing measures, and for what the
    spec, the data set or the store refuse. Cells that diverge are stored as NaN or infinity.
    """
    chosen = resolve_measures(measures)
    source = None
    if data is not None:
        if executor is not None or spec.dataset != Spec().dataset:
            raise ValueError(
                "data is in this process alone, and takes the place of dataset: omit dataset and executor."
            )
        source = data if isinstance(data, Source) else of_array(data)
        spec = dataclasses.replace(spec, dataset=(f"array:{digest_of(source)}",))
    worlds = worlds_of(spec, source)
    place = placement(memory=memory, group=group)
    computed = with_divergence(chosen)
    template = _template(spec, computed, worlds)
    if out is not None and _begun_without_divergence(out):
        template = template.drop_vars("diverged")
    dims, regions = _unit_dims(spec), _regions(spec, shard)

    def compute(pending: Sequence[Region]) -> Iterator[Computed]:
        # Only the first process knows what an earlier run has finished.
        of_unit = {_unit(spec, region): region for region in _agreed(regions, pending)}
        units = list(of_unit)
        if executor is None:
            finished = run_units(spec, units, computed, worlds, place)
        else:
            finished = executor(spec, units, computed)
        for unit, values, wall_s in finished:
            values = _shaped(spec, dims, values)
            yield of_unit[unit], {name: value for name, value in values.items() if name in template}, wall_s

    def report(done: int, total: int, region: Region | None) -> None:
        if on_unit is not None:
            unit = {axis: template[axis].values[part].item() for axis, part in (region or {}).items()}
            on_unit(CellProgress(done * spec.cells_per_unit, total * spec.cells_per_unit, unit))

    if out is None or jax.process_index() != 0:
        results = template.map(lambda variable: variable.copy(data=np.array(variable)))
        report(0, len(regions), None)
        for done, (region, values, _) in enumerate(compute(regions), 1):
            for name, value in values.items():
                results[name][region] = value
            report(done, len(regions), region)
        return results
    identity = {**spec.to_dict(), "measures": list(chosen)}
    described = [facts(worlds(*source), spec) for source in _sources(spec)]
    with contextlib.ExitStack() as stack:
        try:
            provenance = {**store.environment(), "data": described}
            run = stack.enter_context(store.open_run(out, identity, template, dict.fromkeys(dims, 1), provenance))
        except ValueError:
            _agreed(regions, None)
            raise
        store.fill_units(run, compute, regions=regions, on_unit=report)
    return store.load(out)


def resolve_measures(measures: Sequence[str | Measure] | None) -> dict[str, Measure]:
    """A dict from names to functions; ``ValueError`` for unknown or repeated names."""
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


def with_divergence(measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """``measures``, and whether training has diverged, which every run records, whatever else is measured."""
    if measures.get("diverged", diverged) is not diverged:
        raise ValueError("measure 'diverged' needs another name: every sweep records its own.")
    return {**measures, "diverged": diverged}


def _begun_without_divergence(out: str | pathlib.Path) -> bool:
    """Whether ``out`` holds a run that an earlier version began, which did not record divergence."""
    with contextlib.suppress(ValueError):
        return "diverged" not in store.template_of(out)
    return False


def worlds_of(spec: Spec, source: Source | None = None) -> Worlds:
    """The data sets of ``spec``, or ``source`` for all, by name and separation, each loaded when first used."""

    @functools.cache
    def load(dataset: str, separation: float | None) -> World:
        return make_world(spec, dataset, separation, source)

    return load


def _sources(spec: Spec) -> list[tuple[str, float | None]]:
    return list(itertools.product(spec.dataset, spec.separation or (None,)))


def all_units(spec: Spec, shard: tuple[int, int] | None = None) -> list[TrainingSet]:
    """The units of a sweep, or of one of its shards, in the order in which they are computed."""
    return [_unit(spec, region) for region in _regions(spec, shard)]


def _regions(spec: Spec, shard: tuple[int, int] | None) -> list[Region]:
    dims = _unit_dims(spec)
    indices = itertools.product(*(range(spec.shape[axis]) for axis in dims))
    every = [dict(zip(dims, (slice(i, i + 1) for i in index), strict=True)) for index in indices]
    return every if shard is None else _shard(every, *shard)


def _unit_dims(spec: Spec) -> list[str]:
    """Dimensions of the results along which the work is cut into units."""
    return [axis for axis in spec.shape if axis in LOOP_AXES or axis == "seed"]


def _unit(spec: Spec, region: Region) -> TrainingSet:
    index = {axis: part.start for axis, part in region.items()}
    values = {axis: getattr(spec, axis)[index.get(axis, 0)] for axis in LOOP_AXES if getattr(spec, axis)}
    return TrainingSet(**{"separation": None, **values}, seed=index["seed"])


def _template(spec: Spec, measures: Mapping[str, Measure], worlds: Worlds) -> xr.Dataset:
    """The empty results: labels from the spec, and the measures' shapes and types from an abstract run of a cell."""
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
    labels = [axis for axis in OPTIONAL_AXES if axis not in spec.shape and not spec.is_left_out(axis)]
    alone = {axis: getattr(spec, axis)[0] for axis in labels if getattr(spec, axis)}
    return store.blank(coords | alone, variables)


def _shaped(spec: Spec, dims: Sequence[str], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From (cells, records, ...) to the results' dimensions; cells are split by axis, the unit's axes have length 1."""
    front = (*(1 for _ in dims), *(spec.shape[axis] for axis in VALUE_AXES))
    return {name: value.reshape(*front, *value.shape[1:]) for name, value in values.items()}


def _shard(regions: list[Region], index: int, count: int) -> list[Region]:
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count} does not exist: the first number counts from 1 to the second.")
    if count > len(regions):
        raise ValueError(f"shard {index}/{count}: there are {len(regions)} units of work; use at most as many shards.")
    return regions[index - 1 :: count]


def _start(region: Region) -> tuple[int, ...]:
    return tuple(part.start for part in region.values())


def _agreed(regions: Sequence[Region], pending: Sequence[Region] | None) -> list[Region]:
    """What the first process has to compute, in every process; None there is a ``ValueError`` in the others."""
    if jax.process_count() == 1:
        return list(pending or ())
    starts = {_start(region) for region in pending or ()}
    message = np.asarray([pending is not None, *(_start(region) in starts for region in regions)])
    with others_alive():
        able, *mask = np.asarray(multihost_utils.broadcast_one_to_all(message)).tolist()
    if not able and jax.process_index() != 0:
        raise ValueError("the first process has failed; see its message.")
    return [region for region, wanted in zip(regions, mask, strict=True) if wanted]
