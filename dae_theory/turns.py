r"""Finite turns of a block's orthogonal factor O, along which the objective can fall; derived here.

The closed forms :cite:`zhang26`, Theorem 3.1, leave O free, and the main term of the objective does not depend on it.
Noise that crosses gates does, exponentially little near the closed form, and so do gates that a large turn moves across
samples. Weights have shape (d, p); samples are rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory.checks import is_concrete
from dae_theory.model import Dae, by_unit
from dae_theory.precision import full_precision
from dae_theory.risk import exact_objective
from dae_theory.symmetry import rotation_pairs
from dae_theory.types import Scalar

__all__ = ["Turn", "lowest_turn"]

# Angles of the finite turns, in both directions, and the largest number of pairs of units that are turned.
TURN_DEGREES = (0.25, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 37.5, 45.0)
MAX_TURN_PAIRS = 64


class Turn(NamedTuple):
    """The turn of two units within a block that lowers the objective most, or raises it least."""

    change: Float[Array, ""]
    """Change of the exact objective; infinite if no two units share a block."""
    degrees: Float[Array, ""]
    """The angle; 0 if there is no turn."""


def lowest_turn(dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Turn:
    r"""The finite turn of a block's orthogonal factor that lowers the exact objective most (derived here).

    A turn mixes two units with the same gates on all rows, in W₁, b₁ and W₂ alike,
    ``(w_i, w_j) → (w_i cos θ + w_j sin θ, w_j cos θ − w_i sin θ)``. It leaves the block's linear map and the penalty
    unchanged, so the objective changes only by noise that crosses gates, until a gate fails on a sample. Tried are the
    angles ``TURN_DEGREES`` in both directions, for at most ``MAX_TURN_PAIRS`` pairs of units spread over all: a search,
    which can prove that the objective falls, not that it does not. Not jittable. Raises ``ValueError`` for traced
    values.
    """
    if not is_concrete(dae, data):
        raise ValueError("weights and data must be concrete, because gates are compared; call it outside jit.")
    pairs = np.asarray(rotation_pairs(dae, data), int).reshape(-1, 2)
    if not len(pairs):
        return Turn(jnp.full((), jnp.inf, data.dtype), jnp.zeros((), data.dtype))
    pairs = pairs[np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_TURN_PAIRS)).astype(int))]
    degrees = np.concatenate([TURN_DEGREES, -np.asarray(TURN_DEGREES)])
    planes, angles = np.repeat(pairs, len(degrees), axis=0), np.tile(degrees, len(pairs))
    changes = _turn_changes(dae, data, sigma, penalty, jnp.asarray(planes), jnp.asarray(angles, data.dtype))
    best = int(np.argmin(np.asarray(changes)))
    return Turn(changes[best], jnp.asarray(angles[best], data.dtype))


@jax.jit
@full_precision
def _turn_changes(
    dae: Dae,
    rows: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    planes: Int[Array, "t 2"],
    degrees: Float[Array, " t"],
) -> Float[Array, " t"]:
    """Changes of the exact objective along turns in given planes, pairs of units."""

    def objective(turn):
        (i, j), angle = turn
        c, s = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
        turned = by_unit(
            dae,
            lambda w: w.at[..., i].set(c * w[..., i] + s * w[..., j]).at[..., j].set(c * w[..., j] - s * w[..., i]),
        )
        return exact_objective(turned, rows, sigma, penalty)

    # The same program for the network itself, so that its rounding cancels: a turn by nothing.
    turns = jnp.concatenate([planes[:1], planes]), jnp.concatenate([jnp.zeros_like(degrees[:1]), degrees])
    values = jax.lax.map(objective, turns)
    return values[1:] - values[0]
