"""Closed-form energies: loops, numerical minimization, brute force, the exact objective, Monte Carlo, derivatives."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from dae_theory import conditions, energies, minimizers, mixture, risk, spectra

SIMPLEX = 1.5 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
LABELS = np.repeat([0, 1, 2], 4)
RANKS = (2, 1, 2)


def clusters(key, *, dim=5, spread=0.05, length=2.0):
    """Four samples about each corner of a regular triangle."""
    turns = 2 * np.pi * np.arange(3) / 3
    corners = length * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return jnp.asarray(np.pad(corners, ((0, 0), (0, dim - 2)))[LABELS]) + spread * jax.random.normal(key, (12, dim))


@functools.partial(jax.jit, static_argnums=3)
def block_energy(data, sigma, penalty, ranks=RANKS):
    return energies.block_energy(data, LABELS, sigma, penalty, ranks)


@functools.partial(jax.jit, static_argnums=3)
def block_minimizer(data, sigma, penalty, ranks=RANKS):
    return minimizers.block_minimizer(data, LABELS, sigma, penalty, ranks)


def energy_by_loops(data, labels, sigma, penalty, ranks):
    """The main term as printed: sums over clusters and eigenvalues of X_k' X_k."""
    n, risk_part, decay = len(data), 0.0, 0.0
    for label, p in zip(np.unique(labels), ranks, strict=True):
        x = data[label == labels]
        for j, lam in enumerate(np.linalg.eigvalsh(x.T @ x)[::-1]):
            q = max((lam - n * penalty) / (lam + len(x) * sigma**2), 0.0) if j < p else 0.0
            risk_part += ((1 - q) ** 2 * lam + len(x) * sigma**2 * q**2) / n
            decay += 2 * penalty * q
    return risk_part, decay


def test_direction_energy_is_the_least_over_the_gain():
    """Against a numerical minimum over q >= 0, direction by direction, clipped ones included."""
    for s, rho, sigma, penalty in itertools.product((0.01, 1.0, 30.0), (0.1, 1.0), (0.05, 1.0), (1e-4, 0.05, 2.0)):

        def cost(q, s=s, rho=rho, sigma=sigma, penalty=penalty):
            return rho * ((1 - q) ** 2 * s + sigma**2 * q**2) + 2 * penalty * q

        least = scipy.optimize.minimize_scalar(cost, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}).fun
        ours = energies.direction_energy(jnp.array([s]), rho, sigma, penalty)
        gain = energies.direction_gain(jnp.array([s]), rho, sigma, penalty)
        # The bounded search stops short of an end by its tolerance.
        np.testing.assert_allclose(ours.objective[0], least, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(rho * s - gain[0], ours.objective[0], rtol=1e-12, atol=1e-15 * rho * s)


def test_gain_grows_with_the_moment_and_vanishes_below_the_penalty():
    moments = jnp.linspace(0.0, 5.0, 101)
    gain = np.asarray(energies.direction_gain(moments, 0.2, 0.3, 0.1))
    np.testing.assert_array_equal(gain[moments <= 0.5], 0.0)
    assert np.all(np.diff(gain[moments > 0.5]) > 0)


@hypothesis.given(
    seed=st.integers(0, 2**20),
    scale=st.floats(-3, 3),
    noise=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0]),
    decay=st.sampled_from([0.0, 1e-5, 0.03, 0.3, 30.0]),
)
def test_block_energy_against_loops(seed, scale, noise, decay):
    data = 10**scale * jax.random.normal(jax.random.key(seed), (12, 5))
    sigma, penalty = 10**scale * noise, 100**scale * decay
    ours = block_energy(data, sigma, penalty)
    risk_part, decay_part = energy_by_loops(np.asarray(data), LABELS, sigma, penalty, RANKS)
    np.testing.assert_allclose(ours.risk, risk_part, rtol=1e-11)
    np.testing.assert_allclose(ours.decay, decay_part, rtol=1e-11, atol=1e-300)


def test_block_energy_is_the_main_term_at_the_minimizer(key):
    data = clusters(key)
    ours = jax.jit(energies.main_term)(block_minimizer(data, 0.2, 1e-3), data, 0.2, 1e-3)
    expected = block_energy(data, 0.2, 1e-3)
    np.testing.assert_allclose(ours.risk, expected.risk, rtol=1e-12)
    np.testing.assert_allclose(ours.decay, expected.decay, rtol=1e-12)


