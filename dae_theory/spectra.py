r"""Clusters of a data set and the spectra of their second moments: what every closed form of the theory reads.

A block k holds the rows of one label. With ``X_k`` of shape (n_k, d), rows being samples, and ``Λ`` the eigenvalues of
``X_kᵀ X_k`` (:cite:`zhang26`, Theorem 3.1, unnormalized), the *moments* are ``s = Λ/n_k``, the eigenvalues of
``S_k = X_kᵀ X_k/n_k``, and the *weight* is ``ρ_k = n_k/n``. In these letters data and population share every formula.

Labels are concrete, because they fix shapes; blocks come in order of label. Nothing here is per example.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from dae_theory.checks import check_data, check_integer, check_positive, is_concrete
from dae_theory.mixture import GaussianMixture, check_mixture, second_moments
from dae_theory.precision import full_precision

__all__ = [
    "Blocks",
    "Labels",
    "Multiplicity",
    "Ranks",
    "Spectra",
    "block_copies",
    "block_points",
    "blocks_alike",
    "check_multiplicity",
    "check_ranks",
    "direction_spectra",
    "distinct_rows",
    "empirical_spectra",
    "gram_axes",
    "masked_spectra",
    "partition",
    "population_axes",
    "population_spectra",
    "principal_axes",
    "span_coordinates",
]

Labels: TypeAlias = ArrayLike | Sequence[int]
"""One integer a row of the data; rows that share it form a block."""

Ranks: TypeAlias = ArrayLike | Sequence[int]
"""Units of each block in order of label, or one number for all of them."""

Multiplicity: TypeAlias = ArrayLike | Sequence[int] | None
"""Copies that each row stands for, whole numbers above 0; one each if ``None``."""


class Blocks(NamedTuple):
    """A partition of n rows into K blocks, in order of label; concrete."""

    labels: np.ndarray
    """The distinct labels, ascending, shape (K,)."""
    members: np.ndarray
    """The block of each row, 0..K-1, shape (n,)."""
    counts: np.ndarray
    """Rows of each block, n_k, shape (K,)."""


class Spectra(NamedTuple):
    """Second-moment spectra of K blocks; a pytree."""

    moments: Float[Array, "K r"]
    """Eigenvalues of S_k, descending along the row, padded with zeros."""
    weights: Float[Array, " K"]
    """Shares ρ_k of the samples, or probabilities of the modes."""


def partition(labels: Labels, num_samples: int) -> Blocks:
    """Blocks of equal label.

    ``ValueError`` if ``labels`` is traced, not integer, or not one label for each of ``num_samples`` rows.
    """
    if not is_concrete(labels):
        raise ValueError("labels must be concrete: they fix the blocks' shapes; close over them instead of tracing.")
    names = np.asarray(labels)
    if names.shape != (num_samples,):
        raise ValueError(
            f"labels must have shape ({num_samples},), one for each row of data; got {names.shape}"
            + (f", {names.size - num_samples:+d} labels." if names.ndim == 1 else ".")
        )
    if not np.issubdtype(names.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {names.dtype}; number the clusters first.")
    distinct, members, counts = np.unique(names, return_inverse=True, return_counts=True)
    return Blocks(distinct, members, counts)


def check_ranks(ranks: Ranks, limits: Sequence[int] | np.ndarray, *, width: int | None = None) -> tuple[int, ...]:
    """The rank p_k of each block as a tuple, one integer standing for all of them.

    ``limits`` are the largest ranks, min(n_k, d). ``ValueError`` for a wrong number of ranks, a rank outside
    [0, limit], or more units than ``width``; the message says by how much.
    """
    if not is_concrete(ranks):
        raise ValueError("ranks must be concrete: they are shapes; close over them instead of tracing.")
    same = isinstance(ranks, numbers.Integral) or np.ndim(ranks) == 0
    listed = [ranks] * len(limits) if same else list(np.asarray(ranks))
    if len(listed) != len(limits):
        raise ValueError(f"ranks must have one entry for each of the {len(limits)} blocks, got {len(listed)}.")
    checked = tuple(check_integer(f"ranks[{k}]", rank, minimum=0) for k, rank in enumerate(np.asarray(listed)))
    for k, (rank, limit) in enumerate(zip(checked, limits, strict=True)):
        if rank > limit:
            raise ValueError(
                f"ranks[{k}] = {rank} exceeds by {rank - limit} the rank that block {k} can have, "
                f"{limit} = min(samples, dimensions); lower it, or pass one rank for each block."
            )
    total = sum(checked)
    if width is not None and total > check_integer("width", width, minimum=1):
        raise ValueError(f"ranks sum to {total}, {total - width} more than width = {width}; widen or lower the ranks.")
    return checked


def blocks_alike(blocks: Blocks, ranks: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of like size (and equal rank) together, so that one batched call serves them and compiles once.

    Yields block numbers (g,) and rows (g, m), where m is n_k rounded up to a power of two and the row n, one past the
    last, fills up: see :func:`block_points`.
    """
    n = blocks.members.size
    order = np.argsort(blocks.members, kind="stable")
    starts = np.cumsum(blocks.counts) - blocks.counts
    sizes = [1 << (int(count) - 1).bit_length() for count in blocks.counts]
    keys = np.stack([sizes, np.zeros_like(sizes) if ranks is None else np.asarray(ranks)], axis=1)
    for key in np.unique(keys, axis=0):
        (numbers_alike,) = np.nonzero(np.all(keys == key, axis=1))
        place = np.arange(key[0])[None, :]
        inside = place < blocks.counts[numbers_alike][:, None]
        rows = order[np.minimum(starts[numbers_alike][:, None] + place, n - 1)]
        yield numbers_alike, np.where(inside, rows, n)


