"""Which images has a model memorized? Scores of every detector for every image, and how well they tell.

Items are images by their part in training, each with a prompt where the model reads text
(:mod:`scaling.study.items`). :func:`score_items` scores them into a run that resumes; :func:`evaluate` compares
memorized images with each group of others, and :mod:`scaling.study.detection_report` says it in words. Where a detector
has several taps or noise levels, one is chosen on half of the images and scored on the other half
(:mod:`scaling.detection.selection`); the other detectors are then rated on that half too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_integer, check_seed
from scaling.bridge.conditioning import condition_on, null_or_none, stacked
from scaling.bridge.identity import identify
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import Pipeline
from scaling.detection.detectors import DETECTORS, Detector, applicable, check_setting, score_batch
from scaling.detection.evaluation import (
    Detection,
    Estimate,
    auroc,
    auroc_difference,
    auroc_interval,
    auroc_over_seeds,
    detection_rate,
)
from scaling.detection.options import NAMES, DetectionSetting
from scaling.detection.probes import Batch, usual_neurons
from scaling.detection.selection import choose, score, split
from scaling.models.model import Condition
from scaling.study.items import MEMBERS, OTHERS, Items
from sims import store
from sims.store import checksum, fill

__all__ = [
    "OverSeeds",
    "Rated",
    "Row",
    "columns",
    "evaluate",
    "finite_items",
    "over_seeds",
    "rated",
    "read_scores",
    "resolve",
    "score_items",
    "sides",
]


class Row(NamedTuple):
    """One detector against one group of others."""

    detector: str
    option: str
    """The tap or noise level that was chosen on the other half of the images; "" where there is none to choose."""
    positives: str
    """The group, and the kind of prompt."""
    negatives: str
    num_positives: int
    num_negatives: int
    area: Estimate
    rate: Detection
    difference: Estimate | None
    """Its area less that of the first detector on the same items; None for the first."""


class OverSeeds(NamedTuple):
    """One detector against one group of others, over runs that differ in their seeds."""

    detector: str
    option: str
    """Chosen on the other half of the images in the first run."""
    negatives: str
    seeds: int
    num_positives: int
    num_negatives: int
    area: Estimate
    """Its mean, with an interval over seeds and items."""
    lowest: float
    """The area in the run where it is lowest."""
    highest: float


def resolve(
    detectors: str | Sequence[str | Detector],
    pipeline: Pipeline,
    *,
    images: bool,
    prompts: bool,
    ordinary: bool = False,
) -> tuple[Detector, ...]:
    """Detectors by name; "all" are those for which the pipeline and what is given suffice.

    ``ValueError`` for unknown names, and for detectors that the model or the data cannot support.
    """
    able = applicable(pipeline, images=images, prompts=prompts, ordinary=ordinary)
    if detectors == "all":
        return able
    chosen = []
    for each in [detectors] if isinstance(detectors, str) else detectors:
        if isinstance(each, Detector):
            chosen.append(each)
            continue
        if each not in NAMES:
            raise ValueError(f"unknown detector {each!r}; known are {', '.join(NAMES)}.")
        found = [detector for detector in able if detector.name == each]
        if not found:
            raise ValueError(f"{each} needs what is missing here: it takes {_needs(each)}; omit it.")
        chosen += found
    if len({detector.name for detector in chosen}) < len(chosen) or not chosen:
        raise ValueError("name each detector once, and at least one.")
    return tuple(chosen)


def score_items(
    pipeline: Pipeline,
    items: Items,
    out: str | Path,
    *,
    detectors: str | Sequence[str | Detector] = "all",
    setting: DetectionSetting | None = None,
    ordinary: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Score all items in the run's folder ``out``; the same call resumes, and no finished item is lost.

    Returns the scores, higher where memorized, one variable for each detector over ``image`` and ``tap`` or ``sigma``
    where it has several; ``group``, ``name``, ``prompt`` and ``kind`` are coordinates, ``seconds`` the time of each
    item. Item i draws its noise from ``fold_in(jax.random.key(seed), i)``.

    Args:
        pipeline: the model.
        items: what to score.
        out: folder of the run.
        detectors: "all", names, or entries of one's own.
        setting: where and how much they compute.
        ordinary: prompts that are not memorized, with whose neurons those of the items are compared.
        seed: of all noise.
        batch_size: items at a time.
        provenance: recorded beside the environment.
        on_batch: ``(done, total)``.

    ``ValueError`` as for :func:`resolve` and :func:`scaling.detection.detectors.check_setting`, and for a folder that
    holds something else.
    """
    schedule = pipeline.schedule
    setting = check_setting(setting or DetectionSetting(), pipeline.network, schedule.num_train_timesteps)
    chosen = resolve(
        detectors, pipeline, images=items.images is not None, prompts=bool(items.prompts), ordinary=bool(ordinary)
    )
    key = jax.random.key(check_seed("seed", seed))
    size = min(check_integer("batch_size", batch_size, minimum=1), len(items.groups))
    shape = None if items.images is None else (items.images.shape[2], items.images.shape[3])
    unconditional = null_or_none(pipeline, size=shape)

    @functools.lru_cache(maxsize=1024)
    def conditioned(prompt: str) -> Condition:
        return condition_on(pipeline, prompt, size=shape)

    @functools.cache
    def usual() -> dict[str, tuple[Array, Array]] | None:
        if not any("ordinary prompts" in detector.needs for detector in chosen):
            return None
        return usual_neurons(pipeline.network, stacked([condition_on(pipeline, text, size=shape) for text in ordinary]))

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        images = None
        if items.images is not None:
            images = jnp.asarray(items.images[rows], jnp.float32)
            images = images if pipeline.vae is None else _encode(pipeline.vae, images)
        own = [conditioned(items.prompts[row].text) for row in rows] if items.prompts else [unconditional]
        numbers = jnp.asarray(rows)
        batch = Batch(pipeline.network, schedule, numbers, images, stacked(own), unconditional, pipeline.vae, usual())
        begin = time.perf_counter()
        values = score_batch(key, batch, chosen, setting)
        spent = (time.perf_counter() - begin) / len(rows)
        return values | {"seconds": np.full(len(rows), spent, np.float32)}

    spec = {
        "command": "detect",
        "model": identify(pipeline),
        "images": None if items.images is None else checksum(items.images),
        "prompts": [list(prompt) for prompt in items.prompts],
        "groups": list(items.groups),
        "detectors": [detector.name for detector in chosen],
        "setting": json.loads(json.dumps(dataclasses.asdict(setting))),
        "seed": seed,
    }
    if ordinary:
        spec["ordinary"] = list(ordinary)
    fill(out, spec, _template(items, chosen, setting), size, compute, provenance=provenance, on_batch=on_batch)
    return store.load(out)


