"""Where the reverse process ends: the flow of one unit in closed form, and shares of starts by simulation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import denoise, gaussian_denoiser, memorizing_minimizer
from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import (
    affine_block_minimizer,
    affine_generalizing_minimizer,
    affine_memorizing_minimizer,
)
from dae_theory.basins import (
    basin_shares,
    block_flow,
    fixed_gates_denoiser,
    flow_ends,
    no_unit_share,
    return_exponent,
    unit_flow,
)
from dae_theory.sampling import gaussian_flow, geometric_schedule, probability_flow

X = np.array([2.0, 0.5, -1.0])
OFFSET = np.array([0.3, -0.2, 0.1])
NORMAL = np.array([0.9, 0.1, -0.3]) / np.linalg.norm([0.9, 0.1, -0.3])
STEPS = geometric_schedule(1.0, 0.05, 2001, to_zero=False)


def circle(n, radius=3.0):
    turns = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def memorizing_family(data, sigma=0.05):
    """Gates of the best network at a small noise, kept at all."""
    found = memorize(data, sigma, 0.0)
    parts = (data, found.offset, found.normals, found.gates)
    return fixed_gates_denoiser(*(jnp.asarray(part) for part in parts)), jnp.asarray(found.offset), found


@jax.jit
def integrated(y, gate, decay):
    denoiser = fixed_gates_denoiser(jnp.asarray(X)[None], jnp.asarray(OFFSET), jnp.asarray(NORMAL)[None], gate, decay)
    return probability_flow(denoiser, y, STEPS)


@pytest.mark.parametrize(("gate", "decay"), [(1.6, 0.0), (2.0, 0.05), (4.0, 0.0)])
def test_the_flow_of_one_unit_is_that_of_an_integrator(gate, decay):
    """Above and below the gate distance at which the sample repels; the error of Heun's 2,000 steps is below 1e-6."""
    y = jnp.asarray(X + np.array([0.3, -0.2, 0.1]))
    found = unit_flow(y, 1.0, 0.05, jnp.asarray(X), jnp.asarray(OFFSET), jnp.asarray(NORMAL), gate, decay)
    np.testing.assert_allclose(found, integrated(y, jnp.full(1, gate), decay), atol=1e-6)
    # Two pieces of the way are the whole.
    half = unit_flow(y, 1.0, 0.3, jnp.asarray(X), jnp.asarray(OFFSET), jnp.asarray(NORMAL), gate, decay)
    rest = unit_flow(half, 0.3, 0.05, jnp.asarray(X), jnp.asarray(OFFSET), jnp.asarray(NORMAL), gate, decay)
    np.testing.assert_allclose(rest, found, rtol=1e-12)


def test_with_biases_the_row_itself_comes_back_at_the_stated_rate_and_without_a_multiple():
    x, zero = jnp.asarray(X), jnp.zeros(3)
    length = float(np.linalg.norm(X))
    unit = x / length
    y = x + jnp.array([0.4, 0.3, -0.2])
    levels = np.array([1e-3, 1e-4, 1e-5])
    gate = 1.5 * length
    ends = np.stack([unit_flow(y, 1.0, float(level), x, zero, unit, gate) - x for level in levels])
    slopes = np.diff(np.log(np.abs(ends @ unit))) / np.diff(np.log(levels))
    # Corrections to the power law are of order σ, to some power.
    np.testing.assert_allclose(slopes, return_exponent(length, gate), rtol=2e-3)
    across = ends - np.outer(ends @ unit, unit)
    np.testing.assert_allclose(
        np.linalg.norm(across, axis=1) / levels, np.linalg.norm(across[0]) / levels[0], rtol=1e-9
    )
    assert np.linalg.norm(ends[-1]) < 0.05
    # A gate through the origin: the multiple of the paper's family.
    found = unit_flow(y, 1.0, 1e-7, x, zero, unit, length)
    expected = x * (x @ y / length**2) / np.sqrt(1 + 1 / length**2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.linalg.norm(expected - x) > 0.1
    assert float(return_exponent(length, length)) == 0


def test_a_sample_whose_gate_is_near_repels_the_flow():
    """Deviations along the normal grow, like σ to a negative power."""
    x, unit = jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])
    for level in (0.1, 0.01):
        end = unit_flow(x + jnp.array([1e-5, 1e-5]), 1.0, level, x, jnp.zeros(2), unit, 1.5)
        straight = unit_flow(x, 1.0, level, x, jnp.zeros(2), unit, 1.5)
        exponent = float(return_exponent(3.0, 1.5))
        growth = float((end - straight)[0]) / 1e-5
        assert exponent == -1
        np.testing.assert_allclose(growth, level**exponent * (2.25 + level**2) / 3.25, rtol=1e-9)
        np.testing.assert_allclose((end - straight)[1], level * 1e-5, rtol=1e-9)


