"""The autoencoder: shapes, Jacobian, and merging of parallel columns."""

import chex
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


def split_network(dae, shares):
    """Each unit split in two, (c₁w₁, c₁w₂) and (c₂w₁, c₂w₂), which changes neither function nor penalty."""
    c1, c2 = jnp.sqrt(shares)[None, :], jnp.sqrt(1 - shares)[None, :]
    return model.ReluDae(
        jnp.concatenate([dae.w1 * c1, dae.w1 * c2], axis=1), jnp.concatenate([dae.w2 * c1, dae.w2 * c2], axis=1)
    )


def test_merging_undoes_splitting(key):
    whole = random_dae(key)
    # Balanced columns, as at a stationary point.
    ratio = jnp.sqrt(jnp.linalg.norm(whole.w2, axis=0) / jnp.linalg.norm(whole.w1, axis=0))[None, :]
    whole = model.ReluDae(whole.w1 * ratio, whole.w2 / ratio)
    split = split_network(whole, jnp.linspace(0.1, 0.9, 7))
    merged = model.merge_parallel_columns(split)
    assert int(model.live_columns(merged).sum()) == 7
    np.testing.assert_allclose(merged.w1[:, :7], whole.w1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.w2[:, :7], whole.w2, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(merged.w1[:, 7:], 0.0)


def test_merging_keeps_the_function_and_never_raises_the_penalty(key):
    dae = random_dae(key)
    # Parallel encoders with different decoders still make one unit.
    dae = dae._replace(w1=dae.w1.at[:, 4].set(2.5 * dae.w1[:, 1]).at[:, 5].set(0.0))
    merged = jax.jit(model.merge_parallel_columns)(dae)
    ys = jax.random.normal(jax.random.fold_in(key, 2), (50, 5))
    np.testing.assert_allclose(
        jax.vmap(lambda y: model.denoise(merged, y))(ys),
        jax.vmap(lambda y: model.denoise(dae, y))(ys),
        rtol=1e-12,
        atol=1e-12,
    )
    penalty = sum(float(jnp.sum(w**2)) for w in dae)
    assert sum(float(jnp.sum(w**2)) for w in merged) < penalty
    assert int(model.live_columns(merged).sum()) == 5


def test_antiparallel_columns_stay_apart():
    w = jnp.array([[1.0, -1.0], [0.0, 0.0]])
    groups = model.parallel_groups(model.ReluDae(w, w))
    np.testing.assert_array_equal(groups, [0, 1])


def test_dead_networks_have_no_live_column():
    w = jnp.zeros((3, 4))
    assert not bool(model.live_columns(model.ReluDae(w, w)).any())
    chex.assert_tree_all_finite(model.merge_parallel_columns(model.ReluDae(w, w)))


def test_lowers_for_accelerators():
    spec = model.ReluDae(jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32))
    y = jax.ShapeDtypeStruct((4,), jnp.float32)
    for function in (model.denoise, model.jacobian):
        jax.jit(function).trace(spec, y).lower(lowering_platforms=("tpu", "cuda"))
    lowered = jax.jit(model.merge_parallel_columns).trace(spec).lower(lowering_platforms=("tpu", "cuda"))
    assert "stablehlo" in lowered.as_text() or lowered.as_text()
