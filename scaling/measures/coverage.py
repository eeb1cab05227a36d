r"""How well the rest of a training set covers one of its images, seen through noise: from the data alone.

.. math:: c_j(\sigma) = \sum_{i \ne j} \exp\left(-\frac{\|x_i - x_j\|^2}{2 \sigma^2}\right)

Given the noiseless image :math:`x_j`, the empirical posterior (:func:`dae_theory.denoisers.empirical_denoiser`) has the
weight :math:`w_j = 1/(1 + c_j)` on it. Where :math:`c_j \ll 1` nothing else in the data competes with the image at this
noise, and a network that fits the data exactly returns it. The criterion "memorized while :math:`c_j \ll 1`" is that of
Merger and Goldt (arXiv 2606.14390), whose formula we know second-hand; the identity holds in any case.

As σ → 0, c_j tends to the number of exact repeats of the image, and as σ → ∞ to n - 1. **Every exact repeat adds 1**:
an image that stands twice has c_j >= 1, although repeats make memorization easier, for they cover it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from scipy.special import logsumexp

from dae_theory.checks import check_integer, check_positive
from scaling.measures.neighbors import BLOCK_BYTES, Images, blocks, rows_of

__all__ = ["local_coverage", "log_coverage"]

CLOSE = 1e-3
"""Squared distances below this part of the squared lengths are computed again from differences."""


def local_coverage(
    images: Images, sigma: float, rows: Sequence[int] | None = None, *, block_bytes: int = BLOCK_BYTES
) -> Float64[np.ndarray, " k"]:
    """The coverage c_j(σ), from 0 to n - 1, of the images numbered ``rows``, by default of all; see the module.

    Below about 1e-308 it is 0; its logarithm (:func:`log_coverage`) is not.

    >>> from scaling.measures.neighbors import of_array
    >>> images = of_array(np.array([[0.0], [0.0], [3.0]], np.float32))
    >>> local_coverage(images, 1.0).round(3).tolist()
    [1.011, 1.011, 0.022]
    """
    return np.exp(log_coverage(images, sigma, rows, block_bytes=block_bytes))


def log_coverage(
    images: Images, sigma: float, rows: Sequence[int] | None = None, *, block_bytes: int = BLOCK_BYTES
) -> Float64[np.ndarray, " k"]:
    """``ln c_j(σ)``; minus infinity for a single image.

    Distances are float64, and those of near repeats come from differences, so that repeats are at exactly 0. Memory is
    about ``block_bytes``, whatever the number of images and of ``rows``. ``ValueError`` for numbers that no image has,
    σ that is not positive, and values that are not finite.
    """
    check_positive("sigma", sigma)
    for row in () if rows is None else rows:
        check_integer("rows", row, minimum=0, maximum=images.count - 1)
    numbers = np.arange(images.count) if rows is None else np.asarray(rows, np.int64)
    # Queries and blocks are kept in float64 beside their distances.
    step, share = max(1, block_bytes // (16 * images.dim)), block_bytes // 6
    found = np.full(len(numbers), -np.inf)
    for first in range(0, len(numbers), step):
        own = numbers[first : first + step]
        consecutive = rows is None
        read = images.read(first, first + len(own)) if consecutive else rows_of(images, own.tolist())
        queries = read.astype(np.float64)
        total = found[first : first + step]
        for start, block in blocks(images, len(own), share):
            squares = _squared_distances(queries, block.astype(np.float64))
            inside = np.flatnonzero((own >= start) & (own < start + len(block)))
            squares[inside, own[inside] - start] = np.inf
            # Divided twice: σ² may underflow. What overflows is as far as can be.
            with np.errstate(over="ignore"):
                exponents = -0.5 * squares / sigma / sigma
            total[:] = np.logaddexp(total, logsumexp(exponents, axis=1))
    return found


def _squared_distances(
    queries: Float64[np.ndarray, "k d"], block: Float64[np.ndarray, "b d"]
) -> Float64[np.ndarray, "k b"]:
    lengths = np.sum(np.square(queries), axis=1)[:, None] + np.sum(np.square(block), axis=1)[None, :]
    squares = np.maximum(lengths - 2 * (queries @ block.T), 0)
    close = squares < CLOSE * lengths
    for i in np.flatnonzero(close.any(axis=1)):
        these = np.flatnonzero(close[i])
        squares[i, these] = np.sum(np.square(block[these] - queries[i]), axis=1)
    return squares
