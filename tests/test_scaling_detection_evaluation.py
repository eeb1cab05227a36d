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


def over_seeds(random, seeds, spread, common, shift, n=20, m=50):
    """Scores of the same images under several seeds, and the mean area over seeds and images."""
    own = random.normal(size=(seeds, 1)) * spread
    positives = shift + own + common * random.normal(size=n) + random.normal(size=(seeds, n))
    return positives, common * random.normal(size=m) + random.normal(size=(seeds, m))


def mean_area(spread, common, shift):
    """The mean of Phi((shift + spread z) / sqrt(2 + 2 common^2)) over z, which is a Phi of its own."""
    return stats.norm.cdf(shift / np.sqrt(2 + 2 * common**2 + spread**2))


@pytest.mark.parametrize(
    ("seeds", "spread", "common", "shift"),
    [
        (3, 0.5, 0.7, 1.5),
        pytest.param(3, 1.5, 0.1, 1.5, marks=pytest.mark.slow),
        pytest.param(3, 0.0, 0.7, 1.5, marks=pytest.mark.slow),
        pytest.param(5, 0.5, 0.3, 2.5, marks=pytest.mark.slow),
        pytest.param(10, 0.5, 0.7, 1.5, marks=pytest.mark.slow),
    ],
)
def test_intervals_over_seeds_cover(seeds, spread, common, shift):
    """400 repeats have a standard error of .011 to .014. The interval may be too wide; where three seeds differ far
    more than images it covers .92, of which this allows three standard errors."""

    def interval(random):
        return detection.auroc_over_seeds(*over_seeds(random, seeds, spread, common, shift))

    least = 0.88 if spread > 1 else 0.92
    assert covered(interval, mean_area(spread, common, shift), repeats=400) >= least


def test_seeds_that_agree_leave_the_images():
    """With equal rows only images vary: DeLong's interval, with Student's quantile of the smaller group."""
    positives, negatives = scores()
    found = detection.auroc_over_seeds(np.stack([positives] * 4), np.stack([negatives] * 4))
    alone = detection.auroc_interval(positives, negatives)
    assert found.value == pytest.approx(alone.value, rel=1e-12)
    odds = [np.ptp(np.log([e.low / (1 - e.low), e.high / (1 - e.high)])) for e in (found, alone)]
    assert odds[0] / odds[1] == pytest.approx(stats.t.ppf(0.975, 29) / stats.norm.ppf(0.975), rel=1e-9)
    apart = detection.auroc_over_seeds(np.ones((3, 9)), np.zeros((3, 9)))
    assert apart == (1.0, pytest.approx(0.05 ** (1 / 3)), 1.0)


def test_the_bootstrap_agrees_with_delong():
    """Its standard error is DeLong's, of which 1,000 draws know 2.2 %; ends of percentiles differ by some more."""
    positives, negatives = scores(n=60, m=80)
    delong, found = (each(positives, negatives) for each in (detection.auroc_interval, detection.auroc_bootstrap))
    assert found.value == pytest.approx(delong.value, rel=1e-12)
    assert (found.high - found.low) / (delong.high - delong.low) == pytest.approx(1, abs=0.12)
    assert detection.auroc_bootstrap(positives, negatives, seed=1) != found
    np.testing.assert_array_equal(detection.auroc_bootstrap(np.ones(5), np.zeros(5)), 1)


@pytest.mark.slow
def test_the_bootstrap_covers_with_one_row_and_not_with_three_that_differ():
    """300 repeats have standard errors of .013 and .025."""
    truth = mean_area(0.0, 0.0, 1.0)

    def one(random):
        return detection.auroc_bootstrap(random.normal(size=40) + 1, random.normal(size=60), resamples=400)

    assert 0.9 <= covered(one, truth, repeats=300) <= 0.98

    def three(random):
        return detection.auroc_bootstrap(*over_seeds(random, 3, 1.5, 0.1, 1.5), resamples=400)

    share = covered(three, mean_area(1.5, 0.1, 1.5), repeats=300)
    assert 0.7 < share < 0.88


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
        (lambda: detection.auroc_over_seeds(np.zeros((1, 3)), np.zeros((1, 3))), "1 and 1 seeds"),
        (lambda: detection.auroc_bootstrap(np.zeros((2, 3)), np.zeros((3, 3))), "2 and 3 seeds"),
        (lambda: detection.threshold_at(np.zeros(3), 1.0), "false_positive_rate must be"),
        (lambda: detection.proportion_interval(4, 3), "4 of 3"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
