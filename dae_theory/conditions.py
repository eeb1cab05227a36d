r"""When the block minimizer is a local minimizer: separability and the inequalities of Theorem 3.1.

Clusters ``X = [X_1 .. X_M]`` with means x̄_k are (α, β)-separable :cite:`zhang26`, Definition 3.1, if

.. math:: \|x_{kj} - \bar x_k\| \le \alpha \|\bar x_k\|, \quad \cos(\bar x_k, \bar x_l) \le \beta \quad (k \ne l)

The theorem asks for β < 0 and a small α. Those suffice only for blocks of one unit: the proof needs every unit to be on
for all samples of its own cluster and off for all others, so the units are constructed and their margins measured. An
inequality that fails is not an error: each one is reported with its slack, positive where it holds and negative by how
much it fails.

Samples are rows, ``data`` is (n, d). Everything is jittable over data, σ and λ, with labels and ranks closed over.
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
from dae_theory.zero_columns import main_term_slack

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
    """The smallest α and β for which clusters are separable, with the values per cluster; a pytree."""

    alpha: Float[Array, ""]
    """Largest relative spread, >= 0; infinite if a cluster's mean is zero."""
    beta: Float[Array, ""]
    """Largest cosine between two means, in [-1, 1]; -1 if there is only one cluster."""
    alphas: Float[Array, " K"]
    """Relative spread of each cluster, in order of label."""
    betas: Float[Array, " K"]
    """Largest cosine between each mean and any other."""
    means: Float[Array, "K d"]
    """Cluster means x̄_k."""


class Check(NamedTuple):
    """One inequality: whether it holds, and by how much."""

    holds: Bool[Array, ""]
    slack: Float[Array, ""]
    """Distance to equality; infinite where the inequality is vacuous."""


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
    r"""α_k √(p_k - 1) < 1 for all k; otherwise the other directions can outweigh the leading one, which units share.
    Slack: the smallest 1 - α_k √(p_k - 1)."""
    own_gates: Check
    r"""Preactivations are positive on a unit's own cluster. Slack: the smallest one divided by ‖w‖."""
    other_gates: Check
    r"""Preactivations are negative on all other clusters. Slack: minus the largest one divided by ‖w‖."""
    zero_columns: Check
    r"""``max ‖g(a)‖ <= λ`` for zero columns in addition to the blocks, with g of :mod:`dae_theory.zero_columns`. Slack:
    the difference; 0 where only directions along live units, whose growth merely splits those units, reach λ. The
    maximum is that of a search, so a negative slack is a proof and a nonnegative one is not."""


class Conditions(NamedTuple):
    """The conditions of Theorem 3.1 on data, labels, σ, λ and ranks, and whether they hold; a pytree."""

    separability: Separability
    checks: Checks
    margins: Float[Array, " K"]
    """Margin of each block: smallest distance of a sample from the hyperplane of a unit's gate; infinite if the block
    has no live units."""
    margin: Float[Array, ""]
    """γ, the smallest margin, in the units of the data. The noise level σ must be well below it."""
    exponent: Float[Array, ""]
    """γ²/σ² with the sign of γ. The theorem's remainder is ``‖R‖² <= C exp(-c γ²/σ²)`` for some constants c, C."""
    clipped: Int[Array, ""]
    """Number of kept directions with q clipped at 0."""


class Row(NamedTuple):
    """One inequality in numbers and words, for tables."""

    name: str
    holds: bool
    slack: float
    explanation: str


