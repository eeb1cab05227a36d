"""Bayes denoisers: definition by Monte Carlo, each as a limit of another, Tweedie's score, and small noise."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import denoisers
from dae_theory.mixture import GaussianMixture, fit, sample
from dae_theory.types import Denoiser


def two_modes():
    return GaussianMixture(
        jnp.array([0.3, 0.7]),
        jnp.array([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0]]),
        jnp.array([np.diag([0.5, 0.1, 0.0]), np.diag([0.2, 0.2, 0.9])]),
    )


def log_density(y, sigma, mixture):
    noisy = mixture.covariances + sigma**2 * jnp.eye(y.size)[None]
    modes = jax.vmap(jax.scipy.stats.multivariate_normal.logpdf, (None, 0, 0))(y, mixture.means, noisy)
    return jax.scipy.special.logsumexp(modes + jnp.log(mixture.weights))


# Jitted: eager calls compile their operations one by one.
log_density_gradient = jax.jit(jax.grad(log_density))


@jax.jit
def mixture_score(y, sigma, mixture):
    return denoisers.score(functools.partial(denoisers.mixture_denoiser, mixture=mixture), y, sigma)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_mixture_denoiser_is_tweedies_gradient_of_the_log_density(key, sigma):
    mixture = two_modes()
    y = 2 * jax.random.normal(key, (3,))
    denoiser = functools.partial(denoisers.mixture_denoiser, mixture=mixture)
    assert isinstance(denoiser, Denoiser)
    np.testing.assert_allclose(
        mixture_score(y, sigma, mixture), log_density_gradient(y, sigma, mixture), rtol=1e-9, atol=1e-9
    )


def test_mixture_denoiser_minimizes_the_squared_error(key):
    mixture = two_modes()
    x, _ = sample(jax.random.fold_in(key, 0), mixture, 20_000)
    y = x + 0.5 * jax.random.normal(jax.random.fold_in(key, 1), x.shape)
    best = jax.jit(jax.vmap(lambda v: denoisers.mixture_denoiser(v, 0.5, mixture)))(y)
    # Orthogonality of the posterior mean's residual to any function of y, here y and the estimate itself.
    for feature in (y, best, jnp.sin(3 * y)):
        products = np.asarray((best - x) * feature)
        assert np.all(np.abs(products.mean(0)) < 5 * products.std(0) / np.sqrt(len(products)))


def test_one_mode_is_the_wiener_filter(key):
    mixture = two_modes()
    single = GaussianMixture(jnp.ones(1), mixture.means[:1], mixture.covariances[:1])
    y = jax.random.normal(key, (3,))
    wiener = denoisers.gaussian_denoiser(y, 0.7, mixture.means[0], mixture.covariances[0])
    np.testing.assert_allclose(denoisers.mixture_denoiser(y, 0.7, single), wiener, rtol=1e-13)
    cov = np.asarray(mixture.covariances[0])
    by_solve = mixture.means[0] + cov @ np.linalg.solve(cov + 0.49 * np.eye(3), np.asarray(y - mixture.means[0]))
    np.testing.assert_allclose(wiener, by_solve, rtol=1e-12, atol=1e-14)


def test_modes_of_zero_covariance_are_the_empirical_denoiser(key):
    data = jax.random.normal(key, (6, 3))
    atoms = GaussianMixture(jnp.full(6, 1 / 6), data, jnp.zeros((6, 3, 3)))
    y = jax.random.normal(jax.random.fold_in(key, 1), (3,))
    np.testing.assert_allclose(
        denoisers.mixture_denoiser(y, 0.8, atoms), denoisers.empirical_denoiser(y, 0.8, data), rtol=1e-12
    )


def test_empirical_denoiser_limits(key):
    data = jax.random.normal(key, (6, 3))
    y = data[2] + 0.01
    np.testing.assert_array_equal(denoisers.empirical_denoiser(y, 1e-6, data), data[2])
    # Towards the mean with rate σ⁻²: the first correction is Cov(x) y/σ².
    gaps = [np.linalg.norm(denoisers.empirical_denoiser(y, s, data) - data.mean(0)) for s in (10.0, 20.0, 40.0, 80.0)]
    slopes = np.diff(np.log(gaps)) / np.log(2)
    np.testing.assert_allclose(slopes, -2.0, atol=0.05)


def test_tiny_noise_stays_finite_in_float32(key):
    data = jax.random.normal(key, (6, 3), jnp.float32)
    mixture = fit(data, np.array([0, 0, 0, 1, 1, 1]))
    for denoiser in (
        functools.partial(denoisers.empirical_denoiser, data=data),
        functools.partial(denoisers.mixture_denoiser, mixture=mixture),
        functools.partial(denoisers.gaussian_denoiser, mean=data[0], covariance=jnp.zeros((3, 3), jnp.float32)),
    ):
        values = jax.jit(denoiser)(data[0], 1e-25), jax.jit(jax.jacfwd(denoiser))(data[0] + 0.01, 1e-3)
        chex.assert_tree_all_finite(values)


def test_responsibilities_sum_to_one_far_away():
    weights = denoisers.mixture_responsibilities(jnp.array([1e4, -1e4, 1e4]), 0.1, two_modes())
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-14)


@pytest.mark.parametrize("sigma", [0.0, -1.0, jnp.nan])
def test_impossible_noise_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        denoisers.empirical_denoiser(jnp.zeros(2), sigma, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="sigma"):
        denoisers.mixture_denoiser(jnp.zeros(3), sigma, two_modes())


def test_one_trace_serves_all_noise_levels():
    data = jnp.eye(3)
    traces = []

    @jax.jit
    def denoise(y, sigma):
        traces.append(1)
        return denoisers.empirical_denoiser(y, sigma, data)

    for sigma in (0.1, 0.2, 0.3):
        denoise(data[0], jnp.asarray(sigma))
    assert len(traces) == 1


@pytest.mark.parametrize("sigma", [2e-3, 2e-2])
def test_the_score_of_a_singular_covariance_survives_float32(key, sigma):
    """Rank 8 in dimension 64: eigenvalues of rounding are no spread beside σ²."""
    root, mean, spread, noise = (
        np.asarray(jax.random.normal(jax.random.fold_in(key, i), shape))
        for i, shape in enumerate([(64, 8), (64,), (8,), (64,)])
    )
    covariance, y = root @ root.T, mean + root @ spread + sigma * noise
    expected = -np.linalg.solve(covariance + sigma**2 * np.eye(64), y - mean)
    y32, mean32, covariance32 = (jnp.asarray(a, jnp.float32) for a in (y, mean, covariance))
    single = GaussianMixture(jnp.ones(1, jnp.float32), mean32[None], covariance32[None])
    for denoiser in (
        functools.partial(denoisers.gaussian_denoiser, mean=mean32, covariance=covariance32),
        functools.partial(denoisers.mixture_denoiser, mixture=single),
    ):
        score = np.asarray(denoisers.score(denoiser, y32, sigma))
        assert np.linalg.norm(score - expected) < 3e-3 * np.linalg.norm(expected)


def test_a_batch_is_refused_without_the_type_checks_of_the_tests():
    """With n = d or n = p a batch would give an array of the right shape and the wrong values."""
    code = """
