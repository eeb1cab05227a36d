"""The text encoder: causality, where a text ends, names of keys, refusals. PyTorch's results are in the golden
files."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import check_derivative, check_half_precision, check_lowering, network

from scaling.models import clip_text
from scaling.models.model import encode_text, parse_config
from scaling.models.taps import Edit, Tap, names

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
TINY = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "projection_dim": 6,
    "eos_token_id": 2,
}
PROJECTED = TINY | {"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 40}
IDS = jnp.array([[48, 3, 40, 1, 1], [48, 40, 40, 40, 7]])


# Counted on the modules that transformers builds from the same fields.
@pytest.mark.parametrize(
    ("repository", "part", "count"),
    [
        ("CompVis/stable-diffusion-v1-4", "text_encoder", 123_060_480),
        ("stabilityai/stable-diffusion-2-1-base", "text_encoder", 340_387_840),
        ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder", 123_060_480),
        ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2", 694_659_840),
        ("openai/clip-vit-large-patch14", "text_encoder", 123_060_480),
    ],
)
def test_published_configurations_have_their_parameters(repository, part, count):
    apply = parse_config({"architectures": ["CLIPTextModel"]} | PUBLISHED[repository][part])
    assert sum(math.prod(spec.shape) for spec in apply.parameters().values()) == count


def test_no_state_sees_a_later_token():
    model = network(TINY)
    hidden, _ = encode_text(model, IDS)
    changed, _ = encode_text(model, IDS.at[:, 3:].set(jnp.array([[5, 6], [7, 8]])))
    np.testing.assert_array_equal(hidden[:, :3], changed[:, :3])
    assert np.all(np.any(hidden[:, 3:] != changed[:, 3:], axis=-1))


def test_padding_does_not_change_the_pooled_vector():
    model = network(PROJECTED)
    _, pooled = encode_text(model, IDS[:1])
    _, short = encode_text(model, IDS[:1, :3])
    np.testing.assert_allclose(pooled, short, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("eos", "positions"), [(2, [2, 1, 0]), (40, [2, 1, 0]), (3, [1, 0, 3]), (7, [0, 4, 0])])
def test_where_a_text_ends(eos, positions):
    # The legacy 2 means the first of the largest ids: here of 40s. No end counts as 0.
    ids = jnp.array([[8, 3, 40, 1, 1], [8, 40, 40, 40, 7], [49, 0, 0, 3, 3]])
    config = clip_text.parse(TINY | {"eos_token_id": eos})
    assert clip_text.pooled_position(config, ids).tolist() == positions


def test_pooled_is_the_state_there_and_its_projection():
    model = network(TINY)
    hidden, pooled = encode_text(model, IDS)
    np.testing.assert_array_equal(pooled, hidden[jnp.arange(2), clip_text.pooled_position(model.config, IDS)])
    model = network(PROJECTED)
    hidden, pooled = encode_text(model, IDS)
    expected = hidden[jnp.arange(2), jnp.array([2, 1])] @ model.params["text_projection.weight"]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-5)


def test_penultimate_is_the_tap_of_the_layer_before_the_last():
    model = network(TINY)
    out, taps = model.apply(model.params, IDS, capture=("text_model.encoder.layers.0",))
    np.testing.assert_array_equal(out.penultimate, taps["text_model.encoder.layers.0"])
    np.testing.assert_array_equal(encode_text(model, IDS, penultimate=True)[0], out.penultimate)
    one = network(TINY | {"num_hidden_layers": 1})
    out, taps = one.apply(one.params, IDS, capture=("text_model.embeddings",))
    np.testing.assert_array_equal(out.penultimate, taps["text_model.embeddings"])


def test_edits_reach_the_output_and_do_not_recompile():
    model = network(TINY)
    traces = []

    @jax.jit
    def pooled(strength):
        traces.append(None)
        edits = {"text_model.encoder.layers.0.mlp": Edit("add", jnp.arange(16.0), strength)}
        return model.apply(model.params, IDS, edits=edits)[0].pooled

    np.testing.assert_allclose(pooled(0.0), encode_text(model, IDS)[1], rtol=1e-6, atol=1e-6)
    # Not a shift of all channels alike, which the next normalization would take out.
    assert np.all(np.abs(pooled(2.0) - pooled(0.0)) > 1e-4)
    assert len(traces) == 1


def test_taps_have_the_shapes_of_tokens():
    shapes = {name: shape.shape for name, shape in names(network(PROJECTED)).items()}
    assert shapes["text_model.encoder.layers.1.mlp.activation_fn"] == (1, 9, 32)
    assert shapes["text_model.final_layer_norm"] == (1, 9, 16)
    assert shapes["text_projection"] == (1, 6)


def test_derivative_in_the_embeddings():
    model = network(PROJECTED, "float64")
    name = "text_model.embeddings.token_embedding.weight"
    check_derivative(
        lambda x: clip_text.apply(model.config, model.params | {name: x}, Tap(), IDS).pooled, model.params[name]
    )


def test_half_precision():
    check_half_precision(PROJECTED, lambda model: encode_text(model, IDS)[1])


def test_lowers_for_accelerators():
    check_lowering(network(PROJECTED))


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_outside_of_the_vocabulary(bad):
    model = network(TINY)
    ids = IDS.at[1, 3].set(bad)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 50\)"):
        clip_text.apply(model.config, model.params, Tap(), ids)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 50\)"):
        encode_text(model, ids)
    hidden = model.apply(model.params, ids)[0].hidden
    # All of that text: attention gives a later token weight 0, and 0 times NaN is NaN.
    assert np.isnan(hidden[1]).all()
    assert np.isfinite(hidden[0]).all()


def test_texts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="10 tokens, the model has positions for 9"):
        encode_text(network(TINY), jnp.zeros((1, 10), int))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
        ("text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight"),
        ("text_projection.weight", "text_projection.weight"),
        ("text_model.embeddings.position_ids", None),
        ("embeddings.position_ids", None),
    ],
)
def test_keys_of_both_kinds_of_checkpoint(key, name):
    assert clip_text.rename(key) == name


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu_new"},
        {"num_attention_heads": 3},
        {"eos_token_id": [2, 3]},
        {"eos_token_id": None},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 10**6},
        {"layer_norm_eps": 0},
        {"model_type": "t5"},
        {"use_attention_mask": True},
        {"pruned_heads": {"0": [1]}},
        {"architectures": ["CLIPTextModel", "CLIPTextModelWithProjection"]},
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        clip_text.parse(TINY | fields)
