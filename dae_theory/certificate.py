r"""Certificates: is this network a strict local minimum of the exact objective, and how far is it from one?

At a closed form the gradient is not zero but exponentially small, of the order of the theorem's remainder
:cite:`zhang26`, Theorem 3.1; Newton's method finds the minimum beside it, and the distance between the two is the
remainder R itself. The Hessian there says whether the minimum is strict: exactly over the units that are live, by a
directional test for dead ones, where the objective has a kink and no Hessian.

Everything is computed in the span of the data and one direction more (derived here). Rotations that fix the data leave
the objective as it is, so the Hessian does not couple different directions orthogonal to the data, and is the same in
each: one of them stands for all. The weights must lie in that span, as closed forms do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive, is_concrete
from dae_theory.conditions import check_conditions
from dae_theory.exact_training import from_span, minimize_exact_objective, span_basis, to_span
from dae_theory.lanczos import lanczos
from dae_theory.minimizers import memorizing_minimizer
from dae_theory.model import ReluDae, live_columns
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_cross_moment, relu_mean
from dae_theory.risk import exact_objective
from dae_theory.symmetry import symmetry_tangents
from dae_theory.types import Scalar

__all__ = ["Certificate", "DeadDirection", "ResidualLaw", "certify", "dead_direction", "hessian", "residual_law"]


# Lanczos finds curvatures 1/k² of the largest in about k steps.
LANCZOS_STEPS = 400


class DeadDirection(NamedTuple):
    """The unit that lowers the objective most when it grows from nothing."""

    slack: Float[Array, ""]
    """``λ − max_a ‖g(a)‖``: 0 at best at a minimum, where live directions have ‖g‖ = λ; if negative, zero columns are
    unstable."""
    encoder: Float[Array, " d"]
    """The worst direction a, of unit length."""
    decoder: Float[Array, " d"]
    """``−g(a)/‖g(a)‖``."""


class Certificate(NamedTuple):
    """What is known of a network as a local minimum; concrete numbers."""

    gradient_norm: Float[Array, ""]
    """Of the exact objective in (W₁, W₂), at the network given."""
    refined: ReluDae
    """The minimum that Newton's method finds from there, all p columns."""
    refined_gradient_norm: Float[Array, ""]
    converged: Bool[Array, ""]
    """Whether that reached the tolerance; if not, what follows is of the last iterate."""
    distance_sq: Float[Array, ""]
    """Squared distance to it over both matrices; ``2 ‖R‖²`` for a tied closed form."""
    curvatures: Float[Array, " m"]
    """Eigenvalues of the Hessian at the refined network, over live columns, rising; Ritz values of a large one."""
    min_curvature: Float[Array, ""]
    """The least of them; at a minimum with balanced live columns 4λ at most, from their rescaling."""
    min_curvature_modulo_symmetry: Float[Array, ""]
    """The least over directions orthogonal to rescaling, splitting and rotation."""
    curvature_error: Float[Array, ""]
    """An eigenvalue lies within so much of ``min_curvature_modulo_symmetry``: 0 but for Lanczos."""
    num_live: Int[Array, ""]
    num_symmetries: Int[Array, ""]
    """Dimension of the span of rescalings, splittings and rotations within blocks."""
    num_rotations: Int[Array, ""]
    """Of these, rotations: turns of the orthogonal factor O, flat up to what noise carries across the block's gates."""
    min_rotation_curvature: Float[Array, ""]
    """The least curvature along rotations; infinite if there are none."""
    dead: DeadDirection
    """How new units would fare; says whether zero columns are stable."""
    strict: Bool[Array, ""]
    """Converged, positively curved modulo symmetry, not negatively along rotations, and no dead column pays."""


