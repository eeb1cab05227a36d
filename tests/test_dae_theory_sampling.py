"""The reverse process: orders of accuracy, laws of the noise, and what memorizing and generalizing models sample."""

import functools
import itertools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from dae_theory import sampling
from dae_theory.denoisers import empirical_denoiser, gaussian_denoiser, mixture_denoiser
from dae_theory.minimizers import generalizing_minimizer, memorizing_minimizer
from dae_theory.mixture import GaussianMixture
from dae_theory.mixture import sample as sample_mixture
from dae_theory.model import ReluDae, denoise
from dae_theory.types import Denoiser

MEAN = jnp.array([0.5, -1.0, 2.0])
# Rank two: the flow into a plane is part of what is tested.
FACTOR = jnp.array([[1.0, 0.0], [0.5, 0.3], [-0.2, 0.8]])
COVARIANCE = FACTOR @ FACTOR.T
GAUSSIAN = functools.partial(gaussian_denoiser, mean=MEAN, covariance=COVARIANCE)


def simplex(num=4, scale=1.5):
    """Rows at the corners of a regular simplex about 0: equal norms, all cosines −1/(num − 1)."""
    centered = np.eye(num) - 1 / num
    basis = np.linalg.svd(centered)[2][: num - 1]
    return jnp.asarray(scale * centered @ basis.T / np.linalg.norm(centered[0]))


def fitted_order(errors, steps):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


# Schedules


def test_karras_schedule_is_its_formula():
    levels = sampling.karras_schedule(80.0, 0.002, 18)
    root = 80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert levels.shape == (19,)
    np.testing.assert_allclose(levels[:-1], root**7, rtol=1e-12)
    # The ends are exact, so that networks trained there are met.
    np.testing.assert_array_equal(levels[jnp.array([0, -2, -1])], [80.0, 0.002, 0.0])


def test_schedules_at_both_ends_of_rho():
    even = sampling.karras_schedule(5.0, 1.0, 4, rho=1.0, to_zero=False)
    np.testing.assert_allclose(even, [5.0, 4.0, 3.0, 2.0, 1.0], rtol=1e-14)
    geometric = sampling.geometric_schedule(5.0, 0.05, 8, to_zero=False)
    np.testing.assert_allclose(geometric[1:] / geometric[:-1], 0.01 ** (1 / 8), rtol=1e-13)
    rhos = np.array([32.0, 64.0, 128.0, 256.0])
    gaps = [np.abs(sampling.karras_schedule(5.0, 0.05, 8, rho=r, to_zero=False) - geometric).max() for r in rhos]
    np.testing.assert_allclose(fitted_order(gaps, rhos), 1.0, atol=0.03)


@hypothesis.given(
    st.floats(1e-3, 1e3), st.floats(1.5, 1e4), st.sampled_from([2, 3, 40]), st.floats(0.5, 50.0), st.booleans()
)
def test_schedules_fall_strictly_with_exact_ends(low, ratio, num_steps, rho, to_zero):
    high = low * ratio
    for levels in (
        sampling.karras_schedule(high, low, num_steps, rho=rho, to_zero=to_zero),
        sampling.geometric_schedule(high, low, num_steps, to_zero=to_zero),
    ):
        positive = levels[:-1] if to_zero else levels
        assert levels.shape == (num_steps + 1,)
        assert np.all(np.diff(levels) < 0)
        assert (positive[0], positive[-1]) == (high, low)


# The probability flow


def test_gaussian_flow_solves_the_ode(key):
    y = MEAN + jax.random.normal(key, (3,))
    covariance = np.asarray(COVARIANCE)

    def slope(sigma, y):
        wiener = MEAN + covariance @ np.linalg.solve(covariance + sigma**2 * np.eye(3), y - MEAN)
        return (y - wiener) / sigma

    solved = scipy.integrate.solve_ivp(slope, (2.0, 0.1), y, rtol=1e-11, atol=1e-13, method="DOP853").y[:, -1]
    np.testing.assert_allclose(sampling.gaussian_flow(y, 2.0, 0.1, MEAN, COVARIANCE), solved, rtol=1e-9, atol=1e-9)


