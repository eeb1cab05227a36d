r"""Images to codes: activations of a denoising network at noisy images.

Noise of timestep t is added to an image x (C, H, W) in [-1, 1], or to its latents z, and the network's activations at
the taps are pooled over positions:

.. math:: z_t = \sqrt{\bar\alpha_t}\, z + \sqrt{1 - \bar\alpha_t}\, \epsilon_i, \qquad
          \mathrm{code}_c = \max_{h, w}\, \mathrm{tap}(z_t)_{c, h, w}

Image number i draws its noise from ``noise_at(key, i, 0)`` (:mod:`scaling.diffusion.noise`), so that codes do not
depend on how images are batched. The forward pass ends at the last of the taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, ArrayLike, Float, Int, Num

from dae_theory.checks import check_integer, check_seed
from dae_theory.types import PRNGKey
from scaling.bridge.conditioning import condition_on, image_channels, pixel_size
from scaling.bridge.identity import identify
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import Pipeline
from scaling.diffusion.noise import noise_at
from scaling.diffusion.ranges import check_range, scaled
from scaling.diffusion.schedules import Schedule, add_noise
from scaling.measures.options import LATENTS, POOLS, Latent, Pool
from scaling.models.layers import widened
from scaling.models.model import Condition, Model
from sims import store
from sims.data import readers
from sims.data.folders import split_name, with_options
from sims.store import batch_rows, checksum, fill
from sims.store.chunks import RESULTS

__all__ = ["Latent", "Pool", "codes", "encode_batch", "extract", "pictures", "pooled", "read_images"]

AXES = {1: ("channel",), 2: ("token", "channel"), 3: ("channel", "height", "width")}


def encode_batch(
    key: PRNGKey,
    model: Model,
    schedule: Schedule,
    images: Num[Array, "b c h w"],
    items: Int[Array, " b"],
    timestep: ArrayLike,
    taps: tuple[str, ...],
    *,
    vae: Model | None = None,
    condition: Condition | None = None,
    pool: Pool = "max",
    latent: Latent = "mean",
) -> dict[str, Array]:
    """Codes of one batch by tap: (B, C), or with ``pool`` "none" the whole activations; traceable, for ``jax.jit``.

    Args:
        key: of the noise.
        model: the denoising network.
        schedule: its noise schedule.
        images: in [-1, 1], or bytes from 0 to 255.
        items: the images' numbers, which their noise depends on.
        timestep: an integer in [0, T).
        taps: modules whose activations to read.
        vae: if given, the network takes its scaled latents.
        condition: each part with a batch axis of size B or 1.
        pool: how to pool over positions.
        latent: which latents to take; "sample" draws from ``noise_at(key, i, 1)``.

    Codes are at least float32. ``ValueError`` for a tap that the model lacks, or that has no batch axis.
    """
    check_range("images", images, 3 if vae is not None else images.shape[1])
    x = images = scaled(images)
    if vae is not None:
        x = to_latents(vae, images)
        x = to_latents(vae, images, _noise(key, items, 1, x)) if latent == "sample" else x
    x = add_noise(schedule, x, _noise(key, items, 0, x), timestep)
    given = jax.tree.map(lambda part: jnp.broadcast_to(part, (len(items), *part.shape[1:])), condition or Condition())
    _, activations = model.apply(model.params, x, timestep, **given._asdict(), capture=taps)
    for name, activation in activations.items():
        if activation.shape[0] != len(items):
            raise ValueError(f"the tap {name!r} of shape {activation.shape} has no axis of the {len(items)} images.")
    return {name: pooled(activations[name], pool) for name in taps}


def codes(
    key: PRNGKey,
    model: Model,
    schedule: Schedule,
    images: Num[Array | np.ndarray, "n c h w"],
    taps: Sequence[str],
    timestep: int,
    *,
    vae: Model | None = None,
    condition: Condition | None = None,
    pool: Pool = "max",
    latent: Latent = "mean",
    batch_size: int = 8,
    first: int = 0,
) -> dict[str, np.ndarray]:
    """Codes of many images by tap, ``batch_size`` at a time, as of :func:`encode_batch`.

    Images are in [-1, 1], or bytes from 0 to 255. Image i has the number ``first + i``; parts of ``condition`` have a
    batch axis of size n or 1. Compiled once per shape, whatever the key, the timestep and the condition: the last batch
    is filled up. ``ValueError`` also for values far outside, for a timestep outside [0, T) and for unknown options.

    >>> from scaling import zoo
    >>> model, schedule = zoo.load("digits-10")[:2]
    >>> images = np.zeros((3, 1, 8, 8), np.float32)
    >>> {tap: code.shape for tap, code in codes(jax.random.key(0), model, schedule, images, ["mid_block"], 50).items()}
    {'mid_block': (3, 32)}
    """
    total = len(images)
    if not total:
        raise ValueError(f"there are no images: their shape is {images.shape}.")
    check_range("images", images, 3 if vae is not None else images.shape[1])
    size = min(check_integer("batch_size", batch_size, minimum=1), total)
    condition = condition or Condition()
    if any(part.shape[0] not in (1, total) for part in jax.tree.leaves(condition)):
        raise ValueError(f"conditions need a batch axis of size {total} or 1 first.")
    encode = _encoder(key, model, schedule, taps, timestep, vae=vae, pool=pool, latent=latent)
    batches = []
    for start in range(0, total, size):
        rows = batch_rows(start, size, total)
        of_batch = jax.tree.map(lambda part, rows=rows: part[rows] if part.shape[0] > 1 else part, condition)
        batch = encode(jnp.asarray(scaled(images[rows])), jnp.asarray(first + rows), condition=of_batch)
        batches.append(jax.device_get(batch))
    return {name: np.concatenate([batch[name] for batch in batches])[:total] for name in taps}


def extract(
    pipeline: Pipeline,
    images: readers.Source,
    taps: Sequence[str],
    timestep: int,
    out: str | Path,
    *,
    pool: Pool = "max",
    prompt: str | None = None,
    class_label: int | None = None,
    latent: Latent = "mean",
    seed: int = 0,
    batch_size: int = 8,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the codes of all ``images`` in the run's folder ``out``; the same call resumes.

    Each tap is a variable of its name over ``image``, the rows of the source. For a folder the coordinate ``name`` has
    the file of each, relative to the folder. ``sims.load(out)`` checks and reads everything,
    ``xarray.open_zarr(out + "/results.zarr")`` reads parts. A run begun without names is continued without them.

    Args:
        pipeline: network, schedule and, for latents, autoencoder.
        images: from :func:`read_images`; image i has the number i.
        taps: modules whose activations to read.
        timestep: of the noise.
        out: folder of the run.
        pool: how to pool over positions.
        prompt: condition, as for :func:`scaling.bridge.conditioning.condition_on`.
        class_label: likewise.
        latent: which latents to take.
        seed: the key is ``jax.random.key(seed)``.
        batch_size: images computed, and written, at a time.
        provenance: recorded in the run beside the environment.
        on_batch: ``(done, total)``, called at the start and after each batch.

    ``ValueError`` as for :func:`codes`, for a prompt or class that the network does not take, and for a folder that
    holds something else.

    >>> import tempfile
    >>> import sims
    >>> from scaling import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/images.npy", np.zeros((3, 8, 8), np.uint8))
    ...     pipeline = zoo.load("digits-10")
    ...     extract(pipeline, read_images(f"{folder}/images.npy", pipeline), ["mid_block"], 50, f"{folder}/run")
    ...     dict(sims.load(f"{folder}/run").mid_block.sizes)
    {'image': 3, 'channel_32': 32}
    """
    count, channels = len(images.rows), image_channels(pipeline)
    if images.span is None:
        rows = images.rows.astype(np.float32) if images.rows.dtype.kind != "f" else images.rows
        check_range("images", rows, channels)
    condition = condition_on(pipeline, prompt, class_label, size=_shape(images)[:2])
    network, schedule, vae = pipeline.network, pipeline.schedule, pipeline.vae
    key = jax.random.key(check_seed("seed", seed))
    encode = _encoder(key, network, schedule, taps, timestep, vae=vae, pool=pool, latent=latent, condition=condition)

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, Array]:
        return encode(jnp.asarray(pictures(images, rows, channels)), jnp.asarray(rows))

    size = min(check_integer("batch_size", batch_size, minimum=1), count)
    example = jax.ShapeDtypeStruct((size, channels, *_shape(images)[:2]), jnp.float32)
    shapes = jax.eval_shape(encode, example, jax.ShapeDtypeStruct((size,), jnp.int32))
    spec = {
        "command": "extract",
        "model": identify(pipeline),
        "images": {"shape": _shape(images), "digest": checksum(images.rows), "values": images.span},
        "taps": list(taps),
        "timestep": int(timestep),
        "pool": pool,
        "prompt": prompt or None,
        "class_label": class_label,
        "latent": latent,
        "seed": seed,
    }
    template = _template(images, shapes, pool)
    _check_names(Path(out), images)
    if (Path(out) / RESULTS).exists() and "name" not in store.template_of(out).coords:
        # Earlier versions stored no names.
        template = template.drop_vars("name", errors="ignore")
    fill(out, spec, template, size, compute, provenance=provenance, on_batch=on_batch)


