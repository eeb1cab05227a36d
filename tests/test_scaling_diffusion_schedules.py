"""Schedules: noise tables, what a configuration may say, and timesteps against noise levels."""

import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_side import CLASSES, COSINE, DDPM, STABLE, TRAINED, ZERO_SNR

from scaling.diffusion import scheduler_fields
from scaling.diffusion.denoisers import clean_weights, noise_weights
from scaling.diffusion.schedules import (
    add_noise,
    from_config,
    sigma_to_timestep,
    target,
    timestep_to_sigma,
    with_method,
)

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
EPS = np.finfo(np.float64).eps


def test_signal_power_is_the_product_of_what_every_step_leaves():
    t, betas = 700, np.linspace(1e-4, 0.02, 1000)
    assert from_config(DDPM, "ddim").alpha_bar[t] == pytest.approx(math.prod(1 - betas[: t + 1]), rel=1e-12)
    roots = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
    assert from_config(STABLE, "ddim").alpha_bar[t] == pytest.approx(math.prod(1 - roots[: t + 1] ** 2), rel=1e-12)
    trained = TRAINED["trained_betas"]
    assert from_config(TRAINED, "ddim").alpha_bar[60] == pytest.approx(
        math.prod(1 - b for b in trained[:61]), rel=1e-12
    )


def test_cosine_power_is_a_squared_cosine_until_its_betas_are_capped():
    alpha_bar = from_config(COSINE, "ddim").alpha_bar
    u = (np.arange(201) / 200 + 0.008) / 1.008 * np.pi / 2
    np.testing.assert_allclose(alpha_bar[:-1], (np.cos(u[1:-1]) / np.cos(u[0])) ** 2, rtol=1e-9)
    assert alpha_bar[-1] == pytest.approx(alpha_bar[-2] * (1 - 0.999))


def test_zero_terminal_power():
    before, after = from_config(STABLE, "ddim"), from_config(ZERO_SNR, "ddim")
    assert after.alpha_bar[-1] == 0
    assert after.alpha_bar[0] == pytest.approx(before.alpha_bar[0], rel=1e-14)
    # Roots are shifted and scaled: every second difference keeps its ratio.
    a, b = (np.diff(np.sqrt(s.alpha_bar)) for s in (before, after))
    np.testing.assert_allclose(b / a, b[0] / a[0], rtol=1e-9)
    # Where it would be infinite, the reference's stand-in.
    assert after.sigmas[-1] == pytest.approx(math.sqrt(2**24 - 1))
    power = after.alpha_bar[:-1]
    np.testing.assert_array_equal(after.sigmas[:-1], np.sqrt((1 - power) / power))


@pytest.mark.parametrize("config", [DDPM, STABLE, COSINE, TRAINED, ZERO_SNR])
def test_tables(config):
    schedule = from_config(config, "euler")
    alpha_bar, sigmas = schedule.alpha_bar, schedule.sigmas
    assert alpha_bar.shape == sigmas.shape == (schedule.num_train_timesteps,)
    assert np.all(np.diff(alpha_bar) < 0)
    assert np.all(np.diff(sigmas) > 0)
    np.testing.assert_allclose(alpha_bar[:-1] * (1 + sigmas[:-1] ** 2), 1, rtol=4 * EPS)
    with pytest.raises(ValueError, match="read-only"):
        alpha_bar[0] = 1.0


def test_published_files():
    published = {name: from_config(parts["scheduler"]) for name, parts in PUBLISHED.items() if "scheduler" in parts}
    assert len(published) == 5
    for name, schedule in published.items():
        assert schedule.config == PUBLISHED[name]["scheduler"]
    assert [s.method for s in published.values()] == ["ddpm", "pndm", "pndm", "ddim", "euler"]
    cifar, sd14, _, sd21, sdxl = published.values()
    assert cifar.clip_sample
    assert cifar.variance_type == "fixed_large"
    assert sd14.skip_prk_steps
    assert not sd14.set_alpha_to_one
    assert sd21.prediction_type == "v_prediction"
    assert not sd21.clip_sample
    assert (sdxl.timestep_spacing, sdxl.steps_offset) == ("leading", 1)


