r"""Deterministic minimization to machine precision: L-BFGS to a rough point, then a globalized Newton method.

For smooth functions of one flat vector. If only products ``H v`` with the Hessian are available: a trust region with
conjugate gradients (:cite:`nocedal06`, algorithms 4.1 and 7.2). If the Hessian can be formed and factored: L-BFGS in
its metric. Everything is jittable, and failure to converge is reported in the result. Flat directions (symmetries) do
no harm, because the gradient has no component along them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dae_theory.types import Scalar

__all__ = ["Minimum", "lbfgs", "newton", "preconditioned_lbfgs"]

H = TypeVar("H")
F = TypeVar("F")
Function: TypeAlias = Callable[[Float[Array, " m"]], Float[Array, ""]]


class Minimum(NamedTuple):
    """Result of a minimization; a pytree."""

    x: Float[Array, " m"]
    """The last iterate, finite if the start was."""
    value: Float[Array, ""]
    """The function at ``x``."""
    gradient_norm: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    """Whether ``gradient_norm`` reached the tolerance."""


def lbfgs(
    function: Function,
    x: Float[Array, " m"],
    *,
    tolerance: Scalar,
    max_iterations: int,
    memory: int = 20,
    linesearch: Any = None,
    norm: Callable[[Float[Array, " m"]], Float[Array, ""]] = jnp.linalg.norm,
) -> Minimum:
    """Limited-memory BFGS (optax), until ``norm(∇f) <= tolerance`` or no step is accepted.

    A step is accepted if it lowers ``f``, or if it lowers the gradient norm and leaves ``f`` unchanged up to rounding.

    Args:
        function: The function to minimize, differentiable.
        x: Start, shape (m,).
        tolerance: Gradient norm at which to stop.
        max_iterations: Largest number of iterations.
        memory: Number of past steps that approximate the inverse Hessian.
        linesearch: An optax line search; zoom by default.
        norm: Norm in which the gradient is measured.
    """
    if linesearch is None:
        linesearch = optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
    rule = optax.lbfgs(memory_size=memory, linesearch=linesearch)
    # The line search has evaluated both already: read them from its state.
    value_and_grad: Any = optax.value_and_grad_from_state(function)
    eps = float(jnp.finfo(x.dtype).eps)

    def unfinished(carry):
        best, _, _, improved = carry
        return improved & ~best.converged & (best.iterations < max_iterations)

    def step(carry):
        best, gradient, state, _ = carry
        with jax.numpy_dtype_promotion("standard"):
            updates: Any
            updates, state = rule.update(gradient, state, best.x, value=best.value, grad=gradient, value_fn=function)
            x = best.x + updates
            value, gradient = value_and_grad(x, state=state)
        size = norm(gradient)
        unchanged = value <= best.value + 100 * eps * jnp.abs(best.value)
        improved = (value < best.value) | (unchanged & (size < best.gradient_norm))
        candidate = Minimum(x, value, size, best.iterations + 1, size <= tolerance)
        return _select(improved, candidate, best), gradient, state, improved

    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(x)
    value, gradient = jax.value_and_grad(function)(x)
    size = norm(gradient)
    start = Minimum(x, value, size, jnp.zeros((), int), size <= tolerance)
    return jax.lax.while_loop(unfinished, step, (start, gradient, state, jnp.asarray(True)))[0]


def newton(
    function: Function,
    x: Float[Array, " m"],
    *,
    tolerance: Scalar,
    max_iterations: int = 100,
    max_products: int = 500,
    radius: Scalar = 1.0,
) -> Minimum:
    r"""Trust-region Newton: each step minimizes ``g·s + s·Hs/2`` in a ball by conjugate gradients (Steihaug).

    A step is accepted if it achieves at least a tenth of the predicted decrease or, if that is below the rounding of
    ``f``, if it lowers the gradient norm; otherwise a quarter of the step is tried. The method converges quadratically
    to a minimum whose Hessian is positive outside flat directions, and escapes saddles along negative curvature.

    Args:
        function: The function to minimize, twice differentiable.
        x: Start, shape (m,).
        tolerance: Gradient norm at which to stop.
        max_iterations: Largest number of steps, rejected ones included.
        max_products: Largest number of products ``H v`` per step.
        radius: Initial radius of the ball, > 0.
    """
    value_and_grad = jax.value_and_grad(function)

    def unfinished(t):
        moves = jnp.linalg.norm(t.move) > jnp.finfo(x.dtype).eps * jnp.linalg.norm(t.best.x)
        return (t.best.iterations < 1) | (~t.best.converged & (t.best.iterations <= max_iterations) & moves)

    def step(t):
        candidate = t.best.x + t.move
        # The only evaluation in the program: the function is large, and compiled once for every call site.
        (value, gradient), tangent = jax.linearize(value_and_grad, candidate)
        predicted = -(t.slope + 0.5 * t.curvature)
        ratio = (t.best.value - value) / jnp.where(predicted > 0, predicted, 1.0)
        rounding = 100 * jnp.finfo(x.dtype).eps * jnp.abs(value)
        flatter = jnp.linalg.norm(gradient) < t.best.gradient_norm
        accepted = jnp.where(predicted > rounding, ratio > 0.1, flatter) & jnp.isfinite(value)
        accepted = accepted | (t.best.iterations == 0)
        radius = jnp.where(t.on_edge & (ratio > 0.5), 2 * t.radius, t.radius)
        best = _select(accepted, _minimum(candidate, value, gradient, 0, tolerance), t.best)
        best = best._replace(iterations=t.best.iterations + 1)

        def new_step():
            move, residual, on_edge = _steihaug(lambda v: tangent(v)[1], gradient, radius, max_products)
            # residual = g + H s.
            return _Trial(best, move, gradient @ move, (residual - gradient) @ move, radius, on_edge)

        def shorter_step():
            move, shorter = t.move / 4, jnp.linalg.norm(t.move) / 4
            return _Trial(best, move, t.slope / 4, t.curvature / 16, shorter, jnp.asarray(False))

        return jax.lax.cond(accepted, new_step, shorter_step)

    zero = jnp.zeros((), x.dtype)
    unevaluated = Minimum(x, zero, zero + jnp.inf, jnp.zeros((), int), jnp.asarray(False))
    start = _Trial(unevaluated, jnp.zeros_like(x), zero, zero, jnp.asarray(radius, x.dtype), jnp.asarray(False))
    best = jax.lax.while_loop(unfinished, step, start).best
    # The first evaluation was that of the start.
    return best._replace(iterations=best.iterations - 1)


def preconditioned_lbfgs(
    function: Function,
    x: Float[Array, " m"],
    hessian: Callable[[Float[Array, " m"]], H],
    factorize: Callable[[H, Float[Array, ""]], F],
    root: Callable[[F, Float[Array, " m"]], Float[Array, " m"]],
    unroot: Callable[[F, Float[Array, " m"]], Float[Array, " m"]],
    *,
    tolerance: Scalar,
    max_rounds: int = 100,
    iterations_per_round: int = 30,
) -> tuple[Minimum, Int[Array, ""], Float[Array, " r"]]:
    r"""L-BFGS in the metric of the Hessian, which is computed again in each round.

    A round minimizes ``f(x + M⁻ᵀ z)`` over z, where ``H + μI = M Mᵀ``. Its first step is Newton's. Each further step
    costs a gradient and two triangular solves, little compared with a factorization, and corrects for the change of
    curvature that a Newton step ignores. Each round starts with a sixteenth of the last shift μ and multiplies it by
    eight until the matrix is positive definite, so that the last rounds converge as Newton's method does.

    Args:
        function: The function to minimize, twice differentiable.
        x: Start, shape (m,).
        hessian: Returns the Hessian H at x, as any pytree.
        factorize: ``factorize(H, μ)`` returns the factors of ``H + μI``, with NaN if it is not positive definite.
        root: ``root(factors, z)`` is ``M⁻ᵀ z``.
        unroot: ``unroot(factors, z)`` is ``M z``.
        tolerance: Gradient norm at which to stop.
        max_rounds: Largest number of rounds.
        iterations_per_round: Largest number of L-BFGS iterations per round.

    Returns:
        The minimum, whose ``iterations`` counts rounds; the total number of L-BFGS iterations; and the gradient norm
        after each round, shape (max_rounds,), NaN beyond the last.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=20, decrease_factor=0.5, increase_factor=math.inf, rtol=100 * eps, store_grad=True
    )

    def factorize_shifted(h, shift):
        # Starts from factors of NaN and an eighth of the first shift, so that the loop contains the only factorization.
        smallest = eps * jnp.max(jnp.stack([jnp.max(jnp.abs(part)) for part in jax.tree.leaves(h)]))

        def failed(carry):
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in jax.tree.leaves(carry[1])]))
            return ~finite & jnp.isfinite(carry[0])

        def raise_shift(carry):
            larger = jnp.maximum(8.0 * carry[0], smallest)
            return larger, factorize(h, larger)

        shapes = jax.eval_shape(factorize, h, shift)
        no_factors = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return jax.lax.while_loop(failed, raise_shift, (shift / 128.0, no_factors))

    def unfinished(carry):
        return carry.moved & ~carry.minimum.converged & (carry.minimum.iterations < max_rounds)

    def run_round(carry):
        x, rounds = carry.minimum.x, carry.minimum.iterations
        shift, factors = factorize_shifted(hessian(x), carry.shift)
        inner = lbfgs(
            lambda z: function(x + root(factors, z)),
            jnp.zeros_like(x),
            tolerance=tolerance,
            max_iterations=iterations_per_round,
            linesearch=search,
            norm=lambda gradient: jnp.linalg.norm(unroot(factors, gradient)),
        )
        minimum = inner._replace(x=x + root(factors, inner.x), iterations=rounds + 1)
        norms = carry.norms.at[rounds].set(minimum.gradient_norm)
        return _Round(minimum, shift, carry.total + inner.iterations, norms, inner.iterations > 0)

    zero = jnp.zeros((), x.dtype)
    unevaluated = Minimum(x, zero + jnp.inf, zero + jnp.inf, jnp.zeros((), int), jnp.asarray(False))
    norms = jnp.full(max_rounds, jnp.nan, x.dtype)
    start = _Round(unevaluated, zero, jnp.zeros((), int), norms, jnp.asarray(True))
    end = jax.lax.while_loop(unfinished, run_round, start)
    return end.minimum, end.total, end.norms


