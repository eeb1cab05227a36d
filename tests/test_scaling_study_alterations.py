"""Alterations of images: what each leaves as it is, what it changes, and that images do not depend on one another."""

import numpy as np
import pytest

from scaling.study.alterations import ALTERATIONS, alter

IMAGES = np.random.default_rng(0).uniform(-1, 1, (5, 3, 16, 8)).astype(np.float32)


@pytest.mark.parametrize("name", ALTERATIONS)
def test_shape_range_and_type_stay_and_images_change_alone(name):
    found = alter(IMAGES, name, seed=3)
    assert (found.shape, found.dtype) == (IMAGES.shape, IMAGES.dtype)
    assert np.abs(found).max() <= 1
    assert all(np.any(found[i] != IMAGES[i]) for i in range(5))
    np.testing.assert_array_equal(alter(IMAGES[:2], name, seed=3), found[:2])


@pytest.mark.parametrize("name", sorted(set(ALTERATIONS) - {"noise", "occlude"}))
def test_an_image_of_one_value_stays(name):
    """JPEG rounds to bytes: half a step, and the rounding of its own transform."""
    flat = np.full((1, 1, 8, 8), 0.5, np.float32)
    np.testing.assert_allclose(alter(flat, name), flat, atol=2 / 127.5 if name == "compress" else 1e-6)


def test_a_flip_undoes_itself_and_a_shift_moves_columns():
    np.testing.assert_array_equal(alter(alter(IMAGES, "flip"), "flip"), IMAGES)
    moved = alter(IMAGES, "shift")
    np.testing.assert_array_equal(moved[..., 1:], IMAGES[..., :-1])
    np.testing.assert_array_equal(moved[..., 0], IMAGES[..., 0])
    wide = np.zeros((1, 1, 2, 64), np.float32)
    wide[..., 10] = 1
    assert np.argmax(alter(wide, "shift")[0, 0, 0]) == 12


def test_fading_keeps_the_mean_and_three_tenths_of_the_contrast():
    faded, axes = alter(IMAGES, "fade"), (2, 3)
    np.testing.assert_allclose(faded.mean(axes), IMAGES.mean(axes), atol=1e-6)
    np.testing.assert_allclose(faded.std(axes), 0.3 * IMAGES.std(axes), rtol=1e-5)


def test_blurring_lowers_contrast_and_cropping_enlarges():
    assert np.all(alter(IMAGES, "blur").std((2, 3)) < IMAGES.std((2, 3)))
    # A ramp through the middle is seven eighths as steep.
    ramp = np.broadcast_to(np.linspace(-1, 1, 9, dtype=np.float32), (1, 1, 9, 9))
    np.testing.assert_allclose(alter(ramp, "crop"), 7 / 8 * ramp, atol=1e-6)


def test_a_square_of_a_quarter_of_each_side_is_covered():
    changed = np.any(alter(IMAGES, "occlude") != IMAGES, axis=1)
    for mask in changed:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (len(rows), len(columns)) == (4, 2)
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_added_noise_has_its_size():
    """Of 100,000 draws the standard deviation is within four standard errors, sd / sqrt(2 n), of 0.1."""
    gray = np.zeros((1, 1, 250, 400), np.float32)
    assert alter(gray, "noise").std() == pytest.approx(0.1, abs=4 * 0.1 / np.sqrt(2e5))


def test_unknown_alterations_are_named():
    with pytest.raises(ValueError, match=r"unknown alteration 'rotate'; known are flip"):
        alter(IMAGES, "rotate")
