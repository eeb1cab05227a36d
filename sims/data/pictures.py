"""Folders of photographs: all files with a fault are found at once, and channels are made alike."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from sims.data.formats import image_size, read_picture

__all__ = ["COLORS", "Pictures", "channels_of", "read_pictures"]

COLORS = ("", "rgb", "gray")
"""Channels of a folder's images; the empty name stands for those that most of them have."""

MAX_PIXELS = 1 << 24
"""Pixels of an image that is a row."""

SHOWN = 5
"""Files that a message lists."""


class Pictures(NamedTuple):
    """Images of one shape."""

    values: UInt8[np.ndarray, "n h w c"]
    kept: Int[np.ndarray, " n"]
    """Their indices in the files that were to be read."""
    problems: tuple[str, ...]
    """Files that were skipped, each with the reason."""


def read_pictures(
    files: Sequence[Path], *, color: str = "", size: tuple[int, int] | None = None, skip_bad: bool = False
) -> Pictures:
    """Read images, which must have one height and width unless ``size`` is given, to which they are resampled.

    Args:
        files: the images.
        color: ``rgb``, ``gray``, or empty for what most images have; others are converted, with a warning.
        size: (height, width) to crop them about their center and resample them to.
        skip_bad: leave out what cannot be read or has another size than most, instead of refusing it.

    ``ValueError`` that lists the files with a fault, all of them found first.
    """
    bad: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for i, file in enumerate(files):
        try:
            sizes[i] = image_size(file)
        except ValueError as error:
            bad[i] = str(error).removesuffix(".")
    if size is None and sizes:
        usual = Counter(sizes.values()).most_common(1)[0][0]
        if math.prod(usual) > MAX_PIXELS:
            raise ValueError(
                f"images of {usual[0]} x {usual[1]} pixels are too large for rows: resample them (?resize=N, "
                "--resolution N)."
            )
        bad |= {
            i: f"{files[i]} has (height, width) {one}, most have {usual}" for i, one in sizes.items() if one != usual
        }
    read: dict[int, np.ndarray] = {}
    notes: list[str] = []
    for i in sorted(sizes.keys() - bad.keys()):
        try:
            read[i], note = read_picture(files[i], gray=color == "gray", size=size)
            notes += [note] if note else []
        except ValueError as error:
            bad[i] = str(error).removesuffix(".")
    if bad and not (skip_bad and read):
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be used: {_some([bad[i] for i in sorted(bad)])}. Repair them, "
            "bring them to one size (?resize=N, --resolution N), or leave them out (?skip_bad=1, --skip-bad)."
        )
    channels = channels_of(color, [picture.shape[2] for picture in read.values()])
    odd = [i for i, picture in read.items() if picture.shape[2] != channels]
    for i in odd:
        read[i] = np.repeat(read[i], 3, axis=2) if channels == 3 else read_picture(files[i], gray=True, size=size)[0]
    if odd and not color:
        kind = "gray in a folder of color images" if channels == 3 else "in color in a folder of gray images"
        notes.append(f"{_some([str(files[i]) for i in odd])}: {kind}, converted; ?color=rgb or gray says which it is")
    if notes:
        warnings.warn(_some(notes) + ".", stacklevel=2)
    kept = np.array(sorted(read), np.int64)
    return Pictures(np.stack([read[i] for i in kept]), kept, tuple(bad[i] for i in sorted(bad)))


def channels_of(color: str, found: Sequence[int]) -> int:
    """3 for ``rgb``, 1 for ``gray``, else what most of ``found`` are, 3 in a tie. ``ValueError`` for other names."""
    if color not in COLORS:
        raise ValueError(f"color must be rgb or gray, or left out, got {color!r}.")
    return {"rgb": 3, "gray": 1}.get(color) or (3 if 2 * sum(one == 3 for one in found) >= len(found) else 1)


def _some(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "; ".join([*texts[:SHOWN], *more])
