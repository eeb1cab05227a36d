"""Images as unit vectors: of a tap and of CLIP, and those of a training set in a run that resumes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
from cases import parameter
from networks import network
from PIL import Image

import scaling
from scaling import zoo
from scaling.bridge.loading import load_pipeline
from scaling.measures import features
from scaling.measures.codes import encode_batch
from scaling.measures.neighbors import Training, of_array
from scaling.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from scaling.models.config import to_jax
from scaling.models.model import from_config, parse_config
from sims import store

SHAPE = (1, 8, 8)
VISION = pipelines.CASES["clip_vision"].config


@pytest.fixture(scope="module")
def pipeline():
    return zoo.load("digits-10")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "clip"
    scaling.save_pretrained(network(VISION), folder)
    return folder


def network_parameter(name, spec):
    return jnp.asarray(to_jax(spec.kind, parameter(name, spec.shape)), jnp.float32)


def training_of(images, digest="d"):
    return Training(of_array(images), images.shape[1:], str, digest)


def test_a_tap_is_the_mean_of_its_activations_of_unit_length(pipeline, images):
    """As of `encode_batch` with one noise for all; so an image's features are its own in any batch and at any place."""
    found = features.of_source("tap:mid_block", pipeline)
    assert found.identity["timestep"] == features.TIMESTEP
    h = np.asarray(found.encode(jnp.asarray(images)))
    key = jax.random.fold_in(jax.random.key(0), features.FIXED)
    one = encode_batch(
        key, pipeline.network, pipeline.schedule, jnp.asarray(images), jnp.zeros(5, jnp.int32), 50, ("mid_block",),
        pool="mean",
    )["mid_block"]  # fmt: skip
    # float32 through some twenty layers.
    np.testing.assert_allclose(h, one / np.linalg.norm(one, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, atol=1e-6)
    again = np.asarray(found.encode(jnp.asarray(images[::-1].copy())))
    np.testing.assert_allclose(again, h[::-1], atol=1e-5)
    other = np.asarray(features.tap_features(pipeline, "mid_block", seed=1).encode(jnp.asarray(images)))
    assert np.abs(other - h).max() > 1e-3


def test_clip_gives_its_vectors_of_unit_length(vision, images, pipeline):
    """Images are colored, resampled and normalized, then encoded as the network does."""
    found = features.of_source(str(vision), pipeline)
    h = np.asarray(found.encode(jnp.asarray(images)))
    model = scaling.load_model(vision)
    out, _ = model.apply(model.params, features.clip_pixels(jnp.asarray(images), VISION["image_size"]))
    pooled = np.asarray(out.pooled)
    np.testing.assert_allclose(h, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-5)
    assert h.shape == (5, VISION["projection_dim"])
    assert found.identity["clip"]["architecture"] == "clip_vision"


def test_both_halves_of_clip_and_a_pipelines_encoder_serve(vision, images, pipeline, tmp_path):
    """The image half of a whole CLIP has the same names; its weights depend on their names alone."""
    text = pipelines.CASES["sd14_text"].config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": VISION["projection_dim"]}
    config |= {"text_config": {name: text[name] for name in keys}}
    config |= {"vision_config": {name: value for name, value in VISION.items() if name != "architectures"}}
    # A scalar, which `network` cannot draw.
    specs = parse_config(config).parameters() | {"logit_scale": None}
    params = {n: network_parameter(n, spec) for n, spec in specs.items() if spec} | {"logit_scale": jnp.float32(1)}
    scaling.save_pretrained(from_config(config, params), tmp_path / "both")
    shutil.copytree(vision, tmp_path / "pipe" / "image_encoder")
    x = jnp.asarray(images)
    expected = np.asarray(features.clip_features(vision).encode(x))
    np.testing.assert_allclose(features.clip_features(tmp_path / "both").encode(x), expected, atol=1e-6)
    np.testing.assert_allclose(features.clip_features(tmp_path / "pipe").encode(x), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "scaled"), [((30, 40), (14, 18)), ((9, 6), (21, 14)), ((14, 14), (14, 14))])