def read_images(name: str, pipeline: Pipeline, *, color: str = "", skip_bad: bool = False) -> readers.Source:
    """Read the images called ``name`` as ``pipeline``'s network takes them.

    The images of a folder have the network's channels, unless ``color`` (rgb or gray) or the name says otherwise; those
    of a folder given by its path alone are cropped about their centers and resampled to its own size. ``skip_bad``
    leaves out files that cannot be read. Anything else is read as by :func:`sims.data.readers.read` and keeps its size.
    ``ValueError`` if the
    source is missing, damaged or holds no images, or if they have other channels than the network; gray images are
    repeated over the channels of a network for colored ones.

    >>> from scaling import zoo
    >>> read_images("digits", zoo.load("digits-10")).image_shape
    (8, 8, 1)
    """
    wanted, (kind, path, given) = image_channels(pipeline), split_name(name)
    if kind in ("images", "patches"):
        # A folder by its path alone has the network's own size.
        resize = "{}x{}".format(*pixel_size(pipeline)) if path == name else ""
        if not color and not {"gray", "color"} & {option.partition("=")[0] for option in given.split("&")}:
            color = "gray" if wanted == 1 else "widest"
        name = with_options(name, resize=resize, color=color, skip_bad=skip_bad)
    elif color or skip_bad:
        raise ValueError(f"{name} is no folder of images: omit color and skip_bad.")
    source = readers.read(name)
    channels = _shape(source)[2]
    if channels not in (1, wanted):
        hint = " Give the pipeline's folder, which has the autoencoder." if pipeline.vae is None and wanted > 3 else ""
        raise ValueError(f"{name}: the images have {channels} channels and the network takes {wanted}.{hint}")
    return source


