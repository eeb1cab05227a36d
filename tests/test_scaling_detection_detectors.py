"""The table of detectors: answers known in closed form through the interface of networks, and on trained models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling import zoo
from scaling.bridge.conditioning import condition_on, null_condition
from scaling.detection import detectors
from scaling.detection.detectors import DETECTORS, DetectionSetting, Detector, applicable, score_batch
from scaling.detection.options import NAMES
from scaling.detection.probes import Batch, neuron_layers, neurons, usual_neurons
from scaling.diffusion import schedules
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import timestep_to_sigma
from scaling.measures.codes import codes
from scaling.models.model import Apply, Condition, Model

SCHEDULE = schedules.from_config({"_class_name": "DDIMScheduler", "clip_sample": False})
SHAPE = (1, 4, 4)
VARIANCES = np.linspace(0.0, 2.0, 16).reshape(SHAPE).astype(np.float32)


class Exact(Apply):
    """The exact noise prediction for Gaussian data of mean m + context and variances ``config`` times VARIANCES."""

    def inputs(self, dtype: Any) -> tuple[Any, Any]:
        context = jax.ShapeDtypeStruct((1, 1, 16), dtype)
        return (jax.ShapeDtypeStruct((1, *SHAPE), dtype), jax.ShapeDtypeStruct((1,), dtype)), {"context": context}

    def __call__(self, params, x, t, *, context=None, capture=(), **others):
        del others
        sigma = timestep_to_sigma(SCHEDULE, jnp.asarray(t, jnp.float32))
        sigma = jnp.broadcast_to(sigma, (len(x),))[:, None, None, None]
        alpha = 1 / jnp.sqrt(1 + sigma**2)
        mean = params["mean"][None] + (0 if context is None else context.reshape(-1, *SHAPE))
        noise = sigma * alpha
        out = noise * (x - alpha * mean) / (alpha**2 * self.config * VARIANCES[None] + noise**2)
        return out, dict.fromkeys(capture, out)


MEAN = np.linspace(-0.5, 0.5, 16).reshape(SHAPE).astype(np.float32)
PULL = np.linspace(0.1, 0.9, 16).astype(np.float32)


def exact_batch(images=None, *, items=3, pull=PULL, scale=1.0):
    network = Model(None, {"mean": jnp.asarray(MEAN)}, Exact("exact", scale), "{}")
    contexts = [jnp.asarray(each).reshape(1, 1, 16) for each in (pull, np.zeros(16, np.float32))]
    images = None if images is None else jnp.asarray(images)
    return Batch(network, SCHEDULE, jnp.arange(items), images, *(Condition(context=c) for c in contexts))


def quantity(name, batch, setting):
    return DETECTORS[name].sign * score_batch(jax.random.key(0), batch, [DETECTORS[name]], setting)[name]


def test_the_table_has_the_names_of_the_options():
    assert tuple(DETECTORS) == NAMES
    for detector in DETECTORS.values():
        assert detector.sign in (-1, 1)
        assert detector.passes(DetectionSetting()) >= 1
        assert {*detector.needs} <= {"image", "prompt", "derivative", "path", "ordinary prompts"}


def test_intrinsic_dimension_of_a_gaussian():
    """The trace of a diagonal Jacobian is exact from random signs: Σ s/(s + v) + v (x − m)²/(s + v)²."""
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    setting = DetectionSetting(dimension_sigma=0.7, probes=2)
    found = quantity("intrinsic_dimension", exact_batch(images), setting)
    v, apart = np.float64(0.7) ** 2, images.astype(float) - MEAN
    expected = np.sum(VARIANCES / (VARIANCES + v) + v * apart**2 / (VARIANCES + v) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    exact = dataclasses.replace(setting, probes=16)
    assert DETECTORS["intrinsic_dimension"].passes(exact) == 33
    np.testing.assert_allclose(quantity("intrinsic_dimension", exact_batch(images), exact), expected, rtol=2e-3)


def test_denoising_error_of_a_gaussian():
    r"""At the mean the error is Σ (s/(s + σ²))² σ² + ..., estimated; the least is relative to σ²d."""
    images = np.broadcast_to(MEAN, (3, *SHAPE))
    setting = DetectionSetting(sigmas=(0.5, 1.0), draws=400)
    errors = quantity("error", exact_batch(images), setting)
    for k, sigma in enumerate(setting.sigmas):
        # D(m + σε) − m = s/(s + σ²) σ ε at the mean.
        shares = (VARIANCES.astype(float) / (VARIANCES + sigma**2)) ** 2 * sigma**2
        spread = np.sqrt(2 * np.sum(shares**2) / 400)
        assert np.all(np.abs(errors[:, k] - shares.sum()) < 5 * spread)
    least = quantity("error_min", exact_batch(images), setting)
    np.testing.assert_allclose(least, np.min(errors / (np.array([0.25, 1.0]) * 16), axis=1), rtol=1e-5)


def test_scores_of_prompts_for_two_gaussians():
    """Equal covariances: the pull is the same everywhere, so it has no curvature."""
    setting = DetectionSetting(noises=2)
    batch = exact_batch()
    t = 0.981 * SCHEDULE.num_train_timesteps
    sigma = float(timestep_to_sigma(SCHEDULE, jnp.float32(int(t))))
    alpha = 1 / np.sqrt(1 + sigma**2)
    noise = sigma * alpha
    pull = noise * alpha * PULL.reshape(SHAPE) / (alpha**2 * VARIANCES + noise**2)
    found = quantity("guidance_difference", batch, setting)
    np.testing.assert_allclose(found, np.linalg.norm(pull), rtol=1e-3)
    np.testing.assert_allclose(quantity("sharpness", batch, setting), 0, atol=1e-6)
    # One channel: a cosine is a sign, and the pull is against the mean everywhere.
    x = np.stack([[noise_at(jax.random.key(0), i, k, SHAPE, jnp.float32) for k in (0, 1)] for i in range(3)])
    sigma = float(timestep_to_sigma(SCHEDULE, jnp.float32(41)))
    signs = np.sign(-(x - MEAN / np.sqrt(1 + sigma**2))).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(quantity("anisotropy", batch, setting), 2 * signs + found, rtol=1e-3)


def test_a_prompt_that_changes_nothing_has_no_pull():
    setting = DetectionSetting(steps=3)
    batch = exact_batch(pull=np.zeros(16, np.float32))
    for name in ("guidance_difference", "sharpness", "anisotropy", "guidance_difference_mean"):
        np.testing.assert_array_equal(quantity(name, batch, setting), 0)


def test_repeated_samples_of_a_point_are_equal_and_of_a_gaussian_are_not():
    setting = DetectionSetting(steps=6, generations=3, guidance=1.0, tiles=2)
    point = quantity("repeats_nearest", exact_batch(scale=1e-6), setting)
    wide, mean = (quantity(name, exact_batch(), setting) for name in ("repeats_nearest", "repeats_mean"))
    assert np.all(point < 0.01)
    assert np.all(wide > 0.1)
    assert np.all(mean >= wide)
    # All three samples of the point are alike, less their mean distance; none of the wide Gaussian's.
    np.testing.assert_allclose(quantity("repeats_clique", exact_batch(scale=1e-6), setting), 3, atol=0.01)
    strict = dataclasses.replace(setting, clique=0.1)
    np.testing.assert_array_equal(quantity("repeats_clique", exact_batch(), strict), 1)


class Drifting(Exact):
    """Predicts ``config`` times its input plus the context."""

    def __call__(self, params, x, t, *, context=None, capture=(), **others):
        del params, t, others
        return self.config * x + context.reshape(-1, *SHAPE), dict.fromkeys(capture, x)


def test_noises_that_a_prompt_changes_alike_are_equal():
    """With ε(x) = x + g all changes are g; with ε(x) = 2 x + g they are x + g, and no two are alike."""
    setting, batch = DetectionSetting(starts=4), exact_batch()
    for gain, alike in ((1.0, True), (2.0, False)):
        drifting = batch.replace(network=Model(None, {}, Drifting("drifting", gain), "{}"))
        found = quantity("noise_similarity", drifting, setting)
        assert np.all(np.abs(found - 1) < 1e-4) if alike else np.all(found < 0.9)


def standardized(values, usual):
    mean, spread = (np.asarray(part) for part in usual)
    return (np.asarray(values) - mean) / spread


def test_neurons_are_compared_with_those_of_ordinary_prompts():
    """Activities are mean absolute products of the weights with the prompt; over the ordinary prompts z-scores have
    mean 0 and standard deviation 1."""
    pipeline = zoo.load("captioned-digits")
    texts = ["the amber bridge", "the brittle castle", "a picture of two", "a picture of seven", "the crimson anchor"]
    contexts = jnp.concatenate([condition_on(pipeline, text).context for text in texts])
    ordinary = Condition(context=contexts)
    network, layers = pipeline.network, neuron_layers(pipeline.network)
    assert layers[0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    assert layers[-1] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    found = neurons(network, ordinary)
    weight = np.asarray(network.params[f"{layers[0]}.weight"], float)
    slow = np.abs(np.asarray(contexts, float) @ weight).mean(axis=1)
    np.testing.assert_allclose(found[layers[0]], slow, rtol=1e-4)
    usual = usual_neurons(network, ordinary, batch_size=2)
    for name in layers:
        z = standardized(found[name], usual[name])
        np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(z.std(axis=0, ddof=1), 1, rtol=1e-3)
    batch = Batch(network, pipeline.schedule, jnp.arange(5), None, ordinary, null_condition(pipeline), None, usual)
    peak = quantity("neuron_peak", batch, DetectionSetting())
    every = np.concatenate([np.abs(standardized(found[name], usual[name])) for name in layers], axis=1)
    np.testing.assert_allclose(peak, every.max(axis=1), rtol=1e-4)
    # Of n values none lies further from their mean than (n - 1)/√n standard deviations.
    assert np.all(peak <= 4 / np.sqrt(5) + 1e-4)
    counted = quantity("neuron_count", batch, DetectionSetting(outlier=1.0))
    np.testing.assert_array_equal(counted, (every > 1).sum(axis=1))
    names = {detector.name for detector in applicable(pipeline, ordinary=True)}
    assert names == set(NAMES)
    with pytest.raises(ValueError, match="at least two ordinary prompts"):
        usual_neurons(network, Condition(context=contexts[:1]))
    with pytest.raises(ValueError, match=r"no values of cross-attention"):
        usual_neurons(zoo.load("digits-10").network, ordinary)


def test_the_steps_of_a_path_have_a_peak_above_their_mean():
    """k steps have a largest z-score between 0 and (k − 1)/√(k − 1)."""
    found = quantity("update_peak", exact_batch(), DetectionSetting(steps=6))
    assert np.all((found > 0) & (found <= np.sqrt(5) + 1e-5))


@pytest.fixture(scope="module")
def digits():
    pipeline = zoo.load("digits-10")
    setting = detectors.check_setting(DetectionSetting(draws=2, sigmas=(0.5, 1.0)), pipeline.network, 1000)
    return pipeline, setting


def batch_of(pipeline, images, items):
    return Batch(pipeline.network, pipeline.schedule, jnp.asarray(items), jnp.asarray(images), Condition(), Condition())


def test_scores_of_a_network_do_not_depend_on_the_batch_and_equal_slow_ones(digits):
    pipeline, setting = digits
    images = np.random.default_rng(1).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32)
    chosen = [DETECTORS[name] for name in ("std", "error")]
    key = jax.random.key(3)
    whole = score_batch(key, batch_of(pipeline, images, range(4)), chosen, setting)
    for part in (slice(0, 2), slice(2, 4)):
        some = score_batch(key, batch_of(pipeline, images[part], np.arange(4)[part]), chosen, setting)
        for name, values in some.items():
            np.testing.assert_allclose(values, whole[name][part], rtol=1e-4)
    slow = codes(key, pipeline.network, pipeline.schedule, images, setting.taps, setting.timestep)
    expected = np.stack([np.std(np.asarray(slow[tap], float), axis=1) for tap in setting.taps], axis=1)
    np.testing.assert_allclose(whole["std"], expected, rtol=1e-4)
    denoiser = as_denoiser(pipeline.network, pipeline.schedule)
    for j, sigma in enumerate(setting.sigmas):
        own = jax.random.fold_in(jax.random.fold_in(key, 2), j)
        noise = [jax.random.normal(jax.random.fold_in(own, k), SHAPE_OF_DIGITS, jnp.float32) for k in range(2)]
        errors = [
            np.sum((np.asarray(denoiser(jnp.asarray(images[2]) + jnp.float32(sigma) * e, sigma)) - images[2]) ** 2)
            for e in noise
        ]
        assert whole["error"][2, j] == pytest.approx(-np.mean(errors), rel=1e-4)


SHAPE_OF_DIGITS = (1, 8, 8)


def test_what_a_model_supports(digits):
    names = [detector.name for detector in applicable(digits[0])]
    assert names == [name for name in NAMES if "prompt" not in DETECTORS[name].needs]
    assert applicable(digits[0], images=False) == ()
    assert detectors.check_setting(DetectionSetting(probes=0), digits[0].network, 1000).probes == 64
    assert digits[1].taps == ("up_blocks.0.resnets.0", "up_blocks.0.resnets.1")
    assert detectors.default_taps(zoo.load("fashion-dit").network)[0] == "transformer_blocks.0"


def test_a_detector_of_ones_own_is_one_more_row(digits):
    pipeline, setting = digits
    mine = Detector("brightness", lambda key, batch, setting: {"brightness": batch.images.mean((1, 2, 3))}, -1, (), len)
    found = score_batch(jax.random.key(0), batch_of(pipeline, np.ones((2, 1, 8, 8)), range(2)), [mine], setting)
    np.testing.assert_array_equal(found["brightness"], [-1, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws"),
        ({"steps": 1}, "steps"),
        ({"starts": 1}, "starts"),
        ({"clique": 1.5}, "clique must be positive and at most 1"),
        ({"outlier": 0.0}, "outlier"),
        ({"sigmas": ()}, "at least one noise level"),
        ({"sigmas": (0.0,)}, "sigmas"),
        ({"high": 1.0}, "a share of T"),
        ({"timestep": 1000}, "timestep"),
        ({"taps": ("mid_blok",)}, "mid_block"),
    ],
)
def test_settings_out_of_range_are_named(change, message, digits):
    with pytest.raises(ValueError, match=message):
        detectors.check_setting(dataclasses.replace(DetectionSetting(), **change), digits[0].network, 1000)


@pytest.mark.slow
def test_the_empty_prompt_pulls_nowhere_and_a_memorized_one_does():
    """On a trained model that reads text."""
    pipeline = zoo.load("captioned-digits")
    setting, null = DetectionSetting(steps=3), null_condition(pipeline)
    prompts = [condition_on(pipeline, text) for text in ("", "the amber anchor")]
    conditions = jax.tree.map(lambda *parts: jnp.concatenate(parts), *prompts)
    batch = Batch(pipeline.network, pipeline.schedule, jnp.arange(2), None, conditions, null)
    chosen = [DETECTORS[name] for name in ("guidance_difference", "sharpness", "guidance_difference_mean")]
    for name, (empty, memorized) in score_batch(jax.random.key(0), batch, chosen, setting).items():
        assert empty == pytest.approx(0, abs=1e-6), name
        assert memorized > 1e-4, name
