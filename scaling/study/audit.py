"""Does a model copy its training data, whose, and how often? An audit before a release.

:func:`draw` samples the model and compares every sample with every training image, by blocks; :func:`conclude` counts
the copies and says which training images they are of, how often each stands in the training data, how training and
held-out images differ in denoising error, and which images are at risk although they were not generated.

A sample is a copy by the ratio test of :mod:`scaling.measures.copies`, on pixels or on unit features
(:mod:`scaling.measures.features`), if asked with mirror images too; images closer to one another than ``near`` count as
one image: root mean square over pixels of images in [-1, 1], or the chord between features. How often an image stands
in the training data, and how well other images cover it (:mod:`scaling.measures.coverage`), is measured in pixels
always.
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

from dae_theory.checks import check_integer, check_positive, check_seed
from scaling.bridge.conditioning import condition_on, null_condition, pixel_size, stacked
from scaling.bridge.identity import identify
from scaling.bridge.latents import clipped, from_latents
from scaling.bridge.loading import Pipeline
from scaling.detection.evaluation import auroc_interval, proportion_interval, threshold_at
from scaling.diffusion.samplers import sample
from scaling.measures.copies import RATIO, wilson_interval
from scaling.measures.coverage import local_coverage
from scaling.measures.features import PIXELS, Representation, mirrored, unit_features
from scaling.measures.neighbors import Images, Training, nearest_two, rows_of, within
from scaling.models.model import Condition
from scaling.study.detection import columns
from scaling.study.settings import NEAR, AuditSetting
from sims import store
from sims.store import fill
from sims.store.files import read_json

__all__ = ["RISK", "compare", "conclude", "draw", "read"]

RISK = 0.01
"""Share of held-out images that lie above the threshold of risk."""

DRAWN = ("samples", "steps", "eta", "guidance", "near")
"""Fields of the setting on which samples and their distances depend."""


def draw(
    pipeline: Pipeline,
    training: Training,
    out: str | Path,
    setting: AuditSetting,
    *,
    representation: Representation | None = None,
    prompts: Sequence[str] = (),
    keep_images: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_features: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Draw samples and find the two nearest training images of each; the same call resumes.

    Over ``sample``: ``nearest`` and ``distance`` of the nearest training image, ``second`` the distance of the nearest
    one that is another image, and ``images`` if they are kept. Sample i depends on ``seed`` and i alone. Prompts, or
    the classes of a DiT, come in turn; a model that reads text and is given none has the empty prompt. Distances are
    between pixels, or of the unit vectors of ``representation``, whose training features are computed once, into the
    folder ``features`` of the run, and counted by ``on_features``.

    ``ValueError`` for settings out of range, training images of another size than the samples, or that all count as
    one, and a folder that holds something else.
    """
    check_integer("samples", setting.samples, minimum=1)
    check_positive("coverage_sigma", setting.coverage_sigma)
    if not 0 <= setting.near < 2:
        raise ValueError(f"near must be at least 0 and below 2, got {setting.near}.")
    network, vae, key = pipeline.network, pipeline.vae, jax.random.key(check_seed("seed", seed))
    batch = min(check_integer("batch_size", batch_size, minimum=1), setting.samples)
    conditions, unconditional = _conditions(pipeline, prompts), None
    if setting.guidance != 1:
        unconditional = null_condition(pipeline)
    radius = setting.near * (math.sqrt(training.images.dim) if representation is None else 1)
    variants = 2 if setting.mirrors else 1

    # Computed when the run is open: else a killed process would leave a folder without a record.
    @functools.cache
    def searched() -> Images:
        if representation is None:
            return mirrored(training) if setting.mirrors else training.images
        return unit_features(
            training,
            representation,
            Path(out) / "features",
            mirrors=setting.mirrors,
            batch_size=batch_size,
            provenance=provenance,
            on_batch=on_features,
        )

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
        known = np.nan_to_num(images)
        if representation is not None:
            known = np.asarray(representation.encode(jnp.asarray(known)), np.float32)
        found = nearest_two(known.reshape(len(known), -1), searched(), radius, variants=variants)
        if np.isinf(found.other_distance).any():
            raise ValueError(
                f"all {training.images.count} training images lie within near = {setting.near:g} of one of them and "
                "count as one: the ratio test needs the distance to another one as well; give a smaller --near."
            )
        # A sample that is not finite is near nothing.
        distance = np.where(np.isfinite(images).all((1, 2, 3)), found.distance, np.nan)
        values = {"nearest": found.nearest, "distance": distance, "second": found.other_distance}
        return values | ({"images": images} if keep_images else {})

    spec = {
        "command": "audit",
        "model": identify(pipeline),
        "training": training.digest,
        "setting": {name: getattr(setting, name) for name in DRAWN},
        "prompts": list(prompts),
        "images": keep_images,
        "seed": seed,
    }
    # Audits from before these could be chosen resume.
    spec |= {} if representation is None else {"features": representation.identity}
    spec |= {"mirrors": True} if setting.mirrors else {}
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
    representation: Representation | None = None,
    scores: xr.Dataset | None = None,
    detectors: Sequence[str] = (),
    anonymous: bool = False,
) -> dict[str, Any]:
    """The audit as JSON values.

    Args:
        drawn: of :func:`draw`.
        training: the training set.
        setting: the same setting.
        representation: the same one.
        scores: of the first training images (group ``train``) and held-out ones (``held_out``), as of
            :func:`scaling.study.detection.score_items`; without it nothing is said of membership and risk.
        detectors: names of the scores.
        anonymous: name images by number and SHA-256 of their values alone.
    """
    distance, second = drawn.distance.values, drawn.second.values
    copied = distance < RATIO * second
    count, total = int(copied.sum()), len(copied)
    low, high = wilson_interval(count, total)
    # Repeats are counted in pixels, where a chord between features says nothing.
    pixel_near = setting.near if representation is None else NEAR
    radius = pixel_near * math.sqrt(training.images.dim)
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
    copies = sorted(tally.values(), key=lambda entry: (-entry["copies"], entry["number"]))
    generated = {j for entry in copies for j in entry["numbers"]}
    at_risk = [] if scores is None else _at_risk(scores, detectors, generated, name)
    listed = [*copies, *at_risk]
    covered = local_coverage(training.images, setting.coverage_sigma, [entry["number"] for entry in listed])
    for entry, coverage in zip(listed, covered.tolist(), strict=True):
        entry["coverage"] = coverage
    return {
        "format": 1,
        "training": {"images": training.images.count, "digest": training.digest},
        "setting": dataclasses.asdict(setting),
        "distance": {
            "features": PIXELS if representation is None else representation.name,
            "identity": {} if representation is None else _rule(representation),
            "unit": "root mean square over pixels in [-1, 1]" if representation is None else "chord of unit vectors",
            "near": setting.near,
            "pixel_near": pixel_near,
            "mirrors": setting.mirrors,
        },
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
        "copied": copies,
        "membership": {} if scores is None else _membership(scores, detectors),
        "at_risk": at_risk,
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
        "same_distance": _compared_by(before) == _compared_by(now),
    }


def read(folder: str | Path) -> dict[str, Any]:
    """The ``audit.json`` of an earlier audit; ``ValueError`` if there is none."""
    return read_json(Path(folder) / "audit.json")


def _rule(representation: Representation) -> dict[str, Any]:
    """Its identity but for the model whose features they may be, which another audit may be of."""
    return {name: value for name, value in representation.identity.items() if name != "model"}


def _compared_by(audit: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what samples were compared; audits from before it could be chosen compared pixels."""
    distance = audit.get("distance", {"identity": {}, "mirrors": False})
    near = distance.get("near", audit.get("setting", {}).get("near", NEAR))
    return distance["identity"], distance["mirrors"], near


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
