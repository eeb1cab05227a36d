"""Compiled programs of a sweep: all cells of a shape in groups, the groups side by side on all devices.

A unit of work is the rows, the start and the noise of one training set, and the cells that share them: one for each
combination of the value axes. Cells are mapped in groups of one size, so that a unit is one or more groups, the last
filled up by repeating its last cell; every device runs the same program on another group. What a cell computes depends
on the size of its group by rounding alone, and on nothing else: not on its neighbors, the number of devices or of
processes.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, UInt

from dae_theory import ReluDae
from dae_theory.types import PRNGKey
from sims.sweeps.measures import CellData, CellSpec, Measure
from sims.sweeps.spec import LOOP_AXES, VALUE_AXES, Spec
from sims.sweeps.train import Recipe, advance, start
from sims.sweeps.worlds import World, cell_data

__all__ = [
    "Compiled",
    "Finished",
    "Job",
    "Numbers",
    "Placement",
    "Program",
    "TrainingSet",
    "Worlds",
    "alike_units",
    "compile_job",
    "fit_cell",
    "grid_of",
    "group_function",
    "job_of",
    "others_alive",
    "placement",
    "recipe_of",
    "run_units",
    "segments_of",
    "single_unit",
    "unit_program",
]


class Numbers(NamedTuple):
    """The traced numbers of a cell, scalars; or of many, vectors; of JAX or NumPy."""

    penalty: Any
    learning_rate: Any
    init_scale: Any
    sigma: Any


class TrainingSet(NamedTuple):
    """One training set and the program that its cells share, by the values of their axes."""

    dataset: str
    separation: float | None
    duplicates: str
    optimizer: str
    batch_size: int
    tied: bool
    num_samples: int
    width: int
    seed: int


class Finished(NamedTuple):
    """A unit with its results."""

    unit: TrainingSet
    values: dict[str, np.ndarray]
    """For each measure (cells, records, ...), cells in the order of :func:`grid_of`."""
    wall_s: float


class Program(NamedTuple):
    """What the cells of a unit run: hashable, and with the shapes of the data all that decides the compiled code."""

    recipe: Recipe
    evaluation: CellSpec
    """Without σ and λ, which are traced."""


class Placement(NamedTuple):
    """How cells lie on devices."""

    devices: tuple[jax.Device, ...]
    """Of all processes."""
    memory: int
    """Bytes that the temporaries of a program may take on each device."""
    group: int | None
    """Cells of a group; None: as many as ``memory`` allows, but work for every device."""


Worlds: TypeAlias = Callable[[str, float | None], World]
"""Data sets by name and separation, each loaded once."""


def placement(*, memory: int = 2 << 30, group: int | None = None) -> Placement:
    """Every device that JAX sees, those of other processes too.

    ``ValueError`` unless memory and group are positive and every process has as many devices.
    """
    for name, value in (("memory", memory), ("group", group)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) != jax.local_device_count() * jax.process_count():
        raise ValueError(
            f"{len(devices)} devices on {jax.process_count()} processes, of which this one has "
            f"{jax.local_device_count()}; give every process as many."
        )
    return Placement(tuple(devices), memory, group)


def grid_of(spec: Spec) -> Numbers:
    """The numbers of a unit's cells: every combination of the value axes, the last axis fastest."""
    cells = itertools.product(*(getattr(spec, axis) for axis in VALUE_AXES))
    return Numbers(*np.asarray(list(cells), spec.dtype).T)


def recipe_of(spec: Spec, unit: TrainingSet) -> Recipe:
    """The static part of training the networks of a unit."""
    return Recipe(
        width=unit.width,
        optimizer=unit.optimizer,
        schedule=spec.schedule,
        steps=spec.steps,
        batch_size=unit.batch_size,
        tied=unit.tied,
        weight_decay=float(spec.weight_decay),
    )


def segments_of(spec: Spec) -> Int[np.ndarray, " r"]:
    """Numbers of steps between records, int32."""
    return np.diff(np.asarray(spec.record_steps, np.int32), prepend=np.int32(0))


def single_unit(spec: Spec) -> tuple[TrainingSet, Numbers]:
    """The one unit and the one cell of a spec whose axes have one value each, at seed 0; ``ValueError`` otherwise."""
    for axis in (*LOOP_AXES, *VALUE_AXES):
        if len(getattr(spec, axis)) > 1:
            raise ValueError(f"a single run needs one {axis}, got {getattr(spec, axis)}; use sweep for several.")
    values = {axis: getattr(spec, axis)[0] for axis in LOOP_AXES if getattr(spec, axis)}
    numbers = Numbers(*(jnp.asarray(getattr(spec, axis)[0], spec.dtype) for axis in VALUE_AXES))
    return TrainingSet(**{"separation": None, **values}, seed=0), numbers


