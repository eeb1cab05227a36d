r"""Clusters of a data set and the spectra of their second moments, which every closed form of the theory starts from.

Block k holds the rows of one label. With ``X_k`` of shape (n_k, d), samples as rows, and ``Λ`` the eigenvalues of
``X_kᵀ X_k`` (:cite:`zhang26`, Theorem 3.1, unnormalized), the *moments* are ``s = Λ/n_k``, the eigenvalues of
``S_k = X_kᵀ X_k/n_k``, and the *weight* is ``ρ_k = n_k/n``. In this notation data and population share every formula.

Labels must be concrete, because they determine shapes; blocks are in order of label. Functions take whole data sets.
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
"""One integer per row of the data; rows with the same integer form a block."""

Ranks: TypeAlias = ArrayLike | Sequence[int]
"""Number of units of each block in order of label, or one number for all blocks."""

Multiplicity: TypeAlias = ArrayLike | Sequence[int] | None
"""Number of copies that each row stands for, positive whole numbers; one each if ``None``."""


class Blocks(NamedTuple):
    """A partition of n rows into K blocks, in order of label; concrete."""

    labels: np.ndarray
    """The distinct labels, ascending, shape (K,)."""
    members: np.ndarray
    """Block of each row, 0..K-1, shape (n,)."""
    counts: np.ndarray
    """Number of rows n_k of each block, shape (K,)."""


class Spectra(NamedTuple):
    """Second-moment spectra of K blocks; a pytree."""

    moments: Float[Array, "K r"]
    """Eigenvalues of S_k, descending within each row, padded with zeros."""
    weights: Float[Array, " K"]
    """Fractions ρ_k of the samples, or probabilities of the modes."""


def partition(labels: Labels, num_samples: int) -> Blocks:
    """Group rows by label.

    Raises ``ValueError`` if ``labels`` is traced, not integer, or not one label for each of ``num_samples`` rows.
    """
    if not is_concrete(labels):
        raise ValueError("labels must be concrete, because they determine shapes; close over them instead of tracing.")
    names = np.asarray(labels)
    if names.shape != (num_samples,):
        raise ValueError(
            f"labels must have shape ({num_samples},), one per row of data; got {names.shape}"
            + (f", {names.size - num_samples:+d} labels." if names.ndim == 1 else ".")
        )
    if not np.issubdtype(names.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {names.dtype}; number the clusters first.")
    distinct, members, counts = np.unique(names, return_inverse=True, return_counts=True)
    return Blocks(distinct, members, counts)


def check_ranks(ranks: Ranks, limits: Sequence[int] | np.ndarray, *, width: int | None = None) -> tuple[int, ...]:
    """The rank p_k of each block as a tuple; a single integer applies to all blocks.

    ``limits`` are the largest possible ranks, min(n_k, d). Raises ``ValueError`` for a wrong number of ranks, a rank
    outside [0, limit], or more units than ``width``; the message says by how much.
    """
    if not is_concrete(ranks):
        raise ValueError("ranks must be concrete, because they are shapes; close over them instead of tracing.")
    same = isinstance(ranks, numbers.Integral) or np.ndim(ranks) == 0
    listed = [ranks] * len(limits) if same else list(np.asarray(ranks))
    if len(listed) != len(limits):
        raise ValueError(f"ranks must have one entry for each of the {len(limits)} blocks, got {len(listed)}.")
    checked = tuple(check_integer(f"ranks[{k}]", rank, minimum=0) for k, rank in enumerate(np.asarray(listed)))
    for k, (rank, limit) in enumerate(zip(checked, limits, strict=True)):
        if rank > limit:
            raise ValueError(
                f"ranks[{k}] = {rank} exceeds by {rank - limit} the largest rank of block {k}, "
                f"{limit} = min(samples, dimensions); lower it, or pass one rank per block."
            )
    total = sum(checked)
    if width is not None and total > check_integer("width", width, minimum=1):
        raise ValueError(f"ranks sum to {total}, {total - width} more than width = {width}; widen or lower the ranks.")
    return checked


def blocks_alike(blocks: Blocks, ranks: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups of blocks of similar size (and equal rank), so that one batched call handles a group and compiles once.

    Yields block numbers (g,) and row indices (g, m), where m is n_k rounded up to a power of two. The index n, one past
    the last row, pads: see :func:`block_points`.
    """
    n = blocks.members.size
    order = np.argsort(blocks.members, kind="stable")
    starts = np.cumsum(blocks.counts) - blocks.counts
    sizes = [1 << (int(count) - 1).bit_length() for count in blocks.counts]
    keys = np.stack([sizes, np.zeros_like(sizes) if ranks is None else np.asarray(ranks)], axis=1)
    for key in np.unique(keys, axis=0):
        (numbers_alike,) = np.nonzero(np.all(keys == key, axis=1))
        position = np.arange(key[0])[None, :]
        is_real = position < blocks.counts[numbers_alike][:, None]
        rows = order[np.minimum(starts[numbers_alike][:, None] + position, n - 1)]
        yield numbers_alike, np.where(is_real, rows, n)