@full_precision
def separability(data: Float[Array, "n d"], labels: Labels) -> Separability:
    r"""The smallest constants of Definition 3.1 :cite:`zhang26`.

    .. math:: \alpha = \max_{k, j} \frac{\|x_{kj} - \bar x_k\|}{\|\bar x_k\|}, \quad
              \beta = \max_{k \ne l} \cos(\bar x_k, \bar x_l)

    A zero mean has α = ∞ and cosine 0 with everything. β < 0 implies M <= rank + 1 and β >= -1/(M - 1) (derived here
    from ``‖Σ_k x̄_k/‖x̄_k‖‖² >= 0``). Raises ``ValueError`` for bad data or labels.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.1], [2.0, -0.1], [-1.0, 0.0]])
        >>> clusters = separability(data, [0, 0, 1])
        >>> round(float(clusters.alpha), 3), round(float(clusters.beta), 3)
        (0.05, -1.0)
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
    nonempty = counts > 0
    sums = jax.ops.segment_sum(rows * copies[:, None], members, num_blocks)
    means = sums / jnp.where(nonempty, counts, 1.0)[:, None]
    norms = jnp.linalg.norm(means, axis=-1)
    distance = jnp.where(copies > 0, jnp.linalg.norm(rows - means[members], axis=-1), 0.0)
    spread = jax.ops.segment_max(distance, members, num_blocks)
    alphas = jnp.where(nonempty, jnp.where(norms > 0, spread / jnp.where(norms > 0, norms, 1.0), jnp.inf), 0.0)
    directions = means / jnp.where(norms > 0, norms, 1.0)[:, None]

    def largest_cosine(k):
        others = nonempty & nonempty[k] & (jnp.arange(num_blocks) != k)
        return jnp.max(jnp.where(others, directions @ directions[k], -1.0))

    # Row by row, because a K x K matrix would outgrow the data when every sample is its own cluster.
    betas = jax.lax.map(largest_cosine, jnp.arange(num_blocks), batch_size=min(num_blocks, 256))
    return Separability(jnp.max(alphas), jnp.max(betas), alphas, betas, means)


@full_precision
def gate_margins(
    w: Float[Array, "d p"], data: Float[Array, "n d"], owners: np.ndarray, members: np.ndarray
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    r"""Distances of the data from the hyperplanes of the units' gates, positive on the correct side.

    .. math:: \min_{i \in k(j)} \frac{w_j^\top x_i}{\|w_j\|}, \qquad -\max_{i \notin k(j)} \frac{w_j^\top x_i}{\|w_j\|}

    for unit j of block ``owners[j]`` and samples i of block ``members[i]``; infinite if there is no such sample, and
    for w_j = 0.
    """
    norms = jnp.linalg.norm(w, axis=0)
    distance = data @ (w / jnp.where(norms > 0, norms, 1.0)[None, :])
    in_block = jnp.asarray(members[:, None] == owners[None, :])
    inside = jnp.min(jnp.where(in_block, distance, jnp.inf), axis=0)
    outside = jnp.min(jnp.where(in_block, jnp.inf, -distance), axis=0)
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
    r"""Check every inequality of Theorem 3.1 :cite:`zhang26` at the closed form of :func:`block_minimizer`.

    Zero columns in addition to the blocks can be unstable (derived here): a unit ``w₁ = δa, w₂ = -δ g(a)/‖g(a)‖``
    changes the objective by ``2δ² (λ - ‖g(a)‖)``, with g of :func:`dae_theory.zero_columns.main_term_correlation`. A
    direction a orthogonal to a few samples, on whose rows the unit acts as a bias, can suffice. The largest ‖g‖ is
    sought from the rows and from directions orthogonal to all, one or two of them
    (:func:`dae_theory.zero_columns.main_term_slack`); :func:`dae_theory.dead_units.dead_direction` searches with the
    exact g of any network.

    Raises ``ValueError`` for input that :func:`block_minimizer` rejects, and for a ``width`` below the number of units.

    Args:
        data: Samples as rows, shape (n, d).
        labels: One integer per row; rows with the same label form a cluster. Concrete.
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0.
        ranks: Units p_k of each cluster in order of label, or one number for all; p_k <= min(n_k, d). Concrete.
        width: Number of columns p, zero columns included; by default there are no zero columns.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.1], [2.0, -0.1], [-1.0, 0.0]])
        >>> conditions = check_conditions(data, [0, 0, 1], sigma=0.1, penalty=1e-3, ranks=1)
        >>> round(float(conditions.margin), 3)  # γ, ten times the noise level
        1.0
        >>> [name for name, check in conditions.checks._asdict().items() if not check.holds]
        []
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
    is_kept = jnp.asarray(np.arange(lam.shape[1])[None, :] < p[:, None])
    excess = jnp.where(is_kept, lam - n * penalty, jnp.inf)
    spare_rank = jnp.sum(lam > 0, axis=1) - jnp.asarray(p)
    # A block of one unit may have any α: ∞ times 0 would be NaN.
    spread = separable.alphas * jnp.asarray(np.sqrt(np.maximum(p - 1, 0)), w.dtype)
    spread_slack = jnp.where(jnp.asarray(p > 1), 1 - spread, 1.0)
    inside, outside = gate_margins(w, data, owners, blocks.members)
    margins = jnp.full(p.shape, jnp.inf, w.dtype).at[owners].min(jnp.minimum(inside, outside))
    margin = jnp.min(margins)

    in_block = jnp.asarray(blocks.members[:, None] == owners[None, :])
    zero_slack = main_term_slack(w, data, in_block, sigma, penalty) if extra else jnp.full_like(margin, jnp.inf)
    checks = Checks(
        negative_cosines=_above(-separable.beta),
        few_clusters=_at_least((rank + 1 - p.size).astype(w.dtype)),
        rank=_at_least(jnp.min(spare_rank).astype(w.dtype)),
        penalty=_above(jnp.min(excess)),
        spread=_above(jnp.min(spread_slack)),
        own_gates=_above(jnp.min(inside)),
        other_gates=_above(jnp.min(outside)),
        zero_columns=_at_least(zero_slack),
    )
    ratio = jnp.where(sigma > 0, margin / jnp.where(sigma > 0, sigma, 1.0), jnp.where(margin > 0, jnp.inf, -jnp.inf))
    # Directions without energy count as clipped too, even at λ = 0.
    return Conditions(separable, checks, margins, margin, ratio * jnp.abs(ratio), jnp.sum((excess <= 0) & is_kept))