def unit_program(spec: Spec, unit: TrainingSet, world: World) -> tuple[Program, PRNGKey, CellData]:
    """What the cells of a unit run, and on what."""
    key, data, identity = cell_data(world, spec, unit.num_samples, unit.seed, unit.duplicates)
    evaluation = CellSpec(0.0, 0.0, spec.eval_samples, spec.eval_draws, identity)
    return Program(recipe_of(spec, unit), evaluation), key, data


def fit_cell(
    key: PRNGKey,
    data: CellData,
    numbers: Numbers,
    program: Program,
    segments: Int[Array | np.ndarray, " r"],
    measures: Mapping[str, Measure],
) -> tuple[ReluDae, dict[str, Array]]:
    """One experiment: train a network, and take ``measures`` after each of ``segments`` steps; pure, mapped by sweeps.

    ``segments`` are the step counts between records. Returns the network at the end and, for each measure, its values
    stacked along a leading axis of records.
    """
    init_key, step_key = jax.random.split(key)
    dim, recipe = data.train.shape[1], program.recipe
    rates = {"learning_rate": numbers.learning_rate}
    state = start(init_key, dim, recipe, init_scale=numbers.init_scale, dtype=data.train.dtype, **rates)
    cell = program.evaluation._replace(sigma=numbers.sigma, penalty=numbers.penalty)

    def record(state: Any, num_steps: Int[Array, ""]) -> tuple[Any, dict[str, Array]]:
        state = advance(
            state, step_key, data.train, num_steps, recipe, sigma=numbers.sigma, penalty=numbers.penalty, **rates
        )
        return state, {name: _taken(name, measure, state.dae, data, cell) for name, measure in measures.items()}

    state, values = jax.lax.scan(record, state, jnp.asarray(segments))
    return state.dae, values


def run_units(
    spec: Spec,
    units: Sequence[TrainingSet],
    measures: Mapping[str, Measure],
    worlds: Worlds,
    place: Placement,
    compiling: Callable[[Spec, Job, Mapping[str, Measure], Placement], Compiled] | None = None,
) -> Iterator[Finished]:
    """Compute ``units`` in order, each yielded when it is finished; those next to each other that run the same program
    on the same shapes share its compiled code and lie on devices side by side. ``compiling`` may remember code from
    call to call.

    With several processes all of them must call this alike, and each gets every result. ``ValueError`` if a cell does
    not fit in the memory.
    """
    numbers, segments = grid_of(spec), segments_of(spec)
    for alike in alike_units(units):
        # Rows are drawn when their turn comes, and not kept: memory does not grow with the number of units.
        jobs = (job_of(spec, unit, worlds) for unit in alike)
        first = next(jobs)
        compiled = (compiling or compile_job)(spec, first, measures, place)
        parts = _groups(spec.cells_per_unit, compiled.group)
        groups = ((job, _some(numbers, cells)) for job in itertools.chain([first], jobs) for cells in parts)
        values: list[dict[str, np.ndarray]] = []
        waiting, begin = list(alike), time.perf_counter()
        while some := list(itertools.islice(groups, len(place.devices))):
            values += compiled.launch(some, segments)
            ready = len(values) // len(parts)
            wall_s = (time.perf_counter() - begin) / max(1, ready)
            for unit in waiting[:ready]:
                mine, values = values[: len(parts)], values[len(parts) :]
                joined = {name: np.concatenate([one[name] for one in mine])[: spec.cells_per_unit] for name in measures}
                yield Finished(unit, joined, wall_s)
            if ready:
                waiting, begin = waiting[ready:], time.perf_counter()


class Job(NamedTuple):
    """A unit, ready to be computed: arrays of NumPy, and keys as their data."""

    unit: TrainingSet
    program: Program
    key: UInt[np.ndarray, " k"]
    data: CellData


def alike_units(units: Sequence[TrainingSet]) -> Iterator[list[TrainingSet]]:
    """Runs of neighbors with equal programs and shapes; seeds are the last axis of units, so a run is at least
    those."""

    def same(unit: TrainingSet) -> TrainingSet:
        # Data sets along an axis of separations have one shape; others need not.
        return unit._replace(seed=0, separation=None if unit.separation is None else 0.0)

    for _, neighbors in itertools.groupby(units, same):
        yield list(neighbors)


def job_of(spec: Spec, unit: TrainingSet, worlds: Worlds) -> Job:
    """A unit with the rows that it trains on."""
    program, key, data = unit_program(spec, unit, worlds(unit.dataset, unit.separation))
    host = jax.tree.map(np.asarray, data._replace(key=jax.random.key_data(data.key)))
    return Job(unit, program, np.asarray(jax.random.key_data(key)), host)


