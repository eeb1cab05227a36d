"""What tests of the command line share: small folders as diffusers lays them out, one per architecture."""

import json
import sys
from pathlib import Path

import numpy as np
from networks import network
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import CASES as CASES
from cases import CIFAR, DIT, SD14, SDXL, TEXT_14, TEXT_XL, VAE

import scaling

TOKENS = 16
"""Positions of the text encoders."""

DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
# One block each way, to compile quickly; what the blocks do is tested elsewhere.
ONE_BLOCK = {"layers_per_block": 1, "block_out_channels": [8], "norm_num_groups": 4, "sample_size": 8}
ONE_BLOCK |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
PIXEL = CIFAR | ONE_BLOCK | {"add_attention": False}
CLASSES = PIXEL | {"num_class_embeds": 3}
LATENT = SD14 | ONE_BLOCK | {"attention_head_dim": 2, "cross_attention_dim": 48}
SMALL_VAE = VAE | {
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "mid_block_add_attention": False,
    "sample_size": 16,
}
SMALL_VQ = {
    "_class_name": "VQModel",
    "block_out_channels": [4, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 16,
    "sample_size": 16,
}
SMALL_DIT = DIT | {"num_layers": 2}


def vocabulary():
    """The 256 bytes, alone and at the end of a word, a few merges, and the two ends of a text: 520 tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def text(config, width):
    """A text encoder's configuration for :func:`vocabulary`, with ``width`` channels."""
    vocab, _ = vocabulary()
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": 1}
    heads = {"num_attention_heads": 4, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return config | heads | ends | {"vocab_size": len(vocab), "max_position_embeddings": TOKENS}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_tokenizer(folder):
    """A CLIP tokenizer of :func:`vocabulary`."""
    vocab, merges = vocabulary()
    write(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = ends | {"pad_token": "<|endoftext|>"}
    write(folder / "special_tokens_map.json", special)
    write(folder / "tokenizer_config.json", special | {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"})


def class_of(config):
    """The entry of a network in a model_index.json."""
    return (
        ["diffusers", config["_class_name"]] if "_class_name" in config else ["transformers", *config["architectures"]]
    )


def save(folder, parts, scheduler, *, tokenizers=(), **settings):
    """A pipeline's folder of configurations by part; their weights depend on their names alone."""
    folder = Path(folder)
    index = {part: class_of(config) for part, config in parts.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "safety_checker": [None, None]}
    write(folder / "model_index.json", {"_class_name": "Pipeline", "_diffusers_version": "0.35.0"} | index | settings)
    write(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part, config in parts.items():
        scaling.save_pretrained(network(config), folder / part)
    for name in tokenizers:
        save_tokenizer(folder / name)
    return folder


def save_pixel(folder):
    """An unconditional UNet of pixels."""
    return save(folder, {"unet": PIXEL}, DDPM)


def save_latent(folder):
    """A small Stable Diffusion."""
    parts = {"unet": LATENT, "vae": SMALL_VAE, "text_encoder": text(TEXT_14, 48)}
    return save(folder, parts, DDIM, tokenizers=["tokenizer"])


def save_xl(folder):
    """A small SDXL: two text encoders, and numbers for the sizes."""
    first, second = text(TEXT_14, 24), text(TEXT_XL, 24)
    unet = LATENT | {name: SDXL[name] for name in ("addition_embed_type", "addition_time_embed_dim")}
    unet |= {"projection_class_embeddings_input_dim": 12 + 6 * SDXL["addition_time_embed_dim"]}
    parts = {"unet": unet, "vae": SMALL_VAE, "text_encoder": first, "text_encoder_2": second}
    names = ["tokenizer", "tokenizer_2"]
    return save(folder, parts, DDIM, tokenizers=names, force_zeros_for_empty_prompt=True)


def save_dit(folder):
    """A small DiT of latents, with ten classes and the null class, that predicts a variance too."""
    return save(folder, {"transformer": SMALL_DIT, "vae": SMALL_VAE}, DDIM)


SAVERS = {"pixel": save_pixel, "latent": save_latent, "xl": save_xl, "dit": save_dit}


def save_pictures(folder, count, *, side=20, seed=0):
    """Colored PNG pictures, larger than the models' own size."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.RandomState(seed).randint(0, 256, (count, side, side, 3)).astype(np.uint8)
    for i, picture in enumerate(values):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder
