r"""``AutoencoderKL`` of diffusers: the variational autoencoder of latent diffusion :cite:`rombach22`.

Images x are (B, C, H, W) in [-1, 1]. :func:`encode` returns mean and log variance of the Gaussian
:math:`q(z \mid x)`, and :func:`decode` maps z to images. Diffusion models are trained on *scaled* latents, see
:func:`scaling.models.blocks_autoencoder.scale`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dae_theory.types import PRNGKey
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
from scaling.models.config import Fields
from scaling.models.layers import Params, Specs, conv, conv_specs, to_nchw, to_nhwc
from scaling.models.taps import Tap

__all__ = [
    "AutoencoderOutput",
    "Config",
    "apply",
    "decode",
    "encode",
    "inputs",
    "parameters",
    "parse",
    "rename",
    "sample",
]

# Fixed in PyTorch's class, whatever the configuration.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``AutoencoderKL`` that matter; ``shift`` and ``scale`` turn latents into the diffusion model's."""

    halves: Halves
    quant_conv: bool
    post_quant_conv: bool
    sample_size: tuple[int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.halves.in_channels

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.halves.latent_channels

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Channels of each block; all but the last halve the size."""
        return self.halves.block_out_channels


class AutoencoderOutput(NamedTuple):
    """Images encoded and decoded."""

    sample: Float[Array, "b c h w"]
    """The image decoded from the mean."""
    mean: Float[Array, "b z h2 w2"]
    logvar: Float[Array, "b z h2 w2"]


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; ``ValueError`` names an unsupported field and its value."""
    fields = Fields("AutoencoderKL", config)
    halves = parse_halves(fields, 4)
    shift, scale = _latent_statistics(fields, halves.latent_channels)
    result = Config(
        halves=halves,
        quant_conv=fields.boolean("use_quant_conv", True),
        post_quant_conv=fields.boolean("use_post_quant_conv", True),
        sample_size=fields.sample_size(32),
        shift=shift,
        scale=scale,
    )
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    latent = config.latent_channels
    specs = encoder_specs(config.halves, 2 * latent)
    if config.quant_conv:
        specs |= conv_specs("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if config.post_quant_conv:
        specs |= conv_specs("post_quant_conv", latent, latent, kernel=1)
    return specs | decoder_specs(config.halves)


def rename(key: str) -> str | None:
    """The present name of a key; checkpoints of 2022 have other names in attention."""
    return modern_attention_key(key)


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shape of one image."""
    return (jax.ShapeDtypeStruct((1, config.in_channels, *config.sample_size), dtype),), {}


def apply(config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]) -> AutoencoderOutput:
    """Encode, then decode the mean; has the taps of both halves."""
    mean, logvar = encode(config, params, tap, images)
    return AutoencoderOutput(decode(config, params, tap, mean), mean, logvar)


def encode(
    config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]
) -> tuple[Float[Array, "b z h2 w2"], Float[Array, "b z h2 w2"]]:
    r"""Mean and log variance of the unscaled :math:`q(z \mid x)`, the log variance clipped to [-30, 20].

    Height and width are divided by :math:`2^{\mathrm{blocks} - 1}`, 8 for the released models.
    """
    x = encoder(config.halves, params, tap, images)
    if config.quant_conv:
        x = conv(params, tap, "quant_conv", x)
    mean, logvar = jnp.split(to_nchw(x), 2, axis=1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decode(config: Config, params: Params, tap: Tap, latents: Float[Array, "b z h2 w2"]) -> Float[Array, "b c h w"]:
    """Images from unscaled latents, roughly in [-1, 1], not clipped."""
    check_channels("latents", latents, config.latent_channels)
    x = to_nhwc(latents).astype(params["decoder.conv_in.weight"].dtype)
    if config.post_quant_conv:
        x = conv(params, tap, "post_quant_conv", x)
    return to_nchw(decoder(config.halves, params, tap, x))


def sample(key: PRNGKey, mean: Float[Array, "b z h w"], logvar: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""One sample of each :math:`q(z \mid x)`; example i uses ``fold_in(key, i)``.

    .. math:: z = \mu + e^{\ell / 2} \epsilon, \quad \epsilon \sim N(0, I)
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(mean.shape[0]))
    noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * logvar) * noise


def _latent_statistics(fields: Fields, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    factor = fields.number("scaling_factor", 0.18215)
    mean, std, shift = (fields.raw(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if (mean is None) != (std is None):
        raise fields.refusal(
            "latents_mean", mean, f"latents_mean and latents_std must be given together, and latents_std is {std!r}"
        )
    if mean is None:
        return _reals(fields, "shift_factor", [shift or 0.0], 1) * channels, (factor,) * channels
    if shift is not None:
        raise fields.refusal("shift_factor", shift, "latents_mean is given too, and only one of them can be the shift")
    deviations = _reals(fields, "latents_std", std, channels)
    if min(deviations) <= 0:
        raise fields.refusal("latents_std", std, "standard deviations must be positive")
    return _reals(fields, "latents_mean", mean, channels), tuple(factor / deviation for deviation in deviations)


def _reals(fields: Fields, name: str, values: Any, count: int) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise fields.refusal(name, values, f"it must be a list of {count}, one per latent channel")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise fields.refusal(name, value, "it must be a finite number")
    return tuple(float(value) for value in values)
