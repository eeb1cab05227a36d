"""Local autoencoders against networks that are one, or linear, or constant; denoiser distances against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from pipelines import DDPM, PIXEL

from dae_theory import ReluDae, denoise, encode, exact_risk
from dae_theory.denoisers import empirical_denoiser, gaussian_denoiser
from dae_theory.spikiness import MEASURES
from scaling import as_denoiser
from scaling.diffusion.schedules import from_config
from scaling.measures.relu_fits import between, code_spikiness, denoiser_distances, fit_relu_dae, reference_denoisers

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


@pytest.fixture(scope="module")
def deep():
    return network(PIXEL, "float64"), rows(9, 3, 8, 8)


def test_a_block_gives_its_own_output(deep):
    model, x = deep
    source, target = "mid_block.resnets.0", "up_blocks.0.resnets.1.nonlinearity"
    function, here = between(model, x, 30, source, target)
    _, taps = model.apply(model.params, x[None], 30, capture=(source, target))
    np.testing.assert_array_equal(here, taps[source].reshape(-1))
    np.testing.assert_allclose(function(here), taps[target].reshape(-1), rtol=1e-12)
    assert float(jnp.max(jnp.abs(function(1.1 * here) - function(here)))) > 1e-3
    with pytest.raises(ValueError, match="computed before the source"):
        between(model, x, 30, target, source)
    with pytest.raises(ValueError, match=r"no tap named 'mid_blok'.*'mid_block'"):
        between(model, x, 30, "mid_blok", target)


def test_a_deep_block_is_approximated(deep, key):
    model, x = deep
    function, here = between(model, x, 30, "mid_block.resnets.0", "up_blocks.0.resnets.0")
    fit = jax.jit(lambda k, here: fit_relu_dae(
        k, function, here, 0.02, 64, num_draws=96, num_fresh=32, num_random=0, max_iterations=5, chunk_size=32
    ))(key, here)  # fmt: skip
    # A smooth block in a small cloud is nearly affine, and x itself lies in it: a few percent of its size remain.
    assert fit.error.mean < 0.02
    assert fit.dae.w1.shape == (here.size, 64)
    assert np.isfinite(float(fit.unexplained.mean))


def test_distances_of_wiener_filters_are_their_closed_form(key):
    # Two linear filters with diagonal gains a, b: the mean square of (a - b) y over x and noise.
    sigmas = np.array([0.2, 1.0, 5.0])
    variances, others = jnp.linspace(0.5, 2.0, D), jnp.ones(D)
    images = jnp.sqrt(variances)[None, :] * jax.random.normal(jax.random.fold_in(key, 0), (300, D))
    mine, theirs = (
        functools.partial(gaussian_denoiser, mean=jnp.zeros(D), covariance=jnp.diag(v)) for v in (variances, others)
    )
    found = denoiser_distances(key, mine, {"other": theirs, "same": mine}, images, sigmas, num_draws=4)
    v = np.asarray(variances)
    for k, sigma in enumerate(sigmas):
        gain, other = v / (v + sigma**2), 1 / (1 + sigma**2)
        expected = np.mean((gain - other) ** 2 * (v + sigma**2))
        assert abs(found["other"].mean[k] - expected) < 4 * found["other"].standard_error[k]
        risk = np.mean(v * sigma**2 / (v + sigma**2))
        assert abs(found["clean"].mean[k] - risk) < 4 * found["clean"].standard_error[k]
    assert np.all(found["same"].mean == 0)
    assert found["other"].per_image.shape == (3, 300)
    # Draws of an image share it: where images differ, they say less of other images than of these.
    assert np.all(found["other"].draw_error[::2] < found["other"].standard_error[::2])


def test_draw_errors_are_those_of_repetitions(key):
    images = rows(10, 5, D)
    run = jax.jit(lambda k: denoiser_distances(k, lambda y, s: 0.5 * y, {}, images, jnp.array([0.7]), num_draws=6))
    found = jax.vmap(run)(jax.random.split(key, 300))["clean"]
    # 300 repetitions give a standard deviation to 4 %.
    assert np.std(found.mean) == pytest.approx(np.sqrt(np.mean(found.draw_error**2)), rel=0.2)


def test_references_memorize_or_not(key):
    train, held_out = rows(11, 7, D), rows(12, 40, D)
    labels = [0, 1] * 20
    found = reference_denoisers(train, held_out, labels)
    assert set(found) == {"empirical", "held_out", "gaussian", "mixture"}
    assert set(reference_denoisers(train)) == {"empirical", "gaussian"}
    y = train[2] + 1e-3
    np.testing.assert_allclose(found["empirical"](y, 0.01), train[2], atol=1e-9)
    covariance = np.cov(np.asarray(held_out).T, bias=True)
    wiener = np.mean(held_out, axis=0) + covariance @ np.linalg.solve(
        covariance + 0.25 * np.eye(D), np.asarray(y) - np.mean(held_out, axis=0)
    )
    np.testing.assert_allclose(found["gaussian"](y, 0.5), wiener, atol=1e-9)
    # The memorizing denoiser is the nearest at the data it stores.
    memorizing = functools.partial(empirical_denoiser, data=train)
    at = denoiser_distances(key, memorizing, found, train, np.array([0.1]), num_draws=3)
    assert at["empirical"].mean[0] == 0
    assert min(at["gaussian"].mean[0], at["held_out"].mean[0]) > 1e-3


def test_a_deep_denoiser_has_distances(deep, key):
    model, x = deep
    images = jnp.stack([x.reshape(-1), -x.reshape(-1)])
    denoiser = as_denoiser(model, from_config(DDPM))
    run = jax.jit(lambda k: denoiser_distances(k, denoiser, reference_denoisers(images), images, jnp.array([0.3])))
    assert all(np.all(value.mean > 0) for value in run(key).values())


def test_bad_input_is_refused(key):
    x, images = jnp.ones(D), jnp.ones((2, D))
    identity = functools.partial(jnp.multiply, 1.0)
    for bad, message in [
        (lambda: fit_relu_dae(key, identity, x, 0.0, 2), "spread must be positive"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 0), "width must be at least 1"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 2, num_draws=1), "num_draws must be at least 2"),
        (lambda: fit_relu_dae(key, identity, x, 1.0, 2, penalty=-1.0), "penalty must not be negative"),
        (lambda: code_spikiness(key, identity, x, 1.0, num_draws=1), "num_draws must be at least 2"),
        (lambda: denoiser_distances(key, gaussian_denoiser, {}, images, np.array([0.0])), "sigmas must be positive"),
        (
            lambda: denoiser_distances(key, gaussian_denoiser, {"clean": gaussian_denoiser}, images, np.array([1.0])),
            'called "clean"',
        ),
        (lambda: denoiser_distances(key, gaussian_denoiser, {}, jnp.ones((0, D)), np.array([1.0])), "images is empty"),
        (lambda: reference_denoisers(images, jnp.ones((3, D)), [1]), "labels must have shape"),
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
    plain, same = (jax.jit(lambda k, s=s: fit(k, s, jnp.tanh))(jax.random.clone(key)) for s in (None, lambda y: y))
    np.testing.assert_allclose(plain.dae.w1, same.dae.w1, rtol=1e-6, atol=1e-9)


def test_gates_are_open_where_the_cloud_crosses_none(fitted, key):
    along = jnp.eye(D)[:, :1]
    one, nothing = ReluDae(*[jnp.pad(along, ((0, 0), (0, 3)))] * 2), jnp.zeros(D)
    assert fitted(jax.random.fold_in(key, 0), one, nothing, 5.0 * along[:, 0], 0.1).open == 1
    # Through the origin of the units each gate is crossed.
    assert fitted(jax.random.fold_in(key, 1), one, nothing, nothing, 1.0).open == 0
