"""Blocks and spectra: against numpy's SVD, with copies, in float32, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import mixture, spectra

LABELS = np.array([7, 2, 2, 7, 7, 2, 9, 7])


def random_rows(key, n=8, d=5):
    return jax.random.normal(key, (n, d))


def test_blocks_come_in_order_of_label():
    blocks = spectra.partition(LABELS, 8)
    np.testing.assert_array_equal(blocks.labels, [2, 7, 9])
    np.testing.assert_array_equal(blocks.counts, [3, 4, 1])
    np.testing.assert_array_equal(blocks.labels[blocks.members], LABELS)


def test_blocks_alike_visits_each_row_once():
    blocks = spectra.partition(LABELS, 8)
    seen = {}
    for numbers, rows in spectra.blocks_alike(blocks, (1, 1, 0)):
        for number, of_block in zip(numbers, rows, strict=True):
            seen[int(number)] = sorted(of_block.tolist())
    # Sizes are rounded up to powers of two; row 8, one past the last, fills up.
    assert seen == {0: [1, 2, 5, 8], 1: [0, 3, 4, 7], 2: [6]}


def test_filled_rows_change_neither_spectra_nor_derivatives(key):
    """Three rows of a block in a frame of four, wider than long: the zero row must not tie with a real one."""
    data = random_rows(key, 7, 9)
    labels = np.array([0, 0, 0, 1, 1, 1, 1])

    def second(data):
        moments, _ = spectra.empirical_spectra(data, labels)
        return jnp.sum(moments[0] * jnp.array([3.0, 1.0, 2.0, 5.0]))

    gradient = np.asarray(jax.jit(jax.grad(second))(data))
    _, singular, axes = np.linalg.svd(data[:3], full_matrices=False)
    moments = jax.jit(functools.partial(spectra.empirical_spectra, labels=labels))(data).moments
    np.testing.assert_allclose(moments[0], [*(singular**2 / 3), 0.0], atol=1e-13)
    # Hellmann-Feynman: the eigenvalue of X'X moves by twice the row along its axis.
    expected = 2 / 3 * np.asarray(data[:3]) @ (axes.T * np.array([3.0, 1.0, 2.0])) @ axes
    np.testing.assert_allclose(gradient[:3], expected, atol=1e-12)
    np.testing.assert_array_equal(gradient[3:], 0.0)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 6)])
def test_principal_axes_diagonalize_the_second_moment(key, shape):
    points = jax.random.normal(key, shape)
    lam, axes = spectra.principal_axes(points, min(shape))
    singular = np.linalg.svd(points, compute_uv=False)
    rounding = 50 * np.finfo(float).eps * singular[0] ** 2
    np.testing.assert_allclose(lam, singular**2, atol=rounding, rtol=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(min(shape)), atol=1e-13)
    np.testing.assert_allclose((axes * lam[None, :]) @ axes.T, points.T @ points, atol=rounding)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_eigenvalues_of_dependent_rows_are_exactly_zero(key, shape):
    k1, k2 = jax.random.split(key)
    points = jax.random.normal(k1, (shape[0], 2)) @ jax.random.normal(k2, (2, shape[1]))
    lam, axes = spectra.principal_axes(points, 6)
    assert np.all(lam[:2] > 0)
    np.testing.assert_array_equal(lam[2:], 0.0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(6), atol=1e-13)


def test_weak_directions_survive_float32(key):
    """Singular values over four decades: forming the Gram matrix alone would lose the last ones to rounding."""
    decay = jnp.logspace(0, -3, 12)
    points = jax.random.normal(key, (40, 12)) * decay[None, :]
    lam, axes = spectra.principal_axes(points.astype(jnp.float32), 12)
    expected = np.linalg.svd(points, compute_uv=False) ** 2
    eps = np.finfo(np.float32).eps
    # The Rayleigh quotient of an axis off by δ ~ eps is off by δ² Λ₁ and by rounding of its own size.
    np.testing.assert_allclose(lam, expected, rtol=40 * eps, atol=40 * eps * float(expected[-1]) + eps * 1e-1)
    np.testing.assert_allclose(axes.T @ axes, np.eye(12), atol=40 * eps)


def test_empirical_spectra_are_the_clusters_second_moments(key):
    data = random_rows(key)
    moments, weights = jax.jit(functools.partial(spectra.empirical_spectra, labels=LABELS))(data)
    assert moments.shape == (3, 4)
    for k, label in enumerate([2, 7, 9]):
        points = np.asarray(data)[label == LABELS]
        eigenvalues = np.linalg.eigvalsh(points.T @ points / len(points))[::-1][:4]
        np.testing.assert_allclose(moments[k], eigenvalues, atol=1e-14)
    np.testing.assert_allclose(weights, [3 / 8, 4 / 8, 1 / 8])


def test_multiplicity_stands_for_repeated_rows(key):
    data = random_rows(key)
    times = np.array([1, 3, 1, 2, 1, 1, 4, 1])
    counted = jax.jit(lambda data: spectra.empirical_spectra(data, LABELS, multiplicity=times))(data)
    repeated = jax.jit(lambda data: spectra.empirical_spectra(data, np.repeat(LABELS, times)))(
        data[np.repeat(np.arange(8), times)]
    )
    np.testing.assert_allclose(counted.moments, repeated.moments[:, :4], atol=1e-13)
    np.testing.assert_allclose(counted.weights, repeated.weights)


def test_masked_spectra_agree_with_empirical_ones(key):
    data = random_rows(key)
    blocks = spectra.partition(LABELS, 8)
    times = jnp.array([1.0, 3.0, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0])
    own = spectra.block_copies(jnp.asarray(blocks.members), times, 3)
    moments, counts, axes = jax.jit(spectra.masked_spectra)(spectra.span_coordinates(data), own)
    present = np.asarray(times) > 0
    of_present = functools.partial(
        spectra.empirical_spectra, labels=LABELS[present], multiplicity=np.asarray(times)[present].astype(int)
    )
    expected = jax.jit(of_present)(data[present])
    np.testing.assert_allclose(moments[:2, :4], expected.moments, atol=1e-14)
    # The third block is empty.
    np.testing.assert_array_equal(moments[2], 0.0)
    np.testing.assert_array_equal(counts, [4.0, 5.0, 0.0])
    np.testing.assert_allclose(axes[0].T @ axes[0], np.eye(5), atol=1e-13)


def test_direction_spectra_list_blocks_then_rows(key):
    rows = random_rows(key, 3, 2)
    listed = spectra.direction_spectra(jnp.ones((2, 2)), jnp.array([3.0, 4.0]), rows, jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(listed.weights, np.array([3, 3, 4, 4, 0, 1, 2]) / 10)
    np.testing.assert_allclose(listed.moments[4:, 0], np.sum(np.square(rows), axis=1))


def test_distinct_rows_keep_the_order_of_appearance():
    data = jnp.array([[3.0, 1.0], [1.0, 2.0], [3.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    rows, members, inverse = spectra.distinct_rows(data, np.array([1, 0, 1, 0, 0]))
    np.testing.assert_array_equal(rows, data[np.array([0, 1, 3])])
    np.testing.assert_array_equal(members, [1, 0, 0])
    np.testing.assert_array_equal(rows[inverse], data)
    with pytest.raises(ValueError, match="1 rows equal an earlier row of another label"):
        spectra.distinct_rows(data, np.array([1, 0, 1, 0, 1]))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_span_coordinates_keep_inner_products(key, shape):
    rows = jax.random.normal(key, shape)
    coordinates = spectra.span_coordinates(rows)
    assert coordinates.shape == (shape[0], min(shape))
    np.testing.assert_allclose(coordinates @ coordinates.T, rows @ rows.T, atol=1e-13)


def test_population_spectra_are_the_limit_of_empirical_ones(key):
    """The law of large numbers, with its rate: the error falls like n^(-1/2)."""
    covariances = 0.1 * jnp.eye(3)[None] * jnp.array([1.0, 2.0])[:, None, None]
    world = mixture.GaussianMixture(jnp.array([0.3, 0.7]), jnp.array([[2.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]), covariances)
    exact = spectra.population_spectra(world)
    data, labels = mixture.sample(key, world, 16 * 6400)
    # Sorting by mode and cutting into equal parts keeps the weights out of the comparison.
    by_mode = [np.asarray(data)[np.asarray(labels) == k][: 16 * 1600] for k in range(2)]
    sizes, errors = np.array([25, 100, 400, 1600]), []
    for size in sizes:
        draws = jnp.concatenate([x.reshape(16, 1600, 3)[:, :size] for x in by_mode], axis=1)
        found = jax.jit(jax.vmap(lambda x, size=size: spectra.empirical_spectra(x, np.repeat([0, 1], size))))(draws)
        errors.append(np.sqrt(np.mean(np.square(found.moments - exact.moments[None]))))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    # Sixteen draws a size of six numbers: each log error is known to about 0.15, the slope of four to 0.05.
    assert abs(slope + 0.5) < 0.15


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"got \(2,\), -6 labels"),
        (np.zeros((8, 1), int), r"shape \(8,\)"),
        (np.zeros(8), "integers"),
    ],
)
def test_partition_refuses_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        spectra.partition(labels, 8)


def test_partition_refuses_traced_labels():
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(lambda labels: spectra.partition(labels, 3).counts)(jnp.arange(3))


@pytest.mark.parametrize(
    ("ranks", "width", "message"),
    [
        ([1, 2], None, "each of the 3 blocks, got 2"),
        ([1, 6, 1], None, r"ranks\[1\] = 6 exceeds by 2 .* 4 = min"),
        ([1, -1, 1], None, "at least 0, got -1"),
        ([3, 4, 1], 6, "sum to 8, 2 more than width = 6"),
        (np.array([1.5, 1, 1]), None, "integer"),
        ([1, 1, 1], 0, "at least 1"),
    ],
)
def test_check_ranks_says_by_how_much(ranks, width, message):
    with pytest.raises(ValueError, match=message):
        spectra.check_ranks(ranks, [3, 4, 1], width=width)


def test_one_rank_stands_for_all_blocks():
    assert spectra.check_ranks(1, [3, 4, 1]) == (1, 1, 1)
    assert spectra.check_ranks(np.array([2, 0, 1]), [3, 4, 1]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("multiplicity", "message"),
    [([1, 2], r"shape \(3,\)"), ([1, 0, 1], "positive"), ([1, 1.5, 1], "whole numbers"), ([1, np.nan, 1], "finite")],
)
def test_multiplicity_is_checked(multiplicity, message):
    with pytest.raises(ValueError, match=message):
        spectra.check_multiplicity(np.asarray(multiplicity), 3)


def test_empirical_spectra_refuse_bad_data():
    with pytest.raises(ValueError, match="1 non-finite"):
        spectra.empirical_spectra(jnp.array([[1.0, jnp.nan]]), [0])


def test_lowers_for_accelerators():
    spec = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    jitted = jax.jit(functools.partial(spectra.empirical_spectra, labels=LABELS))
    jitted.trace(spec).lower(lowering_platforms=("tpu", "cuda"))
