"""Golden cases: networks of real configurations at reduced width, their weights and inputs, drawn without a framework.

Weights and inputs are functions of names, so the files beside this one hold PyTorch's results alone; ``make.py`` writes
them. A new case is one entry of ``CASES``.
"""

from __future__ import annotations

import json
import math
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parent
PUBLISHED = json.loads((FOLDER.parent / "published_configs.json").read_text())


class Case(NamedTuple):
    """One network and one call: our arguments by name, and the taps to keep."""

    config: dict[str, Any]
    inputs: dict[str, Any]
    taps: tuple[str, ...]

    def path(self, name):
        return FOLDER / f"{name}.safetensors"


def draw(name, shape, dtype="float32"):
    """Standard normals that depend on ``name`` alone; this generator's stream is frozen."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(dtype)


def parameter(name, shape):
    """Values, none zero, of a size that keeps activations near one; ``name`` and ``shape`` are PyTorch's."""
    random = draw(name, shape)
    if len(shape) > 1:
        return random if "embedding" in name else random / np.float32(math.prod(shape[1:]) ** 0.5)
    return np.float32("norm" in name and name.endswith("weight")) + np.float32(0.2) * random


def narrow_unet(config, factor, **changes):
    """The configuration with ``factor`` times fewer channels everywhere and groups of about the same size."""
    less = {name: config[name] // factor for name in ("cross_attention_dim",) if name in config}
    widths = [width // factor for width in config["block_out_channels"]]
    return config | less | {"block_out_channels": widths, "norm_num_groups": 4, "sample_size": 8} | changes


def narrow_vae(config, factor=16, **changes):
    """The configuration with ``factor`` times fewer channels."""
    widths = [width // factor for width in config["block_out_channels"]]
    return config | {"block_out_channels": widths, "norm_num_groups": 4, "sample_size": 16} | changes


def narrow_text(config, **changes):
    """The configuration with 4 channels a head, 3 layers and 99 words."""
    width = 4 * config["num_attention_heads"]
    less = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "vocab_size": 99}
    return {"architectures": ["CLIPTextModel"]} | config | less | {"projection_dim": 12} | changes


def _latent(config, tokens=5, **added):
    x = draw("x", (2, 4, 8, 8))
    context = draw("context", (2, tokens, config["cross_attention_dim"]))
    return {"x": x, "t": np.array([981, 2]), "context": context} | ({"added": added} if added else {})


CIFAR = narrow_unet(PUBLISHED["google/ddpm-cifar10-32"]["unet"], 16)
CELEBA = narrow_unet(PUBLISHED["google/ddpm-celebahq-256"]["unet"], 16)
SD14 = narrow_unet(PUBLISHED["CompVis/stable-diffusion-v1-4"]["unet"], 8)
SD21 = narrow_unet(PUBLISHED["stabilityai/stable-diffusion-2-1-base"]["unet"], 16)
SD21V = narrow_unet(PUBLISHED["stabilityai/stable-diffusion-2-1"]["unet"], 16)
SDXL = narrow_unet(
    PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"]["unet"],
    16,
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=2816 // 16,
)
DIT = PUBLISHED["facebook/DiT-XL-2-256"]["transformer"] | {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_embeds_ada_norm": 10,
    "sample_size": 8,
}
VAE = narrow_vae(PUBLISHED["CompVis/stable-diffusion-v1-4"]["vae"])
# As in the 16-channel autoencoders of later pipelines.
VAE_PLAIN = narrow_vae(
    PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"]["vae"],
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
    latent_channels=16,
)
TEXT_14 = narrow_text(PUBLISHED["CompVis/stable-diffusion-v1-4"]["text_encoder"])
TEXT_21 = narrow_text(PUBLISHED["stabilityai/stable-diffusion-2-1-base"]["text_encoder"])
TEXT_XL = narrow_text(PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"]["text_encoder_2"])
TEXT_EOS = narrow_text(PUBLISHED["openai/clip-vit-large-patch14"]["text_encoder"], eos_token_id=98)
VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 14,
    "patch_size": 4,
    "projection_dim": 12,
}
# The second text is padded with its end, the third has none, and 98 is the largest id of the first two.
IDS = np.array([[97, 5, 60, 98, 1, 1, 1], [97, 98, 98, 98, 98, 98, 98], [3, 4, 9, 6, 7, 8, 5]])
TEXT_TAPS = ("text_model.embeddings", "text_model.encoder.layers.1", "text_model.encoder.layers.2.mlp.activation_fn")
DETECTOR_TAP = "up_blocks.0.resnets.2.nonlinearity"
UNET_TAPS = ("time_embedding", "down_blocks.1", "mid_block", DETECTOR_TAP)

CASES = {
    "ddpm_cifar10": Case(CIFAR, {"x": draw("x", (2, 3, 8, 8)), "t": np.array([999, 3])}, UNET_TAPS),
    "ddpm_celebahq": Case(CELEBA, {"x": draw("x", (1, 3, 32, 32)), "t": np.array([50])}, UNET_TAPS),
    "sd14_unet": Case(SD14, _latent(SD14), (*UNET_TAPS, "down_blocks.0.attentions.1.transformer_blocks.0.attn2")),
    "sd21_unet": Case(SD21, _latent(SD21), (*UNET_TAPS, "up_blocks.1.attentions.0.proj_in")),
    "sd21_v_unet": Case(SD21V, _latent(SD21V), UNET_TAPS),
    "sdxl_unet": Case(
        SDXL,
        _latent(
            SDXL,
            text_embeds=draw("text_embeds", (2, 80)),
            time_ids=np.array([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 16, 0, 1024, 896]], np.float32),
        ),
        (*UNET_TAPS, "add_embedding"),
    ),
    "dit": Case(
        DIT,
        {"x": draw("x", (3, 4, 8, 8)), "t": np.array([999, 3, 41]), "class_labels": np.array([10, 0, 9])},
        ("pos_embed", "transformer_blocks.1.norm1", "transformer_blocks.2.ff.net.0", "transformer_blocks.2"),
    ),
    # Not a multiple of 8: the encoder's sizes are rounded up on the way down.
    "sd14_vae": Case(
        VAE,
        {"images": draw("images", (2, 3, 24, 20))},
        ("encoder.down_blocks.1", "encoder.mid_block.attentions.0", "decoder.mid_block", "decoder.up_blocks.2"),
    ),
    "plain_vae": Case(VAE_PLAIN, {"images": draw("images", (1, 3, 16, 16))}, ("encoder.conv_act", "decoder.mid_block")),
    "sd14_text": Case(TEXT_14, {"ids": IDS}, TEXT_TAPS),
    "sd21_text": Case(TEXT_21, {"ids": IDS}, TEXT_TAPS),
    "sdxl_text_2": Case(TEXT_XL, {"ids": IDS}, (*TEXT_TAPS, "text_projection")),
    "clip_text_eos": Case(TEXT_EOS, {"ids": IDS}, TEXT_TAPS),
    "clip_vision": Case(
        VISION,
        {"images": draw("images", (2, 3, 14, 14))},
        ("vision_model.embeddings", "vision_model.encoder.layers.1", "vision_model.post_layernorm"),
    ),
}
