r"""CLIP's image encoder :cite:`radford21`: ``CLIPVisionModelWithProjection`` and ``CLIPVisionModel`` of transformers.

A vision transformer over patches and one class token, whose final state is the image's vector. Images are (B, C, H, W)
of the configured size, normalized by :data:`IMAGE_MEAN` and :data:`IMAGE_STD`. Cosines between the projected vectors of
images and texts are concept scores.

Names such as ``vision_model.pre_layrnorm`` are spelled as in the checkpoints. Parameters and taps always have the
prefix ``vision_model.``; :func:`rename` adds it to keys of a ``CLIPVisionModel`` that transformers 5 saved without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from scaling.models.blocks_clip import ClipStyle, clip_encoder, clip_encoder_specs, clip_key, clip_style
from scaling.models.config import Fields, ParamSpec
from scaling.models.layers import (
    Params,
    Specs,
    conv,
    embedding_specs,
    layer_norm,
    linear,
    linear_specs,
    norm_specs,
    to_nhwc,
)
from scaling.models.taps import Tap

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "Config", "VisionOutput", "apply", "inputs", "parameters", "parse", "rename"]

PREFIX = "vision_model"
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue in [0, 1] over CLIP's training images: subtract it."""
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviation: divide by it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``CLIPVisionConfig`` that matter; ``projection`` is None for a model without one."""

    style: ClipStyle
    image_channels: int
    image_size: int
    patch_size: int
    projection: int | None


class VisionOutput(NamedTuple):
    """The encoder's outputs for a batch of images."""

    hidden: Float[Array, "b t c"]
    """Last hidden state, not normalized: the class token, then the patches row by row."""
    pooled: Float[Array, "b p"]
    """The normalized class token: ``image_embeds`` if the model has a projection, else ``pooler_output``."""


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json, whose ``architectures`` says whether there is a projection.

    ``ValueError`` names an unsupported field and its value.
    """
    fields = Fields("CLIPVisionModel", config)
    architecture = fields.choice(
        "architectures",
        ["CLIPVisionModelWithProjection"],
        (["CLIPVisionModelWithProjection"], ["CLIPVisionModel"], None),
    )
    width = fields.integer("projection_dim", 512) if architecture != ["CLIPVisionModel"] else None
    return read(fields, projection=width)


def read(fields: Fields, *, projection: int | None) -> Config:
    """The configuration from its fields, with a projection to ``projection`` channels, or None."""
    fields.only("model_type", "clip_vision_model")
    fields.optional_integer("projection_dim")
    result = Config(
        style=clip_style(fields, channels=768, hidden=3072, heads=12),
        image_channels=fields.integer("num_channels", 3),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 32),
        projection=projection,
    )
    if result.image_size < result.patch_size:
        raise fields.refusal("patch_size", result.patch_size, f"it must not exceed image_size = {result.image_size}")
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint, with the prefix."""
    channels, patch = config.style.channels, config.patch_size
    patches = (config.image_size // patch) ** 2
    specs = {
        f"{PREFIX}.embeddings.class_embedding": ParamSpec((channels,), "vector"),
        f"{PREFIX}.embeddings.patch_embedding.weight": ParamSpec(
            (channels, config.image_channels, patch, patch), "conv"
        ),
    }
    specs |= embedding_specs(f"{PREFIX}.embeddings.position_embedding", patches + 1, channels)
    specs |= norm_specs(f"{PREFIX}.pre_layrnorm", channels)
    specs |= clip_encoder_specs(f"{PREFIX}.encoder", config.style)
    specs |= norm_specs(f"{PREFIX}.post_layernorm", channels)
    if config.projection:
        specs |= linear_specs("visual_projection", channels, config.projection, bias=False)
    return specs


def rename(key: str) -> str | None:
    """The parameter's name for a checkpoint's key, with the prefix; None for ``position_ids``."""
    return clip_key(key, PREFIX, ("visual_projection",))


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shape of one image."""
    return (jax.ShapeDtypeStruct((1, config.image_channels, config.image_size, config.image_size), dtype),), {}


def apply(config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]) -> VisionOutput:
    """Encode normalized images; ``ValueError`` unless they have the configured channels and size."""
    size = (config.image_channels, config.image_size, config.image_size)
    if images.shape[1:] != size:
        raise ValueError(f"images have shape {images.shape}, the model takes (B, {', '.join(map(str, size))}).")
    patch, name = config.patch_size, f"{PREFIX}.embeddings.patch_embedding"
    x = to_nhwc(images).astype(params[f"{name}.weight"].dtype)
    x = conv(params, tap, name, x, stride=patch, padding=(0, 0))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    first = jnp.broadcast_to(params[f"{PREFIX}.embeddings.class_embedding"][None, None, :], (x.shape[0], 1, x.shape[2]))
    positions = params[f"{PREFIX}.embeddings.position_embedding.weight"]
    x = tap(f"{PREFIX}.embeddings", jnp.concatenate([first, x], axis=1) + positions[None, :, :])
    x = layer_norm(params, tap, f"{PREFIX}.pre_layrnorm", x, eps=config.style.eps)
    *_, hidden = clip_encoder(params, tap, f"{PREFIX}.encoder", x, style=config.style, causal=False)
    pooled = layer_norm(params, tap, f"{PREFIX}.post_layernorm", hidden[:, 0, :], eps=config.style.eps)
    if config.projection:
        pooled = linear(params, tap, "visual_projection", pooled)
    return VisionOutput(hidden, pooled)
