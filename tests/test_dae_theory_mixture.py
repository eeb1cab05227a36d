"""Mixtures: samples have the stated moments, fits recover them, bad ones are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import mixture as mx


def random_mixture(key, modes=3, dim=4, rank=None):
    k_means, k_cov, k_weights = jax.random.split(key, 3)
    factors = jax.random.normal(k_cov, (modes, dim, rank or dim)) / 2
    weights = jax.nn.softmax(jax.random.normal(k_weights, (modes,)))
    return mx.GaussianMixture(
        weights, 2 * jax.random.normal(k_means, (modes, dim)), factors @ jnp.swapaxes(factors, 1, 2)
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_samples_have_the_mixtures_moments(key, rank):
    mixture = random_mixture(key, rank=rank)
    rows, labels = mx.sample(jax.random.fold_in(key, 7), mixture, 40_000)
    n = rows.shape[0]
    counts = np.bincount(labels, minlength=3)
    standard_error = np.sqrt(mixture.weights * (1 - mixture.weights) / n)
    assert np.all(np.abs(counts / n - mixture.weights) < 5 * standard_error)
    for k in range(3):
        mine = np.asarray(rows)[np.asarray(labels) == k]
        spread = np.sqrt(np.diag(mixture.covariances[k]) / len(mine))
        assert np.all(np.abs(mine.mean(0) - mixture.means[k]) < 5 * spread)
        variance = np.diag(mixture.covariances[k])
        # Var of s_ij under normality: (Σ_ii Σ_jj + Σ_ij²)/n.
        error = np.sqrt((np.outer(variance, variance) + np.asarray(mixture.covariances[k]) ** 2) / len(mine))
        assert np.all(np.abs(np.cov(mine.T, bias=True) - mixture.covariances[k]) < 5 * error)


def test_samples_of_a_singular_mode_stay_in_its_plane(key):
    mixture = random_mixture(key, modes=1, rank=2)
    rows, _ = mx.sample(jax.random.fold_in(key, 7), mixture, 100)
    spectrum = np.linalg.svd(np.asarray(rows - mixture.means), compute_uv=False)
    # The roots of rounded-to-zero eigenvalues are of order √eps.
    assert spectrum[1] > 1
    assert np.all(spectrum[2:] < 1e-6 * spectrum[0])


def test_row_i_does_not_depend_on_how_many_are_drawn(key):
    mixture = random_mixture(key)
    few, few_labels = mx.sample(key, mixture, 3)
    many, many_labels = mx.sample(key, mixture, 10)
    np.testing.assert_array_equal(few, many[:3])
    np.testing.assert_array_equal(few_labels, many_labels[:3])


def test_fit_equals_numpy_by_label(key):
    data = jax.random.normal(key, (30, 4))
    labels = np.arange(30) % 3 * 10 - 5
    fitted = mx.fit(data, labels, ridge=0.01)
    for k, name in enumerate([-5, 5, 15]):
        mine = np.asarray(data)[labels == name]
        np.testing.assert_allclose(fitted.means[k], mine.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(
            fitted.covariances[k], np.cov(mine.T, bias=True) + 0.01 * np.eye(4), rtol=1e-12, atol=1e-13
        )
    np.testing.assert_allclose(fitted.weights, 1 / 3, rtol=1e-15)
    mx.check_mixture(fitted)


def test_total_moments_are_those_of_the_pooled_data(key):
    data = jax.random.normal(key, (30, 4))
    mean, covariance = mx.mean_and_covariance(mx.fit(data, np.arange(30) % 4))
    np.testing.assert_allclose(mean, data.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(np.asarray(data).T, bias=True), rtol=1e-12, atol=1e-13)


def test_second_moments_are_those_of_the_data(key):
    data = jax.random.normal(key, (20, 3))
    moments = mx.second_moments(mx.fit(data, np.zeros(20, int)))
    np.testing.assert_allclose(moments[0], data.T @ data / 20, rtol=1e-12, atol=1e-14)


def test_bad_mixtures_are_refused(key):
    good = random_mixture(key)
    with pytest.raises(ValueError, match="sum to 1, got 2"):
        mx.check_mixture(good._replace(weights=2 * good.weights))
    with pytest.raises(ValueError, match="shapes disagree"):
        mx.check_mixture(good._replace(weights=good.weights[:2]))
    with pytest.raises(ValueError, match="symmetric"):
        mx.check_mixture(good._replace(covariances=good.covariances.at[0, 0, 1].add(1.0)))
    with pytest.raises(ValueError, match="semidefinite"):
        mx.check_mixture(good._replace(covariances=-good.covariances))
    with pytest.raises(ValueError, match="non-finite"):
        mx.check_mixture(good._replace(means=good.means.at[0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        mx.sample(key, good, 0)
    with pytest.raises(ValueError, match="labels must have shape"):
        mx.fit(jnp.ones((4, 2)), np.zeros(3, int))
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(mx.fit)(jnp.ones((4, 2)), jnp.zeros(4, int))


def test_lowers_for_accelerators(key):
    mixture = jax.tree.map(lambda a: a.astype(jnp.float32), random_mixture(key))
    lowered = jax.jit(mx.sample, static_argnums=2).trace(key, mixture, 5).lower(lowering_platforms=("tpu", "cuda"))
    assert lowered.as_text()
