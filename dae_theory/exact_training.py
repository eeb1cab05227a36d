r"""Deterministic minimization of the exact objective: training with infinitely many noise draws per sample.

The objective of :func:`dae_theory.risk.exact_objective` is smooth where no unit is zero, so second-order methods reach
a gradient norm of 1e-10, where stochastic optimizers stay at their noise floor. For n < d the problem can be restricted
to the span of the data (derived here): an orthonormal change of basis leaves the risk unchanged, components of W₂
outside the span can only raise the objective, and gradient descent never leaves the span. :func:`to_span` and
:func:`from_span` convert between the two.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, check_level, is_concrete
from dae_theory.model import AffineDae, Dae, ReluDae, by_unit
from dae_theory.newton import lbfgs, newton, preconditioned_lbfgs
from dae_theory.precision import full_precision
from dae_theory.risk import exact_objective
from dae_theory.second_order import ObjectiveHessian, factorize, forward_root, inverse_root, objective_hessian
from dae_theory.types import Scalar

__all__ = ["Trained", "from_span", "minimize_exact_objective", "span_basis", "to_span"]


class Trained(NamedTuple):
    """Result of :func:`minimize_exact_objective`; a pytree."""

    dae: Dae
    """The last iterate, converged or not."""
    objective: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    """Norm of the gradient in all weights and biases together."""
    iterations: Int[Array, " 2"]
    """L-BFGS iterations, then Newton steps or (dense method) rounds, each with a new Hessian."""
    converged: Bool[Array, ""]
    """Whether the gradient norm reached the tolerance."""
    course: Float[Array, " r"]
    """Gradient norm after each round of the dense method, NaN beyond the last; empty for the other method."""


# Largest dp for which "auto" forms the Hessian: two matrices of this many rows.
DENSE_SIZE = 4096


def minimize_exact_objective(
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    method: str = "auto",
    tolerance: Scalar = 1e-10,
    rough_tolerance: Scalar = 1e-4,
    max_rough: int = 500,
    max_newton: int = 100,
    max_products: int = 500,
    chunk_size: int | None = None,
) -> Trained:
    r"""Find a local minimum of the exact objective :cite:`zhang26`, eq. (6), starting at ``dae``.

    ``"dense"`` forms the Hessian in closed form (:mod:`dae_theory.second_order`) and runs L-BFGS in its metric; the
    Hessian is computed again in each of at most ``max_newton`` rounds. ``"products"`` forms no matrix: it runs L-BFGS
    until the gradient norm is ``rough_tolerance``, then trust-region Newton with conjugate gradients. ``"auto"`` is
    ``"dense"`` if dp is at most ``DENSE_SIZE`` and σ is not 0, else ``"products"``.

    Zero units stay zero: they are stationary, though possibly unstable
    (:func:`dae_theory.dead_units.dead_direction`). A run that does not converge is not an error: see ``converged`` of
    the result. Raises ``ValueError`` for any other ``method``, and for what :func:`dae_theory.risk.exact_objective`
    rejects.

    Args:
        dae: Weights to start from, two arrays of shape (d, p); biases are trained if it has any.
        data: Clean samples as rows, shape (n, d).
        sigma: Noise level σ >= 0, in the units of the data; > 0 for ``"dense"``.
        penalty: λ >= 0, the weight of ``‖W₁‖² + ‖W₂‖²``.
        method: ``"auto"``, ``"dense"`` or ``"products"``.
        tolerance: Gradient norm at which the method stops; 1e-10 needs float64.
        rough_tolerance: Gradient norm at which ``"products"`` switches from L-BFGS to Newton.
        max_rough: Largest number of those L-BFGS iterations; 0 for none.
        max_newton: Largest number of Newton steps (``"products"``) or rounds (``"dense"``).
        max_products: Largest number of Hessian-vector products per Newton step.
        chunk_size: Samples processed at a time, as in :func:`dae_theory.risk.exact_risk`.

    Example:
        >>> import jax.numpy as jnp
        >>> dae, data = ReluDae(jnp.ones((1, 1)), jnp.ones((1, 1))), jnp.ones((1, 1))
        >>> trained = minimize_exact_objective(dae, data, sigma=0.1, penalty=0.01, tolerance=1e-4)
        >>> bool(trained.converged), round(float(trained.dae.w1[0, 0] ** 2), 3)  # q = (1 − λ)/(1 + σ²)
        (True, 0.98)
    """
    if method not in ("auto", "dense", "products"):
        raise ValueError(f"method is {method!r}; it must be 'auto', 'dense' or 'products'.")
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    if method == "dense":
        check_level("sigma", sigma, zero=False)
    if method == "auto":
        small = dae.w1.size <= DENSE_SIZE and not (is_concrete(sigma) and float(sigma) == 0.0)
        method = "dense" if small else "products"
    return _minimize(
        dae,
        data,
        jnp.asarray(sigma, data.dtype),
        jnp.asarray(penalty, data.dtype),
        jnp.asarray(tolerance, data.dtype),
        jnp.asarray(rough_tolerance, data.dtype),
        method == "dense",
        max_rough,
        max_newton,
        max_products,
        chunk_size,
    )


def span_basis(data: Float[Array, "n d"], *, extra: int = 0, tolerance: float | None = None) -> Float[Array, "d r"]:
    """Orthonormal basis Q of the span of the rows, r = rank(X), plus ``extra`` directions orthogonal to it.

    There are fewer extra directions if d is too small. Singular values below ``tolerance`` times the largest count as
    zero (default: rounding). Raises ``ValueError`` for traced data, because the rank is a shape.
    """
    check_data(data)
    if not is_concrete(data):
        raise ValueError("data must be concrete, because its rank is a shape; call span_basis outside jit.")
    rows = np.asarray(data)
    _, singular_values, right_vectors = np.linalg.svd(rows, full_matrices=False)
    cutoff = np.finfo(rows.dtype).eps * max(rows.shape) if tolerance is None else tolerance
    rank = max(1, int(np.sum(singular_values > cutoff * singular_values[0])))
    basis = right_vectors[:rank].T
    for _ in range(min(extra, rows.shape[1] - rank)):
        basis = np.column_stack([basis, _orthogonal_unit_vector(basis)])
    return jnp.asarray(basis)


def _orthogonal_unit_vector(basis: Float[np.ndarray, "d r"]) -> Float[np.ndarray, " d"]:
    """A unit vector orthogonal to the columns, r < d, made from the coordinate axis farthest from their span."""
    new = np.zeros(len(basis), basis.dtype)
    new[np.argmin(np.sum(np.square(basis), axis=1))] = 1.0
    # Twice, because the first projection leaves a rounding error relative to what it removes.
    for _ in range(2):
        new -= basis @ (basis.T @ new)
    return new / np.linalg.norm(new)


@full_precision
def to_span(dae: Dae, data: Float[Array, "n d"], basis: Float[Array, "d r"]) -> tuple[Dae, Float[Array, "n r"]]:
    """Coordinates ``Qᵀ W`` and ``X Q`` in the basis: a problem of dimension r with the same objective.

    Exact if the columns of W, and b₂, lie in the span; components outside it are dropped.
    """
    return _in_other_basis(dae, basis.T), data @ basis


@full_precision
def from_span(dae: Dae, basis: Float[Array, "d r"]) -> Dae:
    """The network of dimension d: columns ``Q w``."""
    return _in_other_basis(dae, basis)


def _in_other_basis(dae: Dae, map: Float[Array, "s t"]) -> Dae:
    if isinstance(dae, AffineDae):
        return AffineDae(map @ dae.w1, dae.b1, map @ dae.w2, map @ dae.b2)
    return ReluDae(map @ dae.w1, map @ dae.w2)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
@full_precision
def _minimize(
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Float[Array, ""],
    penalty: Float[Array, ""],
    tolerance: Float[Array, ""],
    rough_tolerance: Float[Array, ""],
    dense: bool,
    max_rough: int,
    max_newton: int,
    max_products: int,
    chunk_size: int | None,
) -> Trained:
    """The jitted part of :func:`minimize_exact_objective`.

    Args:
        dae, data, sigma, penalty, chunk_size: As there.
        tolerance, rough_tolerance, max_rough, max_newton, max_products: As there.
        dense: Whether the method is ``"dense"``.
    """
    start, unravel = ravel_pytree(dae)
    zero = (jnp.sum(jnp.square(dae.w1), axis=0) == 0) & (jnp.sum(jnp.square(dae.w2), axis=0) == 0)
    # There is no Hessian at a zero unit: such units are frozen.
    ones = jax.tree.map(jnp.ones_like, dae)
    free = ravel_pytree(by_unit(ones, lambda part: jnp.where(zero if part.ndim == 1 else zero[None, :], 0.0, part)))[0]

    def objective(x):
        return exact_objective(unravel(x * free), data, sigma, penalty, chunk_size=chunk_size)

    if dense:
        frozen = ~jnp.reshape(free[: dae.w1.size], dae.w1.shape)[0].astype(bool)
        minimum, rough_iterations, course = preconditioned_lbfgs(
            objective,
            start,
            lambda x: _freeze(objective_hessian(unravel(x), data, sigma, penalty), frozen),
            factorize,
            lambda factors, z: ravel_pytree(inverse_root(factors, unravel(z)))[0],
            lambda factors, z: ravel_pytree(forward_root(factors, unravel(z)))[0],
            tolerance=tolerance,
            max_rounds=max_newton,
        )
    else:
        rough_iterations, course = jnp.zeros((), int), jnp.zeros(0, start.dtype)
        if max_rough:
            rough = lbfgs(objective, start, tolerance=rough_tolerance, max_iterations=max_rough)
            start, rough_iterations = rough.x, rough.iterations
        minimum = newton(objective, start, tolerance=tolerance, max_iterations=max_newton, max_products=max_products)
    iterations = jnp.stack([rough_iterations, minimum.iterations])
    return Trained(unravel(minimum.x), minimum.value, minimum.gradient_norm, iterations, minimum.converged, course)


def _freeze(hessian: ObjectiveHessian, frozen: Bool[Array, " p"]) -> ObjectiveHessian:
    """Replace the Hessian by the identity for frozen units, and by zero between them and the others."""
    p, coordinates = hessian.inner.shape[:2]
    # The last decoder column of a network with biases is b₂, which is free.
    columns = jnp.pad(frozen, (0, hessian.outer.shape[0] - p))
    is_frozen = frozen[:, None, None, None] | frozen[None, None, :, None]
    cross_is_frozen = frozen[:, None, None, None] | columns[None, None, :, None]
    identity = jnp.eye(p * coordinates, dtype=hessian.inner.dtype).reshape(p, coordinates, p, coordinates)
    small = jnp.eye(len(columns), dtype=hessian.outer.dtype)
    return ObjectiveHessian(
        jnp.where(is_frozen, identity, hessian.inner),
        jnp.where(cross_is_frozen, 0.0, hessian.cross),
        jnp.where(columns[:, None] | columns[None, :], small, hessian.outer),
    )
