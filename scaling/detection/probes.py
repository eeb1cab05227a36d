"""What the detectors compute: raw quantities of a batch of images or prompts, from any network of the bridge.

Item i draws its noise from ``fold_in(key, i)``, so quantities do not depend on how items are batched. Images are
latents where the pipeline has an autoencoder. A probe is compiled once for each setting and shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.latents import from_latents
from scaling.detection import scores
from scaling.detection.options import DetectionSetting
from scaling.diffusion.denoisers import as_denoiser, noise_weights
from scaling.diffusion.noise import noise_at
from scaling.diffusion.samplers import Samples, sample
from scaling.diffusion.schedules import Schedule, timestep_to_sigma, with_method
from scaling.diffusion.solvers import make_solver
from scaling.measures.codes import encode_batch
from scaling.models.model import Condition, Model
from sims.store import batch_rows

__all__ = [
    "Batch",
    "denoising_errors",
    "dimensions",
    "neuron_layers",
    "neurons",
    "neurons_of_prompts",
    "noises_of_prompts",
    "paths_of_prompts",
    "pulls_of_prompts",
    "repeats_of_prompts",
    "spikiness_of_codes",
    "usual_neurons",
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
    usual: Mapping[str, tuple[Array, Array]] | None = None
    """Mean and standard deviation of the neurons of each layer over ordinary prompts, of :func:`usual_neurons`."""


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
    """The local intrinsic dimension of the model at the image :cite:`kamkari24`; no prompt.

    Its trace is exact with as many probes as an image has values, and else estimated.
    """
    denoiser, sigma = _denoiser(batch), jnp.float32(setting.dimension_sigma)

    def of_item(item: Array, x: Array) -> Array:
        if setting.probes >= x.size:
            return scores.intrinsic_dimension(denoiser, x, sigma)
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
    """Distances among several samples of a prompt :cite:`carlini23`: the smallest, the mean over pairs, and the largest
    set of samples that are all alike.

    As :func:`scaling.detection.scores.tile_distance` and :func:`scaling.detection.scores.largest_clique`, of pixels in
    [0, 1].
    """
    images = []
    for k in range(setting.generations):
        own = jax.random.fold_in(key, k)
        x = _sampled(own, batch, setting, _noise(own, batch)).x
        images.append((from_latents(batch.vae, x) if batch.vae is not None else jnp.clip(x, -1, 1)) / 2)
    apart = jax.vmap(functools.partial(scores.tile_distance, tiles=setting.tiles))
    distances = np.stack([np.asarray(apart(a, b)) for a, b in itertools.combinations(images, 2)])
    square = np.zeros((len(images), len(images), distances.shape[1]))
    for (i, j), row in zip(itertools.combinations(range(len(images)), 2), distances, strict=True):
        square[i, j] = square[j, i] = row
    cliques = [scores.largest_clique(square[..., item], setting.clique) for item in range(distances.shape[1])]
    return {
        "repeats_nearest": jnp.asarray(distances.min(axis=0)),
        "repeats_mean": jnp.asarray(distances.mean(axis=0)),
        "repeats_clique": jnp.asarray(cliques, distances.dtype),
    }


@_compiled
def noises_of_prompts(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    r"""How alike the changes are that the first step makes to different starting noises :cite:`hintersdorf24`.

    .. math:: \max_{i < j} \mathrm{SSIM}(\delta_i, \delta_j), \qquad \delta_i = \epsilon(x_i, T, c) - x_i

    Each change is scaled to [0, 1] in each channel; without guidance. The text takes the plain index, the authors' code
    three scales; :func:`scaling.detection.scores.structural_similarity` takes as many as the size allows.
    """
    t = jnp.int32(setting.high * batch.schedule.num_train_timesteps)
    shape = _shape(batch)

    def of_item(item: Array, own: Condition) -> Array:
        predicted = _predicted(batch, t, own)

        def change(k: Array) -> Array:
            x = noise_at(key, item, k, shape, jnp.float32)
            delta = predicted(x) - x
            low, high = (each(delta, axis=(1, 2), keepdims=True) for each in (jnp.min, jnp.max))
            return (delta - low) / jnp.maximum(high - low, jnp.finfo(delta.dtype).tiny)

        changes = jax.lax.map(change, jnp.arange(setting.starts))
        first, second = np.triu_indices(setting.starts, 1)
        return jnp.max(jax.lax.map(lambda pair: scores.structural_similarity(*pair), (changes[first], changes[second])))

    return {"noise_similarity": jax.vmap(of_item)(batch.items, _each(batch))}


def neurons_of_prompts(key: PRNGKey, batch: Batch, setting: DetectionSetting) -> dict[str, Float[Array, " b"]]:
    r"""The largest z-score of a neuron that sees the prompt alone, and how many are outliers :cite:`hintersdorf24`.

    .. math:: z_j = \frac{a_j - \mu_j}{s_j}, \qquad \max_j |z_j|, \qquad \#\{j : |z_j| > \theta\}

    with the activity a (:func:`scaling.detection.scores.neuron_activity`) of the values of cross-attention in the down
    blocks and the middle, and its mean and standard deviation over ordinary prompts. Neurons that are the same for all
    ordinary prompts are left out.
    """
    if batch.usual is None:
        raise ValueError(
            "scores of neurons take ordinary prompts to compare with: give Batch(usual=usual_neurons(...))."
        )
    found = neurons(batch.network, _each(batch))
    z = [
        jax.vmap(lambda a, m=m, s=s: jnp.where(s > 0, jnp.abs(a - m) / jnp.where(s > 0, s, 1), 0))(found[name])
        for name, (m, s) in batch.usual.items()
    ]
    every = jnp.concatenate(z, axis=1)
    count = jnp.sum(every > setting.outlier, axis=1).astype(jnp.float32)
    return {"neuron_peak": jnp.max(every, axis=1), "neuron_count": count}


def neuron_layers(network: Model) -> tuple[str, ...]:
    """The values of cross-attention in the down blocks and the middle, in order of computation."""
    names = network.apply.taps(np.float32)
    return tuple(
        name for name in names if name.startswith(("down_blocks.", "mid_block.")) and name.endswith(".attn2.to_v")
    )


def neurons(network: Model, condition: Condition) -> dict[str, Float[Array, "b c"]]:
    """Activities by layer for each prompt of a condition; they depend on the prompt alone."""
    layers = neuron_layers(network)
    found = _values(network, condition, layers)
    return {name: jax.vmap(scores.neuron_activity)(found[name]) for name in layers}


def usual_neurons(network: Model, condition: Condition, *, batch_size: int = 32) -> dict[str, tuple[Array, Array]]:
    """Mean and standard deviation (n - 1) of activities by layer over the prompts of ``condition``.

    ``ValueError`` for fewer than two prompts, and for a network without cross-attention in its down blocks.
    """
    count = len(jax.tree.leaves(condition)[0])
    if not neuron_layers(network):
        raise ValueError("the network has no values of cross-attention (attn2.to_v) in its down blocks.")
    if count < 2:
        raise ValueError("give at least two ordinary prompts: neurons are compared with their spread over them.")
    size = min(batch_size, count)
    batches = [batch_rows(start, size, count) for start in range(0, count, size)]
    parts = [neurons(network, jax.tree.map(lambda part, rows=rows: part[rows], condition)) for rows in batches]
    every = {name: jnp.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    return {name: (jnp.mean(each, axis=0), jnp.std(each, axis=0, ddof=1)) for name, each in every.items()}


@functools.partial(jax.jit, static_argnums=2)
def _values(network: Model, condition: Condition, layers: tuple[str, ...]) -> dict[str, Array]:
    """Activations of the layers; the network's other inputs do not reach them."""
    (x, t), _ = network.apply.inputs(jnp.float32)
    count = len(jax.tree.leaves(condition)[0])
    zeros = jnp.zeros((count, *x.shape[1:]), x.dtype)
    return network.apply(network.params, zeros, jnp.zeros(t.shape[:0], t.dtype), **condition._asdict(), capture=layers)[
        1
    ]


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
