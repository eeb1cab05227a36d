r"""The predicted boundary between memorizing and generalizing, from energies alone; derived here.

With p units and n samples the memorizing structure takes the p largest gains of single samples, the generalizing one
the p largest gains of the clusters' directions, and the hybrid one gives repeated samples units of their own beside the
clusters (:cite:`zhang26`, Corollary 3.4). Their objectives, :mod:`dae_theory.energies`, are functions of n, σ, λ, p and
the numbers of copies; memorizing ends where its objective rises above another.

Samples are rows. The boundary jits over σ, λ and width, and ``jax.vmap`` over those draws it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_nonnegative, is_concrete
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
    """Predicted objectives of three regimes as rows are added, and where memorizing stops; a pytree."""

    num_samples: Float[Array, " s"]
    """n at each size, copies counted."""
    memorizing: Float[Array, " s"]
    """Objective with every distinct sample a block of its own."""
    generalizing: Float[Array, " s"]
    """Objective with the given clusters."""
    hybrid: Float[Array, " s"]
    """Objective with samples of several copies apart from the clusters; the generalizing one if there are none."""
    sample_beta: Float[Array, " s"]
    """Largest cosine between distinct samples: the memorizing objective can be trusted where it is below 0."""
    cluster_beta: Float[Array, " s"]
    """Largest cosine between cluster means: below 0 in the theorem."""
    cluster_alpha: Float[Array, " s"]
    """Largest relative spread of a cluster."""
    separable: Bool[Array, " s"]
    r"""Whether both betas are below 0 and ``α_k √(p_k - 1) < 1``: the prediction's assumption."""
    lower: Float[Array, ""]
    """Largest n before the crossing; 0 if memorizing does not even win at the first size."""
    upper: Float[Array, ""]
    """First n at which memorizing does not win; infinite if it always does."""
    crossing: Float[Array, ""]
    """The boundary in n, interpolated between the two; 0 or infinite where one of them is."""


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

    At each of the increasing ``sizes`` the data are the first so many rows (shuffle them first), row i counted
    ``multiplicity[i]`` times; ``labels`` are the clusters of the generalizing structure. The prediction is exact up to
    the theorem's remainder where ``separable`` is true; elsewhere it compares formulas.

    ``data``, ``labels`` and ``multiplicity`` are concrete; σ, λ >= 0 and ``width`` p >= 1 may be traced. ``ValueError``
    for bad input, sizes that do not increase within 1..n, and equal rows with different labels.
    """
    check_data(data)
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)
    if is_concrete(width):
        check_integer("width", width, minimum=1)
    if not is_concrete(data):
        raise ValueError("data must be concrete: equal rows are found by value; close over them instead of tracing.")
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

    def regime(alone: Bool[Array, "s m"]) -> tuple[Float[Array, " s"], Int[Array, "s K"]]:
        return _objectives(coordinates, owners, copies, alone, sigma, penalty, width, num_blocks=blocks)

    memorizing, _ = regime(jnp.ones_like(repeated))
    generalizing, ranks = regime(jnp.zeros_like(repeated))
    hybrid, _ = regime(repeated)
    clusters = jax.lax.map(lambda c: masked_separability(coordinates, owners, c, blocks), copies)
    each = jnp.arange(rows.shape[0])
    samples = jax.lax.map(lambda c: masked_separability(coordinates, each, c, rows.shape[0]), copies)
    need = clusters.alphas * jnp.sqrt(jnp.maximum(ranks - 1, 0).astype(data.dtype))
    # One unit needs no room, whatever its α: ∞ times 0 would be NaN.
    room = jnp.all((ranks <= 1) | (need < 1), axis=1)
    return Boundary(
        totals,
        memorizing,
        generalizing,
        hybrid,
        samples.beta,
        clusters.beta,
        clusters.alpha,
        (samples.beta < 0) & (clusters.beta < 0) & room,
        *_crossing(totals, memorizing - jnp.minimum(generalizing, hybrid)),
    )


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _objectives(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, "s m"],
    alone: Bool[Array, "s m"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> tuple[Float[Array, " s"], Int[Array, "s K"]]:
    """At each size the least objective with the rows ``alone`` apart from their blocks, and the blocks' ranks."""

    def at_size(size: tuple[Float[Array, " m"], Bool[Array, " m"]]) -> tuple[Float[Array, ""], Int[Array, " K"]]:
        times, apart = size
        moments, counts, _ = masked_spectra(rows, block_copies(members, jnp.where(apart, 0.0, times), num_blocks))
        spectra = direction_spectra(moments, counts, rows, jnp.where(apart, times, 0.0))
        kept = allocate_ranks(spectra, sigma, penalty, width)
        ranks = jnp.sum(kept[: moments.size].reshape(moments.shape), axis=1)
        return spectral_energy(spectra, sigma, penalty, kept).objective, ranks

    return jax.lax.map(at_size, (copies, alone))


def _crossing(
    sizes: Float[Array, " s"], excess: Float[Array, " s"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The last size before ``excess`` turns positive, the first after, and the zero of the chord between them."""
    crossed = jnp.any(excess > 0)
    after = jnp.argmax(excess > 0)
    before = jnp.maximum(after - 1, 0)
    lower = jnp.where(crossed, jnp.where(after > 0, sizes[before], 0.0), sizes[-1])
    upper = jnp.where(crossed, sizes[after], jnp.inf)
    rise = excess[after] - excess[before]
    share = -excess[before] / jnp.where(rise > 0, rise, 1.0)
    inner = sizes[before] + share * (sizes[after] - sizes[before])
    return lower, upper, jnp.where(crossed, jnp.where(after > 0, inner, 0.0), jnp.inf)
