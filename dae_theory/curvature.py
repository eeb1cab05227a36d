"""Smallest curvatures of the exact objective: over all directions, modulo its symmetries, and along rotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from dae_theory.lanczos import lanczos
from dae_theory.model import Dae
from dae_theory.risk import exact_objective
from dae_theory.types import Scalar

__all__ = ["Curvature", "dense_curvature", "lanczos_curvature"]

# In about k steps Lanczos resolves curvatures down to 1/k² of the largest.
LANCZOS_STEPS = 400


class Curvature(NamedTuple):
    """Curvatures of the exact objective at a network."""

    values: Float[Array, " k"]
    """Ascending eigenvalues or Ritz values."""
    modulo_symmetry: Float[Array, ""]
    """Smallest curvature orthogonal to the symmetries."""
    error: Float[Array, ""]
    """Error bound of ``modulo_symmetry``."""
    along_rotations: Float[Array, ""]
    """Smallest curvature along rotations."""


def dense_curvature(matrix: Float[Array, "m m"], tangents: Array, rotations: Array) -> Curvature:
    """Curvatures from the whole Hessian ``matrix`` over the m coordinates of weights and biases.

    ``tangents`` and ``rotations`` are orthonormal tangents of all symmetries and of rotations alone, k of each.
    """
    tangents = tangents.reshape(len(tangents), len(matrix))
    complement = jnp.linalg.qr(tangents.T, mode="complete")[0][:, len(tangents) :]
    modulo_symmetry = jnp.linalg.eigvalsh(complement.T @ matrix @ complement)[0]
    along_rotations = _smallest_along(rotations.reshape(len(rotations), len(matrix)), lambda v: matrix @ v)
    return Curvature(jnp.linalg.eigvalsh(matrix), modulo_symmetry, jnp.zeros_like(modulo_symmetry), along_rotations)


def lanczos_curvature(
    dae: Dae, rows: Array, sigma: Scalar, penalty: Scalar, tangents: Array, rotations: Array
) -> Curvature:
    """Curvatures by Lanczos' method, from products with the Hessian of the exact objective at ``dae``.

    ``tangents`` and ``rotations`` are those of :func:`dense_curvature`.
    """
    x, unravel = ravel_pytree(dae)
    product = jax.jit(jax.linearize(jax.grad(lambda x: exact_objective(unravel(x), rows, sigma, penalty)), x)[1])
    tangents = tangents.reshape(len(tangents), x.size)
    # Any start with a component along every eigenvector works; the key is fixed so that certificates are reproducible.
    start = jax.random.normal(jax.random.key(0), x.shape, x.dtype)

    steps = min(LANCZOS_STEPS, x.size - len(tangents))
    whole = jax.jit(lambda v: lanczos(product, v, steps))(start)
    rest = jax.jit(lambda v: lanczos(product, v, steps, without=tangents))(start)
    along_rotations = _smallest_along(rotations.reshape(len(rotations), x.size), product)
    return Curvature(whole.values, rest.values[0], rest.residuals[0], along_rotations)


def _smallest_along(
    directions: Float[Array, "k m"], product: Callable[[Float[Array, " m"]], Float[Array, " m"]]
) -> Float[Array, ""]:
    """Smallest eigenvalue of a quadratic form on the span of orthonormal rows; infinite if there are no rows."""
    if not len(directions):
        return jnp.full((), jnp.inf, directions.dtype)
    images = jax.lax.map(product, directions, batch_size=32)
    return jnp.linalg.eigvalsh(directions @ images.T)[0]
