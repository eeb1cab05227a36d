"""The invariant contamination ratio of a whole model, from views of its training images; see
:mod:`scaling.measures.contamination`.

A view of an image is a draw of the noise at a timestep, and at choice a draw of its mirror image and of a shift by one
pixel; features are the activations at a tap, averaged over positions, without prompt or class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_seed
from dae_theory.types import PRNGKey
from scaling.bridge.identity import identify
from scaling.bridge.loading import Pipeline
from scaling.detection.detectors import default_taps
from scaling.measures.codes import encode_batch
from scaling.measures.contamination import contamination_interval, view_covariances
from scaling.measures.features import TIMESTEP, unprompted
from scaling.measures.neighbors import Training, rows_of
from scaling.models.taps import check_names
from scaling.study.settings import AUGMENTATIONS, AuditSetting
from sims import store
from sims.store import fill

__all__ = ["LEAST", "RIDGE", "Plan", "augmented", "contamination", "plan"]

LEAST = 4
"""The least number of degrees of freedom n(m - 1) for each feature."""

RIDGE = 1e-6
"""The ridge, as a part of the mean variance between views: features that are always 0 count for nothing."""

AUGMENT = 2
"""Number of the call whose draws augment an item; 0 and 1 are those of its noise and of its latents."""


class Plan(NamedTuple):
    """What is read, and how."""

    tap: str
    timestep: int
    images: Int[np.ndarray, " n"]
    """Numbers of the training images."""
    views: int
    dim: int
    encode: Callable[[PRNGKey, Float[Array, "b c h w"], Int[Array, " b"]], Float[Array, "b d"]]
    """The features of one view of images with these numbers."""


def augmented(key: PRNGKey, image: Float[Array, "c h w"], augment: tuple[str, ...]) -> Float[Array, "c h w"]:
    """The image, with ``flip`` mirrored with probability 1/2, with ``shift`` moved by -1, 0 or 1 pixels along each
    axis; what comes in from outside repeats the border.
    """
    mirror, shift = jax.random.split(key)
    if "flip" in augment:
        image = jnp.where(jax.random.bernoulli(mirror), image[..., ::-1], image)
    if "shift" in augment:
        padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
        top, left = jax.random.randint(shift, (2,), 0, 3)
        image = jax.lax.dynamic_slice(padded, (jnp.zeros_like(top), top, left), image.shape)
    return image


def plan(pipeline: Pipeline, training: Training, setting: AuditSetting) -> Plan:
    """What :func:`contamination` reads; computes nothing.

    ``ValueError`` for settings out of range, a tap that the network lacks, a network with classes but no null class,
    and fewer images and views than :data:`LEAST` times the features.
    """
    count = min(check_integer("contamination", setting.contamination, minimum=3), training.images.count)
    views = check_integer("views", setting.views, minimum=2)
    if unknown := set(setting.augment) - {*AUGMENTATIONS}:
        raise ValueError(f"augment names {', '.join(sorted(unknown))}; known are {', '.join(AUGMENTATIONS)}.")
    network = pipeline.network
    tap = setting.contamination_tap or default_taps(network)[0]
    check_names(network.apply.taps(jnp.float32), tap)
    timestep = min(TIMESTEP, pipeline.schedule.num_train_timesteps - 1)
    condition = unprompted(pipeline, size=training.shape[1:])
    chosen = np.linspace(0, training.images.count - 1, count).round().astype(np.int64)
    how = {"vae": pipeline.vae, "condition": condition, "tap": tap, "augment": setting.augment}

    def encode(key: PRNGKey, images: Float[Array, "b c h w"], items: Int[Array, " b"]) -> Float[Array, "b d"]:
        return _of_view(key, network, pipeline.schedule, images, items, timestep, **how)

    shapes = jax.ShapeDtypeStruct((1, *training.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    dim = jax.eval_shape(encode, jax.random.key(0), *shapes).shape[1]
    if count * (views - 1) < LEAST * dim:
        raise ValueError(
            f"{count} training images in {views} views are few for the {dim} features of {tap}: the images times "
            f"(views - 1) must be at least {LEAST * dim}; give --contamination or --views more, or a narrower "
            "--contamination-tap."
        )
    return Plan(tap, timestep, chosen, views, dim, encode)


def contamination(
    pipeline: Pipeline,
    training: Training,
    out: str | Path,
    setting: AuditSetting,
    *,
    seed: int = 0,
    batch_size: int = 64,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The ratio with its interval as JSON values, from ``setting.contamination`` training images, evenly spaced.

    Features are computed in the run's folder ``out``; the same call resumes. View a of image i draws from
    ``fold_in(fold_in(key, a), i)``. ``ValueError`` as for :func:`plan`, and for features that views do not change.
    """
    tap, timestep, chosen, views, dim, encode = plan(pipeline, training, setting)
    key, augment = jax.random.key(check_seed("seed", seed)), list(setting.augment)

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
        own = chosen[rows]
        images = jnp.asarray(rows_of(training.images, own.tolist()).reshape(-1, *training.shape))
        items = jnp.asarray(own.astype(np.int32))
        return {"views": np.stack([encode(jax.random.fold_in(key, a), images, items) for a in range(views)], axis=1)}

    spec = {
        "command": "views",
        "model": identify(pipeline),
        "training": training.digest,
        "tap": tap,
        "timestep": timestep,
        "augment": augment,
        "seed": seed,
    }
    coords = {"image": chosen.tolist(), "view": list(range(views)), "feature": list(range(dim))}
    template = store.blank(coords, {"views": (("image", "view", "feature"), np.float32)})
    size = min(check_integer("batch_size", batch_size, minimum=1), len(chosen))
    fill(out, spec, template, size, compute, provenance=provenance, on_batch=on_batch)
    features = store.load(out).views.values
    spread = float(np.trace(view_covariances(features)[0])) / dim
    if spread == 0:
        raise ValueError(f"the features of {tap} do not differ between views; choose another --contamination-tap.")
    ratio = contamination_interval(features, ridge=RIDGE * spread)
    return {
        "tap": tap,
        "timestep": timestep,
        "images": len(chosen),
        "views": views,
        "augment": augment,
        **ratio._asdict(),
    }


@functools.partial(jax.jit, static_argnames=("tap", "augment"))
def _of_view(
    key: PRNGKey,
    network: Any,
    schedule: Any,
    images: Float[Array, "b c h w"],
    items: Int[Array, " b"],
    timestep: Any,
    *,
    vae: Any,
    condition: Any,
    tap: str,
    augment: tuple[str, ...],
) -> Float[Array, "b d"]:
    draws = jax.vmap(lambda item: jax.random.fold_in(jax.random.fold_in(key, item), AUGMENT))(items)
    images = jax.vmap(functools.partial(augmented, augment=augment))(draws, images)
    how = {"vae": vae, "condition": condition, "pool": "mean"}
    return encode_batch(key, network, schedule, images, items, timestep, (tap,), **how)[tap]
