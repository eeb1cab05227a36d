"""Scores of images and prompts on Gaussians and point masses, where their values are known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scaling
from dae_theory import empirical_denoiser, gaussian_denoiser
from scaling import detection
from scaling.detection import scores

EIGENVALUES = np.array([4.0, 1.0, 0.25, 0.0, 0.0, 0.0])
COVARIANCE = np.diag(EIGENVALUES)
OFFSET = np.array([1.0, -0.5, 0.2, 0.0, 0.0, 0.0])


def gaussian(y, sigma, covariance=COVARIANCE):
    return gaussian_denoiser(y, sigma, jnp.zeros(len(y), y.dtype), jnp.asarray(covariance, y.dtype))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("abar", "expected"), [(0.998, 2.991433), (0.9, 2.628438), (0.5, 1.628100)])
def test_the_intrinsic_dimension_of_a_gaussian(abar, expected):
    """Sum over directions of s / (s + v) + v d^2 / (s + v)^2."""
    v = (1 - abar) / abar
    found = detection.intrinsic_dimension(gaussian, jnp.asarray(OFFSET), v**0.5)
    np.testing.assert_allclose(found, expected, atol=5e-7)
    formula = EIGENVALUES / (EIGENVALUES + v) + v * OFFSET**2 / (EIGENVALUES + v) ** 2
    np.testing.assert_allclose(found, formula.sum(), rtol=1e-12)


def test_the_intrinsic_dimension_tends_to_that_of_the_data():
    x = jnp.asarray(OFFSET)
    np.testing.assert_allclose(detection.intrinsic_dimension(gaussian, x, 1e-3), 3, atol=1e-4)
    # Off the support it diverges as the squared distance over the variance of the noise.
    off = x + jnp.asarray([0, 0, 0, 0.1, 0, 0])
    np.testing.assert_allclose(detection.intrinsic_dimension(gaussian, off, 1e-3) * 1e-6, 0.01, rtol=1e-3)
    np.testing.assert_allclose(detection.intrinsic_dimension(gaussian, x, 1e4), 0, atol=1e-6)


def test_a_memorized_point_has_dimension_zero(key):
    """The empirical optimum around an isolated training image, against the population's around the same image."""
    data = 3 * jax.random.normal(key, (20, 6))
    empirical = functools.partial(empirical_denoiser, data=data)
    dimensions = jax.vmap(lambda x: detection.intrinsic_dimension(empirical, x, 0.1))(data)
    np.testing.assert_allclose(dimensions, 0, atol=1e-8)
    population = functools.partial(gaussian, covariance=9 * np.eye(6))
    assert jax.vmap(lambda x: detection.intrinsic_dimension(population, x, 0.1))(data).min() > 5.9


def test_the_estimate_is_unbiased_with_the_variance_of_random_signs(key):
    """Of an estimate of K probes: 2/K times the squared entries of the symmetric part beside the diagonal."""
    random = np.random.default_rng(0)
    root = random.normal(size=(6, 6))
    denoiser = functools.partial(gaussian, covariance=root @ root.T)
    x, repeats, probes = jnp.asarray(OFFSET), 4000, 2
    estimate = functools.partial(
        detection.intrinsic_dimension_estimate, denoiser=denoiser, x=x, sigma=1.0, num_probes=probes
    )
    found = jax.jit(jax.vmap(lambda k: estimate(k)))(jax.random.split(key, repeats))
    jacobian = jax.jacobian(denoiser)(x, 1.0)
    symmetric = (jacobian + jacobian.T) / 2
    variance = 2 / probes * (jnp.sum(symmetric**2) - jnp.sum(jnp.diag(symmetric) ** 2))
    exact = detection.intrinsic_dimension(denoiser, x, 1.0)
    assert abs(found.mean() - exact) < 4 * jnp.sqrt(variance / repeats)
    np.testing.assert_allclose(found.var(), variance, rtol=0.1)


def test_the_denoising_error_of_a_gaussian(key):
    """E ||D(x + sigma e) - x||^2 = sum ((1 - g) d)^2 + sigma^2 g^2 with g = s / (s + sigma^2)."""
    gain = EIGENVALUES / (EIGENVALUES + 0.25)
    expected = np.sum(((1 - gain) * OFFSET) ** 2 + 0.25 * gain**2)
    draws = 20_000
    found = detection.denoising_error(key, gaussian, jnp.asarray(OFFSET), 0.5, num_draws=draws)
    # A sum of squares of normals around means: variance 2 a^2 + 4 a m^2 each, with a the variance and m the mean.
    spread = np.sqrt(np.sum(2 * (0.25 * gain**2) ** 2 + 4 * 0.25 * gain**2 * ((1 - gain) * OFFSET) ** 2) / draws)
    assert abs(found - expected) < 4 * spread


