"""Random-feature scores: training against explicit steps and noise, spectra against matrices, golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import random_features as rf
from dae_theory.feature_spectra import FIGURE_5, bulk_edges, memorization_time, spectral_constants, stieltjes

D, P, N, TIME = 12, 72, 24, 0.1
ERF = jax.scipy.special.erf


@pytest.fixture(scope="module")
def drawn():
    """Weights, training points and 40 noises of each."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((P, D), (N, D), (40, N, D)))


@pytest.fixture(scope="module")
def trained(drawn):
    w, data, noise = drawn
    moments = rf.sampled_moments(w, data, noise, TIME, ERF)
    return moments, rf.modes(moments)


@pytest.fixture(scope="module")
def population(drawn):
    return rf.gaussian_moments(drawn[0], jnp.eye(D), TIME, "erf")


def test_golden_losses_of_descent_and_flow(trained, population):
    moments, found = trained
    descended = rf.descend(found, 200, D * D / 2, TIME)
    assert float(rf.loss(descended, moments, TIME)) == pytest.approx(0.678766, abs=6e-7)
    assert float(rf.loss(descended, population, TIME)) == pytest.approx(0.997894, abs=6e-7)
    times = jnp.array([100.0, 1e9])
    np.testing.assert_allclose(rf.train_loss(found, times, TIME), [0.678798, 0.511922], atol=6e-7)


def test_descent_is_what_explicit_steps_give(drawn, trained):
    """200 gradient steps on A = √p B, from the definition of the loss by automatic differentiation, to rounding."""
    moments, found = trained
    w, data, noise = drawn
    delta = 1 - np.exp(-2 * TIME)
    noisy = np.exp(-TIME) * data[None] + np.sqrt(delta) * noise
    features = ERF(noisy.reshape(-1, D) @ w.T / np.sqrt(D))
    xi = noise.reshape(-1, D)

    def objective(a):
        residual = np.sqrt(delta) * features @ a.T / np.sqrt(P) + xi
        return jnp.mean(jnp.sum(jnp.square(residual), axis=1)) / D

    start = jnp.zeros((D, P))
    rate = D * D / 2
    np.testing.assert_allclose(objective(start), moments.noise, rtol=1e-12)
    slope = jax.grad(objective)(start)
    # One step of the closed form is a step along the gradient of the loss, in the stated units.
    one = rf.descend(found, 1, rate, TIME) * np.sqrt(P)
    scale = float(jnp.vdot(one, slope) / jnp.vdot(slope, slope))
    np.testing.assert_allclose(one, scale * slope, atol=1e-12)
    a = start
    slope_at = jax.jit(jax.grad(objective))
    for _ in range(200):
        a = a - rate * slope_at(a)
    np.testing.assert_allclose(rf.descend(found, 200, rate, TIME) * np.sqrt(P), a, atol=1e-10)
    assert scale == pytest.approx(-rate)


def test_flow_falls_from_the_stated_slope_to_the_best_coefficients(trained):
    moments, found = trained
    times = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-3, 1e8, 60)])
    curve = np.asarray(rf.train_loss(found, times, TIME))
    assert curve[0] == pytest.approx(float(moments.noise))
    assert np.all(np.diff(curve) <= 1e-14)
    delta = float(rf.variance_of_noise(TIME))
    slope = -4 * delta * float(jnp.sum(jnp.square(moments.cross))) / P
    assert (curve[1] - curve[0]) / 1e-3 == pytest.approx(slope, rel=1e-2)
    best = -jnp.linalg.solve(moments.second, moments.cross).T / np.sqrt(delta)
    assert curve[-1] == pytest.approx(float(rf.loss(best, moments, TIME)), rel=1e-9)
    for tau in (3.0, 300.0):
        by_modes = rf.train_loss(found, jnp.array([tau]), TIME)[0]
        np.testing.assert_allclose(by_modes, rf.loss(rf.coefficients(found, tau, TIME), moments, TIME), rtol=1e-12)
    # The gap between descent and flow falls with the learning rate.
    gaps = [
        float(rf.loss(rf.descend(found, 200 * k, D * D / 2 / k, TIME), moments, TIME))
        - float(rf.train_loss(found, jnp.array([100.0]), TIME)[0])
        for k in (1, 4, 16)
    ]
    np.testing.assert_allclose(gaps, [-3.2e-5, -7.9e-6, -2.0e-6], rtol=0.03)


