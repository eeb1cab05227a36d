r"""Extreme eigenvalues of a symmetric matrix known through products, with a bound of their error.

Lanczos' method :cite:`golub13`, section 10.1, with full reorthogonalization: k steps give an orthonormal basis Q of a
Krylov space and the tridiagonal ``T = QᵀAQ``, whose eigenvalues θ (Ritz values) lie within ``β_k |s_k|`` of an
eigenvalue of A, s their eigenvectors; the least of them is never below the least of A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer
from dae_theory.precision import full_precision

__all__ = ["Ritz", "lanczos"]


class Ritz(NamedTuple):
    """Ritz values, rising; a pytree."""

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    """``‖A v − θ v‖`` of each: some eigenvalue lies so near."""


class _Krylov(NamedTuple):
    basis: Float[Array, "k m"]
    diagonal: Float[Array, " k"]
    beside: Float[Array, " k"]
    """Length of what is new after each step; the last one is the residual's factor."""
    vector: Float[Array, " m"]


@full_precision
def lanczos(
    product: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    start: Float[Array, " m"],
    num_steps: int,
    *,
    without: Float[Array, "k m"] | None = None,
) -> Ritz:
    """Ritz values of ``product`` from ``num_steps`` k <= m steps from ``start``; jittable.

    Only eigenvectors that ``start`` has a part in are seen. ``without``, orthonormal rows, restricts the matrix to
    their complement (its compression, where they do not span an invariant subspace). Where the Krylov space is
    exhausted early, the surplus values are repeated copies of the largest. ``ValueError`` for ``num_steps`` outside
    1..m.
    """
    size = check_integer("num_steps", num_steps, minimum=1, maximum=start.size)
    dtype = start.dtype
    tiny = 100 * float(jnp.finfo(dtype).eps)

    directions = jnp.zeros((0, start.size), dtype) if without is None else without

    def kept(v: Float[Array, " m"]) -> Float[Array, " m"]:
        return v - directions.T @ (directions @ v)

    def step(i: Int[Array, ""], k: _Krylov) -> _Krylov:
        basis = k.basis.at[i].set(k.vector)
        image = product(k.vector)
        along = k.vector @ image
        # Twice: once leaves what rounding brought back. Lost orthogonality would show as copies of converged values,
        # and a trace of a direction left out, if its eigenvalue lies outside the others, would grow at every step.
        for _ in range(2):
            image = kept(image - basis.T @ (basis @ image))
        length = jnp.linalg.norm(image)
        largest = jnp.max(jnp.abs(k.diagonal.at[i].set(along)))
        alive = length > tiny * largest
        vector = jnp.where(alive, image / jnp.where(alive, length, 1.0), 0.0)
        return _Krylov(basis, k.diagonal.at[i].set(along), k.beside.at[i].set(jnp.where(alive, length, 0.0)), vector)

    none = jnp.zeros(size, dtype)
    start = kept(start)
    begin = _Krylov(jnp.zeros((size, start.size), dtype), none, none, start / jnp.linalg.norm(start))
    end = jax.lax.fori_loop(0, size, step, begin)
    # After exhaustion vectors are zero: their rows are parked at the largest diagonal, out of the way of the least.
    used = jnp.sum(jnp.square(end.basis), axis=1) > 0.5
    diagonal = jnp.where(used, end.diagonal, jnp.max(jnp.where(used, end.diagonal, -jnp.inf)))
    beside = jnp.where(used & jnp.roll(used, -1), end.beside, 0.0)[: size - 1]
    values, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    return Ritz(values, jnp.abs(end.beside[-1] * vectors[-1]))
