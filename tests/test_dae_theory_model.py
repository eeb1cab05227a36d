"""The autoencoder: shapes, Jacobian, and live columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import model


def random_dae(key, dim=5, width=7):
    k1, k2 = jax.random.split(key)
    return model.ReluDae(jax.random.normal(k1, (dim, width)), jax.random.normal(k2, (dim, width)))


def test_denoise_is_the_sum_over_units(key):
    dae = random_dae(key)
    y = jax.random.normal(jax.random.fold_in(key, 1), (5,))
    by_unit = sum(np.maximum(dae.w1[:, j] @ y, 0.0) * dae.w2[:, j] for j in range(7))
    np.testing.assert_allclose(model.denoise(dae, y), by_unit, rtol=1e-13, atol=1e-13)


def test_jacobian_is_the_derivative(key):
    dae = random_dae(key)
    y = jax.random.normal(jax.random.fold_in(key, 1), (5,))
    by_autodiff = jax.jacfwd(model.denoise, argnums=1)(dae, y)
    np.testing.assert_allclose(model.jacobian(dae, y), by_autodiff, rtol=1e-13, atol=1e-13)


def test_jacobian_at_a_gate_counts_the_unit_as_off():
    dae = model.ReluDae(jnp.eye(2), jnp.eye(2))
    np.testing.assert_array_equal(model.jacobian(dae, jnp.array([0.0, 1.0])), np.diag([0.0, 1.0]))


def test_function_is_positively_homogeneous(key):
    dae = random_dae(key)
    y = jax.random.normal(jax.random.fold_in(key, 1), (5,))
    np.testing.assert_allclose(model.denoise(dae, 3.0 * y), 3.0 * model.denoise(dae, y), rtol=1e-13)


def test_init_of_a_wider_network_extends_a_narrower_one(key):
    narrow, wide = model.init(key, 6, 3), model.init(key, 6, 8)
    np.testing.assert_array_equal(wide.w1[:, :3], narrow.w1)
    np.testing.assert_array_equal(wide.w1, wide.w2)


def test_init_columns_have_norm_about_scale(key):
    norms = np.linalg.norm(model.init(key, 400, 50, scale=0.3).w1, axis=0)
    # ‖N(0, I/d)‖ has standard deviation 1/√(2d); the mean over 50 columns is within 5 standard errors.
    assert abs(norms.mean() - 0.3) < 5 * 0.3 / np.sqrt(2 * 400 * 50)


@pytest.mark.parametrize(("dim", "width"), [(0, 3), (3, 0), (3, -1)])
def test_init_refuses_empty_shapes(key, dim, width):
    with pytest.raises(ValueError, match="at least 1"):
        model.init(key, dim, width)


def test_live_columns_are_those_of_relative_size():
    dae = model.ReluDae(jnp.diag(jnp.array([1.0, 2.0, 1.0, 0.0])), jnp.diag(jnp.array([1.0, 1.0, 1e-3, 1.0])))
    # Products 1, 2, 1e-3, 0, against the largest.
    np.testing.assert_array_equal(model.live_columns(dae), [True, True, False, False])
    np.testing.assert_array_equal(model.live_columns(dae, tolerance=4e-4), [True, True, True, False])
    dead = model.ReluDae(jnp.zeros((3, 4)), jnp.zeros((3, 4)))
    assert not bool(model.live_columns(dead).any())


def test_lowers_for_accelerators():
    spec = model.ReluDae(jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32))
    y = jax.ShapeDtypeStruct((4,), jnp.float32)
    for function in (model.denoise, model.jacobian):
        assert jax.jit(function).trace(spec, y).lower(lowering_platforms=("tpu", "cuda")).as_text()