class _Round(NamedTuple):
    minimum: Minimum
    shift: Float[Array, ""]
    total: Int[Array, ""]
    """L-BFGS iterations so far."""
    norms: Float[Array, " r"]
    moved: Bool[Array, ""]
    """Whether the last round took a step."""


class _Trial(NamedTuple):
    best: Minimum
    """The best point; ``iterations`` counts evaluations."""
    move: Float[Array, " m"]
    """The step to try next from the best point."""
    slope: Float[Array, ""]
    """``g·s``."""
    curvature: Float[Array, ""]
    """``s·Hs``."""
    radius: Float[Array, ""]
    on_edge: Bool[Array, ""]


class _Search(NamedTuple):
    move: Float[Array, " m"]
    residual: Float[Array, " m"]
    direction: Float[Array, " m"]
    products: Int[Array, ""]
    on_edge: Bool[Array, ""]


def _steihaug(
    product: Callable[[Float[Array, " m"]], Float[Array, " m"]],
    gradient: Float[Array, " m"],
    radius: Float[Array, ""],
    max_products: int,
) -> tuple[Float[Array, " m"], Float[Array, " m"], Bool[Array, ""]]:
    """The step s, the residual g + Hs, and whether the step ends on the boundary of the ball."""
    size = jnp.linalg.norm(gradient)
    # Makes convergence superlinear, without asking for more digits than the products have.
    small_enough = size * jnp.maximum(jnp.minimum(0.1, jnp.sqrt(size)), 1e3 * jnp.finfo(size.dtype).eps)

    def unfinished(s):
        return ~s.on_edge & (jnp.linalg.norm(s.residual) > small_enough) & (s.products < max_products)

    def extend(s):
        h_direction = product(s.direction)
        curvature = s.direction @ h_direction
        square = s.residual @ s.residual
        alpha = square / jnp.where(curvature > 0, curvature, 1.0)
        inside = s.move + alpha * s.direction
        leaves = (curvature <= 0) | (jnp.linalg.norm(inside) >= radius)
        beyond = _to_edge(s.move, s.direction, radius)
        move = jnp.where(leaves, s.move + beyond * s.direction, inside)
        residual = s.residual + jnp.where(leaves, beyond, alpha) * h_direction
        beta = residual @ residual / square
        return _Search(move, residual, -residual + beta * s.direction, s.products + 1, leaves)

    start = _Search(jnp.zeros_like(gradient), gradient, -gradient, jnp.zeros((), int), jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, extend, start)
    return end.move, end.residual, end.on_edge


def _to_edge(move: Float[Array, " m"], direction: Float[Array, " m"], radius: Float[Array, ""]) -> Float[Array, ""]:
    """The positive t with ``‖move + t direction‖ = radius``."""
    a, b, c = direction @ direction, move @ direction, move @ move - radius * radius
    root = jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))
    # (−b + root)/a, in a form that does not cancel.
    return jnp.where(b > 0, -c / jnp.where(b > 0, b + root, 1.0), (root - b) / jnp.where(a > 0, a, 1.0))


def _minimum(
    x: Float[Array, " m"],
    value: Float[Array, ""],
    gradient: Float[Array, " m"],
    iterations: Int[Array, ""] | int,
    tolerance: Scalar,
) -> Minimum:
    norm = jnp.linalg.norm(gradient)
    return Minimum(x, value, norm, jnp.asarray(iterations), norm <= tolerance)


def _select(condition: Bool[Array, ""], new: Minimum, old: Minimum) -> Minimum:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)
