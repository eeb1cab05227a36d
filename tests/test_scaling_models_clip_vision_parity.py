"""The image encoder against transformers: outputs, taps, edits, derivatives, and checkpoints of both kinds."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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

from scaling.models import clip_vision  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 14,
    "patch_size": 4,
    "projection_dim": 12,
}
VARIANTS = {
    "quick_gelu": ("CLIPVisionModelWithProjection", TINY),
    "gelu": ("CLIPVisionModelWithProjection", TINY | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 2}),
    "no_projection": ("CLIPVisionModel", TINY | {"patch_size": 7}),
}


def build(variant, dtype="float64"):
    name, fields = VARIANTS[variant]
    module = randomize(getattr(transformers, name)(transformers.CLIPVisionConfig(**fields)), dtype)
    config = clip_vision.parse(module.config.to_dict() | {"architectures": [name]})
    assert config == clip_vision.parse(fields | {"architectures": [name]})
    images = np.random.RandomState(0).standard_normal((2, fields.get("num_channels", 3), 14, 14)).astype(dtype)
    both = pair(
        module,
        clip_vision.parameters(config),
        images,
        lambda module, x: module(x).image_embeds if config.projection else module(x).pooler_output,
        lambda params, tap, x: clip_vision.apply(config, params, tap, x).pooled,
        prefix="" if config.projection else "vision_model.",
        rename=clip_vision.rename,
    )
    return config, both


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, dtype):
    config, both = build(variant, dtype)
    check_output(both, TOLERANCE[dtype])
    with torch.no_grad():
        theirs = both.module(torch.from_numpy(both.x)).last_hidden_state
    ours = clip_vision.apply(config, both.params, Tap(), jnp.asarray(both.x)).hidden
    assert difference(ours, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_show_what_hooks_see(variant):
    # PyTorch keeps the patches of the first convolution; its position table has no batch.
    check_taps(build(variant)[1], TOLERANCE["float64"], untapped=["position_embedding"])


def test_an_edit_does_what_a_hook_does():
    both = build("quick_gelu")[1]
    for name in ("vision_model.embeddings.patch_embedding", "vision_model.encoder.layers.1.layer_norm1"):
        check_edit(both, name, TOLERANCE["float64"])


def test_derivatives_equal():
    check_derivatives(build("quick_gelu")[1], TOLERANCE["float64"])


@pytest.mark.parametrize("variant", ["quick_gelu", "no_projection"])
def test_saved_checkpoints_have_our_names(variant, tmp_path):
    from safetensors.numpy import load_file

    config, both = build(variant)
    both.module.save_pretrained(tmp_path)
    names = {clip_vision.rename(key) for key in load_file(tmp_path / "model.safetensors")}
    assert names == set(clip_vision.parameters(config)) == {clip_vision.rename(name) for name in names}
    assert clip_vision.rename("vision_model.embeddings.position_ids") is None


def test_normalization_is_that_of_the_image_processor():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert list(clip_vision.IMAGE_MEAN) == list(OPENAI_CLIP_MEAN)
    assert list(clip_vision.IMAGE_STD) == list(OPENAI_CLIP_STD)