def test_gaussian_flow_composes_and_ends_in_the_plane(key):
    y = jax.random.normal(key, (3,))
    halfway = sampling.gaussian_flow(y, 2.0, 0.7, MEAN, COVARIANCE)
    at_once = sampling.gaussian_flow(y, 2.0, 0.0, MEAN, COVARIANCE)
    np.testing.assert_allclose(sampling.gaussian_flow(halfway, 0.7, 0.0, MEAN, COVARIANCE), at_once, rtol=1e-13)
    normal = np.cross(FACTOR[:, 0], FACTOR[:, 1])
    # The null eigenvalue is zero up to rounding, so its deviation up to √eps.
    assert abs(normal @ (at_once - MEAN)) < 1e-7


@pytest.mark.parametrize(("step", "order"), [(sampling.euler, 1), (sampling.heun, 2)])
def test_order_of_accuracy(key, step, order):
    y = MEAN + 3 * jax.random.normal(key, (3,))
    exact = sampling.gaussian_flow(y, 3.0, 0.1, MEAN, COVARIANCE)
    steps = np.array([32, 64, 128, 256])
    errors = []
    for num_steps in steps:
        levels = sampling.karras_schedule(3.0, 0.1, int(num_steps), to_zero=False)
        errors.append(np.linalg.norm(sampling.probability_flow(GAUSSIAN, y, levels, step=step) - exact))
    np.testing.assert_allclose(fitted_order(errors, steps), order, atol=0.1)
    assert errors[-1] < {1: 3e-2, 2: 3e-4}[order]


def test_euler_is_ddim_in_scaled_variables(key):
    """DDIM for ``z = √ᾱ y``, ``σ² = (1 − ᾱ)/ᾱ``, written with its noise estimate."""
    y = jax.random.normal(key, (3,))
    sigma, next_sigma = 1.3, 0.4
    alpha, next_alpha = 1 / (1 + sigma**2), 1 / (1 + next_sigma**2)
    z = math.sqrt(alpha) * y
    noise = (z - math.sqrt(alpha) * GAUSSIAN(y, sigma)) / math.sqrt(1 - alpha)
    clean = (z - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
    ddim = math.sqrt(next_alpha) * clean + math.sqrt(1 - next_alpha) * noise
    np.testing.assert_allclose(sampling.euler(GAUSSIAN, y, sigma, next_sigma), ddim / math.sqrt(next_alpha), rtol=1e-13)


def test_steps_are_exact_where_the_denoiser_is_constant(key):
    x, eps = jax.random.normal(key, (2, 3))

    def constant(y, sigma):
        return x

    levels = sampling.karras_schedule(10.0, 0.01, 5)
    for step in (sampling.euler, sampling.heun):
        path = sampling.probability_flow(constant, x + 10.0 * eps, levels, step=step, trajectory=True)
        np.testing.assert_allclose(path, x[None] + levels[:, None] * eps[None], rtol=1e-12, atol=1e-13)


def test_the_last_step_to_zero_denoises(key):
    y = jax.random.normal(key, (3,))
    levels = sampling.karras_schedule(3.0, 0.1, 6)
    path = sampling.probability_flow(GAUSSIAN, y, levels, trajectory=True)
    assert path.shape == (7, 3)
    np.testing.assert_array_equal(path[0], y)
    np.testing.assert_array_equal(path[-1], sampling.probability_flow(GAUSSIAN, y, levels))
    np.testing.assert_allclose(path[-1], GAUSSIAN(path[-2], 0.1), rtol=1e-15)


def test_rising_levels_run_the_flow_backwards(key):
    y = jax.random.normal(key, (3,))
    steps = np.array([16, 32, 64])
    errors = []
    for num_steps in steps:
        levels = sampling.geometric_schedule(2.0, 0.2, int(num_steps), to_zero=False)
        down = sampling.probability_flow(GAUSSIAN, y, levels)
        errors.append(np.linalg.norm(sampling.probability_flow(GAUSSIAN, down, levels[::-1]) - y))
    # The leading error of one way cancels that of the other but for one more order.
    assert fitted_order(errors, steps) > 1.9
    assert errors[-1] < 1e-4


def test_derivative_of_the_flow_is_finite_and_right(key):
    y = jax.random.normal(key, (3,))
    levels = sampling.karras_schedule(3.0, 0.01, 100)
    flow = functools.partial(sampling.probability_flow, GAUSSIAN)
    exact = jax.jacobian(sampling.gaussian_flow)(y, 3.0, 0.0, MEAN, COVARIANCE)
    # Heun's error at 100 steps, and the last step's σ_min²-sized one.
    np.testing.assert_allclose(jax.jacobian(flow)(y, levels), exact, atol=3e-3)
    chex.assert_tree_all_finite(jax.jacobian(flow, argnums=1)(y, levels))


# Fresh noise


@pytest.mark.parametrize(
    ("churn", "eta"), [(0.0, 1.0), (0.4, 0.0), (0.3, 0.6), (jnp.array([0.0, 2.0, 0.1, 0.0]), jnp.linspace(0.0, 1.0, 4))]
)
def test_around_an_exact_step_noise_keeps_the_marginal_law(key, churn, eta):
    def exact_step(denoiser, y, sigma, next_sigma):
        return sampling.gaussian_flow(y, sigma, next_sigma, MEAN, COVARIANCE)

    levels = jnp.array([2.0, 1.5, 0.6, 0.2, 0.0])
    num = 20_000

    def draw(i):
        k_x, k_y, k_flow = jax.random.split(jax.random.fold_in(key, i), 3)
        start = MEAN + FACTOR @ jax.random.normal(k_x, (2,)) + levels[0] * jax.random.normal(k_y, (3,))
        return sampling.stochastic_flow(
            k_flow, GAUSSIAN, start, levels, step=exact_step, churn=churn, eta=eta, trajectory=True
        )

    paths = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(num)))
    for level, rows in zip(levels, paths.transpose(1, 0, 2), strict=True):
        true = np.asarray(COVARIANCE + level**2 * jnp.eye(3))
        variance = np.diag(true)
        assert np.all(np.abs(rows.mean(0) - MEAN) < 5 * np.sqrt(variance / num))
        # Var of s_ij under normality: (Σ_ii Σ_jj + Σ_ij²)/n.
        error = np.sqrt((np.outer(variance, variance) + true**2) / num)
        assert np.all(np.abs(np.cov(rows.T, bias=True) - true) < 5 * error)