def block_points(data: Float[Array, "n d"], rows: np.ndarray) -> Float[Array, "g m d"]:
    """The rows of each block of :func:`blocks_alike`, padded with zeros, which change no second moment."""
    return data.at[jnp.asarray(rows)].get(mode="fill", fill_value=0.0)


@full_precision
def principal_axes(points: Float[Array, "m d"], rank: int) -> tuple[Float[Array, " r"], Float[Array, "d r"]]:
    r"""The top ``rank`` r <= min(m, d) eigenpairs of the unnormalized second moment, descending.

    .. math:: X^\top X = U \Lambda U^\top

    Computed from the smaller of the two Gram matrices. Eigenvalues that are zero up to rounding are exactly zero.
    Derivatives are finite everywhere. Where eigenvalues coincide, axes have none: there each is held fixed within the
    space of the coinciding ones, which gives the derivative of the projection onto that space, if all of it is among
    the top ``rank``. Axes of eigenvalue zero are held fixed too.
    """
    m, d = points.shape
    # Eigenvalues of the Gram matrix are off by the rounding of the largest; Rayleigh quotients square that error.
    if m < d:
        gram = points @ points.T
        # Zero rows would tie at the eigenvalue 0, and ties make derivatives NaN: give them distinct negative ones.
        empty = jnp.all(points == 0, axis=1).astype(gram.dtype)
        vectors = _eigenvectors(gram - jnp.diag(empty * jnp.cumsum(empty)) * jnp.trace(gram) / m)
        scaled = points.T @ vectors[:, ::-1][:, :rank]
        lam = jnp.sum(jnp.square(scaled), axis=0)
        # Dividing by √Λ instead would lose orthogonality in the weak directions.
        axes = _orthonormal(scaled)
    else:
        vectors = _eigenvectors(points.T @ points)
        axes = vectors[:, ::-1][:, :rank]
        lam = jnp.sum(jnp.square(points @ axes), axis=0)
    floor = (jnp.finfo(lam.dtype).eps * max(m, d)) ** 2
    return jnp.where(lam > floor * jnp.max(lam), lam, 0.0), axes


