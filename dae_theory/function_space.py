r"""Networks as functions: inner product and distance in the mean square over ``y ~ N(0, I)``, in closed form.

Weights say little about how far apart two networks are, because of their symmetries (:mod:`dae_theory.symmetry`). The
mean square sees the function alone, and has a closed form: a network is ``Σ_j c_j [e_jᵀ y]₊`` with unit directions
``e = ŵ₁`` and coefficients ``c = ‖w₁‖ w₂``, and the kernel of its features is known :cite:`cho09`, eq. (6),

.. math:: \kappa(t) = \mathrm E\,[e^\top y]_+ [e'^\top y]_+ = \frac{\sin t + (\pi - t) \cos t}{2\pi},
          \qquad t = \angle(e, e').

Both are homogeneous, so ``N(0, τ² I)`` only multiplies by τ²; for ``N(0, C)`` pass encoders ``C^{1/2} W₁``. Functions
take two networks of one dimension d and any widths; batch with ``jax.vmap``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.model import ReluDae
from dae_theory.precision import full_precision
from dae_theory.symmetry import column_norms, match_columns, merge_parallel_columns, pad_columns, unit_columns

__all__ = ["function_distance_sq", "function_inner_product"]


@full_precision
def function_inner_product(dae_a: ReluDae, dae_b: ReluDae) -> Float[Array, ""]:
    r"""Mean of ``f_a(y)ᵀ f_b(y)`` over ``y ~ N(0, I)``; with itself the squared norm of a network.

    .. math:: \langle f_a, f_b \rangle = \sum_{jk} c_j^a \cdot c_k^b \; \kappa(\angle(e_j^a, e_k^b))

    Derivatives of first and second order are finite everywhere; at a zero encoder column, where this function has a
    kink, the first is the mean of both sides. ``ValueError`` if the dimensions differ.
    """
    _check_dimensions(dae_a, dae_b)
    (e_a, c_a), (e_b, c_b) = _polar(dae_a), _polar(dae_b)
    return jnp.sum((c_a.T @ c_b) * _kernel(e_a.T @ e_b))


@jax.custom_jvp
@full_precision
def function_distance_sq(dae_a: ReluDae, dae_b: ReluDae) -> Float[Array, ""]:
    r"""Mean of ``‖f_a(y) − f_b(y)‖²`` over ``y ~ N(0, I)``: zero only if the functions are equal, whatever the weights.

    The three inner products of the expanded square cancel: they would tell networks apart no better than √(rounding
    unit). Instead (derived here) exactly parallel units are merged, units of a and b are paired by
    :func:`dae_theory.symmetry.match_columns`, and the difference is written in differences that are small one by one,

    .. math:: f_a - f_b = \sum_j (c_j - c_j') \frac{[e_j]_+ + [e_j']_+}{2} + \frac{c_j + c_j'}{2} ([e_j]_+ - [e_j']_+),

    a unit without a partner being paired with nothing in its own direction. First and second differences of κ follow
    from

    .. math:: \kappa(t) - \kappa(t') = \frac{(\pi - m)(\cos t - \cos t') + \cos m \, (2 \sin\frac h2 - h \cos\frac h2)}
              {2\pi}, \qquad m = \frac{t + t'}2, \quad h = t - t',

    with ``cos t − cos t' = eᵀ(e₁ − e₂)`` from the differences of the directions. Any pairing is exact in exact
    arithmetic; with one that fits, the error is the rounding unit times the *distance* of the networks times their
    norm, not times their squared norm. Networks that are equal without matching unit by unit keep the latter.

    The derivative is that of the expanded square: right to rounding, and zero at equal networks. ``ValueError`` if the
    dimensions differ.
    """
    _check_dimensions(dae_a, dae_b)
    (e_a, c_a), (e_b, c_b) = _paired(dae_a, dae_b)
    delta, dc, c = e_a - e_b, c_a - c_b, 0.5 * (c_a + c_b)
    t_aa, t_ab, t_bb = _angles(e_a, e_a), _angles(e_a, e_b), _angles(e_b, e_b)
    # Entry [j, k] of the first difference from a's or from b's unit j: κ to a's unit k less κ to b's unit k.
    m_a, m_b = 0.5 * (t_aa + t_ab), 0.5 * (t_ab.T + t_bb)
    bend_a, bend_b = _bend(m_a, t_aa - t_ab), _bend(m_b, t_ab.T - t_bb)
    rise, jump = 0.5 * (e_a + e_b).T @ delta, delta.T @ delta
    down, turn = math.pi - 0.5 * (m_a + m_b), m_a - m_b
    mean = 0.25 * (_kernel_of_angle(t_aa) + _kernel_of_angle(t_ab) + _kernel_of_angle(t_ab.T) + _kernel_of_angle(t_bb))
    first = (down * rise - 0.25 * turn * jump + 0.5 * (bend_a + bend_b)) / (2.0 * math.pi)
    second = (down * jump - turn * rise + bend_a - bend_b) / (2.0 * math.pi)
    total = jnp.sum((dc.T @ dc) * mean + 2.0 * (dc.T @ c) * first + (c.T @ c) * second)
    return jnp.maximum(total, 0.0)


@function_distance_sq.defjvp
def _function_distance_sq_jvp(
    primals: tuple[ReluDae, ReluDae], tangents: tuple[ReluDae, ReluDae]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    def expanded(a: ReluDae, b: ReluDae) -> Float[Array, ""]:
        return function_inner_product(a, a) - 2.0 * function_inner_product(a, b) + function_inner_product(b, b)

    return function_distance_sq(*primals), jax.jvp(expanded, primals, tangents)[1]


def _check_dimensions(dae_a: ReluDae, dae_b: ReluDae) -> None:
    if dae_a.w1.shape[0] != dae_b.w1.shape[0]:
        raise ValueError(
            f"networks must have one dimension d, got {dae_a.w1.shape[0]} and {dae_b.w1.shape[0]} rows of weights."
        )


def _polar(dae: ReluDae) -> tuple[Float[Array, "d p"], Float[Array, "d p"]]:
    return unit_columns(dae.w1), dae.w2 * column_norms(dae.w1)[None, :]


@jax.custom_jvp
def _kernel(cosine: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return _kernel_of_angle(jnp.arccos(jnp.clip(cosine, -1.0, 1.0)))


@_kernel.defjvp
def _kernel_jvp(
    primals: tuple[Float[Array, "p q"]], tangents: tuple[Float[Array, "p q"]]
) -> tuple[Float[Array, "p q"], Float[Array, "p q"]]:
    (cosine,), (tangent,) = primals, tangents
    # dκ/d cos t = (π − t)/2π: the poles of sine and arccosine cancel. At the ends the slope of t is infinite, but the
    # second derivative along unit vectors does not see it, as κ − cos t/2 = O(t³).
    inside = jnp.abs(cosine) < 1.0
    angle = jnp.where(inside, jnp.arccos(jnp.where(inside, cosine, 0.0)), jnp.where(cosine > 0, 0.0, math.pi))
    return _kernel(cosine), (math.pi - angle) / (2.0 * math.pi) * tangent


def _kernel_of_angle(t: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return (jnp.sin(t) + (math.pi - t) * jnp.cos(t)) / (2.0 * math.pi)


def _paired(
    dae_a: ReluDae, dae_b: ReluDae
) -> tuple[tuple[Float[Array, "d p"], Float[Array, "d p"]], tuple[Float[Array, "d p"], Float[Array, "d p"]]]:
    width = max(dae_a.w1.shape[1], dae_b.w1.shape[1])
    # Directions within eight roundings of one another.
    tolerance = 32.0 * float(jnp.finfo(dae_a.w1.dtype).eps) ** 2
    a, b = (merge_parallel_columns(pad_columns(dae, width), tolerance=tolerance) for dae in (dae_a, dae_b))
    order = match_columns(a, b)
    (e_a, c_a), (e_b, c_b) = _polar(a), _polar(ReluDae(b.w1[:, order], b.w2[:, order]))
    alone_a, alone_b = (jnp.all(e == 0, axis=0)[None, :] for e in (e_a, e_b))
    return (jnp.where(alone_a, e_b, e_a), c_a), (jnp.where(alone_b, e_a, e_b), c_b)


def _angles(e: Float[Array, "d p"], f: Float[Array, "d p"]) -> Float[Array, "p p"]:
    # Between e_j and f_k at [j, k]. The arccosine of a product would lose half of the digits near 0 and π.
    def to_all(column: Float[Array, " d"]) -> Float[Array, " p"]:
        apart, along = column_norms(f - column[:, None]), column_norms(f + column[:, None])
        return 2.0 * jnp.arctan2(apart, along)

    return jax.lax.map(to_all, e.T)


def _bend(m: Float[Array, "p p"], h: Float[Array, "p p"]) -> Float[Array, "p p"]:
    return jnp.cos(m) * (2.0 * jnp.sin(0.5 * h) - h * jnp.cos(0.5 * h))
