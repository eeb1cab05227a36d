"""Does a model copy its training data, whose, and how often? An audit before a release.

:func:`draw` samples the model and compares every sample with every training image, by blocks; :func:`conclude` counts
the copies and says which training images they are of, how often each stands in the training data, how training and
held-out images differ in denoising error, and which images are at risk although they were not generated.

A sample is a copy by the ratio test of :mod:`scaling.measures.copies`; images closer to one another than ``near`` (root
mean square over pixels, of images in [-1, 1]) count as one image.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from dae_theory.checks import check_integer, check_seed
from scaling.bridge.conditioning import condition_on, null_condition, pixel_size, stacked
from scaling.bridge.identity import identify
from scaling.bridge.latents import clipped, from_latents
from scaling.bridge.loading import Pipeline
from scaling.detection.evaluation import auroc_interval, proportion_interval, threshold_at
from scaling.diffusion.samplers import sample
from scaling.measures.copies import RATIO, wilson_interval
from scaling.measures.neighbors import Training, nearest_two, rows_of, within
from scaling.models.model import Condition
from scaling.study.detection import columns
from scaling.study.settings import AuditSetting
from sims import store
from sims.store import fill
from sims.store.files import read_json

__all__ = ["RISK", "compare", "conclude", "draw", "read"]

RISK = 0.01
"""Share of held-out images that lie above the threshold of risk."""


def draw(
    pipeline: Pipeline,
    training: Training,
    out: str | Path,
    setting: AuditSetting,
    *,
    prompts: Sequence[str] = (),
    keep_images: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Draw samples and find the two nearest training images of each; the same call resumes.

    Over ``sample``: ``nearest`` and ``distance`` of the nearest training image, ``second`` the distance of the nearest
    one that is another image, and ``images`` if they are kept. Sample i depends on ``seed`` and i alone. Prompts, or
    the classes of a DiT, come in turn; a model that reads text and is given none has the empty prompt.

    ``ValueError`` for settings out of range, training images of another size than the samples, and a folder that holds
    something else.
    """
    check_integer("samples", setting.samples, minimum=1)
    if not 0 <= setting.near < 2:
        raise ValueError(f"near must be at least 0 and below 2, got {setting.near}.")
    network, vae, key = pipeline.network, pipeline.vae, jax.random.key(check_seed("seed", seed))
    batch = min(check_integer("batch_size", batch_size, minimum=1), setting.samples)
    conditions, unconditional = _conditions(pipeline, prompts), None
    if setting.guidance != 1:
        unconditional = null_condition(pipeline)
    radius = setting.near * math.sqrt(training.images.dim)

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
        own = [conditions[row % len(conditions)] for row in rows.tolist()]
        x = sample(
            key,
            network,
            pipeline.schedule,
            len(rows),
            setting.steps,
            method="ddim",
            eta=setting.eta,
            condition=stacked(own),
            unconditional=unconditional,
            guidance=None if unconditional is None else setting.guidance,
            first=int(rows[0]),
        ).x
        images = np.asarray(clipped(x) if vae is None else from_latents(vae, x), np.float32)
        if images.shape[1:] != training.shape:
            raise ValueError(
                f"samples are {images.shape[1:]}, training images {training.shape}: give those of the model's size."
            )
        found = nearest_two(np.nan_to_num(images.reshape(len(images), -1)), training.images, radius)
        # A sample that is not finite is near nothing.
        distance = np.where(np.isfinite(images).all((1, 2, 3)), found.distance, np.nan)
        values = {"nearest": found.nearest, "distance": distance, "second": found.other_distance}
        return values | ({"images": images} if keep_images else {})

    spec = {
        "command": "audit",
        "model": identify(pipeline),
        "training": training.digest,
        "setting": dataclasses.asdict(setting),
        "prompts": list(prompts),
        "images": keep_images,
        "seed": seed,
    }
    coords: dict[str, Any] = {"sample": list(range(setting.samples))}
    variables: dict[str, Any] = {
        "nearest": (("sample",), np.int64),
        "distance": (("sample",), np.float64),
        "second": (("sample",), np.float64),
    }
    if keep_images:
        axes = ("channel", "height", "width")
        coords |= {axis: list(range(side)) for axis, side in zip(axes, training.shape, strict=True)}
        variables["images"] = (("sample", *axes), np.float32)
    fill(out, spec, store.blank(coords, variables), batch, compute, provenance=provenance, on_batch=on_batch)
    return store.load(out)


