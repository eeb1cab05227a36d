"""Images in the range of a network, [-1, 1]: bytes are scaled by their type, and values far outside are refused."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dae_theory.checks import is_concrete
from dae_theory.types import Scalar

__all__ = ["check_range", "scaled"]

LIMIT = {1: 8.0, 3: 8.0}
"""The largest magnitude of values by number of channels: images reach 1, and a few times more where they are drawn."""

LATENT_LIMIT = 64.0
"""The same for other numbers of channels, which are those of latents: unscaled ones reach tens."""

WHITE = (16.0, 255.0, 1023.0, 4095.0, 65535.0)
"""Values that mean white in common encodings, beginning with the digits of scikit-learn."""


def scaled(images: Any) -> Any:
    """Images of bytes mapped from 0 and 255 to -1 and 1 in float32; others as they are."""
    if images.dtype != jnp.uint8:
        return images
    return (2 * images.astype(np.float32) - 255) / np.float32(255)


def check_range(name: str, images: Any, channels: int, *, sigma: Scalar = 0.0) -> None:
    """``ValueError`` for values far outside [-1, 1], with the scale that would fit; bytes pass.

    Under a trace, values are unknown and only their type is checked. ``sigma`` is the noise that the images have.
    """
    dtype = images.dtype
    if dtype == jnp.uint8 or 0 in images.shape:
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point in [-1, 1], or bytes (uint8) from 0 to 255; got {dtype}: convert them, as "
            "in images / 127.5 - 1."
        )
    if not is_concrete(images, sigma):
        return
    low, high = float(images.min()), float(images.max())
    largest, limit = max(-low, high), LIMIT.get(channels, LATENT_LIMIT) * (1 + max(float(np.max(sigma)), 0.0))
    # NaN passes: values that are not finite have checks of their own.
    if largest > limit:
        white = next((white for white in WHITE if high <= white), high)
        fit = f"images / {white / 2:g} - 1" if low >= 0 else f"images / {largest:g}"
        raise ValueError(
            f"{name} run from {low:g} to {high:g}, but the network takes [-1, 1]: scale them first, as in {fit}."
        )
