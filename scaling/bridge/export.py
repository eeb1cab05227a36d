"""Save models and pipelines as folders that PyTorch's diffusers and transformers load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from scaling.bridge.loading import Pipeline
from scaling.bridge.weights import write_tensors
from scaling.models.config import jax_shape, to_torch
from scaling.models.model import Model
from sims.store.files import write_text

__all__ = ["save_pipeline", "save_pretrained"]

PIPELINES = {"unet2d": "DDIMPipeline", "unet2d_condition": "StableDiffusionPipeline", "dit": "DiTPipeline"}
"""The pipeline class of diffusers for each architecture."""


def save_pretrained(model: Model, folder: str | Path) -> Path:
    """Write config.json and the parameters, as one safetensors file, to ``folder``, which is created; returns it.

    ``from_pretrained(folder)`` of the class that config.json names loads the same network in PyTorch, and
    ``load_model(folder)`` loads it again here. Raises ``ValueError`` if the parameters do not fit the configuration.

    >>> import jax, scaling, tempfile
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = scaling.load_model(scaling.save_pretrained(model, folder))
    >>> all(bool((loaded.params[name] == param).all()) for name, param in model.params.items())
    True
    """
    specs = model.apply.parameters()
    shapes = {name: param.shape for name, param in model.params.items()}
    expected = {name: jax_shape(spec) for name, spec in specs.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise ValueError(f"the parameters do not fit the configuration: {', '.join(wrong[:5])}.")
    config = json.loads(model.source)
    folder = Path(folder)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    write_tensors(
        folder / f"{stem}.safetensors",
        {name: (model.params[name].dtype, spec.shape) for name, spec in specs.items()},
        (to_torch(spec.kind, np.asarray(model.params[name])) for name, spec in specs.items()),
    )
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def save_pipeline(pipeline: Pipeline, folder: str | Path) -> Path:
    """Write model_index.json, the scheduler and each network to ``folder``; returns it.

    ``load_pipeline(folder)`` loads the pipeline again, and so does ``from_pretrained(folder)`` of the diffusers class
    that model_index.json names; give it ``vae=None`` if that class has an autoencoder and this pipeline has none, and
    it returns its samples as latents. Tokenizer files are not written: they must already be in ``folder``, under
    ``tokenizer`` and ``tokenizer_2``. Raises ``ValueError`` if they are missing, or if a network's parameters do not
    fit its configuration.
    """
    folder, config = Path(folder), json.loads(pipeline.network.source)
    architecture = pipeline.network.apply.architecture
    networks = {"transformer" if architecture == "dit" else "unet": pipeline.network}
    named = PIPELINES[architecture]
    if pipeline.vae is not None:
        networks["vae" if architecture != "unet2d" else "vqvae"] = pipeline.vae
        # An unconditional network has a class of its own on latents, which calls the autoencoder so.
        named = "LDMPipeline" if architecture == "unet2d" else named
    index: dict[str, list[str | None]] = {
        name: ["diffusers", json.loads(m.source)["_class_name"]] for name, m in networks.items()
    }
    for i, encoder in enumerate(pipeline.text_encoders, 1):
        name = "text_encoder" if i == 1 else f"text_encoder_{i}"
        tokenizer = name.replace("text_encoder", "tokenizer")
        if not (folder / tokenizer / "vocab.json").is_file() and not (folder / tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"{folder / tokenizer}: save the tokenizer of {name} there first.")
        networks[name] = encoder
        index[name] = ["transformers", json.loads(encoder.source)["architectures"][0]]
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    schedule = pipeline.schedule.config
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    if architecture != "unet2d":
        index.setdefault("vae", [None, None])
    if architecture == "unet2d_condition":
        index |= {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
    for name, network in networks.items():
        save_pretrained(network, folder / name)
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(schedule, indent=2, sort_keys=True) + "\n")
    settings = dict(pipeline.settings)
    if architecture == "unet2d_condition":
        settings.setdefault("requires_safety_checker", False)
    head = {"_class_name": named, "_diffusers_version": config.get("_diffusers_version", "0.35.0")}
    write_text(folder / "model_index.json", json.dumps(head | settings | index, indent=2) + "\n")
    return folder