def certify(
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    tolerance: float = 1e-12,
    max_size: int = 1500,
) -> Certificate:
    """Gradient, refinement by Newton's method, curvature and stability of ``dae``; not jittable: ranks are shapes.

    ``tolerance`` is the gradient norm at which the refinement has converged (1e-12 needs float64). Up to ``max_size``
    live coordinates the Hessian is diagonalized; beyond, Lanczos' method finds the least curvatures, each an upper
    bound. ``ValueError`` for traced input, weights outside the span of the data, no live column, and what
    :func:`dae_theory.risk.exact_objective` refuses.
    """
    check_data(data)
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)
    if not is_concrete(dae, data, sigma, penalty):
        raise ValueError("certify needs concrete values: ranks are shapes; call it outside jit.")
    basis = span_basis(data, extra=1)
    small, rows = to_span(dae, data, basis)
    _check_in_span(dae, small)
    live = np.flatnonzero(live_columns(small, tolerance=1e-12))
    if live.size == 0:
        raise ValueError("all columns of the network are zero: there is nothing to certify.")
    large = 2 * live.size * rows.shape[1] > max_size
    kept = ReluDae(*(w[:, live] for w in small))
    found = minimize_exact_objective(kept, rows, sigma, penalty, method="products", tolerance=tolerance, max_rough=0)
    tangents = symmetry_tangents(found.dae, families=("rescaling", "splitting", "rotation"), data=rows)
    turns = symmetry_tangents(found.dae, families=("rotation",), data=rows)
    curved = (_lanczos_curvature if large else _dense_curvature)(found.dae, rows, sigma, penalty, tangents, turns)
    moved = from_span(found.dae, basis)
    refined = ReluDae(*(old.at[:, live].set(new) for old, new in zip(dae, moved, strict=True)))
    # Below the rounding of the eigenvalues a negative sign says nothing.
    level = -2 * kept.w1.size * float(jnp.finfo(rows.dtype).eps) * curved.all[-1]
    dead = dead_direction(found.dae, rows, sigma, penalty)
    # Splitting a live unit into a dead one is free, so the slack is never above 0: below rounding it counts as 0.
    free = -math.sqrt(float(jnp.finfo(rows.dtype).eps)) * float(penalty)
    stable = dead.slack >= free if live.size < dae.w1.shape[1] else jnp.asarray(True)
    return Certificate(
        gradient_norm=_gradient_norm(kept, rows, sigma, penalty),
        refined=refined,
        refined_gradient_norm=found.gradient_norm,
        converged=found.converged,
        distance_sq=sum((jnp.sum(jnp.square(a - b)) for a, b in zip(found.dae, kept, strict=True)), jnp.zeros(())),
        curvatures=curved.all,
        min_curvature=curved.all[0],
        min_curvature_modulo_symmetry=curved.modulo,
        curvature_error=curved.error,
        num_live=jnp.asarray(live.size),
        num_symmetries=jnp.asarray(len(tangents)),
        num_rotations=jnp.asarray(len(turns)),
        min_rotation_curvature=curved.turning,
        dead=dead._replace(encoder=basis @ dead.encoder, decoder=basis @ dead.decoder),
        strict=found.converged & (curved.modulo > curved.error) & (curved.turning > level) & stable,
    )


