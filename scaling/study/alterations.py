"""Changes of images that keep what they show, and changes that make them easy to denoise.

An alteration takes one image (c, h, w) in [-1, 1] and a random generator, and returns another of the same shape in the
same range. :func:`alter` applies one to many images; image i draws from ``default_rng((seed, i))``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

__all__ = ["ALTERATIONS", "Alteration", "alter"]

Change: TypeAlias = Callable[[Float[np.ndarray, "c h w"], np.random.Generator], Float[np.ndarray, "c h w"]]


class Alteration(NamedTuple):
    """An entry of the table."""

    change: Change
    words: str
    """What it does."""
    eases: bool
    """Whether it makes images easy to denoise, rather than other images of the same thing."""


def alter(images: Float[np.ndarray, "n c h w"], name: str, *, seed: int = 0) -> Float[np.ndarray, "n c h w"]:
    """The images under an alteration of :data:`ALTERATIONS`; ``ValueError`` for a name that is not there."""
    if name not in ALTERATIONS:
        raise ValueError(f"unknown alteration {name!r}; known are {', '.join(ALTERATIONS)}.")
    changed = [ALTERATIONS[name].change(x, np.random.default_rng((seed, i))) for i, x in enumerate(images)]
    return np.clip(np.stack(changed), -1, 1).astype(images.dtype)


def _flip(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    return x[..., ::-1]


def _shift(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    step = max(round(x.shape[-1] / 32), 1)
    return np.concatenate([np.repeat(x[..., :1], step, axis=-1), x[..., :-step]], axis=-1)


def _crop(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    """The center, seven eighths of each side, scaled to the whole size, bilinear."""
    _, height, width = x.shape
    middle = [(side - 1) / 2 + 7 / 8 * (np.arange(side) - (side - 1) / 2) for side in (height, width)]
    grid = np.meshgrid(*middle, indexing="ij")
    return np.stack([ndimage.map_coordinates(channel, grid, order=1, mode="nearest") for channel in x])


def _compress(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    """JPEG of quality 50, each channel as a gray picture."""

    def coded(channel: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
        file = io.BytesIO()
        values = np.rint((np.clip(channel, -1, 1) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(values).save(file, "JPEG", quality=50)
        return np.asarray(Image.open(file), float) / 127.5 - 1

    return np.stack([coded(channel) for channel in x])


def _noise(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    return x + 0.1 * rng.normal(size=x.shape)


def _occlude(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    """A gray square of a quarter of each side, anywhere."""
    _, height, width = x.shape
    tall, wide = max(height // 4, 1), max(width // 4, 1)
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    covered = x.copy()
    covered[:, top : top + tall, left : left + wide] = 0
    return covered


def _blur(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    return ndimage.gaussian_filter(x, (0, x.shape[1] / 16, x.shape[2] / 16), mode="nearest")


def _fade(x: Float[np.ndarray, "c h w"], rng: np.random.Generator) -> Float[np.ndarray, "c h w"]:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + 0.3 * (x - mean)


ALTERATIONS: Mapping[str, Alteration] = MappingProxyType(
    {
        "flip": Alteration(_flip, "mirrored", False),
        "shift": Alteration(_shift, "shifted to the right by a thirty-second of the width, at least one pixel", False),
        "crop": Alteration(_crop, "cropped to the middle seven eighths of each side and scaled back", False),
        "compress": Alteration(_compress, "saved as JPEG of quality 50", False),
        "noise": Alteration(_noise, "with noise of standard deviation 0.1 added", False),
        "occlude": Alteration(_occlude, "with a gray square of a quarter of each side", False),
        "blur": Alteration(_blur, "blurred by a Gaussian of a sixteenth of each side", True),
        "fade": Alteration(_fade, "at three tenths of their contrast", True),
    }
)
"""Alterations by name; images are in [-1, 1]."""
