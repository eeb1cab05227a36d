r"""When the block minimizer is what it claims to be: separability and the inequalities of Theorem 3.1.

Clusters ``X = [X_1 .. X_M]`` with means x̄_k are (α, β)-separable :cite:`zhang26`, Definition 3.1, if

.. math:: \|x_{kj} - \bar x_k\| \le \alpha \|\bar x_k\|, \quad \cos(\bar x_k, \bar x_l) \le \beta \quad (k \ne l)

The theorem asks for β < 0 and a small α. Those are sufficient only for blocks of one unit: what the proof needs is that
every unit fires on all of its own cluster and on nothing else, so the units are constructed and their margins measured.
Nothing raises because an inequality fails: each one is reported with its slack, which is positive where it holds and
says by how much it fails where it does not.

Samples are rows, ``data`` is (n, d). Everything jits over data, σ and λ, with labels and ranks closed over.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, is_concrete
from dae_theory.minimizers import block_minimizer
from dae_theory.precision import full_precision
from dae_theory.spectra import Labels, Ranks, check_ranks, empirical_spectra, partition
from dae_theory.types import Scalar

__all__ = [
    "Check",
    "Checks",
    "Conditions",
    "Row",
    "Separability",
    "all_hold",
    "check_conditions",
    "gate_margins",
    "masked_separability",
    "rows",
    "separability",
]


class Separability(NamedTuple):
    """The smallest α and β for which clusters are separable, and where they come from; a pytree."""

    alpha: Float[Array, ""]
    """Largest relative spread, >= 0; infinite if a cluster's mean is zero."""
    beta: Float[Array, ""]
    """Largest cosine between two means, in [-1, 1]; -1 if there is only one cluster."""
    alphas: Float[Array, " K"]
    """Relative spread of each cluster, in order of label."""
    betas: Float[Array, " K"]
    """Largest cosine of each mean with another one."""
    means: Float[Array, "K d"]
    """Cluster means x̄_k."""


class Check(NamedTuple):
    """One inequality: whether it holds, and by how much."""

    holds: Bool[Array, ""]
    slack: Float[Array, ""]
    """Distance to equality; infinite where the inequality has nothing to say."""


class Checks(NamedTuple):
    """The inequalities, by name; a pytree."""

    negative_cosines: Check
    r"""β < 0. Slack: -β."""
    few_clusters: Check
    r"""M <= rank(X) + 1, which β < 0 implies. Slack: rank(X) + 1 - M."""
    rank: Check
    r"""p_k <= rank(X_k) for all k. Slack: the smallest difference."""
    penalty: Check
    r"""nλ < Λ_j for all kept directions. Slack: the smallest difference; where negative, q_j is clipped at 0."""
    spread: Check
    r"""α_k √(p_k - 1) < 1 for all k, or a shared leading direction is outweighed. Slack: the least room."""
    own_gates: Check
    r"""Units are positive on their own cluster. Slack: the smallest preactivation, over ‖w‖."""
    other_gates: Check
    r"""Units are negative on the other clusters. Slack: minus the largest preactivation, over ‖w‖."""
    zero_columns: Check
    r"""σ‖g‖/√(2π) <= λ for the zero columns beyond the blocks. Slack: the difference."""


class Conditions(NamedTuple):
    """What Theorem 3.1 asks of data, labels, σ, λ and ranks, and what holds; a pytree."""

    separability: Separability
    checks: Checks
    margins: Float[Array, " K"]
    """Margin of each block: the least distance from a gate's hyperplane over its units; infinite without live units."""
    margin: Float[Array, ""]
    """γ, the smallest of them, in the units of the data: noise of size σ must stay well below."""
    exponent: Float[Array, ""]
    """γ²/σ² with γ's sign: the theorem's remainder is ``‖R‖² <= C exp(-c γ²/σ²)``, and c, C are existential."""
    clipped: Int[Array, ""]
    """How many kept directions have q clipped at 0."""


class Row(NamedTuple):
    """One inequality as numbers and words, for tables."""

    name: str
    holds: bool
    slack: float
    explanation: str


