"""Rectified Gaussian moments: quadrature by conditioning, parallel and zero units, scales, both derivatives."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dae_theory.relu_gaussian import (
    relu_covariance,
    relu_cross_moment,
    relu_mean,
    relu_second_moment,
    relu_variance,
    standardize,
)

ALL = (0, 1, 2, 3, 4)
moment, covariance = jax.jit(relu_cross_moment), jax.jit(relu_covariance)
covariance_slopes = jax.jit(jax.vmap(jax.value_and_grad(relu_covariance, ALL)))
covariance_curvatures = jax.jit(jax.vmap(jax.hessian(relu_covariance, ALL)))


def legendre(cuts, nodes=60):
    """Nodes and weights of a Gauss rule on every interval between the cuts."""
    z, w = np.polynomial.legendre.leggauss(nodes)
    low, high = np.array(cuts[:-1])[:, None], np.array(cuts[1:])[:, None]
    return (low + (high - low) * (z + 1) / 2).ravel(), ((high - low) / 2 * w).ravel()


def by_conditioning(m_j, m_k, s_j, s_k, c):
    """``E[u_j]₊[u_k]₊``, the inner average given u_j in closed form, the outer by quadrature."""
    r = c / (s_j * s_k)
    spread = s_k * np.sqrt(max(0.0, (1 - r) * (1 + r)))
    low, high = np.clip(-m_j / s_j, -38, 38), 38
    kink, width = (-m_k / s_k / r, max(spread / s_k / abs(r), 1e-9)) if r else (0.0, 1.0)
    cuts = [
        low,
        *np.clip([kink + k * width for k in (-40, -8, 0, 8, 40)], low, high),
        *np.clip([-9, -3, 0, 3, 9], low, high),
        high,
    ]
    z, w = legendre(np.unique(cuts))
    inner_mean = m_k + r * s_k * z
    if spread > 0:
        inner = inner_mean * norm.cdf(inner_mean / spread) + spread * norm.pdf(inner_mean / spread)
    else:
        inner = np.maximum(inner_mean, 0)
    return np.sum(w * norm.pdf(z) * (m_j + s_j * z) * inner)


PAIRS = np.array(
    [
        (a * s_j, b * s_k, s_j, s_k, r * s_j * s_k)
        for a, b in [(0, 0), (0.3, -0.8), (2, 1.5), (-1, -1), (-3, 0.2), (5, -6), (40, -0.5), (40, 40), (-40, 1)]
        for s_j, s_k in [(1, 1), (1e-3, 30)]
        for r in [-1, -1 + 1e-9, -0.95, -0.2, 0, 1e-8, 0.6, 0.999, 1]
    ]
)


def test_cross_moment_against_quadrature():
    scale = (np.abs(PAIRS[:, 0]) + PAIRS[:, 2]) * (np.abs(PAIRS[:, 1]) + PAIRS[:, 3])
    expected = np.array([by_conditioning(*pair) for pair in PAIRS])
    np.testing.assert_allclose(moment(*PAIRS.T) / scale, expected / scale, rtol=0, atol=2e-14)


def test_single_moments_against_quadrature():
    for m, s in [(0.0, 1.0), (-2.0, 0.5), (3.0, 10.0), (1e-3, 1e-3)]:
        z, w = legendre([np.clip(-m / s, -38, 38), *[c for c in (-3, 0, 3, 9) if c > -m / s], 38])
        u, density = m + s * z, w * norm.pdf(z)
        np.testing.assert_allclose(relu_mean(jnp.array(m), jnp.array(s)), np.sum(density * u), rtol=1e-12)
        np.testing.assert_allclose(relu_second_moment(jnp.array(m), jnp.array(s)), np.sum(density * u * u), rtol=1e-12)


def test_a_unit_paired_with_itself_has_its_variance():
    a, s = (
        x.ravel() for x in jnp.meshgrid(jnp.array([-50.0, -3.0, -0.1, 0.0, 0.7, 4.0, 60.0]), jnp.array([1e-3, 1e3]))
    )
    itself, variance = covariance(a * s, a * s, s, s, s * s), relu_variance(a * s, s)
    np.testing.assert_allclose(itself / s**2, variance / s**2, rtol=0, atol=1e-14)


def test_certain_gates_leave_the_gaussian_or_nothing():
    # a from 40 to infinity: the covariance is exactly c, or exactly 0, however large the means.
    for far in (40.0, 1e8, 1e300):
        m = jnp.array([far, far, -far])
        value = covariance(m, jnp.array([far, -far, 0.3]), jnp.ones(3), jnp.full(3, 2.0), jnp.full(3, 1.1))
        np.testing.assert_allclose(value, [1.1, 0, 0], rtol=1e-15, atol=1e-15)


def test_without_noise_everything_is_deterministic():
    zero, m = jnp.zeros(3), jnp.array([0.7, 0.0, -0.7])
    np.testing.assert_array_equal(standardize(m, zero), [40, 0, -40])
    np.testing.assert_array_equal(relu_mean(m, zero), [0.7, 0, 0])
    np.testing.assert_array_equal(moment(m, m, zero, zero, zero), np.maximum(m, 0) ** 2)


def test_against_monte_carlo(key):
    m, s, r, n = np.array([0.4, -0.3]), np.array([1.5, 0.8]), -0.7, 100_000
    z = np.asarray(jax.random.normal(key, (2, n)))
    u = m[0] + s[0] * z[0], m[1] + s[1] * (r * z[0] + np.sqrt(1 - r**2) * z[1])
    product = np.maximum(u[0], 0) * np.maximum(u[1], 0)
    error = product.std() / np.sqrt(n)
    assert abs(product.mean() - moment(*map(jnp.asarray, (*m, *s, r * s[0] * s[1])))) < 4 * error


standardized = st.floats(-8, 8) | st.floats(-45, 45) | st.sampled_from([0.0, 40.0, -40.0])
scale = st.floats(-3, 3).map(lambda e: 10**e) | st.just(0.0)
correlation = st.floats(-1, 1) | st.floats(-16, 0).map(lambda e: 1 - 10**e) | st.sampled_from([-1.0, 1.0])


@given(standardized, standardized, scale, scale, correlation)
def test_reflecting_one_unit_leaves_a_gaussian(a, b, s_j, s_k, r):
    """``[u]₊ = u + [−u]₊`` and ``Cov(u, [v]₊) = c Φ(b)``: values, and all first derivatives, over the whole domain."""
    pair = np.array([a * s_j, b * s_k, s_j, s_k, r * s_j * s_k])
    turned = pair * np.array([-1, 1, 1, 1, -1])
    values, slopes = covariance_slopes(*jnp.asarray([pair, turned]).T)
    rounding = 1e-12 * max(1, abs(a)) * max(1, abs(b))
    gate = norm.cdf(b) if s_k else 0.5
    assert abs(values[0] - values[1] - pair[4] * gate) <= rounding * s_j * s_k
    slopes = np.array(slopes)
    assert np.isfinite(slopes).all()
    spike = norm.pdf(b) * r if s_j and s_k else 0.0
    expected = [0, spike * s_j, 0, -spike * s_j * b, gate]
    units = np.array([s_k, s_j, s_k, s_j, 1.0])
    difference = slopes[:, 0] - slopes[:, 1] * np.array([-1, 1, 1, 1, -1])
    assert (np.abs(difference - expected) <= rounding * units).all()


@given(standardized, standardized, scale, scale, correlation, st.floats(-3, 3))
def test_homogeneous_of_degree_one_in_each_unit_and_symmetric(a, b, s_j, s_k, r, e):
    t, pair = 10**e, (a * s_j, b * s_k, s_j, s_k, r * s_j * s_k)
    value = covariance(*map(jnp.asarray, pair))
    longer = covariance(*map(jnp.asarray, (t * pair[0], pair[1], t * s_j, s_k, t * pair[4])))
    swapped = covariance(*map(jnp.asarray, (pair[1], pair[0], s_k, s_j, pair[4])))
    # t r s_j s_k may round across the threshold that counts as parallel: an angle of 6e-8, cubed.
    rounding = 1e-12 * max(1, abs(a)) * max(1, abs(b)) * s_j * s_k
    assert abs(longer - t * value) <= t * rounding
    assert abs(swapped - value) <= rounding
    assert (
        value**2
        <= relu_variance(*map(jnp.asarray, (pair[0], s_j))) * relu_variance(*map(jnp.asarray, (pair[1], s_k)))
        + rounding * s_j * s_k
    )


REGULAR = [(0.3, -0.5, 1.2, 0.7, 0.4), (-0.2, 0.9, 0.8, 1.1, -0.85), (0.9, 1.4, 0.6, 0.9, 0.53), (2, 0.1, 0.5, 2, 0)]
ZERO = [(0, 0, 0, 0, 0), (0, 1, 0, 2, 0), (1, -1, 0, 0, 0), (1e15, 1, 1e-15, 1, 0), (1e-12, 0, 1e-12, 1, 1e-12)]
# One array for all tests of derivatives, which so compile once.
POINTS = np.concatenate([REGULAR, ZERO, PAIRS])


def test_derivatives_of_both_orders_against_differences():
    first, second, step = np.stack(covariance_slopes(*POINTS.T)[1]), np.array(covariance_curvatures(*POINTS.T)), 1e-5
    near = slice(len(REGULAR))
    for i in range(5):
        high, low = ((POINTS + sign * step * np.eye(5)[i]).T for sign in (1, -1))
        rise, change = (
            np.array(f(*high)) - np.array(f(*low)) for f in (covariance, lambda *x: covariance_slopes(*x)[1])
        )
        np.testing.assert_allclose(rise[near] / (2 * step), first[i, near], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(change[:, near] / (2 * step), second[i][:, near], rtol=1e-5, atol=1e-7)


def test_the_derivative_in_the_covariance_is_the_probability_that_both_are_on():
    r = np.linspace(-1, 1, len(POINTS))
    zero, one = np.zeros_like(r), np.ones_like(r)
    slope = covariance_slopes(zero, zero, one, one, r)[1][4]
    np.testing.assert_allclose(slope, 0.25 + np.arcsin(r) / (2 * np.pi), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_derivatives_are_finite_everywhere(dtype):
    for derivative in (covariance_slopes, covariance_curvatures):
        leaves = jax.tree.leaves(derivative(*POINTS.astype(dtype).T))
        assert all(leaf.dtype == dtype and np.isfinite(leaf).all() for leaf in leaves)


def test_float32_loses_nothing_beyond_rounding():
    points = PAIRS.astype(np.float32)
    # The correlation that float32 numbers hold decides on the answer, not the one they were rounded from.
    error = np.array(covariance(*points.T)) - np.array(covariance(*points.astype(np.float64).T))
    length = [np.maximum(1, np.abs(points[:, i] / points[:, 2 + i]).clip(max=8)) for i in (0, 1)]
    unit = points[:, 2] * points[:, 3] * length[0] * length[1]
    assert np.abs(error / unit).max() < 10 * np.finfo(np.float32).eps


def column_moment(columns, x, sigma=0.6):
    """``E[wᵀy]₊[vᵀy]₊``, ``y ~ N(x, σ²I)``, as a function of the columns."""
    w, v = columns
    return relu_cross_moment(w @ x, v @ x, sigma * jnp.sqrt(w @ w), sigma * jnp.sqrt(v @ v), sigma**2 * (w @ v))


column_derivatives = jax.jit(
    lambda columns, x: (jax.grad(column_moment)(columns, x), jax.hessian(column_moment)(columns, x))
)


def half_square(w, x):
    return 0.5 * relu_second_moment(w @ x, 0.6 * jnp.sqrt(w @ w))


half_square_derivatives = jax.jit(lambda w, x: (jax.grad(half_square)(w, x), jax.hessian(half_square)(w, x)))


@pytest.mark.parametrize("ratio", [1.0, 2.5, -2.5, -1e3])
def test_parallel_columns_have_the_derivatives_of_one_unit(ratio):
    """``∂E/∂w = E[1(u>0) v₊ y]``, ``∂²E/∂w∂v = E[1(u>0) 1(v>0) y yᵀ]``, ``∂²E/∂w² = E[δ(u) v₊ y yᵀ] = 0``, v = ρu."""
    w, x = jnp.array([0.7, -0.3]), jnp.array([0.5, 0.4])
    both_on = 1.0 if ratio > 0 else 0.0
    slope, curvature = (both_on * derivative for derivative in half_square_derivatives(w, x))
    found, blocks = column_derivatives(jnp.stack([w, ratio * w]), x)
    np.testing.assert_allclose(found[0] / ratio, slope, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(found[1], slope, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(blocks[0, :, 1], curvature, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(blocks[0, :, 0] / ratio, 0, atol=1e-14)
    np.testing.assert_allclose(blocks[1, :, 1], 0, atol=1e-14)


@pytest.mark.parametrize(("eta", "curvature_error"), [(1e-2, 1e-13), (1e-5, 1e-11), (1e-8, 5e-8)])
def test_almost_parallel_columns_against_high_precision(eta, curvature_error):
    columns = np.array([(0.7, -0.3), (1.75, -0.75)]) + eta * np.array([(0, 0), (0.2, 0.9)])
    x, turn = np.array([0.5, 0.4]), np.array([[0.3, -0.8], [1.1, 0.4]])
    with mpmath.workdps(30):
        step = mpmath.mpf(10) ** -9
        point, along = ([mpmath.mpf(float(c)) for c in a.ravel()] for a in (columns, turn))

        def slope(point):
            shifted = [[c + e * (i == k) for k, c in enumerate(point)] for i in range(4) for e in (step, -step)]
            values = [high_precision_moment(c[:2], c[2:], x, mpmath.mpf(0.6)) for c in shifted]
            return [(high - low) / (2 * step) for high, low in zip(values[::2], values[1::2], strict=True)]

        expected = np.array(slope(point), float).reshape(2, 2)
        ahead, behind = (slope([c + e * t for c, t in zip(point, along, strict=True)]) for e in (step, -step))
        change = np.array([(s - t) / (2 * step) for s, t in zip(ahead, behind, strict=True)], float).reshape(2, 2)
    found, hessian = column_derivatives(jnp.asarray(columns), jnp.asarray(x))
    # Gradients in the columns are blind to rounding of the angle; Hessians see it to first order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.tensordot(hessian, turn, axes=2), change, rtol=0, atol=curvature_error)


def high_precision_moment(w, v, x, sigma):
    """The bivariate moment in two dimensions as an angle integral over the cone where both units are on."""
    # With y = x + σε in polar coordinates around 0, both units are linear along rays and the radius integrates exactly.
    x1, x2 = (mpmath.mpf(float(c)) for c in x)
    angle = lambda c: mpmath.atan2(c[1], c[0])  # noqa: E731
    low, high = max(angle(w), angle(v)) - mpmath.pi / 2, min(angle(w), angle(v)) + mpmath.pi / 2

    def ray(theta):
        e1, e2 = mpmath.cos(theta), mpmath.sin(theta)
        mean, miss = (x1 * e1 + x2 * e2) / sigma, (x1 * e2 - x2 * e1) / sigma
        # ∫ ρ³ exp(−(ρ − μ)²/2) dρ over ρ > 0, in units of σ.
        third = (mean**3 + 3 * mean) * mpmath.ncdf(mean) + (mean**2 + 2) * mpmath.npdf(mean)
        return (w[0] * e1 + w[1] * e2) * (v[0] * e1 + v[1] * e2) * mpmath.npdf(miss) * third * sigma**2

    return mpmath.quad(ray, [low, (low + high) / 2, high])


def test_a_zero_unit_has_the_mean_of_the_one_sided_derivatives():
    (m_g, s_g, c_g), (m_k, s_k) = (0.4, 1.3, -0.5), (0.3, 0.9)
    slopes = covariance_slopes(*jnp.tile(jnp.array([0, m_k, 0, s_k, 0]), (len(POINTS), 1)).T)[1]
    forward, backward = (
        relu_cross_moment(*map(jnp.asarray, (sign * m_g, m_k, s_g, s_k, sign * c_g))) for sign in (1, -1)
    )
    gate = jax.grad(relu_mean)(jnp.zeros(()), jnp.zeros(()))
    found = slopes[0][0] * m_g + slopes[4][0] * c_g + gate * m_g * relu_mean(jnp.asarray(m_k), jnp.asarray(s_k))
    np.testing.assert_allclose(found, (forward - backward) / 2, rtol=1e-14)
    np.testing.assert_array_equal([gate, *slopes[1][:1], *slopes[3][:1]], [0.5, 0, 0])


def test_one_trace_per_shape_and_lowers_for_accelerators():
    traces = []
    traced = jax.jit(lambda *args: traces.append(1) or relu_cross_moment(*args))
    for pairs in (PAIRS[:4], PAIRS[4:8]):
        traced(*pairs.T)
    assert len(traces) == 1
    x = jax.ShapeDtypeStruct((7,), jnp.float32)
    traced.trace(x, x, x, x, x).lower(lowering_platforms=("tpu", "cuda"))
    for function in (relu_mean, relu_variance, relu_second_moment):
        jax.jit(function).trace(x, x).lower(lowering_platforms=("tpu", "cuda"))
