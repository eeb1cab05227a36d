"""Where in a network, and at which noise, do codes tell memorized images? Maps over layers, timesteps and pooling.

:func:`score_maps` passes over the network once for every image and timestep, for all layers, poolings and measures of
spikiness; :func:`rate` gives the area under the ROC curve at each place with its interval; :func:`report` names the
best place, chosen on one half of the images and rated on the other (:mod:`scaling.detection.selection`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_seed
from dae_theory.spikiness import MEASURES
from scaling.backend import compiler_options
from scaling.bridge.conditioning import null_or_none
from scaling.bridge.identity import identify
from scaling.bridge.loading import Pipeline
from scaling.detection.detectors import DETECTORS
from scaling.detection.evaluation import Estimate, auroc_interval
from scaling.detection.selection import choose, score, split
from scaling.measures.codes import encode_batch, pooled
from scaling.measures.options import POOLS
from scaling.models.model import Condition, Model
from scaling.models.taps import check_names
from scaling.study.detection import sides
from scaling.study.items import Items
from sims import store
from sims.store import checksum, fill
from sims.store.files import write_text
from sims.study.tables import csv_text, markdown

__all__ = ["Place", "all_taps", "rate", "report", "score_maps", "write_maps"]


class Place(NamedTuple):
    """One point of a map."""

    negatives: str
    measure: str
    timestep: int
    tap: str
    pool: str
    num_positives: int
    num_negatives: int
    area: Estimate


def all_taps(network: Model) -> tuple[str, ...]:
    """Every tap that has positions or tokens to pool over, in order of computation."""
    return tuple(name for name, shape in network.apply.taps(np.float32).items() if len(shape.shape) > 2)


def score_maps(
    pipeline: Pipeline,
    items: Items,
    out: str | Path,
    *,
    taps: Sequence[str] = (),
    timesteps: Sequence[int] = (10, 50, 200),
    pools: Sequence[str] = ("max", "mean"),
    seed: int = 0,
    batch_size: int = 32,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Measures of the codes of every image over ``timestep``, ``tap`` and ``pool``; the same call resumes.

    Image i has the same noise at every timestep, of ``fold_in(jax.random.key(seed), i)``, as for ``extract``. Nothing
    is conditioned on. ``taps``: all by default (:func:`all_taps`). ``ValueError`` for items without images, unknown
    taps and pools, timesteps outside [0, T), and a folder that holds something else.
    """
    if items.images is None:
        raise ValueError("maps are of images: give --train, --images, --known-members or --known-others.")
    pictures = items.images
    network, schedule, key = pipeline.network, pipeline.schedule, jax.random.key(check_seed("seed", seed))
    names = tuple(taps) or all_taps(network)
    check_names(network.apply.taps(np.float32), *names)
    levels = [check_integer("timesteps", t, minimum=0, maximum=schedule.num_train_timesteps - 1) for t in timesteps]
    for what, values in (("timesteps", levels), ("pools", list(pools)), ("taps", list(names))):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{what} must name at least one, and none twice; got {values}.")
    unknown = set(pools) - set(POOLS[:2])
    if unknown:
        raise ValueError(f"pools must be among {', '.join(POOLS[:2])}, got {', '.join(sorted(unknown))}.")
    condition = null_or_none(pipeline, size=(pictures.shape[2], pictures.shape[3]))
    size = min(check_integer("batch_size", batch_size, minimum=1), len(items.groups))

    def compute(rows: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        images, numbers = jnp.asarray(pictures[rows], jnp.float32), jnp.asarray(rows)
        each = [
            jax.device_get(
                _measured()(
                    key, network, schedule, pipeline.vae, images, numbers, jnp.int32(t), condition, names, tuple(pools)
                )
            )
            for t in levels
        ]
        return {name: np.stack([one[name] for one in each], axis=1) for name in MEASURES}

    spec = {
        "command": "ablate",
        "model": identify(pipeline),
        "images": checksum(pictures),
        "groups": list(items.groups),
        "taps": list(names),
        "timesteps": levels,
        "pools": list(pools),
        "seed": seed,
    }
    coords: dict[str, Any] = {"image": list(range(len(items.groups))), "timestep": levels, "tap": list(names)}
    coords |= {"pool": list(pools), "group": ("image", list(items.groups))}
    template = store.blank(coords, dict.fromkeys(MEASURES, (("image", "timestep", "tap", "pool"), np.float32)))
    fill(out, spec, template, size, compute, provenance=provenance, on_batch=on_batch)
    return store.load(out)


def rate(results: xr.Dataset) -> list[Place]:
    """The area at every place against every group of others, of memorized images; higher scores are spikier codes.

    Images of which a measure is not finite count nowhere; groups of fewer than two are left out.
    """
    places = []
    for negative, positives, others in _pairs(results):
        for name in MEASURES:
            for where, values in _scores(results, name):
                pair = values[positives], values[others]
                places.append(Place(negative, name, *where, len(positives), len(others), auroc_interval(*pair)))
    return places


def report(results: xr.Dataset, places: Sequence[Place]) -> str:
    """The best places as Markdown, and for each measure the place chosen on one half and rated on the other."""
    sizes = results.sizes
    count = sizes["timestep"] * sizes["tap"] * sizes["pool"]
    lines = [
        "# Where codes tell memorized images",
        "",
        f"{sizes['image']} images at {sizes['timestep']} timesteps, {sizes['tap']} layers and {sizes['pool']} "
        f"poolings: {count} places for each of {len(MEASURES)} measures. All areas with intervals are in map.csv.",
        "",
    ]
    if not places:
        lines += [
            "No place can be rated: that takes two images that are known to be memorized and two that are not.",
            "",
        ]
    head = ["measure", "timestep", "layer", "pool", "AUROC", "chosen on half", "on the other half"]
    for negative, positives, others in _pairs(results):
        body = []
        for name in MEASURES:
            here = [place for place in places if (place.negatives, place.measure) == (negative, name)]
            best = max(here, key=lambda place: place.area.value)
            chosen, rated = _chosen(results, name, positives, others)
            body.append([name, best.timestep, best.tap, best.pool, best.area.text(), chosen, rated])
        lines += [f"## Against {negative.replace('_', ' ')}", "", markdown(head, body), ""]
    if places:
        lines += [
            f"The first area is the largest of {count}, and too high for that; DeLong's 95 % interval does not know of "
            "the choice. The last column does: its place was chosen on one half of the images, and it is rated on the "
            "other.",
            "",
        ]
    return "\n".join(lines)


def write_maps(out: str | Path, results: xr.Dataset, places: Sequence[Place]) -> list[Path]:
    """Write ``map.csv``, a line for each place, and ``summary.md``; returns their paths."""
    head = [*Place._fields[:-1], "area", "area_low", "area_high"]
    files = [Path(out) / "map.csv", Path(out) / "summary.md"]
    write_text(files[0], csv_text(head, ([*place[:-1], *place.area] for place in places)))
    write_text(files[1], report(results, places))
    return files


@functools.cache
def _measured() -> Callable[..., dict[str, Float[Array, "b k p"]]]:
    return jax.jit(_measures, static_argnums=(8, 9), compiler_options=compiler_options())


def _measures(
    key: Any,
    network: Model,
    schedule: Any,
    vae: Model | None,
    images: Float[Array, "b c h w"],
    numbers: Int[Array, " b"],
    timestep: Int[Array, ""],
    condition: Condition,
    taps: tuple[str, ...],
    pools: tuple[Any, ...],
) -> dict[str, Float[Array, "b k p"]]:
    """All measures at all taps and poolings, from one pass."""
    whole = encode_batch(
        key, network, schedule, images, numbers, timestep, taps, vae=vae, condition=condition, pool="none"
    )
    return {
        name: jnp.stack(
            [jnp.stack([jax.vmap(measure)(pooled(whole[tap], pool)) for pool in pools], axis=1) for tap in taps], axis=1
        )
        for name, measure in MEASURES.items()
    }


def _pairs(results: xr.Dataset) -> list[tuple[str, Int[np.ndarray, " n"], Int[np.ndarray, " m"]]]:
    """Groups of others, with the numbers of memorized images and of theirs."""
    positives, groups = sides(results, MEASURES)
    return [(name, positives, others) for name, others in groups.items() if min(len(positives), len(others)) >= 2]


def _scores(results: xr.Dataset, name: str) -> list[tuple[tuple[int, str, str], Float[np.ndarray, " n"]]]:
    """A measure at every place, oriented."""
    values = DETECTORS[name].sign * results[name].transpose("timestep", "tap", "pool", "image").values.astype(float)
    labels = itertools.product(*(results[dim].values.tolist() for dim in ("timestep", "tap", "pool")))
    return list(zip(labels, values.reshape(-1, values.shape[-1]), strict=True))


def _chosen(
    results: xr.Dataset, name: str, positives: Int[np.ndarray, " n"], others: Int[np.ndarray, " m"]
) -> tuple[str, str]:
    if min(len(positives), len(others)) < 4:
        return "-", "-"
    places, values = zip(*_scores(results, name), strict=True)
    choosing, scoring = split(
        [f"t = {t}, {tap}, {pool}" for t, tap, pool in places], np.stack(values), positives, others
    )
    choice = choose(choosing)
    return choice.option, auroc_interval(*score(scoring, choice)).text()
