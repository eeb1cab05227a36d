"""Models as denoisers and back, and the preconditioning of EDM."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_side import STABLE, UNET, ZERO_SNR, tiny_model

from dae_theory import sampling
from dae_theory.denoisers import gaussian_denoiser, score
from scaling.diffusion.denoisers import (
    as_denoiser,
    clean_weights,
    edm_denoiser,
    edm_preconditioning,
    from_denoiser,
    noise_weights,
    to_denoiser,
)
from scaling.diffusion.ranges import check_range
from scaling.diffusion.schedules import from_config

PREDICTIONS = ("epsilon", "sample", "v_prediction")
MEAN, COVARIANCE = jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.6], [0.6, 0.5]])
gaussian = functools.partial(gaussian_denoiser, mean=MEAN, covariance=COVARIANCE)


def of(prediction="epsilon", base=STABLE):
    return from_config(base | {"prediction_type": prediction}, "ddim")


unet = functools.cache(tiny_model)


def with_slopes(denoiser):
    """Its value and its derivatives in the image and in the noise level, in one program."""
    return jax.jit(lambda y, sigma: (denoiser(y, sigma), *(jax.jacfwd(denoiser, argnums=i)(y, sigma) for i in (0, 1))))


exact = with_slopes(gaussian)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("base", [STABLE, ZERO_SNR])
def test_a_denoiser_survives_being_a_network(prediction, base, key):
    schedule = of(prediction, base)
    again = to_denoiser(from_denoiser(gaussian, schedule), schedule)
    y = jax.random.normal(key, (2,), jnp.float64)
    found = with_slopes(again)
    for sigma in (schedule.sigmas[0], 0.4, 3.0, schedule.sigmas[-2]):
        np.testing.assert_allclose(found(y, sigma)[0], exact(y, sigma)[0], rtol=1e-9)
    for ours, theirs, rtol in zip(found(y, 0.4)[1:], exact(y, 0.4)[1:], (1e-9, 1e-8), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    lanes = jax.jit(jax.vmap(again))(jnp.stack([y, -y]), jnp.array([0.4, 3.0]))
    np.testing.assert_allclose(lanes, [exact(y, 0.4)[0], exact(-y, 3.0)[0]], rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_of_image_and_noise(prediction):
    alpha, sigma = 0.6, 0.8
    x0, noise = 1.7, -0.4
    x = alpha * x0 + sigma * noise
    out = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction]
    (a, b), (c, d) = clean_weights(prediction, alpha, sigma), noise_weights(prediction, alpha, sigma)
    assert a * x + b * out == pytest.approx(x0, rel=1e-14)
    assert c * x + d * out == pytest.approx(noise, rel=1e-14)


def test_a_score_is_a_denoiser(key):
    # A network that predicts noise is the score, times -sigma of the preserving convention.
    schedule = of()
    t = 400
    alpha, sigma = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
    x = jax.random.normal(key, (2,), jnp.float64)
    law = alpha**2 * COVARIANCE + sigma**2 * jnp.eye(2)
    expected = -jnp.linalg.solve(law, x - alpha * MEAN)
    np.testing.assert_allclose(-from_denoiser(gaussian, schedule)(x, jnp.int32(t)) / sigma, expected, rtol=1e-9)
    np.testing.assert_allclose(score(gaussian, x / alpha, sigma / alpha) / alpha, expected, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_as_a_denoiser(prediction, key):
    schedule, model = of(prediction), unet()
    denoiser = as_denoiser(model, schedule)
    y = jax.random.normal(key, (3, 8, 8), jnp.float32)
    t = 300
    sigma, alpha = float(schedule.sigmas[t]), math.sqrt(schedule.alpha_bar[t])
    out = model.apply(model.params, alpha * y[None], jnp.float32(t))[0][0]
    expected = {"epsilon": y - sigma * out, "sample": out, "v_prediction": alpha * (alpha * y - sigma * out)}
    # float32 networks at timesteps that differ in the last place.
    np.testing.assert_allclose(denoiser(y, sigma), expected[prediction], atol=2e-4)
    np.testing.assert_array_equal(denoiser(y.reshape(-1), sigma), denoiser(y, sigma).reshape(-1))
    assert jax.eval_shape(denoiser, y.astype(jnp.float64), sigma).dtype == jnp.float64
    assert jax.eval_shape(denoiser, jnp.ones((3, 4, 4)), sigma).shape == (3, 4, 4)


def test_a_model_s_denoiser_is_batched_and_differentiated(key):
    denoiser = as_denoiser(unet(), of())
    y = jax.random.normal(key, (2, 3, 8, 8), jnp.float32)
    both = jax.jit(jax.vmap(denoiser, in_axes=(0, None)))(y, 0.7)

    def energy(y, sigma):
        out = denoiser(y, sigma)
        return jnp.sum(out**2), out

    slope, out = jax.jit(jax.grad(energy, argnums=(0, 1), has_aux=True))(y[1], 0.7)
    np.testing.assert_allclose(both[1], out, atol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in slope)
    assert float(jnp.abs(slope[1])) > 0


def test_a_model_s_conditions_are_one_example_s():
    model = tiny_model(UNET | {"num_class_embeds": 5})
    y = jnp.ones((3, 8, 8), jnp.float32)
    first, second = (as_denoiser(model, of(), class_labels=label)(y, 1.0) for label in (1, 2))
    t = jnp.float32(700)
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3
    schedule = of()
    sigma = float(schedule.sigmas[700])
    out = model.apply(model.params, math.sqrt(schedule.alpha_bar[700]) * y[None], t, class_labels=jnp.array([2]))[0][0]
    expected = y - sigma * out
    given = as_denoiser(model, schedule, class_labels=2)(y, sigma)
    np.testing.assert_allclose(given, expected, atol=1e-4 * float(jnp.max(jnp.abs(expected))))


def test_a_model_s_denoiser_runs_the_reverse_process(key):
    denoiser = as_denoiser(unet(), of())
    sigmas = sampling.karras_schedule(10.0, 0.1, 4, dtype=jnp.float32)
    rows = sampling.sample(key, denoiser, sigmas, 2, 3 * 8 * 8)
    assert rows.shape == (2, 192)
    assert bool(jnp.all(jnp.isfinite(rows)))


def test_noise_levels_must_be_positive():
    denoisers = as_denoiser(unet(), of()), edm_denoiser(lambda x, t: x)
    for denoiser in denoisers:
        with pytest.raises(ValueError, match="sigma must be positive"):
            denoiser(jnp.ones((3, 8, 8)), 0.0)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        edm_preconditioning(1.0, -1.0)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_preconditioning_has_unit_variances(sigma, sigma_data):
    c = edm_preconditioning(sigma, sigma_data)
    assert float(c.c_in**2 * (sigma**2 + sigma_data**2)) == pytest.approx(1)
    # The network's target, (x - c_skip y)/c_out.
    left = (1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2
    assert float(left / c.c_out**2) == pytest.approx(1)
    # and c_skip is what makes c_out smallest: the error of the best linear denoiser.
    assert float(c.c_out**2) == pytest.approx(1 / (1 / sigma**2 + 1 / sigma_data**2))
    assert float(c.c_noise) == pytest.approx(math.log(sigma) / 4)


def test_preconditioning_at_unit_variance_is_v_prediction(key):
    # The same network: its output changes sign, its timestep is named otherwise.
    schedule = of("v_prediction")
    y = jax.random.normal(key, (5,), jnp.float64)

    def velocity(x, t):
        return jnp.sin(3 * x)

    edm = edm_denoiser(lambda x, c_noise: -velocity(x, c_noise), sigma_data=1.0)
    np.testing.assert_allclose(edm(y, 0.7), to_denoiser(velocity, schedule)(y, 0.7), rtol=1e-12)


def test_preconditioning_at_the_ends():
    tiny = edm_preconditioning(jnp.float32(1e-30), 0.5)
    assert float(tiny.c_skip) == 1
    assert 0 < float(tiny.c_out) <= 1.01e-30
    huge = edm_preconditioning(jnp.float32(1e30), 0.5)
    assert all(bool(jnp.isfinite(value)) for value in huge)
    assert float(huge.c_out) == pytest.approx(0.5)
    slope = jax.grad(lambda sigma: edm_preconditioning(sigma).c_out)(jnp.float32(1e-30))
    assert float(slope) == pytest.approx(1)


def test_lowers_for_accelerators():
    y = jnp.ones((3, 8, 8), jnp.float32)
    for denoiser in (as_denoiser(unet(), of()), edm_denoiser(lambda x, t: x)):
        jax.jit(denoiser).trace(y, jnp.float32(1.0)).lower(lowering_platforms=("tpu", "cuda"))


def test_values_that_are_no_noisy_image_are_refused():
    denoiser = as_denoiser(unet(), of())
    white = jnp.full((3, 8, 8), 255.0)
    with pytest.raises(ValueError, match=r"noisy images run from 255 to 255, .*images / 127\.5 - 1"):
        denoiser(white, 0.5)
    with pytest.raises(ValueError, match=r"got uint8: scale images from 0 to 255 first"):
        denoiser(white.astype(jnp.uint8), 0.5)
    # Of much noise such values are no surprise, and under a trace they are unknown.
    jax.eval_shape(lambda y: denoiser(y, 50.0), white)
    check_range("y", white, 3, sigma=50.0)
    check_range("y", white / 5, 4)
    with pytest.raises(ValueError, match="got uint8"):
        jax.eval_shape(lambda y: denoiser(y, 50.0), white.astype(jnp.uint8))
