r"""CLIP's text encoder :cite:`radford21`: ``CLIPTextModel`` and ``CLIPTextModelWithProjection`` of transformers.

A causal transformer over token ids (B, T), T at most ``max_position_embeddings``. Stable Diffusion attends to its last
hidden state, SDXL to the one before; the pooled vector is the state at the end-of-text token. Padding on the right
needs no mask, since no state up to the end of the text sees it.

Keys of published checkpoints, and of those saved by transformers 4, begin with ``text_model.``; transformers 5 saves a
newly made ``CLIPTextModel`` without that prefix. Parameters and taps always have it; :func:`rename` adds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int

from dae_theory.checks import is_concrete
from scaling.models.blocks_clip import ClipStyle, clip_encoder, clip_encoder_specs, clip_key, clip_style
from scaling.models.config import Fields
from scaling.models.layers import Params, Specs, embedding_specs, layer_norm, linear, linear_specs, norm_specs
from scaling.models.taps import Tap

__all__ = ["Config", "TextOutput", "apply", "check_ids", "inputs", "parameters", "parse", "pooled_position", "rename"]

PREFIX = "text_model"
MAX_VOCABULARY = 1 << 20
# In released configurations eos_token_id is 2, which ends no text: transformers then takes the largest id of a text.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of ``CLIPTextConfig`` that matter; ``projection`` is None for a model without one."""

    style: ClipStyle
    vocabulary: int
    positions: int
    eos_token_id: int
    projection: int | None


class TextOutput(NamedTuple):
    """The encoder's outputs for a batch of texts."""

    hidden: Float[Array, "b t c"]
    """Last hidden state, after the final norm: the context of Stable Diffusion 1 and 2."""
    penultimate: Float[Array, "b t c"]
    """Output of the next-to-last layer, not normalized (``hidden_states[-2]``): the context of SDXL."""
    pooled: Float[Array, "b p"]
    """State at the end of the text: ``text_embeds`` if the model has a projection, else ``pooler_output``."""


def parse(config: Mapping[str, Any]) -> Config:
    """Read a config.json, whose ``architectures`` says whether there is a projection.

    ``ValueError`` names an unsupported field and its value.
    """
    fields = Fields("CLIPTextModel", config)
    architecture = fields.choice(
        "architectures", ["CLIPTextModel"], (["CLIPTextModel"], ["CLIPTextModelWithProjection"], None)
    )
    width = fields.integer("projection_dim", 512) if architecture == ["CLIPTextModelWithProjection"] else None
    return read(fields, projection=width)


def read(fields: Fields, *, projection: int | None) -> Config:
    """The configuration from its fields, with a projection to ``projection`` channels, or None."""
    fields.only("model_type", "clip_text_model")
    for name in ("bos_token_id", "pad_token_id"):
        fields.optional_integer(name, minimum=-1, maximum=MAX_VOCABULARY)
    fields.optional_integer("projection_dim")
    result = Config(
        style=clip_style(fields, channels=512, hidden=2048, heads=8),
        vocabulary=fields.integer("vocab_size", 49408, maximum=MAX_VOCABULARY),
        positions=fields.integer("max_position_embeddings", 77),
        eos_token_id=fields.integer("eos_token_id", 49407, minimum=0, maximum=MAX_VOCABULARY),
        projection=projection,
    )
    fields.finish()
    return result


def parameters(config: Config) -> Specs:
    """Every key of the checkpoint, with the prefix."""
    channels = config.style.channels
    specs = embedding_specs(f"{PREFIX}.embeddings.token_embedding", config.vocabulary, channels)
    specs |= embedding_specs(f"{PREFIX}.embeddings.position_embedding", config.positions, channels)
    specs |= clip_encoder_specs(f"{PREFIX}.encoder", config.style)
    specs |= norm_specs(f"{PREFIX}.final_layer_norm", channels)
    if config.projection:
        specs |= linear_specs("text_projection", channels, config.projection, bias=False)
    return specs


def rename(key: str) -> str | None:
    """The parameter's name for a checkpoint's key, with the prefix; None for ``position_ids``."""
    return clip_key(key, PREFIX, ("text_projection",))


def inputs(config: Config, dtype: DTypeLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shape of the token ids of one text of full length."""
    del dtype
    return (jax.ShapeDtypeStruct((1, config.positions), jnp.int32),), {}


def apply(config: Config, params: Params, tap: Tap, ids: Int[Array, "b t"]) -> TextOutput:
    """Encode token ids in [0, ``vocab_size``); others raise ``ValueError``, or give NaN under a trace."""
    if ids.shape[1] > config.positions:
        raise ValueError(
            f"ids have {ids.shape[1]} tokens, the model has positions for {config.positions}; truncate the text."
        )
    check_ids(config, ids)
    tokens = params[f"{PREFIX}.embeddings.token_embedding.weight"]
    # Otherwise a negative id would count from the end.
    ids_or_out = jnp.where(ids < 0, config.vocabulary, ids)
    x = tap(f"{PREFIX}.embeddings.token_embedding", tokens.at[ids_or_out].get(mode="fill", fill_value=jnp.nan))
    positions = params[f"{PREFIX}.embeddings.position_embedding.weight"][: ids.shape[1]]
    x = tap(f"{PREFIX}.embeddings", x + positions[None, :, :])
    *_, penultimate, last = clip_encoder(params, tap, f"{PREFIX}.encoder", x, style=config.style, causal=True)
    hidden = layer_norm(params, tap, f"{PREFIX}.final_layer_norm", last, eps=config.style.eps)
    pooled = jnp.take_along_axis(hidden, pooled_position(config, ids)[:, None, None], axis=1)[:, 0, :]
    if config.projection:
        pooled = linear(params, tap, "text_projection", pooled)
    return TextOutput(hidden, penultimate, pooled)


def check_ids(config: Config, ids: Int[ArrayLike, "b t"]) -> None:
    """Raise ``ValueError`` for concrete ids outside of the vocabulary, which would give NaN."""
    if is_concrete(ids) and not np.all((np.asarray(ids) >= 0) & (np.asarray(ids) < config.vocabulary)):
        raise ValueError(f"ids must lie in [0, {config.vocabulary}), the vocabulary; tokenize with this model's own.")


def pooled_position(config: Config, ids: Int[Array, "b t"]) -> Int[Array, " b"]:
    """The position where each text ends, that of its first ``eos_token_id``; 0 for a text without.

    If ``eos_token_id`` is the legacy value 2, it is the position of the first of the text's largest ids.
    """
    scores = ids if config.eos_token_id == LEGACY_EOS else (ids == config.eos_token_id).astype(jnp.int32)
    return jnp.argmax(scores, axis=-1)
