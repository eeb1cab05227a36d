r"""The detectors of the field in one table: scores of images and prompts, higher where a model has memorized.

A detector is a :class:`Detector`: a name, what it needs, its cost, and a probe, which computes the raw quantities of a
batch; several detectors share the probe that their numbers come from. To add one, append another to the sequence::

    names = [*applicable(pipeline, prompts=False), Detector("brightness", brightness, 1, (), lambda setting: 0)]
    scores = score_batch(key, batch, names, setting)

Item i draws its noise from ``fold_in(key, i)``, so scores do not depend on how items are batched. Every probe works on
any network of the bridge; scores of images work on latents where the pipeline has an autoencoder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_positive
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.latents import from_latents
from scaling.bridge.loading import Pipeline
from scaling.detection import scores
from scaling.detection.options import NAMES, DetectionSetting
from scaling.diffusion.denoisers import as_denoiser, noise_weights
from scaling.diffusion.noise import noise_at
from scaling.diffusion.samplers import Samples, sample
from scaling.diffusion.schedules import Schedule, timestep_to_sigma, with_method
from scaling.diffusion.solvers import make_solver
from scaling.measures.codes import encode_batch
from scaling.models.model import Condition, Model
from scaling.models.taps import check_names

__all__ = [
    "DETECTORS",
    "NAMES",
    "Batch",
    "DetectionSetting",
    "Detector",
    "applicable",
    "check_setting",
    "default_taps",
    "score_batch",
]


METHOD = "ddim"
"""Of sampling, as in the sources."""


@struct.dataclass
class Batch:
    """Items that are scored together: images, prompts, or both."""

    network: Model
    schedule: Schedule
    items: Int[Array, " b"]
    """Their numbers, on which their noise depends."""
    images: Any
    """In [-1, 1], or scaled latents: (b, c, h, w); None for prompts alone."""
    condition: Condition
    """Of each item: parts have a batch axis of size b or 1."""
    unconditional: Condition
    """The null condition, a batch of one."""
    vae: Model | None = None
    """Decodes samples of latents before they are compared."""


Probe: TypeAlias = Callable[[PRNGKey, Batch, DetectionSetting], Mapping[str, Array]]
"""Raw quantities of a batch by detector: (b,), or (b, k) for k taps or noise levels."""


class Detector(NamedTuple):
    """An entry of the table."""

    name: str
    """Also of its quantity in what the probe returns."""
    probe: Probe
    sign: int
    """1 if memorized items have high values of the quantity, -1 if low ones."""
    needs: tuple[str, ...]
    """Of "image", "prompt", "derivative", "path"."""
    passes: Callable[[DetectionSetting], int]
    """Network passes per item; a derivative along a direction counts as two more."""
    options: str = ""
    """What a second axis of the quantity runs over: "tap", "sigma", or nothing."""
    source: str = ""
    """Key in the bibliography."""


def applicable(pipeline: Pipeline, *, images: bool = True, prompts: bool = True) -> tuple[Detector, ...]:
    """The detectors of the table for which the pipeline and what is given suffice."""
    reads_text = "context" in pipeline.network.apply.inputs(jnp.float32)[1]
    given = {"derivative", "path", *(["image"] if images else []), *(["prompt"] if prompts and reads_text else [])}
    return tuple(detector for detector in DETECTORS.values() if given.issuperset(detector.needs))


def default_taps(network: Model) -> tuple[str, ...]:
    """The resnets of the first up block of a UNet, as in the paper, or every block of a transformer."""
    names = network.apply.taps(np.float32)
    for pattern in ("up_blocks.0.resnets.", "transformer_blocks."):
        found = tuple(name for name in names if name.startswith(pattern) and name.removeprefix(pattern).isdecimal())
        if found:
            return found
    raise ValueError(f"name the taps to read (--taps): the network has {', '.join(list(names)[:5])}, ...")


def check_setting(setting: DetectionSetting, network: Model, num_timesteps: int) -> DetectionSetting:
    """The setting with its taps; ``ValueError`` for values out of range and taps that the network lacks."""
    for name, least in (("draws", 1), ("probes", 1), ("noises", 1), ("steps", 2), ("generations", 2), ("tiles", 1)):
        check_integer(name, getattr(setting, name), minimum=least)
    check_integer("timestep", setting.timestep, minimum=0, maximum=num_timesteps - 1)
    if not setting.sigmas:
        raise ValueError("sigmas must name at least one noise level.")
    check_positive("sigmas", np.asarray(setting.sigmas, float))
    check_positive("dimension_sigma", setting.dimension_sigma)
    for name in ("high", "low"):
        if not 0 <= getattr(setting, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, a share of T; got {getattr(setting, name)}.")
    taps = setting.taps or default_taps(network)
    check_names(network.apply.taps(np.float32), *taps)
    return DetectionSetting(**{**setting.__dict__, "taps": tuple(taps)})


def score_batch(
    key: PRNGKey, batch: Batch, detectors: Sequence[Detector], setting: DetectionSetting
) -> dict[str, np.ndarray]:
    """Scores by detector, (b,) or (b, k), higher where memorized: the sign times the raw quantity; each probe once."""
    raw: dict[str, Any] = {}
    for probe in dict.fromkeys(detector.probe for detector in detectors):
        raw |= jax.device_get(dict(probe(key, batch, setting)))
    return {detector.name: np.asarray(detector.sign * raw[detector.name], np.float32) for detector in detectors}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under ``jax.jit`` with a static last argument; compiler options are read at the first call."""

    @functools.cache
    def jitted() -> Callable[..., Any]:
        return jax.jit(function, static_argnums=2, compiler_options=compiler_options())

    @functools.wraps(function)
    def call(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> Any:
        return jitted()(key, batch, setting)

    return call


@_compiled
def spikiness_of_codes(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, "b k"]]:
    """Measures of spikiness of the codes at each tap, maxima over positions :cite:`zhang26`, section 4.1.

    Without a prompt, as in the paper; the standard deviation is over channels and divides by their number.
    """
    codes = encode_batch(
        key,
        batch.network,
        batch.schedule,
        batch.images,
        batch.items,
        setting.timestep,
        setting.taps,
        condition=batch.unconditional,
    )
    return {
        name: jnp.stack([jax.vmap(measure)(codes[tap]) for tap in setting.taps], axis=1)
        for name, measure in MEASURES.items()
    }


