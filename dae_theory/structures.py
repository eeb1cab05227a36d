r"""Which block structure wins: partitions of the samples compared by their energies; derived here.

A structure is a partition of the samples into blocks and a number of units for each. For a fixed partition the best
ranks follow from the gains (:func:`dae_theory.energies.allocate_ranks`); the partition itself is a search, over named
candidates or, for few samples, over every partition. Energies are exact up to the theorem's remainder only where the
constructed units keep their margins, so each comparison carries that check.

Drivers for concrete data, not to be jitted. Samples are rows; equal rows count as one sample with several copies,
because no gate can tell them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_nonnegative, is_concrete
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
    """A candidate partition with its best ranks, its energy, and whether the energy can be trusted."""

    name: str
    """Which candidate this is."""
    energy: float
    """Objective of the main term."""
    risk: float
    """Its part before the penalty."""
    labels: np.ndarray
    """Block of each row of the data, shape (n,), numbered from 0."""
    ranks: tuple[int, ...]
    """Units of each block, in order of label: what ``block_minimizer`` takes."""
    margin: float
    """Least distance of the data from a gate of the constructed units; infinite without units."""
    holds: bool
    """Whether that margin is positive, so that the energy is the objective up to the theorem's remainder."""
    search: str
    """What was compared to find it."""


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
    """Candidate structures with ``width`` units, those whose margins hold first, by rising energy.

    Candidates: ``single samples``; ``given clusters``, by ``labels``; ``duplicates apart``, the clusters with repeated
    samples as blocks of their own; ``samples split off``, from the better of these two clusterings one sample after
    another, each time the one that lowers the energy most, while it falls; and, for at most ``exhaustive_limit``
    distinct samples, ``every partition``. Only samples whose own unit is silent on all others are split off: for others
    the energy would promise what the gates cannot keep. One step costs an eigenvalue problem of size min(n, d) for each
    of them; the number of partitions grows like Bell's numbers.

    ``multiplicity`` (n,), positive integers, counts row i as so many copies. ``ValueError`` for bad input, for equal
    rows with different labels, and for traced values.
    """
    check_data(data)
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)
    check_integer("width", width, minimum=1)
    check_integer("exhaustive_limit", exhaustive_limit, minimum=0)
    if not is_concrete(data, sigma, penalty):
        raise ValueError("structures are searched for concrete values; call this outside jit, grad and vmap.")
    times = check_multiplicity(multiplicity, data.shape[0])
    distinct, members, inverse = distinct_rows(data, partition(labels, data.shape[0]).members)
    copies = np.bincount(inverse, weights=times)
    few = copies.size <= exhaustive_limit
    search = f"every partition of {copies.size} samples and the named candidates" if few else "the named candidates"

    rows, weights = span_coordinates(distinct), jnp.asarray(copies, data.dtype)
    lone = np.asarray(_sample_margins(rows))

    def structure(name: str, blocks: np.ndarray, alone: np.ndarray) -> Structure:
        count = int(blocks.max()) + 1
        world = (rows, jnp.asarray(blocks), weights, jnp.asarray(alone))
        energy, ranks, q, axes, means = _solve(*world, sigma, penalty, width, num_blocks=count)
        of_blocks, of_rows = np.split(np.asarray(ranks), [count])
        own = (blocks[None, :] == np.arange(count)[:, None]) & ~alone[None, :]
        margins = _block_margins(rows, jnp.asarray(own), q, axes, means, of_blocks, width)
        margin = float(min(margins.min(), lone[of_rows > 0].min(initial=np.inf)))
        raw = np.where(alone, count + np.arange(alone.size), blocks)
        present, numbered = np.unique(raw, return_inverse=True)
        kept = tuple(int(rank) for rank in np.asarray(ranks)[present])
        objective, risk = float(energy.objective), float(energy.risk)
        return Structure(name, objective, risk, numbered[inverse], kept, margin, margin > 0, search)

    none, repeated = np.zeros(copies.shape, bool), copies > 1
    clusters, apart = structure("given clusters", members, none), structure("duplicates apart", members, repeated)
    candidates = [structure("single samples", members, ~none), clusters, *([apart] if repeated.any() else [])]
    start = repeated if _order(apart) < _order(clusters) else none
    free = np.flatnonzero((lone > 0) & ~start)
    if free.size:
        world = (rows, jnp.asarray(members), weights, jnp.asarray(start), jnp.asarray(free))
        alone = _split_greedily(*world, sigma, penalty, width, num_blocks=int(members.max()) + 1)
        if np.any(np.asarray(alone) != start):
            candidates.append(structure("samples split off", members, np.asarray(alone)))
    if few:
        candidates.append(structure("every partition", _search(rows, weights, sigma, penalty, width), none))
    return tuple(sorted(candidates, key=_order))


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
    """The structure of least energy among those whose margins hold, else of least energy: see ``holds``.

    Arguments and errors as in :func:`compare_structures`, whose first entry it is; ``search`` says what was compared.
    """
    return compare_structures(
        data, labels, sigma, penalty, width, multiplicity=multiplicity, exhaustive_limit=exhaustive_limit
    )[0]


