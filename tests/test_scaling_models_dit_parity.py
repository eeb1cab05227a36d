"""The diffusion transformer against diffusers: outputs, taps, edits, derivatives, positions."""

import inspect
import json
import pathlib

import jax
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
    difference,
    pair,
    randomize,
)

from scaling.models import dit  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
# Sinusoids are float32 in both, and some frequencies differ by an ulp, which turns the phase by t times as much:
# float64 compares at small t, where that is far below the tolerance, float32 at all.
T = {"float32": np.array([999, 3, 41]), "float64": np.array([1, 3, 0])}
TOLERANCE = TOLERANCE | {"float64": 1e-6}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
    "out_channels": 8,
}
NARROW = {"num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 3, "num_embeds_ada_norm": 10}
VARIANTS = {
    "learned_variance": TINY,
    "affine": TINY | {"norm_elementwise_affine": True, "norm_eps": 1e-3, "out_channels": None},
    "no_bias_exact_gelu": TINY | {"attention_bias": False, "activation_fn": "gelu", "patch_size": 4, "in_channels": 2},
    "facebook/DiT-XL-2-256": PUBLISHED["facebook/DiT-XL-2-256"]["transformer"] | NARROW,
}


def build(variant, dtype="float64", side=None, t=None):
    fields = VARIANTS[variant]
    known = fields.keys() & inspect.signature(diffusers.DiTTransformer2DModel.__init__).parameters.keys()
    module = diffusers.DiTTransformer2DModel.from_config({key: fields[key] for key in known})
    config = dit.parse(dict(module.config))
    assert config == dit.parse(fields)
    t = T[dtype] if t is None else t
    side = side or config.sample_size
    x = np.random.RandomState(0).standard_normal((3, config.in_channels, side, side)).astype(dtype)
    labels = np.array([config.classes, 0, config.classes - 1])
    both = pair(
        randomize(module, dtype),
        dit.parameters(config),
        x,
        lambda module, x: module(x, torch.from_numpy(t), torch.from_numpy(labels)).sample,
        lambda params, tap, x: dit.apply(config, params, tap, x, jnp.asarray(t), None, jnp.asarray(labels)),
    )
    return config, both


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, dtype):
    check_output(build(variant, dtype)[1], TOLERANCE[dtype])


@pytest.mark.parametrize("side", [4, 6, 16])
def test_positions_stretch_to_other_sizes(side):
    check_output(build("learned_variance", side=side)[1], TOLERANCE["float64"])


def test_positions_equal_the_buffer():
    config, both = build("learned_variance")
    ours = dit.position_embedding(config.channels, 4, 4)
    np.testing.assert_allclose(ours, both.module.pos_embed.pos_embed[0].numpy(), rtol=0, atol=1e-7)
    # The checkpoint does not hold it.
    assert not any(key.endswith("pos_embed.pos_embed") for key in both.module.state_dict())


def test_one_time_serves_all_examples():
    config, both = build("learned_variance", t=np.array([2, 2, 2]))

    @jax.jit
    def ours(t):
        return dit.apply(config, both.params, Tap(), jnp.asarray(both.x), t, None, jnp.array([5, 0, 4]))

    with torch.no_grad():
        theirs = both.theirs(both.module, torch.from_numpy(both.x))
    for t in (2, 2.0, jnp.array([2.0])):
        assert difference(ours(t), theirs) <= TOLERANCE["float64"]


@pytest.mark.parametrize("variant", ["learned_variance", "affine"])
def test_taps_show_what_hooks_see(variant):
    check_taps(build(variant)[1], TOLERANCE["float64"], untapped=["ff.net.1", "to_out.1"])


def test_an_edit_does_what_a_hook_does():
    both = build("learned_variance")[1]
    for name in (
        "pos_embed",
        "transformer_blocks.0.norm1.emb",
        "transformer_blocks.1.norm1",
        "transformer_blocks.0.ff.net.0",
    ):
        check_edit(both, name, TOLERANCE["float64"])


def test_derivatives_equal():
    check_derivatives(build("learned_variance")[1], TOLERANCE["float64"])


def test_variance_is_split_off_as_the_pipeline_does():
    config, _ = build("learned_variance")
    out = np.arange(2 * 8 * 3 * 3.0).reshape(2, 8, 3, 3)
    split = dit.split_variance(config, jnp.asarray(out)), torch.split(torch.from_numpy(out), 4, dim=1)
    for ours, theirs in zip(*split, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert dit.split_variance(build("affine")[0], jnp.asarray(out[:, :4]))[1] is None
