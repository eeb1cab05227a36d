r"""Which samples are copies of training images, and how many: the ratio test.

.. math:: \frac{\|y - x_{(1)}\|}{\|y - x_{(2)}\|} < \frac13

:math:`x_{(1)}` is the training image nearest to a sample y, :math:`x_{(2)}` the nearest that is another image
:cite:`gu23`. Images that repeat one another would give the ratio 1 and hide every copy, so repeats, and variants of
one image, count as one: equal values are always of one group, others are if ``groups`` says so.
Distances are Euclidean, of raw pixels, in float64 NumPy. Shares come with Wilson's interval :cite:`wilson27`.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from dae_theory.checks import check_finite, check_integer

__all__ = ["RATIO", "Copies", "Share", "copy_share", "find_copies", "group_equal", "wilson_interval"]

RATIO = 1 / 3
"""Of the two distances, below which a sample is a copy."""

BLOCK_BYTES = 1 << 27


class Copies(NamedTuple):
    """For each sample what it is nearest to, and whether it copies that."""

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
    samples: Float[np.ndarray, "n ..."],
    images: Float[np.ndarray, "m ..."],
    *,
    groups: Int[np.ndarray, " k"] | None = None,
    ratio: float = RATIO,
) -> Copies:
    """The ratio test of each sample against the training ``images``, which may repeat.

    ``groups`` numbers images that count as one another, as variants of one; None: only equal ones do. ``ValueError``
    for shapes that do not match, for entries that are not finite, and where all images are of one group: there is no
    second then.
    """
    samples, images = np.asarray(samples), np.asarray(images)
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
        raise ValueError(f"the {len(x)} training images are one image: no other is there to compare distances with.")
    nearest, second = np.empty(len(y), np.int64), np.empty(len(y), np.int64)
    norms, step = np.sum(np.square(x), axis=1), max(1, BLOCK_BYTES // (8 * len(x)))
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        # The samples' own norm does not change which image is nearest.
        squares = norms[None, :] - 2 * (y[part] @ x.T)
        nearest[part] = np.argmin(squares, axis=1)
        squares[group[None, :] == group[nearest[part], None]] = np.inf
        second[part] = np.argmin(squares, axis=1)
    # Anew from differences: what cancels above would be most of the distance of a copy.
    distances = [np.linalg.norm(y - x[index], axis=1) for index in (nearest, second)]
    distance, other = np.minimum(*distances), np.maximum(*distances)
    quotient = distance / other
    return Copies(nearest, distance, other, quotient, quotient < ratio)


def copy_share(copies: Copies, *, level: float = 0.95) -> Share:
    """The share of copies among the samples, with Wilson's interval."""
    count, total = int(np.sum(copies.is_copy)), len(copies.is_copy)
    return Share(count, total, count / total, *wilson_interval(count, total, level=level))


def wilson_interval(count: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    r"""The interval of a probability of which ``count`` of ``total`` draws are successes :cite:`wilson27`.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    The probabilities p from which :math:`\hat p` is at most z standard deviations away; within [0, 1], also where
    count is 0 or total.
    """
    check_integer("total", total, minimum=1)
    check_integer("count", count, minimum=0, maximum=total)
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}.")
    z, share = NormalDist().inv_cdf((1 + level) / 2), count / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the root is exactly what it is subtracted from, up to rounding.
    low = 0.0 if count == 0 else (center - spread) / scale
    return low, 1.0 if count == total else (center + spread) / scale


def group_equal(images: Float[np.ndarray, "m ..."], groups: Int[np.ndarray, " k"] | None = None) -> np.ndarray:
    """A number for each image, the same for images of equal values and for images of one of ``groups``."""
    seen: dict[bytes, int] = {}
    # Adding 0 makes -0 a 0, which it equals.
    equal = np.array([seen.setdefault((row + 0.0).tobytes(), len(seen)) for row in np.asarray(images)])
    if groups is None:
        return equal
    groups = np.asarray(groups)
    if groups.shape != (len(images),):
        raise ValueError(f"groups must number the {len(images)} images, got shape {groups.shape}.")
    joined = np.unique(groups, return_inverse=True)[1].reshape(-1)
    # Equal images may stand in several groups: those are one then, and so on until nothing changes.
    while True:
        before = joined
        for other in (equal, joined):
            lowest = np.full(other.max() + 1, len(images))
            np.minimum.at(lowest, other, joined)
            joined = lowest[other]
        if np.array_equal(before, joined):
            return joined
