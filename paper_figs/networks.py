"""Networks shown in figures, trained from a spec of one cell, with their training and held-out rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from dae_theory import ReluDae, exact_risk
from sims.sweeps.programs import fit_cell, segments_of, single_unit, unit_program
from sims.sweeps.spec import Spec
from sims.sweeps.worlds import make_world

__all__ = ["Trained", "image_shape", "train"]


class Trained(NamedTuple):
    """A trained network and its data."""

    dae: ReluDae
    train: np.ndarray
    """Rows trained on (n, d)."""
    held_out: np.ndarray
    """Rows never trained on (m, d)."""
    image_shape: tuple[int, int]
    gap: float
    """Generalization gap at the spec's σ, by the exact risk: 1 − risk on training rows/risk on held-out ones."""
    caption: str
    """n, σ, width and what the network does, for a title."""


def train(spec: Spec) -> Trained:
    """Train the network of a spec whose axes have one value each, at seed 0; ``ValueError`` otherwise."""
    unit, numbers = single_unit(spec)
    world = make_world(spec)
    program, key, data = unit_program(spec, unit, world)
    segments = segments_of(spec)
    dae, _ = jax.jit(lambda key, data: fit_cell(key, data, numbers, program, segments, {}))(key, data)
    shape = image_shape(world.data.image_shape, data.train.shape[1])
    sigma, (width,) = float(spec.sigma[0]), spec.width
    gap = 1.0 - float(exact_risk(dae, data.train, sigma)) / float(exact_risk(dae, data.held_out, sigma))
    # The word stands for the number beside it.
    verb = "diverged" if not math.isfinite(gap) else "memorizes" if gap > 0.5 else "generalizes"
    caption = f"n = {len(data.train):,}, σ = {sigma:g}, width {width}; {verb} (gap {gap:.2f})"
    return Trained(dae, np.asarray(data.train), np.asarray(data.held_out), shape, gap, caption)


def image_shape(shape: tuple[int, int, int] | None, dim: int) -> tuple[int, int]:
    """Height and width at which a row is shown; a row that is not a gray image is shown as a strip."""
    return shape[:2] if shape is not None and shape[2] == 1 else (1, dim)
