r"""Which block structure has the lowest energy, among partitions of the samples; derived here.

A structure is a partition of the samples into blocks and a number of units for each. For a fixed partition the best
ranks follow from the gains (:func:`dae_theory.energies.allocate_ranks`). The partition is searched for, among named
candidates or, for few samples, among all partitions. An energy is the objective up to the theorem's remainder only if
the constructed units have positive margins, so every structure comes with its margin.

These functions take concrete data and cannot be jitted. Samples are rows; equal rows count as one sample with several
copies, because no gate can distinguish them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_level, is_concrete
from dae_theory.energies import Energy, allocate_ranks, best_energy, direction_gain, spectral_energy
from dae_theory.minimizers import block_units, orthogonal_factor, shrinkage
from dae_theory.precision import full_precision
from dae_theory.spectra import (
    Labels,
    Multiplicity,
    block_copies,
    check_multiplicity,
    direction_spectra,
    distinct_rows,
    gram_axes,
    masked_spectra,
    partition,
    span_coordinates,
)
from dae_theory.types import Scalar

__all__ = ["Structure", "best_structure", "compare_structures"]


class Structure(NamedTuple):
    """A candidate partition with its best ranks, its energy, and whether the energy is accurate."""

    name: str
    """Name of the candidate, as listed in :func:`compare_structures`."""
    energy: float
    """Objective of the main term, penalty included."""
    risk: float
    """Risk of the main term, without the penalty."""
    labels: np.ndarray
    """Block of each row of the data, shape (n,), numbered from 0."""
    ranks: tuple[int, ...]
    """Units of each block in order of label, as ``block_minimizer`` takes them."""
    margin: float
    """Smallest distance of the data from a gate of the constructed units; infinite if there are no units."""
    holds: bool
    """Whether the margin is positive, so that the energy equals the objective up to the theorem's remainder."""
    search: str
    """What the search compared."""


