r"""When does the representation know something that the loss does not? Both as detectors, on hard cases.

Memorized images are compared with images that were never trained on, as they are and in hard :data:`CASES`: with other
noise, altered, against near-duplicates, against images that are easy to denoise, against images of equal difficulty.
Four scores are compared on the same images:

* representation: a measure of spikiness of codes at one timestep, tap and pooling;
* loss: the denoising error at one noise level;
* calibrated loss: the denoising error of a reference that memorizes nothing over that of the model,
  :math:`\log(e_\mathrm{ref}/e)`, at one level;
* combined: the logistic regression of membership on representation and loss.

Measure, place and level are chosen, and the regression is fitted, on one half of the images as they are; every case is
rated on the other half (:mod:`scaling.detection.selection`), so cases differ in nothing but the images. Representation
and loss are also chosen anew for each case, on the first half of its images: what they tell at their best. The default
reference is the Gaussian of images that are not rated, whose error is known in closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy import optimize, spatial
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dae_theory.spikiness import MEASURES
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import Pipeline
from scaling.detection.detectors import DETECTORS
from scaling.detection.evaluation import Estimate, auroc_difference, auroc_interval, proportion_interval, threshold_at
from scaling.detection.options import DetectionSetting
from scaling.detection.selection import Half, choose, score
from scaling.study.alterations import ALTERATIONS, alter
from scaling.study.detection import finite_items, score_items
from scaling.study.items import MEMBERS, Items
from scaling.study.maps import all_taps, score_maps

__all__ = ["CASES", "SCORES", "Case", "Finding", "Study", "compare", "gaussian_error", "score_variants"]

PLAIN, REDRAWN = "plain", "redrawn"
"""Variants of the images that are none: as they are, and with other noise of the detectors."""

VARIANTS = (PLAIN, REDRAWN, *ALTERATIONS)

SCORES = ("representation", "loss", "calibrated loss", "combined", "representation, anew", "loss, anew")

LARGEST = 4096
"""Pixels up to which the reference is the Gaussian."""

TINY = 1e-30
"""An error below this counts as this, so that its logarithm exists."""

FALSE_POSITIVE_RATE = 0.05
"""Share of unaltered others above the threshold at which altered images are looked for."""


class Case(NamedTuple):
    """Which images are told from which."""

    name: str
    words: str
    positives: str
    """Variant of the memorized images."""
    negatives: str
    """Variant of the others."""
    others: str = "all"
    """Which others: all; ``near``, the half that is nearest to a memorized image; ``matched``, one of equal difficulty
    for each memorized image; ``same``, the memorized images themselves, in the variant."""


CASES = (
    Case("as they are", "memorized images against images never trained on", PLAIN, PLAIN),
    Case("new noise", "the same, with other noise of the detectors", REDRAWN, REDRAWN),
    *(Case(name, f"both {each.words}", name, name) for name, each in ALTERATIONS.items() if not each.eases),
    Case("near-duplicates", "against the memorized images themselves, shifted: never seen so", PLAIN, "shift", "same"),
    Case("near others", "against the others that are nearest to a memorized image", PLAIN, PLAIN, "near"),
    *(Case(f"{name} others", f"against others {ALTERATIONS[name].words}", PLAIN, name) for name in ("blur", "fade")),
    Case("equal difficulty", "against others with the same error of the reference", PLAIN, PLAIN, "matched"),
)
"""Hard cases, in the order in which they are shown; the first is the one on which scores are chosen."""


class Finding(NamedTuple):
    """One score in one case."""

    case: str
    score: str
    option: str
    """The measure and place, or the noise level, chosen on the other half."""
    num_positives: int
    num_negatives: int
    area: Estimate
    difference: Estimate | None
    """Its area less that of the loss on the same images, chosen likewise; None for the loss itself."""
    found: Estimate | None
    """Share of the case's memorized images above the threshold that few unaltered others exceed; None if the score was
    chosen for the case."""
    false: Estimate | None
    """Likewise of the case's others."""