S, S_C = np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([[0.5, 0.1], [0.1, 0.3]])
MU, MU_C = np.array([0.3, -0.2]), np.array([-0.1, 0.4])


def prediction(mean, covariance, noise=1.0):
    """Noise prediction of a Gaussian: minus its score, times the noise."""
    inverse = np.linalg.inv(covariance)
    return lambda x: noise * (inverse @ (x.reshape(-1) - mean)).reshape(x.shape)


def expectation(function, mean, covariance):
    """Over a Gaussian, exact for polynomials of degree 9 in each direction: Gauss-Hermite nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    root = np.linalg.cholesky(covariance)
    points = [mean + root @ np.array([a, b]) for a in nodes for b in nodes]
    w = np.outer(weights, weights).ravel() / (2 * np.pi)
    return np.sum(w * np.array([function(jnp.asarray(p)) for p in points]))


def test_the_pull_of_a_prompt_between_two_gaussians():
    """E ||s(x, c) - s(x)||^2 over the prompt's Gaussian."""
    pair = prediction(MU_C, S_C), prediction(MU, S)
    found = expectation(lambda x: detection.guidance_difference(*pair, x) ** 2, MU_C, S_C)
    np.testing.assert_allclose(found, 3.579147, atol=5e-7)
    assert detection.guidance_difference(pair[0], pair[0], jnp.ones(2)) == 0


@pytest.mark.parametrize("noise", [1.0, 0.7])
def test_the_sharpness_between_two_gaussians(noise):
    """With equal means, E ||H s||^2 = tr H^4 S_c, whatever the network's noise level."""
    pair = prediction(MU_C, S_C, noise), prediction(MU_C, S, noise)
    found = expectation(lambda x: detection.sharpness(*pair, x, noise) ** 2, MU_C, S_C)
    np.testing.assert_allclose(found, 17.522022, atol=5e-7)
    h = np.linalg.inv(S) - np.linalg.inv(S_C)
    np.testing.assert_allclose(found, np.trace(np.linalg.matrix_power(h, 4) @ S_C), rtol=1e-10)


def test_the_anisotropy_of_predictions_that_agree_in_direction(key):
    x = jax.random.normal(key, (4, 3, 5))

    def unconditional(y):
        return jnp.tanh(y)

    def scaled(factor):
        return lambda y: factor * unconditional(y)

    along = detection.anisotropy((scaled(1.5), unconditional), (scaled(3.0), unconditional), x)
    np.testing.assert_allclose(along.cosine, 1, rtol=1e-12)
    np.testing.assert_allclose(along.norm, 2 * jnp.linalg.norm(jnp.tanh(x)), rtol=1e-12)
    against = detection.anisotropy((scaled(0.5), unconditional), (scaled(1.0), unconditional), x)
    np.testing.assert_allclose(against.cosine, -1, rtol=1e-12)
    assert against.norm == 0
    # Over the channels of each pixel, not over the whole image; none where nothing changes.
    half = x.at[:, :, 0].set(0)
    part = detection.anisotropy((scaled(2.0), unconditional), (scaled(2.0), unconditional), half)
    np.testing.assert_allclose(part.cosine, 4 / 5, rtol=1e-12)


def test_the_distance_of_tiles(key):
    a, b = jax.random.normal(key, (2, 3, 8, 12))
    blocks = [
        np.sqrt(np.mean((np.asarray(a - b)[:, 4 * i : 4 * i + 4, 6 * j : 6 * j + 6]) ** 2))
        for i in range(2)
        for j in range(2)
    ]
    np.testing.assert_allclose(detection.tile_distance(a, b, tiles=2), max(blocks), rtol=1e-12)
    assert detection.tile_distance(a, a) == 0
    # One different corner counts fully.
    corner = a.at[:, :2, :3].add(1.0)
    np.testing.assert_allclose(detection.tile_distance(a, corner), 1, rtol=1e-12)
    with pytest.raises(ValueError, match="tiles = 5 must divide"):
        detection.tile_distance(a, b, tiles=5)