def read_scores(folder: str | Path) -> xr.Dataset:
    """The scores of a finished run of ``detect``; ``ValueError`` if it is something else or not finished."""
    spec, results = store.read_spec(folder)["spec"], store.load(folder)
    if spec.get("command") != "detect" or not bool(results.done.all()):
        raise ValueError(f"{folder} is no finished run of `python -m scaling detect`.")
    return results


def evaluate(results: xr.Dataset, detectors: Sequence[Detector], *, false_positive_rate: float = 0.01) -> list[Row]:
    """Every detector against every group of others, for all memorized items and for each kind of their prompts.

    Items of which a score is not finite count for no detector. Groups of fewer than two (with taps or noise levels to
    choose: four) are left out.
    """
    kinds, rows = results.kind.values, []
    members, groups = sides(results, [detector.name for detector in detectors])
    for negative, others in groups.items():
        for kind in ("", *sorted({kind for kind in kinds[members] if kind})):
            positives = members[kinds[members] == kind] if kind else members
            rows += _against(results, detectors, positives, others, (kind or "all", negative), false_positive_rate)
    return rows


class Rated(NamedTuple):
    """The scores by which a detector is rated."""

    detector: Detector
    option: str
    """The tap or noise level that was chosen on the other half; "" where there is none to choose."""
    positives: Float[np.ndarray, " n"]
    negatives: Float[np.ndarray, " m"]


def rated(
    results: xr.Dataset,
    detectors: Sequence[Detector],
    positives: Int[np.ndarray, " n"],
    others: Int[np.ndarray, " m"],
) -> list[Rated]:
    """The scores of memorized items and of others, by detector, on the same items for all.

    If a tap or noise level of any detector is to be chosen, these are the other half of the items. Detectors for which
    there are too few are left out.
    """
    several = [detector for detector in detectors if detector.options and results.sizes[detector.options] > 1]
    found: list[Rated] = []
    for detector in detectors:
        values = np.atleast_2d(results[detector.name].transpose(..., "image").values.astype(float))
        options = [str(value) for value in results[detector.options].values] if detector.options else [""]
        if several and min(len(positives), len(others)) >= 4:
            choosing, scoring = split(options, values, positives, others)
            choice = choose(choosing)
            found.append(Rated(detector, choice.option, *score(scoring, choice)))
        elif detector not in several and min(len(positives), len(others)) >= 2:
            found.append(Rated(detector, options[0], values[0, positives], values[0, others]))
    return found