class Compiled(NamedTuple):
    """Code for groups of cells."""

    group: int
    """Cells of a group."""
    memory: int
    """Bytes of temporaries on each device; 0 where the backend does not tell."""
    launch: Callable[[Sequence[tuple[Job, Numbers]], Int[np.ndarray, " r"]], list[dict[str, np.ndarray]]]
    """From groups, one for each device or fewer, and the segments to the groups' results."""


def compile_job(spec: Spec, job: Job, measures: Mapping[str, Measure], place: Placement) -> Compiled:
    """Code for all groups of the jobs that are like ``job``; ``ValueError`` if not even one cell fits in the memory."""
    numbers, segments, total = grid_of(spec), segments_of(spec), spec.cells_per_unit
    # All at once, but fewer groups than devices would leave some without work.
    size = min(total, place.group or max(1, total * spec.seeds // len(place.devices)))
    here = [i for i, device in enumerate(place.devices) if device.process_index == jax.process_index()]
    function = jax.jit(group_function(job.program, measures))

    def lowered(i: int) -> jax.stages.Lowered:
        cells = _some(numbers, np.zeros(size, int))
        return function.lower(*jax.device_put((cells, job.key, job.data, segments), place.devices[i]))

    while True:
        first = lowered(here[0]).compile()
        analysis = first.memory_analysis()
        # Backends that do not analyze memory give None: then the size stands.
        needed = 0 if analysis is None else int(analysis.temp_size_in_bytes)
        if needed <= place.memory:
            break
        if size == 1:
            raise ValueError(
                f"one cell needs {needed:,} bytes, over the memory budget of {place.memory:,}; raise --memory."
            )
        size = min(size - 1, max(1, size * place.memory // needed))
    # Every device runs the program of a single one: XLA fuses, and so rounds, one that spans devices another way.
    others = [lowered(i) for i in here[1:]]
    with futures.ThreadPoolExecutor() as pool:
        compiled = [first, *pool.map(jax.stages.Lowered.compile, others)]

    def launch(groups: Sequence[tuple[Job, Numbers]], segments: Int[np.ndarray, " r"]) -> list[dict[str, np.ndarray]]:
        # Devices of other processes: those without work repeat that of the last, so that all give results to gather.
        mine = groups if jax.process_count() == 1 else [groups[min(i, len(groups) - 1)] for i in here]
        running = [
            run(*jax.device_put((cells, job.key, job.data, segments), place.devices[i]))
            for i, run, (job, cells) in zip(here, compiled, mine, strict=False)
        ]
        return _gathered(jax.device_get(running))[: len(groups)]

    return Compiled(size, needed, launch)


def group_function(program: Program, measures: Mapping[str, Measure]) -> Callable[..., dict[str, Array]]:
    """A function of (numbers, key, data, segments) that runs a group of cells on one device; keys, also in ``data``,
    are key data."""

    def run(numbers: Numbers, key: UInt[Array, " k"], data: CellData, segments: Int[Array, " r"]) -> dict[str, Array]:
        typed, rows = jax.random.wrap_key_data(key), data._replace(key=jax.random.wrap_key_data(data.key))
        return jax.vmap(lambda cell: fit_cell(typed, rows, cell, program, segments, measures)[1])(numbers)

    return run


def _taken(name: str, measure: Measure, dae: ReluDae, data: CellData, cell: CellSpec) -> Array:
    try:
        return jnp.asarray(measure(dae, data, cell))
    # Whatever somebody's function raises, its name is what helps.
    except Exception as error:
        raise ValueError(f"measure {name!r} failed: {error}") from error


def _groups(cells: int, size: int) -> list[Int[np.ndarray, " g"]]:
    return [np.minimum(np.arange(begin, begin + size), cells - 1) for begin in range(0, cells, size)]


def _some(numbers: Numbers, cells: Int[np.ndarray, " g"]) -> Numbers:
    return jax.tree.map(lambda axis: axis[cells], numbers)


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Turn the end of another process, which what is inside waits for, into a ``ValueError``."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"another process has ended ({error}); see what it says, and run all of them again: what is finished is "
            "kept."
        ) from error


def _gathered(mine: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The results of every device from those of this process."""
    if jax.process_count() == 1:
        return mine
    with others_alive():
        whole = multihost_utils.process_allgather(jax.tree.map(lambda *leaves: np.stack(leaves), *mine), tiled=True)
    return [{name: value[i] for name, value in whole.items()} for i in range(jax.device_count())]
