"""The conditional UNet against diffusers: outputs, taps, edits and derivatives of every branch."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch_side import (  # noqa: E402
    TOLERANCE,
    check_derivatives,
    check_edit,
    check_output,
    check_taps,
    difference,
    pair,
    randomize,
)

from scaling.models import unet2d_condition  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
T = {"float32": np.array([981, 3]), "float64": np.array([0, 2])}
# Sinusoids are float32 in both, so that float64 compares their phases at small t.
TOLERANCE = TOLERANCE | {"float64": 1e-6}
UNTAPPED = ("dropout", "to_out.1", "net.1")

TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "sample_size": 8,
}
CROSS = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
VARIANTS = {
    "tiny": TINY,
    "linear_projection": TINY | {"use_linear_projection": True, "upcast_attention": True},
    "heads_per_block": TINY | CROSS | {"attention_head_dim": [1, 8]},
    "deep_transformers": TINY | CROSS | {"transformer_layers_per_block": [1, 2]},
    "uneven_transformers": TINY
    | CROSS
    | {
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [[2], [1, 2]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], 2],
    },
    "only_cross": TINY | CROSS | {"only_cross_attention": True},
    "only_cross_per_block": TINY | CROSS | {"only_cross_attention": [True, False], "num_class_embeds": 7},
    "no_cross": TINY
    | {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "mid_block_type": "UNetMidBlock2D",
    },
    "no_mid_block": TINY | {"mid_block_type": None},
    "scale_shift": TINY | {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.7},
    "padding_0_shift_1": TINY | {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-2},
    "centered": TINY | {"center_input_sample": True, "time_embedding_dim": 20, "in_channels": 9, "out_channels": 3},
    "kernels": TINY | {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "time_acts": TINY | {"time_embedding_act_fn": "silu", "timestep_post_act": "mish", "act_fn": "gelu"},
    "guidance_embedding": TINY | {"time_cond_proj_dim": 6},
    "timestep_classes": TINY | {"class_embed_type": "timestep", "act_fn": "relu"},
    "identity_classes": TINY | {"class_embed_type": "identity"},
    "projected_classes": TINY | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    "concatenated_classes": TINY
    | {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 5,
        "class_embeddings_concat": True,
    },
    "projected_context": TINY | {"encoder_hid_dim": 10},
    "text_time": TINY | TEXT_TIME,
    "text_time_guidance": TINY | TEXT_TIME | {"time_cond_proj_dim": 6, "act_fn": "mish"},
    **{
        name: PUBLISHED[name]["unet"]
        | {
            "block_out_channels": [width // 16 for width in PUBLISHED[name]["unet"]["block_out_channels"]],
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            **changes,
        }
        for name, changes in {
            "CompVis/stable-diffusion-v1-4": {"attention_head_dim": 4},
            "stabilityai/stable-diffusion-2-1-base": {},
            "stabilityai/stable-diffusion-2-1": {},
            "stabilityai/stable-diffusion-xl-base-1.0": {
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 34,
            },
        }.items()
    },
}


def conditions(config, dtype):
    """Arguments beside x and t, as numpy, for two examples."""
    (_, _), shapes = unet2d_condition.inputs(config, dtype)

    def values(shape):
        random = np.random.RandomState(len(shape.shape)).standard_normal((2, *shape.shape[1:]))
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return np.array([config.num_class_embeds - 1, 0])
        return (np.array([7.0, 2.0]) if len(shape.shape) == 1 else random).astype(dtype)

    given = jax.tree.map(values, shapes)
    if "context" in given:
        given["context"] = given["context"][:, :5]
    if config.time_condition:
        guidance = np.random.RandomState(9).standard_normal((2, config.time_condition)).astype(dtype)
        given["added"] = {**given.get("added", {}), "timestep_cond": guidance}
    return given


def build(variant, dtype="float64", size=None, *, at_zero=False):
    fields = VARIANTS[variant]
    kind = diffusers.UNet2DConditionModel
    module = kind.from_config({key: value for key, value in fields.items() if not key.startswith("_")})
    config = unet2d_condition.parse(dict(module.config))
    written = {"sample_size": 8}
    assert unet2d_condition.parse(fields | written) == unet2d_condition.parse(dict(module.config) | written)
    given, t = conditions(config, dtype), T[dtype]
    if at_zero:
        # Sinusoids are float32 in both, but exact there: nothing but the derivatives is left to differ.
        t = np.zeros_like(t)
        if config.added_time:
            given["added"]["time_ids"] = np.zeros_like(given["added"]["time_ids"])
    height, width = size or (2 ** len(config.plan.down), 2 ** (len(config.plan.down) + 1))
    x = np.random.RandomState(0).standard_normal((2, config.plan.width_in, height, width)).astype(dtype)

    def theirs(module, x):
        # diffusers turns the sinusoids of the sizes into the dtype of the embedding only after it has joined them.
        tensors = jax.tree.map(torch.from_numpy, given)
        added = tensors.get("added", {})
        return module(
            x,
            torch.from_numpy(t),
            tensors.get("context"),
            class_labels=tensors.get("class_labels"),
            timestep_cond=added.get("timestep_cond"),
            added_cond_kwargs=added,
        ).sample

    def ours(params, tap, x):
        return unet2d_condition.apply(config, params, tap, x, jnp.asarray(t), **jax.tree.map(jnp.asarray, given))

    return pair(randomize(module, dtype), unet2d_condition.parameters(config), x, theirs, ours)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, dtype):
    check_output(build(variant, dtype), TOLERANCE[dtype])


# Without padding a single row has no half.
@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("padding_0_shift_1", (7, 12)),
        ("padding_0_shift_1", (5, 9)),
        ("stabilityai/stable-diffusion-xl-base-1.0", (7, 12)),
        ("stabilityai/stable-diffusion-xl-base-1.0", (1, 3)),
    ],
)
def test_upsampling_follows_the_skips_for_any_size(variant, size):
    check_output(build(variant, size=size), TOLERANCE["float64"])


@pytest.mark.parametrize(
    "variant", ["tiny", "timestep_classes", "text_time", "time_acts", "projected_context", "linear_projection"]
)
def test_taps_show_what_hooks_see(variant):
    check_taps(build(variant), TOLERANCE["float64"], untapped=UNTAPPED)


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding",
        "down_blocks.0",
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.0.norm",
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0",
        "mid_block.attentions.0.proj_out",
        "mid_block",
        "up_blocks.0.upsamplers.0",
        "up_blocks.1",
    ],
)
def test_an_edit_does_what_a_hook_does(name):
    check_edit(build("tiny"), name, TOLERANCE["float64"])


def test_an_edit_of_the_last_nonlinearity_does_what_a_hook_on_the_last_call_does():
    both, name = build("tiny"), "up_blocks.0.resnets.1.nonlinearity"
    check_edit_of_last_call(both, name)


def check_edit_of_last_call(both, name):
    from scaling.models.taps import Edit

    x, calls = torch.from_numpy(both.x), []

    def count(_module, _args, output):
        calls.append(output)

    def change(_module, _args, output):
        calls.append(output)
        return 0.3 * output if len(calls) == last else None

    with torch.no_grad():
        handle = both.module.get_submodule(name).register_forward_hook(count)
        both.theirs(both.module, x)
        handle.remove()
        last, channels = len(calls), calls[-1].shape[1]
        assert last == 3
        calls.clear()
        handle = both.module.get_submodule(name).register_forward_hook(change)
        theirs = both.theirs(both.module, x)
        handle.remove()
    edit = Edit("scale", jnp.full(channels, 0.3), 1.0)
    assert difference(both.ours(both.params, Tap(edits={name: edit}), jnp.asarray(both.x)), theirs) <= 1e-6


@pytest.mark.parametrize("variant", ["tiny", "only_cross_per_block", "text_time", "linear_projection"])
def test_derivatives_equal(variant):
    check_derivatives(build(variant, at_zero=True), 1e-9)


def test_derivative_in_the_context_equals():
    variant = "tiny"
    both, config = build(variant), unet2d_condition.parse(VARIANTS[variant])
    context, t = conditions(config, "float64")["context"], T["float64"]
    leaf = torch.from_numpy(context).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        out = both.module(torch.from_numpy(both.x), torch.from_numpy(t), leaf).sample
    weight = np.random.RandomState(3).standard_normal(out.shape)
    (theirs,) = torch.autograd.grad(torch.sum(out * torch.from_numpy(weight)), leaf)

    def loss(context):
        out = unet2d_condition.apply(config, both.params, Tap(), jnp.asarray(both.x), jnp.asarray(t), context)
        return jnp.sum(out * weight)

    assert difference(jax.jit(jax.grad(loss))(jnp.asarray(context)), theirs) <= TOLERANCE["float64"]