def ancestral_variance(s, levels):
    """Variance that Euler's ancestral steps give a centered Gaussian of variance s: the exact recursion."""
    v = s + levels[0] ** 2
    for sigma, after in itertools.pairwise(levels):
        q, shrink = s / (s + sigma**2), after**2 / sigma**2
        v = (q + shrink * (1 - q)) ** 2 * v + after**2 * (1 - shrink)
    return v


def test_ancestral_sampling_has_the_variance_of_its_recursion_which_converges(key):
    s, num = 0.5, 20_000
    denoiser = functools.partial(gaussian_denoiser, mean=jnp.zeros(1), covariance=jnp.full((1, 1), s))
    levels = sampling.geometric_schedule(3.0, 0.05, 8)

    def draw(i):
        k_y, k_flow = jax.random.split(jax.random.fold_in(key, i))
        start = math.sqrt(s + 9.0) * jax.random.normal(k_y, (1,))
        return sampling.stochastic_flow(k_flow, denoiser, start, levels, step=sampling.euler, eta=1.0)

    rows = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(num)))
    predicted = ancestral_variance(s, np.asarray(levels))
    assert abs(predicted / s - 1) > 0.1
    assert abs(rows.var() - predicted) < 5 * predicted * math.sqrt(2 / num)
    steps = np.array([100, 200, 400])
    biases = [
        abs(ancestral_variance(s, np.asarray(sampling.geometric_schedule(3.0, 1e-3, int(n)))) / s - 1) for n in steps
    ]
    np.testing.assert_allclose(fitted_order(biases, steps), 1.0, atol=0.05)


def test_one_ancestral_step_is_the_printed_one(key):
    """``y + (σ² − σ'²) ∇log p + σ' (σ² − σ'²)^{1/2}/σ ε``: Song et al., appendix F."""
    y = jax.random.normal(jax.random.fold_in(key, 99), (3,))
    levels = jnp.array([1.2, 0.5])
    _, key_after = jax.random.split(jax.random.fold_in(key, 0))
    score = (GAUSSIAN(y, 1.2) - y) / 1.2**2
    drop = 1.2**2 - 0.5**2
    printed = y + drop * score + 0.5 * math.sqrt(drop) / 1.2 * jax.random.normal(key_after, (3,))
    ours = sampling.stochastic_flow(key, GAUSSIAN, y, levels, step=sampling.euler, eta=1.0)
    np.testing.assert_allclose(ours, printed, rtol=1e-13)


