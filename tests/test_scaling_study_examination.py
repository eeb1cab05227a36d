"""What is measured of a network and its images, against networks whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_fits import few_draws as few_draws

from dae_theory import empirical_denoiser, gaussian_denoiser
from scaling import initialize, load_pipeline
from scaling.bridge.export import save_pipeline
from scaling.bridge.loading import Pipeline
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.samplers import sample
from scaling.diffusion.schedules import from_config
from scaling.measures.jacobian import full_jacobian
from scaling.study import examination
from scaling.study.examination import examine, gap, sampled_prompts, template
from scaling.study.settings import ExaminationSetting
from scaling.training import corpus
from scaling.training.architectures import network_config, scheduler_config
from scaling.training.captions import KINDS, from_labels
from scaling.training.corpus import GROUPS

# One size for all tests, so that its programs are compiled once.
SETTING = ExaminationSetting(
    samples=4, sampler_steps=2, images=20, jacobians=2, draws=4, sigmas=(0.5, 1.5), fits=1, units=(2,)
)


@pytest.fixture(scope="module")
def digits():
    return corpus.load("digits", duplicates="5x4", singles=20, held_out=60)


@pytest.fixture(scope="module")
def untrained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    config = network_config("unet2d", digits.images.shape[1:], channels=(8,))
    model = jax.jit(lambda key: initialize(key, config))(jax.random.key(3))
    save_pipeline(Pipeline(model, from_config(scheduler_config()), None, (), (), {}), folder)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def silent(untrained):
    """A network that predicts no noise at all: every weight is 0, so D(y, σ) = y."""
    zeros = {name: jnp.zeros_like(value) for name, value in untrained.network.params.items()}
    return untrained._replace(network=dataclasses.replace(untrained.network, params=zeros))


@pytest.fixture(scope="module")
def of_silent(silent, digits):
    return examine(jax.random.key(0), silent, digits, SETTING)


def test_a_network_that_returns_its_input_has_the_noise_as_error_and_the_identity_as_jacobian(of_silent):
    d = 64
    for group in GROUPS:
        # Only 5 images are duplicated: fewer draws.
        draws = SETTING.draws * min(SETTING.images, 5 if group == "duplicated" else 20)
        for sigma in SETTING.sigmas:
            error, first = (of_silent.error.sel(group=group, sigma=s).item() for s in (sigma, 0.5))
            spread = sigma**2 * np.sqrt(2 * d / draws)
            assert abs(error - sigma**2 * d) < 5 * spread
            # One set of draws at every level.
            np.testing.assert_allclose(error / sigma**2, first / 0.25, rtol=1e-4)
    np.testing.assert_allclose(of_silent.jacobian_rank, d, rtol=1e-5)
    np.testing.assert_allclose(of_silent.jacobian_energy, d, rtol=1e-5)
    np.testing.assert_array_equal(of_silent.jacobian_kept, d)
    expected = 1 - of_silent.error.values[GROUPS.index("train")] / of_silent.error.values[GROUPS.index("held_out")]
    np.testing.assert_array_equal(gap(of_silent), expected)


def test_the_same_network_has_silent_codes_that_tell_nothing(of_silent):
    np.testing.assert_array_equal(of_silent["std"], 0)
    np.testing.assert_array_equal(of_silent.auroc_std.sel(group=["duplicated", "train"]), 0.5)
    assert np.all(np.isnan(of_silent.auroc_std.sel(group="held_out")))
    np.testing.assert_allclose(of_silent.copy_share, of_silent.copied.mean("sample"))


def test_every_sampler_starts_from_the_same_noise(of_silent, silent):
    sample_key = jax.random.split(jax.random.key(0), 3)[0]
    for eta in SETTING.etas:
        drawn = sample(
            jax.random.clone(sample_key),
            silent.network,
            silent.schedule,
            SETTING.samples,
            SETTING.sampler_steps,
            method="ddim",
            eta=eta,
        )
        np.testing.assert_allclose(of_silent.samples.sel(eta=eta), np.clip(drawn.x, -1, 1), rtol=1e-6)
    assert not np.array_equal(*of_silent.samples.values)


def test_an_examination_has_the_variables_and_labels_of_its_template(of_silent, digits):
    blank = template(SETTING, digits.images.shape[1:])
    assert list(of_silent.data_vars) == list(blank.data_vars)
    assert of_silent.coords.to_dataset().equals(blank.coords.to_dataset())
    for name, variable in blank.data_vars.items():
        assert of_silent[name].dims == variable.dims, name
        assert np.can_cast(of_silent[name].dtype, variable.dtype, "same_kind"), name


def test_distances_are_of_the_optima(silent, digits, monkeypatch):
    """With the optimum of the training set in the network's place its distance is 0, and only its."""
    images = jnp.asarray(digits.images[corpus.training_rows(digits)].reshape(-1, 64))

    def optimum(network, schedule, **condition):
        return lambda y, sigma: empirical_denoiser(y, sigma, images)

    monkeypatch.setattr(examination, "as_denoiser", optimum)
    # Another function than the one that is compiled already.
    traced = jax.jit(lambda *args: examination._denoised(*args), static_argnums=(6, 7))
    monkeypatch.setattr(examination, "_compiled", lambda: traced)
    results = examine(jax.random.key(0), silent, digits, SETTING)
    assert np.max(results.distance_to_empirical) < 1e-6
    assert np.min(results.distance_to_population) > 0.1
    # It gives trained images back at little noise, and others not: the error tells them apart.
    assert np.all(results.auroc_error.sel(group=["duplicated", "train"], sigma=0.5) == 1)