def test_main_term_of_any_network_against_loops(key):
    k1, k2, k3 = jax.random.split(key, 3)
    dae = minimizers.ReluDae(jax.random.normal(k1, (4, 3)), jax.random.normal(k2, (4, 3)))
    data = jax.random.normal(k3, (6, 4))
    total = 0.0
    for x in np.asarray(data):
        q = sum(np.outer(dae.w2[:, j], dae.w1[:, j]) for j in range(3) if dae.w1[:, j] @ x > 0) + np.zeros((4, 4))
        total += (np.sum((q @ x - x) ** 2) + 0.09 * np.sum(q**2)) / 6
    ours = energies.main_term(dae, data, 0.3, 0.1)
    np.testing.assert_allclose(ours.risk, total, rtol=1e-12)
    np.testing.assert_allclose(ours.decay, 0.1 * sum(np.sum(np.square(w)) for w in dae), rtol=1e-13)


def test_leak_through_the_gates_is_exponentially_small():
    """Exact objective minus main term on the simplex: a Gaussian tail of the margin, ``exp(-γ²/2σ²)``."""
    data, penalty = jnp.asarray(SIMPLEX), 1e-3
    sigmas = np.array([0.14, 0.16, 0.18, 0.2, 0.22, 0.25])

    @jax.jit
    def leak(sigma):
        dae = minimizers.memorizing_minimizer(data, sigma, penalty, 4)
        main = energies.memorizing_energy(data, sigma, penalty).objective
        return risk.exact_objective(dae, data, sigma, penalty) - main

    leaks = [float(leak(sigma)) for sigma in sigmas]
    margin = float(jax.jit(lambda s: conditions.check_conditions(data, np.arange(4), s, penalty, 1).margin)(0.2))
    np.testing.assert_allclose(margin, np.linalg.norm(SIMPLEX[0]) / 3)
    # A power of σ stands before the exponential: fit it beside the slope.
    columns = np.stack([1 / sigmas**2, np.log(sigmas), np.ones(6)], axis=1)
    slope, power, _ = np.linalg.lstsq(columns, np.log(leaks), rcond=None)[0]
    np.testing.assert_allclose(slope, -(margin**2) / 2, rtol=0.02)
    assert 3 < power < 7


def test_two_roads_meet_a_third_by_monte_carlo(key):
    """Energy, exact risk, and a plain average over noise, at margins of five standard deviations."""
    data = clusters(key, spread=0.01)
    sigma, penalty, draws = 0.15, 1e-3, 4000
    dae = block_minimizer(data, sigma, penalty)
    margin = jax.jit(lambda x: conditions.check_conditions(x, LABELS, sigma, penalty, RANKS).margin)(data)
    assert float(margin) > 5 * sigma
    ours = block_energy(data, sigma, penalty)
    np.testing.assert_allclose(jax.jit(risk.exact_risk)(dae, data, sigma), ours.risk, rtol=1e-5)
    eps = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (draws, *data.shape)))
    x, w1, w2 = (np.asarray(value) for value in (data, *dae))
    errors = np.sum((np.maximum((x + sigma * eps) @ w1, 0) @ w2.T - x) ** 2, axis=-1).mean(axis=1)
    assert abs(errors.mean() - float(ours.risk)) < 5 * errors.std() / np.sqrt(draws)
    # Five standard errors would notice a variance term that is off by a tenth.
    assert 5 * errors.std() / np.sqrt(draws) < 0.1 * float(ours.risk)


def test_memorizing_energy_as_in_the_corollary(key):
    data = jax.random.normal(key, (5, 8))
    size, n, sigma, penalty = np.sum(np.square(data), axis=1), 5, 0.4, 0.02
    ours = energies.memorizing_energy(data, sigma, penalty)
    np.testing.assert_allclose(
        ours.risk, np.mean((size * sigma**2 + (n * penalty) ** 2) / (size + sigma**2)), rtol=1e-13
    )
    np.testing.assert_allclose(ours.decay, 2 * penalty * np.sum((size - n * penalty) / (size + sigma**2)), rtol=1e-13)
    blocks = energies.block_energy(data, np.arange(5), sigma, penalty, 1)
    np.testing.assert_allclose(blocks.objective, ours.objective, rtol=1e-12)
    free = energies.memorizing_energy(data, sigma, 0.0)
    np.testing.assert_allclose(free.objective, np.mean(sigma**2 * size / (sigma**2 + size)), rtol=1e-13)
    assert float(free.objective) < sigma**2
    # Nothing is stored: the risk is the data's second moment.
    np.testing.assert_allclose(energies.memorizing_energy(data, sigma, 1e3).objective, size.mean(), rtol=1e-13)