def compare_structures(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    width: int,
    *,
    multiplicity: Multiplicity = None,
    exhaustive_limit: int = 8,
) -> tuple[Structure, ...]:
    """Candidate structures with ``width`` units, sorted: positive margins first, then by ascending energy.

    The candidates are

    * ``single samples``: every sample is a block;
    * ``given clusters``: the blocks of ``labels``;
    * ``duplicates apart``: the given clusters, with each repeated sample moved to a block of its own;
    * ``samples split off``: from the better of these two clusterings, single samples are moved to blocks of their own,
      one at a time, always the one that lowers the energy most, until none lowers it. Only samples whose own unit is
      off on all other samples qualify, because for others the energy would not be the objective. One step solves an
      eigenvalue problem of size min(n, d) per qualifying sample;
    * ``every partition``: the best of all partitions, for at most ``exhaustive_limit`` distinct samples, if it is none
      of the above. The number of partitions grows like the Bell numbers.

    Raises ``ValueError`` for bad input, equal rows with different labels, and traced values.

    Args:
        data: Samples as rows, shape (n, d).
        labels: One integer per row; rows with the same label form a given cluster.
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0.
        width: Number of units p >= 1 available to all blocks together.
        multiplicity: Copies that each row stands for, shape (n,), positive integers; one each by default.
        exhaustive_limit: Largest number of distinct samples for which all partitions are compared.
    """
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    check_integer("width", width, minimum=1)
    check_integer("exhaustive_limit", exhaustive_limit, minimum=0)
    if not is_concrete(data, sigma, penalty):
        raise ValueError("data, sigma and penalty must be concrete; call this outside jit, grad and vmap.")
    times = check_multiplicity(multiplicity, data.shape[0])
    distinct, members, inverse = distinct_rows(data, partition(labels, data.shape[0]).members)
    counts = np.bincount(inverse, weights=times)
    exhaustive = counts.size <= exhaustive_limit
    named = "the named candidates"
    search = f"every partition of {counts.size} samples and {named}" if exhaustive else named

    rows, copies = span_coordinates(distinct), jnp.asarray(counts, data.dtype)
    singleton_margins = np.asarray(_singleton_margins(rows))

    def structure(name, blocks, singleton):
        # `blocks` numbers the block of each distinct row; a row marked in `singleton` is a block of its own instead.
        num_blocks = int(blocks.max()) + 1
        energy, ranks, q, axes, means = _solve(
            rows, jnp.asarray(blocks), copies, jnp.asarray(singleton), sigma, penalty, width, num_blocks=num_blocks
        )
        ranks = np.asarray(ranks)
        block_ranks, singleton_ranks = np.split(ranks, [num_blocks])
        in_block = (blocks[None, :] == np.arange(num_blocks)[:, None]) & ~singleton[None, :]
        block_margins = _block_margins(rows, jnp.asarray(in_block), q, axes, means, block_ranks, width)
        margin = float(min(block_margins.min(), singleton_margins[singleton_ranks > 0].min(initial=np.inf)))
        # Numbers in the order of `ranks`, blocks and then singletons, of which only those with rows remain.
        sparse_labels = np.where(singleton, num_blocks + np.arange(singleton.size), blocks)
        present, dense_labels = np.unique(sparse_labels, return_inverse=True)
        present_ranks = tuple(int(rank) for rank in ranks[present])
        objective, risk = float(energy.objective), float(energy.risk)
        return Structure(name, objective, risk, dense_labels[inverse], present_ranks, margin, margin > 0, search)

    no_row, repeated = np.zeros(counts.shape, bool), counts > 1
    clusters, apart = structure("given clusters", members, no_row), structure("duplicates apart", members, repeated)
    candidates = [structure("single samples", members, ~no_row), clusters, *([apart] if repeated.any() else [])]
    start = repeated if _sort_key(apart) < _sort_key(clusters) else no_row
    splittable = np.flatnonzero((singleton_margins > 0) & ~start)
    if splittable.size:
        singleton = _split_greedily(
            rows,
            jnp.asarray(members),
            copies,
            jnp.asarray(start),
            jnp.asarray(splittable),
            sigma,
            penalty,
            width,
            num_blocks=int(members.max()) + 1,
        )
        if np.any(np.asarray(singleton) != start):
            candidates.append(structure("samples split off", members, np.asarray(singleton)))
    if exhaustive:
        found = structure("every partition", _search_partitions(rows, copies, sigma, penalty, width), no_row)
        # A partition that is there already has the same energy, but for rounding, which must not choose its name.
        candidates += [] if any(_same_blocks(found, each) for each in candidates) else [found]
    return tuple(sorted(candidates, key=_sort_key))


def best_structure(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    width: int,
    *,
    multiplicity: Multiplicity = None,
    exhaustive_limit: int = 8,
) -> Structure:
    """The first entry of :func:`compare_structures`: of lowest energy among the structures with positive margins.

    If no margin is positive, the structure of lowest energy; its ``holds`` is then false.

    Args:
        data, labels, sigma, penalty, width, multiplicity, exhaustive_limit: As in :func:`compare_structures`, which
            raises the same errors.
    """
    return compare_structures(
        data, labels, sigma, penalty, width, multiplicity=multiplicity, exhaustive_limit=exhaustive_limit
    )[0]


def _same_blocks(first: Structure, second: Structure) -> bool:
    pairs = {*zip(first.labels.tolist(), second.labels.tolist(), strict=True)}
    return len(pairs) == len({*first.labels.tolist()}) == len({*second.labels.tolist()})


def _sort_key(structure: Structure) -> tuple[bool, float]:
    return not structure.holds, structure.energy


