r"""What a model that was trained here does with the images it was trained on, and with others.

Whom its samples copy (:mod:`scaling.measures.copies`), how spiky its codes are, how well spikiness and error tell trained images
from held-out ones, how far its denoiser is from the optimum of the training set and from that of the population, and
the rank of its Jacobian: for images that were repeated, images that were there once, and images held out. One part of
the held-out images is looked at; the population's optimum, a Wiener filter, is fitted to the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory import empirical_denoiser, gaussian_denoiser
from dae_theory.checks import check_integer, check_positive
from dae_theory.mixture import fit
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.conditioning import condition_on, null_condition
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
from scaling.training.captions import Captions
from scaling.training.corpus import GROUPS, Corpus, membership, training_rows

__all__ = [
    "STANDARD",
    "Setting",
    "check",
    "draw_samples",
    "examine",
    "sample_conditions",
    "sampled_prompts",
    "variables",
]

CHUNK = 64
"""Noisy images in work at once."""


class Setting(NamedTuple):
    """How much is looked at; ``ValueError`` from :func:`examine` for what is out of range."""

    samples: int = 200
    """Drawn, to count copies."""
    sampler_steps: int = 40
    etas: tuple[float, ...] = (0.0, 1.0)
    """Of the samplers: 0 is DDIM, without fresh noise, 1 is ancestral sampling :cite:`song21ddim`."""
    images: int = 100
    """Of each group at most."""
    jacobians: int = 8
    """Of them, those whose Jacobians are computed."""
    draws: int = 4
    """Of noise, for each image and level."""
    sigmas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Noise levels in the units of :mod:`dae_theory`."""
    timestep: int = 50
    """At which codes are read."""
    taps: tuple[str, ...] = ("up_blocks.0.resnets.0", "up_blocks.0.resnets.1")
    """Where codes are read, the largest value over space of each channel."""
    fits: int = 2
    """Of the images, those around which two-layer autoencoders are fitted (:mod:`scaling.measures.local_fits`)."""
    units: tuple[int, ...] = (1, 4, 16)
    """Of those autoencoders."""
    source: str = "mid_block"
    """From where to the first of ``taps`` a block is fitted."""


STANDARD = Setting()


def variables(setting: Setting, image_shape: tuple[int, int, int]) -> dict[str, tuple[dict[str, list[Any]], Any]]:
    """Of everything that :func:`examine` returns the dimensions, with their labels, and the dtype."""
    etas, samples = {"eta": list(setting.etas)}, {"sample": list(range(setting.samples))}
    pixels = {axis: list(range(side)) for axis, side in zip(("channel", "height", "width"), image_shape, strict=True)}
    group, levels, taps = {"group": list(GROUPS)}, {"sigma": list(setting.sigmas)}, {"tap": list(setting.taps)}
    at_levels, at_taps = (group | levels, np.float32), (group | taps, np.float32)
    fits = group | {"fitted": list(FITTED), "units": list(setting.units)}
    return {
        "samples": (etas | samples | pixels, np.float32),
        "nearest_row": (etas | samples, np.int32),
        "copied": (etas | samples, np.bool_),
        "copy_share": (etas, np.float32),
        "duplicated_share": (etas, np.float32),
        **dict.fromkeys(("error", "distance_to_empirical", "distance_to_population", "auroc_error"), at_levels),
        **dict.fromkeys(("jacobian_rank", "jacobian_kept", "jacobian_energy"), at_levels),
        **dict.fromkeys([*MEASURES, *(f"auroc_{name}" for name in MEASURES)], at_taps),
        **dict.fromkeys(SCORES, (fits, np.float32)),
    }


def check(setting: Setting, num_timesteps: int, held_out: int) -> None:
    """``ValueError`` for settings out of range, and for fewer held-out images than are looked at and two more."""
    for name in ("samples", "images", "jacobians", "draws", "fits"):
        check_integer(name, getattr(setting, name), minimum=1)
    for name in ("etas", "units", "taps"):
        if not getattr(setting, name) or len(set(getattr(setting, name))) < len(getattr(setting, name)):
            raise ValueError(f"{name} must name at least one, and none twice; got {getattr(setting, name)}.")
    for units in setting.units:
        check_integer("units", units, minimum=1)
    if not all(0 <= eta <= 1 for eta in setting.etas):
        raise ValueError(f"etas must lie in [0, 1], got {', '.join(map(str, setting.etas))}.")
    check_integer("timestep", setting.timestep, minimum=0, maximum=num_timesteps - 1)
    check_positive("sigmas", np.asarray(setting.sigmas, float))
    if held_out < setting.images + 2:
        raise ValueError(
            f"{held_out} images are held out: {setting.images} are looked at and the population is fitted to the rest; "
            "hold out more, or look at fewer (--images)."
        )


