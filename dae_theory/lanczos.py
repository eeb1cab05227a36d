r"""Extreme eigenvalues of a symmetric matrix that is given by matrix-vector products, with an error bound.

Lanczos' method :cite:`golub13`, section 10.1, with full reorthogonalization: k steps give an orthonormal basis Q of a
Krylov space and the tridiagonal ``T = QᵀAQ``. Each eigenvalue θ of T (Ritz value), with eigenvector s, lies within
``β_k |s_k|`` of an eigenvalue of A. The smallest Ritz value is never below the smallest eigenvalue of A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.checks import check_integer
from dae_theory.precision import full_precision

__all__ = ["Ritz", "lanczos"]


class Ritz(NamedTuple):
    """Ritz values with error bounds; a pytree."""

    values: Float[Array, " k"]
    """Ritz values θ, ascending."""
    residuals: Float[Array, " k"]
    """``‖A v − θ v‖`` of each Ritz pair: some eigenvalue lies within this distance of θ."""


class _Krylov(NamedTuple):
    basis: Float[Array, "k m"]
    diagonal: Float[Array, " k"]
    off_diagonal: Float[Array, " k"]
    """Norm of the new component after each step; the last entry is the factor β_k of the residuals."""
    vector: Float[Array, " m"]
    """The next basis vector."""


@full_precision
def lanczos(
    product: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    start: Float[Array, " m"],
    num_steps: int,
    *,
    without: Float[Array, "k m"] | None = None,
) -> Ritz:
    """Ritz values of ``product`` after ``num_steps`` k <= m steps from ``start``; jittable.

    Eigenvectors orthogonal to ``start`` are invisible. ``without``, orthonormal rows, restricts the matrix to their
    complement (if they do not span an invariant subspace, to its compression). If the Krylov space is exhausted after
    j < k steps, the first j values are those of its j dimensions, eigenvalues up to rounding, and the surplus ones are
    copies of the largest of them, with its residual. Raises ``ValueError`` for ``num_steps`` outside 1..m.
    """
    size = check_integer("num_steps", num_steps, minimum=1, maximum=start.size)
    dtype = start.dtype
    tiny = 100 * float(jnp.finfo(dtype).eps)

    directions = jnp.zeros((0, start.size), dtype) if without is None else without

    def project(v):
        return v - directions.T @ (directions @ v)

    def step(i, k):
        basis = k.basis.at[i].set(k.vector)
        image = product(k.vector)
        along = k.vector @ image
        # Twice, to remove what rounding leaves after the first time. Lost orthogonality would show as copies of
        # converged values, and a component along an excluded direction, if its eigenvalue lies outside the others,
        # would grow at every step.
        for _ in range(2):
            image = project(image - basis.T @ (basis @ image))
        length = jnp.linalg.norm(image)
        diagonal = k.diagonal.at[i].set(along)
        is_new = length > tiny * jnp.max(jnp.abs(diagonal))
        vector = jnp.where(is_new, image / jnp.where(is_new, length, 1.0), 0.0)
        return _Krylov(basis, diagonal, k.off_diagonal.at[i].set(jnp.where(is_new, length, 0.0)), vector)

    zeros = jnp.zeros(size, dtype)
    start = project(start)
    initial = _Krylov(jnp.zeros((size, start.size), dtype), zeros, zeros, start / jnp.linalg.norm(start))
    final = jax.lax.fori_loop(0, size, step, initial)
    # After exhaustion the basis vectors are zero. Their diagonal entries are set above all eigenvalues of the rest
    # (Gershgorin), with which they are not coupled: their values come last, and are replaced.
    used = jnp.sum(jnp.square(final.basis), axis=1) > 0.5
    num_used = jnp.sum(used)
    off_diagonal = jnp.where(used & (jnp.arange(size) + 1 < num_used), final.off_diagonal, 0.0)
    row_sums = jnp.abs(final.diagonal) + off_diagonal + jnp.roll(off_diagonal, 1)
    bound = jnp.max(row_sums)
    diagonal = jnp.where(used, final.diagonal, jnp.where(bound > 0, 2 * bound, 1.0))
    off = off_diagonal[: size - 1]
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    residuals = jnp.abs(final.off_diagonal[num_used - 1] * vectors[num_used - 1])
    last = jnp.minimum(jnp.arange(size), num_used - 1)
    return Ritz(values[last], residuals[last])
