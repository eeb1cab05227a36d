r"""How well a score separates two groups of images, and how sure that is.

The area under the ROC curve is

.. math:: \mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

for a positive and a negative image drawn at random; 1/2 is chance. Intervals cover the choice of images: both groups
are taken as independent draws of the images that could have been in them. Those of :func:`auroc_over_seeds` and, with
several rows, of :func:`auroc_bootstrap` also cover the choice of seeds: of networks trained anew, or of noise.
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
    "auroc_bootstrap",
    "auroc_difference",
    "auroc_interval",
    "auroc_over_seeds",
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


def auroc_over_seeds(
    positives: Float[np.ndarray, "s n"], negatives: Float[np.ndarray, "r m"], *, level: float = 0.95
) -> Estimate:
    r"""The mean area over seeds, with an interval over seeds and images; the same images under every seed.

    .. math:: \mathrm{logit}\, \bar A \pm t_\nu \, \frac{\sqrt{u + v}}{\bar A (1 - \bar A)}, \qquad
              u = \frac{\mathrm{var}_k A_k}{s}, \qquad
              v = \frac{\mathrm{var}_i \bar V_i}{n} + \frac{\mathrm{var}_j \bar W_j}{m}, \qquad
              \nu = \frac{(u + v)^2}{\frac{u^2}{s - 1} + \frac{v^2}{\min(n, m) - 1}}

    with DeLong's placements :cite:`delong88` averaged over seeds. What seeds and images do together counts in both u
    and v, so that the interval is rather too wide. Simulated with 20 and 50 images, it covers the mean area over seeds
    in 95 to 99 of 100 cases from three seeds on, and in 92 where three seeds differ far more than images. If every seed
    separates the groups completely, the bound is that of min(s, n, m) independent pairs, as in :func:`auroc_interval`.
    ``ValueError`` for one seed, other numbers of seeds, and as there.
    """
    _check_level(level)
    seeds = len(positives)
    if seeds < 2 or len(negatives) != seeds:
        raise ValueError(f"{seeds} and {len(negatives)} seeds: give scores of the same two or more for both groups.")
    for pair in zip(positives, negatives, strict=True):
        _check(*pair)
    areas = auroc(positives, negatives)
    value = float(areas.mean())
    k = min(seeds, positives.shape[1], negatives.shape[1])
    if value in (0.0, 1.0):
        bound = (1 - level) ** (1 / k)
        return Estimate(value, bound, 1.0) if value == 1 else Estimate(value, 0.0, 1 - bound)
    each = [_placements(*pair) for pair in zip(positives, negatives, strict=True)]
    sides = [np.mean(side, axis=0) for side in zip(*each, strict=True)]
    u = float(np.var(areas, ddof=1)) / seeds
    v = sum(float(np.var(side, ddof=1)) / len(side) for side in sides)
    freedom = (u + v) ** 2 / (u**2 / (seeds - 1) + v**2 / (min(map(len, sides)) - 1))
    width = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(u + v) / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-width, width]))
    return Estimate(value, float(low), float(high))


def auroc_bootstrap(
    positives: Float[np.ndarray, "*s n"],
    negatives: Float[np.ndarray, "*r m"],
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """The area under the ROC curve, or its mean over rows of seeds, with the percentile bootstrap.

    Images of both groups, and seeds if there are several rows, are drawn again with replacement, the same images for
    every seed. With one row it covers about what :func:`auroc_interval` covers; where the groups separate it has no
    width. With three seeds that differ more than images it covers less than 88 of 100: a check of
    :func:`auroc_over_seeds`, not a substitute. ``ValueError`` as there.
    """
    _check_level(level)
    rows = [np.atleast_2d(scores) for scores in (positives, negatives)]
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"{len(rows[0])} and {len(rows[1])} seeds: give scores of the same for both groups.")
    for pair in zip(*rows, strict=True):
        _check(*pair)
    random = np.random.default_rng(seed)
    # Drawing again is weighting rows, positives and negatives of the kernel by how often each was drawn.
    pairs = rows[0][:, :, None] - rows[1][:, None, :]
    kernel = np.where(pairs == 0, 0.5, pairs > 0)
    weights = [random.multinomial(k, np.full(k, 1 / k), size=resamples) / k for k in kernel.shape]
    areas = np.asarray(
        [np.einsum("s,sij,i,j", w[0], kernel, *w[1:], optimize=True) for w in zip(*weights, strict=True)]
    )
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(np.mean(auroc(*rows))), float(low), float(high))


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
