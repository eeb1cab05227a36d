r"""The direction in which a zero column of a network is least stable, from the exact objective; derived here.

:mod:`dae_theory.zero_columns` says what makes a new unit grow. Here the error that it would correct is that of any
network, without or with biases, averaged over the noise exactly. Samples are rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.bivariate_normal import SATURATION
from dae_theory.checks import check_integer
from dae_theory.model import AffineDae, Dae, preactivations, target
from dae_theory.newton import lbfgs
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_cross_moment, relu_mean
from dae_theory.types import Scalar
from dae_theory.zero_columns import maximize_on_sphere, starting_directions, subset_directions

__all__ = ["DeadDirection", "dead_direction", "error_correlation"]

# Directions orthogonal to some rows from which the search for a new unit starts, besides the rows.
NUM_CANDIDATES = 8
# Rows through which gates pass at the start of that search, for networks with biases.
MAX_ANCHORS = 32


class DeadDirection(NamedTuple):
    """The direction in which a zero unit lowers the objective most, or raises it least, as it grows."""

    slack: Float[Array, ""]
    """``λ − max_a ‖g(a)‖``, g as in :func:`dead_direction`. If negative, zero columns are unstable. At most 0 at a
    minimum with live units, because ``‖g‖ = λ`` along each of them."""
    encoder: Float[Array, " d"]
    """Encoder direction a that maximizes ``‖g(a)‖``, of unit length."""
    decoder: Float[Array, " d"]
    """The best decoder direction for it, ``−g(a)/‖g(a)‖``."""
    bias: Float[Array, ""]
    """Bias of that unit, whose gate is on where ``a·y > −bias``; 0 for networks without biases."""


@full_precision
def dead_direction(
    dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, *, num_steps: int = 200
) -> DeadDirection:
    r"""The direction in which a zero column of ``dae`` is least stable (derived here).

    Adding a unit ``w₁ = δa, w₂ = δb`` with ‖a‖ = ‖b‖ = 1 changes the objective by ``2δ² (λ + b·g(a)) + O(δ⁴)``,

    .. math:: g(a) = \frac1n \sum_i E\left[(f(y_i) - x_i) [a^\top y_i]_+\right]

    which is least at ``b = −g/‖g‖``: zero columns are stable if and only if ``max ‖g(a)‖ <= λ``. The maximum over the
    unit sphere is sought by :func:`dae_theory.zero_columns.maximize_on_sphere`, started from the rows, their negatives,
    the negative mean, and the directions of largest ‖g‖ among those orthogonal to all, one or two of the rows. The
    result is a lower bound of the maximum: it can prove instability, but stability only as far as the search went.

    With biases a unit has a bias β too, ``[aᵀy + β]₊``. The same search then runs with gates through each of at most
    ``MAX_ANCHORS`` rows, through b₂ and the mean, and beyond all rows, where the unit is linear; the best unit found is
    refined over a and β together.
    """
    check_integer("num_steps", num_steps, minimum=1)
    rows = jnp.asarray(data)
    if isinstance(dae, AffineDae):
        a, bias, g = _maximize_with_bias(dae, rows, jnp.asarray(sigma, rows.dtype), num_steps)
    else:
        candidates = subset_directions(rows, max(16, min(256, 2**20 // (rows.size * dae.w1.shape[1]))))
        a, g = _maximize_correlation(dae, rows, sigma, starting_directions(rows), candidates, num_steps)
        bias = jnp.zeros((), rows.dtype)
    size = jnp.linalg.norm(g)
    return DeadDirection(penalty - size, a, -g / jnp.where(size > 0, size, 1.0), bias)


@functools.partial(jax.jit, static_argnames="num_steps")
def _maximize_correlation(
    dae: Dae,
    rows: Float[Array, "n d"],
    sigma: Scalar,
    starts: Float[Array, "k d"],
    candidates: Float[Array, "c d"],
    num_steps: int,
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """The best direction a visited from any start or from the most promising candidates, and ``g(a)``."""

    def correlation(a):
        return error_correlation(dae, rows, sigma, a)

    sizes = jax.lax.map(lambda a: jnp.sum(jnp.square(correlation(a))), candidates, batch_size=8)
    promising = jax.lax.top_k(sizes, min(NUM_CANDIDATES, len(candidates)))[1]
    return maximize_on_sphere(correlation, jnp.concatenate([starts, candidates[promising]]), num_steps)


@functools.partial(jax.jit, static_argnames="num_steps")
@full_precision
def _maximize_with_bias(
    dae: AffineDae, rows: Float[Array, "n d"], sigma: Float[Array, ""], num_steps: int
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, " d"]]:
    """The best direction a and bias β, and ``g(a, β)``."""
    mean = jnp.mean(rows, axis=0, keepdims=True)
    index = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_ANCHORS)).astype(int))
    anchors = jnp.concatenate([rows[index], dae.b2[None, :], mean, mean])
    # Beyond all rows, by enough for their noise: there the unit is linear in y.
    beyond = 2.0 * jnp.max(jnp.linalg.norm(rows - mean, axis=1)) + SATURATION * sigma
    shifts = jnp.zeros(len(anchors), rows.dtype).at[-1].set(beyond)
    starts = starting_directions(rows - mean)

    def along(anchor):
        point, shift = anchor
        a, g = maximize_on_sphere(
            lambda a: error_correlation(dae, rows, sigma, a, shift - a @ point), starts, num_steps
        )
        return a, shift - a @ point, jnp.sum(jnp.square(g))

    a, bias, value = jax.lax.map(along, (anchors, shifts))
    best = jnp.argmax(value)
    start = jnp.concatenate([a[best], bias[best][None]])

    def correlation(unit):
        length = jnp.linalg.norm(unit[:-1])
        return error_correlation(dae, rows, sigma, unit[:-1] / length, unit[-1])

    scale = value[best]
    end = lbfgs(
        lambda unit: -jnp.sum(jnp.square(correlation(unit))) / jnp.where(scale > 0, scale, 1.0),
        start,
        tolerance=0.0,
        max_iterations=50,
    ).x
    return end[:-1] / jnp.linalg.norm(end[:-1]), end[-1], correlation(end)


def error_correlation(
    dae: Dae, data: Float[Array, "n d"], sigma: Scalar, a: Float[Array, " d"], bias: Scalar = 0.0
) -> Float[Array, " d"]:
    """``g(a)``: the error, multiplied by the activation of a unit with encoder a and averaged over data and noise."""
    s = jnp.asarray(sigma, a.dtype)
    std, std_a = s * jnp.linalg.norm(dae.w1, axis=0), s * jnp.linalg.norm(a)
    cov = s * s * (a @ dae.w1)

    def of_row(x):
        m, m_a = preactivations(dae, x), x @ a + bias
        cross = relu_cross_moment(m, jnp.broadcast_to(m_a, m.shape), std, jnp.broadcast_to(std_a, m.shape), cov)
        return dae.w2 @ cross - target(dae, x) * relu_mean(m_a, std_a)

    return jnp.mean(jax.vmap(of_row)(data), axis=0)
