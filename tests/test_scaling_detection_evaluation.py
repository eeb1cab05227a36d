"""Areas, rates and their intervals: against scikit-learn and pairs in loops, and covering what they say."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from scaling import detection
from scaling.detection import evaluation


def scores(seed=0, n=30, m=40, shift=1.0, decimals=1):
    """Two groups with ties."""
    random = np.random.default_rng(seed)
    return np.round(random.normal(size=n) + shift, decimals), np.round(random.normal(size=m), decimals)


def roc(positives, negatives):
    labels = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    return metrics.roc_curve(labels, np.r_[positives, negatives], drop_intermediate=False)


def test_the_area_is_that_of_scikit_learn_and_of_its_mirror_image():
    positives, negatives = scores()
    labels = np.r_[np.ones(30), np.zeros(40)]
    expected = metrics.roc_auc_score(labels, np.r_[positives, negatives])
    value = detection.auroc_interval(positives, negatives).value
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(detection.auroc(-positives, -negatives), 1 - value, rtol=1e-12)
    np.testing.assert_allclose(detection.auroc(np.exp(positives), np.exp(negatives)), value, rtol=1e-12)


def test_delongs_covariance_is_that_of_pairs_in_loops():
    """Placements by their definition, over all pairs, of two scores of the same images."""
    pairs = [scores(0), scores(1, shift=0.3)]
    kernel = [[[(a > b) + 0.5 * (a == b) for b in negatives] for a in positives] for positives, negatives in pairs]
    placements = [(np.mean(k, axis=1), np.mean(k, axis=0)) for k in kernel]
    expected = [[np.cov(v, w)[0, 1] / 30 + np.cov(x, y)[0, 1] / 40 for w, y in placements] for v, x in placements]
    np.testing.assert_allclose(evaluation._covariance(pairs), expected, rtol=1e-10)
    low, high = detection.auroc_interval(*pairs[0])[1:]
    value, error = detection.auroc_interval(*pairs[0]).value, np.sqrt(expected[0][0])
    odds = np.log(np.array([low, high]) / (1 - np.array([low, high])))
    np.testing.assert_allclose(np.ptp(odds), 2 * 1.959964 * error / (value * (1 - value)), rtol=1e-6)


def covered(interval_of, truth, repeats=1000):
    """How often an interval holds the truth, over data sets."""
    intervals = [interval_of(np.random.default_rng([7, seed])) for seed in range(repeats)]
    return np.mean([low <= truth <= high for _, low, high in intervals])


@pytest.mark.parametrize(
    ("n", "m", "shift"),
    [
        (40, 60, 1.5),
        pytest.param(40, 60, 0.0, marks=pytest.mark.slow),
        pytest.param(20, 200, 1.0, marks=pytest.mark.slow),
    ],
)
def test_intervals_of_areas_cover(n, m, shift):
    """Normal scores: the area is Phi(shift / sqrt 2). 1,000 repeats have a standard error of .007."""
    truth = stats.norm.cdf(shift / np.sqrt(2))

    def interval(random):
        return detection.auroc_interval(random.normal(size=n) + shift, random.normal(size=m))

    assert 0.93 <= covered(interval, truth) <= 0.97


def test_intervals_of_separated_scores_cover_at_least_what_they_say():
    """At an area of .99 and 20 images a group, most draws separate; the bound then has to do it alone."""
    shift = np.sqrt(2) * stats.norm.ppf(0.99)

    def interval(random):
        return detection.auroc_interval(random.normal(size=20) + shift, random.normal(size=20))

    assert covered(interval, 0.99) >= 0.94
    assert detection.auroc_interval(np.arange(20.0) + 99, np.arange(20.0)) == (1.0, 0.05 ** (1 / 20), 1.0)
    assert detection.auroc_interval(np.arange(20.0), np.arange(20.0) + 99) == (0.0, 0.0, 1 - 0.05 ** (1 / 20))


def draw_pair(random, n=50):
    """Two scores that share most of their noise."""
    base = [random.normal(size=n) + 1, random.normal(size=n)]
    return [tuple(part + 0.5 * random.normal(size=n) * k for part in base) for k in (1, 2)]


@pytest.mark.slow
def test_paired_differences_cover():
    truth = stats.norm.cdf(1 / np.sqrt(2 * 1.25)) - stats.norm.cdf(1 / np.sqrt(2 * 2))
    assert 0.93 <= covered(lambda random: detection.auroc_difference(*draw_pair(random)), truth) <= 0.97


def test_paired_differences_are_narrower_than_unpaired_ones():
    first, second = draw_pair(np.random.default_rng(0))
    paired = detection.auroc_difference(first, second)
    shuffled = tuple(np.random.default_rng(1).permutation(part) for part in second)
    unpaired = detection.auroc_difference(first, shuffled)
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)
    np.testing.assert_allclose(detection.auroc_difference(first, first), 0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.3])
def test_rates_are_points_of_the_roc_curve(rate):
    """The last point of scikit-learn's curve whose false positive rate is allowed."""
    positives, negatives = scores(3, n=80, m=100)
    false, true, _ = roc(positives, negatives)
    found = detection.detection_rate(positives, negatives, false_positive_rate=rate)
    allowed = np.flatnonzero(false <= rate + 1e-12)[-1]
    assert found.flagged_negatives.value == false[allowed]
    assert found.flagged_positives.value == true[allowed]
    assert found.resolution == 0.01


@pytest.mark.parametrize("rate", [k / 100 for k in range(100)])
def test_rates_that_are_no_binary_fractions_allow_what_they_say(rate):
    negatives = np.arange(100.0)
    assert np.sum(negatives > detection.threshold_at(negatives, rate)) == round(100 * rate)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_intervals_of_shares_cover_at_least_what_they_say(share):
    """Summed exactly over all counts."""
    total = 40
    intervals = [detection.proportion_interval(count, total) for count in range(total + 1)]
    inside = [low <= share <= high for _, low, high in intervals]
    assert stats.binom.pmf(np.arange(total + 1), total, share)[inside].sum() >= 0.925
    two_sided = intervals[1:-1]
    expected = [stats.binomtest(count, total).proportion_ci() for count in range(1, total)]
    np.testing.assert_allclose([row[1:] for row in two_sided], expected, rtol=1e-8)


def test_a_threshold_on_too_few_negatives_says_how_little_it_knows():
    found = detection.detection_rate(np.full(5, 9.0), np.arange(8.0))
    assert found.flagged_negatives.value == 0
    assert found.flagged_negatives.high == pytest.approx(1 - 0.05 ** (1 / 8))
    assert found.flagged_positives == (1.0, pytest.approx(0.05 ** (1 / 5)), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detection.auroc_interval(np.zeros(1), np.zeros(3)), "positives has shape"),
        (lambda: detection.auroc_interval(np.zeros(3), np.array([1.0, np.nan])), "1 of 2 negatives are not finite"),
        (lambda: detection.auroc_interval(np.zeros(3), np.zeros(3), level=9.5), "level must lie between 0 and 1"),
        (lambda: detection.auroc_difference(scores(n=5), scores(n=6)), "two scores of the same images"),
        (lambda: detection.threshold_at(np.zeros(3), 1.0), "false_positive_rate must be"),
        (lambda: detection.proportion_interval(4, 3), "4 of 3"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
