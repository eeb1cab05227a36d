"""Spikiness: identities, both ends, scale, and zero codes."""

import inspect

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dae_theory import spikiness

# No subnormals: XLA flushes them to zero.
codes = hypothesis.extra.numpy.arrays(
    np.float64, st.integers(2, 30), elements=st.floats(1e-6, 1e3) | st.just(0.0)
).filter(lambda h: h.max() > 0)


@hypothesis.given(codes)
def test_against_numpy_and_scipy(code):
    h = jnp.asarray(code)
    p = code.size
    l1, l2, l4 = (np.sum(code**k) ** (1 / k) for k in (1, 2, 4))
    np.testing.assert_allclose(spikiness.std(h), np.std(code), rtol=1e-10, atol=1e-12 * code.max())
    np.testing.assert_allclose(spikiness.l4_over_l2(h), l4 / l2, rtol=1e-12)
    np.testing.assert_allclose(spikiness.participation_ratio(h), l2**4 / l4**4, rtol=1e-12)
    np.testing.assert_allclose(
        spikiness.hoyer(h), (np.sqrt(p) - l1 / l2) / (np.sqrt(p) - 1), rtol=1e-9, atol=1e-12 * np.sqrt(p)
    )
    if np.std(code) > 1e-3 * code.max():
        np.testing.assert_allclose(spikiness.kurtosis(h), scipy.stats.kurtosis(code), rtol=1e-8, atol=1e-8)


@hypothesis.given(codes)
def test_std_identity_for_nonnegative_codes(code):
    p = code.size
    variance = np.sum(code**2) / p - (np.sum(code) / p) ** 2
    np.testing.assert_allclose(float(spikiness.std(jnp.asarray(code))) ** 2, variance, atol=4e-15 * p * code.max() ** 2)


@hypothesis.given(codes, st.floats(1e-3, 1e3))
def test_only_std_depends_on_scale(code, scale):
    for name, measure in spikiness.MEASURES.items():
        once, scaled = measure(jnp.asarray(code)), measure(jnp.asarray(code * scale))
        expected = once * scale if name == "std" else once
        np.testing.assert_allclose(scaled, expected, rtol=1e-7, atol=1e-7 * scale if name == "std" else 1e-7)


@pytest.mark.parametrize("width", [2, 5, 100])
def test_one_hot_and_constant_codes_are_the_ends(width):
    one_hot, constant = jnp.zeros(width).at[1].set(3.0), jnp.full(width, 0.1)
    ends = {
        "std": (3.0 * np.sqrt(width - 1) / width, 0.0),
        "l4_over_l2": (1.0, width**-0.25),
        "participation_ratio": (1.0, width),
        "hoyer": (1.0, 0.0),
        "kurtosis": (scipy.stats.kurtosis(np.asarray(one_hot)), -2.0),
    }
    for name, (spiky, balanced) in ends.items():
        measure = spikiness.MEASURES[name]
        np.testing.assert_allclose(measure(one_hot), spiky, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(measure(constant), balanced, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "value"), [(n, -2.0 if n == "kurtosis" else 0.0) for n in spikiness.MEASURES])
def test_zero_code_has_its_documented_value_and_a_finite_gradient(name, value):
    measure = spikiness.MEASURES[name]
    assert float(measure(jnp.zeros(6))) == value
    chex.assert_tree_all_finite(jax.grad(measure)(jnp.zeros(6)))
    chex.assert_tree_all_finite(jax.grad(measure)(jnp.full(6, 0.1)))
    chex.assert_tree_all_finite(jax.grad(measure)(jnp.zeros(6).at[2].set(1e-12)))


def test_width_one_is_defined():
    values = {name: float(measure(jnp.array([2.0]))) for name, measure in spikiness.MEASURES.items()}
    assert values == {"std": 0.0, "l4_over_l2": 1.0, "participation_ratio": 1.0, "hoyer": 0.0, "kurtosis": -2.0}


def test_small_and_large_scales_survive_float32():
    h = jnp.array([1.0, 2.0, 0.0, 4.0], jnp.float32)
    for scale in (1e-30, 1e30):
        for name in ("l4_over_l2", "participation_ratio", "hoyer", "kurtosis"):
            measure = spikiness.MEASURES[name]
            np.testing.assert_allclose(measure(h * scale), measure(h), rtol=1e-5)


def test_lowers_for_accelerators():
    for measure in spikiness.MEASURES.values():
        traced = jax.jit(jax.vmap(measure)).trace(jax.ShapeDtypeStruct((3, 8), jnp.float32))
        assert traced.lower(lowering_platforms=("tpu", "cuda")).as_text()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_codes_keep_their_values_and_finite_gradients(dtype):
    """std too, whose squares overflow or underflow; a power of two scales all digits exactly."""
    h = jnp.array([1.0, 2.0, 0.0, 4.0], dtype)
    limits = jnp.finfo(dtype)
    for exponent in (limits.maxexp - 4, limits.maxexp // 2 + 2, limits.minexp // 2 - 8, limits.minexp + 12):
        scale = jnp.ldexp(jnp.ones((), dtype), exponent)
        assert float(spikiness.std(h * scale)) == float(spikiness.std(h) * scale)
        for measure in spikiness.MEASURES.values():
            assert np.isfinite(measure(h * scale))
            chex.assert_tree_all_finite(jax.grad(measure)(h * scale))
    slope = jax.grad(spikiness.l4_over_l2)(h)
    tiny = jnp.ldexp(jnp.ones((), dtype), limits.minexp // 2 - 8)
    np.testing.assert_allclose(jax.grad(spikiness.l4_over_l2)(h * tiny) * tiny, slope, rtol=1e-5)


@pytest.mark.parametrize("name", spikiness.MEASURES)
def test_a_batch_is_refused(name):
    """Without the type checks of the tests: a batch would give one number for all of its codes."""
    measure = inspect.unwrap(spikiness.MEASURES[name])
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*jax\.vmap"):
        measure(jnp.eye(3))
