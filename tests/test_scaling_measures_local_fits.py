"""Local autoencoders of a denoiser and of a block, where the best ones are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from pipelines import PIXEL

from dae_theory import exact_risk, memorizing_minimizer
from scaling import initialize
from scaling.diffusion.schedules import from_config, timestep_to_sigma
from scaling.measures import local_fits
from scaling.measures.local_fits import FITTED, SCORES
from scaling.measures.relu_fits import fit_relu_dae
from scaling.training.architectures import network_config, scheduler_config

pytestmark = pytest.mark.optimized

SCHEDULE = from_config(scheduler_config())
TIMESTEP, TAPS = 200, ("mid_block", "up_blocks.0.resnets.0")


@pytest.fixture(scope="module")
def silent():
    """Every weight is 0: D(y, σ) = y, and no tap says anything."""

    # In one program, which draws no weights.
    @jax.jit
    def zeros():
        model = initialize(jax.random.key(0), network_config("unet2d", (1, 8, 8), channels=(8,)))
        return dataclasses.replace(model, params={k: jnp.zeros(v.shape, "float64") for k, v in model.params.items()})

    return zeros()


def run(key, model, images, units, **more):
    return local_fits.local_fits(key, model, SCHEDULE, images, TIMESTEP, *TAPS, units, **more)


compiled = jax.jit(run, static_argnames=("units", "num_draws", "max_iterations"))


def fits(key, model, images, units, function=compiled, **more):
    """All scores, compiled once for arguments of one shape."""
    found = function(key, model, images, units, **more)
    assert found.keys() == set(SCORES)
    assert {value.shape for value in found.values()} == {(len(FITTED), len(units), len(images))}
    return jax.tree.map(np.asarray, found)


@pytest.mark.slow
def test_of_the_identity_so_many_units_keep_so_many_directions(silent, key):
    """The best linear map of rank r misses (d − r)/d of the noise; gates close on all but the image's own direction."""
    d, sigma = 64, float(timestep_to_sigma(SCHEDULE, jnp.float64(TIMESTEP)))
    images = jnp.full((2, 1, 8, 8), 10 * sigma)
    found = fits(key, silent, images, (1, 8), max_iterations=0)
    denoiser = {name: value[0] for name, value in found.items()}
    for at, units in enumerate((1, 8)):
        # Sums of d Gaussian squares over 512 fresh draws.
        spread = np.sqrt(2 * 2 / (512 * d))
        assert denoiser["fit_linear_unexplained"][at] == pytest.approx((d - units) / d, abs=5 * spread)
        # Untrained, a unit orthogonal to the image passes half of its direction: E (z − relu(z))² = E z²/2.
        missed = d - 1 - (units - 1) / 2
        assert denoiser["fit_unexplained"][at] == pytest.approx(missed / d, abs=5 * spread)
        np.testing.assert_allclose(denoiser["fit_open"][at], 1 / units)
    assert np.all(denoiser["fit_std"][0] == 0)


@pytest.mark.slow
def test_a_block_that_says_nothing_leaves_nothing_to_explain(silent, key):
    found = fits(key, silent, jnp.ones((1, 1, 8, 8)), (2,), max_iterations=2)
    for name in ("fit_error", "fit_unexplained", "fit_std"):
        np.testing.assert_array_equal(found[name][1], 0, err_msg=name)
    np.testing.assert_array_equal(found["fit_open"][1], 1)


