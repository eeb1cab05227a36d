"""Population risk: three roads, the closed-form energy, the empirical limit; and rates of the generalization gap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import GaussianMixture, ReluDae, exact_risk, generalizing_minimizer
from dae_theory.energies import population_energy
from dae_theory.mixture import sample
from dae_theory.model import denoise, init
from dae_theory.population import fit_rate, learning_curve, population_objective, population_risk


@pytest.fixture(scope="module")
def mixture():
    """Two modes that look away from each other, means long against their spread."""
    mean = jnp.array([3.0, 1.0, 0.0, -1.0])
    factors = 0.3 * jax.random.normal(jax.random.key(0), (2, 4, 4))
    return GaussianMixture(jnp.array([0.6, 0.4]), jnp.stack([mean, -mean]), factors @ jnp.swapaxes(factors, 1, 2))


# Called eagerly, a map compiles anew in every call.
risk_of = jax.jit(population_risk)


def test_monte_carlo_over_data_and_noise_agrees(key, mixture):
    dae = init(jax.random.fold_in(key, 1), 4, 6)
    x, _ = sample(jax.random.fold_in(key, 2), mixture, 500_000)
    y = x + 0.7 * jax.random.normal(jax.random.fold_in(key, 3), x.shape)
    loss = jnp.sum(jnp.square(jax.vmap(functools.partial(denoise, dae))(y) - x), axis=-1)
    error = float(jnp.std(loss)) / 500_000**0.5
    assert abs(float(risk_of(dae, mixture, 0.7)) - float(jnp.mean(loss))) < 5 * error
    assert error < 2e-3 * float(jnp.mean(loss))


def test_the_empirical_exact_risk_of_many_rows_agrees(key, mixture):
    dae = init(jax.random.fold_in(key, 1), 4, 6)
    x, _ = sample(jax.random.fold_in(key, 2), mixture, 20_000)
    each = jax.lax.map(lambda row: exact_risk(dae, row[None], 0.7), x, batch_size=500)
    error = float(jnp.std(each)) / 20_000**0.5
    assert abs(float(risk_of(dae, mixture, 0.7)) - float(jnp.mean(each))) < 5 * error


def test_a_mixture_of_points_is_a_data_set(key):
    """Covariances of zero and equal weights: the exact risk of the means, to rounding."""
    data = jax.random.normal(jax.random.fold_in(key, 1), (5, 3))
    points = GaussianMixture(jnp.full(5, 0.2), data, jnp.zeros((5, 3, 3)))
    dae = init(jax.random.fold_in(key, 2), 3, 4)
    np.testing.assert_allclose(population_risk(dae, points, 0.5), exact_risk(dae, data, 0.5), rtol=1e-13)


def test_noise_and_spread_are_exchangeable_where_nothing_is_to_be_learned(key):
    """f = 0 leaves E‖x‖²; one linear pair of opposite units gives the risk of a linear map, tr of the algebra."""
    spread = jnp.diag(jnp.array([2.0, 0.5]))
    one = GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), spread[None])
    zero = ReluDae(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    np.testing.assert_allclose(population_risk(zero, one, 0.3), 2.5, rtol=1e-15)
    w = jnp.array([[0.8], [0.1]])
    pair = ReluDae(jnp.concatenate([w, -w], axis=1), jnp.concatenate([w, -w], axis=1))
    a = w @ w.T
    want = jnp.trace((a - jnp.eye(2)) @ spread @ (a - jnp.eye(2)).T) + 0.3**2 * jnp.trace(a @ a.T)
    np.testing.assert_allclose(population_risk(pair, one, 0.3), want, rtol=1e-14)


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_the_closed_form_energy_up_to_what_crosses_the_gates(mixture, sigma):
    """Corollary 3.3: the gap to the main term shrinks with the tails, far below the risk itself."""
    dae = generalizing_minimizer(mixture, sigma, 1e-3, (3, 3))
    risk = float(population_energy(mixture, sigma, 1e-3, (3, 3)).risk)
    assert abs(float(risk_of(dae, mixture, sigma)) - risk) < 2e-3 * risk


def test_the_minimizer_is_stationary_up_to_the_tails(key, mixture):
    """No random direction lowers the population objective by more than the tails could."""
    dae = generalizing_minimizer(mixture, 0.1, 1e-3, (3, 3))
    gradient = jax.jit(jax.grad(population_objective))
    elsewhere = jax.tree.map(lambda w: 1.1 * w, dae)
    assert _norm(gradient(dae, mixture, 0.1, 1e-3)) < 0.02 * _norm(gradient(elsewhere, mixture, 0.1, 1e-3))


@pytest.mark.slow
def test_rates_of_the_gap_and_of_the_map(key, mixture):
    """n^{-1/2} for the map and the gap's spread, n^{-1} for the excess; no interval holds the other exponent.

    The gap's mean is of order 1/n: the fit to the mixed square mean lies between the two.
    """
    sizes = [40, 80, 160, 320, 640]
    curve = learning_curve(key, mixture, sizes, 0.2, 1e-3, (3, 3), num_repeats=48)
    mean = jnp.mean(curve.gap, axis=0)
    for values, exponent in ((curve.gap - mean[None, :], -0.5), (curve.map_distance, -0.5), (curve.excess, -1.0)):
        rate = fit_rate(sizes, values)
        assert abs(rate.slope - exponent) < 4 * rate.standard_error
        assert 4 * rate.standard_error < 0.25
    error = jnp.std(curve.gap, axis=0, ddof=1) / 48**0.5
    n = jnp.asarray(sizes, float)
    scaled, error = mean * n, error * n
    assert np.all(np.asarray(scaled) > 0)
    middle = jnp.sum(scaled / error**2) / jnp.sum(1 / error**2)
    # Chi-squared with four degrees of freedom: above 23.5 once in 10,000.
    assert float(jnp.sum(((scaled - middle) / error) ** 2)) < 23.5


def test_the_fitted_rate_is_that_of_a_known_law():
    rng = np.random.default_rng(0)
    sizes = np.array([10, 20, 40, 80])
    values = 3.0 * sizes**-0.7 * rng.standard_normal((4000, 4))
    rate = fit_rate(sizes, jnp.asarray(values))
    assert abs(rate.slope + 0.7) < 4 * rate.standard_error < 0.06
    assert abs(rate.intercept - np.log(3.0)) < 0.2
    # Chi-squared with two degrees of freedom: above 18.4 once in 10,000.
    assert rate.chi_sq < 18.4
    assert rate.interval[0] < rate.slope < rate.interval[1]


@pytest.mark.parametrize("repeats", [2, 3, 8])
def test_the_interval_of_the_rate_covers_at_few_repetitions(repeats):
    rng, sizes, covered, runs = np.random.default_rng(repeats), np.array([16, 32, 64, 128]), 0, 400
    for _ in range(runs):
        low, high = fit_rate(sizes, jnp.asarray(rng.standard_normal((repeats, 4)) / np.sqrt(sizes))).interval
        covered += low <= -0.5 <= high
    # Four binomial standard errors of 0.95 at 400 runs are 0.044; intervals of 1.96 errors cover 0.47 to 0.82.
    assert 0.95 - 0.044 <= covered / runs <= 1 - 1 / runs


def test_one_program_differentiates_and_lowers_for_accelerators(mixture):
    dae = generalizing_minimizer(mixture, 0.3, 1e-3, (2, 2), width=5)
    gradient = jax.jit(jax.grad(population_risk))(dae, mixture, 0.3)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradient)
    jax.jit(population_risk).trace(dae, mixture, 0.3).lower(lowering_platforms=("tpu", "cuda"))


def test_bad_input_is_refused(key, mixture):
    dae = init(key, 3, 4)
    with pytest.raises(ValueError, match="dimension 4"):
        population_risk(dae, mixture, 0.1)
    with pytest.raises(ValueError, match="sigma"):
        population_risk(generalizing_minimizer(mixture, 0.1, 0.0, 2), mixture, -0.1)
    with pytest.raises(ValueError, match="penalty"):
        population_objective(generalizing_minimizer(mixture, 0.1, 0.0, 2), mixture, 0.1, -1.0)
    with pytest.raises(ValueError, match="num_repeats"):
        learning_curve(key, mixture, [10, 20], 0.1, 0.0, 2, num_repeats=1)
    with pytest.raises(ValueError, match="R, S >= 2"):
        fit_rate([1, 2, 3], jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="vary"):
        fit_rate([1, 2], jnp.ones((4, 2)))


def _norm(dae):
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(w)) for w in dae)))
