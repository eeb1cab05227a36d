"""Choosing a layer or noise level on one half of the images, and scoring it on the other.

The best of many options looks better than it is on the images that it was chosen on. So the choice is made on one
half, and :func:`score` refuses a choice that saw any image of the half that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from scaling.detection.evaluation import auroc

__all__ = ["Choice", "Half", "choose", "score", "split"]


class Half(NamedTuple):
    """Half of the positives and half of the negatives, with their scores under every option."""

    options: tuple[str, ...]
    positives: Float[np.ndarray, "k n"]
    negatives: Float[np.ndarray, "k m"]
    images: frozenset[int]
    """The numbers of the images."""


class Choice(NamedTuple):
    """An option, and what it was chosen on."""

    option: str
    area: float
    """Its area under the ROC curve there: too high by the choice."""
    images: frozenset[int]


def split(
    options: Sequence[str],
    scores: Float[np.ndarray, "k t"],
    positives: Int[np.ndarray, " n"],
    negatives: Int[np.ndarray, " m"],
) -> tuple[Half, Half]:
    """The even and the odd ones of each group; ``positives`` and ``negatives`` are images, as columns of scores.

    ``ValueError`` for fewer than four of either: a half would have one.
    """
    if min(len(positives), len(negatives)) < 4:
        raise ValueError(
            f"{len(positives)} positives and {len(negatives)} negatives: to choose on one half and score on the other, "
            "give at least four of each."
        )

    def half(k: int) -> Half:
        ups, downs = positives[k::2], negatives[k::2]
        return Half(
            tuple(options), scores[:, ups], scores[:, downs], frozenset(ups.tolist()) | frozenset(downs.tolist())
        )

    return half(0), half(1)


def choose(half: Half) -> Choice:
    """The option of the largest area under the ROC curve, the first of equal ones."""
    areas = auroc(half.positives, half.negatives)
    best = int(np.argmax(areas))
    return Choice(half.options[best], float(areas[best]), half.images)


def score(half: Half, choice: Choice) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """The scores of the positives and of the negatives under the chosen option.

    ``ValueError`` if the choice was made on an image of this half, or the half lacks the option.
    """
    seen = half.images & choice.images
    if seen:
        raise ValueError(f"{len(seen)} of these images were used to choose {choice.option!r}: score the other half.")
    if choice.option not in half.options:
        raise ValueError(f"{choice.option!r} is not among {', '.join(half.options)}.")
    k = half.options.index(choice.option)
    return half.positives[k], half.negatives[k]
