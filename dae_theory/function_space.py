r"""Networks as functions: mean-square inner product and distance over ``y ~ N(0, I)``, in closed form.

Weights are a poor measure of how far apart two networks are, because of their symmetries (:mod:`dae_theory.symmetry`).
The mean square depends on the function alone and has a closed form: a network is ``Σ_j c_j [e_jᵀ y]₊`` with unit
directions ``e = ŵ₁`` and coefficients ``c = ‖w₁‖ w₂``, and its features have the arc-cosine kernel :cite:`cho09`,
eq. (6),

.. math:: \kappa(t) = \mathrm E\,[e^\top y]_+ [e'^\top y]_+ = \frac{\sin t + (\pi - t) \cos t}{2\pi},
          \qquad t = \angle(e, e').

Networks are homogeneous, so ``N(0, τ² I)`` only multiplies by τ²; for ``N(0, C)`` pass encoders ``C^{1/2} W₁``.
Functions take two networks of the same dimension d and any widths; batch with ``jax.vmap``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dae_theory.model import ReluDae
from dae_theory.precision import full_precision
from dae_theory.symmetry import column_norms, unit_columns

__all__ = ["arc_cosine_kernel", "function_distance_sq", "function_inner_product"]


@full_precision
def function_inner_product(dae_a: ReluDae, dae_b: ReluDae) -> Float[Array, ""]:
    r"""Mean of ``f_a(y)ᵀ f_b(y)`` over ``y ~ N(0, I)``; for equal arguments, the squared norm of the network.

    .. math:: \langle f_a, f_b \rangle = \sum_{jk} c_j^a \cdot c_k^b \; \kappa(\angle(e_j^a, e_k^b))

    First and second derivatives are finite everywhere; at a zero encoder column, where this function has a kink, they
    are set to zero. Raises ``ValueError`` if the dimensions differ.
    """
    _check_dimensions(dae_a, dae_b)
    (e_a, c_a), (e_b, c_b) = _polar(dae_a), _polar(dae_b)
    return jnp.sum((c_a.T @ c_b) * arc_cosine_kernel(e_a.T @ e_b))


@jax.custom_jvp
@full_precision
def function_distance_sq(dae_a: ReluDae, dae_b: ReluDae) -> Float[Array, ""]:
    r"""Mean of ``‖f_a(y) − f_b(y)‖²`` over ``y ~ N(0, I)``: zero if and only if the functions are equal.

    The three inner products of the expanded square cancel: they could not resolve distances below √(rounding unit).
    Instead (derived here) the difference, all units of a and those of b with −c, is summed by parts along the minimum
    spanning tree of the directions, from the leaves to a root r,

    .. math:: f_a - f_b = s_r [e_r^\top y]_+ + \sum_j s_j \left([e_j^\top y]_+ - [e_{\pi(j)}^\top y]_+\right),
              \qquad s_j = \sum_{i \text{ below or at } j} c_i

    with π(j) the parent of j. Units that cancel or nearly coincide are neighbors in the tree, so one of the two factors
    of every term is small. First and second differences of κ follow from

    .. math:: \kappa(t) - \kappa(t') = \frac{(\pi - m)(\cos t - \cos t') + \cos m \, (2 \sin\frac h2 - h \cos\frac h2)}
              {2\pi}, \qquad m = \frac{t + t'}2, \quad h = t - t',

    with ``cos t − cos t' = eᵀ(e₁ − e₂)`` from the differences of the directions. The error is about the rounding unit
    times the *distance* of the networks times their norm, no matter how their units are split, scaled and ordered. For
    networks that are equal only by a coincidence (:func:`dae_theory.symmetry.canonicalize`) it is the rounding of the
    squared norm.

    The derivative is that of the expanded square, correct to rounding, and zero at equal networks. Raises
    ``ValueError`` if the dimensions differ.
    """
    _check_dimensions(dae_a, dae_b)
    (e_a, c_a), (e_b, c_b) = _polar(dae_a), _polar(dae_b)
    return _norm_sq(jnp.concatenate([e_a, e_b], axis=1), jnp.concatenate([c_a, -c_b], axis=1))


@function_distance_sq.defjvp
def _function_distance_sq_jvp(
    primals: tuple[ReluDae, ReluDae], tangents: tuple[ReluDae, ReluDae]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def expanded(a, b):
        return function_inner_product(a, a) - 2.0 * function_inner_product(a, b) + function_inner_product(b, b)

    return function_distance_sq(*primals), jax.jvp(expanded, primals, tangents)[1]


def _check_dimensions(dae_a: ReluDae, dae_b: ReluDae) -> None:
    if dae_a.w1.shape[0] != dae_b.w1.shape[0]:
        raise ValueError(
            f"networks must have the same dimension d, got {dae_a.w1.shape[0]} and {dae_b.w1.shape[0]} rows of weights."
        )


def _polar(dae: ReluDae) -> tuple[Float[Array, "d p"], Float[Array, "d p"]]:
    return unit_columns(dae.w1), dae.w2 * column_norms(dae.w1)[None, :]


@jax.custom_jvp
def arc_cosine_kernel(cosine: Float[Array, "p q"]) -> Float[Array, "p q"]:
    r"""The kernel κ at angles of given cosines :cite:`cho09`, eq. (6); its derivatives are finite at 0 and π too."""
    return _kernel_of_angle(jnp.arccos(jnp.clip(cosine, -1.0, 1.0)))


@arc_cosine_kernel.defjvp
def _arc_cosine_kernel_jvp(
    primals: tuple[Float[Array, "p q"]], tangents: tuple[Float[Array, "p q"]]
) -> tuple[Float[Array, "p q"], Float[Array, "p q"]]:
    (cosine,), (tangent,) = primals, tangents
    # dκ/d cos t = (π − t)/2π: the poles of sine and arccosine cancel. At t = 0 and π the derivative of t is infinite,
    # but the second derivative along unit vectors is not affected, because κ − cos t/2 = O(t³).
    inside = jnp.abs(cosine) < 1.0
    angle = jnp.where(inside, jnp.arccos(jnp.where(inside, cosine, 0.0)), jnp.where(cosine > 0, 0.0, math.pi))
    return arc_cosine_kernel(cosine), (math.pi - angle) / (2.0 * math.pi) * tangent


def _kernel_of_angle(t: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return (jnp.sin(t) + (math.pi - t) * jnp.cos(t)) / (2.0 * math.pi)


# Jitted, because eager loops compile on every call.
@jax.jit
def _norm_sq(e: Float[Array, "d m"], c: Float[Array, "d m"]) -> Float[Array, ""]:
    is_zero = jnp.all(e == 0, axis=0)
    root = jnp.argmin(is_zero)
    # The differences below assume unit vectors, and a unit with zero encoder can have any direction.
    e = jnp.where(is_zero[None, :], e[:, root][:, None], e)
    t = _angles(e)
    parent, s = _sum_by_parts(t, root, c)
    delta = e - e[:, parent]
    # First differences at [j, k]: κ from unit j to unit k less κ from j to the parent of k.
    middle = 0.5 * (t + t[:, parent])
    half = 0.5 * (t - t[:, parent])
    bend = 2.0 * jnp.cos(middle) * (jnp.sin(half) - half * jnp.cos(half))
    rise = e.T @ delta
    first = (math.pi - middle[root]) * rise[root] + bend[root]
    # Second differences: the first from j less those from the parent of j, term by term.
    down, turn = math.pi - 0.5 * (middle + middle[parent]), middle - middle[parent]
    second = down * (delta.T @ delta) - 0.5 * turn * (rise + rise[parent]) + bend - bend[parent]
    total = math.pi * (s[:, root] @ s[:, root]) + 2.0 * jnp.sum((s[:, root] @ s) * first) + jnp.sum((s.T @ s) * second)
    return jnp.maximum(total / (2.0 * math.pi), 0.0)


def _angles(e: Float[Array, "d m"]) -> Float[Array, "m m"]:
    # The arccosine of a product would lose half of the digits near 0 and π.
    def angles_to(column):
        return 2.0 * jnp.arctan2(column_norms(e - column[:, None]), column_norms(e + column[:, None]))

    return jax.lax.map(angles_to, e.T)


def _sum_by_parts(
    t: Float[Array, "m m"], root: Int[Array, ""], c: Float[Array, "d m"]
) -> tuple[Int[Array, " m"], Float[Array, "d m"]]:
    """Parents in the minimum spanning tree of the angles (Prim's algorithm), and sums of c over subtrees."""

    def grow(tree, _):
        inside, gap, nearest = tree
        new = jnp.argmin(jnp.where(inside, jnp.inf, gap))
        closer = t[new] < gap
        grown = inside.at[new].set(True), jnp.where(closer, t[new], gap), jnp.where(closer, new, nearest)
        return grown, (new, nearest[new])

    units = jnp.arange(t.shape[0])
    start = units == root, t[root], jnp.full_like(units, root)
    _, edges = jax.lax.scan(grow, start, length=t.shape[0] - 1)

    def add_to_parent(s, edge):
        new, parent = edge
        return s.at[:, parent].add(s[:, new]), None

    s, _ = jax.lax.scan(add_to_parent, c, edges, reverse=True)
    return units.at[edges[0]].set(edges[1]), s
