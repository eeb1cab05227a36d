"""Networks that figures look into: trained from a spec of one cell, with the rows they saw."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dae_theory import ReluDae
from sims.engine import Numbers, fit_cell, recipe_of, segments_of
from sims.measures import CellSpec
from sims.spec import VALUE_AXES, Spec
from sims.worlds import cell_data, make_world

__all__ = ["Trained", "image_shape", "train"]


class Trained(NamedTuple):
    """A trained network and its data."""

    dae: ReluDae
    train: np.ndarray
    """Rows trained on (n, d)."""
    held_out: np.ndarray
    """Rows never trained on (m, d)."""
    image_shape: tuple[int, int]


def train(spec: Spec) -> Trained:
    """Train the network of a spec whose axes have one value each, at seed 0; ``ValueError`` otherwise."""
    if spec.num_cells != spec.seeds:
        raise ValueError(f"one network is shown, but the axes of this spec make {spec.num_cells // spec.seeds}.")
    world = make_world(spec)
    key, data, identity = cell_data(world, spec, spec.num_samples[0], 0)
    numbers = Numbers(*(jnp.asarray(getattr(spec, axis)[0], data.train.dtype) for axis in VALUE_AXES))
    evaluation = CellSpec(0.0, 0.0, spec.eval_samples, spec.eval_draws, identity)
    recipe, segments = recipe_of(spec, spec.width[0]), jnp.asarray(segments_of(spec))
    dae, _ = jax.jit(lambda key, data: fit_cell(key, data, numbers, recipe, segments, evaluation, ()))(key, data)
    return Trained(
        dae, np.asarray(data.train), np.asarray(data.held_out), image_shape(world.facts, data.train.shape[1])
    )


def image_shape(facts: dict[str, object], dim: int) -> tuple[int, int]:
    """Height and width to show a row at; a row that is no image is a strip."""
    shape = facts.get("image_shape")
    return (int(shape[0]), int(shape[1])) if isinstance(shape, list) and shape[2] == 1 else (1, dim)
