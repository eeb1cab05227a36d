"""Pretrained weights of diffusers and transformers as JAX models: resolve, read the configuration, check, convert.

Strict: a configuration that is not understood, a missing, extra or misshapen tensor, and any file but safetensors is a
``ValueError`` that names it, raised before a parameter is allocated. Tensors are converted one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from scaling import schedules
from scaling.api import Model, architecture, from_config
from scaling.models.config import ParamSpec, to_jax
from scaling.weights import FLOATS, Entry, read_header, read_index, read_json, tensors

__all__ = ["Pipeline", "load_model", "load_pipeline"]

Fetch: TypeAlias = Callable[[str], Path | None]
"""From a file's name, with forward slashes, to where it lies on this machine; None if there is no such file."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


class Pipeline(NamedTuple):
    """The parts of a diffusers pipeline; those that it lacks are None or empty."""

    network: Model
    """The UNet or the transformer."""
    schedule: schedules.Schedule
    vae: Model | None
    text_encoders: tuple[Model, ...]
    tokenizers: tuple[Any, ...]
    """``transformers.CLIPTokenizer``, one per text encoder."""


def load_model(
    path_or_hub_id: str | Path,
    subfolder: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
) -> Model:
    """Load one network.

    ``path_or_hub_id`` is a folder with config.json and weights (one safetensors file, or shards and their index), such a
    weights file itself, or the name of a repository on the Hugging Face hub, whose ``revision`` is then fetched into
    huggingface_hub's cache, or found there without a connection (``HF_HUB_OFFLINE=1``). ``dtype`` converts the
    parameters to float32, bfloat16 or float16; None keeps that of the file. Of weights in two precisions the half one is
    taken if ``dtype`` is float16. Raises ``ValueError`` for whatever is not exactly understood.
    """
    if dtype is not None and jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    single = Path(path_or_hub_id)
    if single.is_file():
        _refuse_pickle(single)
        return _load(_local(single.parent), "", dtype, [single.name])
    return _load(_source(path_or_hub_id, revision), subfolder or "", dtype)


def load_pipeline(path_or_hub_id: str | Path, dtype: Any = None, revision: str | None = None) -> Pipeline:
    """Load all parts that model_index.json lists: UNet or transformer, autoencoder, text encoders, tokenizers, scheduler.

    Safety checkers and feature extractors are left out. See :func:`load_model` for the arguments.
    """
    fetch = _source(path_or_hub_id, revision)
    index_path = fetch("model_index.json")
    if index_path is None:
        raise ValueError(f"{path_or_hub_id}: no model_index.json; for one network use load_model(path, subfolder).")
    index = {name for name, value in read_json(index_path).items() if isinstance(value, list) and any(value)}
    networks = sorted(index & {"unet", "transformer"})
    if len(networks) != 1 or "scheduler" not in index:
        raise ValueError(f"{path_or_hub_id}: needs a scheduler and one of unet and transformer, has {sorted(index)}.")

    def folder(name: str) -> str:
        # Pipelines with one network may have its files, and the scheduler's, at the root.
        config = "scheduler_config.json" if name == "scheduler" else "config.json"
        return name if fetch(f"{name}/{config}") else ""

    scheduler = fetch(_join(folder("scheduler"), "scheduler_config.json"))
    if scheduler is None:
        raise ValueError(f"{path_or_hub_id}: no scheduler_config.json.")
    encoders = sorted(index & {"text_encoder", "text_encoder_2"})
    return Pipeline(
        network=_load(fetch, folder(networks[0]), dtype),
        schedule=schedules.from_config(read_json(scheduler)),
        vae=_load(fetch, "vae", dtype) if "vae" in index else None,
        text_encoders=tuple(_load(fetch, name, dtype) for name in encoders),
        tokenizers=tuple(_tokenizer(fetch, name.replace("text_encoder", "tokenizer")) for name in encoders),
    )


def _load(fetch: Fetch, folder: str, dtype: Any, files: list[str] | None = None) -> Model:
    config_path = fetch(_join(folder, "config.json"))
    if config_path is None:
        raise ValueError(f"no config.json in {folder or 'the folder'}; give subfolder= if the model lies in one.")
    config = read_json(config_path)
    module = architecture(config)
    model = from_config(config, {})
    specs = model.apply.parameters()
    ...
