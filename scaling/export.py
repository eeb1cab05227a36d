"""Models back as folders that PyTorch's diffusers and transformers open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from scaling.api import Model
from scaling.models.config import jax_shape, to_torch
from scaling.weights import write_tensors

__all__ = ["save_pretrained"]


def save_pretrained(model: Model, folder: str | Path) -> Path:
    """Write config.json and the parameters as one safetensors file into ``folder``, made if need be; returns it.

    ``from_pretrained(folder)`` of the class that config.json names then gives equal outputs, and so does
    ``load_model(folder)``. Raises ``ValueError`` if the parameters are not those of the configuration.
    """
    specs = model.apply.parameters()
    shapes = {name: param.shape for name, param in model.params.items()}
    wanted = {name: jax_shape(spec) for name, spec in specs.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ValueError(f"the parameters do not fit the configuration: {', '.join(wrong[:5])}.")
    config = json.loads(model.source)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    write_tensors(
        folder / f"{stem}.safetensors",
        {name: (model.params[name].dtype, spec.shape) for name, spec in specs.items()},
        (to_torch(spec.kind, np.asarray(model.params[name])) for name, spec in specs.items()),
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder
