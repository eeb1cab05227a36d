"""The ratio test by brute force and on cases that can be computed by hand; Wilson's interval by its equation."""

from statistics import NormalDist

import numpy as np
import pytest

from scaling.measures import copies


def brute(samples, images, groups):
    """Nearest image, its distance, and that of the nearest one of another group."""
    found = []
    for sample in samples:
        distances = [float(np.sqrt(np.sum((sample - image) ** 2))) for image in images]
        nearest = int(np.argmin(distances))
        second = min(d for d, group in zip(distances, groups, strict=True) if group != groups[nearest])
        found.append((nearest, distances[nearest], second))
    return map(np.array, zip(*found, strict=True))


def test_against_brute_force():
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (40, 1, 3, 4))
    images[30:] = images[:10]
    groups = np.concatenate([np.arange(30) // 2, np.arange(10) // 2])
    near = images[random.integers(0, 40, 25)] + 0.05 * random.standard_normal((25, 1, 3, 4))
    samples = np.concatenate([near, random.uniform(-1, 1, (25, 1, 3, 4))])
    found = copies.find_copies(samples, images, groups=groups)
    nearest, distance, second = brute(samples, images, groups)
    np.testing.assert_array_equal(found.nearest, nearest)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-12)
    np.testing.assert_allclose(found.second, second, rtol=1e-12)
    np.testing.assert_array_equal(found.is_copy, distance / second < 1 / 3)
    assert 0 < found.is_copy.sum() < 50


def test_a_copy_is_nearer_than_a_third():
    images = np.array([[0.0, 0.0], [4.0, 0.0]])
    found = copies.find_copies(np.array([[0.99, 0.0], [1.01, 0.0], [4.0, 0.0], [2.0, 0.0]]), images)
    assert found.is_copy.tolist() == [True, False, True, False]
    assert found.nearest.tolist() == [0, 0, 1, 0]
    assert found.ratio[2] == 0
    assert copies.copy_share(found)[:3] == (2, 4, 0.5)


def test_repeated_images_hide_no_copy():
    images = np.array([[0.0, 0.0], [4.0, 0.0]])
    sample = np.array([[0.1, 0.0]])
    once = copies.find_copies(sample, images)
    many = copies.find_copies(sample, np.repeat(images, 60, axis=0))
    signed = copies.find_copies(sample, np.array([[0.0, 0.0], [-0.0, 0.0], [4.0, 0.0]]))
    assert once.ratio == many.ratio == signed.ratio
    assert bool(many.is_copy[0])


def test_variants_count_as_one():
    images = np.array([[0.0, 0.0], [0.0, 0.5], [4.0, 0.0]])
    sample = np.array([[0.0, 0.2]])
    assert not copies.find_copies(sample, images).is_copy[0]
    assert copies.find_copies(sample, images, groups=np.array([7, 7, 3])).is_copy[0]


def test_groups_joined_by_equal_images_are_one():
    images = np.array([[0.0], [1.0], [1.0], [2.0], [3.0]])
    assert copies.group_equal(images).tolist() == [0, 1, 1, 2, 3]
    joined = copies.group_equal(images, np.array([5, 5, 8, 8, 9]))
    assert len(set(joined[:4].tolist())) == 1
    assert joined[4] != joined[0]


def test_joined_groups_by_brute_force():
    """Merging the numbers of any two images that are equal, or share a number, until nothing changes."""
    random = np.random.default_rng(3)
    images, groups = random.integers(0, 12, (40, 1)).astype(float), random.integers(0, 25, 40)
    expected = np.arange(40)
    for _ in range(40):
        for i, j in zip(*np.nonzero((images == images.T) | (groups[:, None] == groups[None])), strict=True):
            expected[expected == max(expected[i], expected[j])] = min(expected[i], expected[j])
    joined = copies.group_equal(images, groups)
    np.testing.assert_array_equal(joined[:, None] == joined[None], expected[:, None] == expected[None])
    assert 1 < len(set(joined.tolist())) < 12


def test_digits_of_many_blocks(monkeypatch):
    random = np.random.default_rng(1)
    images, samples = random.uniform(-1, 1, (50, 6)), random.uniform(-1, 1, (33, 6))
    whole = copies.find_copies(samples, images)
    monkeypatch.setattr(copies, "BLOCK_BYTES", 8 * 50 * 7)
    for part, other in zip(whole, copies.find_copies(samples, images), strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize(("count", "total"), [(0, 60), (1, 60), (43, 100), (60, 60), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson(count, total, level):
    """Both ends are z standard deviations of their own away from the share; where that is outside, at 0 or 1."""
    z, share = NormalDist().inv_cdf((1 + level) / 2), count / total
    low, high = copies.wilson_interval(count, total, level=level)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        np.testing.assert_allclose((share - end) ** 2, z**2 * end * (1 - end) / total, rtol=1e-12, atol=1e-15)
    assert low < high


def test_the_interval_covers():
    # 4,000 draws of a share of 0.3 of 50: coverage is 0.95 to within lattice effects of about 0.02.
    counts = np.random.default_rng(2).binomial(50, 0.3, 4000)
    intervals = np.array([copies.wilson_interval(k, 50) for k in range(51)])[counts]
    assert 0.92 < np.mean((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)) < 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 4))), "cannot be compared"),
        ((np.zeros((0, 3)), np.zeros((2, 3))), "at least one"),
        ((np.zeros((2, 3)), np.zeros((2, 3))), "one image"),
        ((np.full((2, 3), np.nan), np.eye(3)), "samples has 6 non-finite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        copies.find_copies(*arguments)


def test_bad_settings():
    with pytest.raises(ValueError, match="ratio must lie"):
        copies.find_copies(np.eye(3), np.eye(3), ratio=1.0)
    with pytest.raises(ValueError, match="number the 3 images"):
        copies.find_copies(np.eye(3), np.eye(3), groups=np.zeros(2, int))
    with pytest.raises(ValueError, match="level must lie"):
        copies.wilson_interval(1, 2, level=1.0)
    with pytest.raises(ValueError, match="count must be at most 2"):
        copies.wilson_interval(3, 2)
    with pytest.raises(ValueError, match="of the same networks, got 2 and 1"):
        copies.share_over_networks([1, 2], [3])
    with pytest.raises(ValueError, match="count must be at most 3"):
        copies.share_over_networks([1, 4], [3, 3])


@pytest.mark.parametrize(
    ("mean", "spread", "least"), [(0.35, 0.0, 0.95), (0.35, 0.2, 0.93), (0.1, 0.05, 0.95), (0.02, 0.025, 0.88)]
)
@pytest.mark.parametrize("networks", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_shares_over_networks_cover_networks_and_samples(mean, spread, least, networks):
    """Shares of networks are drawn from a beta distribution, samples from each network."""
    rng, runs, num = np.random.default_rng(networks), 600, 200
    size = mean * (1 - mean) / max(spread, 1e-3) ** 2 - 1
    counts = rng.binomial(num, rng.beta(mean * size, (1 - mean) * size, (runs, networks)))
    found = [copies.share_over_networks(row.tolist(), [num] * networks) for row in counts]
    covered = np.mean([one.low <= mean <= one.high for one in found])
    # Four binomial standard errors at 600 runs and the least coverage stated.
    assert covered >= least - 4 * np.sqrt(least * (1 - least) / runs)
    pooled = [copies.wilson_interval(int(row.sum()), num * networks) for row in counts]
    if spread:
        assert np.mean([low <= mean <= high for low, high in pooled]) < 0.7


def test_shares_over_networks_at_the_ends():
    none = copies.share_over_networks([0, 0, 0], [200, 200, 200])
    assert none[:4] == (0, 600, 0.0, 0.0)
    assert 0.005 < none.high < 0.02
    whole = copies.share_over_networks([200] * 3, [200] * 3)
    np.testing.assert_allclose([whole.low, whole.high], [1 - none.high, 1.0], atol=1e-12)
    assert copies.share_over_networks([20], [200])[3:] == copies.wilson_interval(20, 200)


def test_bytes_are_not_compared_with_values_of_another_scale():
    images = np.arange(24, dtype=np.uint8).reshape(2, 12)
    for pair in ((images / 127.5 - 1, images), (images, images / 127.5 - 1)):
        with pytest.raises(ValueError, match="are not of one scale; convert the bytes"):
            copies.find_copies(*pair)
    assert copies.find_copies(images, images).is_copy.all()