@jax.jit
@full_precision
def hessian(dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Float[Array, "m m"]:
    """Second derivatives of the exact objective in (W₁, W₂), m = 2dp, in the order of ``ravel_pytree``; symmetric.

    There is none where a unit is zero: leave such units out.
    """
    x, unravel = ravel_pytree(dae)
    gradient = jax.grad(lambda x: exact_objective(unravel(x), data, sigma, penalty))
    _, product = jax.linearize(gradient, x)
    # In a loop, not a map: m products at once would need m times the memory of one.
    matrix = jax.lax.map(product, jnp.eye(x.size, dtype=x.dtype), batch_size=32)
    return 0.5 * (matrix + matrix.T)


@full_precision
def dead_direction(
    dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, *, num_steps: int = 200
) -> DeadDirection:
    r"""The unit whose growth from nothing changes the objective least favorably for ``dae`` (derived here).

    A unit ``w₁ = δa, w₂ = δb`` with ‖a‖ = ‖b‖ = 1 changes the objective by ``2δ² (λ + b·g(a)) + O(δ⁴)``,

    .. math:: g(a) = \frac1n \sum_i E\left[(f(y_i) - x_i) [a^\top y_i]_+\right]

    best at ``b = −g/‖g‖``: zero columns are stable exactly if ``max ‖g(a)‖ <= λ``. The maximum over the sphere is
    sought from the rows, their negatives, the negative mean, and a direction orthogonal to the data if d > rank, by
    steps of ``a ← ∇‖g‖²/‖∇‖g‖²‖`` (which cannot lower a convex function; ‖g‖² need not be one, so the best point met
    counts), until none moves ‖g‖² by more than rounding, or ``num_steps`` are made. A lower bound of the maximum: it
    proves instability, and stability as far as the search saw.
    """
    check_integer("num_steps", num_steps, minimum=1)
    rows = jnp.asarray(data)
    mean = jnp.mean(rows, axis=0, keepdims=True)
    normal = _orthogonal(rows) if is_concrete(rows) else jnp.zeros((0, rows.shape[1]), rows.dtype)
    starts = jnp.concatenate([rows, -rows, -mean, normal])
    starts = starts / jnp.maximum(jnp.linalg.norm(starts, axis=1, keepdims=True), jnp.finfo(rows.dtype).tiny)
    a, g = _climb(dae, rows, sigma, starts, num_steps)
    size = jnp.linalg.norm(g)
    return DeadDirection(penalty - size, a, -g / jnp.where(size > 0, size, 1.0))


class ResidualLaw(NamedTuple):
    """A line fitted to ``log ‖R‖²`` against ``1/σ²``."""

    slope: float
    intercept: float
    r_squared: float
    margin_sq: float
    """γ² of the closed form at the smallest σ: the slope is predicted to be −γ² up to a constant factor."""
    inverse_sigma_sq: Float[np.ndarray, " s"]
    log_residual_sq: Float[np.ndarray, " s"]


def residual_law(
    data: Float[Array, "n d"], sigmas: Float[Array, " s"], penalty: Scalar, *, tolerance: float = 1e-12
) -> ResidualLaw:
    r"""How the remainder of Corollary 3.2 vanishes :cite:`zhang26`, Theorem 3.1.

    .. math:: \log \|R\|_F^2 \approx \log C - c\,\gamma^2/\sigma^2

    One certificate for each σ; R is half of the squared distance to the refined minimum (two equal matrices). Choose σ
    with ``‖R‖²`` above rounding, about 1e-15. ``ValueError`` for fewer than two σ, a network that does not converge,
    and what :func:`certify` refuses.
    """
    check_positive("sigmas", sigmas)
    if sigmas.ndim != 1 or sigmas.size < 2:
        raise ValueError(f"sigmas must be a vector of at least two noise levels, got shape {sigmas.shape}.")
    logs = []
    for sigma in np.asarray(sigmas):
        closed = memorizing_minimizer(data, float(sigma), penalty, data.shape[0])
        certificate = certify(closed, data, float(sigma), penalty, tolerance=tolerance)
        if not certificate.converged:
            raise ValueError(f"no minimum was found beside the closed form at sigma = {sigma}: leave it out.")
        logs.append(math.log(float(certificate.distance_sq) / 2))
    x, y = np.asarray(sigmas, float) ** -2.0, np.asarray(logs)
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    labels = np.arange(data.shape[0])
    margin = float(check_conditions(data, labels, float(np.min(np.asarray(sigmas))), penalty, 1).margin)
    spread = float(np.sum((y - y.mean()) ** 2))
    return ResidualLaw(float(slope), float(intercept), 1 - float(rest @ rest) / spread, margin**2, x, y)


@jax.jit
def _gradient_norm(dae: ReluDae, rows: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Float[Array, ""]:
    return jnp.linalg.norm(ravel_pytree(jax.grad(exact_objective)(dae, rows, sigma, penalty))[0])


class _Climb(NamedTuple):
    """A search over the sphere, or many."""

    here: Float[Array, "*k d"]
    value: Float[Array, "*k"]
    """At the point before."""
    best: Float[Array, "*k"]
    summit: Float[Array, "*k d"]
    moving: Bool[Array, "*k"]


@functools.partial(jax.jit, static_argnames="num_steps")
def _climb(
    dae: ReluDae, rows: Float[Array, "n d"], sigma: Scalar, starts: Float[Array, "k d"], num_steps: int
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """The best direction met from any start, and its pull."""

    def strength_sq(a: Float[Array, " d"]) -> Float[Array, ""]:
        return jnp.sum(jnp.square(_pull(dae, rows, sigma, a)))

    def ascend(climb: _Climb) -> _Climb:
        value, slope = jax.value_and_grad(strength_sq)(climb.here)
        length = jnp.linalg.norm(slope)
        onwards = jnp.where(length > 0, slope / jnp.where(length > 0, length, 1.0), climb.here)
        better = value > climb.best
        return _Climb(
            onwards,
            value,
            jnp.where(better, value, climb.best),
            jnp.where(better, climb.here, climb.summit),
            jnp.abs(value - climb.value) > 4 * jnp.finfo(value.dtype).eps * jnp.abs(value),
        )

    def step(carry: tuple[Array, _Climb]) -> tuple[Array, _Climb]:
        count, climbs = carry
        return count + 1, jax.lax.map(ascend, climbs, batch_size=8)

    def going(carry: tuple[Array, _Climb]) -> Array:
        count, climbs = carry
        return (count < num_steps) & jnp.any(climbs.moving)

    nowhere = jnp.full(len(starts), -1.0, starts.dtype)
    begin = _Climb(starts, nowhere, nowhere, starts, jnp.ones(len(starts), bool))
    _, end = jax.lax.while_loop(going, step, (jnp.zeros((), int), begin))
    a = end.summit[jnp.argmax(end.best)]
    return a, _pull(dae, rows, sigma, a)


def _pull(dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar, a: Float[Array, " d"]) -> Float[Array, " d"]:
    """``g(a)``: what the error has in common with a unit that looks along a."""
    s = jnp.asarray(sigma, a.dtype)
    std, std_a = s * jnp.linalg.norm(dae.w1, axis=0), s * jnp.linalg.norm(a)
    cov = s * s * (a @ dae.w1)

    def of_row(x: Float[Array, " d"]) -> Float[Array, " d"]:
        m, m_a = x @ dae.w1, x @ a
        together = relu_cross_moment(m, jnp.broadcast_to(m_a, m.shape), std, jnp.broadcast_to(std_a, m.shape), cov)
        return dae.w2 @ together - x * relu_mean(m_a, std_a)

    return jnp.mean(jax.vmap(of_row)(data), axis=0)


def _orthogonal(rows: Float[Array, "n d"]) -> Float[Array, "k d"]:
    basis = span_basis(rows, extra=1)
    rank = span_basis(rows).shape[1]
    return basis[:, rank:].T


def _check_in_span(dae: ReluDae, small: ReluDae) -> None:
    for name, full, part in zip(("w1", "w2"), dae, small, strict=True):
        total, kept = float(jnp.sum(jnp.square(full))), float(jnp.sum(jnp.square(part)))
        if total - kept > 1e3 * float(jnp.finfo(full.dtype).eps) * total:
            raise ValueError(
                f"{name} has a component of norm {math.sqrt(total - kept):.3g} outside the span of the data; "
                "project it "
                "(dae_theory.exact_training.to_span) or pass rows that span it."
            )


class _Curvature(NamedTuple):
    all: Float[Array, " k"]
    modulo: Float[Array, ""]
    error: Float[Array, ""]
    turning: Float[Array, ""]


def _dense_curvature(
    dae: ReluDae, rows: Array, sigma: Scalar, penalty: Scalar, tangents: Array, turns: Array
) -> _Curvature:
    matrix = hessian(dae, rows, sigma, penalty)
    tangents = tangents.reshape(len(tangents), len(matrix))
    complement = jnp.linalg.qr(tangents.T, mode="complete")[0][:, len(tangents) :]
    modulo = jnp.linalg.eigvalsh(complement.T @ matrix @ complement)[0]
    turning = _least_along(turns.reshape(len(turns), len(matrix)), lambda v: matrix @ v)
    return _Curvature(jnp.linalg.eigvalsh(matrix), modulo, jnp.zeros_like(modulo), turning)


def _lanczos_curvature(
    dae: ReluDae, rows: Array, sigma: Scalar, penalty: Scalar, tangents: Array, turns: Array
) -> _Curvature:
    x, unravel = ravel_pytree(dae)
    product = jax.jit(jax.linearize(jax.grad(lambda x: exact_objective(unravel(x), rows, sigma, penalty)), x)[1])
    tangents = tangents.reshape(len(tangents), x.size)
    # Any start will do that has a part in every eigenvector; the key is fixed so that a certificate is reproducible.
    start = jax.random.normal(jax.random.key(0), x.shape, x.dtype)

    steps = min(LANCZOS_STEPS, x.size - len(tangents))
    whole = jax.jit(lambda v: lanczos(product, v, steps))(start)
    rest = jax.jit(lambda v: lanczos(product, v, steps, without=tangents))(start)
    turning = _least_along(turns.reshape(len(turns), x.size), product)
    return _Curvature(whole.values, rest.values[0], rest.residuals[0], turning)


def _least_along(
    directions: Float[Array, "k m"], product: Callable[[Float[Array, " m"]], Float[Array, " m"]]
) -> Float[Array, ""]:
    """The least eigenvalue of a quadratic form restricted to the span of orthonormal rows; infinite without any."""
    if not len(directions):
        return jnp.full((), jnp.inf, directions.dtype)
    images = jax.lax.map(product, directions, batch_size=32)
    return jnp.linalg.eigvalsh(directions @ images.T)[0]