def test_distances_of_wiener_filters_are_their_closed_form(key):
    """Sums over pixels: of two linear filters with diagonal gains a, b, the mean square of (a − b) y over x and y."""
    d, count, draws = 6, 300, 4
    sigmas = jnp.array([0.2, 1.0, 5.0])
    variances, mean = jnp.linspace(0.5, 2.0, d), jnp.zeros(d)
    image_key, noise_key, train_key = jax.random.split(key, 3)
    images = jnp.sqrt(variances)[None, :] * jax.random.normal(image_key, (count, d))
    noise = jax.random.normal(noise_key, (count, draws, d))
    y = images[None, :, None] + sigmas[:, None, None, None] * noise[None]
    wiener = jax.vmap(
        jax.vmap(jax.vmap(gaussian_denoiser, (0, None, None, None)), (0, None, None, None)), (0, 0, None, None)
    )
    denoised = wiener(y, sigmas, mean, jnp.diag(variances))
    train = jax.random.normal(train_key, (7, d))
    apart = examination._distances(y, denoised, images, sigmas, train, mean, jnp.eye(d))
    same = examination._distances(y, denoised, images, sigmas, train, mean, jnp.diag(variances))
    v = np.asarray(variances)
    for k, sigma in enumerate(np.asarray(sigmas)):
        gain, other = v / (v + sigma**2), 1 / (1 + sigma**2)
        risk, expected = np.sum(v * sigma**2 / (v + sigma**2)), np.sum((gain - other) ** 2 * (v + sigma**2))
        for name, value in (("error", risk), ("distance_to_population", expected)):
            of_images = np.asarray(apart[name][k])
            assert abs(of_images.mean() - value) < 4 * of_images.std(ddof=1) / np.sqrt(count), name
        optimal = np.stack([empirical_denoiser(y[k, 0, draw], sigmas[k], train) for draw in range(draws)])
        by_hand = np.mean(np.sum(np.square(denoised[k, 0] - optimal), axis=1))
        np.testing.assert_allclose(apart["distance_to_empirical"][k, 0], by_hand, rtol=1e-9)
    np.testing.assert_allclose(same["distance_to_population"], 0, atol=1e-20)
    np.testing.assert_array_equal(same["error"], apart["error"])


def test_every_kind_of_prompt_is_sampled_equally_often():
    captions = from_labels(corpus.load("digits", duplicates="6x4", variants="2x2", singles=20, held_out=20))
    kinds = np.asarray(captions.kinds)[sampled_prompts(captions, 30)]
    assert [int(np.sum(kinds == kind)) for kind in KINDS] == [10, 10, 10]
    # Four verbatim prompts by turns.
    verbatim = [i for i in sampled_prompts(captions, 30) if captions.kinds[i] == "verbatim"]
    assert verbatim[:4] == verbatim[4:8]
    assert len(set(verbatim)) == 4


@pytest.mark.slow
def test_a_jacobian_is_that_of_the_denoiser(untrained, digits):
    """Means over the first held-out images, one image at a time, without the batches of :func:`examine`."""
    results = examine(jax.random.key(5), untrained, digits, SETTING).sel(group="held_out", sigma=1.5)
    _, noise_key, _ = jax.random.split(jax.random.key(5), 3)
    key = jax.random.fold_in(noise_key, GROUPS.index("held_out"))
    denoiser = as_denoiser(untrained.network, untrained.schedule)

    @jax.jit
    def at(item, image):
        x = image.reshape(-1)
        y = x + 1.5 * jax.random.normal(jax.random.fold_in(key, item), x.shape, x.dtype)
        return jnp.sum(jnp.square(denoiser(y, 1.5) - x)), full_jacobian(denoiser, y, 1.5)

    items = range(SETTING.images * SETTING.draws)
    values = [at(item, jnp.asarray(digits.held_out[item // SETTING.draws])) for item in items]
    np.testing.assert_allclose(results.error, np.mean([error for error, _ in values]), rtol=1e-4)
    # The Jacobian is at the first draw of an image.
    wholes = [np.asarray(values[image * SETTING.draws][1], np.float64) for image in range(SETTING.jacobians)]
    np.testing.assert_allclose(results.jacobian_energy, np.mean([np.sum(whole**2) for whole in wholes]), rtol=1e-4)
    kept = [np.sum(np.linalg.svd(whole, compute_uv=False) > 0.5) for whole in wholes]
    np.testing.assert_allclose(results.jacobian_kept, np.mean(kept))