def all_hold(conditions: Conditions) -> Bool[Array, ""]:
    """Whether every inequality holds, so that the closed form is stationary up to the theorem's remainder.

    With one unit per block it is then a local minimizer up to that remainder, as far as the search of ``zero_columns``
    went. With more units per block it need not be: the objective is flat along turns of a block's orthogonal factor O
    up to the noise that crosses gates, and has a minimum only where that repels the gates from the nearest samples
    (:func:`dae_theory.factors.best_factors`; :func:`dae_theory.certificate.certify` tells what it does at a network).
    """
    return jnp.all(jnp.stack([check.holds for check in conditions.checks]))


def rows(conditions: Conditions) -> list[Row]:
    """The inequalities as table rows, in the order of :class:`Checks`; raises ``ValueError`` for traced values."""
    if not is_concrete(conditions):
        raise ValueError("conditions must be concrete to be formatted; call rows outside jit.")
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
        "few_clusters": f"{clusters} clusters; at most rank + 1 = {clusters + slack:.0f} can have negative cosines",
        "rank": "a block needs as many independent samples as it has units",
        "penalty": f"n lambda must stay below every kept eigenvalue; {int(conditions.clipped)} have q clipped at 0",
        "spread": f"alpha_k sqrt(p_k - 1) must stay below 1 in every cluster; alpha = {alpha:.3g}",
        "own_gates": "preactivations on a unit's own cluster, divided by its norm, must be positive",
        "other_gates": "preactivations on other clusters, divided by the unit's norm, must be negative",
        "zero_columns": "there is no zero column: the condition is vacuous"
        if math.isinf(slack)
        else "zero columns grow: for some direction a, |g(a)| exceeds lambda"
        if slack < 0
        else "no direction a with |g(a)| above lambda, in which a zero column would grow, was found",
    }[name]
