"""The invariant contamination ratio: closed forms, invariance, what its interval covers, bad input."""

import numpy as np
import pytest

from scaling.measures.contamination import contamination_interval, contamination_ratio, view_covariances


def views(rng, n, m, signal, noise):
    """Gaussian features with covariances A Aᵀ over images and B Bᵀ within."""
    d = len(signal)
    return rng.normal(size=(n, 1, d)) @ signal.T + rng.normal(size=(n, m, d)) @ noise.T


def orthogonal(rows, count):
    """Columns with mean 0, orthogonal to one another and of unit variance (ddof 1)."""
    x = np.random.default_rng(0).normal(size=(rows, count + 1))
    x[:, 0] = 1
    return np.linalg.qr(x)[0][:, 1:] * np.sqrt(rows - 1)


def test_without_a_signal_it_is_one():
    """Means of m views with exactly 1/m of the covariance within images: nothing is left for the images.

    Two views h ± r have the within-covariance 2 r²: features r and means r' of equal spread, uncorrelated.
    """
    n, d, r = 30, 3, orthogonal(30, 6)
    means, half = r[:, :d], r[:, d:]
    # Σ_ξ = 2/n Σ half² = 2 (n-1)/n; the means shall have half of that.
    features = np.stack([means * np.sqrt((n - 1) / n) + half, means * np.sqrt((n - 1) / n) - half], axis=1)
    noise, signal = view_covariances(features)
    np.testing.assert_allclose(noise, 2 * (n - 1) / n * np.eye(d), atol=1e-12)
    np.testing.assert_allclose(signal, 0, atol=1e-12)
    assert contamination_ratio(features) == pytest.approx(1, abs=1e-12)
    # With nine times the variance of means, Σ_s is 8 (n-1)/n.
    signal = 2 * means * np.sqrt(2 * (n - 1) / n)
    features = np.stack([features[:, 0] + signal, features[:, 1] + signal], axis=1)
    _, found = view_covariances(features)
    expected = (1 + 2 * np.sqrt(2)) ** 2 * (n - 1) / n - (n - 1) / n
    np.testing.assert_allclose(found, expected * np.eye(d), atol=1e-10)
    assert contamination_ratio(features) == pytest.approx(1 / (1 + expected * n / (2 * (n - 1))))
    # A ridge counts as noise.
    assert contamination_ratio(features, ridge=2.0) == pytest.approx(1 / (1 + expected / (2 * (n - 1) / n + 2)))


def test_invertible_linear_maps_and_shifts_do_not_change_it():
    rng = np.random.default_rng(1)
    features = views(rng, 50, 3, np.eye(4), np.eye(4))
    mixed = features @ rng.normal(size=(4, 4)) + 7
    assert contamination_ratio(mixed) == pytest.approx(contamination_ratio(features), rel=1e-9)
    assert contamination_interval(mixed) == pytest.approx(contamination_interval(features), rel=1e-9)
    # With a ridge it does change.
    assert abs(contamination_ratio(mixed, ridge=1.0) - contamination_ratio(features, ridge=1.0)) > 1e-3


def test_it_is_that_of_known_gaussians():
    """Three views: without the term Σ_ξ/m the truth .472 would read .40.

    tr(Σ_ξ⁻¹ Cov(h̄))/d has the mean ν/(ν-d-1) (t + 1/m), for images and views are independent. Its relative standard
    error is at most √(2/(n-1) + 2/ν), that of one direction whose variances are known from n and ν degrees of freedom.
    """
    n, m, d = 4000, 3, 3
    rng = np.random.default_rng(2)
    noise = np.array([[1, 0, 0], [0.5, 2, 0], [0, -1, 0.5]])
    signal = noise @ np.diag(np.sqrt([2.5, 0.8, 0.056]))
    t, nu = (2.5 + 0.8 + 0.056) / 3, n * (m - 1)
    truth = 1 / (1 + t)
    assert truth == pytest.approx(0.472, abs=1e-3)
    features = views(rng, n, m, signal, noise)
    found = 1 / contamination_ratio(features) - 1 + 1 / m
    mean = nu / (nu - d - 1) * (t + 1 / m)
    error = np.sqrt(2 / (n - 1) + 2 / nu)
    assert abs(found / mean - 1) < 4 * error
    assert 4 * error * (t + 1 / m) < 1 / m / 2
    interval = contamination_interval(features)
    assert interval.low < truth < interval.high


def test_the_interval_takes_the_bias_of_few_images_off():
    """At ν = 10 d, E tr/d = ν/(ν-d-1) (1 + 1/3) - 1/3 = 1.17 and the plain ratio .46; the center is off by a 50th."""
    rng = np.random.default_rng(3)
    draws = [views(rng, 40, 3, np.eye(8), np.eye(8)) for _ in range(60)]
    plain = [contamination_ratio(each) for each in draws]
    center = [contamination_interval(each).value for each in draws]
    error = np.std(center) / np.sqrt(60)
    assert abs(np.mean(center) - 0.5) < 0.01 + 3 * error
    assert abs(np.mean(plain) - 1 / (1 + 80 / 71 * 4 / 3 - 1 / 3)) < 0.01 + 3 * np.std(plain) / np.sqrt(60)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "scale"), [(16, 8, 1.0), (40, 8, 1.0), (40, 8, 0.3), (60, 8, 3.0), (200, 8, 1.0)])
def test_the_interval_covers_the_truth(n, d, scale):
    """95 % in 600 simulations of three views each: .93 is 2.2 standard errors below; intervals may be wide."""
    rng = np.random.default_rng(4)
    truth = 1 / (1 + scale**2)
    found = [contamination_interval(views(rng, n, 3, scale * np.eye(d), np.eye(d))) for _ in range(600)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.93 <= covered <= 0.99
    assert abs(np.mean([each.value for each in found]) / truth - 1) < 0.08


def test_bad_input_is_named():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(5, 3, 4))
    with pytest.raises(ValueError, match="at least two of each"):
        contamination_ratio(features[:, :1])
    with pytest.raises(ValueError, match="at least two of each"):
        contamination_ratio(features[:1])
    with pytest.raises(ValueError, match=r"singular in 11 features: .*n\(m - 1\)"):
        contamination_ratio(rng.normal(size=(5, 3, 11)))
    assert contamination_ratio(rng.normal(size=(5, 3, 11)), ridge=1.0) > 0
    with pytest.raises(ValueError, match="singular in 4 features"):
        contamination_ratio(features * np.array([1, 1, 1, 0]))
    with pytest.raises(ValueError, match="features has 1 non-finite"):
        contamination_ratio(np.where(np.arange(60).reshape(5, 3, 4) == 7, np.inf, features))
    with pytest.raises(ValueError, match="ridge must not be negative"):
        contamination_ratio(features, ridge=-1.0)
    with pytest.raises(ValueError, match="level must lie in"):
        contamination_interval(features, level=95.0)
    with pytest.raises(ValueError, match="three of them, got 2"):
        contamination_interval(rng.normal(size=(2, 9, 2)))