def block_points(data: Float[Array, "n d"], rows: np.ndarray) -> Float[Array, "g m d"]:
    """The rows of each block of :func:`blocks_alike`, and zeros, which change no second moment."""
    return data.at[jnp.asarray(rows)].get(mode="fill", fill_value=0.0)


@full_precision
def principal_axes(points: Float[Array, "m d"], rank: int) -> tuple[Float[Array, " r"], Float[Array, "d r"]]:
    r"""The top ``rank`` r <= min(m, d) eigenpairs of the unnormalized second moment, descending.

    .. math:: X^\top X = U \Lambda U^\top

    From the smaller of the two Gram matrices. Eigenvalues that rounding cannot tell from zero are exactly zero.
    """
    m, d = points.shape
    # The Gram matrix's eigenvalues are off by the rounding of the largest; Rayleigh quotients square that error.
    if m < d:
        gram = points @ points.T
        # Rows of zeros would tie at the eigenvalue 0, and ties make derivatives NaN: send them below, one by one.
        empty = jnp.all(points == 0, axis=1).astype(gram.dtype)
        _, vectors = jnp.linalg.eigh(gram - jnp.diag(empty * jnp.cumsum(empty)) * jnp.trace(gram) / m)
        scaled = points.T @ vectors[:, ::-1][:, :rank]
        lam = jnp.sum(jnp.square(scaled), axis=0)
        # Dividing by √Λ instead would lose orthogonality in the weak directions.
        axes, _ = jnp.linalg.qr(scaled)
    else:
        _, vectors = jnp.linalg.eigh(points.T @ points)
        axes = vectors[:, ::-1][:, :rank]
        lam = jnp.sum(jnp.square(points @ axes), axis=0)
    floor = (jnp.finfo(lam.dtype).eps * max(m, d)) ** 2
    return jnp.where(lam > floor * jnp.max(lam), lam, 0.0), axes


@full_precision
def empirical_spectra(data: Float[Array, "n d"], labels: Labels, *, multiplicity: Multiplicity = None) -> Spectra:
    r"""Moments and weights of labeled rows; r = min(max n_k, d).

    .. math:: s = \mathrm{eig}(X_k^\top X_k)/n_k, \quad \rho_k = n_k/n

    ``multiplicity`` (n,), positive whole numbers, counts row i as so many copies, and n_k counts copies then. Jits with
    ``labels`` and ``multiplicity`` closed over. ``ValueError`` for bad data, labels or multiplicities.
    """
    check_data(data)
    blocks = partition(labels, data.shape[0])
    copies = check_multiplicity(multiplicity, data.shape[0])
    counts = np.bincount(blocks.members, weights=copies)
    weighted = data * jnp.asarray(np.sqrt(copies), data.dtype)[:, None]
    width = min(int(blocks.counts.max()), data.shape[1])
    moments = jnp.zeros((counts.size, width), data.dtype)
    for numbers_alike, rows in blocks_alike(blocks):
        rank = min(rows.shape[1], width)
        lam, _ = jax.vmap(lambda points, rank=rank: principal_axes(points, rank))(block_points(weighted, rows))
        sizes = jnp.asarray(counts[numbers_alike], data.dtype)
        moments = moments.at[numbers_alike, :rank].set(lam / sizes[:, None])
    return Spectra(moments, jnp.asarray(counts / counts.sum(), data.dtype))


