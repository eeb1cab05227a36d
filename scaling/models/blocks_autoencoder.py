"""The convolutional halves that the autoencoders of latent diffusion share, and the scale of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from scaling.models.blocks_resnet import (
    ResnetStyle,
    downsample_conv,
    image_attention,
    image_attention_specs,
    resnet,
    resnet_specs,
    upsample_conv,
)
from scaling.models.config import MAX_LAYERS, Fields
from scaling.models.layers import Params, Specs, activation, conv, conv_specs, group_norm, norm_specs, to_nhwc
from scaling.models.taps import Tap

__all__ = [
    "Halves",
    "Scaled",
    "decoder",
    "decoder_specs",
    "encoder",
    "encoder_specs",
    "parse_halves",
    "scale",
    "unscale",
]

# Fixed in PyTorch's classes, whatever the configuration.
EPS = 1e-6


class Halves(NamedTuple):
    """The fields that encoder and decoder share."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    style: ResnetStyle
    mid_attention: bool


@runtime_checkable
class Scaled(Protocol):
    """A configuration with the shift and scale of its latents, one per channel."""

    @property
    def shift(self) -> tuple[float, ...]:
        """What is subtracted."""
        ...

    @property
    def scale(self) -> tuple[float, ...]:
        """What the rest is multiplied by."""
        ...


def parse_halves(fields: Fields, latent_channels: int) -> Halves:
    """Read what encoder and decoder share; ``ValueError`` names an unsupported field and its value."""
    blocks = fields.integers("block_out_channels", (64,))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = fields.choices(name, (kind,), (kind,))
        if len(types) != len(blocks):
            raise fields.refusal(name, types, f"it must have one entry for each of block_out_channels = {blocks}")
    groups = fields.integer("norm_num_groups", 32)
    for channels in blocks:
        if channels % groups:
            raise fields.refusal("norm_num_groups", groups, f"it must divide block_out_channels = {blocks}")
    return Halves(
        in_channels=fields.integer("in_channels", 3),
        out_channels=fields.integer("out_channels", 3),
        latent_channels=fields.integer("latent_channels", latent_channels),
        block_out_channels=blocks,
        layers_per_block=fields.integer("layers_per_block", 1, maximum=MAX_LAYERS),
        style=ResnetStyle(groups, EPS, fields.choice("act_fn", "silu", ("silu", "swish", "mish", "gelu", "relu"))),
        mid_attention=fields.boolean("mid_block_add_attention", True),
    )


def encoder_specs(halves: Halves, channels: int) -> Specs:
    """Parameters of :func:`encoder`, which returns ``channels``."""
    blocks, style = halves.block_out_channels, halves.style
    specs = conv_specs("encoder.conv_in", halves.in_channels, blocks[0])
    for i, (c_in, c_out) in enumerate(zip((blocks[0], *blocks), blocks, strict=False)):
        for j in range(halves.layers_per_block):
            specs |= resnet_specs(
                f"encoder.down_blocks.{i}.resnets.{j}", c_out if j else c_in, c_out, time=None, style=style
            )
        if i < len(blocks) - 1:
            specs |= conv_specs(f"encoder.down_blocks.{i}.downsamplers.0.conv", c_out, c_out)
    specs |= _mid_specs(halves, "encoder.mid_block")
    return (
        specs | norm_specs("encoder.conv_norm_out", blocks[-1]) | conv_specs("encoder.conv_out", blocks[-1], channels)
    )


def decoder_specs(halves: Halves) -> Specs:
    """Parameters of :func:`decoder`."""
    blocks, style = halves.block_out_channels, halves.style
    specs = conv_specs("decoder.conv_in", halves.latent_channels, blocks[-1]) | _mid_specs(halves, "decoder.mid_block")
    for i, (c_in, c_out) in enumerate(zip((blocks[-1], *blocks[::-1]), blocks[::-1], strict=False)):
        for j in range(halves.layers_per_block + 1):
            specs |= resnet_specs(
                f"decoder.up_blocks.{i}.resnets.{j}", c_out if j else c_in, c_out, time=None, style=style
            )
        if i < len(blocks) - 1:
            specs |= conv_specs(f"decoder.up_blocks.{i}.upsamplers.0.conv", c_out, c_out)
    specs |= norm_specs("decoder.conv_norm_out", blocks[0])
    return specs | conv_specs("decoder.conv_out", blocks[0], halves.out_channels)


