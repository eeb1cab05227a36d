"""The unconditional UNet against diffusers: outputs, taps, edits and derivatives of every branch."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch_side import (  # noqa: E402
    TOLERANCE,
    check_derivatives,
    check_edit,
    check_output,
    check_taps,
    pair,
    randomize,
)

from scaling.models import unet2d  # noqa: E402

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
# Sinusoids are float32 in both and may differ by an ulp of the phase: float64 compares at small t, float32 at all.
T = {"float32": np.array([999, 3]), "float64": np.array([0, 2])}
TOLERANCE = TOLERANCE | {"float64": 1e-6}
UNTAPPED = ("dropout", "to_out.1", "group_norm", "sample.conv")

TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}
ALL_RESNET = {
    "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    "block_out_channels": [8, 16, 16],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
VARIANTS = {
    "tiny": TINY,
    "scale_shift": TINY | {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_attention_norm": TINY | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "attention_norm": TINY | {"attn_norm_num_groups": 8},
    "resnet_samplers": TINY | ALL_RESNET,
    "resnet_samplers_scale_shift": TINY | ALL_RESNET | {"resnet_time_scale_shift": "scale_shift"},
    "attention_then_sampler": TINY
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2, "downsample_padding": 0},
    "one_head": TINY | {"attention_head_dim": None},
    "one_channel_heads": TINY | {"attention_head_dim": 1},
    "no_mid_block": TINY | {"mid_block_type": None},
    "no_mid_attention": TINY | {"add_attention": False},
    "mid_scale": TINY | {"mid_block_scale_factor": 1.7, "norm_eps": 1e-2},
    "padding_0_shift_1": TINY | {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False},
    "centered_wide_time": TINY | {"center_input_sample": True, "time_embedding_dim": 20, "layers_per_block": 2},
    "classes": TINY | {"num_class_embeds": 5},
    "timestep_classes": TINY | {"class_embed_type": "timestep"},
    "identity_classes": TINY | {"class_embed_type": "identity"},
    "more_out_channels": TINY | {"in_channels": 1, "out_channels": 6},
    **{f"act_{act}": TINY | {"act_fn": act} for act in ("swish", "mish", "gelu", "relu")},
    **{
        name: PUBLISHED[name]["unet"]
        | {
            "block_out_channels": [width // 16 for width in PUBLISHED[name]["unet"]["block_out_channels"]],
            "norm_num_groups": 4,
        }
        for name in ("google/ddpm-cifar10-32", "google/ddpm-celebahq-256")
    },
}


def build(variant, dtype="float64", t=None):
    fields = VARIANTS[variant]
    module = diffusers.UNet2DModel.from_config({key: value for key, value in fields.items() if key != "_class_name"})
    config = unet2d.parse(dict(module.config))
    # The defaults that diffusers fills in mean what the absent fields do.
    written = {"sample_size": config.sample_size}
    assert unet2d.parse(fields | written) == unet2d.parse(dict(module.config) | written)
    labels = {
        "table": np.array([4, 0]),
        "timestep": np.array([7, 2]),
        "identity": np.random.RandomState(5).standard_normal((2, config.plan.time)).astype(dtype),
        None: None,
    }[config.labels]
    side = 2 ** (len(config.plan.down) + 1)
    x = np.random.RandomState(0).standard_normal((2, config.plan.width_in, side, 2 * side)).astype(dtype)
    t = T[dtype] if t is None else t
    return pair(
        randomize(module, dtype),
        unet2d.parameters(config),
        x,
        lambda module, x: module(x, torch.from_numpy(t), None if labels is None else torch.from_numpy(labels)).sample,
        lambda params, tap, x: unet2d.apply(
            config, params, tap, x, jnp.asarray(t), class_labels=None if labels is None else jnp.asarray(labels)
        ),
    )


# There diffusers itself keeps the sinusoids in float32.
ONLY_FLOAT32 = ("timestep_classes",)


@pytest.mark.parametrize(
    ("variant", "dtype"), [(v, d) for v in VARIANTS for d in T if d == "float32" or v not in ONLY_FLOAT32]
)
def test_outputs_equal(variant, dtype):
    check_output(build(variant, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("tiny", "float64"),
        ("resnet_samplers_scale_shift", "float64"),
        ("timestep_classes", "float32"),
        ("google/ddpm-cifar10-32", "float64"),
    ],
)
def test_taps_show_what_hooks_see(variant, dtype):
    check_taps(build(variant, dtype), TOLERANCE[dtype], untapped=UNTAPPED)


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding",
        "conv_in",
        "down_blocks.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.attentions.0",
        "down_blocks.1.attentions.0.to_v",
        "mid_block.resnets.0.norm2",
        "mid_block",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.1.conv_shortcut",
        "conv_act",
    ],
)
def test_an_edit_does_what_a_hook_does(name):
    check_edit(build("tiny"), name, TOLERANCE["float64"])


@pytest.mark.parametrize("variant", ["tiny", "resnet_samplers_scale_shift", "classes"])
def test_derivatives_equal(variant):
    # At t = 0 the sinusoids, float32 in both, are exact: nothing but the derivatives is left to differ.
    check_derivatives(build(variant, t=np.array([0, 0])), 1e-9)
