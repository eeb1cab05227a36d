r"""``VQModel`` of diffusers: the autoencoder with a codebook :cite:`oord17` of latent diffusion :cite:`rombach22`.

:func:`encode` maps images (B, C, H, W) in [-1, 1] to latents z without noise, and :func:`decode` maps latents to
images by way of the codebook: every vector of z, one per position, is replaced by the nearest of the codebook.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from scaling.models.blocks_autoencoder import (
    Halves,
    check_channels,
    decoder,
    decoder_specs,
    encoder,
    encoder_specs,
    parse_halves,
)
from scaling.models.blocks_resnet import modern_attention_key
from scaling.models.config import Fields, ParamSpec
from scaling.models.layers import Params, Specs, conv, conv_specs, to_nchw, to_nhwc, widened
from scaling.models.taps import Tap

__all__ = ["Config", "VQOutput", "apply", "decode", "encode", "inputs", "parameters", "parse", "rename"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``VQModel`` that matter; ``scale`` turns latents into the diffusion model's."""

    halves: Halves
    codebook_size: int
    codebook_channels: int
    sample_size: tuple[int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each block; all but the last halve the size."""
        return self.halves.block_out_channels


class VQOutput(NamedTuple):
    """Images encoded and decoded."""

    sample: Float[Array, "b c h w"]
    latents: Float[Array, "b z h2 w2"]


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; ``ValueError`` names an unsupported field and its value."""
    fields = Fields("VQModel", config)
    halves = parse_halves(fields, 3)
    channels = fields.optional_integer("vq_embed_dim") or halves.latent_channels
    fields.only("norm_type", "group")
    result = Config(
        halves=halves,
        codebook_size=fields.integer("num_vq_embeddings", 256, maximum=1 << 24),
        codebook_channels=channels,
        sample_size=fields.sample_size(32),
        shift=(0.0,) * channels,
        scale=(fields.number("scaling_factor", 0.18215),) * channels,
    )
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    latent, channels = config.halves.latent_channels, config.codebook_channels
    specs = encoder_specs(config.halves, latent) | conv_specs("quant_conv", latent, channels, kernel=1)
    specs |= {"quantize.embedding.weight": ParamSpec((config.codebook_size, channels), "embedding")}
    return specs | conv_specs("post_quant_conv", channels, latent, kernel=1) | decoder_specs(config.halves)


def rename(key: str) -> str | None:
    """The present name of a key; checkpoints of 2022 have other names in attention."""
    return modern_attention_key(key)


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shape of one image."""
    return (jax.ShapeDtypeStruct((1, config.halves.in_channels, *config.sample_size), dtype),), {}


def apply(config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]) -> VQOutput:
    """Encode, then decode; has the taps of both halves."""
    z, _ = encode(config, params, tap, images)
    return VQOutput(decode(config, params, tap, z), z)


def encode(
    config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]
) -> tuple[Float[Array, "b z h2 w2"], Float[Array, "b z h2 w2"]]:
    r"""Unscaled latents, not yet quantized, and a log variance of −∞: this encoder draws nothing."""
    z = to_nchw(conv(params, tap, "quant_conv", encoder(config.halves, params, tap, images)))
    return z, jnp.full_like(z, -jnp.inf)


def decode(config: Config, params: Params, tap: Tap, latents: Float[Array, "b z h2 w2"]) -> Float[Array, "b c h w"]:
    r"""Images from unscaled latents, roughly in [-1, 1], not clipped.

    .. math:: \hat z_p = e_{k(p)}, \qquad k(p) = \arg\min_k \|z_p - e_k\|

    at each position p, with the codebook e. As in PyTorch, derivatives pass the quantization as if it were the
    identity :cite:`oord17`, section 3.2.
    """
    check_channels("latents", latents, config.codebook_channels)
    z = to_nhwc(latents).astype(params["decoder.conv_in.weight"].dtype)
    codebook = params["quantize.embedding.weight"]
    nearest = _nearest(widened(z), widened(codebook))
    quantized = tap("quantize", z + jax.lax.stop_gradient(codebook[nearest] - z))
    x = conv(params, tap, "post_quant_conv", quantized)
    return to_nchw(decoder(config.halves, params, tap, x))


def _nearest(z: Float[Array, "b h w d"], codebook: Float[Array, "k d"]) -> Array:
    """The index of the nearest codebook vector, of several the first."""
    # ‖z − e‖² − ‖z‖²: one product instead of all differences, (B, H, W, K, D).
    products = jnp.einsum("bhwd,kd->bhwk", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(codebook), axis=1)[None, None, None, :] - 2 * products, axis=-1)
