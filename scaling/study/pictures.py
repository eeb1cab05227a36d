"""Arrays as pictures: bytes, contact sheets and PNG files; one channel is gray, three are color."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from sims.store.files import replace_file

__all__ = ["contact_sheet", "to_bytes", "to_picture", "write_png"]

SHEET, GAP, TILE = 4096, 2, 96
"""Pixels of a contact sheet: its longest side, the gap between pictures, and the size that small ones are scaled to."""

MARGIN = 6
"""Pixels around a label."""


def to_bytes(images: Float[np.ndarray, "n c h w"]) -> UInt8[np.ndarray, "n h w c"]:
    """Images in [-1, 1] as bytes, -1 black and 1 white, channels last; what is not finite is a checkerboard."""
    finite = np.isfinite(images)
    if not finite.all():
        images = np.where(finite, images, 1.0 - 2.0 * (np.indices(images.shape[-2:]).sum(0) % 2))
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def contact_sheet(
    pictures: UInt8[np.ndarray, "n h w c"],
    columns: int | None = None,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> UInt8[np.ndarray, "H W c"]:
    """All pictures on one white sheet, row by row; large and tiny pictures are scaled.

    Without ``columns`` there are as many columns as rows. Labels stand left of the rows and above the columns.
    ``ValueError`` for another number of labels than of rows or columns.
    """
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    longest = max(height, width)
    room = max(SHEET // max(columns, math.ceil(count / columns)) - GAP, 1)
    scale = min(1.0, room / longest) if longest >= TILE else max(1, min(TILE, room) // longest)
    tile = max(round(scale * height), 1), max(round(scale * width), 1)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    rows = math.ceil(count / columns)
    for name, labels, number in (("row", row_labels, rows), ("column", column_labels, columns)):
        if labels and len(labels) != number:
            raise ValueError(f"{len(labels)} {name} labels for {number} {name}s.")
    font = ImageFont.load_default()
    room = max((round(font.getlength(label)) for label in row_labels), default=-2 * MARGIN) + 2 * MARGIN
    head = round(font.getbbox("Ag")[3]) + 2 * MARGIN if column_labels else 0
    corners = [
        (head + GAP + row * (tile[0] + GAP), room + GAP + column * (tile[1] + GAP))
        for row, column in itertools.product(range(rows), range(columns))
    ]
    size = head + rows * (tile[0] + GAP) + GAP, room + columns * (tile[1] + GAP) + GAP
    sheet = to_picture(np.full((*size, channels), 255, np.uint8))
    write = ImageDraw.Draw(sheet)
    for (top, left), picture in zip(corners, pictures, strict=False):
        sheet.paste(to_picture(picture).resize(tile[::-1], how), (left, top))
    for (top, _), label in zip(corners[::columns], row_labels, strict=False):
        write.text((MARGIN, top + tile[0] // 2), label, "black", font, anchor="lm")
    for (_, left), label in zip(corners[:columns], column_labels, strict=False):
        # What does not fit under a column is cut.
        fits = next(k for k in range(len(label), -1, -1) if font.getlength(label[:k]) <= tile[1])
        write.text((left + tile[1] // 2, head // 2), label[:fits], "black", font, anchor="mm")
    return np.asarray(sheet).reshape(*size, channels)


def to_picture(picture: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """One picture for Pillow, gray where it has one channel."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def write_png(path: Path, picture: UInt8[np.ndarray, "h w c"]) -> None:
    """Write one picture as PNG, atomically. ``ValueError`` if the file cannot be written."""
    replace_file(path, functools.partial(to_picture(picture).save, format="PNG"))