def test_one_churned_step_is_the_printed_one(key):
    """Algorithm 2 of Karras et al. with S_noise = 1."""
    y = jax.random.normal(jax.random.fold_in(key, 99), (3,))
    key_before, _ = jax.random.split(jax.random.fold_in(key, 0))
    t, gamma, after = 1.2, 0.3, 0.5
    t_hat = t + gamma * t
    y_hat = y + math.sqrt(t_hat**2 - t**2) * jax.random.normal(key_before, (3,))
    d = (y_hat - GAUSSIAN(y_hat, t_hat)) / t_hat
    ahead = y_hat + (after - t_hat) * d
    d_ahead = (ahead - GAUSSIAN(ahead, after)) / after
    printed = y_hat + (after - t_hat) * (d + d_ahead) / 2
    ours = sampling.stochastic_flow(key, GAUSSIAN, y, jnp.array([t, after]), churn=gamma)
    np.testing.assert_allclose(ours, printed, rtol=1e-13)


def test_without_noise_it_is_the_probability_flow(key):
    y = jax.random.normal(jax.random.fold_in(key, 99), (3,))
    levels = sampling.karras_schedule(3.0, 0.1, 6)
    flow = sampling.probability_flow(GAUSSIAN, y, levels)
    np.testing.assert_array_equal(sampling.stochastic_flow(key, GAUSSIAN, y, levels), flow)
    # Arrays of zeros take the drawing branch, and must change nothing.
    zeros = jnp.zeros(6)
    np.testing.assert_allclose(
        sampling.stochastic_flow(key, GAUSSIAN, y, levels, churn=zeros, eta=zeros), flow, rtol=1e-13
    )


# Batches


def test_a_row_depends_on_its_own_key_alone(key):
    def standard(y, sigma):
        return y / (1.0 + sigma * sigma)

    levels = sampling.karras_schedule(3.0, 0.1, 5)
    options = {"eta": 0.7, "churn": 0.1}
    draw = jax.jit(
        functools.partial(sampling.sample, **options), static_argnums=(1, 3, 4), static_argnames="batch_size"
    )
    few, many = (draw(key, standard, levels, num, 3) for num in (3, 7))
    chunked = draw(key, standard, levels, 7, 3, batch_size=2)
    np.testing.assert_allclose(few, many[:3], rtol=1e-13)
    np.testing.assert_allclose(chunked, many, rtol=1e-13)
    start_key, flow_key = jax.random.split(jax.random.fold_in(key, 2))
    start = 3.0 * jax.random.normal(start_key, (3,))
    alone = sampling.stochastic_flow(flow_key, standard, start, levels, **options)
    np.testing.assert_allclose(many[2], alone, rtol=1e-13)
    assert len(np.unique(np.asarray(many).round(6), axis=0)) == 7


# Memorizing models


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"churn": 0.3}])
def test_the_empirical_optimum_returns_training_rows(key, options):
    data = jax.random.normal(jax.random.fold_in(key, 1), (8, 5))
    denoiser = functools.partial(empirical_denoiser, data=data)
    levels = sampling.karras_schedule(20.0, 0.002, 40)
    rows = jax.jit(lambda k: sampling.sample(k, denoiser, levels, 200, 5, **options))(jax.random.fold_in(key, 2))
    distances = np.linalg.norm(np.asarray(rows)[:, None] - np.asarray(data)[None], axis=-1)
    assert np.all(distances.min(1) < 1e-9)
    assert set(distances.argmin(1)) == set(range(8))


def block_scale(s, loss, sigma):
    """φ: how a direction of moment s inside an active block shrinks with σ, ``loss`` being ℓ = λ/ρ."""
    return sigma ** (loss / s) * (s + sigma**2) ** ((1 - loss / s) / 2)


