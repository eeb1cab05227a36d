r"""Singular values and vectors of a denoiser's Jacobian, over images and noise levels, in the folder of a run.

The Jacobian at image x and noise level σ is taken at ``y = x + σ ε``, in the units of :mod:`dae_theory`. The noise ε
depends on the image's row in the data set and on the seed alone: it is the same at all levels. The folder of a model
that was trained here lists its training rows (``membership.json``); then images that were repeated in training, trained
on once, and held out are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_positive, check_seed
from dae_theory.types import PRNGKey
from scaling.backend import compiler_options
from scaling.bridge.conditioning import condition_on
from scaling.bridge.identity import identify
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import Pipeline
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import Schedule, sigma_to_timestep
from scaling.measures.jacobian import full_jacobian, spectrum_summary, top_singular
from scaling.models.model import Condition, Model
from scaling.study.items import members_of, read_rows
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from scaling.study.settings import TIMESTEPS, JacobianSetting
from sims import store
from sims.store import checksum, fill
from sims.store.files import write_npz, write_text
from sims.study.tables import standard_error

__all__ = [
    "SUMMARIZED",
    "Chosen",
    "analyze",
    "choose",
    "group_means",
    "group_values",
    "read_corpus_images",
    "write_pictures",
]

SUMMARIZED = {
    "largest": "singular_values",
    "error": "error",
    "energy": "energy",
    "top_energy": "top_energy",
    "kept": "kept",
}
"""Variables of a run whose means :func:`group_means` reports, by name; of the singular values it takes the largest."""


class Chosen(NamedTuple):
    """Images of a data set, at which to take the Jacobian."""

    images: Float[np.ndarray, "n c h w"]
    """In [-1, 1]."""
    rows: Int[np.ndarray, " n"]
    """Their rows in the data set."""
    groups: tuple[str, ...]
    """The group of each, one of :data:`scaling.training.corpus.GROUPS`, or ``image`` if it is unknown."""


def read_corpus_images(name: str, pipeline: Pipeline) -> Float[np.ndarray, "n c h w"]:
    """All images of the data set ``name`` in the order of its rows, in [-1, 1], with the pipeline's size and channels.

    ``ValueError`` as for :func:`scaling.study.items.read_rows`.
    """
    whole, places = read_rows(name, pipeline)
    return whole.images[places]


def choose(
    images: Float[np.ndarray, "n c h w"],
    membership: Mapping[str, Sequence[int]] | None = None,
    *,
    rows: Sequence[int] | None = None,
    num: int = 4,
) -> Chosen:
    """Choose the given ``rows``, or the first ``num`` of each group of ``membership``, or of all images without it.

    ``ValueError`` for rows that the data set lacks, rows given twice, and a ``membership`` whose groups are all empty.
    """
    check_integer("num", num, minimum=1)
    total = len(images)
    groups = members_of(membership, total, otherwise="give --rows") if membership is not None else {}
    known = {row: name for name, members in groups.items() for row in members}
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
    setting: JacobianSetting | None = None,
    prompt: str | None = None,
    class_label: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the top singular triplets at every image and level, in the run's folder ``out``; the same call resumes.

    The variables, over ``image`` and ``level``: ``singular_values``, and ``right`` and ``left``, the singular vectors
    as images or latents, over ``component``; ``residuals``, ``error``, ``energy`` and ``energy_error`` as in
    :class:`scaling.measures.jacobian.Singular`; ``top_energy``, the triplets' share of the energy; ``kept``, the number
    of them with a singular value above 1/2; ``noisy`` and ``denoised``, the images where the Jacobian is taken. With
    ``setting.full`` also the fields of :class:`scaling.measures.jacobian.Spectrum` as ``full_...``.

    Args:
        pipeline: network, schedule and, for latents, autoencoder.
        chosen: the images.
        out: folder of the run.
        timesteps: noise levels as integer timesteps (default: :data:`scaling.study.settings.TIMESTEPS`).
        sigmas: noise levels σ, instead.
        setting: rank and accuracy (default: ``JacobianSetting()``).
        prompt: condition, as for :func:`scaling.bridge.conditioning.condition_on`.
        class_label: likewise.
        seed: of the noise and of the sketches.
        batch_size: images written at a time.
        provenance: recorded in the run beside the environment.
        on_batch: ``(done, total)``, called at the start and after each batch.

    ``ValueError`` for values out of range, and for a folder that holds another run.
    """
    schedule, size = pipeline.schedule, (chosen.images.shape[2], chosen.images.shape[3])
    levels = _levels(schedule, timesteps, sigmas)
    condition = condition_on(pipeline, prompt, class_label, size=size)
    key = jax.random.key(check_seed("seed", seed))
    setting = setting or JacobianSetting()
    check_integer("rank", setting.rank, minimum=1)
    check_integer("chunk_size", setting.chunk_size, minimum=1)
    at_image = jax.jit(_at_image, static_argnames="setting", compiler_options=compiler_options())
    parts = pipeline.network, pipeline.vae, condition, schedule

    def compute(items: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        results = [
            jax.device_get(
                at_image(
                    key,
                    *parts,
                    jnp.asarray(chosen.images[i]),
                    jnp.int32(chosen.rows[i]),
                    jnp.int32(k),
                    jnp.float32(sigma),
                    setting=setting,
                )
            )
            for i in items
            for k, sigma in enumerate(levels)
        ]
        shape = len(items), len(levels)
        return {
            name: np.stack([one[name] for one in results]).reshape(*shape, *results[0][name].shape)
            for name in results[0]
        }

    number = jax.ShapeDtypeStruct((), jnp.int32)
    example = jax.ShapeDtypeStruct(chosen.images.shape[1:], jnp.float32)
    level = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(functools.partial(_at_image, setting=setting), key, *parts, example, number, number, level)
    spec = {
        "command": "jacobian",
        "model": identify(pipeline),
        "images": {"digest": checksum(chosen.images), "rows": chosen.rows.tolist(), "groups": list(chosen.groups)},
        "sigmas": [float(f"{level:.8g}") for level in levels],
        **dataclasses.asdict(setting),
        "prompt": prompt or None,
        "class_label": class_label,
        "seed": seed,
    }
    # How many directions are processed at a time changes the results by rounding only.
    del spec["chunk_size"]
    template = _template(chosen, levels, schedule, shapes)
    size_of_batch = check_integer("batch_size", batch_size, minimum=1)
    fill(out, spec, template, size_of_batch, compute, provenance=provenance, on_batch=on_batch)


def group_values(results: xr.Dataset) -> Iterator[tuple[dict[str, Any], dict[str, Float[np.ndarray, " n"]]]]:
    """For each group and level the values of the images, and ``group``, ``sigma``, ``images`` and ``not_finite``.

    Values are those of each of :data:`SUMMARIZED`, of the images of which all are finite; the last two are the numbers
    of images, and of those that are not.
    """
    for name in dict.fromkeys(results.group.values.tolist()):
        members = results.isel(image=np.flatnonzero(results.group.values == name))
        for k in range(results.sizes["level"]):
            at, count = members.isel(level=k), members.sizes["image"]
            values = {
                label: at[variable].values.reshape(count, -1)[:, 0].astype(float)
                for label, variable in SUMMARIZED.items()
            }
            finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
            left_out = int(count - finite.sum())
            entry = {"group": name, "sigma": float(at.sigma), "images": count, "not_finite": left_out}
            yield entry, {label: value[finite] for label, value in values.items()}


def group_means(results: xr.Dataset) -> list[dict[str, Any]]:
    """Means over the images of each group and level, and standard errors as ``NAME_se`` (None for a single image)."""
    entries = []
    for entry, values in group_values(results):
        for label, of_images in values.items():
            error = standard_error(of_images)[1] if of_images.size > 1 else None
            entry |= {label: float(of_images.mean()) if of_images.size else None, f"{label}_se": error}
        entries.append(entry)
    return entries


def write_pictures(out: str | Path, results: xr.Dataset | None = None) -> list[Path]:
    """Write the finished run of :func:`analyze` in ``out`` as contact sheets and arrays; returns the files.

    ``right_0.png`` for the first level and so on, and ``left_0.png``: in each line, labeled by group and row, the noisy
    image, the denoised one and the vectors of an image, gray for 0, each vector scaled to its largest entry.
    ``groups.json`` has :func:`group_means`, ``jacobian.npz`` all arrays. ``results`` are those of the run, if they are
    already in memory.
    ``ValueError`` if the run is not finished.
    """
    out, results = Path(out), store.load(out) if results is None else results
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
            vectors = [f"{side} {i}" for i in range(1, tiles.shape[1] - 1)]
            labels = ["noisy", "denoised", *vectors]
            lines = [f"{group} {row}" for group, row in zip(at.group.values, at.row.values, strict=True)]
            sheet = contact_sheet(pictures, len(labels), row_labels=lines, column_labels=labels)
            write_png(files[-1], sheet)
    write_text(out / "groups.json", json.dumps(group_means(results), indent=1) + "\n")
    write_npz(out / "jacobian.npz", {str(name): results[name].values for name in (*results.coords, *results.data_vars)})
    return [*files, out / "groups.json", out / "jacobian.npz"]


def _at_image(
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
    setting: JacobianSetting,
) -> dict[str, Array]:
    """The values of all variables for one image at one level."""
    of_one = jax.tree.map(lambda part: part[0], condition)
    denoiser = as_denoiser(network, schedule, **of_one._asdict())
    noise_key, sketch_key = (jax.random.fold_in(key, part) for part in range(2))
    x = image if vae is None else to_latents(vae, image[None])[0]
    y = x + sigma * noise_at(noise_key, row, 0, x.shape, x.dtype)
    top = top_singular(
        jax.random.fold_in(jax.random.fold_in(sketch_key, row), level),
        denoiser,
        y,
        sigma,
        setting.rank,
        oversample=setting.oversample,
        iterations=setting.iterations,
        chunk_size=setting.chunk_size,
    )
    values = {
        "singular_values": top.s,
        "residuals": top.residuals,
        "right": top.v.T.reshape(-1, *y.shape),
        "left": top.u.T.reshape(-1, *y.shape),
        "error": top.error,
        "energy": top.energy,
        "energy_error": top.energy_error,
        "top_energy": jnp.sum(jnp.square(top.s)) / jnp.where(top.energy > 0, top.energy, 1.0),
        "kept": jnp.sum(top.s > 0.5).astype(jnp.int32),
        "noisy": y,
        "denoised": denoiser(y, sigma),
    }
    if setting.full:
        whole = full_jacobian(denoiser, y, sigma, chunk_size=setting.chunk_size)
        summary = spectrum_summary(whole, rank=setting.rank)
        values |= {f"full_{name}": value for name, value in summary._asdict().items()}
    return values


def _levels(
    schedule: Schedule, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None
) -> Float[np.ndarray, " k"]:
    """The noise levels σ, in the order in which they are given."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give timesteps or noise levels, not both.")
    if sigmas is not None:
        levels = np.asarray(sigmas, float)
        check_positive("noise levels", levels)
    else:
        last = schedule.num_train_timesteps - 1
        chosen = [t for t in TIMESTEPS if t <= last] if timesteps is None else timesteps
        levels = schedule.sigmas[[check_integer("timesteps", t, minimum=0, maximum=last) for t in chosen]]
    if not levels.size or len(set(levels.tolist())) < levels.size:
        raise ValueError(f"name every noise level once, got {levels.tolist()}.")
    return levels


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
    """Gray and colored images unchanged; the channels of latents side by side."""
    count, channels, height, width = tiles.shape
    if channels in (1, 3):
        return tiles
    return tiles.transpose(0, 2, 1, 3).reshape(count, 1, height, channels * width)