@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_few_units_store_the_samples_that_gain_most(key, width):
    data = np.asarray(jax.random.normal(key, (6, 3)))
    sigma, penalty = 0.5, 0.05
    ours = float(energies.memorizing_energy(jnp.asarray(data), sigma, penalty, width).objective)
    costs = []
    for stored in itertools.combinations(range(6), min(width, 6)):
        ranks = [int(i in stored) for i in range(6)]
        costs.append(sum(energy_by_loops(data, np.arange(6), sigma, penalty, ranks)))
    np.testing.assert_allclose(ours, min(costs), rtol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4, 7, 30])
def test_the_largest_gains_are_optimal(key, width):
    """Every allocation of at most ``width`` units to the directions of three blocks, by brute force."""
    data = np.array(jax.random.normal(key, (12, 3))) * np.array([2.0, 1.0, 0.3])
    data[4:8] *= 0.4
    world = spectra.empirical_spectra(jnp.asarray(data), LABELS)
    sigma, penalty = 0.4, 0.05
    ranks = energies.allocate_ranks(world, sigma, penalty, width)
    best = float(energies.best_energy(world, sigma, penalty, width).objective)
    costs = {
        p: sum(energy_by_loops(data, LABELS, sigma, penalty, p))
        for p in itertools.product(range(4), repeat=3)
        if sum(p) <= width
    }
    np.testing.assert_allclose(best, min(costs.values()), rtol=1e-12)
    np.testing.assert_allclose(costs[tuple(np.asarray(ranks).tolist())], min(costs.values()), rtol=1e-12)
    # No unit is spent where it gains nothing.
    gains = np.asarray(energies.direction_gain(world.moments, world.weights[:, None], sigma, penalty))
    assert int(ranks.sum()) == min(width, int(np.sum(gains > 0)))


def test_allocation_traces_its_width(key):
    world = spectra.empirical_spectra(clusters(key), LABELS)
    many = jax.jit(jax.vmap(lambda p: energies.allocate_ranks(world, 0.2, 1e-4, p)))(jnp.arange(1, 9))
    for i, width in enumerate(range(1, 9)):
        np.testing.assert_array_equal(many[i], energies.allocate_ranks(world, 0.2, 1e-4, width))


def test_envelope(key):
    """At a minimum only the explicit dependence counts: dE/dλ = 2 Σ q, dE/dσ² = Σ ρ q²."""
    data, sigma, penalty = clusters(key, spread=0.3), 0.3, 0.02
    w = block_minimizer(data, sigma, penalty).w1
    slopes = jax.jit(jax.grad(lambda v: block_energy(data, v[0], v[1]).objective))(jnp.array([sigma, penalty]))
    np.testing.assert_allclose(slopes[1], 2 * np.sum(np.square(w)), rtol=1e-11)
    owners = np.repeat([0, 1, 2], RANKS)
    fourth = sum(np.sum(np.square(b.T @ b)) for b in (np.asarray(w)[:, owners == k] for k in range(3)))
    np.testing.assert_allclose(slopes[0], 2 * sigma * fourth / 3, rtol=1e-11)


def test_energy_differentiates_in_the_data(key):
    data = clusters(key, spread=0.3)
    direction = jax.random.normal(jax.random.fold_in(key, 1), data.shape)
    terms = jax.jit(jax.grad(lambda x: block_energy(x, 0.3, 0.02).objective))(data) * direction
    step = 1e-5
    ahead, behind = (block_energy(data + h * direction, 0.3, 0.02).objective for h in (step, -step))
    # Central differences: error of order step² and rounding over step, of terms that may cancel in the sum.
    np.testing.assert_allclose(
        jnp.sum(terms), (ahead - behind) / (2 * step), rtol=0, atol=1e-7 * jnp.sum(jnp.abs(terms))
    )


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_energies_scale_like_squared_lengths(key, scale):
    data = clusters(key)
    ours = block_energy(data, 0.3, 1e-3)
    scaled = block_energy(scale * data, scale * 0.3, scale**2 * 1e-3)
    np.testing.assert_allclose([scaled.risk, scaled.decay], scale**2 * np.array([ours.risk, ours.decay]), rtol=1e-11)


def test_small_energies_keep_their_digits_in_float32():
    """A risk of about σ² beside a second moment a million times larger."""
    data = jnp.asarray(1e2 * SIMPLEX, jnp.float32)
    ours = energies.memorizing_energy(data, 0.1, 0.0).risk
    size = 6.75e4
    np.testing.assert_allclose(ours, 0.01 * size / (size + 0.01), rtol=20 * np.finfo(np.float32).eps)


