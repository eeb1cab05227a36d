"""The bivariate normal distribution at every correlation, and the finiteness of its derivatives."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from dae_theory.bivariate_normal import bivariate_normal_cdf, gate_covariance, normal_cdf, normal_pdf, wedge

pytestmark = pytest.mark.optimized

cdf = jax.jit(bivariate_normal_cdf)
slopes = jax.jit(jax.vmap(jax.grad(bivariate_normal_cdf, argnums=(0, 1, 2))))
curvatures = jax.jit(jax.vmap(jax.hessian(bivariate_normal_cdf, argnums=(0, 1, 2))))

BOUNDS = [
    *[(0, 0), (1, 1), (1, 1 + 1e-7), (1, -1), (-2, 2.0000001), (3, 0), (0, -1e-300), (-1, -1.0001)],
    *[(8, 8), (40, 1), (-40, 3), (0.3, 0.29), (5, -5), (-7, -7.5)],
]
CORRELATIONS = [0, 1e-8, 0.6, 0.9999, 1 - 1e-9, 1 - 2**-53, 1]
CORNERS = np.array([(a, b, sign * r) for a, b in BOUNDS for r in CORRELATIONS for sign in (1, -1)])


def by_angle(a, b, r):
    """Φ₂ at 30 digits from the integral over the angle θ, cos θ = r, that starts at the closed form for |r| = 1."""
    with mpmath.workdps(30):
        a, b, r = mpmath.mpf(float(a)), mpmath.mpf(float(b)), mpmath.mpf(float(r))
        sign = -1 if r < 0 else 1

        def density(theta):
            half = theta / 2
            return mpmath.exp(
                -(((a - sign * b) / mpmath.sin(half)) ** 2 + ((a + sign * b) / mpmath.cos(half)) ** 2) / 8
            )

        theta = mpmath.acos(sign * r)
        # The integrand switches on at an angle of the size of the gap.
        cuts = sorted({min(theta, mpmath.mpf(10) ** -k) for k in (0, 1, 2, 4, 6, 8, 10)} | {theta, mpmath.mpf(0)})
        area = mpmath.quad(density, cuts) / (2 * mpmath.pi) if theta > 0 else mpmath.mpf(0)
        if sign > 0:
            return mpmath.ncdf(min(a, b)) - area
        # Φ(a) − Φ(−b) without the cancellation of two numbers near 1.
        return max(mpmath.ncdf(a) - mpmath.ncdf(-b), mpmath.mpf(0)) + area


def errors(points):
    values = cdf(*jnp.asarray(points).T)
    assert values.dtype == points.dtype
    return np.array([float(mpmath.mpf(float(v)) - by_angle(*x)) for v, x in zip(values, points, strict=True)])


@pytest.mark.slow
def test_hard_corners_in_float64():
    assert np.abs(errors(CORNERS)).max() < 1e-13


def test_hard_corners_in_float32():
    assert np.abs(errors(CORNERS[::7].astype(np.float32))).max() < 5e-7


def test_bulk_against_scipy():
    rng = np.random.default_rng(0)
    a, b, r = *rng.normal(scale=2.0, size=(2, 100)), np.tanh(rng.normal(scale=2.0, size=100))
    expected = [multivariate_normal([0, 0], [[1, s], [s, 1]]).cdf([x, y]) for x, y, s in zip(a, b, r, strict=True)]
    np.testing.assert_allclose(cdf(a, b, r), expected, rtol=0, atol=1e-13)


def test_orthant_probability_is_the_arcsine_law():
    r = np.concatenate([np.linspace(-1, 1, 41), 1 - np.logspace(-16, -2, 15), np.logspace(-16, -2, 15) - 1])
    zero = np.zeros_like(r)
    np.testing.assert_allclose(cdf(zero, zero, r), 0.25 + np.arcsin(r) / (2 * np.pi), rtol=0, atol=1e-15)


def test_infinite_bounds_and_exact_correlations():
    inf = np.inf
    a, b = np.array([inf, -inf, 0.7, inf, 0.7, 0.7, -0.7]), np.array([0.3, 0.3, inf, -inf, 0.3, -0.3, 0.2])
    phi = norm.cdf
    for r in (-1.0, -0.4, 0.0, 0.4, 1.0):
        np.testing.assert_allclose(cdf(a, b, np.full(7, r))[:4], [phi(0.3), 0.0, phi(0.7), 0.0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(cdf(a, b, np.ones(7)), phi(np.minimum(a, b)), rtol=0, atol=1e-15)
    np.testing.assert_allclose(cdf(a, b, -np.ones(7)), np.maximum(phi(a) + phi(b) - 1, 0), rtol=0, atol=2e-16)
    np.testing.assert_allclose(cdf(a, b, np.zeros(7)), phi(a) * phi(b), rtol=0, atol=1e-15)


bound = st.floats(-45, 45) | st.sampled_from([0.0, -0.0, 1e-310, 40.0, -40.0])
correlation = st.floats(-1, 1) | st.floats(-16, 0).map(lambda e: 1 - 10**e) | st.sampled_from([-1.0, 1.0])


@given(bound, bound, correlation)
def test_symmetry_and_reflection(a, b, r):
    whole = float(normal_cdf(jnp.asarray(a)))
    a, b, r = jnp.asarray(a), jnp.asarray(b), jnp.asarray(r)
    value = float(cdf(a, b, r))
    assert abs(value - float(cdf(b, a, r))) < 2e-15
    assert abs(value + float(cdf(a, -b, -r)) - whole) < 2e-15
    assert -1e-15 < value < min(whole, float(normal_cdf(b))) + 1e-15


@given(bound, bound, st.lists(correlation, min_size=2, max_size=2))
def test_never_falls_as_the_correlation_grows(a, b, r):
    low, high = (float(cdf(jnp.asarray(a), jnp.asarray(b), jnp.asarray(x))) for x in sorted(r))
    assert low <= high + 1e-15


def test_derivatives_of_both_orders_against_differences():
    points = np.array([(0.3, -0.7, 0.6), (1.2, 1.1, -0.95), (-0.4, -0.5, 0.99), (0.0, 0.8, 0.0)])
    first, second = np.stack(slopes(*points.T)), np.array(curvatures(*points.T))
    # The density varies over q in the bounds and q² in r: error O(step²/scale²) plus rounding over step.
    step = 1e-4 * (1 - points[:, 2] ** 2)
    for i in range(3):
        high, low = (points + sign * step[:, None] * np.eye(3)[i] for sign in (1, -1))
        np.testing.assert_allclose((cdf(*high.T) - cdf(*low.T)) / (2 * step), first[i], rtol=1e-6, atol=1e-9)
        change = np.stack(slopes(*high.T)) - np.stack(slopes(*low.T))
        np.testing.assert_allclose(change / (2 * step), second[i], rtol=1e-6, atol=1e-8)


def test_slope_in_the_correlation_is_the_density():
    a, b, r = np.meshgrid([-1.5, 0.0, 0.2], [0.2, 1.0], [-0.99, -0.3, 0.0, 0.8, 0.9999], indexing="ij")
    expected = [
        multivariate_normal([0, 0], [[1, s], [s, 1]]).pdf([x, y])
        for x, y, s in zip(a.ravel(), b.ravel(), r.ravel(), strict=True)
    ]
    # The exponent, up to 97 here, is known to eps/q².
    np.testing.assert_allclose(slopes(a.ravel(), b.ravel(), r.ravel())[2], expected, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_derivatives_are_finite_everywhere(dtype):
    inf = np.array([(np.inf, 0.3, 1.0), (-np.inf, np.inf, -1.0), (np.inf, np.inf, 0.2), (1e30, -1e30, 1.0)])
    points = jnp.asarray(np.concatenate([CORNERS, inf]).astype(dtype))
    for derivative in (slopes, curvatures):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivative(*points.T)))


def test_slopes_at_full_correlation_are_those_of_the_minimum():
    # Φ(min(a, b)) at r = 1, max(Φ(a) + Φ(b) − 1, 0) at r = −1.
    da, db, dr = slopes(
        jnp.array([0.3, 0.5, 0.3, 0.3]), jnp.array([0.5, 0.3, -0.2, -0.4]), jnp.array([1.0, 1.0, -1.0, -1.0])
    )
    phi = norm.pdf
    np.testing.assert_allclose(da, [phi(0.3), 0, phi(0.3), 0], rtol=1e-15, atol=1e-16)
    np.testing.assert_allclose(db, [0, phi(0.3), phi(0.2), 0], rtol=1e-15, atol=1e-16)
    np.testing.assert_array_equal(dr, 0)


def test_corner_coordinates_keep_their_digits():
    for a, b, q in [(1.3, 1.3 + 1e-9, 1e-6), (1.3, -1.3, 1e-8), (0.2, 1.4, 0.3)]:
        for sign in (1, -1):
            with mpmath.workdps(40):
                a_, b_, q_ = map(mpmath.mpf, (a, b, q))
                r_ = sign * mpmath.sqrt(1 - q_**2)
                expected = np.array([(a_ - r_ * b_) / q_, (b_ - r_ * a_) / q_], float)
            w = wedge(*map(jnp.asarray, (a, b, sign * np.sqrt(1 - q**2), q)))
            np.testing.assert_allclose([w.t_a, w.t_b], expected, rtol=4e-15)
            np.testing.assert_allclose(w.density, norm.pdf(a) * norm.pdf(expected[1]), rtol=1e-13)


def test_certain_gates_covary_with_nothing():
    points = jnp.array([(40.0, 40.0, 0.8, 0.6), (-40.0, 0.1, 0.8, 0.6), (40.0, -1.0, 0.8, 0.6)])
    np.testing.assert_allclose(jax.jit(lambda *x: gate_covariance(wedge(*x)))(*points.T), 0, atol=1e-16)


def test_normal_distribution_keeps_its_left_tail():
    x = jnp.array([-37.0, -20.0, -5.0, 0.0, 3.0])
    # The exponent x²/2 carries its rounding into the value: 37² eps.
    np.testing.assert_allclose(normal_cdf(x), norm.cdf(x), rtol=4e-13)
    np.testing.assert_allclose(jax.vmap(jax.grad(normal_cdf))(x), normal_pdf(x), rtol=1e-15)


def test_one_trace_per_shape_and_lowers_for_accelerators():
    traces = []
    traced = jax.jit(lambda *args: traces.append(1) or bivariate_normal_cdf(*args))
    for r in (0.1, 0.99, -1.0):
        traced(jnp.ones(3), jnp.ones(3), jnp.full(3, r))
    assert len(traces) == 1
    x = jax.ShapeDtypeStruct((7,), jnp.float32)
    traced.trace(x, x, x).lower(lowering_platforms=("tpu", "cuda"))
