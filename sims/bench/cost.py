"""What one training step of one cell costs, counted by XLA: operations, and bytes that move between memory and cores.

Beside a machine's rates the two give a bound: no cell takes less than the larger of operations over operations per
second and bytes over bytes per second :cite:`williams09`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sims.sweeps.engine import all_units, worlds_of
from sims.sweeps.programs import Numbers, grid_of, unit_program
from sims.sweeps.spec import Spec
from sims.sweeps.train import TrainState, advance, start

__all__ = ["Cost", "bound", "step_cost"]


class Cost(NamedTuple):
    """Per cell and step."""

    flops: float
    bytes: float
    """Of the compiled program for this backend, fused as it is."""


def step_cost(spec: Spec) -> Cost:
    """The cost of a step of the largest n and width of ``spec``, all cells of a unit together, divided among them.

    ``ValueError`` where the backend counts nothing.
    """
    unit = max(all_units(spec), key=lambda unit: unit.num_samples * unit.width)
    program, key, data = unit_program(spec, unit, worlds_of(spec)(unit.dataset, unit.separation))
    grid = Numbers(*map(jnp.asarray, grid_of(spec)))

    def begin(numbers: Numbers) -> TrainState:
        return start(
            key,
            data.train.shape[1],
            program.recipe,
            learning_rate=numbers.learning_rate,
            init_scale=numbers.init_scale,
            dtype=data.train.dtype,
        )

    def step(state: TrainState, numbers: Numbers) -> TrainState:
        rates = {"sigma": numbers.sigma, "penalty": numbers.penalty, "learning_rate": numbers.learning_rate}
        return advance(state, key, data.train, 1, program.recipe, **rates)

    states = jax.vmap(begin)(grid)
    counted = jax.jit(jax.vmap(step)).lower(states, grid).compile().cost_analysis()
    if not counted or "flops" not in counted:
        raise ValueError(f"the backend {jax.default_backend()} counts no operations; ask on a CPU.")
    return Cost(counted["flops"] / spec.cells_per_unit, counted["bytes accessed"] / spec.cells_per_unit)


def bound(cost: Cost, *, flops_per_s: float, bytes_per_s: float) -> float:
    """Cell steps per second that a machine with these rates cannot exceed."""
    return 1.0 / max(cost.flops / flops_per_s, cost.bytes / bytes_per_s)