@jax.custom_jvp
def _eigenvectors(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """Eigenvectors of a symmetric matrix as columns, by ascending eigenvalue."""
    return jnp.linalg.eigh(matrix)[1]


@_eigenvectors.defjvp
def _(primals, tangents):
    (matrix,), (change,) = primals, tangents
    values, vectors = jnp.linalg.eigh(matrix)
    gaps = values[None, :] - values[:, None]
    distinct = jnp.abs(gaps) > jnp.finfo(values.dtype).eps * values.size * jnp.max(jnp.abs(values))
    coupling = vectors.T @ (0.5 * (change + change.T)) @ vectors
    return vectors, vectors @ jnp.where(distinct, coupling / jnp.where(distinct, gaps, 1.0), 0.0)


@jax.custom_jvp
def _orthonormal(columns: Float[Array, "d r"]) -> Float[Array, "d r"]:
    """The factor Q of a QR decomposition, whose derivative is zero in columns that are zero up to rounding."""
    return jnp.linalg.qr(columns)[0]


@_orthonormal.defjvp
def _(primals, tangents):
    (columns,), (change,) = primals, tangents
    q, r = jnp.linalg.qr(columns)
    lengths = jnp.linalg.norm(columns, axis=0)
    live = lengths > jnp.finfo(q.dtype).eps * max(columns.shape) * jnp.max(lengths)
    r = jnp.where(live[:, None] & live[None, :], r, jnp.eye(r.shape[0], dtype=r.dtype))
    scaled = jax.scipy.linalg.solve_triangular(r, jnp.where(live[None, :], change, 0.0).T, trans="T").T
    along = q.T @ scaled
    below = jnp.tril(along, -1)
    return q, jnp.where(live[None, :], q @ (below - below.T - along) + scaled, 0.0)


@full_precision
def empirical_spectra(data: Float[Array, "n d"], labels: Labels, *, multiplicity: Multiplicity = None) -> Spectra:
    r"""Moments and weights of labeled rows, with r = min(max n_k, d).

    .. math:: s = \mathrm{eig}(X_k^\top X_k)/n_k, \quad \rho_k = n_k/n

    ``multiplicity`` (n,), positive whole numbers, is the number of copies that each row stands for; n_k then counts
    copies. Jittable with ``labels`` and ``multiplicity`` closed over. Raises ``ValueError`` for bad data, labels or
    multiplicities.
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
    """Copies of each row, ones if ``None``.

    Raises ``ValueError`` unless they are concrete, positive whole numbers of shape (n,).
    """
    if multiplicity is None:
        return np.ones(num_samples, int)
    if not is_concrete(multiplicity):
        raise ValueError("multiplicity must be concrete; close over it instead of tracing.")
    copies = np.asarray(multiplicity)
    check_positive("multiplicity", copies)
    if copies.shape != (num_samples,):
        raise ValueError(f"multiplicity must have shape ({num_samples},), one number per row; got {copies.shape}.")
    if np.any(copies != np.round(copies)):
        raise ValueError("multiplicity must hold whole numbers: the number of copies that each row stands for.")
    return copies.astype(int)


def distinct_rows(data: Float[Array, "n d"], members: np.ndarray) -> tuple[Float[Array, "m d"], np.ndarray, np.ndarray]:
    """Distinct rows in order of appearance, the block of each, and the index of each row among them, shape (n,).

    Raises ``ValueError`` if equal rows belong to different blocks, because no gate can distinguish them. Takes concrete
    data only.
    """
    _, first, inverse = np.unique(np.asarray(data), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    inverse, first = np.argsort(order)[inverse.reshape(-1)], first[order]
    conflicts = int(np.sum(members[first][inverse] != members))
    if conflicts:
        raise ValueError(f"{conflicts} rows equal an earlier row of another label; give equal rows the same label.")
    return data[first], members[first], inverse


def span_coordinates(rows: Float[Array, "m d"]) -> Float[Array, "m r"]:
    """The rows in an orthonormal basis of their span, r = min(m, d), which keeps inner products and spectra."""
    return jnp.linalg.qr(rows.T, mode="r").T if rows.shape[0] < rows.shape[1] else rows


def block_copies(members: Int[Array, " m"], copies: Float[Array, " m"], num_blocks: int) -> Float[Array, "K m"]:
    """Copies of each row in each block: ``copies`` in the row's own block, 0 in the others."""
    return jax.nn.one_hot(members, num_blocks, axis=0, dtype=copies.dtype) * copies[None, :]


@full_precision
def masked_spectra(
    rows: Float[Array, "m r"], copies: Float[Array, "K m"]
) -> tuple[Float[Array, "K r"], Float[Array, " K"], Float[Array, "K r r"]]:
    """Moments, counts and axes (as columns) of K blocks with ``copies`` >= 0 of each row; zeros for empty blocks.

    Its shapes are the same for every partition, so that a search compiles once; those of :func:`empirical_spectra`
    depend on the block sizes. The cost is K matrices of size r.
    """
    moments, axes = jax.lax.map(lambda c: gram_axes((rows * c[:, None]).T @ rows, jnp.sum(c)), copies)
    return moments, jnp.sum(copies, axis=1), axes


def gram_axes(gram: Float[Array, "r r"], count: Float[Array, ""]) -> tuple[Float[Array, " r"], Float[Array, "r r"]]:
    """Moments ``eig(gram)/count``, descending, with their axes; zeros where the count is 0."""
    lam, axes = jnp.linalg.eigh(gram)
    # Removing a block's last sample leaves a rounding error divided by a count of 0.
    nonempty = count > 0
    moments = jnp.where(nonempty, jnp.maximum(lam[::-1], 0.0) / jnp.where(nonempty, count, 1.0), 0.0)
    return moments, axes[:, ::-1]


def direction_spectra(
    moments: Float[Array, "K r"], counts: Float[Array, " K"], rows: Float[Array, "m r"], singletons: Float[Array, " m"]
) -> Spectra:
    """Every direction as a block of rank one: K r directions of blocks, then m rows that are blocks of their own.

    ``singletons`` is the number of copies of each row outside the K blocks, 0 for a row that belongs to one of them.
    """
    of_blocks = jnp.broadcast_to(counts[:, None], moments.shape).reshape(-1)
    weights = jnp.concatenate([of_blocks, singletons]) / (jnp.sum(counts) + jnp.sum(singletons))
    return Spectra(jnp.concatenate([moments.reshape(-1), jnp.sum(jnp.square(rows), axis=1)])[:, None], weights)
