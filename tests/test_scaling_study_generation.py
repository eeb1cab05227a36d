"""Generated runs: equal to sampling in one go, cut anywhere, decoded, guided; pictures and contact sheets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from PIL import Image
from pipelines import CLASSES, DDIM, DDPM, LATENT, PIXEL, SMALL_DIT, SMALL_VAE

from scaling import sample
from scaling.bridge.latents import from_latents, to_latents
from scaling.bridge.loading import Pipeline
from scaling.diffusion.schedules import from_config
from scaling.models.model import Condition, vae_decode
from scaling.study.generation import generate, write_pictures
from scaling.study.pictures import SHEET, contact_sheet, to_bytes
from sims import store


def pipeline(config, vae=None):
    schedule = from_config(DDIM if vae else DDPM)
    return Pipeline(network(config), schedule, vae and network(vae), (), (), {})


def test_a_cut_run_goes_on_and_equals_one_batch(tmp_path):
    pixel = pipeline(PIXEL)
    run = functools.partial(generate, pixel, 5, 3, seed=4)

    def cut(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batch_size=2, on_batch=cut)
    assert int(store.load(tmp_path / "cut").done.sum()) == 2
    with pytest.raises(ValueError, match="no finished samples"):
        write_pictures(tmp_path / "cut")
    seen = []
    run(tmp_path / "cut", batch_size=2, on_batch=lambda *where: seen.append(where))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    expected = sample(jax.random.key(4), pixel.network, pixel.schedule, 5, 3).x
    found = store.load(tmp_path / "cut").images
    assert found.dims == ("sample", "channel", "height", "width")
    # float32 and other batch shapes; DDPM clips, so that errors do not grow.
    np.testing.assert_allclose(found, np.clip(expected, -1, 1), atol=1e-4)
    with pytest.raises(ValueError, match="num is 5 there and 6 here"):
        generate(pixel, 6, 3, tmp_path / "cut", seed=4)
    with pytest.raises(ValueError, match=r"method is \"ddpm\" there and \"ddim\" here"):
        run(tmp_path / "cut", method="ddim")


@pytest.mark.slow
def test_latents_are_decoded_and_guidance_uses_the_null_class(tmp_path):
    dit = pipeline(SMALL_DIT, SMALL_VAE)
    generate(dit, 2, 3, tmp_path, class_label=4, guidance=3.0, eta=0.5)
    condition, null = (Condition(class_labels=jnp.array([label])) for label in (4, 10))
    halves = {"condition": condition, "unconditional": null}
    expected = sample(jax.random.key(0), dit.network, dit.schedule, 2, 3, eta=0.5, guidance=3.0, **halves).x
    found = store.load(tmp_path)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(found.latents, expected, atol=1e-4 * scale)
    decoded = vae_decode(dit.vae, expected / 0.18215)
    np.testing.assert_allclose(found.images, np.clip(decoded, -1, 1), atol=1e-3)
    assert found.images.shape == (2, 3, 16, 16)
    assert np.std(found.images) > 0.05


@pytest.mark.slow
def test_latents_are_scaled_there_and_back_and_drawn_by_their_variance(key):
    vae = network(SMALL_VAE | {"scaling_factor": 0.5, "shift_factor": 0.25}, "float64")
    images = jnp.tanh(jax.random.normal(key, (2, 3, 16, 16)))
    mean, logvar = vae.apply.of("encode")(vae.params, images)[0]
    np.testing.assert_allclose(to_latents(vae, images), 0.5 * (mean - 0.25), rtol=1e-12)
    noise = jax.random.normal(jax.random.fold_in(key, 1), mean.shape)
    drawn = to_latents(vae, images, noise)
    np.testing.assert_allclose(drawn, 0.5 * (mean + np.exp(0.5 * logvar) * noise - 0.25), rtol=1e-12)
    np.testing.assert_allclose(
        from_latents(vae, drawn), jnp.clip(vae_decode(vae, drawn / 0.5 + 0.25), -1, 1), rtol=1e-9
    )
    half = network(SMALL_VAE, "float16")
    assert to_latents(half, images.astype("float16")).dtype == np.float32
    assert from_latents(half, drawn.astype("float16")).dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": 1001}, "num_steps must be at most 1000"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"eta": 0.5}, "eta"),
        ({"method": "rk4"}, "method 'rk4' is not known"),
        ({"guidance": 2.0}, "cannot be guided"),
        ({"size": (8, 0)}, "positive multiples"),
        ({"prompt": "a cat"}, "reads no text"),
        ({"class_label": 1}, "has no classes"),
    ],
)
def test_bad_input_begins_no_run(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate(**({"pipeline": pipeline(PIXEL), "num": 2, "num_steps": 2, "out": tmp_path / "run"} | arguments))
    assert not (tmp_path / "run").exists()


def test_sizes_and_channels_that_do_not_fit_are_refused(tmp_path):
    dit = pipeline(SMALL_DIT, SMALL_VAE)
    with pytest.raises(ValueError, match="15x16: the sides must be positive multiples of 2"):
        generate(dit, 1, 2, tmp_path / "run", size=(15, 16))
    with pytest.raises(ValueError, match="square"):
        generate(dit, 1, 2, tmp_path / "run", size=(8, 16))
    with pytest.raises(ValueError, match="samples of 4 channels are no pictures"):
        generate(dit._replace(vae=None), 1, 2, tmp_path / "run")
    with pytest.raises(ValueError, match="no text encoder"):
        generate(pipeline(LATENT, SMALL_VAE), 1, 2, tmp_path / "run")
    with pytest.raises(ValueError, match="needs a class label"):
        generate(pipeline(CLASSES), 1, 2, tmp_path / "run")
    with pytest.raises(ValueError, match="no null class"):
        generate(pipeline(CLASSES), 1, 2, tmp_path / "run", class_label=1, guidance=2.0)
    assert not (tmp_path / "run").exists()


def test_pictures_hold_what_the_arrays_hold(tmp_path):
    generate(pipeline(PIXEL), 5, 2, tmp_path, batch_size=5, size=(8, 16))
    files = write_pictures(tmp_path)
    assert [file.name for file in files] == [*(f"0000{i}.png" for i in range(5)), "sheet.png", "samples.npz"]
    with np.load(tmp_path / "samples.npz") as stored:
        images = stored["images"]
    assert images.shape == (5, 3, 8, 16)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "images" / f"0000{i}.png") as picture:
            # A byte is 2/255 wide.
            np.testing.assert_allclose(np.asarray(picture) / 127.5 - 1, image.transpose(1, 2, 0), atol=1.01 / 255)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * (96 + 2) + 2, 2 * (48 + 2) + 2)


def test_bytes_go_from_black_to_white():
    ends = np.array([-1.5, -1, -0.999, 0, 0.999, 1, 1.5]).reshape(1, 1, 1, 7)
    np.testing.assert_array_equal(to_bytes(ends).ravel(), [0, 0, 0, 128, 255, 255, 255])


def test_a_sheet_shows_every_picture_in_its_place():
    pictures = np.random.RandomState(0).randint(0, 200, (7, 64, 80, 3)).astype(np.uint8)
    sheet = contact_sheet(pictures)
    assert sheet.shape == (3 * 66 + 2, 3 * 82 + 2, 3)
    for i in range(7):
        row, column = divmod(i, 3)
        tile = sheet[2 + 66 * row : 66 * (row + 1), 2 + 82 * column : 82 * (column + 1)]
        np.testing.assert_array_equal(tile, pictures[i])
    assert np.all(sheet[-66:-2, -82:] == 255)
    assert np.all(sheet[:2] == 255)


def test_sheets_enlarge_the_tiny_and_shrink_the_large():
    checks = (255 * (np.indices((3, 3)).sum(0) % 2)).astype(np.uint8)[None, :, :, None]
    sheet = contact_sheet(checks)
    assert sheet.shape == (32 * 3 + 4, 32 * 3 + 4, 1)
    np.testing.assert_array_equal(sheet[2:-2:32, 2:-2:32], checks[0])
    large = contact_sheet(np.broadcast_to(np.uint8(7), (100, 512, 256, 3)))
    assert max(large.shape) <= SHEET + 2
    assert large.shape[0] > SHEET // 2
    many = contact_sheet(np.zeros((2500, 8, 8, 1), np.uint8))
    assert max(many.shape) <= SHEET + 2


def test_labels_stand_beside_the_pictures_not_over_them():
    pictures = np.random.RandomState(0).randint(0, 100, (6, 96, 96, 1)).astype(np.uint8)
    plain = contact_sheet(pictures, 3)
    sheet = contact_sheet(
        pictures, 3, row_labels=["n 10, seed 0", "n 30"], column_labels=["noisy", "denoised", "m" * 99]
    )
    head, room = np.subtract(sheet.shape, plain.shape)[:2]
    np.testing.assert_array_equal(sheet[head:, room:], plain)
    # Black on white, within the margin above each column and left of each row.
    for column in range(3):
        above = sheet[:head, room + 98 * column : room + 98 * (column + 1)]
        assert above.min() < 50
        assert np.all(sheet[:head, room + 98 * column] == 255)
    for row in range(2):
        assert sheet[head + 98 * row : head + 98 * (row + 1), :room].min() < 50
    with pytest.raises(ValueError, match="2 row labels for 3 rows"):
        contact_sheet(pictures, 2, row_labels=["a", "b"])


def test_what_is_not_finite_is_a_checkerboard():
    images = np.full((1, 1, 2, 2), np.nan)
    np.testing.assert_array_equal(to_bytes(images)[0, :, :, 0], [[255, 0], [0, 255]])
    images[0, 0, 0, 0] = np.inf
    images[0, 0, 0, 1] = 0.0
    np.testing.assert_array_equal(to_bytes(images)[0, :, :, 0], [[255, 128], [0, 255]])
