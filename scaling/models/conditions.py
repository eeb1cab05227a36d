"""Inputs of a UNet other than the image, timesteps and class labels, and checks of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from scaling.models.config import Fields
from scaling.models.layers import (
    Params,
    Specs,
    embedding_specs,
    linear,
    linear_specs,
    timestep_embedding,
    timestep_embedding_specs,
)
from scaling.models.taps import Tap

__all__ = ["LabelKind", "batch_of_times", "check_image", "embed_labels", "label_inputs", "label_kind", "label_specs"]

LabelKind: TypeAlias = Literal["table", "timestep", "identity", "projection", "simple_projection"]
"""How class labels become a vector: by a table, as timesteps, as they are, or by a projection."""


def batch_of_times(t: ArrayLike, batch: int) -> Float[Array, " b"]:
    """Timesteps (B,) in float32, from a scalar or (B,)."""
    t = jnp.asarray(t).astype(jnp.float32)
    if t.shape not in ((), (1,), (batch,)):
        raise ValueError(f"timesteps must be a scalar or ({batch},), one per image; got shape {t.shape}.")
    return jnp.broadcast_to(t.reshape(-1), (batch,))


def check_image(owner: str, x: Array, channels: int, *, multiple: int = 1) -> None:
    """Raise ``ValueError`` unless x is a floating (B, ``channels``, H, W) with H and W multiples of ``multiple``."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{owner} takes images (B, {channels}, H, W); got shape {x.shape}.")
    if any(n % multiple or not n for n in x.shape[2:]):
        raise ValueError(f"{owner} takes heights and widths that are multiples of {multiple}; got shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{owner} takes floating-point images; got {x.dtype}, convert them with .astype(float).")


def label_kind(fields: Fields, kinds: tuple[str | None, ...]) -> LabelKind | None:
    """The configuration's kind of class labels, None if it has no classes."""
    kind = fields.choice("class_embed_type", None, kinds)
    return kind or ("table" if fields.optional_integer("num_class_embeds") is not None else None)  # type: ignore


def label_specs(kind: LabelKind | None, *, count: int | None, width: int, projected: int | None, time: int) -> Specs:
    """Parameters of :func:`embed_labels`; ``time`` is the width of the embedding."""
    match kind:
        case "table":
            return embedding_specs("class_embedding", count or 0, time)
        case "timestep":
            return timestep_embedding_specs("class_embedding", width, time)
        case "projection":
            return timestep_embedding_specs("class_embedding", projected or 0, time)
        case "simple_projection":
            return linear_specs("class_embedding", projected or 0, time)
    return {}


def embed_labels(
    params: Params,
    tap: Tap,
    kind: LabelKind | None,
    labels: ArrayLike | None,
    like: Float[Array, "b e"],
    sinusoids: Callable[[Float[Array, " b"]], Float[Array, "b c"]],
    *,
    act_fn: str = "silu",
) -> Float[Array, "b e"] | None:
    """The embedding of class labels; None for a model without classes.

    Args:
        params: all parameters.
        tap: called after each module.
        kind: how labels become a vector; None for a model without classes.
        labels: (B,) for a table or timesteps, else (B, C).
        like: gives the batch size and the dtype.
        sinusoids: the model's sinusoidal embedding, of labels that are timesteps.
        act_fn: the nonlinearity of the embedding of timesteps.
    """
    if kind is None:
        if labels is not None:
            raise ValueError("the model has no classes; leave class_labels out.")
        return None
    if labels is None:
        raise ValueError("the model is conditioned on classes; give class_labels, one per image.")
    labels = jnp.asarray(labels)
    if labels.ndim != (1 if kind in ("table", "timestep") else 2) or labels.shape[0] != like.shape[0]:
        raise ValueError(
            f"class_labels of shape {labels.shape} do not fit kind {kind!r} and a batch of {like.shape[0]}."
        )
    match kind:
        case "table":
            # A label out of range gives NaN, not the last class.
            rows = jnp.take(params["class_embedding.weight"], labels, axis=0, mode="fill", fill_value=jnp.nan)
            return tap("class_embedding", rows)
        case "timestep":
            emb = tap("time_proj", sinusoids(labels.astype(jnp.float32))).astype(like.dtype)
            return timestep_embedding(params, tap, "class_embedding", emb, act_fn=act_fn)
        case "projection":
            return timestep_embedding(params, tap, "class_embedding", labels.astype(like.dtype))
        case "simple_projection":
            return linear(params, tap, "class_embedding", labels.astype(like.dtype))
    return tap("class_embedding", labels.astype(like.dtype))


def label_inputs(kind: LabelKind | None, *, projected: int | None, time: int, dtype: Any) -> dict[str, Any]:
    """Shape of ``class_labels`` for one example, as a keyword argument."""
    match kind:
        case None:
            return {}
        case "table":
            return {"class_labels": jax.ShapeDtypeStruct((1,), jnp.int32)}
        case "timestep":
            return {"class_labels": jax.ShapeDtypeStruct((1,), jnp.float32)}
    return {"class_labels": jax.ShapeDtypeStruct((1, time if kind == "identity" else projected or 0), dtype)}