def _order(structure: Structure) -> tuple[bool, float]:
    return not structure.holds, structure.energy


@jax.jit
@full_precision
def _sample_margins(rows: Float[Array, "m r"]) -> Float[Array, " m"]:
    """Margin of each row's own unit, along the row: its length, or less if another row comes nearer to the gate."""
    norms = jnp.linalg.norm(rows, axis=1)

    def margin(i: Int[Array, ""]) -> Float[Array, ""]:
        distance = rows @ (rows[i] / jnp.where(norms[i] > 0, norms[i], 1.0))
        return jnp.min(jnp.where(jnp.arange(norms.size) == i, distance, -distance))

    return jax.lax.map(margin, jnp.arange(norms.size), batch_size=min(norms.size, 256))


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _solve(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, " m"],
    alone: Bool[Array, " m"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> tuple[Energy, Int[Array, " blocks_and_rows"], Float[Array, "K r"], Float[Array, "K r r"], Float[Array, "K r"]]:
    """Energy and ranks of blocks and of rows alone, then the blocks' gains, axes and (unnormalized) means."""
    own = block_copies(members, jnp.where(alone, 0.0, copies), num_blocks)
    moments, counts, axes = masked_spectra(rows, own)
    spectra = direction_spectra(moments, counts, rows, jnp.where(alone, copies, 0.0))
    kept = allocate_ranks(spectra, sigma, penalty, width)
    ranks = jnp.concatenate([jnp.sum(kept[: moments.size].reshape(moments.shape), axis=1), kept[moments.size :]])
    q = shrinkage(moments, (counts / jnp.sum(copies))[:, None], sigma, penalty)
    return spectral_energy(spectra, sigma, penalty, kept), ranks, q, axes, own @ rows


def _block_margins(
    rows: Float[Array, "m r"],
    own: Bool[Array, "K m"],
    q: Float[Array, "K r"],
    axes: Float[Array, "K r r"],
    means: Float[Array, "K r"],
    ranks: np.ndarray,
    width: int,
) -> np.ndarray:
    """Margin of each block's units; infinite without units."""
    size = min(width, rows.shape[1])
    # Padded to one shape: a factor's missing rows are units that do not exist.
    factors = np.zeros((ranks.size, size, size))
    for k, p in enumerate(ranks):
        if p:
            factors[k, :p, :p] = orthogonal_factor(int(p))
    return np.asarray(_margins(rows, own, q[:, :size], axes[:, :, :size], means, jnp.asarray(factors, rows.dtype)))


@jax.jit
@full_precision
def _margins(
    rows: Float[Array, "m r"],
    own: Bool[Array, "K m"],
    q: Float[Array, "K P"],
    axes: Float[Array, "K r P"],
    means: Float[Array, "K r"],
    factors: Float[Array, "K P P"],
) -> Float[Array, " K"]:
    def margin(
        block: tuple[
            Bool[Array, " m"], Float[Array, " P"], Float[Array, "r P"], Float[Array, " r"], Float[Array, "P P"]
        ],
    ) -> Float[Array, ""]:
        own, q, axes, mean, factor = block
        w = block_units(q, axes, mean, factor)
        norms = jnp.linalg.norm(w, axis=0)
        live = norms > 0
        distance = rows @ (w / jnp.where(live, norms, 1.0)[None, :])
        return jnp.min(jnp.where(live[None, :], jnp.where(own[:, None], distance, -distance), jnp.inf))

    return jax.lax.map(margin, (own, q, axes, means, factors))


@functools.partial(jax.jit, static_argnames="num_blocks")
@full_precision
def _split_greedily(
    rows: Float[Array, "m r"],
    members: Int[Array, " m"],
    copies: Float[Array, " m"],
    alone: Bool[Array, " m"],
    free: Int[Array, " f"],
    sigma: Scalar,
    penalty: Scalar,
    width: ArrayLike,
    *,
    num_blocks: int,
) -> Bool[Array, " m"]:
    """Rows of ``free`` split off one at a time, each the one that lowers the energy most, while it falls."""

    def solve(alone: Bool[Array, " m"]) -> tuple[Float[Array, "K r"], Float[Array, " K"]]:
        moments, counts, _ = masked_spectra(rows, block_copies(members, jnp.where(alone, 0.0, copies), num_blocks))
        return moments, counts

    def energy(moments: Float[Array, "K r"], counts: Float[Array, " K"], alone: Bool[Array, " m"]) -> Float[Array, ""]:
        spectra = direction_spectra(moments, counts, rows, jnp.where(alone, copies, 0.0))
        return best_energy(spectra, sigma, penalty, width).objective

    def step(
        state: tuple[Bool[Array, " m"], Float[Array, ""], Bool[Array, ""]],
    ) -> tuple[Bool[Array, " m"], Float[Array, ""], Bool[Array, ""]]:
        alone, least, _ = state
        moments, counts = solve(alone)

        def after(i: Int[Array, ""]) -> Float[Array, ""]:
            k = members[i]
            rest = jnp.where((members == k) & ~alone & (jnp.arange(copies.size) != i), copies, 0.0)
            left, _ = gram_axes((rows * rest[:, None]).T @ rows, jnp.sum(rest))
            split = energy(moments.at[k].set(left), counts.at[k].set(jnp.sum(rest)), alone.at[i].set(True))
            # Splitting a block of one would change nothing but the rounding.
            return jnp.where(alone[i] | (jnp.sum(rest) == 0), jnp.inf, split)

        energies = jax.lax.map(after, free)
        best = jnp.argmin(energies)
        pays = energies[best] < least
        i = free[best]
        return alone.at[i].set(alone[i] | pays), jnp.where(pays, energies[best], least), pays

    start = (alone, energy(*solve(alone), alone), jnp.asarray(True))
    return jax.lax.while_loop(lambda state: state[2], step, start)[0]


def _search(
    rows: Float[Array, "m r"], copies: Float[Array, " m"], sigma: Scalar, penalty: Scalar, width: int
) -> np.ndarray:
    """The partition of least energy whose margins hold, or of least energy if none do, as labels.

    A block's gains and margins depend on the block alone, so they are tabulated once for every subset of the rows.
    """
    m, r = rows.shape
    inside = jnp.asarray((np.arange(1, 2**m)[:, None] >> np.arange(m)[None, :] & 1).astype(bool))
    own = jnp.where(inside, copies[None, :], 0.0)
    moments, counts, axes = masked_spectra(rows, own)
    weights = (counts / jnp.sum(copies))[:, None]
    q, gains = shrinkage(moments, weights, sigma, penalty), np.asarray(direction_gain(moments, weights, sigma, penalty))
    margins = [
        _block_margins(rows, inside, q, axes, own @ rows, np.full(counts.size, p), width)
        for p in range(min(width, r) + 1)
    ]

    found, best = (False, -np.inf), np.zeros(m, int)
    for labels in _partitions(m):
        blocks = np.bincount(labels, weights=2.0 ** np.arange(m)).astype(int) - 1
        flat = gains[blocks].reshape(-1)
        kept = np.argsort(-flat, kind="stable")[:width]
        kept = kept[flat[kept] > 0]
        ranks = np.bincount(kept // r, minlength=blocks.size)
        value = (all(margins[p][block] > 0 for p, block in zip(ranks, blocks, strict=True)), float(np.sum(flat[kept])))
        if value > found:
            found, best = value, labels
    return best


def _partitions(size: int) -> Iterator[np.ndarray]:
    """Every partition once, as labels in which a new block takes the next number; the undivided one first."""

    def extend(labels: list[int], blocks: int) -> Iterator[np.ndarray]:
        if len(labels) == size:
            yield np.asarray(labels)
            return
        for label in range(blocks + 1):
            yield from extend([*labels, label], max(blocks, label + 1))

    yield from extend([], 0)
