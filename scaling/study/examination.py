r"""What a trained model does with the images that it was trained on, and with others.

An examination draws samples and counts copies of training images (:mod:`scaling.measures.copies`). For three groups of
images, repeated in training, trained on once, and held out, it measures the denoising error, the distances from the
optimal denoisers of the training set and of the population, the Jacobian of the denoiser, how spiky codes are, and how
well two-layer autoencoders fit the network nearby (:mod:`scaling.measures.local_fits`). The optimal denoiser of the
population is approximated by the Wiener filter of held-out images that belong to no group.

Squared distances between denoisers, and between a denoiser and the clean image, are sums over pixels everywhere:

.. math:: E \|D(x + \sigma\epsilon, \sigma) - D'(x + \sigma\epsilon, \sigma)\|^2
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Bool, Float, Int

from dae_theory import empirical_denoiser, gaussian_denoiser
from dae_theory.checks import check_integer, check_positive
from dae_theory.mixture import GaussianMixture, fit
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.conditioning import condition_on, is_conditional, null_or_none, stacked
from scaling.bridge.loading import Pipeline
from scaling.detection.evaluation import auroc
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.samplers import sample
from scaling.diffusion.schedules import Schedule
from scaling.measures.codes import codes
from scaling.measures.copies import Copies, find_copies
from scaling.measures.jacobian import full_jacobian, spectrum_summary
from scaling.measures.local_fits import FITTED, SCORES, local_fits
from scaling.models.model import Condition, Model
from scaling.study.settings import STANDARD, ExaminationSetting
from scaling.training.captions import Captions
from scaling.training.corpus import GROUPS, Corpus, membership, training_rows
from sims import store

__all__ = [
    "STANDARD",
    "ExaminationSetting",
    "check",
    "draw_samples",
    "examine",
    "gap",
    "sample_conditions",
    "sampled_prompts",
    "template",
]

CHUNK = 64
"""Noisy images processed at a time."""

DISTANCES = ("error", "distance_to_empirical", "distance_to_population")


def template(setting: ExaminationSetting, image_shape: tuple[int, int, int]) -> xr.Dataset:
    """A blank data set with the variables, dimensions and labels of what :func:`examine` returns."""
    coords: dict[str, Any] = {
        "eta": list(setting.etas),
        "sample": list(range(setting.samples)),
        **{axis: list(range(side)) for axis, side in zip(("channel", "height", "width"), image_shape, strict=True)},
        "group": list(GROUPS),
        "sigma": list(setting.sigmas),
        "tap": list(setting.taps),
        "fitted": list(FITTED),
        "units": list(setting.units),
    }
    at_levels, at_taps = (("group", "sigma"), np.float32), (("group", "tap"), np.float32)
    variables = {
        "samples": (("eta", "sample", "channel", "height", "width"), np.float32),
        "nearest_row": (("eta", "sample"), np.int32),
        "copied": (("eta", "sample"), np.bool_),
        "copy_share": (("eta",), np.float32),
        "duplicated_share": (("eta",), np.float32),
        **dict.fromkeys((*DISTANCES, "auroc_error"), at_levels),
        **dict.fromkeys(("jacobian_rank", "jacobian_kept", "jacobian_energy"), at_levels),
        **dict.fromkeys([*MEASURES, *(f"auroc_{name}" for name in MEASURES)], at_taps),
        **dict.fromkeys(SCORES, (("group", "fitted", "units"), np.float32)),
    }
    return store.blank(coords, variables)


def check(setting: ExaminationSetting, num_timesteps: int, held_out: int) -> None:
    """``ValueError`` for settings out of range, and unless two more images are held out than the setting examines."""
    for name in ("samples", "images", "jacobians", "draws", "fits"):
        check_integer(name, getattr(setting, name), minimum=1)
    for name in ("etas", "units", "taps"):
        values = getattr(setting, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must name at least one, and none twice; got {values}.")
    for units in setting.units:
        check_integer("units", units, minimum=1)
    if not all(0 <= eta <= 1 for eta in setting.etas):
        raise ValueError(f"etas must lie in [0, 1], got {', '.join(map(str, setting.etas))}.")
    check_integer("timestep", setting.timestep, minimum=0, maximum=num_timesteps - 1)
    check_positive("sigmas", np.asarray(setting.sigmas, float))
    if held_out < setting.images + 2:
        raise ValueError(
            f"{held_out} images are held out, too few to examine {setting.images} of them and to fit the population to "
            "the rest; hold out more, or examine fewer (--images)."
        )


def examine(
    key: PRNGKey, pipeline: Pipeline, corpus: Corpus, setting: ExaminationSetting, captions: Captions | None = None
) -> xr.Dataset:
    """Examine a model and the images that it was trained on; the result has the labels of :func:`template`.

    Over ``eta``, one sampler each: ``samples``; ``copied``, whether a sample is a copy; ``nearest_row``, the row in the
    data set of the nearest training image; ``copy_share``, the share of copies; ``duplicated_share``, the share of
    repeated images among what was copied, NaN without copies.

    Over ``group`` and ``sigma``, means over the images of the group: ``error``, E‖D(y) − x‖²; ``distance_to_empirical``
    and ``distance_to_population``, E‖D(y) − D'(y)‖² from the two optima, all sums over pixels; ``jacobian_rank``, the
    participation ratio of the squared singular values; ``jacobian_kept``, the number of singular values above 1/2;
    ``jacobian_energy``, the squared Frobenius norm.

    Over ``group`` and ``tap``, means of the measures of spikiness of the codes. Over ``group``, ``fitted`` and
    ``units``, means over the first images of the scores of :func:`scaling.measures.local_fits.local_fits`.
    ``auroc_...`` is the probability that an image of the group has a higher score, or a lower error, than a held-out
    image. Empty groups are NaN.

    A network that is conditioned on classes draws them in turn; one that is conditioned on text draws the prompts of
    ``captions``, equally many of each kind. Everything but sampling uses the null condition. ``ValueError`` as for
    :func:`check`.
    """
    check(setting, pipeline.schedule.num_train_timesteps, len(corpus.held_out))
    sample_key, noise_key, code_key = jax.random.split(key, 3)
    # Not from the split: a fourth part would change the draws of the other three.
    fit_key = jax.random.fold_in(key, 3)
    repeated = np.isin(corpus.rows, membership(corpus)["duplicated"])
    images = {
        "duplicated": corpus.images[repeated][: setting.images],
        "train": corpus.images[~repeated][: setting.images],
        "held_out": corpus.held_out[: setting.images],
    }
    shape = corpus.images.shape[1:]
    condition = null_or_none(pipeline, size=shape[1:])
    arrays = _samples(sample_key, pipeline, corpus, captions, setting, repeated)
    optima = _optima(corpus, corpus.held_out[setting.images :])
    scores: dict[str, dict[str, np.ndarray]] = {}
    for number, (name, members) in enumerate(images.items()):
        if len(members):
            keys = [jax.random.fold_in(part, number) for part in (noise_key, code_key, fit_key)]
            scores[name] = _scores(keys, pipeline, condition, members, optima, setting)
    blank = template(setting, shape)
    variables = {str(name): variable for name, variable in blank.data_vars.items()}
    for name, variable in variables.items():
        if "group" in variable.dims and not name.startswith("auroc_"):
            empty = np.full(variable.shape[1:], np.nan, variable.dtype)
            rows = [scores[group][name].mean(axis=-1) if group in scores else empty for group in GROUPS]
            arrays[name] = np.stack(rows).astype(variable.dtype)
    for name in ("error", *MEASURES):
        sign, held_out = -1 if name == "error" else 1, scores["held_out"][name]
        rows = [
            auroc(sign * scores[group][name], sign * held_out)
            if group in scores and group != "held_out"
            else np.full(len(held_out), np.nan)
            for group in GROUPS
        ]
        arrays[f"auroc_{name}"] = np.stack(rows).astype(np.float32)
    return xr.Dataset({name: (variable.dims, arrays[name]) for name, variable in variables.items()}, blank.coords)


def gap(results: xr.Dataset) -> xr.DataArray:
    r"""The generalization gap of an examination, as in :mod:`sims.sweeps.measures`.

    .. math:: 1 - E_\mathrm{train} \|D(y) - x\|^2 / E_\mathrm{held\;out} \|D(y) - x\|^2
    """
    return 1 - results.error.sel(group="train", drop=True) / results.error.sel(group="held_out", drop=True)


def draw_samples(
    key: PRNGKey,
    pipeline: Pipeline,
    corpus: Corpus,
    captions: Captions | None,
    count: int,
    num_steps: int,
    eta: float = 0.0,
) -> tuple[Float[np.ndarray, "count c h w"], Copies]:
    """Samples of DDIM in [-1, 1], and for each the training image nearest to it and whether it is a copy.

    ``eta`` is the share of fresh noise. Samples are conditioned as :func:`sample_conditions` says. Variants of an image
    count as one image.
    """
    conditions = sample_conditions(pipeline, corpus, captions, count)
    drawn = sample(
        key, pipeline.network, pipeline.schedule, count, num_steps, method="ddim", eta=eta, condition=conditions
    )
    samples = np.clip(np.asarray(drawn.x), -1, 1)
    return samples, find_copies(samples, corpus.images, groups=corpus.rows)


def sample_conditions(pipeline: Pipeline, corpus: Corpus, captions: Captions | None, count: int) -> Condition | None:
    """The condition of each of ``count`` samples: the classes, or the prompts of ``captions``, in turn."""
    if not is_conditional(pipeline):
        return None
    size = corpus.images.shape[2:]
    if captions is None:
        every = [condition_on(pipeline, None, int(label), size=size) for label in np.unique(corpus.labels)]
        order = np.arange(count) % len(every)
    else:
        every = [condition_on(pipeline, prompt, None, size=size) for prompt in captions.prompts]
        order = sampled_prompts(captions, count)
    return jax.tree.map(lambda part: part[order], stacked(every))


def sampled_prompts(captions: Captions, count: int) -> Int[np.ndarray, " count"]:
    """The index of each sample's prompt: the kinds of prompts in turn, and within a kind its prompts in turn."""
    kinds = [np.flatnonzero(np.asarray(captions.kinds) == kind) for kind in dict.fromkeys(captions.kinds)]
    return np.array([kinds[i % len(kinds)][i // len(kinds) % len(kinds[i % len(kinds)])] for i in range(count)])


def _samples(
    key: PRNGKey,
    pipeline: Pipeline,
    corpus: Corpus,
    captions: Captions | None,
    setting: ExaminationSetting,
    repeated: Bool[np.ndarray, " u"],
) -> dict[str, np.ndarray]:
    """Samples of each sampler, all from the same noise, and what they copy."""
    drawn = [
        draw_samples(key, pipeline, corpus, captions, setting.samples, setting.sampler_steps, eta)
        for eta in setting.etas
    ]
    copied = np.stack([copies.is_copy for _, copies in drawn])
    of_repeated = [repeated[copies.nearest[copies.is_copy]] for _, copies in drawn]
    return {
        "samples": np.stack([samples for samples, _ in drawn]),
        "nearest_row": np.stack([corpus.rows[copies.nearest] for _, copies in drawn]).astype(np.int32),
        "copied": copied,
        "copy_share": copied.mean(axis=1),
        "duplicated_share": np.asarray([among.mean() if len(among) else np.nan for among in of_repeated]),
    }


def _optima(corpus: Corpus, rest: Float[np.ndarray, "r c h w"]) -> tuple[Array, GaussianMixture]:
    """The training set as rows, and the Gaussian fitted to ``rest``: what the two optimal denoisers depend on."""
    train = jnp.asarray(corpus.images[training_rows(corpus)].reshape(-1, corpus.images[0].size))
    return train, fit(jnp.asarray(rest.reshape(len(rest), -1)), np.zeros(len(rest), int), ridge=1e-3)


def _scores(
    keys: Sequence[PRNGKey],
    pipeline: Pipeline,
    condition: Condition,
    members: Float[np.ndarray, "m c h w"],
    optima: tuple[Array, GaussianMixture],
    setting: ExaminationSetting,
) -> dict[str, np.ndarray]:
    """All scores of the images of a group, images last; ``keys`` are those of the noise, the codes and the fits."""
    network, schedule, (train, law) = pipeline.network, pipeline.schedule, optima
    # Every group gets the same number of images, so that the network is compiled once.
    padded = members[np.arange(setting.images) % len(members)]
    sigmas = jnp.asarray(setting.sigmas, jnp.float32)
    y, denoised, spectra = _compiled()(
        keys[0], network, schedule, condition, padded, sigmas, setting.draws, setting.jacobians
    )
    flat = jnp.asarray(padded.reshape(len(padded), -1))
    distances = _distances(y, denoised, flat, sigmas, train, law.means[0], law.covariances[0])
    batch = {"condition": condition, "batch_size": len(padded)}
    activations = codes(keys[1], network, schedule, padded, setting.taps, setting.timestep, **batch)
    spikiness = {
        name: np.stack([np.asarray(jax.vmap(measure)(jnp.asarray(activations[tap]))) for tap in setting.taps])
        for name, measure in MEASURES.items()
    }
    fits = _fitted()(
        keys[2],
        network,
        schedule,
        jnp.asarray(padded[: setting.fits]),
        setting.timestep,
        setting.source,
        setting.taps[0],
        tuple(setting.units),
        condition=condition,
    )
    scores = jax.device_get(distances | spectra | fits) | spikiness
    return {name: values[..., : len(members)] for name, values in scores.items()}


@functools.cache
def _compiled() -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
    return jax.jit(_denoised, static_argnums=(6, 7), compiler_options=compiler_options())


@functools.cache
def _fitted() -> Callable[..., dict[str, Array]]:
    static = ("source", "target", "widths")
    return jax.jit(local_fits, static_argnames=static, compiler_options=compiler_options())


def _denoised(
    key: PRNGKey,
    network: Model,
    schedule: Schedule,
    condition: Condition,
    images: Float[Array, "m c h w"],
    sigmas: Float[Array, " S"],
    draws: int,
    jacobians: int,
) -> tuple[Float[Array, "S m k d"], Float[Array, "S m k d"], dict[str, Float[Array, "S j"]]]:
    """Noisy images, the denoised ones, and scores of the Jacobians at the first images.

    Draw k of image i is the same at every level; the Jacobian is taken at draw 0.
    """
    of_one = jax.tree.map(lambda part: part[0], condition)
    denoiser = as_denoiser(network, schedule, **of_one._asdict())
    count, dim = len(images), images[0].size
    flat = images.reshape(count, dim)

    def noise(item: Int[Array, ""]) -> Float[Array, " d"]:
        return jax.random.normal(jax.random.fold_in(key, item), (dim,), flat.dtype)

    unit = jax.vmap(noise)(jnp.arange(count * draws)).reshape(count, draws, dim)
    y = flat[None, :, None, :] + sigmas[:, None, None, None] * unit[None, ...]
    levels = jnp.broadcast_to(sigmas[:, None, None], y.shape[:-1])
    denoised = jax.lax.map(lambda each: denoiser(*each), (y.reshape(-1, dim), levels.reshape(-1)), batch_size=CHUNK)

    def at_image(each: tuple[Array, Array]) -> dict[str, Array]:
        spectrum = spectrum_summary(full_jacobian(denoiser, *each, chunk_size=CHUNK), rank=1)
        return {
            "jacobian_rank": spectrum.participation_ratio,
            "jacobian_kept": spectrum.kept.astype(flat.dtype),
            "jacobian_energy": spectrum.energy,
        }

    first = min(jacobians, count)
    spectra = jax.lax.map(at_image, (y[:, :first, 0].reshape(-1, dim), levels[:, :first, 0].reshape(-1)))
    return y, denoised.reshape(y.shape), {name: value.reshape(-1, first) for name, value in spectra.items()}


@jax.jit
def _distances(
    y: Float[Array, "S m k d"],
    denoised: Float[Array, "S m k d"],
    images: Float[Array, "m d"],
    sigmas: Float[Array, " S"],
    train: Float[Array, "n d"],
    mean: Float[Array, " d"],
    covariance: Float[Array, "d d"],
) -> dict[str, Float[Array, "S m"]]:
    """Squared distances, summed over pixels, from the clean images and the two optima; means over the draws."""

    def squares(y: Float[Array, " d"], out: Float[Array, " d"], x: Float[Array, " d"], sigma: Array) -> Array:
        others = x, empirical_denoiser(y, sigma, train), gaussian_denoiser(y, sigma, mean, covariance)
        return jnp.stack([jnp.sum(jnp.square(out - other)) for other in others])

    shape = y.shape[:-1]
    clean = jnp.broadcast_to(images[None, :, None, :], y.shape).reshape(-1, images.shape[1])
    levels = jnp.broadcast_to(sigmas[:, None, None], shape).reshape(-1)
    items = y.reshape(clean.shape), denoised.reshape(clean.shape), clean, levels
    values = jax.lax.map(lambda each: squares(*each), items, batch_size=CHUNK).reshape(*shape, 3).mean(axis=2)
    return {name: values[..., k] for k, name in enumerate(DISTANCES)}