@pytest.mark.parametrize("penalty", [0.0, 0.02])
def test_a_memorizing_family_shrinks_its_row_by_the_derived_factor(key, penalty):
    data = simplex()
    n, d = data.shape
    norm_sq = float(data[0] @ data[0])
    family = sampling.closed_form_denoiser(functools.partial(memorizing_minimizer, data, penalty=penalty, width=n))
    assert isinstance(family, Denoiser)
    # Off the row by far less than the gates' margin, so unit 2 stays alone.
    start = data[2] + 0.1 * jax.random.normal(key, (d,))
    unit = data[2] / math.sqrt(norm_sq)
    along = float(unit @ start)
    ratio = block_scale(norm_sq, n * penalty, 0.01) / block_scale(norm_sq, n * penalty, 0.4)
    exact = along * ratio * unit + (0.01 / 0.4) * (start - along * unit)
    steps = np.array([16, 32, 64, 128])
    errors = []
    for num_steps in steps:
        levels = sampling.geometric_schedule(0.4, 0.01, int(num_steps), to_zero=False)
        errors.append(np.linalg.norm(sampling.probability_flow(family, start, levels) - exact))
    np.testing.assert_allclose(fitted_order(errors, steps), 2.0, atol=0.1)
    assert errors[-1] < 1e-3
    # Down to zero without a penalty: the row itself, times (xᵀy/‖x‖²)(1 + σ₀²/‖x‖²)^{-1/2}.
    if penalty == 0.0:
        final = sampling.probability_flow(family, start, sampling.geometric_schedule(0.4, 1e-3, 400))
        expected = data[2] * (data[2] @ start) / norm_sq / math.sqrt(1 + 0.4**2 / norm_sq)
        np.testing.assert_allclose(final, expected, atol=1e-4)


def test_from_pure_noise_a_memorizing_family_returns_multiples_of_its_rows(key):
    data = simplex()
    family = sampling.closed_form_denoiser(functools.partial(memorizing_minimizer, data, penalty=0.0, width=6))
    levels = sampling.geometric_schedule(5.0, 1e-6, 120)
    rows = np.asarray(jax.jit(lambda k: sampling.sample(k, family, levels, 300, 3))(key))
    cosines = rows @ np.asarray(data).T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(data[0])
    # Two units that start together part as σ^{-1/3}: at the last level a thousandth of the paths may not have.
    assert np.mean(cosines.max(1) > 1 - 1e-9) > 0.97
    assert set(cosines.argmax(1)) == set(range(4))
    # The scale is the noise's own, as homogeneity says, not the rows'.
    assert np.std(np.linalg.norm(rows, axis=1)) > 0.2 * np.linalg.norm(data[0])


def test_law_of_a_single_memorized_row(key):
    """Half of pure noise finds the unit off and falls to zero; the other half is half-normal along the row."""
    row = jnp.array([1.2, -0.5, 0.3])
    norm_sq, sigma = float(row @ row), 4.0
    family = sampling.closed_form_denoiser(functools.partial(memorizing_minimizer, row[None], penalty=0.0, width=1))
    levels = sampling.geometric_schedule(sigma, 1e-4, 150)
    num = 2_000
    rows = np.asarray(jax.jit(lambda k: sampling.sample(k, family, levels, num, 3))(key))
    radius = rows @ np.asarray(row) / math.sqrt(norm_sq)
    alive = radius > 1e-9
    assert abs(alive.mean() - 0.5) < 5 * 0.5 / math.sqrt(num)
    np.testing.assert_allclose(rows[~alive], 0.0, atol=1e-15)
    law = scipy.stats.halfnorm(scale=sigma * math.sqrt(norm_sq / (norm_sq + sigma**2)))
    assert scipy.stats.kstest(radius[alive], law.cdf).pvalue > 1e-4


# Generalizing models


def separated_modes():
    """Two modes with opposite means and two directions each: every block's units fire on its own mode alone."""
    means = np.array([[3.0, 0, 0, 0, 0], [-2.5, 0, 0, 0, 0]])
    covariances = np.zeros((2, 5, 5))
    covariances[0, 1:3, 1:3] = [[0.09, 0.03], [0.03, 0.05]]
    covariances[1, 3:5, 3:5] = [[0.06, 0.0], [0.0, 0.02]]
    return GaussianMixture(jnp.array([0.4, 0.6]), jnp.asarray(means), jnp.asarray(covariances))


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}])
def test_the_mixture_optimum_samples_the_mixture(key, options):
    mixture = separated_modes()
    num, steps = 3_000, (40 if not options else 250)
    levels = sampling.karras_schedule(60.0, 0.01, steps)
    denoiser = functools.partial(mixture_denoiser, mixture=mixture)
    rows = np.asarray(jax.jit(lambda k: sampling.sample(k, denoiser, levels, num, 5, **options))(key))
    second = rows[:, 0] < 0
    assert abs(second.mean() - 0.6) < 5 * math.sqrt(0.24 / num)
    for k, mine in enumerate((rows[~second], rows[second])):
        true = np.asarray(mixture.covariances[k])
        variance = np.diag(true)
        # Besides the standard error, the discretization's: below 4 % of a variance.
        assert np.all(np.abs(mine.mean(0) - mixture.means[k]) < 5 * np.sqrt(variance / len(mine)) + 4e-3)
        product = np.outer(variance, variance)
        error = 5 * np.sqrt((product + true**2) / len(mine)) + 0.04 * np.sqrt(product) + 2e-4
        assert np.all(np.abs(np.cov(mine.T, bias=True) - true) < error)


