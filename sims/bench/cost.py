"""The cost of one training step of one cell as XLA counts it: operations, and bytes moved between memory and cores.

With a machine's rates they bound the time of a step from below: the larger of operations over operations per second
and bytes over bytes per second :cite:`williams09`.
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
    """Of the program as compiled, and fused, for this backend."""


def step_cost(spec: Spec) -> Cost:
    """The cost per cell of a step at the largest n and width of ``spec``, where all cells of a unit run together.

    ``ValueError`` if the backend does not count operations.
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
        raise ValueError(f"the backend {jax.default_backend()} counts no operations; use a CPU.")
    return Cost(counted["flops"] / spec.cells_per_unit, counted["bytes accessed"] / spec.cells_per_unit)


def bound(cost: Cost, *, flops_per_s: float, bytes_per_s: float) -> float:
    """Cell steps per second that a machine with these rates cannot exceed."""
    return 1.0 / max(cost.flops / flops_per_s, cost.bytes / bytes_per_s)