@_compiled
def denoising_errors(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Array]:
    r"""The denoising error at each level, and the least over levels of the error relative to :math:`\sigma^2 d`.

    The second is 1 for a network that returns its input, so that levels compare. Without a prompt.
    """
    sigmas, denoiser = jnp.asarray(setting.sigmas, jnp.float32), _denoiser(batch)

    def at_level(j: Array) -> Float[Array, " b"]:
        def of_item(item: Array, x: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, item), j)
            return scores.denoising_error(own, denoiser, x, sigmas[j], num_draws=setting.draws)

        return jax.vmap(of_item)(batch.items, batch.images)

    errors = jax.lax.map(at_level, jnp.arange(len(sigmas))).T
    scale = jnp.square(sigmas) * batch.images[0].size
    return {"error": errors, "error_min": jnp.min(errors / scale[None, :], axis=1)}


@_compiled
def dimensions(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    """The local intrinsic dimension of the model at the image :cite:`kamkari24`, its trace estimated; no prompt."""
    denoiser, sigma = _denoiser(batch), jnp.float32(setting.dimension_sigma)

    def of_item(item: Array, x: Array) -> Array:
        own = jax.random.fold_in(key, item)
        return scores.intrinsic_dimension_estimate(own, denoiser, x, sigma, num_probes=setting.probes)

    return {"intrinsic_dimension": jax.vmap(of_item)(batch.items, batch.images)}


@_compiled
def pulls_of_prompts(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    """Scores of a prompt at pure noise, means over starting noises: the size :cite:`wen24` of its pull, the sharpness
    :cite:`jeon25` along it, and the sum of its alignment, twice, and its size :cite:`asthana26`."""
    last = batch.schedule.num_train_timesteps
    low, high = (jnp.int32(share * last) for share in (setting.low, setting.high))
    sigma = timestep_to_sigma(batch.schedule, high.astype(jnp.float32))
    noise = sigma * jax.lax.rsqrt(1 + sigma * sigma)
    shape = _shape(batch)

    def of_item(item: Array, own: Condition) -> dict[str, Array]:
        null = _single(batch.unconditional)
        at_low, at_high = ((_predicted(batch, t, own), _predicted(batch, t, null)) for t in (low, high))

        def at_noise(k: Array) -> dict[str, Array]:
            x = noise_at(key, item, k, shape, jnp.float32)
            both = scores.anisotropy(at_low, at_high, x)
            return {
                "guidance_difference": both.norm,
                "sharpness": scores.sharpness(*at_high, x, noise),
                "anisotropy": 2 * both.cosine + both.norm,
            }

        return jax.tree.map(jnp.mean, jax.lax.map(at_noise, jnp.arange(setting.noises)))

    return jax.vmap(of_item)(batch.items, _each(batch))


def paths_of_prompts(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    r"""Scores along the guided path of one sample by DDIM: the mean over steps of the prompt's pull :cite:`wen24`, and
    the largest z-score of the length of a step among the steps of its own path.

    .. math:: \max_k \frac{u_k - \bar u}{\mathrm{std}_k\, u}, \qquad u_k = \|x_{k+1} - x_k\|_2

    The second is arXiv 2605.22050's, which we know second-hand: that z-scores are taken within a path is our reading.
    """
    tap = "conv_out"
    begin = _noise(key, batch)
    drawn = _sampled(key, batch, setting, begin, capture=(tap,), trajectory=True)
    count, channels = begin.shape[:2]
    # The unconditional half of the batch comes first; a network may predict a variance in further channels.
    halves = drawn.taps[tap].reshape(-1, 2, count, *drawn.taps[tap].shape[2:])[:, :, :, :channels]
    steps = make_solver(with_method(batch.schedule, METHOD), setting.steps).calls.t
    lengths = jnp.linalg.norm((halves[:, 1] - halves[:, 0]).reshape(len(halves), count, -1), axis=-1)
    _, scale = jax.vmap(functools.partial(_weights, batch.schedule))(jnp.asarray(steps, jnp.float32))
    pulls = lengths * scale[:, None]
    assert drawn.states is not None
    states = jnp.concatenate([begin[None], drawn.states]).reshape(len(halves) + 1, count, -1)
    lengths = jnp.linalg.norm(jnp.diff(states, axis=0), axis=-1)
    spread = jnp.maximum(jnp.std(lengths, axis=0), jnp.finfo(lengths.dtype).tiny)
    peaks = jnp.max((lengths - jnp.mean(lengths, axis=0, keepdims=True)) / spread[None, :], axis=0)
    return {"guidance_difference_mean": jnp.mean(pulls, axis=0), "update_peak": peaks}


def repeats_of_prompts(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    """Distances among several samples of a prompt :cite:`carlini23`: the smallest, and the mean over pairs.

    As :func:`scaling.detection.scores.tile_distance`, of pixels in [0, 1].
    """
    images = []
    for k in range(setting.generations):
        own = jax.random.fold_in(key, k)
        x = _sampled(own, batch, setting, _noise(own, batch)).x
        images.append((from_latents(batch.vae, x) if batch.vae is not None else jnp.clip(x, -1, 1)) / 2)
    apart = jax.vmap(functools.partial(scores.tile_distance, tiles=setting.tiles))
    distances = jnp.stack([apart(a, b) for a, b in itertools.combinations(images, 2)])
    return {"repeats_nearest": jnp.min(distances, axis=0), "repeats_mean": jnp.mean(distances, axis=0)}


def _table() -> dict[str, Detector]:
    image, prompt, path = ("image",), ("prompt",), ("prompt", "path")
    signs = {"participation_ratio": -1}

    def guided(setting: DetectionSetting) -> int:
        return 2 * setting.steps

    rows = [
        *(
            Detector(name, spikiness_of_codes, signs.get(name, 1), image, lambda _: 1, "tap", "zhang26")
            for name in MEASURES
        ),
        Detector("error", denoising_errors, -1, image, lambda s: s.draws, "sigma"),
        Detector("error_min", denoising_errors, -1, image, lambda s: s.draws * len(s.sigmas)),
        Detector(
            "intrinsic_dimension",
            dimensions,
            -1,
            (*image, "derivative"),
            lambda s: 1 + 2 * s.probes,
            source="kamkari24",
        ),
        Detector("guidance_difference", pulls_of_prompts, 1, prompt, lambda s: 2 * s.noises, source="wen24"),
        Detector("sharpness", pulls_of_prompts, 1, (*prompt, "derivative"), lambda s: 6 * s.noises, source="jeon25"),
        Detector("anisotropy", pulls_of_prompts, 1, prompt, lambda s: 4 * s.noises, source="asthana26"),
        Detector("guidance_difference_mean", paths_of_prompts, 1, path, guided, source="wen24"),
        Detector("update_peak", paths_of_prompts, 1, path, guided),
        *(
            Detector(name, repeats_of_prompts, -1, path, lambda s: guided(s) * s.generations, source="carlini23")
            for name in ("repeats_nearest", "repeats_mean")
        ),
    ]
    return {row.name: row for row in rows}


DETECTORS: Mapping[str, Detector] = MappingProxyType(_table())
"""The table, in the order in which it is shown."""


def _denoiser(batch: Batch) -> Callable[[Array, Any], Array]:
    own = _single(batch.unconditional)
    return as_denoiser(batch.network, batch.schedule, own.context, class_labels=own.class_labels, added=own.added)


def _predicted(batch: Batch, t: Array, own: Condition) -> scores.NoisePrediction:
    """The predicted noise of one example at a timestep."""
    a, b = _weights(batch.schedule, t.astype(jnp.float32))
    given = jax.tree.map(lambda part: part[None], own)._asdict()

    def predicted(x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        out = batch.network.apply(batch.network.params, x[None], t, **given)[0][0, : x.shape[0]]
        return a * x + b * out.astype(x.dtype)

    return predicted


def _weights(schedule: Schedule, t: Float[Array, ""]) -> tuple[Any, Any]:
    """Weights (a, b) of input and output in the predicted noise, at a timestep."""
    sigma = timestep_to_sigma(schedule, t)
    alpha = jax.lax.rsqrt(1 + sigma * sigma)
    return noise_weights(schedule.prediction_type, alpha, sigma * alpha)


def _single(condition: Condition) -> Condition:
    """A batch of one without its batch axis."""
    return jax.tree.map(lambda part: part[0], condition)


def _each(batch: Batch) -> Condition:
    return jax.tree.map(lambda part: jnp.broadcast_to(part, (len(batch.items), *part.shape[1:])), batch.condition)


def _shape(batch: Batch) -> tuple[int, ...]:
    """Of one input of the network."""
    (x, *_), _ = batch.network.apply.inputs(jnp.float32)
    return x.shape[1:]


def _noise(key: PRNGKey, batch: Batch) -> Float[Array, "b c h w"]:
    """Starting noise of each item."""
    shape = _shape(batch)
    return jax.vmap(lambda item: noise_at(key, item, 0, shape, jnp.float32))(batch.items)


def _sampled(
    key: PRNGKey, batch: Batch, setting: DetectionSetting, begin: Float[Array, "b c h w"], **more: Any
) -> Samples:
    return sample(
        key,
        batch.network,
        batch.schedule,
        len(batch.items),
        setting.steps,
        method=METHOD,
        condition=_each(batch),
        unconditional=batch.unconditional,
        guidance=setting.guidance,
        init=begin,
        **more,
    )
