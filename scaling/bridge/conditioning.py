"""Prompts and class labels as a :class:`scaling.models.model.Condition`, a batch of one.

As in diffusers: Stable Diffusion 1 and 2 attend to the last hidden state of their text encoder; SDXL attends to the
concatenated penultimate states of its two text encoders, and takes the pooled text and the image's sizes beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.checks import check_integer
from scaling.bridge.loading import Pipeline
from scaling.models.model import Condition, Model, encode_text

__all__ = [
    "condition_on",
    "image_channels",
    "is_conditional",
    "null_condition",
    "null_or_none",
    "pixel_size",
    "stacked",
]

SIZES = 6
"""Numbers that SDXL takes: height and width of the original, top and left of the crop, and the target's height and
width."""


def condition_on(
    pipeline: Pipeline,
    prompt: str | None = None,
    class_label: int | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Condition:
    """The condition of a ``prompt`` or a ``class_label``, whichever the network takes.

    None means the empty prompt, or the null class of a DiT; UNets with classes have no null class. Prompts are
    truncated to the text encoder's length, 77 tokens in the released ones. ``size`` is the image's (H, W) in pixels,
    for networks that take it as an input (SDXL); None means the network's own size. Raises ``ValueError`` for an input
    that the network does not take, for a class out of range, and if the network needs a text encoder and the pipeline
    has none.

    >>> import scaling
    >>> pipeline = scaling.load_pipeline(scaling.zoo.folder("fashion-dit"))
    >>> scaling.condition_on(pipeline, class_label=3).class_labels.tolist()
    [3]
    """
    takes = _inputs(pipeline.network)
    if prompt and "context" not in takes:
        raise ValueError("the network reads no text; leave the prompt out.")
    label = None
    if "class_labels" in takes:
        label = _label(pipeline.network, takes["class_labels"], class_label)
    elif class_label is not None:
        raise ValueError("the network has no classes; leave the class label out.")
    if "context" not in takes:
        return Condition(class_labels=label)
    context, pooled = _encoded(pipeline, prompt or "", penultimate="added" in takes)
    if "added" not in takes:
        return Condition(context, label)
    if pipeline.settings.get("requires_aesthetics_score") or takes["added"]["time_ids"].shape != (1, SIZES):
        raise ValueError(
            "the network takes other or more numbers than SDXL's six sizes, for example the aesthetic score of SDXL's "
            "refiner, which is not supported; make its Condition in Python."
        )
    if pooled.shape != takes["added"]["text_embeds"].shape:
        raise ValueError(
            f"the pooled text has {pooled.shape[1]} channels, and the network takes "
            f"{takes['added']['text_embeds'].shape[1]} beside six sizes; the text encoder belongs to another model."
        )
    height, width = size or pixel_size(pipeline)
    sizes = jnp.asarray([[height, width, 0, 0, height, width]], context.dtype)
    return Condition(context, label, {"text_embeds": pooled, "time_ids": sizes})


def null_condition(
    pipeline: Pipeline, negative_prompt: str | None = None, *, size: tuple[int, int] | None = None
) -> Condition:
    """The unconditional half of classifier-free guidance: a negative prompt, or the null class of a DiT.

    Without ``negative_prompt`` it is the empty prompt, or zeros where the pipeline asks for them
    (``force_zeros_for_empty_prompt``). Raises ``ValueError`` for a network without a null class.

    >>> import scaling
    >>> pipeline = scaling.load_pipeline(scaling.zoo.folder("fashion-dit"))
    >>> scaling.null_condition(pipeline).class_labels.tolist()  # after the ten classes
    [10]
    """
    takes = _inputs(pipeline.network)
    if "class_labels" in takes:
        if _null_class(pipeline.network) is None:
            raise ValueError("the network has classes but no null class, so it cannot be guided; leave guidance out.")
        return condition_on(pipeline, negative_prompt, size=size)
    if "context" not in takes:
        raise ValueError("the network is unconditional, so it cannot be guided; leave guidance out.")
    condition = condition_on(pipeline, negative_prompt, size=size)
    if negative_prompt is None and pipeline.settings.get("force_zeros_for_empty_prompt") and condition.added:
        text = {"text_embeds": jnp.zeros_like(condition.added["text_embeds"])}
        return condition._replace(context=jnp.zeros_like(condition.context), added=condition.added | text)
    return condition


def pixel_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width in pixels of the images that the network was trained on."""
    (x, *_), _ = pipeline.network.apply.inputs(jnp.float32)
    factor = 1 if pipeline.vae is None else 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return factor * x.shape[2], factor * x.shape[3]


def image_channels(pipeline: Pipeline) -> int:
    """Channels of the pipeline's images."""
    (x, *_), _ = (pipeline.network if pipeline.vae is None else pipeline.vae).apply.inputs(jnp.float32)
    return x.shape[1]


def is_conditional(pipeline: Pipeline) -> bool:
    """Whether the network takes a prompt, a class or other inputs beside image and timestep."""
    return bool(_inputs(pipeline.network))


def null_or_none(pipeline: Pipeline, *, size: tuple[int, int] | None = None) -> Condition:
    """As :func:`null_condition`; without parts for a network that is not conditioned."""
    return null_condition(pipeline, size=size) if is_conditional(pipeline) else Condition()


def stacked(conditions: Sequence[Condition]) -> Condition:
    """Conditions of equal parts as one batch."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)


def _inputs(network: Model) -> dict[str, Any]:
    """Shapes of a network's inputs other than image and timestep, by name."""
    return network.apply.inputs(jnp.float32)[1]


def _null_class(network: Model) -> int | None:
    return getattr(network.config, "classes", None)


def _label(network: Model, shape: jax.ShapeDtypeStruct, label: int | None) -> Array:
    if shape.ndim != 1:
        raise ValueError("the classes of this network are vectors, not numbers; make its Condition in Python.")
    # A DiT has its null class after the others, a UNet's table has a row per class, and timesteps have no upper end.
    null = _null_class(network)
    table = network.params.get("class_embedding.weight")
    last = null if null is not None else None if table is None else table.shape[0] - 1
    label = null if label is None else label
    if label is None:
        raise ValueError(f"the network needs a class label{'' if last is None else f', from 0 to {last}'}.")
    return jnp.asarray([check_integer("class label", label, minimum=0, maximum=last)], shape.dtype)


def _encoded(
    pipeline: Pipeline, prompt: str, *, penultimate: bool
) -> tuple[Float[Array, "1 t c"], Float[Array, "1 p"]]:
    """States of all encoders, concatenated, and the pooled vector of the last one."""
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a string, got {type(prompt).__name__}; give one prompt at a time.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt {prompt!r} is not Unicode text: {error.reason}; write it in UTF-8.") from error
    if not pipeline.text_encoders:
        raise ValueError("the network takes a prompt, but there is no text encoder; load the whole pipeline's folder.")
    states, pooled = [], None
    for encoder, tokenizer in zip(pipeline.text_encoders, pipeline.tokenizers, strict=True):
        length = min(tokenizer.model_max_length, encoder.config.positions)
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
        hidden, pooled = encode_text(encoder, jnp.asarray(np.asarray([ids], np.int32)), penultimate=penultimate)
        states.append(hidden)
    assert pooled is not None
    return jnp.concatenate(states, axis=-1), pooled