@pytest.mark.parametrize("activation", ["erf", "relu"])
def test_moments_of_the_population_are_averages(drawn, activation):
    """Within five standard errors of 200,000 draws, entry by entry in the mean; erf and relu have closed forms."""
    w = drawn[0][:6]
    covariance = jnp.diag(jnp.linspace(0.5, 1.5, D))
    rng = np.random.default_rng(1)
    count = 200_000
    delta = float(rf.variance_of_noise(TIME))
    xi = rng.normal(size=(count, D))
    noisy = np.exp(-TIME) * rng.normal(size=(count, D)) * np.sqrt(np.diag(covariance)) + np.sqrt(delta) * xi
    features = np.asarray({"erf": ERF, "relu": jax.nn.relu}[activation](jnp.asarray(noisy @ np.asarray(w).T / D**0.5)))
    exact = rf.gaussian_moments(w, covariance, TIME, activation)
    for closed, parts in ((exact.second, (features, features)), (exact.cross, (features, xi))):
        mean = parts[0].T @ parts[1] / count
        spread = np.sqrt((parts[0] ** 2).T @ parts[1] ** 2 / count - mean**2) / np.sqrt(count)
        assert np.all(np.abs(np.asarray(closed) - mean) < 5 * spread)


def test_relu_moments_need_no_noise(drawn):
    """Over all noise, against the sampled moments of 4,000 noises: within five standard errors of their mean."""
    w, data = drawn[0][:5], drawn[1][:3]
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(4000, 3, D)))
    exact = rf.relu_moments(w, data, TIME)
    sampled = jax.jit(lambda noise: rf.sampled_moments(w, data, noise, TIME, jax.nn.relu))
    parts = [sampled(noise[k::40]) for k in range(40)]
    for name in ("second", "cross"):
        some = np.stack([getattr(part, name) for part in parts])
        error = some.std(axis=0, ddof=1) / np.sqrt(40)
        assert np.all(np.abs(some.mean(axis=0) - getattr(exact, name)) < 5 * error)


def test_the_loss_is_the_error_of_the_score_and_of_the_denoiser(drawn, trained, population):
    """For data N(0, I): 1 - Δ + Δ E‖s - s*‖²/d, and the risk of the denoiser over σ²d. By 40,000 draws."""
    w = drawn[0]
    b = rf.coefficients(trained[1], 50.0, TIME)
    delta = float(rf.variance_of_noise(TIME))
    rng = np.random.default_rng(3)
    x, xi = (jnp.asarray(rng.normal(size=(40_000, D))) for _ in range(2))
    noisy = np.exp(-TIME) * x + np.sqrt(delta) * xi
    score = ERF(noisy @ w.T / np.sqrt(D)) @ b.T
    # The score of N(0, I) at any time is -x.
    error = np.mean(np.sum((score + noisy) ** 2, axis=1)) / D
    exact = float(rf.loss(b, population, TIME))
    assert 1 - delta + delta * error == pytest.approx(exact, rel=0.01)
    sigma = float(np.sqrt(np.expm1(2 * TIME)))
    denoiser = rf.feature_denoiser(w, b, ERF)
    y = x + sigma * xi
    risk = np.mean(np.sum((jax.vmap(lambda y: denoiser(y, sigma))(y) - x) ** 2, axis=1))
    assert risk / (sigma**2 * D) == pytest.approx(exact, rel=0.02)
    later = rf.test_loss(trained[1], population, jnp.array([50.0]), TIME)
    np.testing.assert_allclose(later, exact, rtol=1e-12)


def test_golden_constants_and_transforms():
    constants = spectral_constants(jnp.tanh, 0.01)
    np.testing.assert_allclose(constants, [0.605706, 0.085233, 0.025542, 0.001874], atol=6e-7)
    assert stieltjes(-0.05, constants, 10, 30, 0.01) == pytest.approx(15.484740, abs=1e-6)
    assert stieltjes(10 + 1j, constants, 10, 30, 0.01) == pytest.approx(-0.096121 + 0.017511j, abs=1e-6)


def test_published_settings_have_their_times():
    """Those of Fig. 5, to the digits of the constants printed with them."""
    constants = spectral_constants(jnp.tanh, FIGURE_5["time"])
    times = [memorization_time(constants, n, FIGURE_5["features_per_dim"], 0.1) for n in FIGURE_5["samples_per_dim"]]
    np.testing.assert_allclose(times, [2556, 5899, 12880, 22140], rtol=2e-4)
    # Like n for few samples; slower where the bulk reaches down to s².
    assert times[1] / times[0] > 2.2 > times[3] / times[2] > 1.6