def test_a_family_with_given_gates_is_the_closed_form():
    """At one noise level: the network with biases, and Corollary 3.2."""
    data = circle(5)
    denoiser, _, found = memorizing_family(data, 0.1)
    network = affine_memorizing_minimizer(jnp.asarray(data), 0.1, 0.0, memorized=found)
    plain = fixed_gates_denoiser(jnp.asarray(data), jnp.zeros(2), jnp.asarray(data) / 3, jnp.full(5, 3.0), 0.01)
    for y in jax.random.normal(jax.random.key(0), (4, 2)) * 3:
        np.testing.assert_allclose(denoiser(y, 0.1), denoise(network, y), rtol=1e-12)
        closed = memorizing_minimizer(jnp.asarray(data), 0.1, 0.002, 5)
        np.testing.assert_allclose(plain(y, 0.1), denoise(closed, y), rtol=1e-12)


def test_the_affine_family_is_the_denoiser_of_a_gaussian():
    """So at no penalty its flow is exactly that from N(mean, S + σ² I) to N(mean, S)."""
    data = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)) * [2, 1, 0.5] + 3)
    network = affine_generalizing_minimizer(data, 0.7, 0.0, 3)
    mean = data.mean(axis=0)
    covariance = (data - mean[None, :]).T @ (data - mean[None, :]) / 9
    for y in jax.random.normal(jax.random.key(0), (4, 3)) * 3:
        np.testing.assert_allclose(denoise(network, y), gaussian_denoiser(y, 0.7, mean, covariance), rtol=1e-10)