@full_precision
def population_axes(mixture: GaussianMixture) -> tuple[Float[Array, "K d"], Float[Array, "K d d"]]:
    r"""Eigenpairs of the modes' second moments ``S_k = μ_k μ_kᵀ + Σ_k``, descending; axes are columns."""
    check_mixture(mixture)
    moments, axes = jnp.linalg.eigh(second_moments(mixture))
    moments, axes = moments[:, ::-1], axes[:, :, ::-1]
    floor = jnp.finfo(moments.dtype).eps * moments.shape[1] * moments[:, :1]
    return jnp.where(moments > floor, moments, 0.0), axes


def population_spectra(mixture: GaussianMixture) -> Spectra:
    r"""Moments and weights of the modes, r = d: the limit of :func:`empirical_spectra` as n grows."""
    return Spectra(population_axes(mixture)[0], mixture.weights)


def check_multiplicity(multiplicity: Multiplicity, num_samples: int) -> np.ndarray:
    """Copies of each row, ones if ``None``; ``ValueError`` unless concrete, positive whole numbers, shape (n,)."""
    if multiplicity is None:
        return np.ones(num_samples, int)
    if not is_concrete(multiplicity):
        raise ValueError("multiplicity must be concrete; close over it instead of tracing.")
    copies = np.asarray(multiplicity)
    check_positive("multiplicity", copies)
    if copies.shape != (num_samples,):
        raise ValueError(f"multiplicity must have shape ({num_samples},), one for each row; got {copies.shape}.")
    if np.any(copies != np.round(copies)):
        raise ValueError("multiplicity must hold whole numbers: row i stands for so many equal samples.")
    return copies.astype(int)


def distinct_rows(data: Float[Array, "n d"], members: np.ndarray) -> tuple[Float[Array, "m d"], np.ndarray, np.ndarray]:
    """Distinct rows in order of appearance, shape (m, d), the block of each, and which of them each row is, (n,).

    No gate can tell equal rows apart: ``ValueError`` if they belong to different blocks. Concrete data only.
    """
    _, first, inverse = np.unique(np.asarray(data), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    inverse, first = np.argsort(order)[inverse.reshape(-1)], first[order]
    strays = int(np.sum(members[first][inverse] != members))
    if strays:
        raise ValueError(f"{strays} rows equal an earlier row of another label; give equal rows one label.")
    return data[first], members[first], inverse


def span_coordinates(rows: Float[Array, "m d"]) -> Float[Array, "m r"]:
    """The rows in an orthonormal basis of their span, r = min(m, d): inner products and spectra do not change."""
    return jnp.linalg.qr(rows.T, mode="r").T if rows.shape[0] < rows.shape[1] else rows


def block_copies(members: Int[Array, " m"], copies: Float[Array, " m"], num_blocks: int) -> Float[Array, "K m"]:
    """Copies of each row in each block: ``copies`` in the row's own block, 0 in the others."""
    return jax.nn.one_hot(members, num_blocks, axis=0, dtype=copies.dtype) * copies[None, :]


@full_precision
def masked_spectra(
    rows: Float[Array, "m r"], own: Float[Array, "K m"]
) -> tuple[Float[Array, "K r"], Float[Array, " K"], Float[Array, "K r r"]]:
    """Moments, counts and axes (columns) of K blocks that hold ``own`` >= 0 copies of each row; zeros for empty ones.

    One shape for every partition, so that a search compiles once, where :func:`empirical_spectra` has one for each size
    of block. K matrices of size r are the price.
    """
    moments, axes = jax.lax.map(lambda c: gram_axes((rows * c[:, None]).T @ rows, jnp.sum(c)), own)
    return moments, jnp.sum(own, axis=1), axes


def gram_axes(gram: Float[Array, "r r"], count: Float[Array, ""]) -> tuple[Float[Array, " r"], Float[Array, "r r"]]:
    """Moments ``eig(gram)/count``, descending, with their axes; zeros where the count is 0."""
    lam, axes = jnp.linalg.eigh(gram)
    # Removing a block's last sample leaves a rounding error over nothing.
    some = count > 0
    moments = jnp.where(some, jnp.maximum(lam[::-1], 0.0) / jnp.where(some, count, 1.0), 0.0)
    return moments, axes[:, ::-1]


def direction_spectra(
    moments: Float[Array, "K r"], counts: Float[Array, " K"], rows: Float[Array, "m r"], alone: Float[Array, " m"]
) -> Spectra:
    """Every direction as a block of rank one: the K r of the blocks, then the m rows, ``alone`` copies of each."""
    of_blocks = jnp.broadcast_to(counts[:, None], moments.shape).reshape(-1)
    weights = jnp.concatenate([of_blocks, alone]) / (jnp.sum(counts) + jnp.sum(alone))
    return Spectra(jnp.concatenate([moments.reshape(-1), jnp.sum(jnp.square(rows), axis=1)])[:, None], weights)
