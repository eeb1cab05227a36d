r"""The detectors of the field in one table: scores of images and prompts, higher where a model has memorized.

A detector is a :class:`Detector`: a name, what it needs, its cost, and a probe, which computes the raw quantities of a
batch; several detectors share the probe that their numbers come from. To add one, append another to the sequence::

    names = [*applicable(pipeline, prompts=False), Detector("brightness", brightness, 1, (), lambda setting: 0)]
    scores = score_batch(key, batch, names, setting)

The probes, and the batch that they take, are in :mod:`scaling.detection.probes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dae_theory.checks import check_integer, check_positive
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.bridge.loading import Pipeline
from scaling.detection.options import NAMES, DetectionSetting
from scaling.detection.probes import (
    Batch,
    denoising_errors,
    dimensions,
    neuron_layers,
    neurons_of_prompts,
    noises_of_prompts,
    paths_of_prompts,
    pulls_of_prompts,
    repeats_of_prompts,
    spikiness_of_codes,
)
from scaling.models.model import Model
from scaling.models.taps import check_names

__all__ = [
    "DETECTORS",
    "NAMES",
    "DetectionSetting",
    "Detector",
    "applicable",
    "check_setting",
    "default_taps",
    "score_batch",
]


Probe: TypeAlias = Callable[[PRNGKey, Batch, DetectionSetting], Mapping[str, Array]]
"""Raw quantities of a batch by detector: (b,), or (b, k) for k taps or noise levels."""


class Detector(NamedTuple):
    """An entry of the table."""

    name: str
    """Also of its quantity in what the probe returns."""
    probe: Probe
    sign: int
    """1 if memorized items have high values of the quantity, -1 if low ones."""
    needs: tuple[str, ...]
    """Of "image", "prompt", "derivative", "path", "ordinary prompts"."""
    passes: Callable[[DetectionSetting], int]
    """Network passes per item; a derivative along a direction counts as two more."""
    options: str = ""
    """What a second axis of the quantity runs over: "tap", "sigma", or nothing."""
    source: str = ""
    """Key in the bibliography."""


def applicable(
    pipeline: Pipeline, *, images: bool = True, prompts: bool = True, ordinary: bool = False
) -> tuple[Detector, ...]:
    """The detectors of the table for which the pipeline and what is given suffice; ``ordinary``: ordinary prompts."""
    reads_text = prompts and "context" in pipeline.network.apply.inputs(jnp.float32)[1]
    given = {"derivative", "path"} | ({"image"} if images else set()) | ({"prompt"} if reads_text else set())
    if ordinary and neuron_layers(pipeline.network):
        given.add("ordinary prompts")
    return tuple(detector for detector in DETECTORS.values() if given.issuperset(detector.needs))


def default_taps(network: Model) -> tuple[str, ...]:
    """The resnets of the first up block of a UNet, as in the paper, or every block of a transformer."""
    names = network.apply.taps(np.float32)
    for pattern in ("up_blocks.0.resnets.", "transformer_blocks."):
        found = tuple(name for name in names if name.startswith(pattern) and name.removeprefix(pattern).isdecimal())
        if found:
            return found
    raise ValueError(f"name the taps to read (--taps): the network has {', '.join(list(names)[:5])}, ...")


def check_setting(setting: DetectionSetting, network: Model, num_timesteps: int) -> DetectionSetting:
    """The setting with its taps; ``ValueError`` for values out of range and taps that the network lacks."""
    for name, least in (
        ("draws", 1), ("probes", 0), ("noises", 1), ("steps", 2), ("generations", 2), ("tiles", 1), ("starts", 2)
    ):  # fmt: skip
        check_integer(name, getattr(setting, name), minimum=least)
    check_positive("outlier", setting.outlier)
    if not 0 < setting.clique <= 1:
        raise ValueError(f"clique must be positive and at most 1, got {setting.clique}.")
    check_integer("timestep", setting.timestep, minimum=0, maximum=num_timesteps - 1)
    if not setting.sigmas:
        raise ValueError("sigmas must name at least one noise level.")
    check_positive("sigmas", np.asarray(setting.sigmas, float))
    check_positive("dimension_sigma", setting.dimension_sigma)
    for name in ("high", "low"):
        if not 0 <= getattr(setting, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, a share of T; got {getattr(setting, name)}.")
    taps = setting.taps or default_taps(network)
    check_names(network.apply.taps(np.float32), *taps)
    (x, *_), _ = network.apply.inputs(jnp.float32)
    return DetectionSetting(
        **{**setting.__dict__, "taps": tuple(taps), "probes": setting.probes or int(np.prod(x.shape[1:]))}
    )


def score_batch(
    key: PRNGKey, batch: Batch, detectors: Sequence[Detector], setting: DetectionSetting
) -> dict[str, np.ndarray]:
    """Scores by detector, (b,) or (b, k), higher where memorized: the sign times the raw quantity; each probe once."""
    raw: dict[str, Any] = {}
    for probe in dict.fromkeys(detector.probe for detector in detectors):
        raw |= jax.device_get(dict(probe(key, batch, setting)))
    return {detector.name: np.asarray(detector.sign * raw[detector.name], np.float32) for detector in detectors}


def _table() -> dict[str, Detector]:
    image, prompt, path = ("image",), ("prompt",), ("prompt", "path")
    signs = {"participation_ratio": -1}

    def guided(setting: DetectionSetting) -> int:
        return 2 * setting.steps

    rows = [
        *(
            Detector(name, spikiness_of_codes, signs.get(name, 1), image, lambda _: 1, "tap", "zhang26")
            for name in MEASURES
        ),
        Detector("error", denoising_errors, -1, image, lambda s: s.draws, "sigma"),
        Detector("error_min", denoising_errors, -1, image, lambda s: s.draws * len(s.sigmas)),
        Detector(
            "intrinsic_dimension",
            dimensions,
            -1,
            (*image, "derivative"),
            lambda s: 1 + 2 * s.probes,
            source="kamkari24",
        ),
        Detector("guidance_difference", pulls_of_prompts, 1, prompt, lambda s: 2 * s.noises, source="wen24"),
        Detector("sharpness", pulls_of_prompts, 1, (*prompt, "derivative"), lambda s: 6 * s.noises, source="jeon25"),
        Detector("anisotropy", pulls_of_prompts, 1, prompt, lambda s: 4 * s.noises, source="asthana26"),
        Detector("guidance_difference_mean", paths_of_prompts, 1, path, guided, source="wen24"),
        Detector("update_peak", paths_of_prompts, 1, path, guided),
        *(
            Detector(name, repeats_of_prompts, -1, path, lambda s: guided(s) * s.generations, source="carlini23")
            for name in ("repeats_nearest", "repeats_mean")
        ),
        Detector(
            "repeats_clique", repeats_of_prompts, 1, path, lambda s: guided(s) * s.generations, source="carlini23"
        ),
        Detector("noise_similarity", noises_of_prompts, 1, prompt, lambda s: s.starts, source="hintersdorf24"),
        *(
            Detector(name, neurons_of_prompts, 1, (*prompt, "ordinary prompts"), lambda _: 1, source="hintersdorf24")
            for name in ("neuron_peak", "neuron_count")
        ),
    ]
    return {row.name: row for row in rows}


DETECTORS: Mapping[str, Detector] = MappingProxyType(_table())
"""The table, in the order in which it is shown."""