def test_a_generalizing_family_keeps_second_moments_and_shrinks_the_mean(key):
    mixture = separated_modes()
    family = sampling.closed_form_denoiser(functools.partial(generalizing_minimizer, mixture, penalty=0.0, ranks=3))
    sigma, num = 0.3, 4_000
    clean, labels = sample_mixture(jax.random.fold_in(key, 0), mixture, num)
    noisy = clean + sigma * jax.random.normal(jax.random.fold_in(key, 1), clean.shape)
    levels = sampling.geometric_schedule(sigma, 1e-4, 100)
    flow = functools.partial(sampling.probability_flow, family, sigmas=levels)
    rows = np.asarray(jax.jit(jax.vmap(flow))(noisy))
    for k in range(2):
        mine, start = rows[np.asarray(labels) == k], noisy[np.asarray(labels) == k]
        mean, covariance = np.asarray(mixture.means[k]), np.asarray(mixture.covariances[k])
        moment = np.outer(mean, mean) + covariance
        by_flow = jax.vmap(lambda y, s=moment: sampling.gaussian_flow(y, sigma, 0.0, jnp.zeros(5), jnp.asarray(s)))
        # Row by row the linear flow of N(0, S): no gate was crossed.
        np.testing.assert_allclose(mine, by_flow(start), atol=2e-3)
        # Its law: second moment S, of which the mean has kept less than the mode's.
        products = np.einsum("ni,nj->nij", mine, mine)
        assert np.all(np.abs(products.mean(0) - moment) < 5 * products.std(0) / math.sqrt(len(mine)) + 2e-3)
        lead = np.linalg.norm(mean)
        shrunk = lead / math.sqrt(1 + sigma**2 / lead**2)
        assert abs(np.sign(mean[0]) * mine[:, 0].mean() - shrunk) < 5 * mine[:, 0].std() / math.sqrt(len(mine))


@jax.jit
def simplex_flow(y):
    family = sampling.closed_form_denoiser(functools.partial(memorizing_minimizer, simplex(), penalty=1e-3, width=4))
    return sampling.probability_flow(family, y, sampling.geometric_schedule(2.0, 0.01, 20))


@hypothesis.given(st.floats(1e-3, 1e3))
def test_the_flow_of_a_bias_free_family_is_homogeneous(factor):
    y = jnp.array([0.3, -1.0, 0.4])
    np.testing.assert_allclose(simplex_flow(factor * y), factor * simplex_flow(y), rtol=1e-11)


# One network a level


def test_nearest_level_serves_its_own_levels_exactly(key):
    data = simplex()
    minimizer = functools.partial(memorizing_minimizer, data, penalty=1e-3, width=4)
    levels = sampling.karras_schedule(2.0, 0.05, 12)
    stack = jax.vmap(minimizer)(levels[:-1])
    y = jax.random.normal(key, (3,))
    by_stack = sampling.probability_flow(sampling.nearest_level_denoiser(stack, levels[:-1]), y, levels)
    by_formula = sampling.probability_flow(sampling.closed_form_denoiser(minimizer), y, levels)
    np.testing.assert_allclose(by_stack, by_formula, rtol=1e-12)
    # Any order of the stack will do.
    shuffled = sampling.nearest_level_denoiser(ReluDae(stack.w1[::-1], stack.w2[::-1]), levels[:-1][::-1])
    np.testing.assert_allclose(sampling.probability_flow(shuffled, y, levels), by_formula, rtol=1e-12)


