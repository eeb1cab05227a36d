"""Data sets: training rows and held-out rows, from any source of :mod:`sims.data.readers`.

A seed permutes the rows of a source; the last ones are held out, the others are the pool, and a data set of n rows is
the first n of the pool. Data sets of one seed are therefore nested in n and share their held-out rows: a sweep over n
loads the pool once and takes prefixes (:func:`prefix`). For each row, also a repeated one, its index in the source is
recorded.

Rows of a source that are equal in every value are one sample, present several times: held-out rows that equal a row of
the pool go to its end, so that no sample is on both sides, and all have the index of the first of them. Rows that are
nearly equal are different samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Num

from dae_theory.checks import check_finite, check_integer, check_seed
from dae_theory.mixture import GaussianMixture
from dae_theory.types import Scalar
from sims.data.duplicates import parse_duplicates
from sims.data.readers import Source, read

__all__ = [
    "Dataset",
    "center",
    "describe",
    "first_of_equal",
    "load",
    "max_cosine",
    "parse_duplicates",
    "prefix",
    "separable_rows",
]

NEGATIVE = -1e-6
"""A cosine below this is still negative after rows are rounded to float32."""

BISECTIONS = 8
"""Steps of the search for the smallest bound on the cosines."""


class Dataset(NamedTuple):
    """Training rows, in the order drawn, and held-out rows; values are in [-1, 1] unless centered."""

    name: str
    """The source."""
    train: Float[np.ndarray, "n d"]
    train_labels: Int[np.ndarray, " n"]
    """Classes from 0; -1 where unknown."""
    train_rows: Int[np.ndarray, " n"]
    """Index in the source of each training row; equal for repeated rows."""
    held_out: Float[np.ndarray, "m d"]
    held_out_labels: Int[np.ndarray, " m"]
    held_out_rows: Int[np.ndarray, " m"]
    mean: Float[np.ndarray, " d"]
    """The mean that was subtracted from every row; 0 unless centered."""
    image_shape: tuple[int, int, int] | None
    """(height, width, channels) of a row, if rows are images."""
    mixture: GaussianMixture | None
    """The distribution of the rows, centered with them, if it is known."""
    num_repeats: int = 0
    """Rows of the source that equal an earlier one in every value."""

    @property
    def multiplicity(self) -> Int[np.ndarray, " n"]:
        """For each training row, how many training rows are the same row of the source."""
        _, inverse, counts = np.unique(self.train_rows, return_inverse=True, return_counts=True)
        return counts[inverse]


def load(
    name: str | Source,
    *,
    num_samples: int | None = None,
    held_out: Scalar = 0.2,
    seed: int = 0,
    center: bool = False,
    separable: int = 0,
    duplicates: str | tuple[int, int] = "",
    singles: int = 0,
    dtype: DTypeLike = np.float32,
) -> Dataset:
    """Load a data set.

    Args:
        name: ``digits``, ``mixture:modes=4``, ``idx:FOLDER``, a path, ... (:func:`sims.data.readers.read`), or a
            source.
        num_samples: n; None for the whole pool.
        held_out: rows of the source that are held out: a count (int), or a fraction in [0, 1) (float).
        seed: of the permutation.
        center: subtract the mean of the training rows, repeated ones counted as often as they occur, from every row.
        separable: restrict the pool to this many rows with pairwise negative cosines (:func:`separable_rows`); 0 keeps
            all. ``center`` then subtracts the mean of the pool that is searched: subtracting that of the selected rows
            would change their cosines.
        duplicates: ``"KxM"`` or (K, M): the first K rows of the pool M times each, in blocks.
        singles: number of further rows, once each, after the duplicates.
        dtype: of the rows.

    ``ValueError`` if the source is missing, damaged or too small, or has no separable set of this size.
    """
    source, name = (read(name), name) if isinstance(name, str) else (name, "array")
    size = len(source.rows)
    order = np.random.default_rng(check_seed("seed", seed)).permutation(size)
    inside = size - _held_out_count(held_out, size)
    pool, outside = order[:inside], order[inside:]
    first = first_of_equal(source.rows)
    seen = np.isin(first[outside], first[pool])
    pool, outside = np.concatenate([pool, outside[seen]]), outside[~seen]
    mean = np.zeros(source.rows.shape[1])
    if separable:
        searched = _values(source, pool)
        mean = _mean(searched) if center else mean
        pool = pool[separable_rows(searched - mean[None, :], separable)]
    rows = _with_repeats(pool, name, num_samples, duplicates, singles)
    train = _values(source, rows)
    if center and not separable:
        mean = _mean(train)
    return Dataset(
        name,
        (train - mean[None, :]).astype(dtype),
        source.labels[rows],
        first[rows],
        (_values(source, outside) - mean[None, :]).astype(dtype),
        source.labels[outside],
        first[outside],
        mean.astype(dtype),
        source.image_shape,
        _shifted(source.mixture, mean, dtype),
        int(np.sum(first != np.arange(size))),
    )


def first_of_equal(rows: Num[np.ndarray, "N d"]) -> Int[np.ndarray, " N"]:
    """For each row the index of the first row that equals it in every value: its own, if none does before."""
    # Zero has two signs, and equal rows one representation.
    places: dict[bytes, int] = {}
    return np.array([places.setdefault((row + 0).tobytes(), i) for i, row in enumerate(rows)], np.int64)


def prefix(dataset: Dataset, num_samples: int, *, center: bool = False) -> Dataset:
    """The data set of the first ``num_samples`` training rows; ``center`` subtracts their mean from every row.

    ``ValueError`` if there are fewer.
    """
    train = dataset.train[: _enough(num_samples, len(dataset.train), dataset.name)]
    shift = _mean(train.astype(float)) if center else np.zeros(train.shape[1])
    dtype = train.dtype
    return dataset._replace(
        train=(train - shift[None, :]).astype(dtype),
        train_labels=dataset.train_labels[:num_samples],
        train_rows=dataset.train_rows[:num_samples],
        held_out=(dataset.held_out - shift[None, :]).astype(dtype),
        mean=(dataset.mean + shift).astype(dtype),
        mixture=_shifted(dataset.mixture, shift, dtype),
    )


def center(
    train: Float[Array | np.ndarray, "n d"], held_out: Float[Array | np.ndarray, "m d"]
) -> tuple[Float[Array | np.ndarray, "n d"], Float[Array | np.ndarray, "m d"], Float[Array | np.ndarray, " d"]]:
    r"""Subtract the training mean, for NumPy or JAX arrays; returns training rows, held-out rows and mean.

    .. math:: x_i - \bar x, \quad \bar x = \frac{1}{n} \sum_i x_i

    Centering rows that were centered on a larger set gives the same as centering once, so a sweep may center each
    prefix of a centered pool. ``ValueError`` for a single row, which would become zero.
    """
    mean = _mean(train)
    return train - mean[None, :], held_out - mean[None, :], mean


def separable_rows(
    rows: Float[np.ndarray, "n d"], count: int, *, search: int = 2048, starts: int = 512
) -> Int[np.ndarray, " count"]:
    r"""Indices of ``count`` rows with negative cosines: β < 0 in Definition 3.1 :cite:`zhang26`, each row a cluster.

    Greedy: starting from one row, add the row whose cosines with all chosen rows are below a bound and have the largest
    sum, which leaves most room for others. Only the first ``search`` rows are candidates, and the first ``starts`` of
    them are tried as starting rows. Bisection lowers the bound from 0, because the theorem's margins grow as β falls
    below 0. ``ValueError`` if no set is found; none exists for ``count`` > d + 1, and β is at least
    :math:`-1/(M-1)` for M rows.
    """
    check_integer("separable", count, minimum=2)
    units = _units(rows[:search])
    cosines = units @ units.T
    distinct = ~np.eye(count, dtype=bool)
    chosen = _greedy(cosines, count, NEGATIVE, starts)
    if len(chosen) < count:
        if len(chosen) == 1:
            reason = f"no two have: the lowest cosine is {cosines.min():.3g}. Subtract the mean first (center)"
        else:
            reason = f"{len(chosen)} were found at most. Ask for fewer"
        raise ValueError(f"separable = {count} of {len(units)} rows with pairwise negative cosines: {reason}.")
    best, low = chosen, -1 / (count - 1)
    for _ in range(BISECTIONS):
        high = np.max(cosines[np.ix_(best, best)][distinct])
        bound = (low + high) / 2
        chosen = _greedy(cosines, count, bound, starts)
        best, low = (chosen, low) if len(chosen) == count else (best, bound)
    return np.array(best)


def describe(dataset: Dataset) -> dict[str, Any]:
    """Facts to record about a data set, as JSON values.

    ``beta`` is the largest cosine between distinct training rows and ``beta_classes`` that between means of classes, as
    in Definition 3.1 :cite:`zhang26` with each row, or class, a cluster (None for fewer than two). ``num_distinct``
    counts training rows with different values, ``num_held_out_seen`` held-out rows that equal a training row, and
    ``num_repeats``, where there are any, rows of the source that equal an earlier one. Takes O(n² d).
    """
    distinct = {row.tobytes(): row for row in dataset.train + 0.0}
    seen = sum(row.tobytes() in distinct for row in dataset.held_out + 0.0)
    classes = np.unique(dataset.train_labels[dataset.train_labels >= 0])
    means = [dataset.train[dataset.train_labels == label].mean(axis=0) for label in classes]
    norms = np.linalg.norm(dataset.train, axis=1)
    return {
        "name": dataset.name,
        "num_samples": len(dataset.train),
        "num_distinct": len(distinct),
        "num_held_out": len(dataset.held_out),
        "num_held_out_seen": seen,
        "num_classes": len(classes),
        "dim": dataset.train.shape[1],
        "image_shape": dataset.image_shape and list(dataset.image_shape),
        "mean_norm": float(np.linalg.norm(dataset.mean)),
        "norm_min": float(norms.min()),
        "norm_median": float(np.median(norms)),
        "norm_max": float(norms.max()),
        "beta": max_cosine(np.stack(list(distinct.values()))),
        "beta_classes": max_cosine(np.stack(means)) if means else None,
        **({"num_repeats": dataset.num_repeats} if dataset.num_repeats else {}),
    }


def max_cosine(rows: Float[np.ndarray, "n d"], *, block: int = 1024) -> float | None:
    r"""Largest cosine between two of ``rows``, None for fewer than two; a zero row has cosine 0 with all.

    .. math:: \beta = \max_{i \neq j} x_i^\top x_j / \|x_i\| \|x_j\|
    """
    if len(rows) < 2:
        return None
    units = _units(rows)
    largest = -1.0
    for start in range(0, len(rows), block):
        cosines = units[start : start + block] @ units[start:].T
        np.fill_diagonal(cosines, -1.0)
        largest = max(largest, float(cosines.max()))
    return min(largest, 1.0)


def _held_out_count(held_out: Scalar, size: int) -> int:
    if isinstance(held_out, (int, np.integer)) and not isinstance(held_out, bool):
        return check_integer("held_out", held_out, minimum=0, maximum=size - 1)
    check_finite("held_out", held_out)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a count of rows, or a fraction in [0, 1), got {held_out}.")
    return min(round(size * float(held_out)), size - 1)


def _values(source: Source, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
    values = source.rows[rows].astype(float)
    if source.span is None:
        return values
    low, high = source.span
    return 2 * (values - low) / (high - low) - 1


def _mean(train: Any) -> Any:
    if train.shape[0] < 2:
        raise ValueError(
            f"centering needs at least 2 training rows, got {train.shape[0]}: one row less itself is zero."
        )
    return train.mean(axis=0)


def _units(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _greedy(cosines: Float[np.ndarray, "n n"], count: int, bound: float, starts: int) -> list[int]:
    """A set of ``count`` rows with cosines below ``bound``, or the largest set that the search finds."""
    largest: list[int] = []
    for start in range(min(starts, len(cosines))):
        chosen, total, free = [start], cosines[start], cosines[start] < bound
        while len(chosen) < count and free.any():
            chosen.append(int(np.argmax(np.where(free, total, -np.inf))))
            total = total + cosines[chosen[-1]]
            free = free & (cosines[chosen[-1]] < bound)
        largest = max(largest, chosen, key=len)
        if len(largest) == count:
            break
    return largest


def _enough(num_samples: int, available: int, name: str) -> int:
    check_integer("num_samples", num_samples, minimum=1)
    if num_samples > available:
        raise ValueError(
            f"num_samples = {num_samples} is more than the {available} rows of {name!r} to train on; "
            f"ask for at most {available}, hold fewer out, or take a larger source."
        )
    return num_samples


def _with_repeats(
    pool: Int[np.ndarray, " N"], name: str, num_samples: int | None, duplicates: str | tuple[int, int], singles: int
) -> Int[np.ndarray, " n"]:
    check_integer("singles", singles, minimum=0)
    if not duplicates:
        if singles:
            raise ValueError(f"singles = {singles} needs duplicates, as in 20x60; for plain data use num_samples.")
        return pool if num_samples is None else pool[: _enough(num_samples, len(pool), name)]
    count, times = parse_duplicates(duplicates) if isinstance(duplicates, str) else duplicates
    check_integer("rows of duplicates", count, minimum=1)
    check_integer("times of duplicates", times, minimum=1)
    total = count * times + singles
    if num_samples not in (None, total):
        raise ValueError(
            f"num_samples = {num_samples}, but duplicates {count}x{times} and singles {singles} make {total} rows; "
            "leave num_samples out."
        )
    _enough(count + singles, len(pool), name)
    return np.concatenate([np.repeat(pool[:count], times), pool[count : count + singles]])


def _shifted(mixture: GaussianMixture | None, shift: np.ndarray, dtype: DTypeLike) -> GaussianMixture | None:
    if mixture is None:
        return None
    centered = mixture._replace(means=np.asarray(mixture.means, float) - shift[None, :])
    # Without 64-bit types in JAX the distribution is in float32, whatever the dtype of the rows.
    return GaussianMixture(*(jnp.asarray(np.asarray(part), jax.dtypes.canonicalize_dtype(dtype)) for part in centered))
