r"""Deterministic minimization to machine precision: L-BFGS to a rough point, then Newton's method made safe.

For smooth functions of one flat vector. Where the Hessian is known through products ``H v``: a trust region and
conjugate gradients (:cite:`nocedal06`, algorithms 4.1 and 7.2). Where it can be formed and factored: L-BFGS in its
metric. Each is one ``jit`` program; every outcome is data. Directions of no curvature (symmetries) are no obstacle: the
gradient has no part in them.
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
    """Where a minimization ended."""

    x: Float[Array, " m"]
    """The last iterate, finite if the start was."""
    value: Float[Array, ""]
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
    """Limited-memory BFGS (optax), until ``norm(∇f) <= tolerance`` or no step is found.

    The default line search is optax's zoom. A step counts if it lowers ``f``, or lowers the gradient while ``f`` stands
    still to rounding.
    """
    if linesearch is None:
        linesearch = optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
    rule = optax.lbfgs(memory_size=memory, linesearch=linesearch)
    # Evaluated by the line search already, so read from its state.
    value_and_grad: Any = optax.value_and_grad_from_state(function)
    eps = float(jnp.finfo(x.dtype).eps)

    def more(carry: tuple[Minimum, Float[Array, " m"], Any, Bool[Array, ""]]) -> Bool[Array, ""]:
        found, _, _, moved = carry
        return moved & ~found.converged & (found.iterations < max_iterations)

    def step(carry: tuple[Minimum, Float[Array, " m"], Any, Bool[Array, ""]]) -> tuple[Minimum, Array, Any, Array]:
        found, gradient, state, _ = carry
        with jax.numpy_dtype_promotion("standard"):
            updates: Any
            updates, state = rule.update(gradient, state, found.x, value=found.value, grad=gradient, value_fn=function)
            x = found.x + updates
            value, gradient = value_and_grad(x, state=state)
        size = norm(gradient)
        still = value <= found.value + 100 * eps * jnp.abs(found.value)
        better = (value < found.value) | (still & (size < found.gradient_norm))
        there = Minimum(x, value, size, found.iterations + 1, size <= tolerance)
        return _keep(better, there, found), gradient, state, better

    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(x)
    value, gradient = jax.value_and_grad(function)(x)
    size = norm(gradient)
    begin = Minimum(x, value, size, jnp.zeros((), int), size <= tolerance)
    return jax.lax.while_loop(more, step, (begin, gradient, state, jnp.asarray(True)))[0]


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

    At most ``max_products`` products ``H v`` a step. A step is taken if it keeps at least a tenth of the promised
    decrease; where the promise is below the rounding of ``f``, if it lowers the gradient; else a quarter of it is
    tried. Converges quadratically at a minimum whose Hessian is positive outside flat directions, and leaves saddles by
    negative curvature.
    """
    value_and_grad = jax.value_and_grad(function)

    def more(t: _Trial) -> Bool[Array, ""]:
        moves = jnp.linalg.norm(t.move) > jnp.finfo(x.dtype).eps * jnp.linalg.norm(t.found.x)
        return (t.found.iterations < 1) | (~t.found.converged & (t.found.iterations <= max_iterations) & moves)

    def step(t: _Trial) -> _Trial:
        there = t.found.x + t.move
        # The one place where the function is evaluated: it is large, and compiled as often as it is written.
        (value, gradient), tangent = jax.linearize(value_and_grad, there)
        promised = -(t.slope + 0.5 * t.curvature)
        ratio = (t.found.value - value) / jnp.where(promised > 0, promised, 1.0)
        rounding = 100 * jnp.finfo(x.dtype).eps * jnp.abs(value)
        calmer = jnp.linalg.norm(gradient) < t.found.gradient_norm
        good = jnp.where(promised > rounding, ratio > 0.1, calmer) & jnp.isfinite(value)
        good = good | (t.found.iterations == 0)
        radius = jnp.where(t.on_edge & (ratio > 0.5), 2 * t.radius, t.radius)
        found = _keep(good, _minimum(there, value, gradient, 0, tolerance), t.found)
        found = found._replace(iterations=t.found.iterations + 1)

        def onwards() -> _Trial:
            move, residual, on_edge = _steihaug(lambda v: tangent(v)[1], gradient, radius, max_products)
            # residual = g + H s.
            return _Trial(found, move, gradient @ move, (residual - gradient) @ move, radius, on_edge)

        def back() -> _Trial:
            move, shorter = t.move / 4, jnp.linalg.norm(t.move) / 4
            return _Trial(found, move, t.slope / 4, t.curvature / 16, shorter, jnp.asarray(False))

        return jax.lax.cond(good, onwards, back)

    zero = jnp.zeros((), x.dtype)
    unknown = Minimum(x, zero, zero + jnp.inf, jnp.zeros((), int), jnp.asarray(False))
    begin = _Trial(unknown, jnp.zeros_like(x), zero, zero, jnp.asarray(radius, x.dtype), jnp.asarray(False))
    found = jax.lax.while_loop(more, step, begin).found
    return found._replace(iterations=found.iterations - 1)


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
    r"""L-BFGS in the metric of the Hessian, taken anew each round.

    Also returned: the number of L-BFGS iterations in all, and the gradient norm after each round, NaN after the last.

    ``factorize(H, μ)`` returns factors of ``H + μI = M Mᵀ``, with NaN where it is not positive definite; ``root`` is
    ``M⁻ᵀ z`` and ``unroot`` is ``M z``. A round minimizes ``f(x + M⁻ᵀ z)`` over z: its first step is Newton's, its
    others cost a gradient and two triangular solves, little beside a factorization, and follow the bends of ``f`` for
    which a Newton step is too straight. The shift μ falls sixteenfold a round and grows eightfold until the matrix is
    positive definite, so that the last rounds converge as Newton's method does. ``iterations`` counts rounds.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=20, decrease_factor=0.5, increase_factor=math.inf, rtol=100 * eps, store_grad=True
    )

    def definite(h: H, shift: Float[Array, ""]) -> tuple[Float[Array, ""], F]:
        least = eps * jnp.max(jnp.stack([jnp.max(jnp.abs(part)) for part in jax.tree.leaves(h)]))

        def is_bad(carry: tuple[Float[Array, ""], F]) -> Bool[Array, ""]:
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in jax.tree.leaves(carry[1])]))
            return ~finite & jnp.isfinite(carry[0])

        def grow(carry: tuple[Float[Array, ""], F]) -> tuple[Float[Array, ""], F]:
            larger = jnp.maximum(8.0 * carry[0], least)
            return larger, factorize(h, larger)

        shapes = jax.eval_shape(factorize, h, shift)
        none = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        return jax.lax.while_loop(is_bad, grow, (shift / 128.0, none))

    def more(carry: _Round) -> Bool[Array, ""]:
        return carry.moved & ~carry.found.converged & (carry.found.iterations < max_rounds)

    def step(carry: _Round) -> _Round:
        found = carry.found
        shift, factors = definite(hessian(found.x), carry.shift)
        inner = lbfgs(
            lambda z: function(found.x + root(factors, z)),
            jnp.zeros_like(found.x),
            tolerance=tolerance,
            max_iterations=iterations_per_round,
            linesearch=search,
            norm=lambda gradient: jnp.linalg.norm(unroot(factors, gradient)),
        )
        end = inner._replace(x=found.x + root(factors, inner.x), iterations=found.iterations + 1)
        norms = carry.norms.at[found.iterations].set(end.gradient_norm)
        return _Round(end, shift, carry.total + inner.iterations, norms, inner.iterations > 0)

    zero = jnp.zeros((), x.dtype)
    unknown = Minimum(x, zero + jnp.inf, zero + jnp.inf, jnp.zeros((), int), jnp.asarray(False))
    norms = jnp.full(max_rounds, jnp.nan, x.dtype)
    end = jax.lax.while_loop(more, step, _Round(unknown, zero, jnp.zeros((), int), norms, jnp.asarray(True)))
    return end.found, end.total, end.norms


class _Round(NamedTuple):
    found: Minimum
    shift: Float[Array, ""]
    total: Int[Array, ""]
    """L-BFGS iterations so far."""
    norms: Float[Array, " r"]
    moved: Bool[Array, ""]


class _Trial(NamedTuple):
    found: Minimum
    """The best point; ``iterations`` counts evaluations."""
    move: Float[Array, " m"]
    """The step to try from there."""
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
    """The step s, the residual g + Hs, and whether the step ends on the ball's edge."""
    size = jnp.linalg.norm(gradient)
    # Superlinear, but never asking for more digits than the products have.
    enough = size * jnp.maximum(jnp.minimum(0.1, jnp.sqrt(size)), 1e3 * jnp.finfo(size.dtype).eps)

    def more(s: _Search) -> Bool[Array, ""]:
        return ~s.on_edge & (jnp.linalg.norm(s.residual) > enough) & (s.products < max_products)

    def extend(s: _Search) -> _Search:
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

    begin = _Search(jnp.zeros_like(gradient), gradient, -gradient, jnp.zeros((), int), jnp.asarray(False))
    end = jax.lax.while_loop(more, extend, begin)
    return end.move, end.residual, end.on_edge


def _to_edge(move: Float[Array, " m"], direction: Float[Array, " m"], radius: Float[Array, ""]) -> Float[Array, ""]:
    """The positive t with ``‖move + t direction‖ = radius``."""
    a, b, c = direction @ direction, move @ direction, move @ move - radius * radius
    root = jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))
    # The stable form of (−b + root)/a.
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


def _keep(condition: Bool[Array, ""], new: Minimum, old: Minimum) -> Minimum:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)
