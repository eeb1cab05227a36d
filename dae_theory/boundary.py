r"""The boundary between memorization and generalization, predicted from energies alone; derived here.

With p units and n samples, the memorizing structure spends them on the p largest gains of single samples, the
generalizing structure on the p largest gains of the clusters' directions, and the hybrid structure gives repeated
samples blocks of their own beside the clusters (:cite:`zhang26`, Corollary 3.4). Their objectives
(:mod:`dae_theory.energies`) are functions of n, σ, λ, p and the numbers of copies. Memorization ends where its
objective rises above one of the other two.

Samples are rows. The boundary is jittable over σ, λ and the width; ``jax.vmap`` over those traces out a phase diagram.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_level, is_concrete
from dae_theory.conditions import masked_separability
from dae_theory.energies import allocate_ranks, spectral_energy
from dae_theory.precision import full_precision
from dae_theory.spectra import (
    Labels,
    Multiplicity,
    block_copies,
    check_multiplicity,
    direction_spectra,
    distinct_rows,
    masked_spectra,
    partition,
    span_coordinates,
)
from dae_theory.types import Scalar

__all__ = ["Boundary", "predicted_boundary"]


class Boundary(NamedTuple):
    """Predicted objectives of three structures as rows are added, and the n at which memorization ends; a pytree."""

    num_samples: Float[Array, " s"]
    """n at each size, counting copies."""
    memorizing: Float[Array, " s"]
    """Objective when every distinct sample is a block."""
    generalizing: Float[Array, " s"]
    """Objective when the given clusters are the blocks."""
    hybrid: Float[Array, " s"]
    """Objective when samples with several copies are blocks beside the clusters; equals ``generalizing`` if there are
    none."""
    sample_beta: Float[Array, " s"]
    """Largest cosine between distinct samples. The memorizing objective is accurate where this is below 0."""
    cluster_beta: Float[Array, " s"]
    """Largest cosine between cluster means, below 0 in the theorem."""
    cluster_alpha: Float[Array, " s"]
    """Largest relative spread of a cluster."""
    separable: Bool[Array, " s"]
    r"""Whether both cosines are below 0 and ``α_k √(p_k - 1) < 1`` for all k, which the prediction assumes."""
    lower: Float[Array, ""]
    """Largest n before the crossing; 0 if memorization loses at the first size already."""
    upper: Float[Array, ""]
    """First n at which memorization loses; infinite if it never does."""
    crossing: Float[Array, ""]
    """The boundary in n, interpolated between ``lower`` and ``upper``; 0 or infinite where one of them is."""


@full_precision
def predicted_boundary(
    data: Float[Array, "n d"],
    labels: Labels,
    sizes: Sequence[int] | np.ndarray,
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    multiplicity: Multiplicity = None,
) -> Boundary:
    r"""The n at which the memorizing objective first rises above the generalizing or the hybrid one.

    The prediction is exact up to the theorem's remainder where ``separable`` is true; elsewhere it only compares
    formulas. σ, λ and the width may be traced, the other arguments must be concrete. Raises ``ValueError`` for bad
    input, sizes that do not increase within 1..n, and equal rows with different labels.

    Args:
        data: Samples as rows in random order, shape (n, d).
        labels: Cluster of each row in the generalizing structure, n integers.
        sizes: Increasing numbers of rows: at each size the data set is that many of the first rows.
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0.
        width: Number of units p >= 1.
        multiplicity: Copies that each row stands for, shape (n,), positive integers; one each by default.
    """
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    if is_concrete(width):
        check_integer("width", width, minimum=1)
    if not is_concrete(data):
        raise ValueError("data must be concrete, because equal rows are merged; close over it instead of tracing.")
    n = data.shape[0]
    ends = [check_integer("sizes", size, minimum=1, maximum=n) for size in np.asarray(sizes)]
    if not ends or np.any(np.diff(ends) <= 0):
        raise ValueError(f"sizes must increase, got {ends}.")
    times = check_multiplicity(multiplicity, n)
    rows, members, inverse = distinct_rows(data, partition(labels, n).members)
    copies = np.stack([np.bincount(inverse[:end], weights=times[:end], minlength=rows.shape[0]) for end in ends])
    totals = jnp.asarray(copies.sum(axis=1), data.dtype)
    copies, repeated = jnp.asarray(copies, data.dtype), jnp.asarray(copies > 1)
    owners, blocks = jnp.asarray(members), int(members.max()) + 1
    coordinates = span_coordinates(rows)

    def objectives(singleton):
        return _objectives(coordinates, owners, copies, singleton, sigma, penalty, width, num_blocks=blocks)

    memorizing, _ = objectives(jnp.ones_like(repeated))
    generalizing, ranks = objectives(jnp.zeros_like(repeated))
    hybrid, _ = objectives(repeated)
    clusters = jax.lax.map(lambda c: masked_separability(coordinates, owners, c, blocks), copies)
    each = jnp.arange(rows.shape[0])
    samples = jax.lax.map(lambda c: masked_separability(coordinates, each, c, rows.shape[0]), copies)
    spread = clusters.alphas * jnp.sqrt(jnp.maximum(ranks - 1, 0).astype(data.dtype))
    # A block of one unit may have any α: ∞ times 0 would be NaN.
    narrow = jnp.all((ranks <= 1) | (spread < 1), axis=1)
    return Boundary(
        totals,
        memorizing,
        generalizing,
        hybrid,
        samples.beta,
        clusters.beta,
        clusters.alpha,
        (samples.beta < 0) & (clusters.beta < 0) & narrow,
        *_crossing(totals, memorizing - jnp.minimum(generalizing, hybrid)),
    )


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _objectives(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, "s m"],
    singleton: Bool[Array, "s m"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> tuple[Float[Array, " s"], Int[Array, "s K"]]:
    """At each size the lowest objective and the ranks of the blocks.

    Args:
        rows: Distinct samples.
        members: Block of each row, 0..K-1.
        copies: Copies of each row at each size, at least 0.
        singleton: Whether each row is a block of its own instead, at each size.
        sigma: Noise level σ >= 0.
        penalty: λ >= 0.
        width: Number of units p >= 1.
        num_blocks: K.
    """

    def at_size(size):
        copies, singleton = size
        moments, counts, _ = masked_spectra(rows, block_copies(members, jnp.where(singleton, 0.0, copies), num_blocks))
        spectra = direction_spectra(moments, counts, rows, jnp.where(singleton, copies, 0.0))
        is_kept = allocate_ranks(spectra, sigma, penalty, width)
        ranks = jnp.sum(is_kept[: moments.size].reshape(moments.shape), axis=1)
        return spectral_energy(spectra, sigma, penalty, is_kept).objective, ranks

    return jax.lax.map(at_size, (copies, singleton))


def _crossing(
    sizes: Float[Array, " s"], excess: Float[Array, " s"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The last size before ``excess`` turns positive, the first after it, and the zero of the chord between them."""
    crossed = jnp.any(excess > 0)
    after = jnp.argmax(excess > 0)
    before = jnp.maximum(after - 1, 0)
    lower = jnp.where(crossed, jnp.where(after > 0, sizes[before], 0.0), sizes[-1])
    upper = jnp.where(crossed, sizes[after], jnp.inf)
    rise = excess[after] - excess[before]
    fraction = -excess[before] / jnp.where(rise > 0, rise, 1.0)
    inner = sizes[before] + fraction * (sizes[after] - sizes[before])
    return lower, upper, jnp.where(crossed, jnp.where(after > 0, inner, 0.0), jnp.inf)