@full_precision
def separability(data: Float[Array, "n d"], labels: Labels) -> Separability:
    r"""The smallest constants of Definition 3.1 :cite:`zhang26`.

    .. math:: \alpha = \max_{k, j} \frac{\|x_{kj} - \bar x_k\|}{\|\bar x_k\|}, \quad
              \beta = \max_{k \ne l} \cos(\bar x_k, \bar x_l)

    A zero mean has α = ∞ and cosine 0 with everything. β < 0 forces M <= rank + 1 and β >= -1/(M - 1) (derived here
    from ``‖Σ_k x̄_k/‖x̄_k‖‖² >= 0``). ``ValueError`` for bad data or labels.
    """
    check_data(data)
    blocks = partition(labels, data.shape[0])
    ones = jnp.ones(data.shape[0], data.dtype)
    return masked_separability(data, jnp.asarray(blocks.members), ones, blocks.counts.size)


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def masked_separability(
    rows: Float[Array, "m d"], members: Int[Array, " m"], copies: Float[Array, " m"], num_blocks: int
) -> Separability:
    """:func:`separability` of rows with ``copies`` >= 0 each; blocks without copies have α = 0 and β = -1."""
    counts = jax.ops.segment_sum(copies, members, num_blocks)
    some = counts > 0
    means = jax.ops.segment_sum(rows * copies[:, None], members, num_blocks) / jnp.where(some, counts, 1.0)[:, None]
    norms = jnp.linalg.norm(means, axis=-1)
    distance = jnp.where(copies > 0, jnp.linalg.norm(rows - means[members], axis=-1), 0.0)
    spread = jax.ops.segment_max(distance, members, num_blocks)
    alphas = jnp.where(some, jnp.where(norms > 0, spread / jnp.where(norms > 0, norms, 1.0), jnp.inf), 0.0)
    directions = means / jnp.where(norms > 0, norms, 1.0)[:, None]

    def nearest(k: Int[Array, ""]) -> Float[Array, ""]:
        others = some & some[k] & (jnp.arange(num_blocks) != k)
        return jnp.max(jnp.where(others, directions @ directions[k], -1.0))

    # Not one K x K matrix: with every sample its own cluster it would outgrow the data.
    betas = jax.lax.map(nearest, jnp.arange(num_blocks), batch_size=min(num_blocks, 256))
    return Separability(jnp.max(alphas), jnp.max(betas), alphas, betas, means)