def examine(
    key: PRNGKey, pipeline: Pipeline, corpus: Corpus, setting: Setting, captions: Captions | None = None
) -> dict[str, np.ndarray]:
    """Everything that :func:`variables` lists, of a model and the images that it was trained on.

    For every sampler ``copied`` says which samples are copies, ``nearest_row`` the data set's row of the nearest
    training image, ``copy_share`` how many are copies, ``duplicated_share`` how many of those are of a repeated image
    (NaN without copies). ``error`` is ``E‖D(y) − x‖²``, the distances ``E‖D(y) − D'(y)‖²``, sums over pixels;
    ``jacobian_rank`` is the participation ratio of the squared singular values, ``jacobian_kept`` the number of
    singular values above 1/2.
    Scores of spikiness are means over the images of a group; ``auroc_...`` is the probability that an image of the
    group has a higher score, or a lower error, than a held-out one; ``fit_...`` are means over the first images of
    what :func:`scaling.measures.local_fits.local_fits` finds. Empty groups are NaN.

    A network with classes samples them in turn, one that reads a text the prompts of ``captions``, every kind equally
    often; both are looked at without a condition. ``ValueError`` as for :func:`check`.
    """
    check(setting, pipeline.schedule.num_train_timesteps, len(corpus.held_out))
    sample_key, noise_key, code_key = jax.random.split(key, 3)
    # Beside the split: one part more would change the draws of the others.
    fit_key = jax.random.fold_in(key, 3)
    network, schedule = pipeline.network, pipeline.schedule
    repeated = np.isin(corpus.rows, membership(corpus)["duplicated"])
    images = {
        "duplicated": corpus.images[repeated][: setting.images],
        "train": corpus.images[~repeated][: setting.images],
        "held_out": corpus.held_out[: setting.images],
    }
    rest = corpus.held_out[setting.images :]
    condition = null_condition(pipeline, size=corpus.images.shape[2:]) if _conditional(pipeline) else Condition()
    drawn = [
        # The same noise for every sampler.
        draw_samples(sample_key, pipeline, corpus, captions, setting.samples, setting.sampler_steps, eta)
        for eta in setting.etas
    ]
    copied = np.stack([copies.is_copy for _, copies in drawn])
    of_repeated = [repeated[copies.nearest[copies.is_copy]] for _, copies in drawn]
    found = {
        "samples": np.stack([samples for samples, _ in drawn]),
        "nearest_row": np.stack([corpus.rows[copies.nearest] for _, copies in drawn]).astype(np.int32),
        "copied": copied,
        "copy_share": copied.mean(axis=1),
        "duplicated_share": np.asarray([among.mean() if len(among) else np.nan for among in of_repeated]),
    }
    train = jnp.asarray(corpus.images[training_rows(corpus)].reshape(-1, corpus.images[0].size))
    law = fit(jnp.asarray(rest.reshape(len(rest), -1)), np.zeros(len(rest), int), ridge=1e-3)
    sigmas = jnp.asarray(setting.sigmas, jnp.float32)
    scores: dict[str, dict[str, np.ndarray]] = {}
    for number, (name, members) in enumerate(images.items()):
        if not len(members):
            continue
        # Of one shape, whatever the group: the network is compiled once.
        padded = members[np.arange(setting.images) % len(members)]
        keys = [jax.random.fold_in(part, number) for part in (noise_key, code_key)]
        y, denoised, spectra = _compiled()(
            keys[0], network, schedule, condition, padded, sigmas, setting.draws, setting.jacobians
        )
        flat = jnp.asarray(padded.reshape(len(padded), -1))
        distances = _distances(y, denoised, flat, sigmas, train, law.means[0], law.covariances[0])
        read = codes(
            keys[1],
            network,
            schedule,
            padded,
            setting.taps,
            setting.timestep,
            condition=condition,
            batch_size=len(padded),
        )
        spikiness = {
            measure: np.stack([np.asarray(jax.vmap(of_code)(jnp.asarray(read[tap]))) for tap in setting.taps])
            for measure, of_code in MEASURES.items()
        }
        fits = _fitted()(
            jax.random.fold_in(fit_key, number),
            network,
            schedule,
            jnp.asarray(padded[: setting.fits]),
            setting.timestep,
            setting.source,
            setting.taps[0],
            tuple(setting.units),
            condition=condition,
        )
        every = jax.device_get(distances | spectra | fits) | spikiness
        scores[name] = {score: values[..., : len(members)] for score, values in every.items()}
    template = variables(setting, corpus.images.shape[1:])
    for score, (dims, dtype) in template.items():
        if "group" in dims and not score.startswith("auroc_"):
            blank = np.full([len(labels) for dim, labels in dims.items() if dim != "group"], np.nan, dtype)
            rows = [scores[name][score].mean(axis=-1) if name in scores else blank for name in GROUPS]
            found[score] = np.stack(rows).astype(dtype)
    for score in ("error", *MEASURES):
        sign, held_out = -1 if score == "error" else 1, scores["held_out"][score]
        rows = [
            auroc(sign * scores[name][score], sign * held_out)
            if name in scores and name != "held_out"
            else np.full(len(held_out), np.nan)
            for name in GROUPS
        ]
        found[f"auroc_{score}"] = np.stack(rows).astype(np.float32)
    return found


