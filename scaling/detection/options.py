"""Which detectors there are and how much they compute; imports no JAX, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses

from sims.flags import documented, flag, parse_floats, parse_names

__all__ = ["NAMES", "DetectionSetting"]

NAMES = (
    "std",
    "l4_over_l2",
    "participation_ratio",
    "hoyer",
    "kurtosis",
    "error",
    "error_min",
    "intrinsic_dimension",
    "guidance_difference",
    "sharpness",
    "anisotropy",
    "guidance_difference_mean",
    "update_peak",
    "repeats_nearest",
    "repeats_mean",
    "repeats_clique",
    "noise_similarity",
    "neuron_peak",
    "neuron_count",
)
"""Names of the detectors, in the order of :data:`scaling.detection.detectors.DETECTORS`."""

GROUP = "the detectors"


@documented
@dataclasses.dataclass(frozen=True)
class DetectionSetting:
    """Where and how much the detectors compute; the defaults for Stable Diffusion are those of their sources."""

    taps: tuple[str, ...] = flag(
        (),
        "modules at which codes are read; empty: the resnets of the first up block, or all blocks of a DiT",
        group=GROUP,
        type=parse_names,
        metavar="NAME,...",
    )
    timestep: int = flag(50, "timestep, from 0 to T - 1, at which codes are read", group=GROUP, metavar="T")
    sigmas: tuple[float, ...] = flag(
        (0.25, 0.5, 1.0, 2.0),
        "noise levels > 0 of the denoising error, for images x in [-1, 1]",
        group=GROUP,
        name="--sigma",
        type=parse_floats,
        metavar="S,...",
    )
    draws: int = flag(4, "noise draws >= 1 of the denoising error at each level", group=GROUP, metavar="N")
    dimension_sigma: float = flag(
        0.1, "positive noise level of the local intrinsic dimension", group=GROUP, metavar="S"
    )
    probes: int = flag(
        8, "random directions >= 0 of its trace; 0, or as many as an image has values: exact", group=GROUP, metavar="N"
    )
    noises: int = flag(1, "starting noises >= 1 per prompt", group=GROUP, metavar="N")
    high: float = flag(
        0.981,
        "high noise for scores of prompts, a share of T from 0 to below 1: the first of 50 steps",
        group=GROUP,
        metavar="S",
    )
    low: float = flag(
        0.041, "low noise, likewise from 0 to below 1: the third of 50 steps from the end", group=GROUP, metavar="S"
    )
    steps: int = flag(20, "sampling steps >= 2 of scores along a path", group=GROUP, metavar="N")
    guidance: float = flag(7.5, "guidance of these paths; 1: none", group=GROUP, metavar="W")
    generations: int = flag(4, "samples >= 2 per prompt that are compared with one another", group=GROUP, metavar="N")
    tiles: int = flag(4, "tiles >= 1 along each side in that comparison", group=GROUP, metavar="N")
    clique: float = flag(
        0.15, "positive distance below which two of these samples count as alike", group=GROUP, metavar="D"
    )
    starts: int = flag(10, "starting noises >= 2 whose predicted noises are compared", group=GROUP, metavar="N")
    outlier: float = flag(5.0, "positive z-score above which a neuron is counted", group=GROUP, metavar="Z")