def conclude(
    drawn: xr.Dataset,
    training: Training,
    setting: AuditSetting,
    *,
    scores: xr.Dataset | None = None,
    detectors: Sequence[str] = (),
    anonymous: bool = False,
) -> dict[str, Any]:
    """The audit as JSON values.

    Args:
        drawn: of :func:`draw`.
        training: the training set.
        setting: the same setting.
        scores: of the first training images (group ``train``) and held-out ones (``held_out``), as of
            :func:`scaling.study.detection.score_items`; without it nothing is said of membership and risk.
        detectors: names of the scores.
        anonymous: name images by number and SHA-256 of their values alone.
    """
    distance, second = drawn.distance.values, drawn.second.values
    copied = distance < RATIO * second
    count, total = int(copied.sum()), len(copied)
    low, high = wilson_interval(count, total)
    radius = setting.near * math.sqrt(training.images.dim)
    name = functools.partial(_name, training, anonymous)
    originals, times = np.unique(drawn.nearest.values[copied], return_counts=True)
    tally: dict[int, dict[str, Any]] = {}
    queries = rows_of(training.images, originals.tolist())
    for original, number, (same, apart) in zip(
        originals.tolist(), times.tolist(), within(queries, training.images, radius), strict=True
    ):
        first = min([original, *same.tolist()])
        entry = tally.setdefault(
            first,
            {
                "image": name(first),
                "number": first,
                "copies": 0,
                "exact": int(np.sum(apart == 0)),
                "near": int(len(same) - np.sum(apart == 0)),
                "numbers": same.tolist()[:100],
            },
        )
        entry["copies"] += number
    return {
        "format": 1,
        "training": {"images": training.images.count, "digest": training.digest},
        "setting": dataclasses.asdict(setting),
        "samples": {
            "count": total,
            "not_finite": int(np.sum(~np.isfinite(distance))),
            "copies": count,
            "share": count / total,
            "low": low,
            "high": high,
            # With no copy among N, shares above 1 - .05^(1/N) are excluded at 95 %.
            "excluded_above": proportion_interval(count, total).high,
        },
        "copied": sorted(tally.values(), key=lambda entry: (-entry["copies"], entry["number"])),
        "membership": {} if scores is None else _membership(scores, detectors),
        "at_risk": []
        if scores is None
        else _at_risk(scores, detectors, {j for e in tally.values() for j in e["numbers"]}, name),
    }


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What changed against an earlier audit: the shares with their intervals, and the images copied then or now.

    ``ValueError`` if that is no audit. Images are matched by name, so training sets may have grown.
    """
    try:
        earlier, then = before["samples"], {entry["image"]: entry["copies"] for entry in before["copied"]}
        interval = [float(earlier[name]) for name in ("share", "low", "high")]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the earlier audit lacks {error}: give the folder of a finished audit.") from error
    current = {entry["image"]: entry["copies"] for entry in now["copied"]}
    return {
        "share": interval[0],
        "low": interval[1],
        "high": interval[2],
        "no_longer_copied": sorted(then.keys() - current.keys()),
        "newly_copied": sorted(current.keys() - then.keys()),
        "same_training_data": before.get("training", {}).get("digest") == now["training"]["digest"],
    }


def read(folder: str | Path) -> dict[str, Any]:
    """The ``audit.json`` of an earlier audit; ``ValueError`` if there is none."""
    return read_json(Path(folder) / "audit.json")


def _conditions(pipeline: Pipeline, prompts: Sequence[str]) -> list[Condition]:
    takes, size = pipeline.network.apply.inputs(jnp.float32)[1], pixel_size(pipeline)
    if prompts:
        return [condition_on(pipeline, prompt, size=size) for prompt in prompts]
    classes = getattr(pipeline.network.config, "classes", None)
    if "class_labels" in takes and classes is not None:
        return [condition_on(pipeline, None, k, size=size) for k in range(classes)]
    return [condition_on(pipeline, size=size)]


def _membership(scores: xr.Dataset, detectors: Sequence[str]) -> dict[str, Any]:
    groups, found = scores.group.values, {}
    for name, values in _flat(scores, detectors):
        pair = [values[(groups == group) & np.isfinite(values)] for group in ("train", "held_out")]
        if min(map(len, pair)) >= 2:
            area = auroc_interval(*pair)
            counts = {group: len(each) for group, each in zip(("train", "held_out"), pair, strict=True)}
            found[name] = {"area": area.value, "low": area.low, "high": area.high, **counts}
    return found


def _at_risk(
    scores: xr.Dataset, detectors: Sequence[str], generated: set[int], name: Callable[[int], str]
) -> list[dict[str, Any]]:
    groups = scores.group.values
    above: dict[int, list[str]] = {}
    for label, values in _flat(scores, detectors):
        others = values[(groups == "held_out") & np.isfinite(values)]
        if len(others) < 2:
            continue
        threshold = threshold_at(others, RISK)
        for row, value in enumerate(values[groups == "train"].tolist()):
            if value > threshold and row not in generated:
                above.setdefault(row, []).append(label)
    entries = [{"image": name(row), "number": row, "scores": labels} for row, labels in above.items()]
    return sorted(entries, key=lambda entry: (-len(entry["scores"]), entry["number"]))


def _flat(scores: xr.Dataset, detectors: Sequence[str]) -> list[tuple[str, Float[np.ndarray, " n"]]]:
    """Every score under every tap and noise level."""
    return [(label, values.astype(float)) for name in detectors for label, values in columns(scores, name)]


def _name(training: Training, anonymous: bool, number: int) -> str:
    if not anonymous:
        return training.name(number)
    return f"{number} sha256:{hashlib.sha256(rows_of(training.images, [number]).tobytes()).hexdigest()[:16]}"