import functools, jax.numpy as jnp
from dae_theory import ReluDae, certify, check_conditions, denoise, denoisers, encode, exact_risk, jacobian
from dae_theory import memorizing_minimizer
from dae_theory.mixture import GaussianMixture
square, y = jnp.eye(3), jnp.ones(3)
dae, mixture = ReluDae(square, square), GaussianMixture(jnp.ones(1), y[None], square[None])
several = jnp.ones(3)
calls = {
    "encode": lambda: encode(dae, square),
    "denoise": lambda: denoise(dae, square),
    "jacobian": lambda: jacobian(dae, square),
    "empirical": lambda: denoisers.empirical_denoiser(square, 0.3, square),
    "gaussian": lambda: denoisers.gaussian_denoiser(square, 0.3, y, square),
    "mixture": lambda: denoisers.mixture_denoiser(square, 0.3, mixture),
    "responsibilities": lambda: denoisers.mixture_responsibilities(square, 0.3, mixture),
    "score": lambda: denoisers.score(lambda y, sigma: y, square, 0.3),
    "sigmas, empirical": lambda: denoisers.empirical_denoiser(y, several, square),
    "sigmas, gaussian": lambda: denoisers.gaussian_denoiser(y, several, y, square),
    "sigmas, mixture": lambda: denoisers.mixture_denoiser(y, several, mixture),
    "sigmas, score": lambda: denoisers.score(lambda y, sigma: y, y, several),
    "swapped": lambda: denoisers.empirical_denoiser(y, square, 0.3),
    "data first": lambda: denoisers.empirical_denoiser(square, 0.3, y),
}
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        assert "jax.vmap" in str(error) and "shape (3" in str(error), (name, error)
    else:
        raise AssertionError(name)
given = {
    "memorizing_minimizer": lambda rows, sigma: memorizing_minimizer(rows, sigma, 1e-3, 3),
    "check_conditions": lambda rows, sigma: check_conditions(rows, [0, 1, 2], sigma, 1e-3, 1),
    "exact_risk": lambda rows, sigma: exact_risk(dae, rows, sigma),
    "certify": lambda rows, sigma: certify(dae, rows, sigma, 1e-3),
}
for name, call in given.items():
    for rows, sigma, words in (
        ([[1.0, 0.0], [0.0, 1.0]], 0.3, "data must be an array, got list"),
        (square, several, "sigma must be one number, got shape (3,)"),
    ):
        try:
            call(rows, sigma)
        except ValueError as error:
            assert words in str(error), (name, error)
        else:
            raise AssertionError((name, words))
for data, words in (([[1.0, 2.0, 3.0]], "got list"), (jnp.ones((2, 4)), "shape (2, 4)"), (y, "shape (3,)")):
    try:
        denoisers.empirical_denoiser(y, 0.3, data)
    except ValueError as error:
        assert words in str(error) and "(y, sigma, data)" in str(error), error
    else:
        raise AssertionError(words)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lowers_for_accelerators():
    y, s = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    mixture = jax.tree.map(lambda a: a.astype(jnp.float32), two_modes())
    for last in (
        functools.partial(denoisers.empirical_denoiser, data=jnp.zeros((5, 3), jnp.float32)),
        functools.partial(denoisers.mixture_denoiser, mixture=mixture),
    ):
        assert jax.jit(last).trace(y, s).lower(lowering_platforms=("tpu", "cuda")).as_text()
