r"""Nearest neighbors among many images, exact, by blocks in bounded memory.

.. math:: \|y - x_i\|^2 = \|y\|^2 - 2 \langle y, x_i \rangle + \|x_i\|^2

A block's squared distances are one product of matrices in float32; the nearest candidates are kept, and their distances
computed again in float64 from differences, since the products lose those of near copies to cancellation. Candidates
that lie equally far, to float32's rounding of the norms, may be left out for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int

from dae_theory.checks import check_integer

__all__ = [
    "BLOCK_BYTES",
    "Images",
    "Nearest",
    "Training",
    "blocks",
    "nearest_images",
    "nearest_two",
    "of_array",
    "rows_of",
    "within",
]

BLOCK_BYTES = 1 << 27
"""Memory of a block of images and of its distances, about."""

CANDIDATES = 8
"""Neighbors that are looked at first where repeats of the nearest image are passed over."""


class Images(NamedTuple):
    """Rows that may be too many for the memory, read by blocks."""

    read: Callable[[int, int], Float32[np.ndarray, "k d"]]
    """The rows from a number up to another, flat, in float32."""
    count: int
    dim: int


class Training(NamedTuple):
    """A training set of images in [-1, 1]."""

    images: Images
    shape: tuple[int, int, int]
    """Of an image: (c, h, w)."""
    name: Callable[[int], str]
    """From the number of an image to its file or row."""
    digest: str


class Nearest(NamedTuple):
    """For each query the nearest image, and the nearest one that is another image."""

    nearest: Int[np.ndarray, " q"]
    distance: Float64[np.ndarray, " q"]
    other: Int[np.ndarray, " q"]
    """-1 if all images are repeats of the nearest one."""
    other_distance: Float64[np.ndarray, " q"]
    """Infinite likewise."""


def of_array(rows: Float32[np.ndarray, "n ..."]) -> Images:
    """Images in memory."""
    flat = rows.reshape(len(rows), -1)
    return Images(lambda start, stop: flat[start:stop], len(flat), flat.shape[1])


def rows_of(images: Images, numbers: Sequence[int]) -> Float32[np.ndarray, "k d"]:
    """The images of these numbers, perhaps none, as rows."""
    return np.concatenate([images.read(0, 0), *(images.read(number, number + 1) for number in numbers)])


def nearest_images(
    queries: Float32[np.ndarray, "q d"], images: Images, *, k: int = 1, block_bytes: int = BLOCK_BYTES
) -> tuple[Int[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """Numbers and Euclidean distances of the ``k`` images nearest to each query, nearest first.

    Of equal distances the lower number goes first. ``ValueError`` for queries of another length, values that are not
    finite, and ``k`` above the number of images.

    >>> rows = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    >>> nearest_images(np.zeros((1, 2), np.float32), of_array(rows), k=2)
    (array([[0, 1]]), array([[0., 5.]]))
    """
    _check(queries, images)
    check_integer("k", k, minimum=1, maximum=images.count)
    best = np.full((len(queries), 0), np.inf, np.float32)
    numbers = np.zeros((len(queries), 0), np.int64)
    for start, block in blocks(images, len(queries), block_bytes):
        squares = queries @ block.T
        squares *= -2
        squares += np.einsum("ij,ij->i", block, block)[None, :]
        few = min(k, len(block))
        # Copies of one image have equal distances: which of them are kept makes no difference to their distance.
        part = squares.argmin(axis=1)[:, None] if few == 1 else np.argpartition(squares, few - 1, axis=1)[:, :few]
        best = np.concatenate([best, np.take_along_axis(squares, part, axis=1)], axis=1)
        numbers = np.concatenate([numbers, part + start], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :k]
        best, numbers = (np.take_along_axis(each, order, axis=1) for each in (best, numbers))
    distances = np.empty(numbers.shape)
    for i, query in enumerate(queries.astype(np.float64)):
        rows = rows_of(images, numbers[i].tolist()).astype(np.float64)
        distances[i] = np.linalg.norm(rows - query, axis=1)
    order = np.lexsort((numbers, distances), axis=1)
    return np.take_along_axis(numbers, order, axis=1), np.take_along_axis(distances, order, axis=1)


def nearest_two(
    queries: Float32[np.ndarray, "q d"],
    images: Images,
    radius: float,
    *,
    variants: int = 1,
    block_bytes: int = BLOCK_BYTES,
) -> Nearest:
    """The nearest image, and the nearest at a distance above ``radius`` from that one: closer ones are repeats of it.

    The ratio of the two distances is that of :mod:`scaling.measures.copies`, for training sets with near duplicates.
    With ``variants`` above 1, n images have that many rows each, such as their mirror images: row i + kn is variant k
    of image i, numbers are those of images, and what lies within ``radius`` of any variant of the nearest image is a
    repeat of it. ``ValueError`` unless ``variants`` divides the number of rows.
    """
    step, rest = divmod(images.count, check_integer("variants", variants, minimum=1))
    if rest:
        raise ValueError(f"{images.count} rows are no {variants} variants of equally many images.")
    count = len(queries)
    nearest, other = np.zeros(count, np.int64), np.full(count, -1)
    distance, other_distance = np.zeros(count), np.full(count, np.inf)
    left, k = np.arange(count), min(CANDIDATES, images.count)
    while len(left):
        numbers, distances = nearest_images(queries[left], images, k=k, block_bytes=block_bytes)
        missed = []
        for i, row, lengths in zip(left.tolist(), numbers, distances, strict=True):
            nearest[i], distance[i] = row[0], lengths[0]
            rows = rows_of(images, row.tolist()).astype(np.float64)
            own = rows_of(images, [(int(row[0]) + k * step) % images.count for k in range(variants)])
            gaps = np.linalg.norm(rows[:, None] - own[None].astype(np.float64), axis=2).min(axis=1)
            apart = np.flatnonzero(gaps > radius)
            if len(apart):
                other[i], other_distance[i] = row[apart[0]], lengths[apart[0]]
            else:
                missed.append(i)
        if k == images.count:
            break
        # An image that repeats more often than there were candidates: ask for more of them.
        left, k = np.asarray(missed, np.int64), min(8 * k, images.count)
    return Nearest(nearest % step, distance, np.where(other < 0, other, other % step), other_distance)


def within(
    queries: Float32[np.ndarray, "q d"], images: Images, radius: float, *, block_bytes: int = BLOCK_BYTES
) -> list[tuple[Int[np.ndarray, " r"], Float64[np.ndarray, " r"]]]:
    """For each query the numbers of all images at most ``radius`` away, in order, and their distances."""
    _check(queries, images)
    found: list[list[tuple[int, float]]] = [[] for _ in queries]
    lengths = np.sum(np.square(queries), axis=1)[:, None]
    for start, block in blocks(images, len(queries), block_bytes):
        norms = np.sum(np.square(block), axis=1)[None, :]
        squares = norms + lengths - 2 * (queries @ block.T)
        # Rounding of the products, for which the exact distance decides.
        slack = 1e-5 * (norms + lengths)
        for i, j in zip(*np.nonzero(squares <= radius * radius + slack), strict=True):
            exact = float(np.linalg.norm(queries[i].astype(np.float64) - block[j].astype(np.float64)))
            if exact <= radius:
                found[i].append((start + int(j), exact))
    return [
        (np.array([j for j, _ in each], np.int64), np.array([length for _, length in each], float)) for each in found
    ]


def _check(queries: np.ndarray, images: Images) -> None:
    if queries.shape[1] != images.dim:
        raise ValueError(f"queries have {queries.shape[1]} numbers, images {images.dim}: give images of one size.")
    if not np.isfinite(queries).all():
        raise ValueError("queries hold values that are not finite: leave them out.")


def blocks(images: Images, queries: int, block_bytes: int) -> Iterator[tuple[int, Float32[np.ndarray, "k d"]]]:
    """Blocks of images with the number of the first, such that a block and its distances to queries fit the memory.

    ``ValueError`` for values that are not finite.
    """
    size = max(1, block_bytes // (4 * (images.dim + queries)))
    for start in range(0, images.count, size):
        block = images.read(start, min(start + size, images.count))
        if not np.isfinite(block).all():
            raise ValueError(f"images {start} to {start + len(block) - 1} hold values that are not finite.")
        yield start, block
