"""Codes against one image at a time by hand, batching, pools, limits of the noise, costs, refusals, runs on disk."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from PIL import Image
from pipelines import CASES, CLASSES, DDIM, DDPM, LATENT, PIXEL, SMALL_DIT, SMALL_VAE, save_pictures

from scaling.bridge import identity as runs
from scaling.bridge.loading import Pipeline
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import from_config
from scaling.measures import codes as representation
from scaling.measures.codes import codes, encode_batch, extract, pooled, read_images
from scaling.models.model import Condition, vae_encode
from sims import store
from sims.data import readers

SCHEDULE = from_config(DDIM)
MID, LATE = "mid_block", "up_blocks.0.resnets.1.nonlinearity"
KINDS = {
    "pixel": (PIXEL, MID),
    "classes": (CLASSES, LATE),
    "latent": (LATENT, LATE),
    "dit": (SMALL_DIT, "transformer_blocks.1"),
}


def setting(kind, key, count=5, dtype="float64"):
    """A network, images, an autoencoder or None, and a condition for each image."""
    model = network(KINDS[kind][0], dtype)
    latent = kind in ("latent", "dit")
    images = jnp.tanh(jax.random.normal(key, (count, 3, 16, 16) if latent else (count, 3, 8, 8), dtype))
    vae = network(SMALL_VAE, dtype) if latent else None
    if kind == "latent":
        condition = Condition(jax.random.normal(jax.random.fold_in(key, 1), (count, 4, 48), dtype))
    else:
        condition = Condition(class_labels=jnp.arange(count) % 3) if kind != "pixel" else None
    return model, images, vae, condition


def by_hand(key, model, image, i, t, tap, vae, condition, latent):
    """The activation (1, ...) of image i alone, from the formulas."""
    z = image[None]
    if vae is not None:
        mean, logvar = vae_encode(vae, z)
        noise = noise_at(key, i, 1, mean.shape[1:], mean.dtype)[None]
        z = (mean + (latent == "sample") * np.exp(0.5 * np.asarray(logvar)) * noise) * 0.18215
    alpha_bar = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[: t + 1] ** 2)
    z = np.sqrt(alpha_bar) * z + np.sqrt(1 - alpha_bar) * noise_at(key, i, 0, z.shape[1:], z.dtype)[None]
    given = jax.tree.map(lambda part: part[i : i + 1], condition or Condition())
    return np.asarray(model.apply(model.params, z, t, **given._asdict(), capture=(tap,))[1][tap])


@pytest.mark.parametrize(
    ("kind", "latent"),
    [
        ("pixel", "mean"),
        ("classes", "mean"),
        ("latent", "mean"),
        pytest.param("latent", "sample", marks=pytest.mark.slow),
        ("dit", "mean"),
    ],
)
def test_codes_are_the_pooled_activations_of_each_image_alone(kind, latent, key):
    model, images, vae, condition = setting(kind, key)
    tap, run_key = KINDS[kind][1], jax.random.fold_in(key, 7)
    found = codes(
        run_key, model, SCHEDULE, images, [tap], 300, vae=vae, condition=condition, latent=latent, batch_size=2
    )[tap]
    for i in range(5):
        activation = by_hand(run_key, model, images[i], i, 300, tap, vae, condition, latent)
        expected = activation.max(axis=1 if kind == "dit" else (2, 3))[0]
        # float64; only the order of sums differs, and sinusoids are float32 in both.
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-10)
    assert found.shape[0] == 5


def test_codes_do_not_depend_on_batching_and_images_may_be_cut_anywhere(key):
    model, images, _, condition = setting("classes", key, 7)
    run = functools.partial(codes, key, model, SCHEDULE, taps=[MID, LATE], timestep=50, batch_size=3)
    whole = run(images, condition=condition, batch_size=100)
    for size in (1, 3):
        again = run(np.asarray(images), condition=condition, batch_size=size)
        for name in whole:
            np.testing.assert_allclose(again[name], whole[name], rtol=1e-11, atol=1e-12)
    rest = Condition(class_labels=condition.class_labels[4:])
    np.testing.assert_allclose(run(images[4:], condition=rest, first=4)[MID], whole[MID][4:], rtol=1e-11, atol=1e-12)
    # Numbers, not places, decide the noise.
    assert np.max(np.abs(run(images[4:], condition=rest)[MID] - whole[MID][4:])) > 1e-2


def test_one_condition_serves_all_images(key):
    model, images, _, _ = setting("classes", key)
    one, each = Condition(class_labels=jnp.array([2])), Condition(class_labels=jnp.full(5, 2))
    run = functools.partial(codes, key, model, SCHEDULE, images, [MID], 50, batch_size=2)
    np.testing.assert_array_equal(run(condition=one)[MID], run(condition=each)[MID])
    assert np.max(np.abs(run(condition=one)[MID] - run(condition=Condition(class_labels=jnp.array([1])))[MID])) > 1e-3


def test_pools_are_of_the_same_activation(key):
    x = np.asarray(jax.random.normal(key, (2, 3, 4, 5)))
    np.testing.assert_array_equal(pooled(jnp.asarray(x), "max"), x.reshape(2, 3, -1).max(-1))
    np.testing.assert_allclose(pooled(jnp.asarray(x), "mean"), x.reshape(2, 3, -1).mean(-1), rtol=1e-12)
    np.testing.assert_array_equal(pooled(jnp.asarray(x), "none"), x)
    tokens = x[..., 0]
    np.testing.assert_array_equal(pooled(jnp.asarray(tokens), "max"), tokens.max(1))
    for pool in ("max", "mean", "none"):
        np.testing.assert_array_equal(pooled(jnp.asarray(tokens[..., 0]), pool), tokens[..., 0])


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_codes_are_pools_of_what_none_returns(pool, key):
    model, images, _, _ = setting("pixel", key)
    run = functools.partial(codes, key, model, SCHEDULE, images, [MID, "time_embedding"], 50)
    whole, short = run(pool="none"), run(pool=pool)
    assert whole[MID].shape == (5, 8, 8, 8)
    np.testing.assert_allclose(short[MID], getattr(whole[MID], pool)(axis=(2, 3)), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(short["time_embedding"], whole["time_embedding"])


def test_the_noise_runs_from_none_to_nothing_else(key):
    model, images, _, _ = setting("pixel", key)
    betas = [1e-14, 1 - 1e-14]
    schedule = from_config(DDPM | {"trained_betas": betas, "num_train_timesteps": 2})
    run = functools.partial(codes, key, model, schedule, taps=["conv_in"], pool="none")
    clean = model.apply(model.params, images, 0, capture=("conv_in",))[1]["conv_in"]
    # The noise left has relative size 1e-7 at either end.
    np.testing.assert_allclose(run(images, timestep=0)["conv_in"], clean, atol=1e-5)
    np.testing.assert_allclose(
        run(images, timestep=1)["conv_in"], run(jnp.zeros_like(images), timestep=1)["conv_in"], atol=1e-5
    )
    assert np.max(np.abs(run(images, timestep=1)["conv_in"] - clean)) > 0.1


def test_the_noise_is_standard_and_apart_for_every_image():
    model = network(PIXEL | {"sample_size": 32}, "float64")
    schedule = from_config(DDPM | {"trained_betas": [1e-14, 1 - 1e-14], "num_train_timesteps": 2})
    images = jnp.zeros((8, 3, 32, 32))
    # conv_in is linear: its covariance over positions is that of the noise, seen through the kernel.
    seen = codes(jax.random.key(0), model, schedule, images, ["conv_in"], 1, pool="none")["conv_in"]
    bias = np.asarray(model.params["conv_in.bias"])[None, :, None, None]
    inner = (seen - bias)[..., 1:-1, 1:-1]
    power = np.sum(np.square(np.asarray(model.params["conv_in.weight"], np.float64)), axis=(0, 1, 2))
    draws = inner.shape[0] * inner.shape[2] * inner.shape[3]
    # Neighbors share noise: at most 9 positions are dependent, so the variance's error is below 3 sqrt(2 / draws).
    np.testing.assert_allclose(np.mean(inner**2, axis=(0, 2, 3)) / power, 1, atol=5 * 3 * np.sqrt(2 / draws))
    flat = inner.reshape(8, -1)
    cosines = flat @ flat.T / np.linalg.norm(flat, axis=1) ** 2
    assert np.max(np.abs(cosines - np.eye(8))) < 0.2


@pytest.mark.slow
def test_an_early_tap_computes_less(key):
    model, images, _, _ = setting("pixel", key, 2, "float32")
    items, t = jnp.arange(2, dtype=jnp.int32), jnp.int32(50)

    def operations(*taps):
        compiled = jax.jit(lambda x: encode_batch(key, model, SCHEDULE, x, items, t, taps)).lower(images).compile()
        return compiled.cost_analysis()["flops"]

    early, late, last = operations("conv_in"), operations(LATE), operations("conv_out")
    # Beyond the convolution, 3·8·9 multiplications and additions at 64 pixels, only the noise: 3 numbers a pixel.
    assert early < 2 * 64 * (2 * 3 * 8 * 9 + 3 * 300)
    assert early < 0.25 * late
    assert late < 0.95 * last
    assert operations("conv_in", LATE) < 1.05 * late


@pytest.mark.slow
def test_one_compilation_for_all_keys_timesteps_and_conditions(key):
    model, images, vae, condition = setting("latent", key, 5, "float32")
    run = functools.partial(codes, model=model, schedule=SCHEDULE, images=images, taps=[MID], vae=vae, batch_size=2)
    run(key, timestep=3, condition=condition)
    compiled = representation._encode._cache_size()
    for t in (4, 999):
        run(jax.random.fold_in(key, t), timestep=t, condition=Condition(2 * condition.context))
    other = dataclasses.replace(model, params=jax.tree.map(lambda p: 2 * p, model.params))
    run(key, model=other, timestep=3, condition=condition)
    assert representation._encode._cache_size() == compiled


@pytest.mark.slow
def test_half_precision_gives_float32_codes(key):
    model, images, _, _ = setting("pixel", key, dtype="float32")
    exact = codes(key, model, SCHEDULE, images, [MID], 50, pool="mean")[MID]
    for dtype in ("bfloat16", "float16"):
        found = codes(key, network(PIXEL, dtype), SCHEDULE, images, [MID], 50, pool="mean")[MID]
        assert found.dtype == np.float32
        # Hundreds of roundings of relative size ε in random directions.
        assert np.max(np.abs(found - exact)) < 30 * float(jnp.finfo(dtype).eps) * np.max(np.abs(exact))


@pytest.mark.slow
def test_it_is_differentiable_and_lowers_for_accelerators(key):
    model, images, vae, condition = setting("latent", key, 2)
    items, t = jnp.arange(2, dtype=jnp.int32), jnp.int32(50)

    def total(images):
        more = {"vae": vae, "condition": condition, "pool": "mean", "latent": "sample"}
        codes = encode_batch(key, model, SCHEDULE, images, items, t, (MID,), **more)
        return jnp.sum(codes[MID])

    direction = jax.random.normal(jax.random.fold_in(key, 5), images.shape)
    slope = jnp.vdot(jax.jit(jax.grad(total))(images), direction)
    forward, step = jax.jit(total), 1e-4
    differences = (forward(images + step * direction) - forward(images - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, differences, rtol=1e-5)
    jax.jit(total).trace(images).lower(lowering_platforms=("tpu", "cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": ["mid_blok"]}, r"no tap named 'mid_blok'.*'mid_block'"),
        ({"taps": "mid_block"}, "taps must be a list"),
        ({"taps": []}, "taps must be a list"),
        ({"timestep": 1000}, "timestep must be at most 999"),
        ({"timestep": -1}, "timestep must be at least 0"),
        ({"timestep": 1.5}, "timestep must be an integer"),
        ({"pool": "median"}, "pool must be one of max, mean, none"),
        ({"latent": "mode"}, "latent must be one of mean, sample"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"images": np.zeros((0, 3, 8, 8))}, "there are no images"),
        ({"images": np.full((2, 3, 8, 8), 255.0)}, r"run from 255 to 255, .*\[-1, 1\]: .*images / 127\.5 - 1"),
        ({"images": np.arange(384.0).reshape(2, 3, 8, 8) / 24}, r"run from 0 to 15\.9583, .*images / 8 - 1"),
        ({"images": np.full((2, 3, 8, 8), -20.0)}, r"run from -20 to -20, .*images / 20\."),
        ({"images": np.full((2, 3, 8, 8), 255)}, r"or bytes \(uint8\) from 0 to 255; got int64"),
        ({"images": np.zeros((2, 4, 8, 8))}, r"takes images \(B, 3, H, W\)"),
        ({"condition": Condition(class_labels=jnp.zeros(3, int))}, "batch axis of size 2 or 1"),
        ({"condition": Condition(class_labels=jnp.zeros(2, int))}, "no classes"),
    ],
)
def test_bad_input_is_refused(change, message, key, monkeypatch):
    arguments = {"images": np.zeros((2, 3, 8, 8)), "taps": [MID], "timestep": 50} | change
    # Without the suite's type checks, as users run it.
    plain, encoder = (getattr(f, "__wrapped__", f) for f in (codes, representation._encoder))
    monkeypatch.setattr(representation, "_encoder", encoder)
    with pytest.raises(ValueError, match=message):
        plain(key, network(PIXEL, "float64"), SCHEDULE, **arguments)


def pipeline(kind, dtype="float32"):
    latent = kind in ("latent", "dit")
    vae = network(SMALL_VAE, dtype) if latent else None
    return Pipeline(network(KINDS[kind][0], dtype), SCHEDULE, vae, (), (), {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("pictures"), 7)


def test_a_folder_is_resized_to_the_models_own_size(pictures):
    source = read_images(str(pictures), pipeline("pixel"))
    assert source.image_shape == (8, 8, 3)
    assert read_images(str(pictures), pipeline("dit")).image_shape == (16, 16, 3)
    assert read_images(f"images:{pictures}?resize=12", pipeline("dit")).image_shape == (12, 12, 3)
    gray = Pipeline(network(PIXEL | {"in_channels": 1, "out_channels": 1}), SCHEDULE, None, (), (), {})
    assert read_images(str(pictures), gray).image_shape == (8, 8, 1)


def test_gray_images_are_given_to_colored_models_and_values_span_minus_one_to_one(tmp_path):
    values = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    np.savez(tmp_path / "gray.npz", images=values)
    source = read_images(str(tmp_path / "gray.npz"), pipeline("pixel"))
    shown = representation.pictures(source, np.array([1, 0], np.int32), 3)
    np.testing.assert_allclose(shown, np.repeat(values[::-1, None] / 127.5 - 1, 3, axis=1), atol=1e-6)
    np.savez(tmp_path / "float.npz", images=np.linspace(-1, 1, 2 * 3 * 8 * 9, dtype=np.float32).reshape(2, 3, 8, 9))
    stored = read_images(str(tmp_path / "float.npz"), pipeline("pixel"))
    given = representation.pictures(stored, np.array([0, 1], np.int32), 3)
    np.testing.assert_allclose(given, np.load(tmp_path / "float.npz")["images"], atol=1e-6)


def test_unsuited_images_are_refused(tmp_path, pictures):
    np.savez(tmp_path / "rows.npz", data=np.zeros((3, 7), np.uint8))
    np.savez(tmp_path / "two.npz", images=np.zeros((3, 8, 8, 2), np.uint8))
    with pytest.raises(ValueError, match="7 numbers, not images"):
        read_images(str(tmp_path / "rows.npz"), pipeline("pixel"))
    with pytest.raises(ValueError, match="have 2 channels and the network takes 3"):
        read_images(str(tmp_path / "two.npz"), pipeline("pixel"))
    with pytest.raises(ValueError, match=r"have 3 channels and the network takes 4\..*autoencoder"):
        read_images(str(pictures), pipeline("latent")._replace(vae=None))
    with pytest.raises(ValueError, match="there is no"):
        read_images(str(tmp_path / "missing"), pipeline("pixel"))


def test_bytes_are_scaled_by_their_type(key):
    model, images, _, _ = setting("pixel", key, 5)
    pixels = np.asarray(np.round(127.5 * (np.asarray(images) + 1)), np.uint8)
    run = functools.partial(codes, key, model, SCHEDULE, taps=[MID], timestep=50, batch_size=5)
    given = (2 * pixels.astype(np.float32) - 255) / np.float32(255)
    np.testing.assert_array_equal(run(images=pixels)[MID], run(images=given)[MID])
    # As a file of the same bytes is read.
    source = readers.Source(pixels.transpose(0, 2, 3, 1).reshape(5, -1), np.zeros(5, int), (8, 8, 3))
    np.testing.assert_array_equal(representation.pictures(source, np.arange(5, dtype=np.int32), 3), given)


def test_files_whose_values_are_kept_are_checked(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 8, 8) % 256)
    pixel = pipeline("pixel")
    source = read_images(f"{tmp_path / 'x.npy'}?values=keep", pixel)
    with pytest.raises(ValueError, match=r"run from 0 to 255, .*images / 127\.5 - 1"):
        extract(pixel, source, [MID], 50, tmp_path / "run")
    whole = source._replace(rows=source.rows.astype(np.int64))
    with pytest.raises(ValueError, match="run from 0 to 255"):
        extract(pixel, whole, [MID], 50, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_extract_writes_what_codes_returns(pictures, tmp_path):
    dit = pipeline("dit")
    source = read_images(str(pictures), dit)
    seen = []
    extract(
        dit, source, ["transformer_blocks.1"], 50, tmp_path, class_label=2, seed=3, batch_size=3,
        on_batch=lambda done, total: seen.append((done, total)), provenance={"note": "here"},
    )  # fmt: skip
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]
    results = store.load(tmp_path)
    expected = codes(
        jax.random.key(3), dit.network, SCHEDULE, representation.pictures(source, np.arange(7, dtype=np.int32), 3),
        ["transformer_blocks.1"], 50, vae=dit.vae, condition=Condition(class_labels=jnp.array([2])), batch_size=7,
    )  # fmt: skip
    found = results["transformer_blocks.1"]
    np.testing.assert_allclose(found, expected["transformer_blocks.1"], rtol=1e-4, atol=1e-4)
    assert found.dims == ("image", "channel_32")
    np.testing.assert_array_equal(results.label, source.labels)
    assert results.done.all()
    record = store.read_spec(tmp_path)
    assert record["spec"]["class_label"] == 2
    assert record["sessions"][0]["note"] == "here"
    assert record["sessions"][0]["versions"]["jax"] == jax.__version__


def test_a_cut_run_goes_on_and_equals_an_uncut_one(pictures, tmp_path):
    pixel = pipeline("pixel")
    source = read_images(str(pictures), pixel)
    run = functools.partial(extract, pixel, source, [MID, LATE], 50, pool="none")

    def cut(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batch_size=2, on_batch=cut)
    kept = store.load(tmp_path / "cut")
    np.testing.assert_array_equal(kept.done, [True] * 4 + [False] * 3)
    seen = []
    # Another size of batches: the run keeps its own.
    run(tmp_path / "cut", batch_size=3, on_batch=lambda done, total: seen.append(done))
    assert seen == [4, 6, 7]
    run(tmp_path / "whole", batch_size=2)
    for name in (MID, LATE):
        np.testing.assert_array_equal(store.load(tmp_path / "cut")[name], store.load(tmp_path / "whole")[name])
    assert store.load(tmp_path / "whole")[MID].dims == ("image", "channel_8", "height_8", "width_8")
    assert [session["chunks"] for session in store.read_spec(tmp_path / "cut")["sessions"]] == [2, 2]


def test_codes_have_the_names_of_their_files(pictures, tmp_path):
    pixel = pipeline("pixel")
    source = read_images(str(pictures), pixel)
    files = sorted(file.relative_to(pictures).as_posix() for file in pictures.rglob("*.png"))
    run = functools.partial(extract, pixel, timestep=50, taps=[MID], batch_size=4)
    run(images=source, out=tmp_path / "named")
    assert store.load(tmp_path / "named").name.values.tolist() == files
    # A run that was begun without names goes on without them.
    seen = []

    def cut(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images=source._replace(names=()), out=tmp_path / "old", on_batch=cut)
    run(images=source, out=tmp_path / "old", on_batch=lambda done, total: seen.append(done))
    assert seen == [4, 7]
    assert "name" not in store.load(tmp_path / "old").coords
    for names in ((*source.names[:-1], "other.png"), ()):
        with pytest.raises(ValueError, match="images with other names: '.*Choose another folder"):
            run(images=source._replace(names=names), out=tmp_path / "named")
    run(images=source._replace(names=(*source.names[:-1], "\udcff.png")), out=tmp_path / "odd")
    assert store.load(tmp_path / "odd").name.values[-1] == r"\udcff.png"


def test_folders_have_the_networks_channels_unless_told(pictures, tmp_path):
    gray = Pipeline(network(PIXEL | {"in_channels": 1, "out_channels": 1}), SCHEDULE, None, (), (), {})
    for i in range(3):
        Image.new("L", (9, 9), i).save(tmp_path / f"{i}.png")
    assert read_images(str(tmp_path), pipeline("pixel")).image_shape == (8, 8, 1)
    Image.new("RGB", (9, 9)).save(tmp_path / "3.png")
    # Most are gray, and the network sees colors.
    assert read_images(str(tmp_path), pipeline("pixel")).image_shape == (8, 8, 3)
    assert read_images(str(tmp_path), pipeline("pixel"), color="gray").image_shape == (8, 8, 1)
    assert read_images(f"images:{tmp_path}?color=gray", pipeline("pixel")).image_shape == (9, 9, 1)
    assert read_images(str(tmp_path), gray).image_shape == (8, 8, 1)
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be used: .*4\.png is damaged"):
        read_images(str(tmp_path), gray)
    assert len(read_images(str(tmp_path), gray, skip_bad=True).rows) == 4
    with pytest.raises(ValueError, match="digits is no folder of images"):
        read_images("digits", gray, skip_bad=True)


def test_another_run_in_the_folder_is_refused_by_what_differs(pictures, tmp_path):
    pixel = pipeline("pixel")
    source = read_images(str(pictures), pixel)
    extract(pixel, source, [MID], 50, tmp_path)
    before = (tmp_path / "spec.json").read_bytes()
    scaled = dataclasses.replace(pixel.network, params=jax.tree.map(lambda p: 2 * p, pixel.network.params))
    rows = source._replace(rows=255 - source.rows)
    cases = [
        ("timestep is 50 there and 51 here", (pixel, source, [MID], 51), {}),
        ("pool is", (pixel, source, [MID], 50), {"pool": "mean"}),
        ("taps is", (pixel, source, [LATE], 50), {}),
        ("seed is 0 there and 1 here", (pixel, source, [MID], 50), {"seed": 1}),
        ("model.network.digest is", (pixel._replace(network=scaled), source, [MID], 50), {}),
        ("model.scheduler.beta_end", (pixel._replace(schedule=from_config(DDPM)), source, [MID], 50), {}),
        ("images.digest is", (pixel, rows, [MID], 50), {}),
        ("images.values is", (pixel, source._replace(span=(0.0, 256.0)), [MID], 50), {}),
    ]
    for message, arguments, more in cases:
        with pytest.raises(ValueError, match=message):
            extract(*arguments, tmp_path, **more)
    assert (tmp_path / "spec.json").read_bytes() == before
    # The same again computes nothing.
    seen = []
    extract(pixel, source, [MID], 50, tmp_path, prompt="", batch_size=1, on_batch=lambda *where: seen.append(where))
    assert seen == [(7, 7)]


def test_what_cannot_be_computed_begins_no_run(pictures, tmp_path):
    latent = pipeline("latent")
    source = read_images(str(pictures), latent)
    with pytest.raises(ValueError, match="no text encoder"):
        extract(latent, source, [MID], 50, tmp_path / "run")
    pixel = pipeline("pixel")
    with pytest.raises(ValueError, match="no tap named"):
        extract(pixel, read_images(str(pictures), pixel), ["nowhere"], 50, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tap_without_an_axis_of_images_is_refused(key):
    case = CASES["sdxl_unet"]
    model, x = network(case.config), jnp.asarray(case.inputs["x"])
    condition = Condition(jnp.asarray(case.inputs["context"]), None, jax.tree.map(jnp.asarray, case.inputs["added"]))
    with pytest.raises(ValueError, match=r"'add_time_proj' of shape \(12, 16\) has no axis of the 2 images"):
        codes(key, model, SCHEDULE, x, ["add_time_proj"], 50, condition=condition)


def test_checksums_tell_values_shapes_and_dtypes_apart():
    x = np.arange(6, dtype=np.float32)
    same = [x, jnp.asarray(x), np.repeat(x, 2)[::2]]
    assert len({runs.checksum(value) for value in same}) == 1
    others = [x, x.reshape(2, 3), x.astype(np.float64), -x, x[::-1], jnp.asarray(x, "bfloat16")]
    assert len({runs.checksum(value) for value in others}) == len(others)


def test_sources_are_json_of_the_identity(pictures):
    identity = runs.identify(pipeline("dit"))
    assert set(identity) == {"network", "vae", "scheduler"}
    assert identity["network"]["architecture"] == "dit"
    assert json.loads(json.dumps(identity)) == identity
    assert isinstance(read_images(str(pictures), pipeline("dit")), readers.Source)
    with Image.open(pictures / "0.png") as picture:
        assert picture.size == (20, 20)
