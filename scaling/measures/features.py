"""Images as unit vectors by which they are compared: activations of the model itself, or CLIP's image vectors.

A representation is a function of the image alone, normalized to unit length, so that the distance of two images is a
chord, from 0 for equal features over √2 for orthogonal ones to 2. Those of a training set are computed once, by blocks,
into a run that resumes (:func:`unit_features`), and searched by :mod:`scaling.measures.neighbors`.

Mirror images are rows of their own behind all images: ``nearest_two(..., variants=2)`` searches both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dae_theory.checks import check_integer, check_seed
from scaling.bridge.conditioning import null_or_none
from scaling.bridge.identity import identify, identify_model
from scaling.bridge.loading import Pipeline, load_model
from scaling.measures.codes import encode_batch
from scaling.measures.neighbors import Images, Training, of_array, rows_of
from scaling.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from scaling.models.layers import widened
from scaling.models.model import Apply, Condition, Model
from scaling.models.taps import check_names
from sims import store
from sims.store import fill

__all__ = [
    "PIXELS",
    "TIMESTEP",
    "Representation",
    "clip_features",
    "clip_pixels",
    "mirrored",
    "of_source",
    "tap_features",
    "unit_features",
    "unprompted",
]

PIXELS = "pixels"
"""The source of those who compare pixels."""

TIMESTEP = 50
"""Where taps are read, as by ``detect`` and ``extract``; on shorter schedules the last timestep."""

FIXED = 2**32 - 1
"""Number of the item whose noise all images get: no sample and no image has it."""


class Representation(NamedTuple):
    """Unit vectors of images."""

    name: str
    """In words."""
    identity: dict[str, Any]
    """On what the vectors depend, as JSON."""
    encode: Callable[[Float[Array, "b c h w"]], Float[Array, "b d"]]
    """Of images in [-1, 1]; compiled."""


def of_source(source: str, pipeline: Pipeline, *, seed: int = 0) -> Representation | None:
    """A representation by its name: ``tap:NAME``, or a folder of CLIP's weights; None for ``pixels``.

    ``ValueError`` for any other name, and as for :func:`tap_features` and :func:`clip_features`.
    """
    if source == PIXELS:
        return None
    kind, _, name = source.partition(":")
    if kind == "tap":
        return tap_features(pipeline, name, seed=seed)
    if not Path(source).exists():
        raise ValueError(f"features {source!r}: neither {PIXELS}, nor tap:NAME, nor a folder of CLIP's vision weights.")
    return clip_features(source)


def tap_features(pipeline: Pipeline, tap: str, *, timestep: int | None = None, seed: int = 0) -> Representation:
    r"""Activations of the model itself, averaged over positions: :math:`h / \|h\|` with h = mean of the tap.

    They are read at ``timestep`` (:data:`TIMESTEP`), without prompt or class, and with one draw of the noise for all
    images, so that equal images have equal features. ``ValueError`` for a tap that the network lacks, a timestep
    outside [0, T), and a network with classes but no null class.
    """
    network, schedule, vae = pipeline.network, pipeline.schedule, pipeline.vae
    check_names(network.apply.taps(jnp.float32), tap)
    last = schedule.num_train_timesteps - 1
    t = check_integer("timestep", min(TIMESTEP, last) if timestep is None else timestep, minimum=0, maximum=last)
    key = jax.random.fold_in(jax.random.key(check_seed("seed", seed)), FIXED)
    unprompted(pipeline)

    @functools.cache
    def condition(size: tuple[int, int]) -> Condition:
        return unprompted(pipeline, size=size)

    def encode(images: Float[Array, "b c h w"]) -> Float[Array, "b d"]:
        own = condition((images.shape[2], images.shape[3]))
        return _of_tap(key, network, schedule, images, t, taps=(tap,), vae=vae, condition=own)

    identity = {"tap": tap, "timestep": t, "pool": "mean", "seed": seed, "model": identify(pipeline)}
    return Representation(f"the model's own features (tap {tap}, timestep {t}, spatial mean)", identity, encode)


def clip_features(folder: str | Path) -> Representation:
    r"""CLIP's image vectors :cite:`radford21` from a folder of its weights: :math:`h / \|h\|`.

    The folder holds a config.json of ``CLIPVisionModel``, ``CLIPVisionModelWithProjection`` or ``CLIPModel`` with
    safetensors, or has such a folder ``image_encoder``, as pipelines do. Images are prepared as :func:`clip_pixels`
    says. ``ValueError`` for another network, and as for :func:`scaling.bridge.loading.load_model`.
    """
    folder = Path(folder)
    inside = folder.is_dir() and not (folder / "config.json").exists() and (folder / "image_encoder").is_dir()
    model = load_model(folder, "image_encoder" if inside else None, "float32")
    config, kind = model.config, model.apply.architecture
    if kind not in ("clip", "clip_vision"):
        raise ValueError(f"features {folder}: a {kind} model has no image vectors; give CLIP's vision weights.")
    vision = config.vision if kind == "clip" else config
    apply = model.apply.of("encode_image") if kind == "clip" else model.apply
    if vision.image_channels != 3:
        raise ValueError(f"features {folder}: images have {vision.image_channels} channels; those of CLIP are colored.")

    def encode(images: Float[Array, "b c h w"]) -> Float[Array, "b d"]:
        return _of_clip(model.params, images, apply=apply, side=vision.image_size)

    return Representation(f"CLIP's image vectors ({folder})", {"clip": identify_model(model)}, encode)


def clip_pixels(images: Float[Array, "b c h w"], side: int) -> Float[Array, "b 3 side side"]:
    """Images in [-1, 1] as CLIP takes them: colored, cubically resampled to a shorter side of ``side``, cropped about
    the center, and normalized.

    ``ValueError`` for images that are neither gray nor colored.
    """
    b, c, h, w = images.shape
    if c not in (1, 3):
        raise ValueError(f"images have {c} channels: CLIP takes gray or colored ones.")
    x = jnp.broadcast_to((images + 1) / 2, (b, 3, h, w))
    high, wide = max(side, side * h // w), max(side, side * w // h)
    x = jnp.clip(jax.image.resize(x, (b, 3, high, wide), "cubic", antialias=True), 0, 1)
    top, left = (high - side) // 2, (wide - side) // 2
    x = x[:, :, top : top + side, left : left + side]
    mean, std = (jnp.asarray(each, x.dtype)[None, :, None, None] for each in (IMAGE_MEAN, IMAGE_STD))
    return (x - mean) / std


def unprompted(pipeline: Pipeline, *, size: tuple[int, int] | None = None) -> Condition:
    """The condition without prompt or class; ``ValueError`` for a network with classes but no null class."""
    try:
        return null_or_none(pipeline, size=size)
    except ValueError as error:
        raise ValueError(
            "features are read without a class, and the network has no null class: compare pixels, or CLIP's vectors."
        ) from error


def mirrored(training: Training) -> Images:
    """All images, then all their mirror images, in pixels."""
    images, count = training.images, training.images.count

    def flipped(start: int, stop: int) -> Float32[np.ndarray, "k d"]:
        rows = images.read(start, stop)
        return np.ascontiguousarray(rows.reshape(-1, *training.shape)[..., ::-1]).reshape(rows.shape)

    def read(start: int, stop: int) -> Float32[np.ndarray, "k d"]:
        parts = images.read(min(start, count), min(stop, count)), flipped(max(start - count, 0), max(stop - count, 0))
        return np.concatenate(parts)

    return Images(read, 2 * count, images.dim)


def unit_features(
    training: Training,
    representation: Representation,
    out: str | Path,
    *,
    mirrors: bool = False,
    batch_size: int = 64,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Images:
    """The features of a training set in the run's folder ``out``; the same call resumes.

    Four bytes a number are then held in memory. With ``mirrors`` those of the mirror images follow, as in
    :func:`mirrored`. ``ValueError`` for a folder that holds something else.
    """
    count, shape = training.images.count, training.shape
    variants = 2 if mirrors else 1
    size = min(check_integer("batch_size", batch_size, minimum=1), count)

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
        images = rows_of(training.images, rows.tolist()).reshape(-1, *shape)
        views = [representation.encode(jnp.asarray(images[..., :: 1 - 2 * k])) for k in range(variants)]
        return {"features": np.stack([np.asarray(view, np.float32) for view in views], axis=1)}

    example = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    dim = jax.eval_shape(representation.encode, example).shape[1]
    spec = {
        "command": "features",
        "training": training.digest,
        "features": representation.identity,
        "variants": variants,
    }
    coords = {"image": list(range(count)), "variant": list(range(variants)), "feature": list(range(dim))}
    template = store.blank(coords, {"features": (("image", "variant", "feature"), np.float32)})
    fill(out, spec, template, size, compute, provenance=provenance, on_batch=on_batch)
    values = store.load(out).features.values
    return of_array(np.ascontiguousarray(values.swapaxes(0, 1)).reshape(variants * count, dim))


def _unit(h: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of unit length; features that are all 0 stay so."""
    h = widened(h)
    # Divided by the largest first: squares may overflow or vanish.
    largest = jnp.max(jnp.abs(h), axis=1, keepdims=True)
    h = h / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(h, axis=1, keepdims=True)
    return h / jnp.where(length > 0, length, 1)


@functools.partial(jax.jit, static_argnames=("taps",))
def _of_tap(
    key: Any,
    network: Model,
    schedule: Any,
    images: Float[Array, "b c h w"],
    timestep: Any,
    *,
    taps: tuple[str, ...],
    vae: Model | None,
    condition: Condition,
) -> Float[Array, "b d"]:
    items = jnp.zeros(len(images), jnp.int32)
    how = {"vae": vae, "condition": condition, "pool": "mean"}
    (found,) = encode_batch(key, network, schedule, images, items, timestep, taps, **how).values()
    return _unit(found)


@functools.partial(jax.jit, static_argnames=("apply", "side"))
def _of_clip(
    params: Mapping[str, Array], images: Float[Array, "b c h w"], *, apply: Apply, side: int
) -> Float[Array, "b d"]:
    out, _ = apply(params, clip_pixels(images, side))
    return _unit(out.pooled)