def test_nearest_is_meant_in_log_sigma():
    w = jnp.eye(2)[None] * jnp.array([1.0, 2.0, 3.0])[:, None, None]
    denoiser = sampling.nearest_level_denoiser(ReluDae(w, w), jnp.array([0.01, 0.1, 1.0]))
    y = jnp.array([1.0, 0.0])
    for sigma, factor in ((1e-9, 1.0), (0.03, 1.0), (0.033, 4.0), (0.3, 4.0), (0.33, 9.0), (1e9, 9.0)):
        np.testing.assert_array_equal(denoiser(y, sigma), factor * y)
    member = ReluDae(w[1], w[1])
    np.testing.assert_array_equal(denoiser(y, 0.1), denoise(member, y))


# House rules


def test_work_is_done_in_the_dtype_of_y(key):
    gaussian = functools.partial(
        gaussian_denoiser, mean=MEAN.astype(jnp.float32), covariance=COVARIANCE.astype(jnp.float32)
    )
    y = jnp.ones(3, jnp.float32)
    levels = sampling.karras_schedule(3.0, 0.1, 5)
    assert levels.dtype == jnp.float64
    assert sampling.stochastic_flow(key, gaussian, y, levels, churn=0.1, eta=0.5).dtype == jnp.float32
    single = sampling.karras_schedule(3.0, 0.1, 5, dtype=jnp.float32)
    assert sampling.sample(key, gaussian, single, 2, 3).dtype == jnp.float32


def test_bad_input_is_refused(key):
    y, levels = jnp.zeros(3), sampling.karras_schedule(3.0, 0.1, 5)
    with pytest.raises(ValueError, match="sigma_max must exceed sigma_min"):
        sampling.karras_schedule(0.1, 0.1, 5)
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        sampling.geometric_schedule(1.0, 0.0, 5)
    with pytest.raises(ValueError, match="rho must be positive"):
        sampling.karras_schedule(1.0, 0.1, 5, rho=0.0)
    with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
        sampling.karras_schedule(1.0, 0.1, 1)
    with pytest.raises(ValueError, match="strictly monotone"):
        sampling.probability_flow(GAUSSIAN, y, jnp.array([1.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="positive except for the last"):
        sampling.probability_flow(GAUSSIAN, y, jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="strictly decreasing"):
        sampling.stochastic_flow(key, GAUSSIAN, y, levels[:-1][::-1])
    with pytest.raises(ValueError, match="negative"):
        sampling.probability_flow(GAUSSIAN, y, jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="at least two noise levels"):
        sampling.probability_flow(GAUSSIAN, y, levels[:1])
    with pytest.raises(ValueError, match="y has 3 non-finite"):
        sampling.probability_flow(GAUSSIAN, y * jnp.nan, levels)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        sampling.stochastic_flow(key, GAUSSIAN, y, levels, eta=1.5)
    with pytest.raises(ValueError, match="churn must not be negative"):
        sampling.stochastic_flow(key, GAUSSIAN, y, levels, churn=-0.1)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        sampling.sample(key, GAUSSIAN, levels, 0, 3)
    with pytest.raises(ValueError, match="one network per level"):
        sampling.nearest_level_denoiser(ReluDae(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4))), jnp.ones(3))
    with pytest.raises(ValueError, match="levels must be positive"):
        sampling.nearest_level_denoiser(ReluDae(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4))), jnp.array([0.0, 1.0]))


def test_one_trace_serves_all_schedules(key):
    traces = []

    @jax.jit
    def draw(key, levels):
        traces.append(1)
        return sampling.sample(key, GAUSSIAN, levels, 2, 3, eta=0.5)

    for top in (3.0, 4.0, 5.0):
        draw(key, sampling.karras_schedule(top, 0.1, 5))
    assert len(traces) == 1


def test_lowers_for_accelerators(key):
    y, levels = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.float32)
    data = simplex().astype(jnp.float32)
    family = sampling.closed_form_denoiser(functools.partial(memorizing_minimizer, data, penalty=1e-3, width=5))
    for function, args in (
        (lambda y, s: sampling.probability_flow(family, y, s, trajectory=True), (y, levels)),
        (lambda k, s: sampling.sample(k, family, s, 4, 3, churn=0.1, eta=0.5, batch_size=2), (key, levels)),
    ):
        assert jax.jit(function).trace(*args).lower(lowering_platforms=("tpu", "cuda")).as_text()