def _conditional(pipeline: Pipeline) -> bool:
    return bool(pipeline.network.apply.inputs(jnp.float32)[1])


def draw_samples(
    key: PRNGKey,
    pipeline: Pipeline,
    corpus: Corpus,
    captions: Captions | None,
    count: int,
    num_steps: int,
    eta: float = 0.0,
) -> tuple[Float[np.ndarray, "count c h w"], Copies]:
    """Samples in [-1, 1], conditioned as :func:`sample_conditions` says, and the training images they may copy.

    By DDIM with fresh noise of share ``eta``. Variants of an image count as one.
    """
    conditions = sample_conditions(pipeline, corpus, captions, count)
    drawn = sample(
        key, pipeline.network, pipeline.schedule, count, num_steps, method="ddim", eta=eta, condition=conditions
    )
    samples = np.clip(np.asarray(drawn.x), -1, 1)
    return samples, find_copies(samples, corpus.images, groups=corpus.rows)


def sample_conditions(pipeline: Pipeline, corpus: Corpus, captions: Captions | None, count: int) -> Condition | None:
    """What each of ``count`` samples is conditioned on: the classes, or the prompts of ``captions``, by turns."""
    if not _conditional(pipeline):
        return None
    size = corpus.images.shape[2:]
    if captions is None:
        every = [condition_on(pipeline, None, int(label), size=size) for label in np.unique(corpus.labels)]
        order = np.arange(count) % len(every)
    else:
        every = [condition_on(pipeline, prompt, None, size=size) for prompt in captions.prompts]
        order = sampled_prompts(captions, count)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *every)


def sampled_prompts(captions: Captions, count: int) -> Int[np.ndarray, " count"]:
    """The prompt of each of ``count`` samples: kinds by turns, and of each kind its prompts by turns."""
    kinds = [np.flatnonzero(np.asarray(captions.kinds) == kind) for kind in dict.fromkeys(captions.kinds)]
    return np.array([kinds[i % len(kinds)][i // len(kinds) % len(kinds[i % len(kinds)])] for i in range(count)])


@functools.cache
def _compiled() -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
    return jax.jit(_look, static_argnums=(6, 7), compiler_options=compiler_options())


@functools.cache
def _fitted() -> Callable[..., dict[str, Array]]:
    static = ("source", "target", "widths")
    return jax.jit(local_fits, static_argnames=static, compiler_options=compiler_options())


def _look(
    key: PRNGKey,
    network: Model,
    schedule: Schedule,
    condition: Condition,
    images: Float[Array, "m c h w"],
    sigmas: Float[Array, " S"],
    draws: int,
    jacobians: int,
) -> tuple[Float[Array, "S m k d"], Float[Array, "S m k d"], dict[str, Float[Array, "S j"]]]:
    """Noisy images and what the network makes of them, and of the first images what their Jacobians say.

    Draw k of image i is the same at every level; the Jacobian is at the first.
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
    found = jax.lax.map(lambda each: denoiser(*each), (y.reshape(-1, dim), levels.reshape(-1)), batch_size=CHUNK)

    def at_image(each: tuple[Array, Array]) -> dict[str, Array]:
        spectrum = spectrum_summary(full_jacobian(denoiser, *each, chunk_size=CHUNK), rank=1)
        return {
            "jacobian_rank": spectrum.participation_ratio,
            "jacobian_kept": spectrum.kept.astype(flat.dtype),
            "jacobian_energy": spectrum.energy,
        }

    first = min(jacobians, count)
    spectra = jax.lax.map(at_image, (y[:, :first, 0].reshape(-1, dim), levels[:, :first, 0].reshape(-1)))
    return y, found.reshape(y.shape), {name: value.reshape(-1, first) for name, value in spectra.items()}


@jax.jit
def _distances(
    y: Float[Array, "S m k d"],
    found: Float[Array, "S m k d"],
    images: Float[Array, "m d"],
    sigmas: Float[Array, " S"],
    train: Float[Array, "n d"],
    mean: Float[Array, " d"],
    covariance: Float[Array, "d d"],
) -> dict[str, Float[Array, "S m"]]:
    """Squared distances of the denoised images from the clean ones and from the two optima, means over the draws."""

    def squares(y: Float[Array, " d"], out: Float[Array, " d"], x: Float[Array, " d"], sigma: Array) -> Array:
        others = x, empirical_denoiser(y, sigma, train), gaussian_denoiser(y, sigma, mean, covariance)
        return jnp.stack([jnp.sum(jnp.square(out - other)) for other in others])

    shape = y.shape[:-1]
    clean = jnp.broadcast_to(images[None, :, None, :], y.shape).reshape(-1, images.shape[1])
    levels = jnp.broadcast_to(sigmas[:, None, None], shape).reshape(-1)
    items = y.reshape(clean.shape), found.reshape(clean.shape), clean, levels
    values = jax.lax.map(lambda each: squares(*each), items, batch_size=CHUNK).reshape(*shape, 3).mean(axis=2)
    names = "error", "distance_to_empirical", "distance_to_population"
    return {name: values[..., k] for k, name in enumerate(names)}