def two_modes():
    means = jnp.array([[3.0, 0.0, 0.0, 0.0], [-2.0, -1.0, 0.0, 0.0]])
    scales = jnp.array([[0.01, 0.02, 0.04, 0.0], [0.03, 0.0, 0.01, 0.02]])
    return mixture.GaussianMixture(jnp.array([0.4, 0.6]), means, jax.vmap(jnp.diag)(scales))


def test_population_energy_by_monte_carlo(key):
    """The derived population loss: fresh samples of the mixture, fresh noise, gates eight deviations away."""
    world, sigma, penalty, ranks, draws = two_modes(), 0.15, 0.01, (2, 3), 200_000
    dae = minimizers.generalizing_minimizer(world, sigma, penalty, ranks)
    data, _ = mixture.sample(key, world, draws)
    noisy = data + sigma * jax.random.normal(jax.random.fold_in(key, 1), data.shape)
    errors = np.sum(np.square(np.maximum(noisy @ dae.w1, 0) @ dae.w2.T - data), axis=1)
    ours = energies.population_energy(world, sigma, penalty, ranks)
    error = errors.std() / np.sqrt(draws)
    assert abs(errors.mean() - float(ours.risk)) < 5 * error
    np.testing.assert_allclose(ours.decay, 2 * penalty * np.sum(np.square(dae.w1)), rtol=1e-12)
    # The variance term of the kept directions, which the printed bound drops, is a hundred errors wide.
    assert sigma**2 > 100 * error


def test_population_energy_is_block_energy_of_equal_moments(key):
    data = clusters(key, spread=0.3)
    parts = np.split(np.asarray(data), 3)
    world = mixture.GaussianMixture(
        jnp.full(3, 1 / 3),
        jnp.array([x.mean(0) for x in parts]),
        jnp.array([np.cov(x.T, bias=True) for x in parts]),
    )
    ours, expected = energies.population_energy(world, 0.3, 0.01, RANKS), block_energy(data, 0.3, 0.01)
    np.testing.assert_allclose([ours.risk, ours.decay], [expected.risk, expected.decay], rtol=1e-12)


DATA = jnp.arange(1.0, 61.0).reshape(12, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energies.block_energy(DATA, LABELS, -0.1, 0.0, 1), "sigma must not be negative"),
        (lambda: energies.block_energy(DATA, LABELS, 0.1, -1.0, 1), "penalty must not be negative"),
        (lambda: energies.block_energy(DATA, LABELS[:3], 0.1, 0.0, 1), "-9 labels"),
        (lambda: energies.block_energy(DATA, LABELS, 0.1, 0.0, (1, 2, 5)), "exceeds by 1"),
        (lambda: energies.block_energy(DATA.at[0, 0].set(jnp.nan), LABELS, 0.1, 0.0, 1), "1 non-finite"),
        (lambda: energies.memorizing_energy(DATA, 0.1, 0.0, 0), "width must be at least 1"),
        (lambda: energies.memorizing_energy(DATA, -0.1, 0.0), "sigma must not be negative"),
        (lambda: energies.population_energy(two_modes(), 0.1, 0.0, 5), "exceeds by 1"),
        (lambda: energies.allocate_ranks(spectra.population_spectra(two_modes()), 0.1, 0.0, 0), "at least 1"),
        (lambda: energies.main_term(minimizers.ReluDae(DATA, DATA), DATA.T, -1.0, 0.0), "sigma must not be negative"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lowers_for_accelerators():
    spec, scalar = jax.ShapeDtypeStruct((12, 5), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    dae = minimizers.ReluDae(jax.ShapeDtypeStruct((5, 3), jnp.float32), jax.ShapeDtypeStruct((5, 3), jnp.float32))
    world = spectra.Spectra(spec, jax.ShapeDtypeStruct((12,), jnp.float32))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    modes = mixture.GaussianMixture(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2,), (2, 6), (2, 6, 6))))
    for function, arguments in [
        (lambda x, s, r: energies.block_energy(x, LABELS, s, r, RANKS), (spec, scalar, scalar)),
        (lambda x, s, r: energies.memorizing_energy(x, s, r, 4), (spec, scalar, scalar)),
        (lambda w, s, r: energies.population_energy(w, s, r, 2), (modes, scalar, scalar)),
        (energies.best_energy, (world, scalar, scalar, count)),
        (energies.main_term, (dae, spec, scalar, scalar)),
    ]:
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu", "cuda"))