def over_seeds(runs: Sequence[xr.Dataset], detectors: Sequence[Detector]) -> list[OverSeeds]:
    """Every detector against every group of others, over runs of the same items with other seeds.

    These are networks trained anew, or other noise of the detectors. Taps and noise levels are those that are chosen in
    the first run, and items those that are rated there and have finite scores in all runs. ``ValueError`` for runs of
    other items, and runs that lack a score or an option.
    """
    names = [detector.name for detector in detectors]
    for run in runs[1:]:
        for name in ("group", "prompt"):
            if run[name].values.tolist() != runs[0][name].values.tolist():
                raise ValueError(f"give runs of the same items: {name} differs from this run's.")
        lacking = [name for name in names if name not in run]
        if lacking:
            raise ValueError(f"a run to be rated with this one lacks the score {lacking[0]}.")
    finite = np.all([finite_items(run, names) for run in runs], axis=0)
    members, groups = sides(runs[0], names)
    several = any(detector.options and runs[0].sizes[detector.options] > 1 for detector in detectors)
    found = []
    for negative, others in groups.items():
        numbers = [part[finite[part]] for part in (members, others)]
        first = rated(runs[0], detectors, *numbers)
        if several and min(map(len, numbers)) >= 4:
            numbers = [part[1::2] for part in numbers]
        for each in first:
            scores = [_option(run, each.detector, each.option) for run in runs]
            pair = [np.stack([values[part] for values in scores]) for part in numbers]
            if min(side.shape[1] for side in pair) < 2:
                continue
            areas, sizes = auroc(*pair), [side.shape[1] for side in pair]
            found.append(
                OverSeeds(
                    each.detector.name,
                    each.option,
                    negative,
                    len(runs),
                    sizes[0],
                    sizes[1],
                    auroc_over_seeds(pair[0], pair[1]),
                    float(areas.min()),
                    float(areas.max()),
                )
            )
    return found


def _option(run: xr.Dataset, detector: Detector, option: str) -> Float[np.ndarray, " n"]:
    """Scores under one tap or noise level, by its text."""
    values = np.atleast_2d(run[detector.name].transpose(..., "image").values.astype(float))
    options = [str(value) for value in run[detector.options].values] if detector.options else [""]
    if option not in options:
        raise ValueError(f"a run to be rated with this one lacks {detector.name} at {option}.")
    return values[options.index(option)]


def _against(
    results: xr.Dataset,
    detectors: Sequence[Detector],
    positives: Int[np.ndarray, " n"],
    others: Int[np.ndarray, " m"],
    names: tuple[str, str],
    rate: float,
) -> list[Row]:
    found = rated(results, detectors, positives, others)
    return [
        Row(
            each.detector.name,
            each.option,
            *names,
            len(each.positives),
            len(each.negatives),
            auroc_interval(*each[2:]),
            detection_rate(*each[2:], false_positive_rate=rate),
            auroc_difference(each[2:], found[0][2:]) if k else None,
        )
        for k, each in enumerate(found)
    ]


def columns(results: xr.Dataset, name: str) -> list[tuple[str, Float[np.ndarray, " n"]]]:
    """The scores of a detector by item: one column, or one for each tap or noise level, as ``std@mid_block``."""
    (own,) = [dim for dim in results[name].dims if dim != "image"] or [None]
    if own is None:
        return [(name, results[name].values)]
    return [(f"{name}@{label}", results[name].isel({own: k}).values) for k, label in enumerate(results[own].values)]


def finite_items(results: xr.Dataset, names: Iterable[str]) -> Bool[np.ndarray, " n"]:
    """The items of which every score is finite."""
    every = [np.isfinite(results[name].transpose("image", ...).values) for name in names]
    return np.all([each.reshape(len(each), -1).all(axis=1) for each in every], axis=0)


def sides(results: xr.Dataset, names: Iterable[str]) -> tuple[Int[np.ndarray, " n"], dict[str, Int[np.ndarray, " m"]]]:
    """The numbers of memorized items, and of each group of others that there is; only items with finite scores."""
    groups, finite = results.group.values, finite_items(results, names)
    others = {name: np.flatnonzero((groups == name) & finite) for name in OTHERS if name in groups}
    return np.flatnonzero(np.isin(groups, MEMBERS) & finite), others


def _needs(name: str) -> str:
    needs = DETECTORS[name].needs
    if "ordinary prompts" in needs:
        return "prompts, ordinary ones to compare with (--ordinary-prompts) and a UNet that reads text"
    return "a prompt for each item and a model that reads text" if "prompt" in needs else "images"


def _template(items: Items, detectors: Sequence[Detector], setting: DetectionSetting) -> xr.Dataset:
    options = {"tap": list(setting.taps), "sigma": list(setting.sigmas)}
    used = {detector.options for detector in detectors if detector.options}
    text = {
        "group": items.groups,
        "name": items.names,
        "prompt": [prompt.text for prompt in items.prompts] or [""] * len(items.groups),
        "kind": [prompt.kind for prompt in items.prompts] or [""] * len(items.groups),
    }
    coords: dict[str, Any] = {"image": list(range(len(items.groups)))} | {
        dim: options[dim] for dim in options if dim in used
    }
    coords |= {
        name: ("image", [each.encode("utf-8", "backslashreplace").decode() for each in values])
        for name, values in text.items()
    }
    variables: dict[str, Any] = {
        detector.name: (("image", *([detector.options] if detector.options else [])), np.float32)
        for detector in detectors
    }
    return store.blank(coords, variables | {"seconds": (("image",), np.float32)})


_encode = jax.jit(to_latents)
