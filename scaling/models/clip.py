r"""Both halves of CLIP :cite:`radford21` in one checkpoint: ``CLIPModel`` of transformers.

Texts and images become vectors of one space; the cosine between two of them, times the learned :math:`e^s`, is the
logit of "this text describes this image". ``model.apply.of("encode_text")`` and ``model.apply.of("encode_image")`` run
one half, see :mod:`scaling.models.clip_text` and :mod:`scaling.models.clip_vision`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from scaling.models import clip_text, clip_vision
from scaling.models.config import Fields, ParamSpec
from scaling.models.layers import Params, Specs, widened
from scaling.models.taps import Tap

__all__ = [
    "ClipOutput",
    "Config",
    "apply",
    "encode_image",
    "encode_text",
    "inputs",
    "parameters",
    "parse",
    "rename",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """The configurations of both halves, which project to the same width."""

    text: clip_text.Config
    vision: clip_vision.Config


class ClipOutput(NamedTuple):
    """Every image compared with every text."""

    logits: Float[Array, "images texts"]
    """Cosines of the vectors times the learned factor, about 100 in the released models (``logits_per_image``)."""
    text: clip_text.TextOutput
    image: clip_vision.VisionOutput


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json; its halves may also be called ``text_config_dict`` and ``vision_config_dict``.

    Where both names occur, these take precedence, as in transformers. ``ValueError`` names an unsupported field.
    """
    fields = Fields("CLIPModel", config)
    fields.only("model_type", "clip")
    width = fields.integer("projection_dim", 512)
    text = clip_text.read(_part(fields, "CLIPTextModel", "text"), projection=width)
    vision = clip_vision.read(_part(fields, "CLIPVisionModel", "vision"), projection=width)
    fields.finish()
    return Config(text, vision)


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint."""
    specs = clip_text.parameters(config.text) | clip_vision.parameters(config.vision)
    return specs | {"logit_scale": ParamSpec((), "vector")}


def rename(key: str) -> str | None:
    """The parameter's name for a checkpoint's key; None for either half's stored ``position_ids``."""
    return None if key.endswith(".embeddings.position_ids") else key


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shapes of one text's ids and of one image."""
    return clip_text.inputs(config.text, dtype)[0] + clip_vision.inputs(config.vision, dtype)[0], {}


def apply(
    config: Config, params: Params, tap: Tap, ids: Int[Array, "texts t"], images: Float[Array, "images c h w"]
) -> ClipOutput:
    r"""Compare every image with every text.

    .. math:: \mathrm{logit}_{ij} = e^s \, \langle u_i, v_j \rangle / (\|u_i\| \, \|v_j\|)
    """
    text, image = encode_text(config, params, tap, ids), encode_image(config, params, tap, images)
    v, u = _unit(text.pooled), _unit(image.pooled)
    return ClipOutput(u @ v.T * jnp.exp(params["logit_scale"]), text, image)


def encode_text(config: Config, params: Params, tap: Tap, ids: Int[Array, "b t"]) -> clip_text.TextOutput:
    """The text half; its ``pooled`` is the projected vector, not normalized."""
    return clip_text.apply(config.text, params, tap, ids)


def encode_image(config: Config, params: Params, tap: Tap, images: Float[Array, "b c h w"]) -> clip_vision.VisionOutput:
    """The image half; its ``pooled`` is the projected vector, not normalized."""
    return clip_vision.apply(config.vision, params, tap, images)


def _part(fields: Fields, owner: str, part: str) -> Fields:
    given = [fields.raw(name) for name in (f"{part}_config_dict", f"{part}_config")]
    return Fields(owner, next((config for config in given if config is not None), {}))


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    return x / jnp.linalg.norm(widened(x), axis=-1, keepdims=True).astype(x.dtype)
