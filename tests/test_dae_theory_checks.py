"""Checks name the value and say what to do; traced values pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import checks


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones(3), r"shape \(n, d\).*got shape \(3,\)"),
        (np.ones((2, 2, 2)), r"got shape \(2, 2, 2\)"),
        (np.ones((0, 3)), "empty"),
        (np.ones((3, 0)), "empty"),
        (np.ones((2, 2), int), "floating point, got int64"),
        ([[1.0, 2.0]], r"data must be an array, got list; convert it with jax.numpy.asarray"),
        (np.array([[1.0, np.nan], [np.inf, 0.0]]), "2 non-finite"),
    ],
)
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        checks.check_data(data)


def test_good_data_passes_in_both_precisions():
    checks.check_data(np.ones((1, 1), np.float32))
    checks.check_data(jnp.ones((2, 3)))
    assert checks.is_concrete(jnp.ones(2), 3.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, np.array([1.0, -2.0])])
def test_positive_refuses(bad):
    with pytest.raises(ValueError, match="thing"):
        checks.check_positive("thing", bad)


def test_nonnegative_takes_zero_and_refuses_below():
    checks.check_nonnegative("thing", 0.0)
    with pytest.raises(ValueError, match=r"thing must not be negative, got -0.5"):
        checks.check_nonnegative("thing", -0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [(True, "must be an integer"), (2.0, "must be an integer"), (1, "at least 2, got 1"), (9, "at most 5, got 9")],
)
def test_integers_are_bounded(value, message):
    with pytest.raises(ValueError, match=message):
        checks.check_integer("thing", value, minimum=2, maximum=5)


def test_integers_pass_through():
    assert checks.check_integer("thing", np.int64(3), minimum=2) == 3


def test_traced_values_pass():
    @jax.jit
    def f(x):
        checks.check_positive("x", x)
        checks.check_data(x)
        assert not checks.is_concrete(x)
        return x

    np.testing.assert_array_equal(f(jnp.full((1, 2), -1.0)), -np.ones((1, 2)))


def test_large_arrays_are_described_not_printed():
    with pytest.raises(ValueError, match="smallest entry is -3"):
        checks.check_positive("x", np.linspace(-3.0, 1.0, 100))


def test_a_level_is_one_number():
    checks.check_level("sigma", 0.0)
    checks.check_level("sigma", jnp.float32(0.5), zero=False)
    with pytest.raises(ValueError, match=r"sigma must be one number, got shape \(3,\); for several, use jax.vmap"):
        checks.check_level("sigma", jnp.ones(3))
    with pytest.raises(ValueError, match="sigma must be positive"):
        checks.check_level("sigma", 0.0, zero=False)
    with pytest.raises(ValueError, match="penalty must not be negative"):
        checks.check_level("penalty", -1.0)
