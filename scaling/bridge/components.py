"""Read a model_index.json: what each entry of a pipeline is, or why it is refused.

Every entry is understood, known to be irrelevant to the images, or refused by name: a component that is dropped without
a word would change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from scaling.models.model import ARCHITECTURES, DENOISERS

__all__ = ["AUTOENCODERS", "IRRELEVANT", "Components", "plain_class", "read_components"]

AUTOENCODERS = ("vae", "vqvae")
"""Names of the autoencoder in diffusers' pipelines."""

COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": DENOISERS,
    "transformer": DENOISERS,
    **dict.fromkeys(AUTOENCODERS, ("autoencoder_kl", "vq_model")),
    "text_encoder": ("clip_text",),
    "text_encoder_2": ("clip_text",),
}
"""The networks that are read, with the architectures that each may have."""

READ_BESIDE = ("scheduler", "tokenizer", "tokenizer_2")
"""Components that are read but are no networks."""

SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""Entries other than components that are read."""

IRRELEVANT = frozenset(
    {
        # Components: a filter of finished images, its preprocessing, and the encoder of IP-Adapter's prompt images,
        # without which the pipelines run, since the UNets that need one are refused by their configurations.
        "feature_extractor",
        "image_encoder",
        "safety_checker",
        "watermark",
        # Settings: of that filter, names of classes, and a height of the images by default.
        "default_sample_size",
        "id2label",
        "requires_safety_checker",
    }
)
"""Entries that do not change the images; everything else that is not read is refused."""


class Components(NamedTuple):
    """The content of a model_index.json."""

    networks: dict[str, str]
    """The class of each network by component, the denoising one first, then the autoencoder and the text encoders."""
    scheduler: str | None
    """The class of the scheduler, as in PyTorch; None if the file names none."""
    settings: dict[str, Any]
    """Entries other than components."""


def plain_class(name: str) -> str:
    """The PyTorch name of a class: diffusers' Flax classes had the same configurations."""
    return name.removeprefix("Flax")


def read_components(origin: str, index: Mapping[str, Any]) -> Components:
    """Sort the entries of a model_index.json; ``ValueError`` names one that is not supported, and what to do."""
    listed: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value):
            if value[1] is not None:
                listed[name] = plain_class(value[1])
        elif name in (*SETTINGS, *IRRELEVANT):
            settings[name] = value
        elif value not in (None, False):
            raise ValueError(
                f"{origin}: model_index.json sets {name} = {_short(value)}, which is not supported: the images could "
                f"be wrong; {_alone(origin, listed)}."
            )
    denoisers = sorted(listed.keys() & {"unet", "transformer"})
    if len(denoisers) != 1:
        raise ValueError(f"{origin}: a pipeline needs either a unet or a transformer; it has {sorted(listed)}.")
    for name, named in listed.items():
        if name in IRRELEVANT or name in READ_BESIDE:
            continue
        if ARCHITECTURES.get(named) not in COMPONENTS.get(name, ()):
            supported = [known for known, kind in ARCHITECTURES.items() if kind in COMPONENTS.get(name, ())]
            reason = f"supported are {', '.join(supported)}" if supported else "pipelines with one are not supported"
            raise ValueError(
                f"{origin}: model_index.json lists {name} of class {named}: {reason}. {_alone(origin, listed)}."
            )
    autoencoders = [name for name in AUTOENCODERS if name in listed]
    if len(autoencoders) > 1:
        raise ValueError(f"{origin}: a pipeline has at most one autoencoder; it has {', '.join(autoencoders)}.")
    order = (*denoisers, *autoencoders, "text_encoder", "text_encoder_2")
    return Components({name: listed[name] for name in order if name in listed}, listed.get("scheduler"), settings)


def _alone(origin: str, listed: Mapping[str, str]) -> str:
    """What to do instead."""
    part = next((name for name in ("unet", "transformer") if name in listed), "unet")
    return (
        f"To use the network alone, on latents where it is a latent model, load {origin}/{part} from a folder on this "
        f"machine and give the pipeline's scheduler folder with scheduler= (--scheduler)"
    )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 100 else f"{shown[:100]}..."