@pytest.mark.slow
def test_where_an_image_is_memorized_one_unit_does(silent, key, monkeypatch):
    """A denoiser that gives the image back: the fit is Corollary 3.2's unit, with its risk."""
    image = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (1, 1, 8, 8)))
    x, sigma = image.reshape(-1), float(timestep_to_sigma(SCHEDULE, jnp.float64(TIMESTEP)))
    monkeypatch.setattr(local_fits, "as_denoiser", lambda *args, **more: lambda y, s: x + 0 * y)
    # Another function than the one that may be compiled already.
    patched = jax.jit(lambda *args: run(*args), static_argnums=3)
    found = fits(key, silent, image, (1, 3), patched)
    size = float(x @ x)
    for at in (0, 1):
        # Its risk relative to ‖x‖²; 64 dimensions fitted to 512 draws cost about 64/512 more.
        assert found["fit_error"][0, at, 0] == pytest.approx(sigma**2 / (size + sigma**2), rel=0.3)
    # That is the exact risk of the corollary's unit, whose squared norm is q = N/(N + σ²).
    unit = memorizing_minimizer(x[None], sigma, 0.0, 1)
    assert found["fit_error"][0, 0, 0] == pytest.approx(float(exact_risk(unit, x[None], sigma)) / size, rel=0.3)
    q = float(jnp.sum(jnp.square(unit.w1)))
    assert q == pytest.approx(size / (size + sigma**2))
    assert found["fit_l4_over_l2"][0, 0, 0] == pytest.approx(1)


@pytest.mark.slow
def test_an_image_alone_is_that_image_among_others_and_blocks_are_fitted(key):
    model = network(PIXEL, "float64")
    images = jnp.asarray(np.random.RandomState(1).standard_normal((2, 3, 8, 8)))
    both = fits(key, model, images, (8,), num_draws=64, max_iterations=3)
    alone = fits(key, model, images[:1], (8,), num_draws=64, max_iterations=3)
    for name in SCORES:
        np.testing.assert_allclose(both[name][..., :1], alone[name], rtol=1e-6, err_msg=name)
    assert np.all(both["fit_unexplained"][1] > 0)
    assert np.all((both["fit_open"] >= 0) & (both["fit_open"] <= 1))


@pytest.mark.slow
def test_a_block_is_fitted_from_its_input_to_its_output(key):
    """By hand: both activations of noisy images as the network sees them."""
    model, x = network(PIXEL, "float64"), jnp.asarray(np.random.RandomState(2).standard_normal((3, 8, 8)))
    alpha = SCHEDULE.alpha_bar[TIMESTEP] ** 0.5

    def activations(y):
        _, taps = model.apply(model.params, alpha * y.reshape(1, 3, 8, 8), TIMESTEP, capture=TAPS)
        return [taps[name].reshape(-1) for name in TAPS]

    def by_hand(key):
        fit_key, _ = jax.random.split(jax.random.split(jax.random.fold_in(key, 0), (2, 1))[1, 0])
        sigma = (1 / alpha**2 - 1) ** 0.5
        entering, leaving = (lambda y, k=k: activations(y)[k] for k in (0, 1))
        more = {"source": entering, "num_draws": 64, "num_fresh": 64, "num_random": 0, "max_iterations": 3}
        return fit_relu_dae(fit_key, leaving, x.reshape(-1), sigma, 8, **more)

    expected = jax.jit(by_hand)(jax.random.clone(key))
    found = fits(key, model, x[None], (8,), num_draws=64, max_iterations=3)
    for name, value in (
        ("fit_error", expected.error.mean),
        ("fit_linear_unexplained", expected.linear_unexplained.mean),
    ):
        np.testing.assert_allclose(found[name][1, 0, 0], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("taps", "message"),
    [(("mid_blok", "up_blocks.0.resnets.0"), "no tap named 'mid_blok'.*'mid_block'"), (TAPS[::-1], "swap them")],
)
def test_bad_taps_are_refused(silent, key, taps, message):
    with pytest.raises(ValueError, match=message):
        local_fits.local_fits(key, silent, SCHEDULE, jnp.ones((1, 1, 8, 8)), TIMESTEP, *taps, (2,))


def test_images_of_another_scale_are_refused(silent, key):
    with pytest.raises(ValueError, match=r"run from 255 to 255, .*images / 127\.5 - 1"):
        local_fits.local_fits(key, silent, SCHEDULE, jnp.full((1, 1, 8, 8), 255.0), TIMESTEP, *TAPS, (2,))