def test_images_are_prepared_for_clip_as_by_pillow(size, scaled):
    """Pillow rounds to whole gray levels after each axis, 1.25 levels for weights whose sizes sum to 1.5; no value is
    extreme enough to be clipped between the axes, as Pillow does."""
    picture = np.random.default_rng(0).integers(64, 192, (*size, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize(scaled[::-1], Image.Resampling.BICUBIC), float) / 255
    top, left = (scaled[0] - 14) // 2, (scaled[1] - 14) // 2
    expected = expected[top : top + 14, left : left + 14]
    image = jnp.asarray(picture.transpose(2, 0, 1)[None] / 127.5 - 1)
    found = np.asarray(features.clip_pixels(image, 14))[0].transpose(1, 2, 0) * IMAGE_STD + IMAGE_MEAN
    np.testing.assert_allclose(found, expected, atol=1.6 / 255)
    with pytest.raises(ValueError, match="images have 4 channels"):
        features.clip_pixels(jnp.zeros((1, 4, 8, 8)), 14)


def test_features_of_a_training_set_resume_and_mirror_images_follow(pipeline, images, tmp_path):
    """Stopped after the first batch; the second call computes the rest, the third nothing."""
    found, training, calls = features.of_source("tap:mid_block", pipeline), training_of(images), []

    def encode(x):
        if not isinstance(x, jax.core.Tracer):
            calls.append(len(x))
        return found.encode(x)

    counted = found._replace(encode=encode)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done:
            raise Stop

    how = {"mirrors": True, "batch_size": 2}
    with pytest.raises(Stop):
        features.unit_features(training, counted, tmp_path / "run", on_batch=stop, **how)
    assert len(calls) == 2
    whole = features.unit_features(training, counted, tmp_path / "run", **how)
    assert len(calls) == 6
    assert features.unit_features(training, counted, tmp_path / "run", **how).count == 10
    assert len(calls) == 6
    mirrored = features.mirrored(training)
    for block in (
        mirrored.read(0, 10),
        np.concatenate([mirrored.read(0, 4), mirrored.read(4, 7), mirrored.read(7, 10)]),
    ):
        np.testing.assert_array_equal(block[5:].reshape(images.shape), images[..., ::-1])
    expected = np.asarray(found.encode(jnp.asarray(mirrored.read(0, 10).reshape(-1, *SHAPE))))
    np.testing.assert_allclose(whole.read(0, 10), expected, atol=1e-5)
    assert store.read_spec(tmp_path / "run")["spec"]["command"] == "features"
    with pytest.raises(ValueError, match="another experiment"):
        features.unit_features(training_of(images, "e"), counted, tmp_path / "run", **how)


def test_features_that_are_all_zero_stay_so():
    h = features._unit(jnp.asarray([[3e30, 4e30], [0.0, 0.0], [3e-30, 4e-30]], jnp.float32))
    np.testing.assert_allclose(h, [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)


def test_latent_models_are_read_through_their_autoencoder_without_a_prompt(tmp_path):
    pipeline = load_pipeline(pipelines.save_latent(tmp_path / "model"))
    found = features.of_source("tap:mid_block", pipeline)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)), jnp.float32)
    assert found.encode(x).shape == (2, 8)


def test_bad_sources_are_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"no tap named 'mid_blok'; .*mid_block"):
        features.of_source("tap:mid_blok", pipeline)
    with pytest.raises(ValueError, match="'pixel': neither pixels, nor tap:NAME, nor a folder"):
        features.of_source("pixel", pipeline)
    assert features.of_source("pixels", pipeline) is None
    with pytest.raises(ValueError, match=r"no config\.json"):
        features.of_source(str(tmp_path), pipeline)
    (tmp_path / "config.json").write_text(json.dumps(VISION))
    with pytest.raises(ValueError, match=r"safetensors"):
        features.of_source(str(tmp_path), pipeline)
    with pytest.raises(ValueError, match="a unet2d model has no image vectors"):
        features.of_source(str(zoo.folder("digits-10") / "unet"), pipeline)
    with pytest.raises(ValueError, match="timestep must be at most 999"):
        features.tap_features(pipeline, "mid_block", timestep=1000)
    classes = pipelines.save(tmp_path / "classes", {"unet": pipelines.CLASSES}, pipelines.DDPM)
    with pytest.raises(ValueError, match="no null class"):
        features.of_source("tap:mid_block", load_pipeline(classes))
