"""Compiled programs of a sweep: cells are mapped in groups, and groups run side by side on all devices.

A unit of work is one training set with its rows, start and noise, and the cells that share them: one for each
combination of the value axes. Cells are mapped (``vmap``) in groups of one size, so a unit is one or more groups, the
last one padded by repeating its last cell; every device runs the same program on another group. The results of a cell
depend on the size of its group by rounding, and not at all on its neighbors or on the number of devices or processes.
"""

from __future__ import annotations

import contextlib
import functools
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

from dae_theory.model import Dae
from dae_theory.types import PRNGKey
from sims.sweeps.measures import CellData, CellSpec, Measure
from sims.sweeps.spec import LOOP_AXES, VALUE_AXES, Spec
from sims.sweeps.train import Recipe, advance, start
from sims.sweeps.worlds import World, cell_data

__all__ = [
    "REMEMBERED",
    "CompileKey",
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
    "compile_key",
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


REMEMBERED = 32
"""Compiled programs that a process keeps; the least recently used one is dropped."""


class Numbers(NamedTuple):
    """The traced numbers of a cell, as scalars, or of many cells, as vectors; JAX or NumPy arrays."""

    penalty: Any
    learning_rate: Any
    init_scale: Any
    sigma: Any


class TrainingSet(NamedTuple):
    """A unit of work: one training set and the program of its cells, as values of the loop axes."""

    dataset: str
    separation: float | None
    duplicates: str
    optimizer: str
    batch_size: int
    tied: bool
    biases: bool
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
    """The static part of a cell; hashable. With the shapes of the data it determines the compiled code."""

    recipe: Recipe
    evaluation: CellSpec
    """Without σ and λ, which are traced."""


class Placement(NamedTuple):
    """The devices, and how many cells run on each at a time."""

    devices: tuple[jax.Device, ...]
    """Of all processes."""
    memory: int
    """Bytes that the temporaries of a program may take on each device."""
    group: int | None
    """Cells of a group; None: as many as ``memory`` allows, with work for every device."""


Worlds: TypeAlias = Callable[[str, float | None], World]
"""From a data set's name and separation to the data set, loaded once."""


def placement(*, memory: int = 2 << 30, group: int | None = None) -> Placement:
    """All devices, including those of other processes.

    ``ValueError`` unless memory and group are positive and all processes have the same number of devices.
    """
    for name, value in (("memory", memory), ("group", group)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) != jax.local_device_count() * jax.process_count():
        raise ValueError(
            f"{len(devices)} devices on {jax.process_count()} processes, of which this one has "
            f"{jax.local_device_count()}; give all processes the same number."
        )
    return Placement(tuple(devices), memory, group)


def grid_of(spec: Spec) -> Numbers:
    """The numbers of a unit's cells: all combinations of the value axes, the last axis fastest."""
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
        biases=unit.biases,
        weight_decay=float(spec.weight_decay),
    )


def segments_of(spec: Spec) -> Int[np.ndarray, " r"]:
    """Numbers of steps between records, as int32."""
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
    """The program of a unit's cells, the key of their training, and their data."""
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
) -> tuple[Dae, dict[str, Array]]:
    """Train one network and take ``measures`` at every record; a pure function, which sweeps map over cells.

    Args:
        key: of the start and the training noise.
        data: rows to train on and to evaluate on.
        numbers: of the cell.
        program: the static part.
        segments: numbers of steps between records.
        measures: functions by name.

    Returns the final network and, for each measure, its values stacked along a leading axis of records.
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
    spec: Spec, units: Sequence[TrainingSet], measures: Mapping[str, Measure], worlds: Worlds, place: Placement
) -> Iterator[Finished]:
    """Compute ``units`` in order, each yielded when it is finished; neighbors that run the same program on the same
    shapes lie on devices side by side.

    With several processes all of them must call this alike, and each gets every result. ``ValueError`` if a cell does
    not fit in the memory.
    """
    numbers, segments = grid_of(spec), segments_of(spec)
    for alike in alike_units(units):
        # Rows are drawn lazily and dropped after use, so that memory does not grow with the number of units.
        jobs = (job_of(spec, unit, worlds) for unit in alike)
        first = next(jobs)
        compiled = compile_job(spec, first, measures, place)
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
    """A unit with its data, ready to run; arrays are NumPy's, keys are key data."""

    unit: TrainingSet
    program: Program
    key: UInt[np.ndarray, " k"]
    data: CellData


def alike_units(units: Sequence[TrainingSet]) -> Iterator[list[TrainingSet]]:
    """Groups of neighbors with equal programs and shapes: at least the seeds, which are the last axis of units."""

    def same(unit: TrainingSet) -> TrainingSet:
        # Data sets along an axis of separations have one shape; others may differ.
        return unit._replace(seed=0, separation=None if unit.separation is None else 0.0)

    for _, neighbors in itertools.groupby(units, same):
        yield list(neighbors)


def job_of(spec: Spec, unit: TrainingSet, worlds: Worlds) -> Job:
    """Draw the rows of a unit."""
    program, key, data = unit_program(spec, unit, worlds(unit.dataset, unit.separation))
    host = jax.tree.map(np.asarray, data._replace(key=jax.random.key_data(data.key)))
    return Job(unit, program, np.asarray(jax.random.key_data(key)), host)


class Compiled(NamedTuple):
    """Compiled code for groups of cells."""

    group: int
    """Cells of a group."""
    memory: int
    """Bytes of temporaries on each device; 0 if the backend does not report them."""
    launch: Callable[[Sequence[tuple[Job, Numbers]], Int[np.ndarray, " r"]], list[dict[str, np.ndarray]]]
    """From groups, at most one for each device, and the segments to the groups' results."""


