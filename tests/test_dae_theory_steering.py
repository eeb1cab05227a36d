"""Steering in closed form against the simulated flow of the minimizers, with its golden values, limits and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from dae_theory.minimizers import memorizing_minimizer
from dae_theory.model import denoise
from dae_theory.steering import onset_strength, onset_time, steered_in_block, steered_outside, switching_strength

WINDOW = (0.2, 0.01)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def flow(denoise, start, pull, sigma_from, sigma, **more):
    """dy/dt = D_σ(y) + pull − y along σ = sigma_from e^{−t}."""

    def slope(t, y):
        return denoise(y, sigma_from * math.exp(-t)) + pull - y

    span = math.log(sigma_from / sigma)
    return solve_ivp(slope, (0, span), start, rtol=1e-10, atol=1e-12, method="DOP853", **more).y[:, -1]


def pair(opposition, norm):
    """Two samples of this norm with this much opposition, in two dimensions."""
    return norm * np.array([[1.0, 0.0], [-opposition, math.sqrt(1 - opposition**2)]])


def remembered(samples):
    """The minimizers that memorize the samples without penalty, for every noise level."""
    norms = np.linalg.norm(samples, axis=1)
    directions = samples / norms[:, None]

    def denoise(y, sigma):
        return (norms**2 / (norms**2 + sigma**2) * np.maximum(directions @ y, 0)) @ directions

    return denoise


def test_the_simulated_flow_is_that_of_the_minimizers():
    """One pass of the closed form that is simulated, against the library's minimizer at a tiny penalty."""
    samples = pair(0.3, 3.0)
    dae = memorizing_minimizer(jnp.asarray(samples), 0.2, 1e-12, 2)
    for y in np.random.default_rng(0).normal(size=(5, 2)):
        np.testing.assert_allclose(denoise(dae, jnp.asarray(y)), remembered(samples)(y, 0.2), rtol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_in_a_block_it_is_the_flow(decay):
    """Two directions of a linear block, with and without penalty; linear in the pull, and kept after release."""
    variance, start, pull = (np.array(part) for part in ([4.0, 0.9], [1.0, -0.5], [0.2, 0.4]))

    def denoise(y, sigma):
        return (variance - decay) / (variance + sigma**2) * y

    given = [jnp.asarray(part) for part in (start, pull, variance)]
    found = steered_in_block(*given, 2.0, 0.05, decay)
    np.testing.assert_allclose(found, flow(denoise, start, pull, 2.0, 0.05), rtol=1e-8)
    plain, twice = (steered_in_block(given[0], k * given[1], given[2], 2.0, 0.05, decay) for k in (0, 2))
    np.testing.assert_allclose(twice - plain, 2 * (found - plain), rtol=1e-10)
    # In steps it is the same.
    middle = steered_in_block(*given, 2.0, 0.3, decay)
    np.testing.assert_allclose(steered_in_block(middle, given[1], given[2], 0.3, 0.05, decay), found, rtol=1e-10)
    # After release the shift shrinks as the solution without it does: by σ^(l/s) of the penalty alone.
    released = [steered_in_block(y, 0 * given[1], given[2], 0.05, 1e-3, decay) for y in (found, plain)]
    kept = (0.02 ** (decay / variance)) * np.sqrt((variance + 1e-6) / (variance + 0.0025)) ** (1 - decay / variance)
    np.testing.assert_allclose(released[0] - released[1], kept * (found - plain), rtol=1e-9)


def test_without_penalty_it_is_the_inverse_hyperbolic_sine():
    s, low, high = 2.5, 0.01, 3.0
    root = math.sqrt(s)
    integral = (math.asinh(root / low) - math.asinh(root / high)) / root
    found = steered_in_block(jnp.ones(1), jnp.full(1, 0.7), jnp.full(1, s), high, low)
    expected = math.sqrt(s + low**2) * (1 / math.sqrt(s + high**2) + 0.7 * integral)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_outside_of_a_block_it_is_the_flow_and_is_erased():
    start, pull = np.array([1.0, -2.0]), np.array([0.5, 0.5])
    found = steered_outside(jnp.asarray(start), jnp.asarray(pull), 1.0, 0.1)
    np.testing.assert_allclose(found, flow(lambda y, sigma: 0 * y, start, pull, 1.0, 0.1), rtol=1e-8)
    np.testing.assert_allclose(steered_outside(found, jnp.zeros(2), 0.1, 0.001), found / 100, rtol=1e-12)


def test_golden_thresholds():
    assert onset_strength(0.3, *WINDOW) == pytest.approx(0.265, abs=5e-4)
    assert switching_strength(0.3, *WINDOW) == pytest.approx(0.4456, abs=5e-5)


@pytest.mark.parametrize("opposition", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("low", [0.1, 0.01, 1e-4])
def test_thresholds_are_where_they_say(opposition, low):
    """At the onset the unit turns on at the window's end; above it earlier; switching needs more than onset."""
    window = math.log(0.2 / low)
    on = onset_strength(opposition, 0.2, low)
    assert onset_time(on * (1 + 1e-9), opposition, 0.2, low) == pytest.approx(window, rel=1e-6)
    assert onset_time(on * (1 - 1e-9), opposition, 0.2, low) == math.inf
    assert switching_strength(opposition, 0.2, low) > on
    # A longer window asks for less.
    assert onset_strength(opposition, 0.2, low / 2) < on
    assert switching_strength(opposition, 0.2, low / 2) < switching_strength(opposition, 0.2, low)
    # The unit is on where the path without it has turned to its side.
    a = 1.3 * on
    t = onset_time(a, opposition, 0.2, low)
    projection = -opposition * (1 - a * opposition * t) - a * (1 - opposition**2) * math.expm1(-t)
    assert projection == pytest.approx(0, abs=1e-12)


def simulated_threshold(opposition, window, norm):
    """The strength at which the released flow of the ReLU networks ends at the other sample, by bisection."""
    samples = pair(opposition, norm)
    denoise = remembered(samples)

    def switches(strength):
        steered = flow(denoise, samples[0], strength * samples[1], *window, max_step=0.02)
        released = flow(denoise, steered, np.zeros(2), window[1], window[1] / 1e4)
        return released @ samples[1] > released @ samples[0]

    low, high = 0.0, 2 * switching_strength(opposition, *window)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if switches(middle) else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("opposition", "window"),
    [
        (0.3, (0.2, 0.01)),
        pytest.param(0.1, (0.2, 0.01), marks=pytest.mark.slow),
        pytest.param(0.6, (0.2, 0.01), marks=pytest.mark.slow),
        pytest.param(0.3, (0.4, 0.05), marks=pytest.mark.slow),
        pytest.param(0.6, (0.1, 0.001), marks=pytest.mark.slow),
    ],
)
def test_the_simulated_flow_jumps_at_the_predicted_strength(opposition, window):
    """Within a share σ₀²/N of the prediction, and the halving of 14 steps; the error falls with N."""
    predicted = switching_strength(opposition, *window)
    for norm in (3.0, 6.0):
        found = simulated_threshold(opposition, window, norm)
        assert abs(found / predicted - 1) < window[0] ** 2 / norm**2 + 2**-13


def test_below_the_threshold_the_sample_comes_back_and_above_the_other_one():
    """The golden example: cosines with the first sample after release, of flows that were integrated otherwise."""
    samples = pair(0.3, 3.0)
    relu = remembered(samples)
    for strength, expected in ((0.435, 0.9993), (0.455, -0.263)):
        steered = flow(relu, samples[0], strength * samples[1], *WINDOW, max_step=0.02)
        released = flow(relu, steered, np.zeros(2), 0.01, 1e-5)
        cosine = released @ samples[0] / np.linalg.norm(released) / 3
        assert cosine == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: onset_strength(1.0, 0.2, 0.1), "opposition must lie between 0 and 1"),
        (lambda: switching_strength(0.3, 0.1, 0.2), "sigma must be below sigma_from = 0.1"),
        (lambda: onset_time(0.0, 0.3, 0.2, 0.1), "strength must be positive"),
        (lambda: steered_in_block(jnp.ones(1), jnp.ones(1), jnp.zeros(1), 1.0, 0.1), "variance must be positive"),
        (lambda: steered_outside(jnp.ones(1), jnp.ones(1), 1.0, 0.0), "sigma must be positive"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
