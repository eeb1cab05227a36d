r"""Whether zero columns are stable: the search for a direction in which a new unit lowers the objective; derived here.

A unit ``w₁ = δa, w₂ = δb`` with ‖a‖ = ‖b‖ = 1, added to a network f, changes the objective by
``2δ² (λ + b·g(a)) + o(δ²)``,

.. math:: g(a) = \frac1n \sum_i E\left[(f(y_i) - x_i) [a^\top y_i]_+\right]

so zero columns are stable if and only if ``max ‖g(a)‖ <= λ`` over unit vectors a. Directions that matter need not be
orthogonal to all of the data: it is enough that a is orthogonal to the samples of a subset A, on whose rows the new
unit then acts as a bias, and that its gate is certain on the others. At the memorizing minimizer such an a has

.. math:: g(a) = -\frac{\sigma}{n \sqrt{2\pi}} \sum_{i \in A} (1 - q_i) x_i
                 - \lambda \sum_{j \text{ on}} \hat x_j \hat x_j^\top a

Along a live unit, ``a = x̂_j``, ‖g‖ = λ: growing a copy of a unit merely splits it.

Samples are rows. Everything is jittable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dae_theory.bivariate_normal import normal_cdf
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_mean
from dae_theory.types import Scalar

__all__ = ["main_term_correlation", "main_term_slack", "maximize_on_sphere", "starting_directions", "subset_directions"]

Correlation = Callable[[Float[Array, " d"]], Float[Array, " d"]]


class _Ascent(NamedTuple):
    """State of the search over the sphere from one start, or from k of them."""

    point: Float[Array, "*k d"]
    value: Float[Array, "*k"]
    """``‖g‖²`` at the previous point."""
    best_value: Float[Array, "*k"]
    best_point: Float[Array, "*k d"]
    moving: Bool[Array, "*k"]


def starting_directions(data: Float[Array, "n d"]) -> Float[Array, "k d"]:
    """Unit vectors along the rows, their negatives and the negative mean; zero vectors where those vanish."""
    return _unit_rows(jnp.concatenate([data, -data, -jnp.mean(data, axis=0, keepdims=True)]))


@full_precision
def subset_directions(data: Float[Array, "n d"], limit: int) -> Float[Array, "k d"]:
    """Unit vectors orthogonal to all, one or two of the rows, k <= ``limit``; zero vectors where there is none.

    The first is orthogonal to all rows. The others are the components of plus and minus each row, and of plus and minus
    the mean, that are orthogonal to one or two other rows, smaller subsets first.
    """
    n, d = data.shape
    probe = jnp.cos(jnp.arange(1, d + 1, dtype=data.dtype))
    _, singular_values, right = jnp.linalg.svd(data, full_matrices=False)
    spans = singular_values > jnp.finfo(data.dtype).eps * max(n, d) * jnp.max(singular_values)
    normal = _remove(probe, jnp.where(spans[:, None], right, 0.0).T)[None, :]
    subsets = itertools.chain(((i, i) for i in range(n)), itertools.combinations(range(n), 2))
    choices = ((*subset, k) for subset in subsets for k in range(n + 1) if k not in subset)
    chosen = np.asarray(list(itertools.islice(choices, max(0, (limit - 1) // 2))), int).reshape(-1, 3)
    if not len(chosen):
        return _unit_rows(normal)
    vectors = jnp.concatenate([data, jnp.mean(data, axis=0, keepdims=True)])

    def orthogonal(i, j, k):
        first = _unit(vectors[i])
        second = _unit(_remove(vectors[j], first[:, None]))
        return _remove(vectors[k], jnp.stack([first, second], axis=1))

    across = jax.vmap(orthogonal)(*jnp.asarray(chosen.T))
    return _unit_rows(jnp.concatenate([normal, across, -across]))


def main_term_correlation(
    w: Float[Array, "d p"], data: Float[Array, "n d"], owned: Bool[Array, "n p"], sigma: Scalar
) -> Correlation:
    r"""The function g for blocks whose gates are certain: on for the samples that they own and off for all others.

    .. math:: g(a) = \frac1n \sum_i \left[(W_k W_k^\top - I) x_i\, E[a^\top y_i]_+
              + \sigma^2 W_k W_k^\top a\, \Phi(a^\top x_i/\sigma)\right], \quad k = k(i), \quad \|a\| = 1

    by Stein's lemma. ``W₁ = W₂ = w``; ``owned[i, j]`` says whether unit j belongs to the block of sample i.
    """
    n = data.shape[0]
    residuals = jnp.where(owned, data @ w, 0.0) @ w.T - data
    s = jnp.asarray(sigma, data.dtype)
    scale = jnp.where(s > 0, s, 1.0)

    @full_precision
    def correlation(a):
        m = data @ a
        on = jnp.sum(jnp.where(owned, normal_cdf(m / scale)[:, None], 0.0), axis=0)
        return (relu_mean(m, jnp.broadcast_to(s, m.shape)) @ residuals + s * s * (w @ (on * (a @ w)))) / n

    return correlation


@full_precision
def main_term_slack(
    w: Float[Array, "d p"],
    data: Float[Array, "n d"],
    owned: Bool[Array, "n p"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    num_steps: int = 50,
) -> Float[Array, ""]:
    """``λ − max ‖g(a)‖`` of :func:`main_term_correlation` over the directions visited by a search; 0 where only
    directions along live units reach λ.

    The largest ‖g‖ of the search is a lower bound of the maximum: a negative slack proves instability up to the noise
    that crosses gates, another slack proves stability only as far as the search went. That noise moves ‖g‖ away from λ
    along live units, where it is λ exactly at a minimum: a slack within the largest such difference counts as 0.
    """
    correlation = main_term_correlation(w, data, owned, sigma)
    # So that the search costs at most about as much as a few thousand products with the data.
    limit = max(32, min(512, 2**24 // data.size))
    starts = jnp.concatenate([starting_directions(data)[:limit], subset_directions(data, limit)])
    _, g = maximize_on_sphere(correlation, starts, num_steps)
    units = _unit_rows(w.T)
    lengths = jnp.linalg.norm(jax.lax.map(correlation, units), axis=1)
    live = jnp.any(units != 0, axis=1)
    crossing = jnp.max(jnp.where(live, jnp.abs(lengths - penalty), 0.0), initial=0.0)
    slack = penalty - jnp.linalg.norm(g)
    return jnp.where((slack < 0) & (-slack <= crossing + jnp.sqrt(jnp.finfo(w.dtype).eps) * penalty), 0.0, slack)


def maximize_on_sphere(
    correlation: Correlation, starts: Float[Array, "k d"], num_steps: int
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """The direction a of largest ``‖g(a)‖`` visited from any start by ``a ← ∇‖g‖²/‖∇‖g‖²‖``, and ``g(a)``.

    The iteration never lowers a convex function; since ‖g‖² need not be convex, the best point visited counts. It stops
    when no start moves ‖g‖² by more than rounding, or after ``num_steps`` steps.
    """

    def norm_sq(a):
        return jnp.sum(jnp.square(correlation(a)))

    def ascend(state):
        value, slope = jax.value_and_grad(norm_sq)(state.point)
        length = jnp.linalg.norm(slope)
        point = jnp.where(length > 0, slope / jnp.where(length > 0, length, 1.0), state.point)
        better = value > state.best_value
        return _Ascent(
            point,
            value,
            jnp.where(better, value, state.best_value),
            jnp.where(better, state.point, state.best_point),
            jnp.abs(value - state.value) > 4 * jnp.finfo(value.dtype).eps * jnp.abs(value),
        )

    def step(carry):
        count, states = carry
        return count + 1, jax.lax.map(ascend, states, batch_size=8)

    def unfinished(carry):
        count, states = carry
        return (count < num_steps) & jnp.any(states.moving)

    below_all = jnp.full(len(starts), -1.0, starts.dtype)
    initial = _Ascent(starts, below_all, below_all, starts, jnp.ones(len(starts), bool))
    _, final = jax.lax.while_loop(unfinished, step, (jnp.zeros((), int), initial))
    a = final.best_point[jnp.argmax(final.best_value)]
    return a, correlation(a)


def _remove(v: Float[Array, " d"], basis: Float[Array, "d k"]) -> Float[Array, " d"]:
    """The component of v orthogonal to orthonormal columns; zero if nothing but rounding is left of it."""
    # Twice, because the first projection leaves a rounding error relative to what it removes.
    rest = v - basis @ (basis.T @ v)
    rest = rest - basis @ (basis.T @ rest)
    floor = 1e3 * jnp.finfo(v.dtype).eps * jnp.max(jnp.abs(v), initial=0.0)
    return jnp.where(jnp.max(jnp.abs(rest), initial=0.0) > floor, rest, 0.0)


def _unit(v: Float[Array, " d"]) -> Float[Array, " d"]:
    length = jnp.linalg.norm(v)
    return v / jnp.where(length > 0, length, 1.0)


def _unit_rows(rows: Float[Array, "k d"]) -> Float[Array, "k d"]:
    return jax.vmap(_unit)(rows)
