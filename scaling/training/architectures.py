"""Small networks to train, as the fields of a config.json, and the noise schedule for their training.

The UNets are those of diffusers, with attention at the lowest level; all that these functions do not set has
diffusers' defaults. Images that do not fit the network are refused before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dae_theory.checks import check_integer
from scaling.training.spec import ARCHS, TrainSpec

__all__ = ["ARCHS", "network_config", "scheduler_config", "text_config"]

GROUPS = 8
"""Groups of the norms. diffusers' default, 32, would leave one channel per group in the narrowest networks here."""


def network_config(
    arch: str,
    image_shape: tuple[int, int, int],
    *,
    channels: Sequence[int] = TrainSpec.channels,
    layers: int = TrainSpec.layers,
    heads: int = TrainSpec.heads,
    patch_size: int = TrainSpec.patch_size,
    context: int = TrainSpec.text_channels,
    num_classes: int = 1,
) -> dict[str, Any]:
    """The config.json of a network for images of ``image_shape`` (C, H, W).

    Args:
        arch: ``unet2d``, ``unet2d_condition`` (conditioned on text) or ``dit`` (conditioned on classes).
        image_shape: shape of the images to denoise.
        channels: channels of the levels of a UNet, from the highest resolution down; of a DiT, the one width.
        layers: residual blocks per level, or transformer blocks of a DiT.
        heads: attention heads, to text and in a DiT; ``unet2d`` ignores them: its heads have 8 channels.
        patch_size: side of a DiT's patches.
        context: channels of the text encoder's states.
        num_classes: classes of a DiT, not counting its null class.

    ``ValueError`` for widths that heads and norms do not divide, and for resolutions that the levels cannot halve or
    the patches cannot tile.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}; got {arch!r}.")
    if not channels:
        raise ValueError("channels: give at least one number, as in 32,64.")
    for width in channels:
        check_integer("channels", width, minimum=1)
    check_integer("layers", layers, minimum=1)
    check_integer("heads", heads, minimum=1)
    side = _side(arch, image_shape, len(channels), patch_size)
    common = {"in_channels": image_shape[0], "out_channels": image_shape[0], "sample_size": side}
    if arch == "dit":
        if len(channels) != 1 or channels[0] % heads or channels[0] % 4:
            raise ValueError(
                f"channels = {','.join(map(str, channels))}: a DiT has one width, a multiple of 4 and of its {heads} "
                "heads, as in 64."
            )
        return common | {
            "_class_name": "DiTTransformer2DModel",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": channels[0] // heads,
            "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": heads,
            "num_embeds_ada_norm": check_integer("number of classes", num_classes, minimum=1),
            "num_layers": layers,
            "patch_size": patch_size,
        }
    above = len(channels) - 1
    attends = "CrossAttn" if arch == "unet2d_condition" else "Attn"
    levels = {
        "block_out_channels": list(channels),
        "down_block_types": [*["DownBlock2D"] * above, f"{attends}DownBlock2D"],
        "layers_per_block": layers,
        "norm_num_groups": math.gcd(GROUPS, *channels),
        "up_block_types": [f"{attends}UpBlock2D", *["UpBlock2D"] * above],
    }
    if arch == "unet2d":
        return common | levels | {"_class_name": "UNet2DModel", "attention_head_dim": min(8, channels[-1])}
    if channels[-1] % heads:
        raise ValueError(f"heads = {heads} must divide the {channels[-1]} channels of the lowest level.")
    condition = {"attention_head_dim": heads, "cross_attention_dim": context}
    return common | levels | condition | {"_class_name": "UNet2DConditionModel"}


def text_config(vocabulary: int, positions: int, end: int, *, channels: int, layers: int) -> dict[str, Any]:
    """The config.json of a small ``CLIPTextModel`` whose texts end in, and are padded with, the token ``end``."""
    check_integer("text layers", layers, minimum=1)
    heads = math.gcd(4, check_integer("text channels", channels, minimum=1))
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "hidden_act": "quick_gelu",
        "hidden_size": channels,
        "intermediate_size": 2 * channels,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": end,
        "projection_dim": channels,
        "vocab_size": vocabulary,
    }


def scheduler_config(
    *,
    prediction: str = TrainSpec.prediction,
    timesteps: int = TrainSpec.timesteps,
    beta_schedule: str = TrainSpec.beta_schedule,
    text: bool = False,
) -> dict[str, Any]:
    """The scheduler_config.json: DDIM over betas from 1e-4 to 0.02, with the settings of the pipeline's class.

    For ``text`` that class is Stable Diffusion's pipeline, which replaces any other ``steps_offset`` and
    ``clip_sample`` when it is loaded.
    """
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.02,
        "beta_schedule": beta_schedule,
        "beta_start": 1e-4,
        "clip_sample": not text,
        "num_train_timesteps": timesteps,
        "prediction_type": prediction,
        "set_alpha_to_one": not text,
        "steps_offset": int(text),
    }


def _side(arch: str, image_shape: tuple[int, int, int], levels: int, patch_size: int) -> Any:
    _, height, width = image_shape
    if arch == "dit":
        check_integer("patch_size", patch_size, minimum=1)
        if height != width or height % patch_size:
            raise ValueError(
                f"images of {height}x{width}: a DiT takes squares that its patches of {patch_size} tile; choose "
                f"another resolution, as {max(patch_size, min(height, width) // patch_size * patch_size)}, or patches."
            )
        return height
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"images of {height}x{width} cannot be halved {levels - 1} times, as a UNet of {levels} levels does; "
            f"choose fewer channels, or a resolution that is a multiple of {multiple}, as "
            f"{max(multiple, min(height, width) // multiple * multiple)}."
        )
    return height if height == width else [height, width]