@pytest.mark.parametrize(("gate", "penalty"), [(5.0, 0.0), (1.7, 3e-3)])
def test_the_flow_of_a_block_with_biases_is_that_of_its_networks(gate, penalty):
    """Networks of two clusters, whose gates the path does not cross, at each level; 400 steps of Heun's
    method, of .005 in ln σ, err by less than that squared."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(2, 8, 3)) * [1.0, 0.5, 0.2]
    spread -= spread.mean(axis=1, keepdims=True)
    means = np.array([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]])
    data = (means[:, None, :] + np.pad(spread, ((0, 0), (0, 0), (1, 0)))).reshape(16, 4)
    labels = np.repeat([0, 1], 8)
    variances, axes = np.linalg.eigh(spread[0].T @ spread[0] / 8)
    axes = np.pad(axes[:, 1:], ((1, 0), (0, 0)))
    where = {"gates": np.full(2, gate), "normals": means / 3, "offset": np.zeros(4)}

    def family(sigma):
        return affine_block_minimizer(jnp.asarray(data), labels, sigma, penalty, 3, **where)

    y = jnp.asarray(np.array([3.4, 0.3, -0.2, 0.1]))
    given = jnp.asarray(means[0]), jnp.zeros(4), jnp.asarray(means[0] / 3), gate
    found = block_flow(y, 0.4, 0.05, *given, jnp.asarray(axes), jnp.asarray(variances[1:]), 2 * penalty)
    # Heun's method by hand: networks of the closed form are made outside of traces.
    levels = np.geomspace(0.4, 0.05, 401)
    slope = jax.jit(lambda dae, y: y - denoise(dae, y))
    end = y
    for high, low in itertools.pairwise(levels):
        step = float(np.log(low / high))
        first = slope(family(float(high)), end)
        end = end + 0.5 * step * (first + slope(family(float(low)), end + step * first))
    np.testing.assert_allclose(found, end, atol=2e-5)
    shifted = [jnp.asarray(part) + jnp.ones(4) for part in (y, means[0], np.zeros(4))]
    moved = block_flow(shifted[0], 0.4, 0.05, shifted[1], shifted[2], given[2], gate, jnp.asarray(axes),
                       jnp.asarray(variances[1:]), 2 * penalty)  # fmt: skip
    np.testing.assert_allclose(moved - 1.0, found, atol=1e-12)


def test_a_block_keeps_its_spread_and_returns_its_mean_if_its_gate_is_beyond_the_offset():
    """Kept directions as of a Gaussian cluster, the mean at the rate of a memorized sample, all others in proportion
    to σ: one law each, to rounding."""
    mean, axes, variances = jnp.array([3.0, 0.0, 0.0]), jnp.array([[0.0], [1.0], [0.0]]), jnp.array([0.5])
    y = jnp.array([3.3, 0.7, 0.4])
    normal = jnp.array([1.0, 0.0, 0.0])
    found = block_flow(y, 1.0, 1e-4, mean, jnp.zeros(3), normal, 4.5, axes, variances)
    spread = gaussian_flow(y[1:2], 1.0, 1e-4, jnp.zeros(1), jnp.diag(variances))
    np.testing.assert_allclose(found[1:2], spread, rtol=1e-12)
    np.testing.assert_allclose(found[2], 0.4e-4, rtol=1e-12)
    alone = unit_flow(y, 1.0, 1e-4, mean, jnp.zeros(3), normal, 4.5)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-12)
    batch = jax.vmap(lambda y: block_flow(y, 1.0, 1e-4, mean, jnp.zeros(3), normal, 4.5, axes, variances))(y[None])
    np.testing.assert_allclose(batch[0], found, rtol=1e-12)


@pytest.mark.parametrize("cosine", [-0.2, -0.7])
def test_shares_of_two_samples_are_the_angles_between_their_gates(cosine):
    """Without biases a fifth to a tenth of the starts opens no gate and ends at the origin; the rest is equal by
    symmetry, and ends at multiples. Four standard errors of 2,000 starts."""
    data = 3 * jnp.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
    denoiser = fixed_gates_denoiser(data, jnp.zeros(2), data / 3, jnp.full(2, 3.0))
    schedule = geometric_schedule(20.0, 1e-3, 200, to_zero=False)
    found = basin_shares(jax.random.key(1), denoiser, schedule, data, jnp.zeros(2), num_starts=2000, tolerance=2e-3)
    expected = float(no_unit_share(cosine))
    assert abs(found.at_offset - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)
    assert abs(np.diff(found.at_sample + found.along_sample)[0]) < 4 * np.sqrt((1 - expected) / 2000)
    assert found.at_sample.max() < 0.02


def test_of_two_samples_rows_come_back_and_of_five_none():
    """From beyond the samples gates beyond the offset return rows, to any accuracy; the nearer gates of five samples
    return none."""
    schedule = geometric_schedule(20.0, 1e-9, 400, to_zero=False)
    two = np.array([[3.0, 0.0], [-3.0, 0.0]])
    denoiser, offset, found = memorizing_family(two)
    assert float(return_exponent(3.0, found.gates[0])) > 0.4
    for side in (15.0, -15.0):
        end = probability_flow(denoiser, jnp.array([side, 7.0]), schedule)
        np.testing.assert_allclose(end, [np.sign(side) * 3.0, 0.0], atol=1e-2)
    five = circle(5)
    denoiser, offset, found = memorizing_family(five)
    assert float(return_exponent(3.0, found.gates[0])) < -0.4
    shares = basin_shares(jax.random.key(0), denoiser, geometric_schedule(20.0, 0.002, 200, to_zero=False),
                          jnp.asarray(five), offset, num_starts=300)  # fmt: skip
    assert shares.at_sample.sum() == 0
    assert shares.at_offset > 0.2
    total = shares.at_sample.sum() + shares.along_sample.sum() + shares.at_offset + shares.elsewhere
    assert total == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: return_exponent(0.0, 1.0), "length"),
        (lambda: return_exponent(1.0, 0.0), "gate"),
        (
            lambda: block_flow(jnp.ones(2), 1.0, 0.1, jnp.ones(2), jnp.zeros(2), jnp.ones(2), 1.0,
                               jnp.zeros((2, 1)), jnp.zeros(1)),
            "variance must be positive",
        ),
        (
            lambda: flow_ends(jax.random.key(0), lambda y, s: y, jnp.ones(2), jnp.zeros(2), num_starts=0),
            "num_starts",
        ),
        (lambda: unit_flow(jnp.ones(2), 1.0, 0.0, jnp.ones(2), jnp.zeros(2), jnp.ones(2), 1.0), "next_sigma"),
        (lambda: fixed_gates_denoiser(jnp.ones((2, 2)), jnp.ones(2), jnp.ones((2, 2)), -jnp.ones(2)), "gates"),
        (
            lambda: basin_shares(jax.random.key(0), lambda y, s: y, jnp.ones(2), jnp.ones((1, 2)), jnp.zeros(2),
                                 num_starts=0),
            "num_starts",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