class Study(NamedTuple):
    """Scores of every image in every variant, higher where memorized."""

    representation: Mapping[str, Float[np.ndarray, "k n"]]
    """By variant, over measures and places."""
    loss: Mapping[str, Float[np.ndarray, "s n"]]
    """By variant, over noise levels: minus the logarithm of the denoising error."""
    reference: Mapping[str, Float[np.ndarray, "s n"]]
    """By variant, over noise levels: the logarithm of the reference's error."""
    options: tuple[str, ...]
    """Names of measures and places."""
    sigmas: tuple[float, ...]
    members: Int[np.ndarray, " p"]
    """Numbers of memorized images with finite scores."""
    others: Int[np.ndarray, " q"]
    near: Float[np.ndarray, " n"]
    """Distance of each image to the nearest memorized one."""


def score_variants(
    pipeline: Pipeline,
    items: Items,
    out: str | Path,
    *,
    taps: Sequence[str] = (),
    timesteps: Sequence[int] = (10, 50, 200),
    pools: Sequence[str] = ("max", "mean"),
    setting: DetectionSetting | None = None,
    reference: Pipeline | None = None,
    seed: int = 0,
    batch_size: int = 64,
    provenance: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Study:
    """Score every image in every variant; the same call resumes, each variant in runs of its own.

    Args:
        pipeline: the model.
        items: memorized images (groups ``duplicated`` or ``members``), others (``held_out``, or else ``others``), and
            images that only the Gaussian reference takes (``train``).
        out: folder of the runs: codes of the images as they are, and below it what else is scored.
        taps: where codes are read; all by default, see :func:`scaling.study.maps.score_maps`.
        timesteps: of the noise at which codes are read.
        pools: how codes are pooled.
        setting: noise levels and draws of the denoising error.
        reference: a model that was not trained on the memorized images; by default a Gaussian.
        seed: of all noise; the variant with other noise takes the next one.
        batch_size: images at a time.
        provenance: recorded beside the environment.
        on_batch: ``(done, total)``, over all variants.

    ``ValueError`` for fewer than eight memorized images or others, images too large for the Gaussian, a reference for
    other images, and as for :func:`scaling.study.detection.score_items` and :func:`scaling.study.maps.score_maps`.
    """
    setting = setting or DetectionSetting()
    images, rest, kept, count = _parts(items)
    if reference is None and images[0].size > LARGEST:
        raise ValueError(
            f"images of {images[0].size} values are too large for a Gaussian reference: give --reference, a model that "
            "was not trained on the memorized images."
        )
    models = [pipeline] if reference is None else [pipeline, reference]
    shown = {name: alter(images, name, seed=seed) if name in ALTERATIONS else images for name in VARIANTS}
    jobs = len(VARIANTS) * (1 + len(models))
    codes, errors = {}, {}
    for number, variant in enumerate(VARIANTS):
        each = kept._replace(images=shown[variant])
        folder = Path(out) if variant == PLAIN else Path(out) / "variants" / variant
        how: dict[str, Any] = {"seed": seed + (variant == REDRAWN), "batch_size": batch_size, "provenance": provenance}

        def move(job: int, done: int) -> None:
            if on_batch is not None:
                on_batch(job * len(images) + done, jobs * len(images))

        job = number * (1 + len(models))
        codes[variant] = score_maps(
            pipeline,
            each,
            folder,
            taps=taps,
            timesteps=timesteps,
            pools=pools,
            on_batch=lambda done, _, job=job: move(job, done),
            **how,
        )
        errors[variant] = [
            score_items(
                model,
                each,
                folder / name,
                detectors=["error"],
                setting=_without_taps(setting, model),
                on_batch=lambda done, _, job=job + k: move(job, done),
                **how,
            )
            for k, (model, name) in enumerate(zip(models, ("loss", "reference"), strict=False), 1)
        ]
    finite = np.all(
        [
            finite_items(each, names)
            for variant in VARIANTS
            for each, names in ((codes[variant], MEASURES), *((one, ["error"]) for one in errors[variant]))
        ],
        axis=0,
    )
    numbers = np.arange(len(images))
    members, others = (numbers[part & finite] for part in (numbers < count, numbers >= count))
    loss, *calibration = ({name: _log_errors(errors[name][k]) for name in VARIANTS} for k in range(len(models)))
    if calibration:
        known = calibration[0]
    else:
        # Only every second of the others is rated, see compare; the Gaussian sees none of these.
        learned = _flat(pipeline, np.concatenate([rest, images[others[::2]]]))
        known = {
            name: np.log(gaussian_error(_flat(pipeline, shown[name]), learned, setting.sigmas)) for name in VARIANTS
        }
    pixels = images.reshape(len(images), -1)
    apart = spatial.distance.cdist(pixels, pixels[members])
    apart[members, np.arange(len(members))] = np.inf
    oriented = {name: _oriented(codes[name]) for name in VARIANTS}
    return Study(
        {name: values for name, (_, values) in oriented.items()},
        {name: -values for name, values in loss.items()},
        known,
        oriented[PLAIN][0],
        setting.sigmas,
        members,
        others,
        apart.min(axis=1),
    )


def compare(study: Study, cases: Sequence[Case] = CASES) -> list[Finding]:
    """Every score in every case, on the half of the images on which nothing was chosen."""
    levels = tuple(f"sigma = {sigma:g}" for sigma in study.sigmas)
    calibrated = {variant: study.reference[variant] + study.loss[variant] for variant in VARIANTS}
    tables: dict[str, tuple[tuple[str, ...], Mapping[str, Float[np.ndarray, "k n"]]]] = {
        "representation": (study.options, study.representation),
        "loss": (levels, study.loss),
        "calibrated loss": (levels, calibrated),
    }
    learned, rated = ([part[k::2] for part in (study.members, study.others)] for k in (0, 1))
    picks = {name: choose(_half(table, CASES[0], *learned)) for name, table in tables.items()}
    level = levels.index(picks["loss"].option)
    # One row for each score, over all images, by variant.
    rows = {
        name: {variant: table[variant][options.index(picks[name].option)] for variant in VARIANTS}
        for name, (options, table) in tables.items()
    }
    both = {variant: np.stack([rows[name][variant] for name in SCORES[:2]], axis=1) for variant in VARIANTS}
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(np.concatenate([both[PLAIN][part] for part in learned]), np.repeat([1, 0], [len(p) for p in learned]))
    rows["combined"] = {variant: model.decision_function(both[variant]) for variant in VARIANTS}
    thresholds = {name: threshold_at(rows[name][PLAIN][rated[1]], FALSE_POSITIVE_RATE) for name in rows}

    def of_case(case: Case) -> list[Finding]:
        difficulty = study.reference[PLAIN][level]
        seen, others = (_others(case, study, half[0], half[1], difficulty) for half in (learned, rated))
        half = {name: _half(table, case, rated[0], others) for name, table in tables.items()}
        pairs = {name: (picks[name].option, score(half[name], picks[name])) for name in picks}
        combined = rows["combined"]
        pairs["combined"] = (
            "representation and loss",
            (combined[case.positives][rated[0]], combined[case.negatives][others]),
        )
        for name in SCORES[:2]:
            anew = choose(_half(tables[name], case, learned[0], seen))
            pairs[f"{name}, anew"] = anew.option, score(half[name], anew)
        found = []
        for name in SCORES:
            option, pair = pairs[name]
            rival = "loss, anew" if name.endswith("anew") else "loss"
            counts = [int(np.sum(values > thresholds[name])) for values in pair] if name in thresholds else []
            shares = [proportion_interval(k, len(values)) for k, values in zip(counts, pair, strict=bool(counts))]
            found.append(
                Finding(
                    case.name,
                    name,
                    option,
                    len(pair[0]),
                    len(pair[1]),
                    auroc_interval(*pair),
                    None if name == rival else auroc_difference(pair, pairs[rival][1]),
                    *(shares or (None, None)),
                )
            )
        return found

    return [finding for case in cases for finding in of_case(case)]


def gaussian_error(
    images: Float[np.ndarray, "n d"], learned: Float[np.ndarray, "m d"], sigmas: Sequence[float]
) -> Float[np.ndarray, "s n"]:
    r"""The mean squared error of the Wiener filter of ``learned`` at noisy images, in closed form.

    .. math:: E\|D(x + \sigma\epsilon) - x\|^2 = \sum_j \left(\frac{\sigma^2 u_j}{s_j + \sigma^2}\right)^2
              + \sigma^2 \sum_j \left(\frac{s_j}{s_j + \sigma^2}\right)^2, \qquad u = V^\top (x - \mu)

    with the mean of ``learned`` and the eigenvectors V and eigenvalues s of its covariance, shrunk by the rule of
    Ledoit and Wolf, which exists for fewer images than pixels.
    """
    fitted = LedoitWolf().fit(np.asarray(learned, float))
    values, vectors = np.linalg.eigh(fitted.covariance_)
    u = (np.asarray(images, float) - fitted.location_) @ vectors
    errors = []
    for sigma in sigmas:
        gain = np.maximum(values, 0) / (np.maximum(values, 0) + sigma**2)
        errors.append(np.sum(((1 - gain) * u) ** 2, axis=1) + sigma**2 * np.sum(gain**2))
    return np.stack(errors)


def _half(
    table: tuple[tuple[str, ...], Mapping[str, Float[np.ndarray, "k n"]]],
    case: Case,
    members: Int[np.ndarray, " p"],
    others: Int[np.ndarray, " q"],
) -> Half:
    """Scores of a case under every option, with the numbers of its images."""
    options, values = table
    images = frozenset(members.tolist()) | frozenset(others.tolist())
    return Half(options, values[case.positives][:, members], values[case.negatives][:, others], images)


def _others(
    case: Case,
    study: Study,
    members: Int[np.ndarray, " p"],
    others: Int[np.ndarray, " q"],
    difficulty: Float[np.ndarray, " n"],
) -> Int[np.ndarray, " m"]:
    match case.others:
        case "same":
            return members
        case "near":
            order = np.argsort(study.near[others], kind="stable")
            return np.sort(others[order[: max(len(others) // 2, 2)]])
        case "matched":
            apart = np.abs(difficulty[members][:, None] - difficulty[others][None, :])
            return np.sort(others[optimize.linear_sum_assignment(apart)[1]])
        case _:
            return others


def _parts(items: Items) -> tuple[Any, Any, Items, int]:
    """Memorized images and others, in this order; images that are not scored; the items; how many are memorized."""
    groups = np.asarray(items.groups)
    members = np.flatnonzero(np.isin(groups, MEMBERS))
    others = np.flatnonzero(groups == ("held_out" if "held_out" in groups else "others"))
    if items.images is None or min(len(members), len(others)) < 8:
        raise ValueError(
            f"{len(members)} memorized images and {len(others)} that were never trained on: give at least eight of "
            "each, by --train with a model that has a record, or by --known-members and --known-others."
        )
    chosen = np.concatenate([members, others])
    names = tuple(items.names[row] for row in chosen.tolist())
    kept = items._replace(prompts=(), groups=tuple(groups[chosen].tolist()), names=names)
    return items.images[chosen], items.images[groups == "train"], kept, len(members)


def _oriented(results: xr.Dataset) -> tuple[tuple[str, ...], Float[np.ndarray, "k n"]]:
    """Every measure at every place, higher where memorized."""
    dims = ("timestep", "tap", "pool")
    places = list(itertools.product(*(results[dim].values.tolist() for dim in dims)))
    names = [f"{name}, t = {t}, {tap}, {pool}" for name in MEASURES for t, tap, pool in places]
    values = [
        DETECTORS[name].sign * results[name].transpose(*dims, "image").values.astype(float).reshape(len(places), -1)
        for name in MEASURES
    ]
    return tuple(names), np.concatenate(values)


def _log_errors(results: xr.Dataset) -> Float[np.ndarray, "s n"]:
    return np.log(np.maximum(-results.error.transpose("sigma", "image").values.astype(float), TINY))


def _without_taps(setting: DetectionSetting, model: Pipeline) -> DetectionSetting:
    """The setting with one tap, which is not read: the default ones are not those of every model."""
    return DetectionSetting(**{**setting.__dict__, "taps": all_taps(model.network)[:1]})


def _flat(pipeline: Pipeline, images: Float[np.ndarray, "n c h w"]) -> Float[np.ndarray, "n d"]:
    """What the network sees of images, the images or their latents, as vectors."""
    if pipeline.vae is not None:
        parts = [_encode(pipeline.vae, jnp.asarray(images[k : k + 8], jnp.float32)) for k in range(0, len(images), 8)]
        images = np.concatenate([np.asarray(part) for part in parts])
    return images.reshape(len(images), -1)


_encode = jax.jit(to_latents)