def encoder(halves: Halves, params: Params, tap: Tap, images: Float[Array, "b c h w"]) -> Float[Array, "b h2 w2 z"]:
    """What the encoder makes of images; height and width are divided by 2 in every block but the last."""
    check_channels("images", images, halves.in_channels)
    x = to_nhwc(images).astype(params["encoder.conv_in.weight"].dtype)
    x = conv(params, tap, "encoder.conv_in", x)
    for i in range(len(halves.block_out_channels)):
        block = f"encoder.down_blocks.{i}"
        for j in range(halves.layers_per_block):
            x = resnet(params, tap, f"{block}.resnets.{j}", x, None, style=halves.style)
        if i < len(halves.block_out_channels) - 1:
            x = downsample_conv(params, tap, f"{block}.downsamplers.0", x, padding=0)
        x = tap(block, x)
    return tap("encoder", _out(halves, params, tap, "encoder", _mid(halves, params, tap, "encoder.mid_block", x)))


def decoder(halves: Halves, params: Params, tap: Tap, x: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
    """Images of what :func:`encoder` made, roughly in [-1, 1], not clipped."""
    x = _mid(halves, params, tap, "decoder.mid_block", conv(params, tap, "decoder.conv_in", x))
    for i in range(len(halves.block_out_channels)):
        block = f"decoder.up_blocks.{i}"
        for j in range(halves.layers_per_block + 1):
            x = resnet(params, tap, f"{block}.resnets.{j}", x, None, style=halves.style)
        if i < len(halves.block_out_channels) - 1:
            x = upsample_conv(params, tap, f"{block}.upsamplers.0", x)
        x = tap(block, x)
    return tap("decoder", _out(halves, params, tap, "decoder", x))


def scale(config: Scaled, latents: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""From the autoencoder's latents to the diffusion model's, of roughly unit variance.

    .. math:: z' = (z - \mathrm{shift}) \, \mathrm{scale}

    The scale is ``scaling_factor``, divided by ``latents_std`` if given; the shift is ``shift_factor`` or
    ``latents_mean``.
    """
    return (latents - _channelwise(config.shift, latents)) * _channelwise(config.scale, latents)


def unscale(config: Scaled, latents: Float[Array, "b z h w"]) -> Float[Array, "b z h w"]:
    r"""From the diffusion model's latents to the autoencoder's: the inverse of :func:`scale`."""
    return latents / _channelwise(config.scale, latents) + _channelwise(config.shift, latents)


def check_channels(name: str, x: Any, channels: int) -> None:
    """``ValueError`` unless x has the shape (B, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {x.shape}.")


def _mid_specs(halves: Halves, name: str) -> Specs:
    width = halves.block_out_channels[-1]
    specs = resnet_specs(f"{name}.resnets.0", width, width, time=None, style=halves.style)
    if halves.mid_attention:
        specs |= image_attention_specs(f"{name}.attentions.0", width)
    return specs | resnet_specs(f"{name}.resnets.1", width, width, time=None, style=halves.style)


def _mid(halves: Halves, params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    x = resnet(params, tap, f"{name}.resnets.0", x, None, style=halves.style)
    if halves.mid_attention:
        groups = halves.style.groups
        x = image_attention(params, tap, f"{name}.attentions.0", x, heads=1, groups=groups, eps=EPS)
    return tap(name, resnet(params, tap, f"{name}.resnets.1", x, None, style=halves.style))


def _out(halves: Halves, params: Params, tap: Tap, name: str, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
    x = group_norm(params, tap, f"{name}.conv_norm_out", x, groups=halves.style.groups, eps=EPS)
    # SiLU whatever act_fn is, as in PyTorch's classes.
    x = activation(tap, f"{name}.conv_act", "silu", x)
    return conv(params, tap, f"{name}.conv_out", x)


def _channelwise(values: Sequence[float], x: Float[Array, "b z h w"]) -> Float[Array, "1 z 1 1"]:
    return jnp.asarray(values, x.dtype)[None, :, None, None]
