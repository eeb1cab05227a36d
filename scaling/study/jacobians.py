r"""Runs over images and noise levels: singular values and vectors of a denoiser's Jacobian, kept in a folder.

At image x and noise level σ the Jacobian is at ``y = x + σ ε``, in the units of :mod:`dae_theory`. The noise of an
image is the same at all levels, and depends on its row in the data set and on the seed alone. A model that was trained
here knows which rows it was trained on (``membership.json``): then repeated, single and held-out images stand side by
side.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_positive
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.conditioning import condition_on, pixel_size
from scaling.bridge.identity import identify
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import Pipeline
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import Schedule, sigma_to_timestep
from scaling.measures.jacobian import CHUNK, full_jacobian, spectrum_summary, top_singular
from scaling.models.model import Condition, Model
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from scaling.training import corpus
from scaling.training.corpus import GROUPS
from sims import store
from sims.data.readers import kind_of
from sims.store import checksum, fill
from sims.store.files import write_npz, write_text

__all__ = ["TIMESTEPS", "Chosen", "analyze", "choose", "group_means", "read_images", "write_pictures"]

TIMESTEPS = (10, 50, 200)
"""Looked at if nothing is asked."""

MEASURES = ("singular_values", "error", "energy", "top_energy", "kept")


class Chosen(NamedTuple):
    """Images to look at."""

    images: Float[np.ndarray, "n c h w"]
    """In [-1, 1]."""
    rows: Int[np.ndarray, " n"]
    """Which rows of the data set they are."""
    groups: tuple[str, ...]
    """Of each, one of :data:`GROUPS`, or ``image`` where nothing is known."""


class Setting(NamedTuple):
    """How the Jacobian is looked at; static."""

    rank: int
    oversample: int
    iterations: int
    full: bool
    chunk_size: int


def read_images(name: str, pipeline: Pipeline) -> Float[np.ndarray, "n c h w"]:
    """All images of the data set ``name`` in the order of its rows, as the pipeline takes them, in [-1, 1].

    As :func:`scaling.training.corpus.load` reads them; gray ones have equal channels where more are wanted. ``ValueError`` also
    for other channels than the pipeline's.
    """
    (example, *_), _ = (pipeline.vae or pipeline.network).apply.inputs(jnp.float32)
    (height, width), channels = pixel_size(pipeline), example.shape[1]
    folder = Path(name).is_dir() and kind_of(Path(name)) == "images"
    side = height if height == width else None
    found = corpus.load(name, held_out=0, resolution=side, gray=folder and channels == 1)
    images = found.images[np.argsort(found.rows)]
    if images.shape[1] not in (1, channels):
        raise ValueError(f"{name}: the images have {images.shape[1]} channels and the network takes {channels}.")
    return np.broadcast_to(images, (len(images), channels, *images.shape[2:]))


def choose(
    images: Float[np.ndarray, "n c h w"],
    membership: Mapping[str, Sequence[int]] | None = None,
    *,
    rows: Sequence[int] | None = None,
    num: int = 4,
) -> Chosen:
    """The given ``rows``, or the first ``num`` of each group of ``membership``, or of all images if there is none.

    ``ValueError`` for rows that the data set does not have, a row named twice, and groups that are all empty.
    """
    check_integer("num", num, minimum=1)
    groups = {name: list(membership.get(name, ())) for name in GROUPS} if membership is not None else {}
    if membership is not None and not any(groups.values()):
        raise ValueError(f"membership.json names no rows under {', '.join(GROUPS)}; write it anew, or give --rows.")
    known = {row: name for name, members in groups.items() for row in members}
    total = len(images)
    if known and max(known) >= total:
        raise ValueError(
            f"the model was trained on a data set of at least {max(known) + 1} rows, and this one has {total}: name "
            "the one that it was trained on."
        )
    if rows is None:
        rows = [row for members in groups.values() for row in members[:num]] if known else range(min(num, total))
    picked = [check_integer("rows", row, minimum=0, maximum=total - 1) for row in rows]
    if len(set(picked)) < len(picked) or not picked:
        raise ValueError(f"rows must name each image once, got {picked}.")
    return Chosen(images[picked], np.asarray(picked), tuple(known.get(row, "image") for row in picked))


def analyze(
    pipeline: Pipeline,
    chosen: Chosen,
    out: str | Path,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    rank: int = 16,
    oversample: int = 2,
    iterations: int = 2,
    full: bool = False,
    chunk_size: int = CHUNK,
    prompt: str | None = None,
    class_label: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Triplets at every image and level in the run's folder ``out``, over ``image``, ``level`` and ``component``.

    ``right`` and ``left`` are the vectors as images, or as latents; ``noisy`` and ``denoised`` what they belong to;
    ``residuals``, ``error``, ``energy``, ``energy_error`` as in :class:`scaling.measures.jacobian.Singular`; ``top_energy`` is
    the share of the energy in the triplets, ``kept`` how many of them have a singular value above 1/2. ``full`` adds
    the fields of :class:`scaling.measures.jacobian.Spectrum` as ``full_...``. Levels are ``timesteps``, integers, or ``sigmas``;
    without both, the timesteps ``TIMESTEPS``. The same call goes on where it was cut, see :func:`sims.store.filling.fill`.
    ``ValueError`` for what is out of range, and as for :func:`scaling.bridge.conditioning.condition_on`.
    """
    schedule, size = pipeline.schedule, (chosen.images.shape[2], chosen.images.shape[3])
    levels = _levels(schedule, timesteps, sigmas)
    condition = condition_on(pipeline, prompt, class_label, size=size)
    key = jax.random.key(check_integer("seed", seed, minimum=0))
    check_integer("rank", rank, minimum=1)
    setting = Setting(rank, oversample, iterations, full, check_integer("chunk_size", chunk_size, minimum=1))
    look = jax.jit(_look, static_argnames="setting", compiler_options=compiler_options())
    parts = pipeline.network, pipeline.vae, condition, schedule

    def at(image: Array, row: Array, level: Array, sigma: Array) -> dict[str, Array]:
        return look(key, *parts, image, row, level, sigma, setting=setting)

    def compute(items: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        found = [
            jax.device_get(
                at(jnp.asarray(chosen.images[i]), jnp.int32(chosen.rows[i]), jnp.int32(k), jnp.float32(sigma))
            )
            for i in items
            for k, sigma in enumerate(levels)
        ]
        shape = len(items), len(levels)
        return {
            name: np.stack([one[name] for one in found]).reshape(*shape, *found[0][name].shape) for name in found[0]
        }

    number = jax.ShapeDtypeStruct((), jnp.int32)
    example = jax.ShapeDtypeStruct(chosen.images.shape[1:], jnp.float32)
    level = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(functools.partial(_look, setting=setting), key, *parts, example, number, number, level)
    spec = {
        "command": "jacobian",
        "model": identify(pipeline),
        "images": {"digest": checksum(chosen.images), "rows": chosen.rows.tolist(), "groups": list(chosen.groups)},
        "sigmas": [float(f"{level:.8g}") for level in levels],
        **setting._asdict(),
        "prompt": prompt or None,
        "class_label": class_label,
        "seed": seed,
    }
    # Directions in work at once change no more than rounding.
    del spec["chunk_size"]
    template = _template(chosen, levels, schedule, shapes)
    size_of_batch = check_integer("batch_size", batch_size, minimum=1)
    fill(out, spec, template, size_of_batch, compute, provenance=provenance, on_batch=on_batch)


def group_means(results: xr.Dataset) -> list[dict[str, Any]]:
    """Of every group and level the means over images and their standard errors (None for one image) of the measures."""
    found = []
    for name in dict.fromkeys(results.group.values.tolist()):
        members = results.isel(image=np.flatnonzero(results.group.values == name))
        for k in range(results.sizes["level"]):
            at, count = members.isel(level=k), members.sizes["image"]
            entry: dict[str, Any] = {"group": name, "sigma": float(at.sigma), "images": count}
            for measure in MEASURES:
                values = at[measure].values.reshape(count, -1)[:, 0].astype(float)
                label = "largest" if measure == "singular_values" else measure
                entry[label] = float(values.mean())
                entry[f"{label}_se"] = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else None
            found.append(entry)
    return found


def write_pictures(out: str | Path) -> list[Path]:
    """Write what :func:`analyze` left in ``out`` as contact sheets there; returns the files.

    ``right_0.png`` for the first level and so on, ``left_0.png``: a line for every image, with the noisy image, the
    denoised one, and the vectors, gray for 0, each scaled to its largest entry. ``groups.json`` has
    :func:`group_means`, ``jacobian.npz`` all arrays. ``ValueError`` if the run is not finished.
    """
    out, results = Path(out), store.load(out)
    if "singular_values" not in results or not results.done.all():
        raise ValueError(f"{out} holds no finished Jacobians; run the same command again.")
    files = []
    for side in ("right", "left"):
        for k in range(results.sizes["level"]):
            at = results.isel(level=k)
            shown = [at.noisy.values[:, None], at.denoised.values[:, None], _scaled(at[side].values)]
            tiles = np.concatenate(shown, axis=1)
            pictures = to_bytes(_viewable(tiles.reshape(-1, *tiles.shape[2:])))
            files.append(out / f"{side}_{k}.png")
            write_png(files[-1], contact_sheet(pictures, columns=tiles.shape[1]))
    write_text(out / "groups.json", json.dumps(group_means(results), indent=1) + "\n")
    write_npz(out / "jacobian.npz", {str(name): results[name].values for name in (*results.coords, *results.data_vars)})
    return [*files, out / "groups.json", out / "jacobian.npz"]


def _look(
    key: PRNGKey,
    network: Model,
    vae: Model | None,
    condition: Condition,
    schedule: Schedule,
    image: Float[Array, "c h w"],
    row: Int[Array, ""],
    level: Int[Array, ""],
    sigma: Float[Array, ""],
    *,
    setting: Setting,
) -> dict[str, Array]:
    """All that is kept of one image at one level."""
    of_one = jax.tree.map(lambda part: part[0], condition)
    denoiser = as_denoiser(network, schedule, **of_one._asdict())
    noise_key, sketch_key = (jax.random.fold_in(key, part) for part in range(2))
    x = image if vae is None else to_latents(vae, image[None])[0]
    y = x + sigma * noise_at(noise_key, row, 0, x.shape, x.dtype)
    found = top_singular(
        jax.random.fold_in(jax.random.fold_in(sketch_key, row), level),
        denoiser,
        y,
        sigma,
        setting.rank,
        oversample=setting.oversample,
        iterations=setting.iterations,
        chunk_size=setting.chunk_size,
    )
    kept = {
        "singular_values": found.s,
        "residuals": found.residuals,
        "right": found.v.T.reshape(-1, *y.shape),
        "left": found.u.T.reshape(-1, *y.shape),
        "error": found.error,
        "energy": found.energy,
        "energy_error": found.energy_error,
        "top_energy": jnp.sum(jnp.square(found.s)) / jnp.where(found.energy > 0, found.energy, 1.0),
        "kept": jnp.sum(found.s > 0.5).astype(jnp.int32),
        "noisy": y,
        "denoised": denoiser(y, sigma),
    }
    if setting.full:
        whole = full_jacobian(denoiser, y, sigma, chunk_size=setting.chunk_size)
        summary = spectrum_summary(whole, rank=setting.rank)
        kept |= {f"full_{name}": value for name, value in summary._asdict().items()}
    return kept


def _levels(
    schedule: Schedule, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None
) -> Float[np.ndarray, " k"]:
    """Noise levels, ascending or not, as asked."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give timesteps or noise levels, not both.")
    if sigmas is not None:
        found = np.asarray(sigmas, float)
        check_positive("noise levels", found)
    else:
        last = schedule.num_train_timesteps - 1
        asked = [t for t in TIMESTEPS if t <= last] if timesteps is None else timesteps
        found = schedule.sigmas[[check_integer("timesteps", t, minimum=0, maximum=last) for t in asked]]
    if not found.size or len(set(found.tolist())) < found.size:
        raise ValueError(f"name every noise level once, got {found.tolist()}.")
    return found


def _template(
    chosen: Chosen, levels: Float[np.ndarray, " k"], schedule: Schedule, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> xr.Dataset:
    axes = {"singular_values": ("component",), "residuals": ("component",), "full_singular_values": ("direction",)}
    space = ("channel", "height", "width")
    axes |= dict.fromkeys(("right", "left"), ("component", *space)) | {"noisy": space, "denoised": space}
    timesteps = [float(sigma_to_timestep(schedule, float(level))) for level in levels]
    coords: dict[str, Any] = {
        "image": np.arange(len(chosen.rows)),
        "row": ("image", chosen.rows),
        "group": ("image", np.asarray(chosen.groups)),
        "level": np.arange(len(levels)),
        "sigma": ("level", levels),
        "timestep": ("level", np.asarray(timesteps)),
    }
    variables = {}
    for name, shape in shapes.items():
        own = axes.get(name, ())
        coords |= {axis: np.arange(side) for axis, side in zip(own, shape.shape, strict=True)}
        variables[name] = (("image", "level", *own), shape.dtype)
    return store.blank(coords, variables)


def _scaled(vectors: Float[np.ndarray, "n r c h w"]) -> Float[np.ndarray, "n r c h w"]:
    largest = np.max(np.abs(vectors), axis=(2, 3, 4), keepdims=True)
    return vectors / np.where(largest > 0, largest, 1)


def _viewable(tiles: Float[np.ndarray, "n c h w"]) -> Float[np.ndarray, "n c2 h w2"]:
    """Gray and colored images as they are; of latents the channels side by side."""
    count, channels, height, width = tiles.shape
    if channels in (1, 3):
        return tiles
    return tiles.transpose(0, 2, 1, 3).reshape(count, 1, height, channels * width)
