r"""``AutoencoderKL`` of diffusers: the variational autoencoder of latent diffusion :cite:`rombach22`.

Images x are (B, C, H, W) in [-1, 1]. :func:`encode` returns mean and log variance of the Gaussian
:math:`q(z \mid x)`, and :func:`decode` maps z to images. Diffusion models are trained on *scaled* latents:
:func:`scale` and :func:`unscale` convert.
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
from scaling.models.blocks_resnet import (
    ResnetStyle,
    downsample_conv,
    image_attention,
    image_attention_specs,
    modern_attention_key,
    resnet,
    resnet_specs,
    upsample_conv,
)
from scaling.models.config import MAX_LAYERS, Fields
from scaling.models.layers import Params, Specs, activation, conv, conv_specs, group_norm, norm_specs, to_nchw, to_nhwc
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
    "scale",
    "unscale",
]

# Fixed in PyTorch's class, whatever the configuration.
EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``AutoencoderKL`` that matter; ``shift`` and ``scale`` turn latents into the diffusion model's."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    style: ResnetStyle
    quant_conv: bool
    post_quant_conv: bool
    mid_attention: bool
    sample_size: tuple[int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]


class AutoencoderOutput(NamedTuple):
    """Images encoded and decoded."""

    sample: Float[Array, "b c h w"]
    """The image decoded from the mean."""
    mean: Float[Array, "b z h2 w2"]
    logvar: Float[Array, "b z h2 w2"]


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; ``ValueError`` names an unsupported field and its value."""
    fields = Fields("AutoencoderKL", config)
    blocks = fields.integers("block_out_channels", (64,))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = fields.choices(name, (kind,), (kind,))
        if len(types) != len(blocks):
            raise fields.refusal(name, types, f"it must have one entry for each of block_out_channels = {blocks}")
    groups = fields.integer("norm_num_groups", 32)
    for channels in blocks:
        if channels % groups:
            raise fields.refusal("norm_num_groups", groups, f"it must divide block_out_channels = {blocks}")
    latent = fields.integer("latent_channels", 4)
    shift, scale_ = _latent_statistics(fields, latent)
    result = Config(
        in_channels=fields.integer("in_channels", 3),
        out_channels=fields.integer("out_channels", 3),
        latent_channels=latent,
        block_out_channels=blocks,
        layers_per_block=fields.integer("layers_per_block", 1, maximum=MAX_LAYERS),
        style=ResnetStyle(groups, EPS, fields.choice("act_fn", "silu", ("silu", "swish", "mish", "gelu", "relu"))),
        quant_conv=fields.boolean("use_quant_conv", True),
        post_quant_conv=fields.boolean("use_post_quant_conv", True),
        mid_attention=fields.boolean("mid_block_add_attention", True),
        sample_size=fields.sample_size(32),
        shift=shift,
        scale=scale_,
    )
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    blocks, latent, style = config.block_out_channels, config.latent_channels, config.style
    specs = conv_specs("encoder.conv_in", config.in_channels, blocks[0])
    for i, (c_in, c_out) in enumerate(zip((blocks[0], *blocks), blocks, strict=False)):
        for j in range(config.layers_per_block):
            specs |= resnet_specs(
                f"encoder.down_blocks.{i}.resnets.{j}", c_out if j else c_in, c_out, time=None, style=style
            )
        if i < len(blocks) - 1:
            specs |= conv_specs(f"encoder.down_blocks.{i}.downsamplers.0.conv", c_out, c_out)
    specs |= _mid_specs(config, "encoder.mid_block")
    specs |= norm_specs("encoder.conv_norm_out", blocks[-1]) | conv_specs("encoder.conv_out", blocks[-1], 2 * latent)
    if config.quant_conv:
        specs |= conv_specs("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if config.post_quant_conv:
        specs |= conv_specs("post_quant_conv", latent, latent, kernel=1)
    specs |= conv_specs("decoder.conv_in", latent, blocks[-1]) | _mid_specs(config, "decoder.mid_block")
    for i, (c_in, c_out) in enumerate(zip((blocks[-1], *blocks[::-1]), blocks[::-1], strict=False)):
        for j in range(config.layers_per_block + 1):
            specs |= resnet_specs(
                f"decoder.up_blocks.{i}.resnets.{j}", c_out if j else c_in, c_out, time=None, style=style
            )
        if i < len(blocks) - 1:
            specs |= conv_specs(f"decoder.up_blocks.{i}.upsamplers.0.conv", c_out, c_out)
    specs |= norm_specs("decoder.conv_norm_out", blocks[0])
    return specs | conv_specs("decoder.conv_out", blocks[0], config.out_channels)


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
    _check_channels("images", images, config.in_channels)
    x = to_nhwc(images).astype(params["encoder.conv_in.weight"].dtype)
    x = conv(params, tap, "encoder.conv_in", x)
    for i in range(len(config.block_out_channels)):
        block = f"encoder.down_blocks.{i}"
        for j in range(config.layers_per_block):
            x = resnet(params, tap, f"{block}.resnets.{j}", x, None, style=config.style)
        if i < len(config.block_out_channels) - 1:
            x = downsample_conv(params, tap, f"{block}.downsamplers.0", x, padding=0)
        x = tap(block, x)
    x = tap("encoder", _out(config, params, tap, "encoder", _mid(config, params, tap, "encoder.mid_block", x)))
    if config.quant_conv:
        x = conv(params, tap, "quant_conv", x)
    mean, logvar = jnp.split(to_nchw(x), 2, axis=1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decode(config: Config, params: Params, tap: Tap, latents: Float[Array, "b z h2 w2"]) -> Float[Array, "b c h w"]:
    """Images from unscaled latents, roughly in [-1, 1], not clipped."""
    _check_channels("latents", latents, config.latent_channels)
    x = to_nhwc(latents).astype(params["decoder.conv_in.weight"].dtype)
    if config.post_quant_conv:
        x = conv(params, tap, "post_quant_conv", x)
    x = _mid(config, params, tap, "decoder.mid_block", conv(params, tap, "decoder.conv_in", x))
    for i in range(len(config.block_out_channels)):
        block = f"decoder.up_blocks.{i}"
        for j in range(config.layers_per_block + 1):
            x = resnet(params, tap, f"{block}.resnets.{j}", x, None, style=config.style)
        if i < len(config.block_out_channels) - 1:
            x = upsample_conv(params, tap, f"{block}.upsamplers.0", x)
        x = tap(block, x)
    return to_nchw(tap("decoder", _out(config, params, tap, "decoder", x)))


def sample(key: PRNGKey, mean: Float[Array, "b z h w"], logvar: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""One sample of each :math:`q(z \mid x)`; example i uses ``fold_in(key, i)``.

    .. math:: z = \mu + e^{\ell / 2} \epsilon, \quad \epsilon \sim N(0, I)
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(mean.shape[0]))
    noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * logvar) * noise


def scale(config: Config, latents: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""From the autoencoder's latents to the diffusion model's, of roughly unit variance.

    .. math:: z' = (z - \mathrm{shift}) \, \mathrm{scale}

    The scale is ``scaling_factor``, divided by ``latents_std`` if given; the shift is ``shift_factor`` or
    ``latents_mean``.
    """
    return (latents - _channelwise(config.shift, latents)) * _channelwise(config.scale, latents)


def unscale(config: Config, latents: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""From the diffusion model's latents to the autoencoder's: the inverse of :func:`scale`."""
    return latents / _channelwise(config.scale, latents) + _channelwise(config.shift, latents)


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


def _mid_specs(config: Config, name: str) -> Specs:
    width = config.block_out_channels[-1]
    specs = resnet_specs(f"{name}.resnets.0", width, width, time=None, style=config.style)
    if config.mid_attention:
        specs |= image_attention_specs(f"{name}.attentions.0", width)
    return specs | resnet_specs(f"{name}.resnets.1", width, width, time=None, style=config.style)


def _mid(config: Config, params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    x = resnet(params, tap, f"{name}.resnets.0", x, None, style=config.style)
    if config.mid_attention:
        groups = config.style.groups
        x = image_attention(params, tap, f"{name}.attentions.0", x, heads=1, groups=groups, eps=EPS)
    return tap(name, resnet(params, tap, f"{name}.resnets.1", x, None, style=config.style))


def _out(config: Config, params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
    x = group_norm(params, tap, f"{name}.conv_norm_out", x, groups=config.style.groups, eps=EPS)
    # SiLU whatever act_fn is, as in PyTorch's class.
    x = activation(tap, f"{name}.conv_act", "silu", x)
    return conv(params, tap, f"{name}.conv_out", x)


def _check_channels(name: str, x: Array, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {x.shape}.")


def _channelwise(values: tuple[float, ...], x: Float[Array, "b z h w"]) -> Float[Array, "1 z 1 1"]:
    return jnp.asarray(values, x.dtype)[None, :, None, None]
