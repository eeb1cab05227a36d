"""Samples in convex position: distances to hulls, gates and gains, against optimization and the exact risk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dae_theory import memorizing_minimizer
from dae_theory.convexity import gate_distance, hull_distances, memorizing_cost, memorizing_gain
from dae_theory.energies import memorizing_energy
from dae_theory.relu_gaussian import relu_covariance, relu_mean

GOLDEN = [(5, 0.1, 1.9175, 1.9181, 1.5589, 1.5569), (7, 0.05, 1.0431, 1.0436, 2.8630, 2.8582),
          (9, 0.03, 0.6527, 0.6530, 4.5657, 4.5552)]  # fmt: skip
"""Points on a circle of radius 3 at a penalty of 1e-3: n, sigma, gate predicted and found, gain likewise."""


def circle(n, radius=3.0):
    turns = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def cosines(n):
    return np.cos(2 * np.pi * np.arange(1, n) / n)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("n", [3, 5, 9])
def test_on_a_circle_the_hull_is_a_chord_away(n):
    """The chord between the neighbors, and for a triangle the opposite side."""
    expected = 3 * (1 - np.cos(2 * np.pi / n))
    np.testing.assert_allclose(hull_distances(circle(n)), expected, rtol=1e-12)


def test_distances_are_those_of_a_general_optimizer():
    """Random samples in five dimensions, some inside; 1e-6 is the optimizer's accuracy of a distance near 0."""
    data = np.random.default_rng(0).normal(size=(14, 5))
    data[0] = data[1:].mean(axis=0)
    found = hull_distances(data)
    assert found[0] == 0
    for i in range(14):
        others = np.delete(data, i, axis=0)
        solved = optimize.minimize(
            lambda w, others=others, i=i: np.sum((data[i] - w @ others) ** 2),
            np.full(13, 1 / 13),
            bounds=[(0, None)] * 13,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        np.testing.assert_allclose(found[i], np.sqrt(solved.fun), rtol=1e-4, atol=2e-5)


def test_distances_move_with_the_data_and_repeats_have_none():
    data = np.random.default_rng(1).normal(size=(8, 12))
    found = hull_distances(data)
    # More dimensions than samples: all are extreme points.
    assert found.min() > 0.1
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    np.testing.assert_allclose(hull_distances(1e4 * data @ turn + 7.0), 1e4 * found, rtol=1e-9)
    np.testing.assert_array_equal(hull_distances(np.concatenate([data, data[:2]]))[[0, 1, 8, 9]], 0)
    # An extreme point that is left out makes no other sample less extreme.
    assert np.all(hull_distances(data[1:]) >= found[1:] - 1e-12)


def test_a_gate_through_the_offset_is_the_corollary():
    """b1 = b2 = 0 and a gate at the sample's own length: gain, and energy, of the paper's corollary."""
    x = np.array([[1.5, -2.0, 0.5]])
    length, sigma, penalty = float(np.linalg.norm(x)), 0.3, 0.02
    dae = memorizing_minimizer(jnp.asarray(x), sigma, penalty, 1)
    gain = memorizing_gain(length, length, sigma, penalty)
    np.testing.assert_allclose(gain, np.sum(np.square(dae.w1)), rtol=1e-12)
    energy = memorizing_energy(jnp.asarray(x), sigma, penalty).objective
    np.testing.assert_allclose(memorizing_cost(length, length, sigma, penalty), energy, rtol=1e-12)


def test_the_cost_falls_with_the_distance_of_the_gate_as_derived():
    length, sigma, decay, step = 2.0, 0.3, 0.1, 1e-5
    for gate in (0.3, 1.0, 1.7):
        slope = (
            memorizing_cost(length, gate + step, sigma, decay) - memorizing_cost(length, gate - step, sigma, decay)
        ) / (2 * step)
        expected = -2 * (gate * length - decay) * (length * sigma**2 + gate * decay) / (gate**2 + sigma**2) ** 2
        assert slope == pytest.approx(expected, rel=1e-7)
    assert memorizing_gain(1.0, 0.5, 0.1, decay=0.6) == 0
    assert memorizing_cost(1.0, 0.5, 0.1, decay=0.6) == 1
    assert memorizing_cost(3.0, 1.2, 0.2) == pytest.approx(0.04 * 9 / (1.44 + 0.04))


@pytest.mark.parametrize(("n", "sigma", "gate", "found", "gain", "found_gain"), GOLDEN)
def test_golden_gates(n, sigma, gate, found, gain, found_gain):
    kappa = gate_distance(3.0, cosines(n), sigma, n * 1e-3)
    assert kappa == pytest.approx(gate, abs=6e-5)
    assert memorizing_gain(3.0, kappa, sigma, n * 1e-3) == pytest.approx(gain, abs=6e-5)


spreads = jax.jit(relu_covariance)


def exact_cost(gate, gain, n, sigma):
    """n times the exact objective per sample of n equal units around the circle, biases and all: by moments."""
    data, decay = circle(n), n * 1e-3
    directions = data / 3
    w = np.sqrt(gain) * directions.T
    bias = np.sqrt(gain) * (gate - 3.0)
    mean = w.T @ data[0] + bias
    covariance = sigma**2 * w.T @ w
    std = np.sqrt(np.diag(covariance))
    code = np.asarray(relu_mean(jnp.asarray(mean), jnp.asarray(std)))
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    spread = np.asarray(spreads(*(jnp.asarray(part) for part in (mean[i], mean[j], std[i], std[j], covariance))))
    risk = np.sum((w @ code - data[0]) ** 2) + np.trace(w.T @ w @ spread)
    return risk + 2 * decay * gain


@pytest.mark.parametrize(
    ("n", "sigma", "gate", "found", "gain", "found_gain"),
    [GOLDEN[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in GOLDEN[1:])],
)
def test_the_exact_minimum_lies_where_predicted(n, sigma, gate, found, gain, found_gain):
    """The minimum of the exact objective over gates and gains of equal units has the golden values; the prediction
    is within .1 % of the gate and .3 % of the gain."""
    start = np.array([gate, gain])
    best = optimize.minimize(
        lambda v: exact_cost(v[0], v[1], n, sigma), start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}
    ).x
    assert best[0] == pytest.approx(found, abs=6e-5)
    assert best[1] == pytest.approx(found_gain, abs=6e-5)
    predicted = gate_distance(3.0, cosines(n), sigma, n * 1e-3)
    assert predicted == pytest.approx(best[0], rel=1e-3)
    assert memorizing_gain(3.0, predicted, sigma, n * 1e-3) == pytest.approx(best[1], rel=3e-3)


def test_the_gate_nears_the_hull_as_the_noise_falls():
    """By standard deviations whose number grows slowly: κ = D - O(σ √ln(1/σ))."""
    hull = 3 * (1 - cosines(7).max())
    gaps = [(hull - gate_distance(3.0, cosines(7), sigma)) / sigma for sigma in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert all(gap > 0 for gap in gaps)
    ratios = np.array(gaps[1:]) / np.sqrt(np.log(1 / np.array([1e-2, 1e-3, 1e-4])))
    assert ratios.max() / ratios.min() < 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hull_distances(np.zeros((1, 3))), "two samples or more"),
        (lambda: hull_distances(np.full((3, 2), np.nan)), "data"),
        (lambda: gate_distance(3.0, np.array([0.5, 1.0]), 0.1), "remove repeats"),
        (lambda: gate_distance(3.0, np.array([0.5]), 0.1, decay=5.0), "leaves no unit: it must be below 4.5"),
        (lambda: gate_distance(3.0, np.array([0.5]), 0.0), "sigma must be positive"),
        (lambda: memorizing_gain(0.0, 1.0, 0.1), "length must be positive"),
        (lambda: memorizing_cost(1.0, 1.0, 0.1, decay=-1.0), "decay"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
