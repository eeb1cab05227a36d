r"""Which samples are copies of training images, and how many: the ratio test.

.. math:: \frac{\|y - x_{(1)}\|}{\|y - x_{(2)}\|} < \frac13

:math:`x_{(1)}` is the training image nearest to a sample y, :math:`x_{(2)}` the nearest one that is another image
:cite:`gu23`. Images that repeat one another would give the ratio 1 and hide every copy. So repeats of an image count as
one image, and so do its variants, if ``groups`` numbers them. Distances are Euclidean, between raw pixels, in float64
NumPy. Shares among the samples of one network come with Wilson's interval :cite:`wilson27`, those over several networks
with one that counts networks, not samples, as independent (:func:`share_over_networks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num
from scipy import sparse, stats
from scipy.sparse import csgraph

from dae_theory.checks import check_finite, check_integer
from sims.data.datasets import first_of_equal

__all__ = [
    "RATIO",
    "Copies",
    "Share",
    "copy_share",
    "find_copies",
    "group_equal",
    "share_over_networks",
    "wilson_interval",
]

RATIO = 1 / 3
"""A sample is a copy if the ratio of its two distances is below this."""

BLOCK_BYTES = 1 << 27
"""Memory of the matrix of distances, which is computed block by block."""


class Copies(NamedTuple):
    """For each sample the nearest training image, and whether the sample is a copy of it."""

    nearest: Int[np.ndarray, " n"]
    """Index of the nearest training image."""
    distance: Float64[np.ndarray, " n"]
    second: Float64[np.ndarray, " n"]
    """Distance of the nearest image of another group."""
    ratio: Float64[np.ndarray, " n"]
    """``distance / second``, between 0 and 1."""
    is_copy: Bool[np.ndarray, " n"]


class Share(NamedTuple):
    """A share of ``total`` with its interval."""

    count: int
    total: int
    share: float
    low: float
    high: float


def find_copies(
    samples: Num[np.ndarray, "n ..."],
    images: Num[np.ndarray, "m ..."],
    *,
    groups: Int[np.ndarray, " k"] | None = None,
    ratio: float = RATIO,
) -> Copies:
    """The ratio test of each sample against the training ``images``, which may repeat.

    Images with equal numbers in ``groups`` count as one image; without ``groups``, only equal images do. ``ValueError``
    for shapes that do not match, for entries that are not finite, and if all images count as one, for then there is no
    second distance.

    >>> images = np.array([[0.0, 0.0], [4.0, 0.0]])
    >>> find_copies(np.array([[0.5, 0.0], [1.5, 0.0]]), images).is_copy.tolist()
    [True, False]
    """
    samples, images = np.asarray(samples), np.asarray(images)
    if (samples.dtype == np.uint8) != (images.dtype == np.uint8):
        raise ValueError(
            f"samples are {samples.dtype} and images {images.dtype}: bytes from 0 to 255 and values in [-1, 1] are not "
            "of one scale; convert the bytes, as in images / 127.5 - 1."
        )
    if samples.shape[1:] != images.shape[1:] or not len(samples):
        raise ValueError(
            f"samples of shape {samples.shape} cannot be compared with images of shape {images.shape}: give at least "
            "one of the images' own shape."
        )
    check_finite("samples", samples)
    check_finite("images", images)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), got {ratio}.")
    x, y = (values.reshape(len(values), -1).astype(np.float64) for values in (images, samples))
    group = group_equal(x, groups)
    if not np.any(group != group[:1]):
        raise ValueError(
            f"the {len(x)} training images are one image: the ratio test needs the distance to another one as well."
        )
    nearest, second = np.empty(len(y), np.int64), np.empty(len(y), np.int64)
    norms, step = np.sum(np.square(x), axis=1), max(1, BLOCK_BYTES // (8 * len(x)))
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        # The samples' own norm does not change which image is nearest.
        squares = norms[None, :] - 2 * (y[part] @ x.T)
        nearest[part] = np.argmin(squares, axis=1)
        squares[group[None, :] == group[nearest[part], None]] = np.inf
        second[part] = np.argmin(squares, axis=1)
    # Again from differences: above, cancellation would leave little of the distance of a copy.
    distances = [np.linalg.norm(y - x[index], axis=1) for index in (nearest, second)]
    distance, other = np.minimum(*distances), np.maximum(*distances)
    quotient = distance / other
    return Copies(nearest, distance, other, quotient, quotient < ratio)


def copy_share(copies: Copies, *, level: float = 0.95) -> Share:
    """The share of copies among the samples, with Wilson's interval.

    >>> images = np.array([[0.0, 0.0], [4.0, 0.0]])
    >>> share = copy_share(find_copies(np.array([[0.5, 0.0], [1.5, 0.0]]), images))
    >>> share.count, share.share, round(share.low, 3), round(share.high, 3)
    (1, 0.5, 0.095, 0.905)
    """
    count, total = int(np.sum(copies.is_copy)), len(copies.is_copy)
    return Share(count, total, count / total, *wilson_interval(count, total, level=level))


def wilson_interval(count: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    r"""The interval of a probability of which ``count`` of ``total`` draws are successes :cite:`wilson27`.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    It holds the probabilities from which :math:`\hat p` is at most z standard deviations away, and lies in [0, 1].
    """
    check_integer("total", total, minimum=1)
    check_integer("count", count, minimum=0, maximum=total)
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}.")
    interval = stats.binomtest(count, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def share_over_networks(counts: Sequence[int], totals: Sequence[int], *, level: float = 0.95) -> Share:
    r"""The share over several networks, with an interval that covers networks and samples together.

    .. math:: \bar p \pm t_{k-1} \sqrt{s^2/k}, \qquad
              s^2 = \max\Bigl(\frac{1}{k-1} \sum_i (p_i - \bar p)^2, \; \frac{\tilde p (1 - \tilde p)}{m}\Bigr)

    for the shares :math:`p_i` of k networks with m samples each, cut to [0, 1]. Samples of one network are not
    independent draws from all networks, so they count as one cluster. The floor, with :math:`\tilde p` Wilson's center,
    is the spread of samples alone: equal shares, such as zeros, do not claim certainty. In simulations with three
    networks of 200 samples the 95 % interval covers 0.94 to 0.97 at a mean share of 0.35 with spreads up to 0.2, 0.96
    at 0.1 with 0.05, and 0.89 at 0.02 with 0.025; Wilson's interval of all samples together covers 0.25 to 0.54 there.
    One network has Wilson's interval, which covers its samples only.

    >>> share = share_over_networks([20, 27, 32], [200, 200, 200])
    >>> round(share.share, 3), round(share.low, 3), round(share.high, 3)
    (0.132, 0.057, 0.207)

    Args:
        counts: successes of each network.
        totals: samples of each network.
        level: coverage of the interval, in (0, 1).
    """
    if len(counts) != len(totals) or not counts:
        raise ValueError(f"counts and totals must be of the same networks, got {len(counts)} and {len(totals)}.")
    for count, total in zip(counts, totals, strict=True):
        check_integer("total", total, minimum=1)
        check_integer("count", count, minimum=0, maximum=total)
    count, total, num = int(sum(counts)), int(sum(totals)), len(counts)
    if num == 1:
        return Share(count, total, count / total, *wilson_interval(count, total, level=level))
    shares = np.asarray(counts, float) / np.asarray(totals)
    quantile = stats.t.ppf((1 + level) / 2, num - 1)
    center = (count + 2) / (total + 4)
    spread = max(float(shares.var(ddof=1)), center * (1 - center) * num / total)
    reach = float(quantile) * np.sqrt(spread / num)
    mean = float(shares.mean())
    return Share(count, total, mean, max(0.0, mean - reach), min(1.0, mean + reach))


def group_equal(images: Float[np.ndarray, "m ..."], groups: Int[np.ndarray, " k"] | None = None) -> np.ndarray:
    """A number for each image, the same for equal images and for images with the same number in ``groups``."""
    flat = np.asarray(images).reshape(len(images), -1)
    equal = np.unique(first_of_equal(flat), return_inverse=True)[1]
    if groups is None:
        return equal
    groups = np.asarray(groups)
    if groups.shape != (len(images),):
        raise ValueError(f"groups must number the {len(images)} images, got shape {groups.shape}.")
    # Equal images may have different numbers in groups: both numberings are edges between images and numbers.
    numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
    count, items = len(equal), np.arange(len(equal))
    ends = np.concatenate([count + equal, count + equal.max() + 1 + numbers])
    size = ends.max() + 1
    edges = sparse.coo_array((np.ones(2 * count, bool), (np.tile(items, 2), ends)), shape=(size, size))
    return csgraph.connected_components(edges, directed=False)[1][:count]
