"""Rows of ``sweeps``: what mapped training saves beside a plain loop; in float32, except for the exact method.

* ``small_cells_n8``, ``small_cells_n64``, ``small_cells_n512``, ``small_cells_grid``: digits with 64 units, Adam, full
  batch, 20 noise levels mapped, against one network at a time.
* ``paper_step``: dimension 1024, 100 units, batches of 256; ``products_s`` and ``noise_s`` are the machine's limit.
* ``time_to_objective``: exact training in the span of five rows, against the paper's loop to the same objective.
* ``devices_2``: two CPU devices with half of the cells each, against one that may use both cores.
* ``linear_cells``: seconds per cell of a sweep of 10,000 cells against one of 10, and the memory of each.

Times are of a cell and step; rivals are in PyTorch where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dae_theory import ReluDae, memorizing_minimizer
from dae_theory.exact_training import minimize_exact_objective, span_basis
from dae_theory.risk import exact_objective
from sims.bench.rivals import RATE, adam_loop, paper_loop, separable_rows
from sims.bench.timing import Row, compare, peak_memory, per_unit, row, seconds
from sims.data import datasets
from sims.sweeps.engine import all_units, worlds_of
from sims.sweeps.measures import MEASURES
from sims.sweeps.programs import placement, run_units
from sims.sweeps.spec import Spec
from sims.sweeps.train import Recipe, advance, start

__all__ = [
    "ROWS",
    "devices_2",
    "group_seconds",
    "linear_cells",
    "paper_step",
    "small_cells",
    "small_cells_grid",
    "time_to_objective",
]

PENALTY = 1e-3


def small_cells(num_samples: int, repeats: int, quick: bool) -> Row:
    """Seconds per cell and step: 20 noise levels on digits with 64 units, all in one program, against one network."""
    steps = 3 if quick else max(20, 6400 // (num_samples + 24))
    rows = _digits(num_samples)
    width, sigmas = _sizes(quick)
    theirs = adam_loop(rows, width, 0.3, PENALTY, 0, steps)
    result = compare(f"small_cells_n{num_samples}", _mapped(rows, width, sigmas, steps), theirs, repeats)
    return per_unit(result, steps * len(sigmas), steps)


def small_cells_grid(repeats: int, quick: bool) -> Row:
    """As :func:`small_cells`, summed over 20 sizes from 2 to 1,024 with the same number of steps at each."""
    steps = 2 if quick else 30
    width, sigmas = _sizes(quick)
    sizes = [2, 8] if quick else sorted({round(n) for n in np.geomspace(2, 1024, 20)})
    ours = [_mapped(_digits(n), width, sigmas, steps) for n in sizes]
    theirs = [adam_loop(_digits(n), width, 0.3, PENALTY, 0, steps) for n in sizes]
    known = [call for call in theirs if call is not None]
    result = compare(
        "small_cells_grid",
        lambda: [call() for call in ours],
        (lambda: [call() for call in known]) if known else None,
        repeats,
        notes={"sizes": sizes},
    )
    return per_unit(result, steps * len(sizes) * len(sigmas), steps * len(sizes))


def paper_step(repeats: int, quick: bool) -> Row:
    """Seconds per step at d = 1024, p = 100, batch 256; the notes time its matrix products and its noise alone."""
    d, p, batch, steps = (16, 4, 8, 2) if quick else (1024, 100, 256, 50)
    rows = np.random.default_rng(0).standard_normal((2 * batch, d)).astype(np.float32)
    data, key = jnp.asarray(rows), jax.random.key(2)
    recipe = Recipe(p, batch_size=batch)
    state = start(jax.random.key(1), d, recipe, learning_rate=RATE, init_scale=0.1)
    rates = {"sigma": 0.2, "penalty": PENALTY, "learning_rate": RATE}
    ours = jax.jit(lambda state: advance(state, key, data, steps, recipe, **rates).params)
    result = compare("paper_step", lambda: ours(state), adam_loop(rows, p, 0.2, PENALTY, batch, steps), repeats)

    def products(_: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        y, w1, w2 = carry
        h = y @ w1
        r = h @ w2.T
        return r, y.T @ (r @ w2), r.T @ h

    def noise(t: Any, eps: Any) -> Any:
        return jax.random.normal(jax.random.fold_in(key, t), eps.shape, eps.dtype)

    # Zeros stay zeros, but the compiler cannot know that and skip the work.
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in ((batch, d), (d, p), (d, p)))
    limits = {}
    for name, body, carry in (("products_s", products, zeros), ("noise_s", noise, zeros[0])):
        loop = jax.jit(lambda carry, body=body: jax.lax.fori_loop(0, steps, body, carry))
        limits[name] = compare(name, lambda loop=loop, carry=carry: loop(carry), None, repeats).ours_s / steps
    result = per_unit(result, steps, steps)
    return result._replace(notes={**limits, "ours_by_limit": result.ours_s / sum(limits.values())})


def time_to_objective(repeats: int, quick: bool) -> Row:
    """From a random start to the objective of the memorizing minimizer, to 1 part in 1,000: exact training in the span
    of the data, in float64, its compilation not counted."""
    n, d, p = (3, 16, 6) if quick else (5, 1024, 100)
    sigma, decay = 0.2, 1e-2
    penalty = d * decay / 2
    rows = separable_rows(n, d)
    data = jnp.asarray(rows)
    basis = span_basis(data)
    w = 0.1 * jax.random.normal(jax.random.key(0), (d, p), data.dtype) / d**0.5
    begin, inside = ReluDae(basis.T @ w, basis.T @ w), data @ basis

    def ours() -> Any:
        # L-BFGS alone reaches the objective: forming Hessians would only cost time.
        how = {"method": "products", "rough_tolerance": 1e-2, "tolerance": 1e-2}
        return minimize_exact_objective(begin, inside, sigma, penalty, **how).objective

    goal = 1.001 * float(exact_objective(memorizing_minimizer(data, sigma, penalty, p), data, sigma, penalty))
    reached = float(ours())
    times = [seconds(ours) for _ in range(repeats)]
    notes = {"goal": goal, "objective": reached, "reached": reached <= goal}
    theirs = paper_loop(rows, sigma, decay, penalty, p, goal, 500 if quick else 50_000)
    if theirs is None:
        return row("time_to_objective", times, None, notes=notes)
    notes |= {"rival": "RMSprop in PyTorch", "rival_steps": theirs[1], "rival_reached": theirs[2]}
    return row("time_to_objective", times, [theirs[0]] * repeats, notes=notes)


def linear_cells(repeats: int, quick: bool) -> Row:
    """Seconds per cell of sweeps of growing size, in groups of five: the largest (ours) against the smallest (rival),
    without compilation."""
    sizes = (1, 2) if quick else (1, 10, 100, 1000)
    width, steps = (4, 2) if quick else (64, 1000)
    spec = Spec(dataset=("digits",), num_samples=(8,), sigma=_ladder(10), width=(width,), steps=steps)
    measures = {"objective": MEASURES["objective"]}
    worlds, place = worlds_of(spec), placement(group=5)

    def sweep(seeds: int) -> Callable[[], object]:
        many = dataclasses.replace(spec, seeds=seeds)
        units = all_units(many)
        # Results are dropped as soon as they arrive, as by a store.
        return lambda: [done.wall_s for done in run_units(many, units, measures, worlds, place)]

    # Compiles; sweeps of other seeds in groups of one size share the program.
    sweep(1)()
    times, peaks = {}, {}
    for seeds in sizes:
        call = sweep(seeds)
        times[10 * seeds] = [seconds(call) / (10 * seeds) for _ in range(repeats if seeds < 1000 else 1)]
        peaks[10 * seeds] = peak_memory()
    fewest, most = times[10 * sizes[0]], times[10 * sizes[-1]]
    notes = {"per_cell_s": {cells: float(np.median(spent)) for cells, spent in times.items()}, "peak_bytes": peaks}
    return row("linear_cells", most * len(fewest), fewest * len(most), notes=notes)


def devices_2(repeats: int, quick: bool) -> Row:
    """Two devices that train half of the cells each, against one that may use both cores (rival)."""
    pairs = [(_in_subprocess(2, quick), _in_subprocess(1, quick)) for _ in range(repeats)]
    two, one = ([pair[i] for pair in pairs] for i in (0, 1))
    return row("devices_2", two, one, notes={"rival": "one device"})


def group_seconds(quick: bool) -> float:
    """Seconds for 20 cells on 64 digits, split among all devices of this process."""
    width, sigmas = _sizes(quick)
    return compare("group", _mapped(_digits(64), width, sigmas, 3 if quick else 200), None, 3).ours_s


def _sizes(quick: bool) -> tuple[int, Any]:
    width, count = (4, 2) if quick else (64, 20)
    return width, np.asarray(_ladder(count), np.float32)


def _ladder(num: int) -> tuple[float, ...]:
    return tuple(np.geomspace(0.05, 2.0, num).tolist())


def _digits(num_samples: int) -> np.ndarray:
    return datasets.load("digits", num_samples=num_samples, dtype=np.dtype(np.float32)).train


def _group(rows: np.ndarray, width: int, steps: int) -> Callable[[Any], Any]:
    data, recipe = jnp.asarray(rows), Recipe(width)

    def one(sigma: Any) -> Any:
        state = start(jax.random.key(1), data.shape[1], recipe, learning_rate=RATE, init_scale=0.1)
        rates = {"sigma": sigma, "penalty": PENALTY, "learning_rate": RATE}
        return advance(state, jax.random.key(2), data, steps, recipe, **rates).params

    return jax.vmap(one)


def _mapped(rows: np.ndarray, width: int, sigmas: Any, steps: int) -> Callable[[], object]:
    """As in a sweep, every device runs the program of one device on its part of the cells."""
    program = jax.jit(_group(rows, width, steps))
    parts = np.array_split(sigmas, len(jax.devices()))
    placed = [jax.device_put(part, device) for part, device in zip(parts, jax.devices(), strict=True)]
    return lambda: [program(part) for part in placed]


def _in_subprocess(devices: int, quick: bool) -> float:
    """:func:`group_seconds` in a process with this number of CPU devices."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])
    code = f"import sys; from sims.bench.sweeps import group_seconds; sys.stdout.write(str(group_seconds({quick})))"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process with {devices} devices failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


ROWS: dict[str, Callable[[int, bool], Row]] = {
    **{f"small_cells_n{n}": functools.partial(small_cells, n) for n in (8, 64, 512)},
    "small_cells_grid": small_cells_grid,
    "paper_step": paper_step,
    "time_to_objective": time_to_objective,
    "devices_2": devices_2,
    "linear_cells": linear_cells,
}
"""Functions of the number of repeats and of ``quick``, by name."""