def pooled(x: Array, pool: Pool) -> Array:
    """Pool images (B, C, H, W) over H and W and tokens (B, T, C) over T; vectors stay as they are."""
    x = widened(x)
    axes = {2: (), 3: (1,), 4: (2, 3)}[x.ndim]
    match pool:
        case "max":
            return jnp.max(x, axis=axes)
        case "mean":
            return jnp.mean(x, axis=axes)
        case _:
            return x


_encode = functools.partial(jax.jit, static_argnames=("taps", "pool", "latent"))(encode_batch)


def _encoder(
    key: PRNGKey, model: Model, schedule: Schedule, taps: Sequence[str], timestep: int, *, pool: Pool, latent: Latent,
    **more: Any,
) -> Callable[..., dict[str, Array]]:  # fmt: skip
    """:func:`encode_batch`, compiled, as a function of images and items, with checked options."""
    if isinstance(taps, str) or not taps:
        raise ValueError(f"taps must be a list of at least one name, got {taps!r}.")
    timestep = check_integer("timestep", timestep, minimum=0, maximum=schedule.num_train_timesteps - 1)
    for option, value, known in (("pool", pool, POOLS), ("latent", latent, LATENTS)):
        if value not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}.")

    def encode(images: Array, items: Array, **condition: Any) -> dict[str, Array]:
        static = {"taps": tuple(taps), "pool": pool, "latent": latent}
        return _encode(key, model, schedule, images, items, timestep, **static, **more, **condition)

    return encode


def _noise(key: PRNGKey, items: Int[Array, " b"], call: int, like: Array) -> Array:
    return jax.vmap(lambda item: noise_at(key, item, call, like.shape[1:], like.dtype))(items)


def _stored_names(images: readers.Source) -> list[str]:
    # Names that are not UTF-8 cannot be stored as text.
    return [name.encode("utf-8", "backslashreplace").decode() for name in images.names]


def _check_names(out: Path, images: readers.Source) -> None:
    """``ValueError`` if the run in ``out`` has other names for the same images."""
    if not (out / RESULTS).exists():
        return
    coords = store.template_of(out).coords
    stored = coords["name"].values.tolist() if "name" in coords else []
    differing = [(old, new) for old, new in zip(stored, _stored_names(images), strict=False) if old != new]
    if differing or (stored and not images.names):
        old, new = differing[0] if differing else (stored[0], "without a name")
        raise ValueError(
            f"{out} has the codes of images with other names: {old!r} there is {new!r} here. Choose another folder."
        )


def _shape(images: readers.Source) -> tuple[int, int, int]:
    if images.image_shape is None:
        raise ValueError(f"the data are rows of {images.rows.shape[1]} numbers, not images.")
    return images.image_shape


def pictures(images: readers.Source, rows: Int[np.ndarray, " b"], channels: int) -> Float[np.ndarray, "b c h w"]:
    """Images in [-1, 1]; gray ones are repeated over ``channels``."""
    low, high = images.span or (-1.0, 1.0)
    values = (2 * images.rows[rows].astype(float) - (low + high)) / (high - low)
    pictures = values.astype(np.float32).reshape(len(rows), *_shape(images)).transpose(0, 3, 1, 2)
    return np.broadcast_to(pictures, (len(rows), channels, *pictures.shape[2:]))


def _template(images: readers.Source, shapes: Mapping[str, jax.ShapeDtypeStruct], pool: Pool) -> xr.Dataset:
    coords: dict[str, Any] = {"image": np.arange(len(images.rows)), "label": ("image", images.labels)}
    coords |= {"name": ("image", np.asarray(_stored_names(images)))} if images.names else {}
    variables = {}
    for name, shape in shapes.items():
        axes = AXES[shape.ndim - 1]
        # Taps of equal size share their dimensions.
        own = {f"{axis}_{size}": np.arange(size) for axis, size in zip(axes, shape.shape[1:], strict=True)}
        coords |= own
        variables[name] = (("image", *own), shape.dtype, {"pool": pool})
    return store.blank(coords, variables)
