r"""Minimizing the exact objective, without sampling: the network that training with infinitely many noise draws finds.

The objective of :func:`dae_theory.risk.exact_objective` is smooth where no unit is zero, so second-order methods reach
a gradient norm of 1e-10, where stochastic optimizers hover at their noise floor. For n < d the problem lives in the
span of the data (derived here): an orthonormal change of basis leaves the risk as it is, components of W₂ outside the
span only cost, and gradient descent never leaves the span. :func:`to_span` and :func:`from_span` go there and back.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, check_nonnegative, check_positive, is_concrete
from dae_theory.model import ReluDae
from dae_theory.newton import lbfgs, newton, preconditioned_lbfgs
from dae_theory.precision import full_precision
from dae_theory.risk import exact_objective
from dae_theory.second_order import ObjectiveHessian, factorize, forward_root, inverse_root, objective_hessian
from dae_theory.types import Scalar

__all__ = ["Trained", "from_span", "minimize_exact_objective", "span_basis", "to_span"]


class Trained(NamedTuple):
    """Outcome of an exact training."""

    dae: ReluDae
    """The last iterate, converged or not."""
    objective: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    """Norm of the gradient in (W₁, W₂) together."""
    iterations: Int[Array, " 2"]
    """Of L-BFGS, and Newton steps or factorizations."""
    converged: Bool[Array, ""]
    """Whether the gradient norm reached the tolerance."""
    course: Float[Array, " r"]
    """Gradient norm after each round of the dense method, NaN after the last; empty for the other."""


# Weights of one layer up to which the Hessian is formed: two matrices of this many rows.
DENSE_SIZE = 4096


def minimize_exact_objective(
    dae: ReluDae,
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
    r"""A local minimum of the exact objective :cite:`zhang26`, eq. (6), from the start ``dae``.

    ``"dense"`` forms the Hessian in closed form (:mod:`dae_theory.second_order`) and runs L-BFGS in its metric, anew in
    each of at most ``max_newton`` rounds. ``"products"`` needs no matrix: L-BFGS until the gradient norm is
    ``rough_tolerance`` (at most ``max_rough`` iterations, 0 for none), then trust-region Newton with at most
    ``max_products`` Hessian products in each of ``max_newton`` steps. ``"auto"`` takes the first where dp is at most
    ``DENSE_SIZE`` and sigma is not 0. Either ends at the gradient norm ``tolerance`` (1e-10 needs float64).

    Zero units stay zero: they are stationary, though perhaps unstable
    (:func:`dae_theory.certificate.dead_direction`). Never raises for want of convergence. ``ValueError`` for another
    ``method`` and for what :func:`dae_theory.risk.exact_objective` refuses.
    """
    if method not in ("auto", "dense", "products"):
        raise ValueError(f"method is {method!r}; it must be 'auto', 'dense' or 'products'.")
    check_data(data)
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)
    if method == "dense":
        check_positive("sigma", sigma)
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

    Singular values below ``tolerance`` times the largest count as zero (default: rounding). The rank is a shape, so
    data must be concrete. ``ValueError`` for traced data; fewer extra directions if d leaves no room.
    """
    check_data(data)
    if not is_concrete(data):
        raise ValueError("data must be concrete: its rank is a shape; call span_basis outside jit.")
    rows = np.asarray(data)
    _, strength, across = np.linalg.svd(rows, full_matrices=False)
    cut = np.finfo(rows.dtype).eps * max(rows.shape) if tolerance is None else tolerance
    rank = max(1, int(np.sum(strength > cut * strength[0])))
    basis = across[:rank].T
    for _ in range(min(extra, rows.shape[1] - rank)):
        basis = np.column_stack([basis, _another(basis)])
    return jnp.asarray(basis)


def _another(basis: Float[np.ndarray, "d r"]) -> Float[np.ndarray, " d"]:
    """A unit vector orthogonal to the columns, r < d, from the axis farthest from their span."""
    new = np.zeros(len(basis), basis.dtype)
    new[np.argmin(np.sum(np.square(basis), axis=1))] = 1.0
    # One projection leaves rounding relative to what it takes away, a second none.
    for _ in range(2):
        new -= basis @ (basis.T @ new)
    return new / np.linalg.norm(new)


@full_precision
def to_span(dae: ReluDae, data: Float[Array, "n d"], basis: Float[Array, "d r"]) -> tuple[ReluDae, Float[Array, "n r"]]:
    """Coordinates ``Qᵀ W`` and ``X Q`` in the basis: a problem of dimension r with the same objective.

    Exact if the columns of W lie in the span; else their other components are dropped.
    """
    return ReluDae(basis.T @ dae.w1, basis.T @ dae.w2), data @ basis


@full_precision
def from_span(dae: ReluDae, basis: Float[Array, "d r"]) -> ReluDae:
    """The network of dimension d: columns ``Q w``."""
    return ReluDae(basis @ dae.w1, basis @ dae.w2)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
@full_precision
def _minimize(
    dae: ReluDae,
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
    start, unravel = ravel_pytree(dae)
    zero = (jnp.sum(jnp.square(dae.w1), axis=0) == 0) & (jnp.sum(jnp.square(dae.w2), axis=0) == 0)
    # A zero unit has no Hessian: it is held where it is.
    free = ravel_pytree(jax.tree.map(lambda w: jnp.broadcast_to(~zero, w.shape).astype(w.dtype), dae))[0]

    def objective(x: Float[Array, " m"]) -> Float[Array, ""]:
        return exact_objective(unravel(x * free), data, sigma, penalty, chunk_size=chunk_size)

    if dense:
        held = ~jnp.reshape(free[: dae.w1.size], dae.w1.shape)[0].astype(bool)

        found, rough_iterations, course = preconditioned_lbfgs(
            objective,
            start,
            lambda x: _held(objective_hessian(unravel(x), data, sigma, penalty), held),
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
        found = newton(objective, start, tolerance=tolerance, max_iterations=max_newton, max_products=max_products)
    iterations = jnp.stack([rough_iterations, found.iterations])
    return Trained(unravel(found.x), found.value, found.gradient_norm, iterations, found.converged, course)


def _held(hessian: ObjectiveHessian, held: Bool[Array, " p"]) -> ObjectiveHessian:
    """The identity for units that are held where they are, and nothing between them and the others."""
    p, d = hessian.inner.shape[:2]
    out = held[:, None, None, None] | held[None, None, :, None]
    identity = jnp.eye(p * d, dtype=hessian.inner.dtype).reshape(p, d, p, d)
    small = jnp.eye(p, dtype=hessian.outer.dtype)
    return ObjectiveHessian(
        jnp.where(out, identity, hessian.inner),
        jnp.where(out, 0.0, hessian.cross),
        jnp.where(held[:, None] | held[None, :], small, hessian.outer),
    )
