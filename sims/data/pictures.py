"""Folders of photographs: all files with a fault are found at once, and channels are made alike."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from sims.data.folders import printable
from sims.data.formats import PLAIN_EXPANSION, image_size, read_picture

__all__ = ["COLORS", "Pictures", "read_pictures"]

COLORS = ("", "rgb", "gray", "widest")
"""Channels of a folder's images. The empty name stands for those that most of them have; ``widest`` for three if any
image is in color."""

MAX_PIXELS = 1 << 24
"""Pixels of an image that is a row."""

FREE_FOLDER = 1 << 30
"""Bytes that the images of a folder may take, whatever the sizes of their files."""

SHOWN = 5
"""Files that a message lists."""


class Pictures(NamedTuple):
    """Images with equal channels."""

    values: list[UInt8[np.ndarray, "h w c"]]
    kept: Int[np.ndarray, " n"]
    """Their indices in the files that were to be read."""
    problems: tuple[str, ...]
    """Files that were skipped, each with the reason."""


def read_pictures(
    files: Sequence[Path],
    *,
    color: str = "",
    size: tuple[int, int] | None = None,
    smallest: int = 0,
    skip_bad: bool = False,
) -> Pictures:
    """Read images, which must have one height and width unless ``size`` or ``smallest`` is given.

    Headers are compared before any image is decoded.

    Args:
        files: the images.
        color: one of :data:`COLORS`; images with other channels are converted, with a warning unless it names them.
        size: (height, width) to crop them about their center and resample them to.
        smallest: the smallest side that an image may have; images may then differ in size.
        skip_bad: leave out what cannot be read or has another size than most, instead of refusing it.

    ``ValueError`` that lists the files with a fault, all of them found first.
    """
    if color not in COLORS:
        raise ValueError(f"color must be rgb or gray, or left out, got {color!r}.")
    bad: dict[int, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for i, file in enumerate(files):
        try:
            sizes[i] = image_size(file)
        except ValueError as error:
            bad[i] = str(error).removesuffix(".")
    if size is None:
        bad |= _unfit(files, sizes, smallest)
        _check_total(files, {i: one for i, one in sizes.items() if i not in bad})
    read: dict[int, np.ndarray] = {}
    notes: list[str] = []
    for i in sorted(sizes.keys() - bad.keys()):
        try:
            read[i], note = read_picture(files[i], gray=color == "gray", size=size)
            notes += [printable(note)] if note else []
        except ValueError as error:
            bad[i] = str(error).removesuffix(".")
    if bad and not (skip_bad and read):
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be used: {_some([bad[i] for i in sorted(bad)])}. Repair them, "
            "bring them to one size (?resize=N, --resolution N), or leave them out (?skip_bad=1, --skip-bad)."
        )
    channels = _channels(color, [picture.shape[2] for picture in read.values()])
    odd = [i for i, picture in read.items() if picture.shape[2] != channels]
    for i in odd:
        read[i] = np.repeat(read[i], 3, axis=2) if channels == 3 else read_picture(files[i], gray=True, size=size)[0]
    if odd and not color:
        kind = "gray in a folder of color images" if channels == 3 else "in color in a folder of gray images"
        names = _some([printable(files[i]) for i in odd])
        notes.append(f"{names}: {kind}, converted; ?color=rgb or gray (--color) says which it is")
    if notes:
        warnings.warn(_some(notes) + ".", stacklevel=2)
    kept = np.array(sorted(read), np.int64)
    return Pictures([read[i] for i in kept], kept, tuple(bad[i] for i in sorted(bad)))


def _unfit(files: Sequence[Path], sizes: Mapping[int, tuple[int, int]], smallest: int) -> dict[int, str]:
    """Files that are too small or, without ``smallest``, of another size than most, each with the reason."""
    if smallest:
        small = {i: one for i, one in sizes.items() if min(one) < smallest}
        reason = f"patches need {smallest} x {smallest} pixels"
    elif sizes:
        usual = Counter(sizes.values()).most_common(1)[0][0]
        if math.prod(usual) > MAX_PIXELS:
            raise ValueError(
                f"images of {usual[0]} x {usual[1]} pixels are too large for rows: resample them (?resize=N, "
                "--resolution N)."
            )
        small, reason = {i: one for i, one in sizes.items() if one != usual}, f"most have {usual}"
    else:
        return {}
    return {i: f"{files[i]} has (height, width) {one}, {reason}" for i, one in small.items()}


def _check_total(files: Sequence[Path], sizes: Mapping[int, tuple[int, int]]) -> None:
    """``ValueError`` for images that take far more memory than their files, before they do."""
    pixels = sum(math.prod(one) for one in sizes.values())
    stored = sum(files[i].stat().st_size for i in sizes)
    if 3 * pixels > max(FREE_FOLDER, PLAIN_EXPANSION * stored):
        raise ValueError(
            f"{len(sizes)} images claim {pixels:,} pixels from {stored:,} bytes, more than photographs do: resample "
            "them (?resize=N, --resolution N)."
        )


def _channels(color: str, found: Sequence[int]) -> int:
    """3 for ``rgb``, 1 for ``gray``, the most there are for ``widest``, else what most have, 3 in a tie."""
    fixed = {"rgb": 3, "gray": 1, "widest": max(found, default=3)}.get(color)
    return fixed or (3 if 2 * sum(one == 3 for one in found) >= len(found) else 1)


def _some(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "; ".join([*texts[:SHOWN], *more])
