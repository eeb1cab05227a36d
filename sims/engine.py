"""Sweeps: every combination of a spec's axes trained and measured, as one labeled array.

Axes that change shapes (n, p) and the seed loop in Python; axes of numbers (λ, learning rate, initial scale, σ) are
mapped inside one compiled program, which all seeds of a shape share. A unit of work is one (n, p, seed): it is
computed, written, and then counts. All cells of a seed see the same rows, start and noise (common random numbers), and
nothing depends on how cells are grouped.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Int

from dae_theory import ReluDae
from dae_theory.types import PRNGKey, Scalar
from sims import store
from sims.measures import DEFAULT, MEASURES, CellData, CellSpec, Measure
from sims.spec import SHAPE_AXES, VALUE_AXES, Spec
from sims.train import Recipe, advance, start
from sims.worlds import World, cell_data, make_world

__all__ = ["Numbers", "Progress", "fit_cell", "recipe_of", "resolve_measures", "segments_of", "sweep"]

UNIT_AXES = (*SHAPE_AXES, "seed")
"""Dimensions along which the work is cut: one unit has one value of each."""


class Numbers(NamedTuple):
    """The traced numbers of a cell, scalars; or of many, vectors."""

    penalty: Scalar
    learning_rate: Scalar
    init_scale: Scalar
    sigma: Scalar


class Progress(NamedTuple):
    """Where a sweep stands; passed to its ``on_unit`` callback."""

    done: int
    """Cells finished, those of an earlier run too."""
    total: int
    unit: dict[str, int | float]
    """The unit just finished, by the value of its axes; empty at the start."""


def sweep(
    spec: Spec,
    measures: Sequence[str | Measure] | None = None,
    *,
    out: str | pathlib.Path | None = None,
    memory: int = 2 << 30,
    on_unit: Callable[[Progress], None] | None = None,
) -> xr.Dataset:
    """Train and measure every cell of ``spec``.

    ``measures`` are names of :data:`sims.measures.MEASURES` or functions ``(params, data, spec) -> array`` of any
    shape, named by their ``__name__`` (default :data:`sims.measures.DEFAULT`). With ``out`` each unit is written when
    finished, and the same call resumes; without, results stay in memory. ``memory`` bounds the temporaries of a
    compiled program, in bytes: cells are split into groups that fit. Returns one variable a measure over the dimensions
    of ``spec.shape``; a custom measure's own dimensions come last. ``ValueError`` for unknown measures and for what the
    spec, the data set or the store refuse. Cells that diverge are NaN or infinite, and stay so.
    """
    chosen = resolve_measures(measures)
    world = make_world(spec)
    template = _template(spec, world, chosen)
    run_unit = _unit_runner(spec, world, chosen, memory)
    total = spec.num_cells
    cells = total // math.prod(spec.shape[axis] for axis in UNIT_AXES)
    if out is None:
        results = template.map(lambda variable: variable.copy(data=np.array(variable)))
        for done, unit in enumerate(_units(spec), 1):
            for name, values in run_unit(unit).items():
                results[name][unit] = values
            _report(on_unit, done * cells, total, template, unit)
        return results
    identity = {**spec.to_dict(), "measures": list(chosen)}
    provenance = {**store.environment(), "data": world.facts}
    with store.open_run(out, identity, template, dict.fromkeys(UNIT_AXES, 1), provenance) as run:
        units = store.pending(run)
        before = total - cells * len(units)
        _report(on_unit, before, total, template, {})
        for done, unit in enumerate(units, 1):
            begin = time.perf_counter()
            values = run_unit(unit)
            store.write_chunk(run, unit, values, wall_s=time.perf_counter() - begin)
            _report(on_unit, before + done * cells, total, template, unit)
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


def recipe_of(spec: Spec, width: int) -> Recipe:
    """The static part of training a network of ``width`` units."""
    return Recipe(
        width=width,
        optimizer=spec.optimizer,
        schedule=spec.schedule,
        steps=spec.steps,
        batch_size=spec.batch_size,
        tied=spec.tied,
        weight_decay=spec.weight_decay,
    )


def segments_of(spec: Spec) -> np.ndarray:
    """Numbers of steps between records, int32."""
    return np.diff(np.asarray(spec.record_steps, np.int32), prepend=np.int32(0))


def fit_cell(
    key: PRNGKey,
    data: CellData,
    numbers: Numbers,
    recipe: Recipe,
    segments: Int[Array, " r"],
    evaluation: CellSpec,
    measures: tuple[Measure, ...],
) -> tuple[ReluDae, tuple[Array, ...]]:
    """One experiment: train a network, and take ``measures`` after each of ``segments`` steps; pure, mapped by sweeps.

    ``segments`` are the step counts between records; ``evaluation`` is completed with the cell's σ and λ. Returns the
    network at the end and, for each measure, its values stacked along a leading axis of records.
    """
    init_key, step_key = jax.random.split(key)
    dim = data.train.shape[1]
    rates = {"learning_rate": numbers.learning_rate}
    state = start(init_key, dim, recipe, init_scale=numbers.init_scale, dtype=data.train.dtype, **rates)
    cell = evaluation._replace(sigma=numbers.sigma, penalty=numbers.penalty)

    def record(state: Any, num_steps: Int[Array, ""]) -> tuple[Any, tuple[Array, ...]]:
        state = advance(
            state, step_key, data.train, num_steps, recipe, sigma=numbers.sigma, penalty=numbers.penalty, **rates
        )
        return state, tuple(jnp.asarray(measure(state.dae, data, cell)) for measure in measures)

    state, values = jax.lax.scan(record, state, segments)
    return state.dae, values


def _units(spec: Spec) -> list[store.Unit]:
    sizes = [range(spec.shape[axis]) for axis in UNIT_AXES]
    return [dict(zip(UNIT_AXES, (slice(i, i + 1) for i in index), strict=True)) for index in itertools.product(*sizes)]


def _report(
    on_unit: Callable[[Progress], None] | None, done: int, total: int, template: xr.Dataset, unit: store.Unit
) -> None:
    if on_unit is not None:
        on_unit(Progress(done, total, {axis: template[axis].values[index].item() for axis, index in unit.items()}))


def _template(spec: Spec, world: World, measures: Mapping[str, Measure]) -> xr.Dataset:
    """The empty results: labels from the spec, shapes and types of the measures from an abstract run of the first
    cell."""
    unit = _units(spec)[0]
    values = jax.eval_shape(*_cells(spec, world, measures, unit))
    coords = {axis: list(getattr(spec, axis)) for axis in (*SHAPE_AXES, *VALUE_AXES)}
    coords |= {"seed": list(range(spec.seeds)), "step": list(spec.record_steps)}
    variables = {}
    for (name, measure), value in zip(measures.items(), values, strict=True):
        plain = {f"{name}_{i}": list(range(size)) for i, size in enumerate(value.shape[2:])}
        own = {dim: list(labels) for dim, labels in getattr(measure, "labels", plain).items()}
        coords |= own
        summary = (measure.__doc__ or name).strip().splitlines()[0]
        variables[name] = ((*spec.shape, *own), value.dtype, {"long_name": summary})
    return store.blank(coords, variables)


def _unit_runner(
    spec: Spec, world: World, measures: Mapping[str, Measure], memory: int
) -> Callable[[store.Unit], dict[str, np.ndarray]]:
    """A function that computes one unit; units of one shape share a program, and the last program is kept."""
    axis_sizes = tuple(spec.shape[axis] for axis in VALUE_AXES)
    latest: dict[tuple[int, ...], Callable[..., list[np.ndarray]]] = {}

    def run_unit(unit: store.Unit) -> dict[str, np.ndarray]:
        shape = tuple(unit[axis].start for axis in SHAPE_AXES)
        function, numbers, key, data = _cells(spec, world, measures, unit)
        if shape not in latest:
            latest.clear()
            latest[shape] = _compile(function, numbers, key, data, memory=memory)
        values = latest[shape](numbers, key, data)
        # (cells, records, ...): the unit's axes have length one, the value axes come apart.
        return {
            name: value.reshape(*(1,) * len(UNIT_AXES), *axis_sizes, *value.shape[1:])
            for name, value in zip(measures, values, strict=True)
        }

    return run_unit


def _cells(
    spec: Spec, world: World, measures: Mapping[str, Measure], unit: store.Unit
) -> tuple[Callable[..., tuple[Array, ...]], Numbers, PRNGKey, CellData]:
    """A function of (numbers, key, data) that runs all cells of a unit, mapped over the numbers; and its arguments."""
    num_samples, width = (getattr(spec, axis)[unit[axis].start] for axis in SHAPE_AXES)
    key, data, identity = cell_data(world, spec, num_samples, unit["seed"].start)
    recipe = recipe_of(spec, width)
    evaluation = CellSpec(0.0, 0.0, spec.eval_samples, spec.eval_draws, identity)
    segments = segments_of(spec)
    grid = np.asarray(list(itertools.product(*(getattr(spec, axis) for axis in VALUE_AXES))), spec.dtype)

    def run(numbers: Numbers, key: PRNGKey, data: CellData) -> tuple[Array, ...]:
        def one(cell: Numbers) -> tuple[Array, ...]:
            return fit_cell(key, data, cell, recipe, jnp.asarray(segments), evaluation, tuple(measures.values()))[1]

        return jax.vmap(one)(numbers)

    return run, Numbers(*grid.T), key, data


def _compile(
    function: Callable[..., tuple[Array, ...]], numbers: Numbers, key: PRNGKey, data: CellData, *, memory: int
) -> Callable[..., list[np.ndarray]]:
    """``function`` compiled for the largest group of cells whose temporaries fit in ``memory`` bytes.

    The last group is filled up by repeating its last cell. ``ValueError`` if a single cell does not fit.
    """
    total = size = len(jax.tree.leaves(numbers)[0])
    while True:
        program = jax.jit(function).lower(_some(numbers, np.arange(size)), key, data).compile()
        analysis = program.memory_analysis()
        # Backends that do not analyze memory give None: then all cells go in one group.
        needed = 0 if analysis is None else analysis.temp_size_in_bytes
        if needed <= memory:
            break
        if size == 1:
            raise ValueError(f"one cell needs {needed:,} bytes, over the memory budget of {memory:,}; raise --memory.")
        size = min(size - 1, max(1, size * memory // needed))
    starts = range(0, total, size)

    def run(numbers: Numbers, key: PRNGKey, data: CellData) -> list[np.ndarray]:
        groups = []
        for begin in starts:
            rows = np.minimum(np.arange(begin, begin + size), total - 1)
            groups.append(program(_some(numbers, rows), key, data))
        host = jax.device_get(groups)
        return [np.concatenate(parts)[:total] for parts in zip(*host, strict=True)]

    return run


def _some(numbers: Numbers, cells: np.ndarray) -> Numbers:
    return jax.tree.map(lambda axis: axis[cells], numbers)
