"""Arrays as pictures: bytes, contact sheets and PNG files; one channel is gray, three are color."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sims.store.files import replace_file

__all__ = ["contact_sheet", "to_bytes", "to_picture", "write_png"]

SHEET, GAP, TILE = 4096, 2, 64
"""Pixels of a contact sheet: its longest side, the gap between pictures, and the size that small ones are scaled to."""


def to_bytes(images: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n h w c"]:
    """Images in [-1, 1] as bytes, -1 black and 1 white, channels last; what is not finite is a checkerboard."""
    finite = np.isfinite(images)
    if not finite.all():
        images = np.where(finite, images, 1.0 - 2.0 * (np.indices(images.shape[-2:]).sum(0) % 2))
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def contact_sheet(pictures: UInt8[np.ndarray, "n h w c"], columns: int | None = None) -> UInt8[np.ndarray, "H W c"]:
    """All pictures on one white sheet, row by row; large and tiny pictures are scaled.

    Without ``columns`` there are as many columns as rows.
    """
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    longest = max(height, width)
    room = max(SHEET // max(columns, math.ceil(count / columns)) - GAP, 1)
    scale = min(1.0, room / longest) if longest >= TILE else max(1, min(TILE, room) // longest)
    tile = max(round(scale * height), 1), max(round(scale * width), 1)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (tile[0] + GAP) + GAP, columns * (tile[1] + GAP) + GAP, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (GAP + place * (side + GAP) for place, side in zip(divmod(i, columns), tile, strict=True))
        resized = np.asarray(to_picture(picture).resize(tile[::-1], how)).reshape(*tile, channels)
        sheet[top : top + tile[0], left : left + tile[1]] = resized
    return sheet


def to_picture(picture: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """One picture for Pillow, gray where it has one channel."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def write_png(path: Path, picture: UInt8[np.ndarray, "h w c"]) -> None:
    """Write one picture as PNG, atomically. ``ValueError`` if the file cannot be written."""
    replace_file(path, functools.partial(to_picture(picture).save, format="PNG"))
