"""Images to the scaled latents of a diffusion model, and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from scaling.diffusion.ranges import check_range, scaled
from scaling.models.blocks_autoencoder import scale, unscale
from scaling.models.layers import widened
from scaling.models.model import Model, vae_decode, vae_encode

__all__ = ["clipped", "from_latents", "to_latents"]


def to_latents(
    vae: Model, images: Num[Array, "b c h w"], noise: Float[Array, "b z h2 w2"] | None = None
) -> Float[Array, "b z h2 w2"]:
    r"""Scaled latents of images in [-1, 1]: the mean of :math:`q(z \mid x)`, or a sample of it given unit ``noise``.

    The latents of a VQModel have no noise.

    Bytes are mapped from 0 and 255. ``ValueError`` for values far outside.
    """
    check_range("images", images, 3)
    images = scaled(images)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if images.ndim == 4 and any(side < 1 or side % factor for side in images.shape[2:]):
        raise ValueError(
            f"the autoencoder divides heights and widths by {factor}; got images of shape {images.shape}, so crop or "
            f"resize them to multiples of {factor}."
        )
    mean, logvar = vae_encode(_wide(vae), images)
    z = mean if noise is None else mean + jnp.exp(logvar / 2) * noise
    return scale(vae.config, z)


def from_latents(vae: Model, latents: Float[Array, "b z h2 w2"]) -> Float[Array, "b c h w"]:
    """Images of scaled latents, clipped to [-1, 1]; see :func:`clipped`."""
    return clipped(vae_decode(_wide(vae), unscale(vae.config, latents)))


def clipped(images: Float[Array, "b c h w"]) -> Float[Array, "b c h w"]:
    """Images clipped to [-1, 1]; what is infinite becomes NaN, for it is no white."""
    return jnp.where(jnp.isfinite(images), jnp.clip(images, -1, 1), jnp.nan)


def _wide(vae: Model) -> Model:
    """The autoencoder in at least float32: the released one of SDXL overflows in float16."""
    return dataclasses.replace(vae, params=jax.tree.map(widened, vae.params))
