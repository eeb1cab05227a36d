"""Jacobians against autodiff's own and closed forms; randomized triplets against known spectra and their own bounds.

Those of deep models are tested where they are run, in test_scaling_study_jacobians.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dae_theory
from dae_theory import ReluDae
from dae_theory.denoisers import empirical_denoiser, gaussian_denoiser
from scaling.measures.jacobian import full_jacobian, spectrum_summary, top_singular

D, P = 12, 7


def rows(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape))


def relu_dae():
    return ReluDae(rows(0, D, P), rows(1, D, P))


def as_map(dae):
    return lambda y, sigma: dae_theory.denoise(dae, y)


def linear_map(matrix):
    return lambda y, sigma: matrix @ y


def with_spectrum(values, seed=0):
    """A square matrix of these singular values."""
    u, _, v = np.linalg.svd(np.random.RandomState(seed).standard_normal((len(values), len(values))))
    return jnp.asarray(u * np.asarray(values) @ v)


@functools.cache
def compiled():
    """Triplets of a 40 x 40 matrix, an argument: one program for all spectra."""
    return jax.jit(lambda key, matrix, y: top_singular(key, linear_map(matrix), y, 1.0, 4))


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_two_layer_network_has_its_closed_form(mode, chunk, key):
    dae, y = relu_dae(), jax.random.normal(key, (D,))
    found = full_jacobian(as_map(dae), y, 0.1, chunk_size=chunk, mode=mode)
    expected = dae_theory.jacobian(dae, y)
    assert 0 < int(jnp.sum(y @ dae.w1 > 0)) < P
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14 * float(jnp.linalg.norm(expected)))


def test_optimal_denoisers_have_the_posterior_covariance(key):
    first, second = jax.random.split(key)
    y, sigma = jax.random.normal(first, (D,)), 0.6
    data = 0.3 * jax.random.normal(second, (9, D))
    empirical = functools.partial(empirical_denoiser, data=data)
    found = jax.jit(lambda y: full_jacobian(empirical, y, sigma, chunk_size=5))(y)
    logits = -0.5 * np.sum(np.square(np.asarray(y) - np.asarray(data)), axis=1) / sigma**2
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    centered = np.asarray(data) - weights @ np.asarray(data)
    np.testing.assert_allclose(found, (centered.T * weights) @ centered / sigma**2, rtol=0, atol=1e-13)

    root = np.asarray(jax.random.normal(jax.random.fold_in(second, 1), (D, D)))
    covariance = root @ root.T
    wiener = functools.partial(gaussian_denoiser, mean=jnp.ones(D), covariance=jnp.asarray(covariance))
    found = jax.jit(lambda y: full_jacobian(wiener, y, sigma))(y)
    expected = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(D))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    values = np.linalg.eigvalsh(covariance)[::-1]
    summary = jax.jit(lambda j: spectrum_summary(j, rank=3))(found)
    np.testing.assert_allclose(summary.singular_values, values / (values + sigma**2), atol=1e-11)
    # Signal above noise, direction by direction; symmetric.
    assert int(summary.kept) == np.sum(values > sigma**2)
    assert 0 < int(summary.kept) < D
    assert summary.asymmetry < 1e-11


def test_codes_and_images_of_any_shape(key):
    matrix = jnp.asarray(np.random.RandomState(1).standard_normal((3, 8)))
    y = jax.random.normal(key, (2, 4))
    for code in (lambda y, sigma: jnp.sin(matrix @ y.reshape(-1)), lambda y, sigma: jnp.tile(y, 3).reshape(-1)):
        expected = jax.jacrev(lambda y, code=code: code(y, 1.0))(y).reshape(-1, 8)
        for mode in ("auto", "forward", "reverse"):
            found = jax.jit(functools.partial(full_jacobian, code, mode=mode, chunk_size=3))(y, 1.0)
            np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("decay", ["fast", "slow", "low rank"])
def test_the_error_bounds_hold_and_are_not_idle(decay, key):
    j = np.arange(40)
    values = {"fast": 0.5**j, "slow": 1 / np.sqrt(1 + j), "low rank": np.where(j < 3, 1.0 + j[::-1] - 36, 0.0)}[decay]
    matrix = with_spectrum(values)
    found = compiled()(key, matrix, jnp.zeros(40))
    best = np.sort(values)[::-1][:4]
    assert np.all(found.s <= best + 1e-12)
    # Halko et al., what the sketch leaves: between its own bound and no more than the spectrum's tail times a constant.
    assert np.all(best**2 <= np.asarray(found.s) ** 2 + float(found.error) ** 2 + 1e-12)
    assert found.error <= 1e-12 + 10 * np.sqrt(2 / np.pi) * 3 * np.linalg.norm(np.sort(values)[::-1][4:])
    gaps = np.min(np.abs(np.asarray(found.s)[:, None] - values[None, :]), axis=1)
    assert np.all(gaps <= np.asarray(found.residuals) / np.sqrt(2) + 1e-12)
    assert abs(found.energy - np.sum(values**2)) <= 6 * found.energy_error + 1e-12
    if decay == "low rank":
        assert found.error < 1e-12
        np.testing.assert_allclose(found.s, best, atol=1e-12)
    for vectors in (found.u, found.v):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-10)
    assert np.all(np.take_along_axis(np.asarray(found.v), np.argmax(np.abs(found.v), axis=0)[None], 0) > 0)


def test_more_blocks_sharpen_and_each_is_worth_more_than_a_power(key):
    values = 1 / np.sqrt(1 + np.arange(40))
    matrix, y = with_spectrum(values), jnp.zeros(40)

    def error(q):
        found = jax.jit(lambda k: top_singular(k, linear_map(matrix), y, 1.0, 4, oversample=2, iterations=q))(
            jax.random.clone(key)
        )
        return float(jnp.max(values[:4] - found.s))

    sketch = jax.random.normal(jax.random.fold_in(key, 1), (40, 6))
    power, _ = np.linalg.qr(np.linalg.matrix_power(np.asarray(matrix @ matrix.T), 2) @ np.asarray(matrix @ sketch))
    alone = np.max(values[:4] - np.linalg.svd(power.T @ np.asarray(matrix), compute_uv=False)[:4])
    assert error(0) > 5 * error(2)
    assert error(2) < alone


def test_a_sketch_wider_than_the_matrix_is_cut(key):
    # Six of eight columns, two of them new at every round: only the last block fits, and it is exact in the end.
    matrix = with_spectrum([8, 7, 6, 5, 1e-3, 1e-4, 1e-5, 1e-6])
    found = jax.jit(lambda k: top_singular(k, linear_map(matrix), jnp.zeros(8), 1.0, 4, oversample=2, iterations=3))(
        key
    )
    np.testing.assert_allclose(found.s, [8, 7, 6, 5], rtol=1e-10)
    assert np.all(found.residuals < 1e-6)


def test_the_energy_is_unbiased_and_its_error_right(key):
    matrix = with_spectrum(1 / np.sqrt(1 + np.arange(40)))
    total = float(jnp.sum(jnp.square(matrix)))
    keys = jax.random.split(key, 400)
    found = jax.jit(jax.vmap(lambda k: compiled()(k, matrix, jnp.zeros(40))))(keys)
    off = np.asarray(found.energy) - total
    assert abs(off.mean()) < 4 * off.std() / 20
    # 400 draws give a variance to 7 %, heavier tails of few probes a little worse.
    assert np.mean(np.asarray(found.energy_error) ** 2) == pytest.approx(off.var(), rel=0.3)


def test_batches_by_vmap(key):
    matrix = with_spectrum(0.5 ** np.arange(40))
    keys, y = jax.random.split(key, 2), jnp.zeros((2, 40))
    found = jax.vmap(lambda k, y: compiled()(k, matrix, y))(jax.random.clone(keys), y)
    alone = compiled()(keys[1], matrix, y[1])
    for ours, theirs in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours[1], theirs, atol=1e-9)
    dae, points = relu_dae(), rows(3, 2, D)
    found = jax.vmap(lambda y: full_jacobian(as_map(dae), y, 1.0, chunk_size=5))(points)
    np.testing.assert_allclose(found[1], dae_theory.jacobian(dae, points[1]), atol=1e-13)


def test_memory_follows_the_chunk():
    dim, hidden = 400, 50_000
    w = jax.ShapeDtypeStruct((dim, hidden), jnp.float64)

    def temporaries(chunk):
        def run(w, y):
            return full_jacobian(lambda y, sigma: jnp.tanh(y @ w) @ w.T, y, 1.0, chunk_size=chunk)

        y = jax.ShapeDtypeStruct((dim,), jnp.float64)
        return jax.jit(run).lower(w, y).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(10), temporaries(100)
    # 90 more directions in the hidden layer, in a few copies.
    per_direction = 8 * hidden
    assert 60 * per_direction < large - small < 4 * 90 * per_direction
    # Beside it the weights, turned once, and the result.
    assert small < 40 * per_direction + 8 * dim * hidden + 2 * 8 * dim**2


def test_summary_at_its_ends():
    identity = spectrum_summary(jnp.eye(6), rank=3)
    assert float(identity.participation_ratio) == pytest.approx(6)
    assert (int(identity.numerical_rank), int(identity.kept)) == (6, 6)
    assert float(identity.top_energy) == pytest.approx(0.5)
    assert (float(identity.trace), float(identity.asymmetry)) == (6, 0)
    turn = spectrum_summary(jnp.array([[0.0, -0.4], [0.4, 0.0]]), rank=9)
    assert (float(turn.asymmetry), float(turn.top_energy), int(turn.kept)) == (pytest.approx(1), pytest.approx(1), 0)
    zero = spectrum_summary(jnp.zeros((3, 3)))
    assert all(float(jnp.sum(value)) == 0 for value in zero)
    one = spectrum_summary(1e-170 * jnp.diag(jnp.array([1.0, 0.02, 0.005])))
    assert (int(one.numerical_rank), float(one.stable_rank)) == (2, pytest.approx(1 + 0.02**2 + 0.005**2))
    assert float(one.participation_ratio) == pytest.approx(1.00085, rel=1e-4)


def test_bad_input_is_refused(key):
    y = jnp.ones(D)
    map_ = as_map(relu_dae())
    for bad, message in [
        (lambda: full_jacobian(map_, y, 1.0, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: full_jacobian(map_, y, 1.0, mode="both"), "mode is 'both'; it must be one of auto"),
        (lambda: top_singular(key, map_, y, 1.0, 13), "rank must be at most 12, got 13"),
        (lambda: top_singular(key, map_, y, 1.0, 0), "rank must be at least 1"),
        (lambda: top_singular(key, map_, y, 1.0, 2, oversample=-1), "oversample must be at least 0"),
        (lambda: top_singular(key, map_, y, 1.0, 2, num_probes=1), "num_probes must be at least 2"),
        (lambda: spectrum_summary(jnp.ones((2, 3))), r"square, got shape \(2, 3\)"),
        (lambda: spectrum_summary(jnp.eye(2), threshold=0.0), "threshold must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_it_lowers_for_accelerators():
    y, dae = jax.ShapeDtypeStruct((D,), "float64"), jax.eval_shape(relu_dae)
    for run in (
        lambda key, dae, y: top_singular(key, as_map(dae), y, 0.5, 3),
        lambda key, dae, y: spectrum_summary(full_jacobian(as_map(dae), y, 0.5)),
    ):
        traced = jax.jit(run).trace(jax.eval_shape(lambda: jax.random.key(0)), dae, y)
        traced.lower(lowering_platforms=("tpu", "cuda"))
