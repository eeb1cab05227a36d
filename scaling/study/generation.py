"""Images sampled from a pipeline into a run's folder, and written as pictures, a contact sheet and an archive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Int

from dae_theory.checks import check_integer, check_seed
from scaling.bridge.conditioning import condition_on, null_condition, pixel_size
from scaling.bridge.identity import identify
from scaling.bridge.latents import clipped, from_latents
from scaling.bridge.loading import Pipeline
from scaling.diffusion.samplers import guidance_channels, sample
from scaling.diffusion.schedules import with_method
from scaling.diffusion.solvers import make_solver
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from sims import store
from sims.store import fill
from sims.store.files import write_npz

__all__ = ["generate", "write_pictures"]


def generate(
    pipeline: Pipeline,
    num: int,
    num_steps: int,
    out: str | Path,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    class_label: int | None = None,
    guidance: float | None = None,
    method: str | None = None,
    eta: float = 0.0,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Sample ``num`` images into the run's folder ``out``; the same call resumes.

    The variable ``images`` (sample, channel, height, width) is in [-1, 1]; ``latents`` are what images were decoded
    from. Sample i depends on ``seed`` and i alone.

    Args:
        pipeline: network, schedule and, for latents, autoencoder.
        num: number of images.
        num_steps: steps of the sampler.
        out: folder of the run.
        prompt: condition, as for :func:`scaling.bridge.conditioning.condition_on`.
        negative_prompt: what guidance leads away from.
        class_label: condition.
        guidance: scale of classifier-free guidance; None: no guidance.
        method: sampler, as for :func:`scaling.diffusion.samplers.sample`; None: the schedule's own.
        eta: share of fresh noise, likewise.
        size: height and width in pixels; None: the model's own.
        seed: of all noise.
        batch_size: images sampled, and written, at a time.
        provenance: recorded in the run beside the environment.
        on_batch: ``(done, total)``, called at the start and after each batch.

    ``ValueError`` for values out of range, and for a folder that holds another run.

    >>> import tempfile
    >>> import sims
    >>> from scaling import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     generate(zoo.load("digits-10"), 2, 2, folder)
    ...     dict(sims.load(folder).images.sizes)
    {'sample': 2, 'channel': 1, 'height': 8, 'width': 8}
    """
    network, vae = pipeline.network, pipeline.vae
    total, size = check_integer("num", num, minimum=1), size or pixel_size(pipeline)
    batch = min(check_integer("batch_size", batch_size, minimum=1), total)
    key = jax.random.key(check_seed("seed", seed))
    embeds = guidance_channels(network)
    scale = 1.0 if guidance is None and embeds else guidance
    schedule = with_method(pipeline.schedule, method)
    make_solver(schedule, num_steps, eta=eta)
    draw = functools.partial(
        sample,
        key,
        network,
        schedule,
        num_steps=num_steps,
        eta=eta,
        condition=condition_on(pipeline, prompt, class_label, size=size),
        unconditional=None if guidance is None or embeds else null_condition(pipeline, negative_prompt, size=size),
        guidance=scale,
        size=_sampled_size(pipeline, size),
    )

    def compute(rows: Int[np.ndarray | Array, " b"]) -> dict[str, Array]:
        x = draw(num=len(rows), first=rows[0]).x
        if vae is None:
            return {"images": clipped(x)}
        return {"images": from_latents(vae, x), "latents": x}

    spec = {
        "command": "sample",
        "model": identify(pipeline),
        "num": total,
        "steps": num_steps,
        "prompt": prompt or None,
        "negative_prompt": negative_prompt,
        "class_label": class_label,
        "guidance": guidance,
        "method": schedule.method,
        "eta": eta,
        "size": list(size),
        "seed": seed,
    }
    shapes = jax.eval_shape(compute, jax.ShapeDtypeStruct((batch,), jnp.int32))
    if shapes["images"].shape[1] not in (1, 3):
        raise ValueError(
            f"samples of {shapes['images'].shape[1]} channels are no pictures; give the pipeline's folder, which has "
            "the autoencoder, or call scaling.sample from Python."
        )
    fill(out, spec, _template(total, shapes), batch, compute, provenance=provenance, on_batch=on_batch)


def write_pictures(out: str | Path) -> list[Path]:
    """Write the finished run of :func:`generate` in ``out`` as pictures; returns the files.

    They are ``images/00000.png`` and so on, ``sheet.png`` with all of them, and ``samples.npz`` with the arrays.
    ``ValueError`` if the folder holds no finished samples, or cannot be written.

    >>> import tempfile
    >>> from scaling import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     generate(zoo.load("digits-10"), 2, 2, folder)
    ...     [file.name for file in write_pictures(folder)]
    ['00000.png', '00001.png', 'sheet.png', 'samples.npz']
    """
    out, samples = Path(out), store.load(out)
    if "images" not in samples or not samples.done.all():
        raise ValueError(f"{out} holds no finished samples; run the same command again.")
    arrays: dict[str, Any] = {name: samples[name].values for name in ("images", "latents") if name in samples}
    pictures = to_bytes(arrays["images"])

    files = {out / "images" / f"{i:05d}.png": picture for i, picture in enumerate(pictures)}
    files[out / "sheet.png"] = contact_sheet(pictures)
    for path, picture in files.items():
        write_png(path, picture)
    write_npz(out / "samples.npz", arrays)
    return [*files, out / "samples.npz"]


def _sampled_size(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the network's input for images of ``size``."""
    (x, *_), _ = pipeline.network.apply.inputs(jnp.float32)
    factor = pixel_size(pipeline)[0] // x.shape[2]
    if any(side < 1 or side % factor for side in size):
        raise ValueError(f"size {size[0]}x{size[1]}: the sides must be positive multiples of {factor} pixels.")
    return size[0] // factor, size[1] // factor


def _template(total: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> xr.Dataset:
    coords, variables = {"sample": np.arange(total)}, {}
    for name, shape in shapes.items():
        prefix = "" if name == "images" else "latent_"
        axes = [f"{prefix}{axis}" for axis in ("channel", "height", "width")]
        coords |= {axis: np.arange(side) for axis, side in zip(axes, shape.shape[1:], strict=True)}
        variables[name] = (("sample", *axes), shape.dtype)
    return store.blank(coords, variables)