def test_another_method_takes_its_own_defaults_but_the_model_s_noise():
    sd14 = from_config(PUBLISHED["CompVis/stable-diffusion-v1-4"]["scheduler"])
    ddim = with_method(sd14, "ddim")
    # The file's own clip_sample, of no use to PNDM, reaches DDIM; spacing is the class's default.
    assert (ddim.clip_sample, ddim.set_alpha_to_one, ddim.timestep_spacing) == (False, False, "leading")
    assert with_method(sd14, "euler").timestep_spacing == "linspace"
    assert with_method(ddim, "pndm") == sd14
    assert with_method(sd14, None) is sd14
    # Betas and a rescaling stay, where the reference's Heun and PNDM would take others.
    heun = from_config({"_class_name": "DDIMScheduler"}, "heun")
    assert (heun.beta_start, heun.beta_end) == (1e-4, 0.02)
    assert from_config({"_class_name": "HeunDiscreteScheduler"}).beta_end == 0.012
    assert from_config({}, "heun").beta_end == 0.012
    assert from_config({"_class_name": "HeunDiscreteScheduler"}, "ddim").beta_end == 0.012
    assert from_config({"_class_name": "DDIMScheduler"} | ZERO_SNR, "heun").alpha_bar[-1] == 0


def test_other_classes_lend_their_noise_schedule():
    config = {"_class_name": "DEISMultistepScheduler", "solver_type": "logrho", "algorithm_type": "deis"}
    for method, kind in (("dpmsolver++", "midpoint"), ("unipc", "bh2")):
        assert from_config(config, method).solver_type == kind
        assert from_config(config, method).algorithm_type == "dpmsolver++"
    with pytest.raises(ValueError, match=r"steps of DEISMultistepScheduler.*method= one of ddim"):
        from_config(config)


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "euler",
            r"FlowMatchEuler.*scaling.diffusion.flow reads it",
        ),
        ({"_class_name": "GaussianDDPMScheduler", "timesteps": 1000}, None, "'GaussianDDPMScheduler' is not supported"),
        ({"_class_name": ["DDIMScheduler"]}, None, "is not supported"),
        ({}, None, "no _class_name"),
        ({}, "deis", "method 'deis' is not known; choose from ddim"),
        ({"predict_x0": False}, "unipc", "predict_x0 = False"),
        ({"solver_p": {"_class_name": "DDIMScheduler"}}, "unipc", "solver_p"),
        ({"disable_corrector": [0, -1]}, "unipc", "disable_corrector"),
        ({"disable_corrector": 0}, "unipc", "disable_corrector"),
        ({"original_inference_steps": 0}, "lcm", "original_inference_steps"),
        ({"timestep_values": [900, 500]}, "ddim", r"timestep_values = \[900, 500\]: this field is not supported"),
        ({"betas": 3}, "ddim", "betas = 3: this field is not supported"),
        ({"beta_schedule": "sigmoid"}, "ddim", "beta_schedule = 'sigmoid': supported are 'linear'"),
        ({"prediction_type": "flow_prediction"}, "ddim", "prediction_type = 'flow_prediction'"),
        ({"timestep_spacing": "even"}, "ddim", "timestep_spacing = 'even'"),
        ({"variance_type": "learned_range"}, "ddpm", "variance_type = 'learned_range'"),
        ({"interpolation_type": "log_linear"}, "euler", "interpolation_type"),
        ({"use_beta_sigmas": True}, "euler", "use_beta_sigmas = True"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "euler", "choose one"),
        ({"algorithm_type": "sde-dpmsolver"}, "dpmsolver++", "algorithm_type"),
        ({"solver_order": 4}, "dpmsolver++", "solver_order = 4"),
        ({"use_flow_sigmas": True}, "dpmsolver++", "use_flow_sigmas"),
        ({"num_train_timesteps": 10**9}, "ddim", "num_train_timesteps"),
        ({"num_train_timesteps": 0}, "ddim", "num_train_timesteps"),
        ({"num_train_timesteps": 10.0}, "ddim", "num_train_timesteps"),
        ({"beta_end": 1.5}, "ddim", "every beta must lie in"),
        ({"beta_start": -1e-4}, "ddim", "beta_start"),
        ({"beta_start": math.nan}, "ddim", "beta_start"),
        ({"trained_betas": [0.1, 0.2]}, "ddim", "trained_betas has 2"),
        ({"trained_betas": [0.1, "a"], "num_train_timesteps": 2}, "ddim", "trained_betas"),
        ({"trained_betas": [0.1, 0.0], "num_train_timesteps": 2}, "ddim", "every beta"),
        ({"trained_betas": 0.1}, "ddim", "list of numbers"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "ddim", "every beta"),
        ({"clip_sample": 1}, "ddim", "clip_sample = 1"),
        ({"lambda_min_clipped": "low"}, "dpmsolver++", "lambda_min_clipped"),
        ({"beta_start": object()}, "ddim", "plain JSON"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, method, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, method)


