"""Lanczos against a dense eigensolver: exact at full length, bounds at any, invariant subspaces, exhaustion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory.lanczos import lanczos


@functools.partial(jax.jit, static_argnums=2)
def ritz_values(a, start, steps, without=None):
    """The function under test, jitted: an eager call compiles its operations one by one."""
    return lanczos(lambda v: a @ v, start, steps, without=without)


def matrix(key, eigenvalues):
    frame = jnp.linalg.qr(jax.random.normal(key, (len(eigenvalues), len(eigenvalues))))[0]
    return (frame * jnp.asarray(eigenvalues)[None, :]) @ frame.T, frame


def test_all_steps_give_all_eigenvalues(key):
    a, _ = matrix(jax.random.fold_in(key, 0), np.linspace(-1.0, 3.0, 40))
    ritz = ritz_values(a, jax.random.normal(jax.random.fold_in(key, 1), (40,)), 40)
    np.testing.assert_allclose(ritz.values, np.linspace(-1.0, 3.0, 40), atol=1e-12)
    assert float(jnp.max(ritz.residuals)) < 1e-10


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_values_are_within_their_residuals_of_an_eigenvalue(key, steps):
    eigenvalues = np.geomspace(1e-3, 10.0, 60)
    a, _ = matrix(jax.random.fold_in(key, 0), eigenvalues)
    ritz = ritz_values(a, jax.random.normal(jax.random.fold_in(key, 1), (60,)), steps)
    distance = np.min(np.abs(np.asarray(ritz.values)[:, None] - eigenvalues[None, :]), axis=1)
    assert np.all(distance <= np.asarray(ritz.residuals) + 1e-13)
    assert float(ritz.values[0]) >= eigenvalues[0] - 1e-13


def test_directions_left_out_stay_out(key):
    """Their eigenvalue, far outside the others, would come back from rounding within a few steps."""
    eigenvalues = np.concatenate([[0.0, 0.0], np.linspace(1.0, 2.0, 30)])
    a, frame = matrix(jax.random.fold_in(key, 0), eigenvalues)
    start = jax.random.normal(jax.random.fold_in(key, 1), (32,))
    ritz = ritz_values(a, start, 30, frame[:, :2].T)
    np.testing.assert_allclose(ritz.values, eigenvalues[2:], atol=1e-10)


def test_an_exhausted_space_adds_no_value_that_is_no_eigenvalue():
    """From equal weights on the eigenvalues 1, 1, 1, 2: two steps say all; more repeat the largest."""
    for steps in (2, 3, 4):
        ritz = ritz_values(jnp.diag(jnp.array([1.0, 1.0, 1.0, 2.0])), jnp.ones(4), steps)
        np.testing.assert_allclose(ritz.values, [1.0] + [2.0] * (steps - 1), atol=1e-14)
        assert float(jnp.max(ritz.residuals)) < 1e-14
    one = ritz_values(2 * jnp.eye(3), jnp.ones(3), 3)
    np.testing.assert_allclose(one.values, 2.0, atol=1e-14)


def test_an_exhausted_space_ends_without_false_values(key):
    """Three distinct eigenvalues: three steps say all, and the rest add none."""
    a, _ = matrix(jax.random.fold_in(key, 0), [1.0] * 4 + [2.0] * 4 + [5.0] * 4)
    ritz = ritz_values(a, jax.random.normal(jax.random.fold_in(key, 1), (12,)), 10)
    assert bool(jnp.all(jnp.isfinite(ritz.values)))
    np.testing.assert_allclose(ritz.values[:2], [1.0, 2.0], atol=1e-10)
    assert float(ritz.values[-1]) < 5 + 1e-10
    with pytest.raises(ValueError, match="num_steps"):
        lanczos(lambda v: a @ v, jnp.ones(12), 13)
