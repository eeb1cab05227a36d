"""The code under noise: Monte Carlo, exact cases, both regimes of the closed forms, and the Jacobian's spectrum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import GaussianMixture, ReluDae, generalizing_minimizer, memorizing_minimizer, spikiness
from dae_theory.codes import (
    active_set,
    gate_probabilities,
    jacobian_energy,
    joint_gate_probabilities,
    local_linear,
    mean_jacobian,
    spikiness_moments,
)
from dae_theory.minimizers import shrinkage
from dae_theory.model import denoise, encode, init, jacobian

pytestmark = pytest.mark.optimized

SIMPLEX = jnp.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1.5
SIGMA, DRAWS = 0.8, 200_000


@pytest.fixture
def network(key):
    """Four units in three dimensions, with its point and noisy copies of it."""
    dae = init(jax.random.fold_in(key, 1), 3, 4)
    x = jnp.array([0.5, -1.0, 0.3])
    return dae, x, x[None, :] + SIGMA * jax.random.normal(jax.random.fold_in(key, 2), (DRAWS, 3))


def agrees(draws, value, errors=5):
    error = jnp.std(draws, axis=0) / DRAWS**0.5
    return bool(jnp.all(jnp.abs(jnp.mean(draws, axis=0) - value) <= errors * error + 1e-12))


def test_monte_carlo_meets_every_average(network):
    dae, x, y = network
    h = jax.vmap(functools.partial(encode, dae))(y)
    on = (h > 0).astype(h.dtype)
    assert agrees(on, gate_probabilities(dae, x, SIGMA))
    assert agrees(on[:, :, None] * on[:, None, :], joint_gate_probabilities(dae, x, SIGMA))
    moments = spikiness_moments(dae, x, SIGMA)
    assert agrees(jnp.sum(h, axis=1), moments.l1)
    assert agrees(jnp.sum(h**2, axis=1), moments.l2_sq)
    assert agrees(jnp.sum(h**4, axis=1), moments.l4_fourth)
    assert agrees(jax.vmap(spikiness.std)(h) ** 2, moments.variance)
    j = jax.vmap(functools.partial(jacobian, dae))(y)
    assert agrees(j, mean_jacobian(dae, x, SIGMA))
    assert agrees(jnp.sum(j**2, axis=(1, 2)), jacobian_energy(dae, x, SIGMA))


def test_stein_s_lemma_ties_the_jacobian_to_the_covariance(network):
    """Cov(f(y), y)/σ² by Monte Carlo: a road that never looks at a gate."""
    dae, x, y = network
    f = jax.vmap(functools.partial(denoise, dae))(y)
    assert agrees(f[:, :, None] * (y - x[None, :])[:, None, :] / SIGMA**2, mean_jacobian(dae, x, SIGMA))


@pytest.mark.parametrize("pattern", [(1, 0, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)])
def test_bounds_hold_the_measured_probability_of_an_active_set(network, pattern):
    dae, x, y = network
    gates = jnp.array(pattern, bool)
    hits = jnp.all((y @ dae.w1 > 0) == gates[None, :], axis=1)
    share, error = float(jnp.mean(hits)), 5 * float(jnp.std(hits)) / DRAWS**0.5
    bounds = active_set(dae, x, SIGMA, gates)
    assert float(bounds.lower) - error <= share <= float(bounds.upper) + error


def test_bounds_of_all_patterns_of_two_units_are_exact_and_sum_to_one(network):
    dae, x, _ = network
    pair = ReluDae(dae.w1[:, :2], dae.w2[:, :2])
    patterns = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], bool)
    bounds = jax.jit(jax.vmap(functools.partial(active_set, pair, x, SIGMA)))(patterns)
    np.testing.assert_allclose(bounds.lower, bounds.upper, atol=1e-15)
    np.testing.assert_allclose(jnp.sum(bounds.lower), 1.0, atol=1e-15)


def test_a_memorized_sample_opens_its_own_gate_alone():
    """The code is one-hot up to Φ(−‖x‖/3σ) for each foreign gate, and the Jacobian has rank one, q ahead of it."""
    sigma, penalty = 0.2, 1e-3
    dae = memorizing_minimizer(SIMPLEX, sigma, penalty, 4)
    probability = gate_probabilities(dae, SIMPLEX[0], sigma)
    margin = float(jnp.sqrt(6.75)) / 3 / sigma
    # Φ(−4.33) is 7.4e-6: rounding of a cosine in the argument is magnified by its square.
    leak = 0.5 * float(jax.scipy.special.erfc(margin / 2**0.5))
    np.testing.assert_allclose(probability[1:], leak, rtol=1e-12)
    bounds = active_set(dae, SIMPLEX[0], sigma, jnp.array([True, False, False, False]))
    assert 1 - 3 * leak <= float(bounds.lower) <= float(bounds.upper) < 1 - leak / 2
    linear = local_linear(dae, SIMPLEX[0])
    assert int(linear.rank()) == 1
    q = float(shrinkage(jnp.asarray(6.75), 0.25, sigma, penalty))
    np.testing.assert_allclose(linear.singular_values[0], q, rtol=1e-14)
    np.testing.assert_allclose(linear.effective_rank(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(jacobian_energy(dae, SIMPLEX[0], sigma), q * q, rtol=20 * leak)


def test_a_generalized_sample_opens_its_block_and_the_spectrum_is_its_gains():
    mean = jnp.array([3.0, 1.0, 0.0, -1.0])
    spread = jnp.diag(jnp.array([0.3, 0.2, 0.1, 0.05]))
    mixture = GaussianMixture(jnp.array([0.5, 0.5]), jnp.stack([mean, -mean]), jnp.stack([spread, spread]))
    dae = generalizing_minimizer(mixture, 0.1, 1e-3, (3, 3))
    linear = local_linear(dae, mean)
    assert linear.gates.tolist() == [True] * 3 + [False] * 3
    assert int(linear.rank()) == 3
    moments = jnp.linalg.eigvalsh(jnp.outer(mean, mean) + spread)[::-1]
    gains = shrinkage(moments, 0.5, 0.1, 1e-3)[:3]
    np.testing.assert_allclose(linear.singular_values[:3], gains, rtol=1e-12)
    np.testing.assert_allclose(jacobian_energy(dae, mean, 0.1), jnp.sum(gains**2), rtol=1e-4)
    assert 2.5 < float(linear.effective_rank()) <= 3.0


def test_the_local_linear_map_is_the_jacobian_and_the_denoiser(network):
    dae, x, _ = network
    linear = local_linear(dae, x)
    product = (linear.left * linear.singular_values[None, :]) @ linear.right.T
    np.testing.assert_allclose(product, jacobian(dae, x), atol=1e-14)
    np.testing.assert_allclose(product @ x, denoise(dae, x), atol=1e-14)
    np.testing.assert_allclose(linear.left.T @ linear.left, jnp.eye(3), atol=1e-14)
    off = local_linear(ReluDae(-jnp.abs(dae.w1), dae.w2), jnp.ones(3))
    assert int(off.rank()) == 0
    assert float(off.effective_rank()) == 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_moments_are_homogeneous(network, scale):
    """Data, noise and nothing else scaled by c: norms of degree 1, 2, 4, 2; gates and Jacobians unchanged."""
    dae, x, _ = network
    moments = jax.jit(spikiness_moments)
    small, large = moments(dae, x, SIGMA), moments(dae, scale * x, scale * SIGMA)
    for a, b, degree in zip(small, large, (1, 2, 4, 2), strict=True):
        np.testing.assert_allclose(b, a * scale**degree, rtol=1e-12)
    both = jax.jit(joint_gate_probabilities)
    np.testing.assert_allclose(both(dae, scale * x, scale * SIGMA), both(dae, x, SIGMA), rtol=1e-12)


def test_hard_corners_are_finite(network):
    """Dead, parallel and antiparallel columns, and a point forty standard deviations inside."""
    dae, x, _ = network
    w = jnp.stack([dae.w1[:, 0], 2 * dae.w1[:, 0], -dae.w1[:, 0], jnp.zeros(3)], axis=1)
    odd = ReluDae(w, dae.w2)
    for f in (gate_probabilities, joint_gate_probabilities, spikiness_moments, mean_jacobian, jacobian_energy):

        def total(dae, sigma, f=f):
            values = f(dae, x, sigma)
            return sum(jnp.sum(v) for v in jax.tree.leaves(values)), values

        values_and_gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
        for sigma in (1e-3, 1.0, 1e3):
            assert all(bool(jnp.all(jnp.isfinite(v))) for v in jax.tree.leaves(values_and_gradient(odd, sigma)))
    both = joint_gate_probabilities(odd, x, 1.0)
    on = gate_probabilities(odd, x, 1.0)
    np.testing.assert_allclose(jnp.diagonal(both), on, rtol=1e-14)
    np.testing.assert_allclose(both[0, 1], on[0], rtol=1e-14)
    np.testing.assert_allclose(both[0, 2], 0.0, atol=1e-15)
    np.testing.assert_allclose(both[0, 3], 0.5 * on[0], rtol=1e-14)


@pytest.mark.parametrize("f", [gate_probabilities, joint_gate_probabilities, spikiness_moments, jacobian_energy])
def test_lowers_for_accelerators_and_refuses_bad_input(network, f):
    dae, x, _ = network
    jax.jit(f).trace(dae, x, SIGMA).lower(lowering_platforms=("tpu", "cuda"))
    with pytest.raises(ValueError, match="sigma"):
        f(dae, x, 0.0)
    with pytest.raises(ValueError, match="finite"):
        f(dae, x.at[0].set(jnp.nan), SIGMA)
