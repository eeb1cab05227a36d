"""How much an experiment computes: the settings of an examination and of a run over Jacobians.

Each field is a flag of the commands. The module imports no JAX, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses

from scaling.measures.options import CHUNK
from sims.flags import documented, flag, parse_floats, parse_ints

__all__ = [
    "AUGMENTATIONS",
    "NEAR",
    "NUM_SAMPLES",
    "STANDARD",
    "TIMESTEPS",
    "AuditSetting",
    "ExaminationSetting",
    "JacobianSetting",
]

NUM_SAMPLES = (10, 30, 100, 300, 750)
"""Default training-set sizes of a series; digits has enough for two halves of the largest, and images to hold out."""

TIMESTEPS = (10, 50, 200)
"""Timesteps of a run over Jacobians where the caller names no noise levels."""

NEAR = 0.1
"""Images closer than this, root mean square over pixels in [-1, 1], are near repeats."""

AUGMENTATIONS = ("flip", "shift")
"""How a view of an image may differ from it beside its noise."""

CONTAMINATION = "the contamination ratio of the model's features"
EXAMINATION = "the examination of each trained network"


def _parse_list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@documented
@dataclasses.dataclass(frozen=True)
class ExaminationSetting:
    """How much :func:`scaling.study.examination.examine` computes, and where in the network it reads codes."""

    samples: int = flag(
        200, "samples >= 1 drawn per network and sampler, to count copies", group=EXAMINATION, metavar="N"
    )
    sampler_steps: int = flag(40, "steps >= 1 of the sampler", group=EXAMINATION, metavar="N")
    etas: tuple[float, ...] = flag(
        (0.0, 1.0),
        "share of fresh noise in the sampler, from 0 (DDIM) to 1 (ancestral sampling); one sampler for each",
        group=EXAMINATION,
        name="--eta",
        type=parse_floats,
        metavar="E,...",
    )
    images: int = flag(100, "images >= 1 of each group, at most", group=EXAMINATION, metavar="N")
    jacobians: int = flag(
        8, "images >= 1 of each group at which the Jacobian is computed", group=EXAMINATION, metavar="N"
    )
    draws: int = flag(4, "noise draws >= 1 per image and noise level", group=EXAMINATION, metavar="N")
    sigmas: tuple[float, ...] = flag(
        (0.25, 0.5, 1.0, 2.0),
        "noise levels > 0 of y = x + sigma e, for images x in [-1, 1]",
        group=EXAMINATION,
        name="--sigma",
        type=parse_floats,
        metavar="S,...",
    )
    timestep: int = flag(50, "timestep, from 0 to T - 1, at which codes are read", group=EXAMINATION, metavar="T")
    taps: tuple[str, ...] = flag(
        ("up_blocks.0.resnets.0", "up_blocks.0.resnets.1"),
        "modules whose activations, pooled to the maximum of each channel, are the codes",
        type=_parse_list,
        group=EXAMINATION,
        metavar="NAME,...",
    )
    fits: int = flag(
        2, "images >= 1 of each group at which two-layer autoencoders are fitted", group=EXAMINATION, metavar="N"
    )
    units: tuple[int, ...] = flag(
        (1, 4, 16), "hidden units >= 1 of the fitted autoencoders", type=parse_ints, group=EXAMINATION, metavar="P,..."
    )
    source: str = flag(
        "mid_block",
        "module at whose output the fitted block begins; it ends at the first of the taps",
        group=EXAMINATION,
        metavar="NAME",
    )


STANDARD = ExaminationSetting()


@documented
@dataclasses.dataclass(frozen=True)
class JacobianSetting:
    """How :func:`scaling.study.jacobians.analyze` approximates a Jacobian; hashable, so that ``jit`` can take it."""

    rank: int = flag(16, "singular triplets >= 1", metavar="R")
    oversample: int = flag(2, "directions >= 0 of the sketch beyond the rank", metavar="K")
    iterations: int = flag(2, "power iterations >= 0; more are more accurate", metavar="Q")
    full: bool = flag(False, "also compute the whole Jacobian: all singular values, ranks, trace, asymmetry")
    chunk_size: int = flag(CHUNK, "directions processed at a time, >= 1", metavar="B")


@documented
@dataclasses.dataclass(frozen=True)
class AuditSetting:
    """What is sampled, and what counts as one image."""

    samples: int = flag(1000, "samples >= 1 to draw", metavar="N")
    steps: int = flag(40, "steps >= 1 of the sampler (DDIM)", metavar="N")
    eta: float = flag(1.0, "share of fresh noise in the sampler, from 0 to 1", metavar="E")
    guidance: float = flag(1.0, "scale of classifier-free guidance; 1: none", metavar="G")
    near: float = flag(
        NEAR,
        "images closer than this, from 0 to below 2, count as one: root mean square over pixels, or with other "
        "--features the chord between unit vectors",
        metavar="R",
    )
    mirrors: bool = flag(False, "compare samples with the mirror images of training images, too")
    coverage_sigma: float = flag(
        0.5,
        "positive noise level at which the coverage of training images by the others is computed, in pixels",
        metavar="S",
    )
    contamination: int = flag(
        0,
        "training images >= 3 of which the ratio is computed, evenly spaced; 0: none",
        group=CONTAMINATION,
        metavar="N",
    )
    contamination_tap: str = flag(
        "",
        "module whose output, averaged over positions, is taken; empty: the first at which `detect` reads codes",
        group=CONTAMINATION,
        metavar="NAME",
    )
    views: int = flag(3, "views >= 2 of each image, each with noise of its own", group=CONTAMINATION, metavar="M")
    augment: tuple[str, ...] = flag(
        (),
        "what views differ in beside noise: flip (mirror images), shift (by one pixel)",
        group=CONTAMINATION,
        type=_parse_list,
        metavar="NAME,...",
    )
