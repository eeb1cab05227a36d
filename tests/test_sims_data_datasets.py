"""Data sets: nested splits, centering, separable subsets, duplicates, and what is refused."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import mixture as mx
from sims.data import datasets
from sims.data.readers import Source

MIXTURE = "mixture:modes=4,dim=16,separation=3,rank=3,decay=0.5,size=300,seed=2"


def test_digits_are_scaled_exactly_and_split_without_overlap():
    data = datasets.load("digits", dtype=np.float64)
    assert data.train.shape == (1438, 64)
    assert data.held_out.shape == (359, 64)
    assert data.image_shape == (8, 8, 1)
    both = np.concatenate([data.train, data.held_out])
    # 17 levels of gray from -1 to 1.
    np.testing.assert_array_equal(np.unique(both), np.arange(17) / 8 - 1)
    np.testing.assert_array_equal(np.sort(np.concatenate([data.train_rows, data.held_out_rows])), np.arange(1797))
    from sklearn.datasets import load_digits

    table = load_digits()
    np.testing.assert_array_equal(data.train, table.data[data.train_rows] / 8 - 1)
    np.testing.assert_array_equal(data.train_labels, table.target[data.train_rows])
    np.testing.assert_array_equal(data.held_out_labels, table.target[data.held_out_rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_have_the_dtype_asked_for(dtype):
    data = datasets.load("digits", num_samples=3, center=True, dtype=dtype)
    assert data.train.dtype == data.held_out.dtype == data.mean.dtype == dtype


def test_smaller_sets_are_prefixes_of_larger_ones_and_share_the_held_out_rows():
    pool = datasets.load("digits")
    for n in (1, 7, 100):
        small = datasets.load("digits", num_samples=n)
        np.testing.assert_array_equal(small.train, pool.train[:n])
        np.testing.assert_array_equal(small.held_out, pool.held_out)
        for ours, theirs in zip(datasets.prefix(pool, n), small, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_seed_changes_the_split_and_nothing_else_does():
    first, again, other = (datasets.load("digits", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train_rows, again.train_rows)
    assert np.mean(first.train_rows == other.train_rows) < 0.05


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 359), (0.0, 0), (0, 0), (100, 100), (0.999999, 1796)])
def test_held_out_is_a_count_or_a_fraction(held_out, count):
    assert len(datasets.load("digits", held_out=held_out).held_out) == count


def test_centering_subtracts_the_mean_of_the_rows_used():
    raw, centered = (
        datasets.load("digits", num_samples=9, center=center, dtype=np.float64) for center in (False, True)
    )
    mean = raw.train.mean(axis=0)
    # Sums of 9 multiples of 1/8 are exact; one division and one subtraction round.
    np.testing.assert_allclose(centered.mean, mean, atol=1e-15)
    np.testing.assert_allclose(centered.train, raw.train - mean, atol=1e-15)
    np.testing.assert_allclose(centered.held_out, raw.held_out - mean, atol=1e-15)
    np.testing.assert_array_equal(raw.mean, 0)


def test_a_prefix_of_a_centered_pool_is_centered_anew():
    raw, centered = (datasets.load("digits", center=center, dtype=np.float64) for center in (False, True))
    direct = datasets.load("digits", num_samples=5, center=True, dtype=np.float64)
    for pool in (raw, centered):
        ours = datasets.prefix(pool, 5, center=True)
        # Two subtractions of numbers up to 1, each rounding by at most eps.
        np.testing.assert_allclose(ours.train, direct.train, atol=1e-15)
        np.testing.assert_allclose(ours.held_out, direct.held_out, atol=1e-15)
        np.testing.assert_allclose(ours.mean, direct.mean, atol=1e-15)


def test_center_is_one_function_for_numpy_and_jax():
    train, held_out = np.arange(8.0).reshape(4, 2), np.ones((1, 2))
    by_numpy = datasets.center(train, held_out)
    by_jax = jax.jit(datasets.center)(jnp.asarray(train), jnp.asarray(held_out))
    for ours, theirs in zip(by_numpy, by_jax, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(by_numpy[2], [3, 4])
    jax.jit(datasets.center).trace(train, held_out).lower(lowering_platforms=("tpu", "cuda"))


def test_repeated_rows_weigh_in_the_mean():
    data = datasets.load("digits", duplicates="2x3", singles=1, center=True, dtype=np.float64)
    rows = datasets.load("digits", num_samples=3, dtype=np.float64).train
    np.testing.assert_allclose(data.mean, (3 * rows[0] + 3 * rows[1] + rows[2]) / 7, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_eight_centered_digits_are_separable(seed):
    data = datasets.load("digits", center=True, separable=8, seed=seed)
    assert len(set(data.train_rows.tolist())) == 8
    pairs = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in itertools.combinations(data.train, 2)]
    beta = datasets.max_cosine(data.train)
    assert abs(max(pairs) - beta) < 1e-6
    # Not just below 0: the theorem's margin is β times a norm. The bound for 8 rows is -1/7.
    assert -1 / 7 <= beta < -0.02
    # The mean is the pool's: that of the 8 rows would change their cosines.
    pool = datasets.load("digits", center=True, seed=seed)
    np.testing.assert_array_equal(data.mean, pool.mean)
    np.testing.assert_array_equal(data.held_out, pool.held_out)


def test_raw_digits_have_no_separable_pair():
    with pytest.raises(ValueError, match=r"no two have: the lowest cosine is 0\.\d+\. Subtract the mean"):
        datasets.load("digits", separable=2)


def test_a_regular_simplex_is_found_whole():
    corners = np.linalg.eigh(np.eye(5) - 0.2)[1][:, 1:]
    rows = np.concatenate([np.ones((3, 4)), 7 * corners])
    assert sorted(datasets.separable_rows(rows, 5).tolist()) == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"separable = 6 of 8 rows.*5 were found at most"):
        datasets.separable_rows(rows, 6)


def test_fewer_rows_are_chosen_with_a_wider_margin():
    betas = [datasets.max_cosine(datasets.load("digits", center=True, separable=m).train) for m in (3, 5, 8)]
    assert betas[0] < -0.3 < betas[1] < -0.1 < betas[2]


def test_duplicates_come_in_blocks_beside_singles():
    data = datasets.load("digits", duplicates="3x4", singles=5)
    np.testing.assert_array_equal(data.multiplicity, [4] * 12 + [1] * 5)
    np.testing.assert_array_equal(data.train[:4], np.tile(data.train[0], (4, 1)))
    plain = datasets.load("digits", num_samples=8)
    np.testing.assert_array_equal(data.train[[0, 4, 8, *range(12, 17)]], plain.train)
    np.testing.assert_array_equal(data.held_out, plain.held_out)
    same = datasets.load("digits", duplicates=(3, 4), singles=5, num_samples=17)
    np.testing.assert_array_equal(same.train_rows, data.train_rows)


def test_duplicates_of_a_separable_set():
    data = datasets.load("digits", center=True, separable=4, duplicates="4x3")
    assert data.train.shape == (12, 64)
    assert datasets.max_cosine(data.train[::3]) < 0


def test_parse_duplicates():
    assert datasets.parse_duplicates("20x60") == (20, 60)
    for text in ("20", "0x3", "3x0", "axb", "1x2x3", "-1x2", ""):
        with pytest.raises(ValueError, match="20x60"):
            datasets.parse_duplicates(text)


def test_the_mixture_is_centered_with_its_rows():
    data = datasets.load(MIXTURE, center=True)
    plain = datasets.load(MIXTURE)
    np.testing.assert_allclose(plain.mixture.means - data.mixture.means, np.tile(data.mean, (4, 1)), atol=1e-6)
    mx.check_mixture(datasets.load(MIXTURE, center=True, dtype=np.float64).mixture)
    ours = datasets.prefix(plain, 10, center=True)
    np.testing.assert_allclose(plain.mixture.means - ours.mixture.means, np.tile(ours.mean, (4, 1)), atol=1e-6)


def test_describe_a_set_made_by_hand():
    rows = np.array([[0.6, 0.8], [0.6, 0.8], [-1.0, 0.0], [0.0, 0.5], [0.6, 0.8]])
    source = Source(rows, np.array([0, 0, 1, -1, 0]), None, None)
    data = datasets.load(source, held_out=0, dtype=np.float64)
    data = data._replace(held_out=np.array([[-1.0, 0.0], [1.0, 0.0]]))
    facts = datasets.describe(data)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["num_samples"] == 5
    assert facts["num_distinct"] == 3
    assert facts["num_held_out"] == 2
    assert facts["num_held_out_seen"] == 1
    assert facts["num_classes"] == 2
    assert facts["beta"] == pytest.approx(0.8, abs=1e-15)
    assert facts["beta_classes"] == pytest.approx(-0.6, abs=1e-15)
    assert facts["norm_min"] == 0.5
    assert facts["norm_median"] == facts["norm_max"] == pytest.approx(1.0, abs=1e-15)


def test_describe_has_no_beta_of_one_row():
    facts = datasets.describe(datasets.load("digits", num_samples=1))
    assert facts["beta"] is facts["beta_classes"] is None


def test_max_cosine_by_blocks_is_that_of_all_pairs(key):
    rows = np.asarray(jax.random.normal(key, (23, 4)))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [units[i] @ units[j] for i, j in itertools.combinations(range(23), 2)]
    for block in (1, 5, 23, 100):
        assert datasets.max_cosine(rows, block=block) == pytest.approx(max(pairs), abs=1e-14)
    assert datasets.max_cosine(np.array([[1.0, 0.0], [0.0, 0.0]])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 5000}, r"num_samples = 5000 is more than the 1438 rows.*at most 1438"),
        ({"held_out": 1.0}, r"\[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"\[0, 1\)"),
        ({"held_out": float("nan")}, "non-finite"),
        ({"held_out": 1797}, "held_out must be at most 1796, got 1797"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"center": True, "num_samples": 1}, "at least 2 training rows"),
        ({"separable": 1, "center": True}, "separable must be at least 2"),
        ({"separable": 66, "center": True}, r"separable = 66 of 1438 rows.*found at most"),
        ({"separable": 3, "center": True, "num_samples": 4}, r"num_samples = 4 is more than the 3 rows"),
        ({"singles": 5}, "needs duplicates"),
        ({"duplicates": "2x2", "singles": -1}, "singles must be at least 0"),
        ({"duplicates": "2x2", "num_samples": 9}, r"num_samples = 9, but duplicates 2x2 and singles 0 make 4 rows"),
        ({"duplicates": "1000x2", "singles": 900}, r"1900 is more than the 1438 rows"),
        ({"duplicates": (0, 2)}, "rows of duplicates must be at least 1"),
        ({"duplicates": "many"}, "20x60"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        datasets.load("digits", **options)


def test_a_prefix_longer_than_its_pool_is_refused():
    pool = datasets.load("digits", num_samples=10)
    with pytest.raises(ValueError, match=r"num_samples = 11 is more than the 10 rows"):
        datasets.prefix(pool, 11)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        datasets.prefix(pool, 0)


def repeated_source():
    """Ten rows, one of them five times and one twice."""
    rows = np.random.default_rng(0).integers(0, 256, (10, 6), np.uint8)
    rows[[2, 4, 7, 9]] = rows[0]
    rows[8] = rows[3]
    return Source(rows, np.arange(10))


@pytest.mark.parametrize("seed", range(6))
def test_equal_rows_are_on_one_side_of_the_split(seed):
    source = repeated_source()
    np.testing.assert_array_equal(datasets.first_of_equal(source.rows), [0, 1, 0, 3, 0, 5, 6, 0, 3, 0])
    data = datasets.load(source, held_out=4, seed=seed)
    assert len(data.train) + len(data.held_out) == 10
    assert len(data.held_out) <= 4
    assert not {row.tobytes() for row in data.train} & {row.tobytes() for row in data.held_out}
    assert not set(data.train_rows) & set(data.held_out_rows)
    found = datasets.describe(data)
    assert (found["num_repeats"], found["num_held_out_seen"]) == (5, 0)
    for row, times in zip(data.train_rows, data.multiplicity, strict=True):
        assert times == {0: 5, 3: 2}.get(row, 1) or row not in (0, 3)
    # What stood before the cut stays where it was.
    order = np.random.default_rng(seed).permutation(10)
    np.testing.assert_array_equal(data.train_labels[:6], order[:6])


def test_zeros_of_both_signs_are_equal():
    assert datasets.first_of_equal(np.array([[0.0, 1.0], [-0.0, 1.0]])).tolist() == [0, 0]
