r"""What noise that crosses gates adds to the objective, and which factor O of a block it selects; derived here.

The closed forms :cite:`zhang26`, Theorem 3.1, leave the orthogonal factor O of a block free, and the main term of the
objective does not depend on it. What remains decides: the *leakage*, the exact objective minus its main term
(:func:`dae_theory.energies.main_term`). At a sample x with gates frozen, ``Q = W₂ diag(1[W₁ᵀx > 0]) W₁ᵀ``; noise that
flips the gate of unit j adds ``w₂ⱼ [vⱼ]₊`` to ``Qy``, where ``vⱼ = ∓uⱼ`` is minus the preactivation of a unit that is
on at x and the preactivation of one that is off. So with ``s = σ‖w₁ⱼ‖`` and ``a = |w₁ⱼᵀx|/s`` the leakage of one unit
at one sample is exactly

.. math:: 2\, w_2^\top (Qx - x)\, s\, \omega(-a) \mp 2 \sigma^2\, w_2^\top Q w_1\, \Phi(-a)
          + \|w_2\|^2 s^2 \left[(1 + a^2) \Phi(-a) - a \varphi(a)\right],
          \quad \omega(-a) = \varphi(a) - a \Phi(-a)

(:func:`gate_leakage`), and the sum over units and samples lacks only pairs of gates flipped by the same noise: those
lie farther away, or, if two gates share a hyperplane, are smaller by a factor of order (σ/margin)². As σ → 0

.. math:: \text{leakage} \approx \frac{2 s\, \varphi(a)}{a^2}\; w_2^\top (Q y^* - x), \quad
          y^* = x - \frac{w_1^\top x}{\|w_1\|^2}\, w_1,

where y* is the point of the gate nearest to x. Its size is that of the margin, ``exp(−margin²/2σ²)``, its sign that of
the *crossing error* ``w₂ᵀ(Qy* − x)``. A positive one repels the gate from the sample; a negative one attracts it. With
``W₁ = W₂`` and ``m = |wᵀx|``,

.. math:: -\frac{m}{\|w\|^2}\, w^\top Q w - w^\top (I - Q) x \;\text{ (own cluster)}, \qquad
          +\frac{m}{\|w\|^2}\, w^\top Q w - w^\top (I - Q) x \;\text{ (other cluster)}.

The second terms are small where Q is nearly the identity on the samples: **a sample attracts the gates of its own
cluster and repels those of others.** Within a block the leakage is a sum over units, that is, over the rows of O, each
on a sphere, and as σ → 0 it is dominated by the smallest margin. Hence two conditions, with the signs as above:

* Where the smallest margin, as a function of O, has a strict local maximum attained at repelling pairs of unit and
  sample only, the objective has a local minimum exponentially near the closed form
  (:func:`dae_theory.factors.best_factors`).
* Near an O whose smallest margin is attained at attracting pairs only it has none once σ is small: there the leakage is
  superharmonic in O. So Theorem 3.1 fails, for every O with margins bounded below, if in every direction of a block's
  span the nearest sample is one of its own cluster (:func:`dae_theory.factors.margin_ratios`).

BEYOND.md has the derivation. Weights have shape (d, p); samples are rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dae_theory.bivariate_normal import normal_cdf
from dae_theory.checks import check_data, check_example, check_level
from dae_theory.model import ReluDae
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_mean, relu_second_moment, standardize
from dae_theory.symmetry import column_norms
from dae_theory.types import Scalar

__all__ = ["GateLeakage", "gate_leakage", "objective_leakage"]


class GateLeakage(NamedTuple):
    """What each unit's gate leaks at one sample; a pytree."""

    is_on: Bool[Array, " p"]
    """Whether the unit is on at the clean sample."""
    distances: Float[Array, " p"]
    """Distance of the sample from the gate's hyperplane; infinite for a zero unit."""
    errors: Float[Array, " p"]
    """Crossing error ``w₂ᵀ(Qy* − x)``: where positive, the leakage repels the gate as σ → 0, where negative, it
    attracts it."""
    leakage: Float[Array, " p"]
    """Contribution to ``E‖f(x + σε) − x‖²``, pairs of gates left out."""


@full_precision
def gate_leakage(dae: ReluDae, x: Float[Array, " d"], sigma: Scalar) -> GateLeakage:
    """What each unit's gate leaks at the sample ``x``, in closed form; one example.

    At σ = 0 nothing leaks. Raises ``ValueError`` for a negative σ, an ``x`` that is not one example, or dimensions that
    disagree.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), jnp.eye(2))
        >>> leak = gate_leakage(dae, jnp.array([3.0, -2.0]), sigma=0.5)
        >>> leak.is_on.tolist(), leak.distances.tolist()
        ([True, False], [3.0, 2.0])
        >>> leak.errors.tolist()  # attracted by its own sample; the other one misses the sample's second coordinate
        [-3.0, 2.0]
    """
    check_example("x", x)
    check_level("sigma", sigma)
    if dae.w1.shape != dae.w2.shape or dae.w1.shape[0] != x.shape[0]:
        raise ValueError(
            f"x has {x.shape[0]} entries but w1 and w2 have shapes {dae.w1.shape} and {dae.w2.shape}; all need d rows."
        )
    sigma = jnp.asarray(sigma, x.dtype)
    mean, norms = x @ dae.w1, column_norms(dae.w1)
    is_on, is_live = mean > 0, norms > 0
    sign = jnp.where(is_on, 1.0, -1.0).astype(x.dtype)
    # Q w₁ for every unit, and the frozen error at the sample.
    open_units = dae.w2 * is_on.astype(x.dtype)[None, :]
    mapped = open_units @ (dae.w1.T @ dae.w1)
    error = open_units @ mean - x
    slope = jnp.sum(dae.w2 * mapped, axis=0)
    bias = error @ dae.w2
    below, std = -jnp.abs(mean), sigma * norms
    flipped = normal_cdf(standardize(below, std))
    crossing = bias - slope * mean / jnp.where(is_live, norms * norms, 1.0)
    leakage = (
        2 * bias * relu_mean(below, std)
        - 2 * sign * sigma * sigma * slope * flipped
        + jnp.sum(jnp.square(dae.w2), axis=0) * relu_second_moment(below, std)
    )
    distances = jnp.where(is_live, jnp.abs(mean) / jnp.where(is_live, norms, 1.0), jnp.inf)
    return GateLeakage(is_on, distances, jnp.where(is_live, crossing, 0.0), jnp.where(is_live, leakage, 0.0))


def objective_leakage(dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar) -> Float[Array, ""]:
    """The exact objective minus its main term, up to pairs of gates: the mean over rows of all :func:`gate_leakage`.

    Raises what that function raises, and ``ValueError`` for bad data.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.array([[1.0], [0.0]])
        >>> bool(objective_leakage(ReluDae(w, w), jnp.array([[1.0, 0.0]]), sigma=0.3) < 0)  # its own sample attracts it
        True
    """
    check_data(data)
    return jnp.mean(jax.vmap(lambda x: jnp.sum(gate_leakage(dae, x, sigma).leakage))(data))
