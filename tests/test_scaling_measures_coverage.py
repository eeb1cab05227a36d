"""Coverage of training images by the others: the direct formula, the empirical posterior, limits, blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory.denoisers import empirical_denoiser
from scaling.measures import coverage
from scaling.measures.coverage import local_coverage, log_coverage
from scaling.measures.neighbors import Images, of_array


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)


def direct(rows, sigma):
    """From all differences at once, in float64."""
    x = rows.astype(float)
    squares = np.sum((x[:, None] - x[None]) ** 2, axis=2)
    np.fill_diagonal(squares, np.inf)
    return np.sum(np.exp(-squares / (2 * sigma**2)), axis=1)


@pytest.mark.parametrize("sigma", [0.2, 0.7, 3.0])
@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_it_is_the_direct_formula_for_blocks_of_any_size(rows, sigma, block_bytes):
    """Distances from products are right to 1e3 d eps, 1e-12, and exponents below 100 keep ten digits."""
    expected = direct(rows, sigma)
    np.testing.assert_allclose(local_coverage(of_array(rows), sigma, block_bytes=block_bytes), expected, rtol=1e-9)
    some = [36, 0, 17, 17]
    found = local_coverage(of_array(rows), sigma, some, block_bytes=block_bytes)
    np.testing.assert_allclose(found, expected[some], rtol=1e-9)


def test_it_is_the_odds_against_an_image_in_the_empirical_posterior():
    """1/w_j(x_j) - 1, with the weights solved for from the posterior mean: six images in nine dimensions."""
    x = np.random.default_rng(1).normal(size=(6, 9)).astype(np.float32)
    data = jnp.asarray(x, float)
    means = jax.vmap(functools.partial(empirical_denoiser, sigma=jnp.asarray(1.3), data=data))(data)
    weights = np.linalg.lstsq(np.asarray(data).T, np.asarray(means).T)[0]
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    np.testing.assert_allclose(local_coverage(of_array(x), 1.3), 1 / np.diag(weights) - 1, rtol=1e-9)


def test_limits_count_exact_repeats_and_all_others(rows):
    """Far from the origin: the products of float64 reach 2^40 and lose squared distances below 1e-4."""
    far = rows + np.array([2**20 + 0.5, 2**10, 0, 0, 0], np.float32)
    near = far[3] + np.array([0, 0, 1, 1, 1], np.float32) / 512
    repeated = np.concatenate([far, far[[3, 3, 5]], near[None]])
    copies = np.zeros(len(repeated))
    copies[[3, 37, 38]], copies[[5, 39]] = 2, 1
    np.testing.assert_array_equal(local_coverage(of_array(repeated), 1e-200), copies)
    np.testing.assert_allclose(local_coverage(of_array(repeated), 1e9), len(repeated) - 1, rtol=1e-12)
    # An image that stands three times is covered at least twice, at any noise.
    assert (local_coverage(of_array(repeated), 0.3)[[3, 37, 38]] >= 2).all()
    # The near repeat is seen at its own distance, not as an exact one: 3 entries differ by 1/512, to their rounding.
    found = local_coverage(of_array(repeated), 1 / 512, [40])[0]
    assert found == pytest.approx(3 * math.exp(-np.sum((near.astype(float) - far[3]) ** 2) * 512**2 / 2), rel=1e-9)
    assert found == pytest.approx(3 * math.exp(-3 / 2), rel=1e-3)


def test_the_logarithm_does_not_underflow(rows):
    two = rows[:2]
    squares = float(np.sum((two[0].astype(float) - two[1]) ** 2))
    assert local_coverage(of_array(two), 1e-3).tolist() == [0, 0]
    np.testing.assert_allclose(log_coverage(of_array(two), 1e-3), -squares / 2e-6, rtol=1e-12)
    assert log_coverage(of_array(rows[:1]), 1.0)[0] == -np.inf
    assert local_coverage(of_array(rows), 1.0, []).shape == (0,)


def test_memory_is_bounded(rows):
    """No block that is read, of images or of queries, exceeds the bytes that are allowed."""
    largest = []

    def read(start, stop):
        largest.append(stop - start)
        return rows[start:stop]

    log_coverage(Images(read, len(rows), 5), 1.0, block_bytes=400)
    assert 1 < max(largest) <= 400 // (4 * 5)


def test_bad_input_is_named(rows):
    images = of_array(rows)
    with pytest.raises(ValueError, match="sigma must be positive"):
        local_coverage(images, 0.0)
    with pytest.raises(ValueError, match="rows must be at most 36"):
        local_coverage(images, 1.0, [37])
    with pytest.raises(ValueError, match="rows must be at least 0"):
        local_coverage(images, 1.0, [-1])
    bad = rows.copy()
    bad[7] = np.nan
    with pytest.raises(ValueError, match="images 0 to 36 hold values"):
        local_coverage(of_array(bad), 1.0, [0])
    assert coverage.CLOSE < 1
