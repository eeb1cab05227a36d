"""What the rows share: the UNet of Stable Diffusion 1.4 in both libraries, and checks of the machine."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from scaling.bridge.loading import load_model
from scaling.models.model import Model, parse_config

__all__ = ["QUICK", "SD14", "Bench", "check_room", "has_torch", "random_inputs", "torch_module"]

SD14: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
"""The fields of CompVis/stable-diffusion-v1-4's UNet that differ from the defaults of its class."""

QUICK = SD14 | {"block_out_channels": [32, 64, 128, 128], "sample_size": 16}
"""The same UNet, ten times narrower."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The folder of the UNet, the models that are loaded from it when first used, and how often to repeat."""

    folder: pathlib.Path
    config: dict[str, Any]
    repeats: int
    quick: bool = False

    @functools.cached_property
    def model(self) -> Model:
        """The JAX model."""
        return load_model(self.folder)

    @functools.cached_property
    def module(self) -> Any:
        """The PyTorch module; None if PyTorch is not installed."""
        return torch_module(self.folder) if has_torch() else None

    def inputs(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, timestep and prompt, different for every seed."""
        return random_inputs(self.config, seed)


def random_inputs(config: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, timestep and prompt for a network of ``config``."""
    (x, _), more = parse_config(config).inputs(np.float32)
    random = np.random.default_rng(seed)
    image, context = (random.standard_normal(shape, np.float32) for shape in (x.shape, more["context"].shape))
    return image, np.asarray(random.integers(1000), np.float32), context


def check_room(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` if this machine lacks disk space or memory for the network of ``config``."""
    weights = 4 * sum(math.prod(spec.shape) for spec in parse_config(config).parameters().values())
    needed, place = {"disk": weights, "memory": (4 if has_torch() else 3) * weights}, tempfile.gettempdir()
    free = {"disk": shutil.disk_usage(place).free, "memory": _available_memory()}
    for kind, size in needed.items():
        if free[kind] < size:
            raise ValueError(
                f"the network needs {size / 1e9:.1f} GB of {kind} (disk: in {place}), there are {free[kind] / 1e9:.1f};"
                " try --quick."
            )


def has_torch() -> bool:
    """Whether PyTorch, the rival, is installed."""
    return importlib.util.find_spec("torch") is not None


def torch_module(folder: pathlib.Path) -> Any:
    """The UNet of ``folder`` in PyTorch."""
    import diffusers

    return getattr(diffusers, SD14["_class_name"]).from_pretrained(folder).eval()


def _available_memory() -> float:
    info = pathlib.Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
