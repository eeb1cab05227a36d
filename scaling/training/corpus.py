"""Images to train on, some of them repeated, and images held out, each with its row in the data set.

A seed shuffles the rows of a data set as in :mod:`sims.data.datasets`. The first K rows are repeated M times, the next
N are trained on once, and the last are held out, so that training sets of growing size are nested. ``offset`` skips
rows, for training sets that share none. A repeated image may come in variants, which differ in one corner only, like
images of one template :cite:`webster23`.

Rows of the data set that are equal in every pixel are one image, which is trained on as often as the data set holds it,
or held out, but never both. Images that are nearly equal are different ones.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from PIL import Image, ImageOps

from dae_theory.checks import check_integer
from sims.data import datasets
from sims.data.folders import legible, with_options
from sims.data.readers import Source, read, split_name

__all__ = ["FASHION", "GROUPS", "Corpus", "is_folder", "load", "membership", "training_rows", "variants_of"]

GROUPS = ("duplicated", "train", "held_out")
"""Groups of images by their part in training, as in ``membership.json``: repeated, trained on once, held out."""

FASHION = "fashion-mnist"
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DIGIT_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 0.2
"""The share of rows that is held out if all others are trained on."""


class Corpus(NamedTuple):
    """A training set and held-out images; images are (C, H, W) in [-1, 1]."""

    name: str
    images: Float32[np.ndarray, "u c h w"]
    """The distinct training images: first the repeated ones, with their variants, then the others."""
    labels: Int[np.ndarray, " u"]
    """Classes from 0; -1 if unknown."""
    rows: Int[np.ndarray, " u"]
    """Their rows in the data set, the first of equal ones; variants of an image have the same row."""
    counts: Int[np.ndarray, " u"]
    """How many times each is repeated."""
    held_out: Float32[np.ndarray, "m c h w"]
    held_out_labels: Int[np.ndarray, " m"]
    held_out_rows: Int[np.ndarray, " m"]
    size: int
    """Rows of the data set."""
    classes: tuple[str, ...]
    """Names of the classes; empty if they have none."""
    files: tuple[str, ...]
    """The file of each row, for images of a folder and their patches."""
    skipped: tuple[str, ...]
    """Files that were skipped, each with the reason."""
    first: Int[np.ndarray, " size"]
    """For each row of the data set the first row that is the same image."""


@legible()
def load(
    name: str,
    *,
    num_samples: int | None = None,
    duplicates: str | tuple[int, int] = "",
    singles: int = 0,
    variants: str | tuple[int, int] = "",
    held_out: int | None = None,
    offset: int = 0,
    seed: int = 0,
    resolution: int | None = None,
    gray: bool = False,
    skip_bad: bool = False,
) -> Corpus:
    """Read a data set of images and split it into training and held-out images.

    Args:
        name: ``digits``, ``mnist5k``, ``fashion-mnist``, a folder of images, a .npz file, or anything that
            :func:`sims.data.readers.read` takes.
        num_samples: number of distinct training images, repeated only as in the data set; None: all that are not held
            out.
        duplicates: instead, ``"KxM"``: repeat K images M times each ...
        singles: ... and train on this many more, once each.
        variants: ``"TxV"``: the last T of the K images come in V variants, each repeated M/V times.
        held_out: number of rows to hold out, the last of the shuffled ones; None: all that are not trained on.
        offset: shuffled rows to skip before the first training image.
        seed: of the shuffle.
        resolution: crop images about their center and resample them to this side; None: they must have one size.
        gray: read the images of a folder in one channel.
        skip_bad: skip files of a folder that cannot be read or differ in size from the majority.

    ``ValueError`` for data that are missing, damaged, empty, no images, of several sizes, or too few.
    """
    source, classes = _read(name, resolution, gray, skip_bad)
    if source.image_shape is None:
        raise ValueError(f"the rows of {name} are no images: training needs rows of a known height and width.")
    whole = datasets.load(source, held_out=0, seed=seed)
    # The first of equal images stands for all of them, in the order of the shuffle.
    _, distinct, present = np.unique(whole.train_rows, return_index=True, return_counts=True)
    present, distinct = present[np.argsort(distinct)], np.sort(distinct)
    size = len(distinct)
    count, times, once, reserved = _sizes(name, size, num_samples, duplicates, singles, held_out, offset)
    if np.max(np.abs(whole.train), initial=0.0) > 1 + 1e-6:
        raise ValueError(f"the images of {name} must lie in [-1, 1]; give the range of its values, as in ?values=0:1.")
    pictures = _resized(whole.train[distinct].reshape(size, *source.image_shape), resolution)
    labels, rows = whole.train_labels[distinct], whole.train_rows[distinct]
    templates, per_template = _variants(variants, count, times)
    repeats = np.ones(count + once, np.int64)
    repeats[count - templates : count] = per_template
    trained = np.repeat(np.arange(offset, offset + count + once), repeats)
    counts = np.repeat([times] * count + [1] * once, repeats) * present[trained]
    images = pictures[trained]
    if templates:
        changed = slice(count - templates, count - templates + templates * per_template)
        first = images[changed][::per_template]
        images[changed] = np.concatenate([variants_of(image, per_template) for image in first])
        counts[changed] //= per_template
    out = slice(size - reserved, size)
    return Corpus(
        name=name,
        images=images,
        labels=labels[trained],
        rows=rows[trained],
        counts=counts,
        held_out=pictures[out],
        held_out_labels=labels[out],
        held_out_rows=rows[out],
        size=len(source.rows),
        classes=classes,
        files=source.names,
        skipped=source.skipped,
        first=datasets.first_of_equal(source.rows),
    )


def is_folder(name: str) -> bool:
    """Whether the data set is a folder of images, or their patches; ``ValueError`` if there is none of this name."""
    return name != FASHION and split_name(name)[0] in ("images", "patches")


def training_rows(corpus: Corpus) -> Int[np.ndarray, " n"]:
    """The training set as indices into ``corpus.images``; an image repeated M times occurs M times."""
    return np.repeat(np.arange(len(corpus.images), dtype=np.int32), corpus.counts)


def membership(corpus: Corpus) -> dict[str, list[int]]:
    """Rows of the data set by group: ``duplicated``, ``train`` (trained on once) and ``held_out``."""
    totals = Counter[int]()
    for row, count in zip(corpus.rows.tolist(), corpus.counts.tolist(), strict=True):
        totals[row] += count
    equal: dict[int, list[int]] = {}
    for row, first in enumerate(corpus.first.tolist()):
        equal.setdefault(first, []).append(row)
    return {
        "duplicated": [row for first, total in totals.items() if total > 1 for row in equal[first]],
        "train": [row for row, total in totals.items() if total == 1],
        "held_out": [row for first in corpus.held_out_rows.tolist() for row in equal[first]],
    }


def variants_of(image: Float32[np.ndarray, "c h w"], count: int) -> Float32[np.ndarray, "v c h w"]:
    """``count`` copies of an image that differ in a square in the lower right corner, a quarter of the sides long.

    The squares' gray values run from black to white in even steps.
    """
    _, height, width = image.shape
    tag = (slice(height - max(1, height // 4), height), slice(width - max(1, width // 4), width))
    varied = np.repeat(image[None], count, axis=0)
    varied[:, :, *tag] = np.linspace(-1, 1, count, dtype=image.dtype)[:, None, None, None]
    return varied


def _read(name: str, resolution: int | None, gray: bool, skip_bad: bool) -> tuple[Source, tuple[str, ...]]:
    """The source, and the names of its classes."""
    if resolution is not None:
        check_integer("resolution", resolution, minimum=1)
    if is_folder(name):
        # Images are brought to one size as they are read; patches later.
        kind, _, options = split_name(name)
        resize = str(resolution) if resolution and kind == "images" and "resize=" not in options else ""
        source = read(with_options(name, color="gray" if gray else "", skip_bad=skip_bad, resize=resize))
        return source, source.classes
    if gray or skip_bad:
        raise ValueError(f"{name} is no folder of images: omit gray and skip_bad.")
    if name == FASHION:
        return read(f"idx:{_fashion_folder()}"), FASHION_CLASSES
    return read(name), DIGIT_CLASSES if name in ("digits", "mnist5k") else ()


def _fashion_folder() -> Path:
    # Debian's package dataset-fashion-mnist installs there.
    places = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(place) / "datasets" / FASHION for place in places.split(":")]
    installed = next((folder for folder in folders if folder.is_dir()), None)
    if installed is None:
        raise ValueError(
            f"{FASHION} is not installed ({' or '.join(map(str, folders))}): install the Debian package "
            "dataset-fashion-mnist, or give a folder with its IDX files."
        )
    return installed


def _sizes(
    name: str,
    size: int,
    num_samples: int | None,
    duplicates: str | tuple[int, int],
    singles: int,
    held_out: int | None,
    offset: int,
) -> tuple[int, int, int, int]:
    """Numbers of repeated images, of their repeats, of images trained on once, and of held-out images."""
    check_integer("offset", offset, minimum=0)
    check_integer("singles", singles, minimum=0)
    reserved = 0 if held_out is None else check_integer("held_out", held_out, minimum=0)
    count = times = 0
    if duplicates:
        count, times = datasets.parse_duplicates(duplicates) if isinstance(duplicates, str) else duplicates
        check_integer("images of duplicates", count, minimum=1)
        check_integer("times of duplicates", times, minimum=1)
        if num_samples is not None:
            raise ValueError(f"num_samples = {num_samples} and duplicates exclude one another: singles adds to them.")
        once = singles
    elif singles:
        raise ValueError(f"singles = {singles} needs duplicates, as in 20x60; for plain data use num_samples.")
    elif num_samples is None:
        reserved = round(HELD_OUT * size) if held_out is None else reserved
        once = max(size - offset - reserved, 1)
    else:
        once = check_integer("num_samples", num_samples, minimum=1)
    end = offset + count + once
    if end + reserved > size:
        parts = [
            f"an offset of {offset}" if offset else "",
            f"{count} images to repeat" if count else "",
            f"{once} single ones" if once else "",
            f"{reserved} held out" if reserved else "",
        ]
        raise ValueError(
            f"{name} has {size} distinct rows, not the {end + reserved} of {', '.join(filter(None, parts))}: ask for "
            "fewer, or take a larger data set."
        )
    return count, times, once, size - end if held_out is None else reserved


def _variants(variants: str | tuple[int, int], count: int, times: int) -> tuple[int, int]:
    if not variants:
        return 0, 1
    try:
        templates, each = datasets.parse_duplicates(variants) if isinstance(variants, str) else variants
    except ValueError:
        raise ValueError(f"variants must be TxV, T images in V variants each, as in 10x4; got {variants!r}.") from None
    if templates > count or times % each:
        raise ValueError(
            f"variants {templates}x{each}: {count} images are repeated {times} times each; at most {count} can have "
            f"variants, and {times} must be a multiple of their number."
        )
    return templates, each


def _resized(pictures: np.ndarray, resolution: int | None) -> Float32[np.ndarray, "n c h w"]:
    if resolution is not None and pictures.shape[1:3] != (resolution, resolution):
        pictures = np.stack([_fit(picture, resolution) for picture in pictures])
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32)


def _fit(picture: np.ndarray, side: int) -> np.ndarray:
    channels: Sequence[Any] = [
        ImageOps.fit(Image.fromarray(channel), (side, side), Image.Resampling.LANCZOS)
        for channel in np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32)
    ]
    # The filter overshoots at edges.
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), -1, 1)
