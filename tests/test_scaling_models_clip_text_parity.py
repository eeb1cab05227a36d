"""The text encoder against transformers: outputs, taps, edits, derivatives, and checkpoints of both kinds."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_side import TOLERANCE, check_derivatives, check_edit, check_taps, difference, pair, randomize  # noqa: E402

from scaling.models import clip_text  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
TINY = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "projection_dim": 12,
    "eos_token_id": 2,
}
# Second line: the end again and again, as when padded with it. Third: no end.
IDS = np.array([[97, 5, 60, 98, 1, 1, 1], [97, 98, 98, 98, 98, 98, 98], [3, 4, 5, 6, 7, 8, 9]])

VARIANTS = {
    "quick_gelu": ("CLIPTextModel", TINY),
    "gelu": ("CLIPTextModel", TINY | {"hidden_act": "gelu"}),
    "projection": ("CLIPTextModelWithProjection", TINY),
    "projection_eos": ("CLIPTextModelWithProjection", TINY | {"hidden_act": "gelu", "eos_token_id": 98}),
    "one_layer": ("CLIPTextModel", TINY | {"num_hidden_layers": 1, "layer_norm_eps": 1e-3, "eos_token_id": 60}),
}
for repository, parts in PUBLISHED.items():
    for part, fields in parts.items():
        if part.startswith("text_encoder"):
            narrow = fields | {
                "num_hidden_layers": 3,
                "hidden_size": 4 * fields["num_attention_heads"],
                "intermediate_size": 64,
                "vocab_size": 99,
                "projection_dim": 12,
            }
            VARIANTS[f"{repository} {part}"] = (fields.get("architectures", ["CLIPTextModel"])[0], narrow)


def build(variant, dtype="float64"):
    name, fields = VARIANTS[variant]
    module = randomize(getattr(transformers, name)(transformers.CLIPTextConfig(**fields)), dtype)
    config = clip_text.parse(module.config.to_dict() | {"architectures": [name]})
    assert config == clip_text.parse(fields | {"architectures": [name]})
    return config, pair(
        module,
        clip_text.parameters(config),
        IDS,
        lambda module, ids: module(ids).last_hidden_state,
        lambda params, tap, ids: clip_text.apply(config, params, tap, ids).hidden,
        prefix="" if config.projection else "text_model.",
        rename=clip_text.rename,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, dtype):
    config, both = build(variant, dtype)
    with torch.no_grad():
        theirs = both.module(torch.from_numpy(IDS), output_hidden_states=True)
    ours = jax.jit(lambda params: clip_text.apply(config, params, Tap(), jnp.asarray(IDS)))(both.params)
    pooled = theirs.text_embeds if config.projection else theirs.pooler_output
    for our, their in zip(ours, (theirs.last_hidden_state, theirs.hidden_states[-2], pooled), strict=True):
        assert our.dtype == dtype
        assert difference(our, their) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", ["quick_gelu", "projection_eos"])
def test_taps_show_what_hooks_see(variant):
    _, both = build(variant)
    check_taps(both, TOLERANCE["float64"], untapped=["position_embedding"])


def test_an_edit_does_what_a_hook_does():
    _, both = build("quick_gelu")
    check_edit(both, "encoder.layers.1.mlp.activation_fn", TOLERANCE["float64"])


@pytest.mark.parametrize("variant", ["quick_gelu", "gelu"])
def test_derivatives_equal(variant):
    check_derivatives(build(variant)[1], TOLERANCE["float64"])


@pytest.mark.parametrize("variant", ["quick_gelu", "projection"])
def test_both_kinds_of_checkpoint_have_our_names(variant, tmp_path):
    # What the library saves of a model it made, and what it saves of one that it loaded from a published checkpoint.
    from safetensors.numpy import load_file, save_file

    config, both = build(variant, "float32")
    both.module.save_pretrained(tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    published = {clip_text.rename(key): value for key, value in made.items()}
    assert set(published) == set(clip_text.parameters(config))
    assert {clip_text.rename(key) for key in published} == set(published)
    assert clip_text.rename("text_model.embeddings.position_ids") is None

    (tmp_path / "published").mkdir()
    save_file(published, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "published" / "config.json").write_text((tmp_path / "made" / "config.json").read_text())
    module = type(both.module).from_pretrained(tmp_path / "published")
    with torch.no_grad():
        again, before = (m(torch.from_numpy(IDS)).last_hidden_state for m in (module, both.module))
    assert torch.equal(again, before)
    module.save_pretrained(tmp_path / "again")
    assert {clip_text.rename(key) for key in load_file(tmp_path / "again" / "model.safetensors")} == set(published)
