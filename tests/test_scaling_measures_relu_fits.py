"""Local autoencoders against networks that are one, or linear, or constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from pipelines import PIXEL

from dae_theory import ReluDae, denoise, encode, exact_risk
from dae_theory.spikiness import MEASURES
from scaling.measures.relu_fits import code_spikiness, fit_relu_dae
from scaling.models.taps import Edit

D = 6


def rows(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape))


@pytest.fixture(scope="module")
def fitted():
    """A fit of four units with few draws, compiled once for every function of two layers, given by its weights."""

    @jax.jit
    def fit(key, dae, shift, x, spread):
        def function(y):
            return denoise(dae, y) + shift

        return fit_relu_dae(key, function, x, spread, 4, num_draws=256, num_random=3, max_iterations=400)

    return fit


def test_a_network_that_is_one_is_found(fitted, key):
    # Gates that the cloud crosses, so that no linear map will do.
    dae, x = ReluDae(*(jnp.pad(rows(i, D, 2), ((0, 0), (0, 2))) for i in range(2))), 0.2 * rows(2, D)
    found = fitted(key, dae, jnp.zeros(D), x, 0.7)
    assert found.unexplained.mean < 1e-6
    assert found.error.mean < 1e-6
    assert found.linear_unexplained.mean > 0.05
    # Balanced, and in each direction of a true unit.
    norms = [np.linalg.norm(w, axis=0) for w in found.dae]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-9, atol=1e-12)
    true = dae.w1[:, :2]
    cosines = np.abs(found.dae.w1.T @ true) / (norms[0][:, None] * np.linalg.norm(true, axis=0)[None, :] + 1e-30)
    assert np.all(cosines.max(axis=0) > 1 - 1e-3)


def test_a_linear_map_is_exact_with_pairs_of_units(fitted, key):
    # Rank 2 as W (relu(v) - relu(-v)): four units, and the linear map has nothing to add.
    v, u = rows(3, D, 2), rows(4, D, 2)
    dae = ReluDae(jnp.concatenate([v, -v], axis=1), jnp.concatenate([u, -u], axis=1))
    found = fitted(jax.random.fold_in(key, 0), dae, jnp.zeros(D), jnp.zeros(D), 1.0)
    assert found.unexplained.mean < 1e-8
    assert found.linear_unexplained.mean < 1e-12
    # Far from every gate one unit a direction is exact too.
    x = jnp.linalg.lstsq(dae.w1[:, :2].T, jnp.array([50.0, 40.0]))[0]
    assert fitted(jax.random.fold_in(key, 1), dae, jnp.zeros(D), x, 0.1).error.mean < 1e-8


def test_a_memorizing_block_is_the_exact_risk(fitted, key):
    # A constant F = x is the denoising objective of one sample, whose average is known in closed form.
    x, spread = 1.5 * rows(5, D), 0.3
    nothing = ReluDae(jnp.zeros((D, 4)), jnp.zeros((D, 4)))
    found = fitted(key, nothing, x, x, spread)
    risk = float(exact_risk(found.dae, x[None], spread))
    size = float(jnp.sum(jnp.square(x)))
    assert found.error.mean == pytest.approx(risk / size, abs=5 * float(found.error.standard_error))
    # One unit along x does as well as (sigma/|x|)^2/(1 + ...), and a constant function leaves nothing to explain.
    assert risk / size <= 1.1 * spread**2 / (size + spread**2)
    assert found.unexplained.mean > 1e9


def test_errors_are_on_fresh_noise(fitted, key):
    # Without biases no constant can be added, so that something is left.
    dae, shift, x = ReluDae(rows(6, D, 4), rows(7, D, 4)), 0.5 * rows(8, D), 0.1 * rows(9, D)
    many = fitted(jax.random.fold_in(key, 0), dae, shift, x, 0.8)
    y = x[None] + 0.8 * jax.random.normal(jax.random.fold_in(key, 1), (20_000, D))
    goal, found = (jax.vmap(functools.partial(denoise, net))(y) for net in (dae, many.dae))
    exact = jnp.sum(jnp.square(found - goal - shift[None]), axis=1).mean() / jnp.sum(jnp.var(goal, axis=0))
    assert abs(many.unexplained.mean - exact) < 4 * many.unexplained.standard_error
    assert 0 < many.unexplained.standard_error < 0.3 * exact
    # Three points, which the units interpolate, say little of others.
    function = functools.partial(denoise, dae)
    few = jax.jit(lambda k: fit_relu_dae(k, function, x, 0.8, 4, num_draws=3, num_random=0, max_iterations=60))
    assert few(jax.random.fold_in(key, 2)).unexplained.mean > 2 * many.unexplained.mean


def test_standard_errors_are_those_of_repetitions(key):
    dae, x = ReluDae(rows(6, D, 4), rows(7, D, 4)), 0.1 * rows(8, D)
    codes = jax.jit(lambda k: code_spikiness(k, functools.partial(encode, dae), x, 0.5, num_draws=40))
    found = jax.vmap(codes)(jax.random.split(key, 200))
    assert set(found) == set(MEASURES)
    for name, value in found.items():
        # 200 repetitions give a standard deviation to 5 %.
        assert np.std(value.mean) == pytest.approx(np.sqrt(np.mean(value.standard_error**2)), rel=0.25), name
    wide = jax.random.normal(jax.random.fold_in(key, 1), (4000, D))
    direct = jax.vmap(MEASURES["std"])(jax.vmap(functools.partial(encode, dae))(x[None] + 0.5 * wide))
    assert abs(np.mean(found["std"].mean) - np.mean(direct)) < 4 * np.std(direct) / np.sqrt(3000)


@pytest.mark.slow
def test_a_deep_block_is_approximated(key):
    model, x, source, target = (
        network(PIXEL, "float64"),
        rows(9, 3, 8, 8),
        "mid_block.resnets.0",
        "up_blocks.0.resnets.0",
    )

    @jax.jit
    def fit(key, x):
        activation = model.apply(model.params, x[None], 30, capture=(source,))[1][source]

        def block(flat):
            """From the activation at the source to that at the target; all else stays as it is at x."""
            edits = {source: Edit("replace", flat.reshape(activation.shape))}
            return model.apply(model.params, x[None], 30, capture=(target,), edits=edits)[1][target].reshape(-1)

        few = {"num_draws": 96, "num_fresh": 32, "num_random": 0, "max_iterations": 5, "chunk_size": 32}
        return fit_relu_dae(key, block, activation.reshape(-1), 0.02, 64, **few)

    fit = fit(key, x)
    # A smooth block in a small cloud is nearly affine, and x itself lies in it: a few percent of its size remain.
    assert fit.error.mean < 0.02
    assert fit.dae.w1.shape[1] == 64
    assert np.isfinite(float(fit.unexplained.mean))


def test_bad_input_is_refused(key):
    x = jnp.ones(D)
    identity = functools.partial(jnp.multiply, 1.0)
    for bad, message in [
        (lambda: fit_relu_dae(key, identity, x, 0.0, 2), "spread must be positive"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 0), "width must be at least 1"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 2, num_draws=1), "num_draws must be at least 2"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 2, penalty=-1.0), "penalty must not be negative"),
        (lambda: code_spikiness(key, identity, x, 1.0, num_draws=1), "num_draws must be at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_source_is_what_the_autoencoder_reads(fitted, key):
    """A function of lifted points is that of the points only through the lift, and the identity lifts nothing."""
    lift, x = rows(10, D, 9), 0.2 * rows(11, D)
    dae = ReluDae(*(jnp.pad(rows(i, n, 2), ((0, 0), (0, 2))) for i, n in ((12, 9), (13, D))))

    def fit(key, source, function):
        return fit_relu_dae(key, function, x, 0.7, 4, source=source, num_draws=256, num_random=3, max_iterations=400)

    lifted = jax.jit(lambda k: fit(k, lambda y: y @ lift, lambda y: dae.w2 @ encode(dae, y @ lift)))(
        jax.random.clone(key)
    )
    assert lifted.dae.w1.shape == (9, 4)
    assert lifted.unexplained.mean < 1e-6
    assert lifted.linear_unexplained.mean > 0.01
    # Without a source, and with one that returns its input.
    other, nothing = ReluDae(rows(6, D, 4), rows(7, D, 4)), jnp.zeros(D)
    plain = fitted(jax.random.clone(key), other, nothing, x, 0.7)
    same = jax.jit(lambda k, dae: fit(k, lambda y: y, functools.partial(denoise, dae)))(jax.random.clone(key), other)
    np.testing.assert_allclose(plain.dae.w1, same.dae.w1, rtol=1e-6, atol=1e-9)


def test_gates_are_open_where_the_cloud_crosses_none(fitted, key):
    along = jnp.eye(D)[:, :1]
    one, nothing = ReluDae(*[jnp.pad(along, ((0, 0), (0, 3)))] * 2), jnp.zeros(D)
    assert fitted(jax.random.fold_in(key, 0), one, nothing, 5.0 * along[:, 0], 0.1).open == 1
    # Through the origin of the units each gate is crossed.
    assert fitted(jax.random.fold_in(key, 1), one, nothing, nothing, 1.0).open == 0