@full_precision
def gate_margins(
    w: Float[Array, "d p"], data: Float[Array, "n d"], owners: np.ndarray, members: np.ndarray
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    r"""Distances from the data to the hyperplanes at which units switch, on the right side if positive.

    .. math:: \min_{i \in k(j)} \frac{w_j^\top x_i}{\|w_j\|}, \qquad -\max_{i \notin k(j)} \frac{w_j^\top x_i}{\|w_j\|}

    for unit j of block ``owners[j]`` and samples i of block ``members[i]``; infinite over no sample and for w_j = 0.
    """
    norms = jnp.linalg.norm(w, axis=0)
    distance = data @ (w / jnp.where(norms > 0, norms, 1.0)[None, :])
    own = jnp.asarray(members[:, None] == owners[None, :])
    inside = jnp.min(jnp.where(own, distance, jnp.inf), axis=0)
    outside = jnp.min(jnp.where(own, jnp.inf, -distance), axis=0)
    return jnp.where(norms > 0, inside, jnp.inf), jnp.where(norms > 0, outside, jnp.inf)


@full_precision
def check_conditions(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    width: int | None = None,
) -> Conditions:
    r"""Every inequality of Theorem 3.1 :cite:`zhang26` at the minimizer that :func:`block_minimizer` constructs.

    ``width`` p counts the zero columns beyond the blocks. Those are an unstable start (derived here) if a direction a
    is orthogonal to the data: with ``g = (1/n) Σ_i (x_i - W_k W_kᵀ x_i)`` a unit ``w₁ = δ a, w₂ = δ g/‖g‖`` changes the
    objective by ``2 δ² (λ - σ‖g‖/√(2π))``, since ``E[a·ε]_+ = 1/√(2π)``.

    ``ValueError`` for the bad input that :func:`block_minimizer` refuses, and for ``width`` under the number of units.
    """
    w = block_minimizer(data, labels, sigma, penalty, ranks).w1
    n, d = data.shape
    blocks = partition(labels, n)
    p = np.asarray(check_ranks(ranks, np.minimum(blocks.counts, d)))
    owners = np.repeat(np.arange(p.size), p)
    extra = 0 if width is None else check_integer("width", width, minimum=owners.size) - owners.size

    separable = separability(data, labels)
    rank = jnp.linalg.matrix_rank(data)
    lam = empirical_spectra(data, labels).moments * jnp.asarray(blocks.counts, data.dtype)[:, None]
    kept = jnp.asarray(np.arange(lam.shape[1])[None, :] < p[:, None])
    excess = jnp.where(kept, lam - n * penalty, jnp.inf)
    missing = jnp.sum(lam > 0, axis=1) - jnp.asarray(p)
    # One unit needs no room, whatever its α: ∞ times 0 would be NaN.
    need = separable.alphas * jnp.asarray(np.sqrt(np.maximum(p - 1, 0)), w.dtype)
    room = jnp.where(jnp.asarray(p > 1), 1 - need, 1.0)
    inside, outside = gate_margins(w, data, owners, blocks.members)
    margins = jnp.full(p.shape, jnp.inf, w.dtype).at[owners].min(jnp.minimum(inside, outside))
    margin = jnp.min(margins)

    own = jnp.asarray(blocks.members[:, None] == owners[None, :])
    g = jnp.mean(data - jnp.where(own, data @ w, 0.0) @ w.T, axis=0)
    rest = penalty - sigma * jnp.linalg.norm(g) / math.sqrt(2 * math.pi)
    checks = Checks(
        negative_cosines=_above(-separable.beta),
        few_clusters=_at_least((rank + 1 - p.size).astype(w.dtype)),
        rank=_at_least(jnp.min(missing).astype(w.dtype)),
        penalty=_above(jnp.min(excess)),
        spread=_above(jnp.min(room)),
        own_gates=_above(jnp.min(inside)),
        other_gates=_above(jnp.min(outside)),
        zero_columns=_at_least(jnp.where(rank < d, rest, jnp.inf) if extra else jnp.full_like(margin, jnp.inf)),
    )
    size = jnp.where(sigma > 0, margin / jnp.where(sigma > 0, sigma, 1.0), jnp.where(margin > 0, jnp.inf, -jnp.inf))
    # A direction without energy is lost too, even where nothing is penalized.
    return Conditions(separable, checks, margins, margin, size * jnp.abs(size), jnp.sum((excess <= 0) & kept))


def all_hold(conditions: Conditions) -> Bool[Array, ""]:
    """Whether every inequality holds, so that the closed form is a local minimizer up to the theorem's remainder."""
    return jnp.all(jnp.stack([check.holds for check in conditions.checks]))


def rows(conditions: Conditions) -> list[Row]:
    """The inequalities as a table, in the order of :class:`Checks`; for concrete values, else ``ValueError``."""
    if not is_concrete(conditions):
        raise ValueError("conditions must be concrete to be put in words; call rows outside jit.")
    return [
        Row(name, bool(check.holds), float(check.slack), _explain(name, conditions))
        for name, check in conditions.checks._asdict().items()
    ]


def _above(slack: Float[Array, ""]) -> Check:
    return Check(slack > 0, slack)


def _at_least(slack: Float[Array, ""]) -> Check:
    return Check(slack >= 0, slack)


def _explain(name: str, conditions: Conditions) -> str:
    clusters, slack = conditions.margins.size, float(getattr(conditions.checks, name).slack)
    alpha, beta = float(conditions.separability.alpha), float(conditions.separability.beta)
    return {
        "negative_cosines": f"beta = {beta:.3g}, the largest cosine between two cluster means, must be below 0",
        "few_clusters": f"{clusters} clusters; only rank + 1 = {clusters + slack:.0f} can have negative cosines",
        "rank": "a block needs as many independent samples as it has units",
        "penalty": f"n lambda must stay below every kept eigenvalue; {int(conditions.clipped)} have q clipped at 0",
        "spread": f"alpha_k sqrt(p_k - 1) must stay below 1 in every cluster; alpha = {alpha:.3g}",
        "own_gates": "preactivations on a unit's own cluster, over its norm, must be positive",
        "other_gates": "preactivations on other clusters, over the unit's norm, must be negative",
        "zero_columns": "no zero column, or no direction orthogonal to the data: nothing can grow there"
        if math.isinf(slack)
        else "lambda must reach sigma |g|/sqrt(2 pi), or zero columns grow into a bias along the mean residual g",
    }[name]