def test_fields_of_other_methods_are_kept_and_have_no_effect():
    plain = from_config(DDPM | {"_class_name": "DDIMScheduler"})
    more = from_config(DDPM | {"_class_name": "DDIMScheduler", "use_beta_sigmas": True, "_diffusers_version": "0.8.0"})
    assert more.config["use_beta_sigmas"]
    fields = [s.__dict__ | {"source": "", "alpha_bar": None} for s in (plain, more)]
    assert fields[0] == fields[1]
    assert not from_config({"clip_sample": None}, "ddim").clip_sample
    assert from_config({"timestep_values": None}, "ddim").alpha_bar[-1] == from_config({}, "ddim").alpha_bar[-1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(sorted(scheduler_fields.KNOWN)) | st.text(max_size=8)


@hypothesis.given(
    st.dictionaries(NAMES, VALUES, max_size=4), st.none() | st.sampled_from(list(CLASSES)), VALUES | st.just("x")
)
@hypothesis.settings(max_examples=200)
def test_a_hostile_file_is_read_or_refused(config, method, name):
    try:
        schedule = from_config(config if method else config | {"_class_name": name}, method)
    except ValueError as error:
        assert str(error)  # noqa: PT017
    else:
        assert np.all(np.isfinite(schedule.sigmas))


def test_a_schedule_is_static():
    traces = []

    @jax.jit
    def scaled(x, schedule):
        traces.append(None)
        return x * schedule.sigmas[3]

    for _ in range(2):
        schedule = from_config(STABLE, "ddim")
        assert scaled(2.0, schedule) == 2 * schedule.sigmas[3]
    assert len(traces) == 1
    scaled(2.0, from_config(DDPM, "ddim"))
    assert len(traces) == 2
    assert not jax.tree.leaves(schedule)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_image_and_noise_come_back_from_the_target(prediction, key):
    schedule = from_config(STABLE | {"prediction_type": prediction}, "ddim")
    x, noise = jax.random.normal(key, (2, 4, 3, 2, 2), jnp.float64)
    t = jnp.array([0, 13, 500, 999])
    noisy, out = (f(schedule, x, noise, t) for f in (add_noise, target))
    power = schedule.alpha_bar[np.asarray(t)][:, None, None, None]
    np.testing.assert_allclose(noisy, np.sqrt(power) * x + np.sqrt(1 - power) * noise, rtol=1e-12)
    for weights, expected in ((clean_weights, x), (noise_weights, noise)):
        a, b = weights(prediction, np.sqrt(power), np.sqrt(1 - power))
        # The worst division is by sigma at t = 0, .029, of two numbers near 1.
        np.testing.assert_allclose(a * noisy + b * out, expected, atol=1e-13)
    np.testing.assert_array_equal(add_noise(schedule, x, noise, 13)[1], noisy[1])
    assert add_noise(schedule, x.astype(jnp.float32), noise.astype(jnp.float32), t).dtype == jnp.float32
    traced = jax.jit(add_noise)(schedule, x, noise, t)
    np.testing.assert_allclose(traced, noisy, rtol=1e-15)


@pytest.mark.parametrize(("t", "message"), [(1000, "lie in"), (-1, "lie in"), (3.0, "integer"), ([1, 2, 3], "one per")])
def test_a_wrong_timestep_is_refused(t, message):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=message):
        add_noise(from_config(STABLE, "ddim"), x, x, jnp.asarray(t))


@pytest.mark.parametrize("config", [STABLE, COSINE, ZERO_SNR])
def test_noise_levels_and_timesteps_are_inverse(config):
    schedule = from_config(config, "euler")
    last = schedule.num_train_timesteps - 1
    for t in (0, 1, last // 2, last):
        assert float(sigma_to_timestep(schedule, schedule.sigmas[t])) == pytest.approx(t, abs=1e-9)
        assert float(timestep_to_sigma(schedule, t)) == pytest.approx(schedule.sigmas[t], rel=1e-12)
    half = math.sqrt(schedule.sigmas[3] * schedule.sigmas[4])
    assert float(sigma_to_timestep(schedule, half)) == pytest.approx(3.5, abs=1e-9)
    assert float(timestep_to_sigma(schedule, 3.5)) == pytest.approx(half, rel=1e-12)
    assert float(sigma_to_timestep(schedule, 1e-9)) == 0
    assert float(sigma_to_timestep(schedule, 1e9)) == last
    slope = jax.grad(lambda sigma: sigma_to_timestep(schedule, sigma))(half)
    assert float(slope) == pytest.approx(1 / (half * math.log(schedule.sigmas[4] / schedule.sigmas[3])), rel=1e-9)
    assert sigma_to_timestep(schedule, jnp.float32(0.5)).dtype == jnp.float32