class CompileKey(NamedTuple):
    """Everything that compiled code depends on; hashable, with a ``jax.ShapeDtypeStruct`` for each array."""

    program: Program
    cell: Numbers
    """The numbers of one cell."""
    key: jax.ShapeDtypeStruct
    data: CellData
    segments: jax.ShapeDtypeStruct
    measures: tuple[tuple[str, Measure], ...]
    """Names and functions; functions are equal if they are the same object."""
    size: int
    """Cells of a group, before it is reduced to fit in the memory."""
    place: Placement
    options: tuple[Any, ...]
    """JAX's settings of precision."""


def compile_key(spec: Spec, job: Job, measures: Mapping[str, Measure], place: Placement) -> CompileKey:
    """The key of the code for ``job``; jobs with equal keys share code."""
    cell = jax.tree.map(lambda axis: axis[0], grid_of(spec))
    cell, key, data, segments = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype)),
        (cell, job.key, job.data, segments_of(spec)),
    )
    # All cells at once, unless that leaves some devices without work.
    total = spec.cells_per_unit
    size = min(total, place.group or max(1, total * spec.seeds // len(place.devices)))
    options = (jax.config.values["jax_enable_x64"], jax.config.values["jax_default_matmul_precision"])
    return CompileKey(job.program, cell, key, data, segments, tuple(measures.items()), size, place, options)


def compile_job(spec: Spec, job: Job, measures: Mapping[str, Measure], place: Placement) -> Compiled:
    """Compiled code for groups of cells of ``job``, and of every job with an equal :func:`compile_key`.

    A process keeps the :data:`REMEMBERED` programs that it used last, so a second sweep of the same shapes and measures
    compiles nothing. ``ValueError`` if not even one cell fits in the memory.
    """
    return _compiled(compile_key(spec, job, measures, place))


@functools.lru_cache(maxsize=REMEMBERED)
def _compiled(key: CompileKey) -> Compiled:
    place, size = key.place, key.size
    local = [i for i, device in enumerate(place.devices) if device.process_index == jax.process_index()]
    function = jax.jit(group_function(key.program, dict(key.measures)))

    def lowered(i: int) -> jax.stages.Lowered:
        sharding = jax.sharding.SingleDeviceSharding(place.devices[i])
        cells = jax.tree.map(lambda one: jax.ShapeDtypeStruct((size,), one.dtype), key.cell)
        shapes = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding),
            (cells, key.key, key.data, key.segments),
        )
        return function.lower(*shapes)

    while True:
        first = lowered(local[0]).compile()
        analysis = first.memory_analysis()
        # None where the backend does not analyze memory: the size is then not reduced.
        needed = 0 if analysis is None else int(analysis.temp_size_in_bytes)
        if needed <= place.memory:
            break
        if size == 1:
            raise ValueError(
                f"one cell needs {needed:,} bytes, over the memory budget of {place.memory:,}; raise --memory."
            )
        size = min(size - 1, max(1, size * place.memory // needed))
    # Every device runs a single-device program: XLA would fuse, and round, a program over all devices differently.
    others = [lowered(i) for i in local[1:]]
    with futures.ThreadPoolExecutor() as pool:
        programs = [first, *pool.map(jax.stages.Lowered.compile, others)]

    def launch(groups: Sequence[tuple[Job, Numbers]], segments: Int[np.ndarray, " r"]) -> list[dict[str, np.ndarray]]:
        # In several processes, devices without work repeat the last group, so that all have results to gather.
        mine = groups if jax.process_count() == 1 else [groups[min(i, len(groups) - 1)] for i in local]
        running = [
            run(*jax.device_put((cells, job.key, job.data, segments), place.devices[i]))
            for i, run, (job, cells) in zip(local, programs, mine, strict=False)
        ]
        return _gathered(jax.device_get(running))[: len(groups)]

    return Compiled(size, needed, launch)


def group_function(program: Program, measures: Mapping[str, Measure]) -> Callable[..., dict[str, Array]]:
    """A function of (numbers, key, data, segments) that runs a group of cells on one device.

    Keys, including the one in ``data``, are passed as key data.
    """

    def run(numbers: Numbers, key: UInt[Array, " k"], data: CellData, segments: Int[Array, " r"]) -> dict[str, Array]:
        typed, rows = jax.random.wrap_key_data(key), data._replace(key=jax.random.wrap_key_data(data.key))
        return jax.vmap(lambda cell: fit_cell(typed, rows, cell, program, segments, measures)[1])(numbers)

    return run


def _taken(name: str, measure: Measure, dae: Dae, data: CellData, cell: CellSpec) -> Array:
    try:
        return jnp.asarray(measure(dae, data, cell))
    # A user's function may raise anything; the message names it.
    except Exception as error:
        raise ValueError(f"measure {name!r} failed: {error}") from error


def _groups(cells: int, size: int) -> list[Int[np.ndarray, " g"]]:
    return [np.minimum(np.arange(begin, begin + size), cells - 1) for begin in range(0, cells, size)]


def _some(numbers: Numbers, cells: Int[np.ndarray, " g"]) -> Numbers:
    return jax.tree.map(lambda axis: axis[cells], numbers)


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """Turn the failure of a collective operation, because another process ended, into a ``ValueError``."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"another process has ended ({error}); see its message, and run all of them again: finished units are kept."
        ) from error


def _gathered(mine: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The results of all devices, from those of this process."""
    if jax.process_count() == 1:
        return mine
    with others_alive():
        whole = multihost_utils.process_allgather(jax.tree.map(lambda *leaves: np.stack(leaves), *mine), tiled=True)
    return [{name: value[i] for name, value in whole.items()} for i in range(jax.device_count())]