def test_spectra_of_matrices_have_the_counts_and_the_transform():
    """One matrix of d = 60, samples over all noise: d large eigenvalues, n - d within the bulk's edges (5 % wider), and
    its transform within 3 % of the limit."""
    d, psi_n, psi_p, time = 60, 4, 12, 0.05
    rng = np.random.default_rng(4)
    w, data = (jnp.asarray(rng.normal(size=(k * d, d))) for k in (psi_p, psi_n))
    noise = jnp.asarray(rng.normal(size=(60, psi_n * d, d)))
    eigenvalues = np.asarray(rf.modes(rf.sampled_moments(w, data, noise, time, jnp.tanh)).eigenvalues)
    constants = spectral_constants(jnp.tanh, time)
    low, high = bulk_edges(constants, psi_n, psi_p)
    inside = np.sum((eigenvalues > 0.95 * low) & (eigenvalues < 1.05 * high))
    assert abs(inside - (psi_n - 1) * d) <= 0.05 * (psi_n - 1) * d
    assert np.sum(eigenvalues > 1.05 * high) == d
    for z in (-0.05, 1 + 0.5j):
        assert np.mean(1 / (eigenvalues - z)) == pytest.approx(stieltjes(z, constants, psi_n, psi_p, time), rel=0.03)


def test_the_density_has_unit_mass_and_the_mean_of_the_trace():
    """q(z) falls like -1/z - mean/z² far away, with the mean of U's diagonal; variances are averaged."""
    constants = spectral_constants(jnp.tanh, 0.1)
    mean = constants.linear**2 * np.exp(-0.2) + constants.noisy**2 + constants.sample_sq + constants.rest_sq
    z = -1e5
    q = stieltjes(z, constants, 4, 16, 0.1)
    assert (-1 / z - q) * z**2 == pytest.approx(mean, rel=1e-2)
    same = stieltjes(-0.3, constants, 4, 16, 0.1, variances=np.ones(3))
    assert same == pytest.approx(stieltjes(-0.3, constants, 4, 16, 0.1))
    assert same != pytest.approx(stieltjes(-0.3, constants, 4, 16, 0.1, variances=np.array([0.5, 1.5])))


@pytest.mark.slow
def test_the_gap_opens_at_a_time_proportional_to_n():
    """d = 24, ψ_p = 32, t = .01, erf, ψ_n = 1, 2, 4: the time at which the gap of test and training loss is 5 % of its
    end is that of another draw (2670, 7120, 19960) within 30 %, growing more than n itself; the least error of the
    score comes at 30 to 130 for all."""
    d, psi_p, time = 24, 32, 0.01
    opens, best = [], []
    taus = jnp.geomspace(1.0, 1e7, 140)
    for psi_n in (1, 2, 4):
        rng = np.random.default_rng(5)
        w = jnp.asarray(rng.normal(size=(psi_p * d, d)))
        data = jnp.asarray(rng.normal(size=(psi_n * d, d)))
        noise = jnp.asarray(rng.normal(size=(100, psi_n * d, d)))
        found = rf.modes(rf.sampled_moments(w, data, noise, time, ERF))
        test = np.asarray(rf.test_loss(found, rf.gaussian_moments(w, jnp.eye(d), time, "erf"), taus, time))
        gap = test - np.asarray(rf.train_loss(found, taus, time))
        opens.append(float(taus[np.argmax(gap - gap[0] > 0.05 * (gap[-1] - gap[0]))]))
        best.append(float(taus[np.argmin(test)]))
    np.testing.assert_allclose(opens, [2670, 7120, 19960], rtol=0.3)
    assert np.all((np.array(best) > 30) & (np.array(best) < 130)), best


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rf.gaussian_moments(jnp.ones((2, 2)), jnp.eye(2), 0.1, "tanh"), "'erf' or 'relu'"),
        (lambda: rf.variance_of_noise(0.0), "time"),
        (lambda: bulk_edges(spectral_constants(jnp.tanh, 0.1), 8, 4), "must exceed samples_per_dim"),
        (lambda: spectral_constants(jnp.tanh, 0.1, variance=0.0), "variance"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
