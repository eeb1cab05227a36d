"""The UNet of Stable Diffusion 1.4 that the benchmark is about, its attention alone, and room for it."""

from __future__ import annotations

import functools
import importlib.util
import math
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from scaling.models.layers import QUERY_CHUNK, attention
from scaling.models.model import parse_config
from sims.bench.timing import Row, compare, temporaries

__all__ = ["QUICK", "SD14", "attention_memory", "check_room", "has_torch"]

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
"""What the UNet of CompVis/stable-diffusion-v1-4 sets; the rest are the defaults of its class."""

QUICK = SD14 | {"block_out_channels": [32, 64, 128, 128], "sample_size": 16}
TOKENS, HEADS, HEAD_CHANNELS = 4096, 8, 40


def attention_memory(repeats: int) -> Row:
    """Time of attention beside the one that holds the whole matrix; temporaries of both and of the parts of ours."""
    channels = HEADS * HEAD_CHANNELS
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, TOKENS, channels), np.float32)

    @jax.jit
    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        split = [x.reshape(1, TOKENS, HEADS, HEAD_CHANNELS) for x in (q, k, v)]
        return jax.nn.dot_product_attention(*split).reshape(q.shape)

    ours, rival = (
        jax.jit(function).lower(q, k, v).compile() for function in (functools.partial(attention, heads=HEADS), whole)
    )
    notes = {
        "temporary_bytes": temporaries(ours),
        "rival_temporary_bytes": temporaries(rival),
        "chunk_bytes": QUERY_CHUNK * TOKENS * 4,
        "operand_bytes": TOKENS * channels * 4,
        "matrix_bytes": HEADS * TOKENS**2 * 4,
        "rival": "jax.nn.dot_product_attention",
    }
    return compare("attention_memory", lambda: ours(q, k, v), lambda: rival(q, k, v), repeats, notes=notes)


def check_room(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` if this machine lacks the disk or the memory for the network of ``config``."""
    weights = 4 * sum(math.prod(spec.shape) for spec in parse_config(config).parameters().values())
    needed, place = {"disk": weights, "memory": (4 if has_torch() else 3) * weights}, tempfile.gettempdir()
    free = {"disk": shutil.disk_usage(place).free, "memory": _available_memory()}
    for kind, size in needed.items():
        if free[kind] < size:
            raise ValueError(
                f"the network needs {size / 1e9:.1f} GB of {kind} (disk: in {place}), there are {free[kind] / 1e9:.1f};"
                f" try --quick."
            )


def has_torch() -> bool:
    """Whether the rival is installed."""
    return importlib.util.find_spec("torch") is not None


def _available_memory() -> float:
    info = pathlib.Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