def test_structural_similarity_is_that_of_scikit_image(key):
    """On one scale."""
    metrics = pytest.importorskip("skimage.metrics")
    for side in (11, 21):
        a, b = (jax.random.uniform(k, (3, side, side)) for k in jax.random.split(jax.random.fold_in(key, side)))
        b = 0.7 * a + 0.3 * b
        how = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0}
        expected = metrics.structural_similarity(np.asarray(a), np.asarray(b), **how)
        np.testing.assert_allclose(detection.structural_similarity(a, b), expected, rtol=1e-9)
        np.testing.assert_allclose(detection.structural_similarity(a, a), 1, rtol=1e-9)


def test_scales_of_similarity_are_averaged_geometrically(key):
    """Three scales on 44 pixels: contrast on the first two, contrast and luminance on the last."""
    first, second = (jax.random.uniform(k, (1, 44, 44)) for k in jax.random.split(key))
    a, b, values = first, 0.5 * first + 0.5 * second, []
    for scale in range(3):
        contrast, both = scores._similarities(a, b, 11)
        values.append(float(jnp.mean(both if scale == 2 else contrast)))
        half = 44 // 2 ** (scale + 1)
        a, b = (x[:, : 2 * half, : 2 * half].reshape(1, half, 2, half, 2).mean((2, 4)) for x in (a, b))
    found = detection.structural_similarity(first, 0.5 * first + 0.5 * second)
    np.testing.assert_allclose(found, np.prod(values) ** (1 / 3), rtol=1e-12)
    np.testing.assert_allclose(detection.structural_similarity(first, first), 1, rtol=1e-12)


def test_luminance_counts_at_the_last_scale_alone():
    """Two constant images: contrast is 1, and what remains is (2ab + C₁)/(a² + b² + C₁)."""
    a, b = jnp.full((1, 8, 8), 0.2), jnp.full((1, 8, 8), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    np.testing.assert_allclose(detection.structural_similarity(a, b), expected, rtol=1e-9)


def test_the_largest_clique_is_that_of_all_subsets(key):
    """Against every subset of seven samples; samples that are all equal are one clique."""
    points = np.asarray(jax.random.uniform(key, (7, 2)))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    threshold = 0.5
    best = 1.0
    for size in range(2, 8):
        for some in itertools.combinations(range(7), size):
            apart = [distances[i, j] for i, j in itertools.combinations(some, 2)]
            if max(apart) < threshold:
                best = max(best, size - np.mean(apart))
    assert detection.largest_clique(distances, threshold) == pytest.approx(best, rel=1e-12)
    assert detection.largest_clique(np.zeros((4, 4)), 0.1) == 4
    assert detection.largest_clique(1 - np.eye(4), 0.1) == 1
    with pytest.raises(ValueError, match="threshold must be positive and at most 1, got 2"):
        detection.largest_clique(distances, 2.0)


def test_the_activity_of_a_neuron_is_its_mean_size_over_tokens():
    np.testing.assert_array_equal(detection.neuron_activity(jnp.array([[1.0, -2.0], [-3.0, 0.0]])), [2, 1])


def test_a_network_of_the_zoo_is_scored_as_a_closed_form_is(key):
    """Exact and estimated dimension of the same image agree, and repeated images are denoised best."""
    with jax.enable_x64(False):
        pipeline = scaling.zoo.load("digits-10")
        denoiser = scaling.as_denoiser(pipeline.network, pipeline.schedule)
        x = jnp.zeros((1, 8, 8))
        exact = jax.jit(lambda x: detection.intrinsic_dimension(denoiser, x, 0.5))(x)
        estimate = jax.jit(
            lambda x: detection.intrinsic_dimension_estimate(jax.random.key(0), denoiser, x, 0.5, num_probes=400)
        )(x)
        jacobian = jax.jit(jax.jacfwd(lambda x: denoiser(x, 0.5)))(x).reshape(64, 64)
        symmetric = (jacobian + jacobian.T) / 2
        spread = np.sqrt(2 / 400 * (np.sum(symmetric**2) - np.sum(np.diag(symmetric) ** 2)))
        assert abs(float(exact - estimate)) < 4 * spread


@pytest.mark.parametrize(
    "call",
    [
        lambda: detection.intrinsic_dimension(gaussian, jnp.ones(6), 0.0),
        lambda: detection.sharpness(jnp.sin, jnp.cos, jnp.ones(2), -1.0),
        lambda: detection.denoising_error(jax.random.key(0), gaussian, jnp.ones(6), 0.5, num_draws=0),
    ],
)
def test_noise_levels_and_numbers_are_checked(call):
    with pytest.raises(ValueError, match="must be"):
        call()
