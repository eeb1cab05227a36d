"""Nearest neighbors by blocks equal those of all pairs; repeats of the nearest image are passed over."""

import numpy as np
import pytest

from scaling.measures.copies import find_copies
from scaling.measures.neighbors import nearest_images, nearest_two, of_array, within


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(57, 6)).astype(np.float32)


def all_pairs(queries, rows):
    return np.linalg.norm(queries[:, None].astype(float) - rows[None].astype(float), axis=2)


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_blocks_of_any_size_find_the_same_neighbors(rows, block_bytes):
    queries = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    pairs = all_pairs(queries, rows)
    numbers, distances = nearest_images(queries, of_array(rows), k=4, block_bytes=block_bytes)
    np.testing.assert_array_equal(numbers, np.argsort(pairs, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(pairs, axis=1)[:, :4], rtol=1e-12)
    for i, (near, lengths) in enumerate(within(queries, of_array(rows), 2.0, block_bytes=block_bytes)):
        np.testing.assert_array_equal(near, np.flatnonzero(pairs[i] <= 2.0))
        np.testing.assert_allclose(lengths, pairs[i, near], rtol=1e-12)


def test_a_copy_far_from_the_origin_is_found_though_products_cancel(rows):
    """At 1000 times the size float32 products have no digit left of a distance of .01."""
    far = rows + 1000
    query = (far[5] + np.float32(0.01))[None]
    numbers, distances = nearest_images(query, of_array(far), k=1)
    assert numbers[0, 0] == 5
    assert distances[0, 0] == pytest.approx(np.linalg.norm(query.astype(float) - far[5]), rel=1e-12)


def test_exact_repeats_are_found_though_products_cancel(rows):
    """Their squared distance from products is not 0 but of the size of its rounding."""
    far = rows + 1000
    for i, (near, lengths) in enumerate(within(far[:20], of_array(far), 0.0)):
        assert near.tolist() == [i]
        assert lengths.tolist() == [0.0]


def test_repeats_and_near_repeats_of_the_nearest_image_are_passed_over(rows):
    """As many as there may be: 30 copies are more than the first candidates."""
    noise = np.random.default_rng(2).normal(size=(30, 6)).astype(np.float32)
    repeated = np.concatenate([rows, rows[3] + 1e-3 * noise])
    queries = rows[3:5] + np.float32(0.01)
    found = nearest_two(queries, of_array(repeated), 0.05)
    plain = find_copies(queries, rows)
    np.testing.assert_array_equal(found.other_distance, plain.second)
    np.testing.assert_allclose(found.distance[1], plain.distance[1])
    assert found.distance[0] <= plain.distance[0]
    # Without the radius the second distance is that of a repeat.
    assert nearest_two(queries, of_array(repeated), 0.0).other_distance[0] < 0.1 * plain.second[0]


def test_one_image_has_no_other():
    found = nearest_two(np.zeros((2, 3), np.float32), of_array(np.ones((5, 3), np.float32)), 0.1)
    assert found.other.tolist() == [-1, -1]
    assert np.isinf(found.other_distance).all()


def test_bad_input_is_named(rows):
    with pytest.raises(ValueError, match="one size"):
        nearest_images(np.zeros((1, 5), np.float32), of_array(rows))
    with pytest.raises(ValueError, match="not finite"):
        nearest_images(np.full((1, 6), np.nan, np.float32), of_array(rows))
    with pytest.raises(ValueError, match="k must"):
        nearest_images(np.zeros((1, 6), np.float32), of_array(rows), k=58)
    bad = rows.copy()
    bad[7] = np.inf
    with pytest.raises(ValueError, match="images 0 to 56"):
        nearest_images(np.zeros((1, 6), np.float32), of_array(bad))


def test_a_variant_of_the_nearest_image_is_no_other_image(rows):
    """Rows and their negatives. The fourth is near its own, and stands once more as its negative."""
    one = np.concatenate([rows[:3], rows[3:4] / 10, rows[4:]])
    images = np.concatenate([one, -one[3:4]])
    both = of_array(np.concatenate([images, -images]))
    queries = np.concatenate([one[3:5], -one[4:5]]) + np.float32(0.001)
    found = nearest_two(queries, both, 0.05, variants=2)
    assert found.nearest[0] in (3, len(one))
    assert found.nearest[1:].tolist() == [4, 4]
    order = np.sort(np.minimum(all_pairs(queries, one), all_pairs(queries, -one)), axis=1)
    np.testing.assert_allclose(found.distance, order[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found.other_distance, order[:, 1], rtol=1e-12)
    # Without variants its own negative passes for another image.
    assert nearest_two(queries[:1], both, 0.05).other_distance[0] < 0.9 * order[0, 1]
    with pytest.raises(ValueError, match="116 rows are no 3 variants"):
        nearest_two(queries, both, 0.05, variants=3)
