r"""How well a score separates two groups of images, and how sure that is.

The area under the ROC curve is

.. math:: \mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

for a positive and a negative image drawn at random; 1/2 is chance. All intervals cover the choice of images: both
groups are taken as independent draws of the images that could have been in them. They do not cover other networks,
seeds of training or prompts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special, stats

__all__ = [
    "Detection",
    "Estimate",
    "auroc",
    "auroc_difference",
    "auroc_interval",
    "detection_rate",
    "proportion_interval",
    "threshold_at",
]


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """``0.984 (0.951 to 0.995)``."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Detection(NamedTuple):
    """What a threshold finds, see :func:`detection_rate`."""

    threshold: float
    """Images whose score lies above it are flagged."""
    flagged_positives: Estimate
    """Share of positives above the threshold."""
    flagged_negatives: Estimate
    """Share of negatives above the threshold, at most the rate asked for."""
    resolution: float
    """The smallest false positive rate above 0 that so many negatives can show."""


def auroc(positives: Float[np.ndarray, "*s n"], negatives: Float[np.ndarray, "*s m"]) -> Float[np.ndarray, "*s"]:
    """The area under the ROC curve of every row of scores; ties count one half.

    ``positives`` are the scores of n images that should be high, ``negatives`` those of m images that should be low.
    The area is the Mann-Whitney statistic divided by n m.

    >>> float(auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])))
    0.875
    """
    pairs = positives.shape[-1] * negatives.shape[-1]
    return np.asarray(stats.mannwhitneyu(positives, negatives, axis=-1).statistic / pairs)


def auroc_interval(
    positives: Float[np.ndarray, " n"], negatives: Float[np.ndarray, " m"], *, level: float = 0.95
) -> Estimate:
    r"""The area under the ROC curve with the interval of DeLong :cite:`delong88`, on the scale of log odds.

    .. math:: \mathrm{logit}\, A \pm z \, \frac{s}{A (1 - A)}, \qquad
              s^2 = \frac{\mathrm{var}_i \, V_i}{n} + \frac{\mathrm{var}_j \, W_j}{m}

    with the placements :math:`V_i` of each positive among the negatives and :math:`W_j` of each negative among the
    positives. If the groups separate completely, s is 0 and tells nothing: the open end is then the smallest (largest)
    area with which k = min(n, m) independent pairs would all be ordered with probability ``1 - level``, which is
    ``(1 - level)**(1/k)``; such an interval is one-sided and covers at least ``level``. ``ValueError`` for groups of
    fewer than two images, and scores that are not finite.
    """
    _check_level(level)
    _check(positives, negatives)
    value = float(auroc(positives, negatives))
    k = min(len(positives), len(negatives))
    if value in (0.0, 1.0):
        bound = (1 - level) ** (1 / k)
        return Estimate(value, bound, 1.0) if value == 1 else Estimate(value, 0.0, 1 - bound)
    error = math.sqrt(_covariance([(positives, negatives)])[0, 0])
    width = float(stats.norm.ppf((1 + level) / 2)) * error / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-width, width]))
    return Estimate(value, float(low), float(high))


def auroc_difference(
    first: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]],
    second: tuple[Float[np.ndarray, " n2"], Float[np.ndarray, " m2"]],
    *,
    level: float = 0.95,
) -> Estimate:
    r"""The area of one score less that of another on the same images, with DeLong's paired interval :cite:`delong88`.

    .. math:: A_1 - A_2 \pm z \sqrt{s_{11} + s_{22} - 2 s_{12}}

    ``first`` and ``second`` are scores of the same positives and the same negatives, in the same order. ``ValueError``
    if their numbers differ. Where the two scores order every pair alike, the interval has no width: such images do not
    tell them apart.
    """
    _check_level(level)
    for scores in (first, second):
        _check(*scores)
    if [len(part) for part in first] != [len(part) for part in second]:
        raise ValueError(
            f"scores of {[len(part) for part in first]} and {[len(part) for part in second]} positives and negatives: "
            "give two scores of the same images."
        )
    value = float(auroc(*first) - auroc(*second))
    s = _covariance([first, second])
    width = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(max(s[0, 0] + s[1, 1] - 2 * s[0, 1], 0.0))
    return Estimate(value, value - width, value + width)


def proportion_interval(count: int, total: int, *, level: float = 0.95) -> Estimate:
    """A share with the exact binomial interval :cite:`clopper34`; one-sided where it is 0 or 1.

    >>> proportion_interval(0, 100).high == 1 - 0.05 ** (1 / 100)
    True
    """
    _check_level(level)
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total}: a share needs 0 <= count <= total and total >= 1.")
    one_sided = count in (0, total)
    tail = (1 - level) if one_sided else (1 - level) / 2
    low = float(stats.beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return Estimate(count / total, low, high)


def threshold_at(negatives: Float[np.ndarray, " m"], false_positive_rate: float) -> float:
    """The smallest threshold above which at most this share of the negatives lies.

    >>> threshold_at(np.arange(100.0), 0.01)
    98.0
    """
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be at least 0 and below 1, got {false_positive_rate}.")
    # Rounding must not take a negative away: .07 * 100 is above 7, .29 * 100 below 29.
    allowed = math.floor(false_positive_rate * len(negatives) * (1 + 1e-12))
    return float(np.sort(negatives)[len(negatives) - 1 - allowed])


def detection_rate(
    positives: Float[np.ndarray, " n"],
    negatives: Float[np.ndarray, " m"],
    *,
    false_positive_rate: float = 0.01,
    level: float = 0.95,
) -> Detection:
    """Which shares of positives and of negatives lie above the threshold of a false positive rate.

    The threshold is that of :func:`threshold_at`, so at most ``false_positive_rate`` of these negatives lie above
    it; their interval says how far the rate of other negatives may be from that. The interval of the positives is that
    of the share above this very threshold; both are :func:`proportion_interval`. With m negatives rates come in steps
    of 1/m, the ``resolution``: below 100 negatives, "at 1 %" means above all of them.
    """
    _check(positives, negatives)
    threshold = threshold_at(negatives, false_positive_rate)
    found, false = (int(np.sum(scores > threshold)) for scores in (positives, negatives))
    return Detection(
        threshold,
        proportion_interval(found, len(positives), level=level),
        proportion_interval(false, len(negatives), level=level),
        1 / len(negatives),
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level}.")


def _check(positives: np.ndarray, negatives: np.ndarray) -> None:
    for name, scores in (("positives", positives), ("negatives", negatives)):
        if scores.ndim != 1 or len(scores) < 2:
            raise ValueError(f"{name} has shape {scores.shape}: give the scores of at least two images, as (n,).")
        if not np.isfinite(scores).all():
            raise ValueError(f"{int(np.sum(~np.isfinite(scores)))} of {len(scores)} {name} are not finite: omit them.")


def _covariance(scores: list[tuple[np.ndarray, np.ndarray]]) -> Float[np.ndarray, "k k"]:
    """DeLong's covariance of the areas of k scores of the same images."""
    of_positives, of_negatives = zip(*(_placements(*pair) for pair in scores), strict=True)
    n, m = len(of_positives[0]), len(of_negatives[0])
    return np.atleast_2d(np.cov(np.stack(of_positives))) / n + np.atleast_2d(np.cov(np.stack(of_negatives))) / m


def _placements(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of negatives below each positive, and of positives above each negative; ties count one half."""

    def below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
        others = np.sort(others)
        sides = [np.searchsorted(others, scores, side) for side in ("left", "right")]
        return np.mean(sides, axis=0) / len(others)

    return below(positives, negatives), 1 - below(negatives, positives)