@jax.jit
@full_precision
def _singleton_margins(rows: Float[Array, "m r"]) -> Float[Array, " m"]:
    """Margin of a unit along each row: the row's length, or less if another row is closer to the gate."""
    norms = jnp.linalg.norm(rows, axis=1)

    def margin(i):
        distance = rows @ (rows[i] / jnp.where(norms[i] > 0, norms[i], 1.0))
        return jnp.min(jnp.where(jnp.arange(norms.size) == i, distance, -distance))

    return jax.lax.map(margin, jnp.arange(norms.size), batch_size=min(norms.size, 256))


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _solve(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, " m"],
    singleton: Bool[Array, " m"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> tuple[Energy, Int[Array, " blocks_and_rows"], Float[Array, "K r"], Float[Array, "K r r"], Float[Array, "K r"]]:
    """Solve for the best ranks of blocks whose rows in ``singleton`` are blocks of their own instead.

    Args:
        rows: Distinct samples.
        members: Block of each row, 0..K-1.
        copies: Copies of each row, at least 0.
        singleton: Whether each row is a block of its own.
        sigma: Noise level σ >= 0.
        penalty: λ >= 0.
        width: Number of units p >= 1.
        num_blocks: K.

    Returns:
        The energy; the ranks of the K blocks followed by those of the m singletons; and the blocks' gains, axes (as
        columns) and sums of rows.
    """
    copies_in_block = block_copies(members, jnp.where(singleton, 0.0, copies), num_blocks)
    moments, counts, axes = masked_spectra(rows, copies_in_block)
    spectra = direction_spectra(moments, counts, rows, jnp.where(singleton, copies, 0.0))
    is_kept = allocate_ranks(spectra, sigma, penalty, width)
    block_ranks = jnp.sum(is_kept[: moments.size].reshape(moments.shape), axis=1)
    ranks = jnp.concatenate([block_ranks, is_kept[moments.size :]])
    q = shrinkage(moments, (counts / jnp.sum(copies))[:, None], sigma, penalty)
    return spectral_energy(spectra, sigma, penalty, is_kept), ranks, q, axes, copies_in_block @ rows


def _block_margins(
    rows: Float[Array, "m r"],
    in_block: Bool[Array, "K m"],
    q: Float[Array, "K r"],
    axes: Float[Array, "K r r"],
    means: Float[Array, "K r"],
    ranks: np.ndarray,
    width: int,
) -> np.ndarray:
    """Margin of each block: the smallest over its units, infinite if it has none.

    Args:
        rows: Distinct samples.
        in_block: Whether each row belongs to each block.
        q: Gains of the blocks' axes.
        axes: Axes of each block, as columns.
        means: Mean or sum of each block's rows.
        ranks: Units of each block, shape (K,).
        width: Number of units p >= 1.
    """
    size = min(width, rows.shape[1])
    # Padded to one shape: zero rows of a factor are units that do not exist.
    factors = np.zeros((ranks.size, size, size))
    for k, p in enumerate(ranks):
        if p:
            factors[k, :p, :p] = orthogonal_factor(int(p))
    return np.asarray(_margins(rows, in_block, q[:, :size], axes[:, :, :size], means, jnp.asarray(factors, rows.dtype)))


@jax.jit
@full_precision
def _margins(
    rows: Float[Array, "m r"],
    in_block: Bool[Array, "K m"],
    q: Float[Array, "K P"],
    axes: Float[Array, "K r P"],
    means: Float[Array, "K r"],
    factors: Float[Array, "K P P"],
) -> Float[Array, " K"]:
    """:func:`_block_margins` with the blocks' orthogonal factors given.

    Args:
        rows, in_block, q, axes, means: As in :func:`_block_margins`, restricted to P axes.
        factors: Orthogonal factors, padded with zeros to the size P.
    """

    def margin(block):
        in_block, q, axes, mean, factor = block
        w = block_units(q, axes, mean, factor)
        norms = jnp.linalg.norm(w, axis=0)
        live = norms > 0
        distance = rows @ (w / jnp.where(live, norms, 1.0)[None, :])
        return jnp.min(jnp.where(live[None, :], jnp.where(in_block[:, None], distance, -distance), jnp.inf))

    return jax.lax.map(margin, (in_block, q, axes, means, factors))


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _split_greedily(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, " m"],
    singleton: Bool[Array, " m"],
    splittable: Int[Array, " f"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> Bool[Array, " m"]:
    """Make rows singletons one at a time, always the one that lowers the energy most, until none lowers it.

    Args:
        rows: Distinct samples.
        members: Block of each row, 0..K-1.
        copies: Copies of each row, at least 0.
        singleton: Whether each row is a block of its own at the start.
        splittable: Indices of the rows that may become singletons.
        sigma: Noise level σ >= 0.
        penalty: λ >= 0.
        width: Number of units p >= 1.
        num_blocks: K.

    Returns:
        Whether each row is a block of its own at the end.
    """

    def block_spectra(singleton):
        copies_in_block = block_copies(members, jnp.where(singleton, 0.0, copies), num_blocks)
        moments, counts, _ = masked_spectra(rows, copies_in_block)
        return moments, counts

    def energy(moments, counts, singleton):
        spectra = direction_spectra(moments, counts, rows, jnp.where(singleton, copies, 0.0))
        return best_energy(spectra, sigma, penalty, width).objective

    def step(state):
        singleton, lowest, _ = state
        moments, counts = block_spectra(singleton)

        def energy_after_splitting(i):
            k = members[i]
            rest = jnp.where((members == k) & ~singleton & (jnp.arange(copies.size) != i), copies, 0.0)
            rest_moments, _ = gram_axes((rows * rest[:, None]).T @ rows, jnp.sum(rest))
            after = energy(moments.at[k].set(rest_moments), counts.at[k].set(jnp.sum(rest)), singleton.at[i].set(True))
            # Splitting a block of one row changes the energy by rounding only.
            return jnp.where(singleton[i] | (jnp.sum(rest) == 0), jnp.inf, after)

        energies = jax.lax.map(energy_after_splitting, splittable)
        best = jnp.argmin(energies)
        improves = energies[best] < lowest
        i = splittable[best]
        return singleton.at[i].set(singleton[i] | improves), jnp.where(improves, energies[best], lowest), improves

    start = (singleton, energy(*block_spectra(singleton), singleton), jnp.asarray(True))
    return jax.lax.while_loop(lambda state: state[2], step, start)[0]


def _search_partitions(
    rows: Float[Array, "m r"], copies: Float[Array, " m"], sigma: Scalar, penalty: Scalar, width: int
) -> np.ndarray:
    """Labels of the partition of lowest energy among those with positive margins, or among all if there are none.

    A block's gains and margins depend on the block alone, so they are tabulated once for every subset of the rows.
    """
    m, r = rows.shape
    in_block = jnp.asarray((np.arange(1, 2**m)[:, None] >> np.arange(m)[None, :] & 1).astype(bool))
    copies_in_block = jnp.where(in_block, copies[None, :], 0.0)
    moments, counts, axes = masked_spectra(rows, copies_in_block)
    weights = (counts / jnp.sum(copies))[:, None]
    q, gains = shrinkage(moments, weights, sigma, penalty), np.asarray(direction_gain(moments, weights, sigma, penalty))
    margins = [
        _block_margins(rows, in_block, q, axes, copies_in_block @ rows, np.full(counts.size, p), width)
        for p in range(min(width, r) + 1)
    ]

    best_score, best_labels = (False, -np.inf), np.zeros(m, int)
    for labels in _partitions(m):
        blocks = np.bincount(labels, weights=2.0 ** np.arange(m)).astype(int) - 1
        block_gains = gains[blocks].reshape(-1)
        largest = np.argsort(-block_gains, kind="stable")[:width]
        largest = largest[block_gains[largest] > 0]
        ranks = np.bincount(largest // r, minlength=blocks.size)
        holds = all(margins[p][block] > 0 for p, block in zip(ranks, blocks, strict=True))
        score = (holds, float(np.sum(block_gains[largest])))
        if score > best_score:
            best_score, best_labels = score, labels
    return best_labels


def _partitions(size: int) -> Iterator[np.ndarray]:
    """Every partition once, as labels that number blocks in order of appearance; the one-block partition first."""

    def extend(labels, blocks):
        if len(labels) == size:
            yield np.asarray(labels)
            return
        for label in range(blocks + 1):
            yield from extend([*labels, label], max(blocks, label + 1))

    yield from extend([], 0)
