"""Prompts and classes as conditions: token ids by hand, both encoders of XL, null halves, refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from pipelines import CLASSES, LATENT, PIXEL, SAVERS, SDXL, TOKENS, vocabulary

from scaling import load_pipeline
from scaling.bridge.conditioning import condition_on, null_condition, pixel_size
from scaling.bridge.loading import Pipeline
from scaling.diffusion.schedules import from_config
from scaling.models import model as api

VOCAB, _ = vocabulary()
START, END = VOCAB["<|startoftext|>"], VOCAB["<|endoftext|>"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {name: load_pipeline(save(folder / name)) for name, save in SAVERS.items()}


def ids(*words):
    """One line of token ids, padded with the end of the text."""
    body = [START, *(VOCAB[word] for word in words), END]
    return jnp.asarray([body + [END] * (TOKENS - len(body))], jnp.int32)


def alone(config):
    return Pipeline(network(config), from_config({"_class_name": "DDPMScheduler"}), None, (), (), {})


def test_a_prompt_becomes_the_last_hidden_state_of_its_tokens(pipelines):
    pipeline = pipelines["latent"]
    encoder = pipeline.text_encoders[0]
    context, labels, added = condition_on(pipeline, "the cat")
    expected = api.encode_text(encoder, ids("the</w>", "cat</w>"))[0]
    np.testing.assert_array_equal(context, expected)
    assert labels is None
    assert added is None
    for empty in (None, ""):
        np.testing.assert_array_equal(condition_on(pipeline, empty).context, api.encode_text(encoder, ids())[0])
    assert np.max(np.abs(context - condition_on(pipeline, "the dog").context)) > 1e-2


def test_a_long_prompt_is_cut_where_the_encoder_ends(pipelines):
    long = condition_on(pipelines["latent"], "cat " * 100).context
    expected = jnp.asarray([[START, *[VOCAB["cat</w>"]] * (TOKENS - 2), END]], jnp.int32)
    np.testing.assert_array_equal(long, api.encode_text(pipelines["latent"].text_encoders[0], expected)[0])


def test_xl_reads_both_encoders_the_pooled_text_and_the_sizes(pipelines):
    pipeline = pipelines["xl"]
    first, second = pipeline.text_encoders
    context, _, added = condition_on(pipeline, "the cat", size=(24, 32))
    line = ids("the</w>", "cat</w>")
    np.testing.assert_array_equal(context[..., :24], first.apply(first.params, line)[0].penultimate)
    np.testing.assert_array_equal(context[..., 24:], second.apply(second.params, line)[0].penultimate)
    np.testing.assert_array_equal(added["text_embeds"], second.apply(second.params, line)[0].pooled)
    np.testing.assert_array_equal(added["time_ids"], [[24, 32, 0, 0, 24, 32]])
    assert condition_on(pipeline, "the cat").added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_the_other_half_of_guidance(pipelines):
    plain, xl, dit = pipelines["latent"], pipelines["xl"], pipelines["dit"]
    np.testing.assert_array_equal(null_condition(plain).context, condition_on(plain, "").context)
    np.testing.assert_array_equal(null_condition(plain, "the dog").context, condition_on(plain, "the dog").context)
    zeros = null_condition(xl)
    assert not np.any(zeros.context)
    assert not np.any(zeros.added["text_embeds"])
    np.testing.assert_array_equal(zeros.added["time_ids"], condition_on(xl, "").added["time_ids"])
    # An empty prompt to avoid is a prompt; and pipelines that do not say so have no zeros.
    np.testing.assert_array_equal(null_condition(xl, "").context, condition_on(xl, "").context)
    without = xl._replace(settings={})
    np.testing.assert_array_equal(null_condition(without).context, condition_on(xl, "").context)
    assert null_condition(dit).class_labels.tolist() == [10]
    assert condition_on(dit).class_labels.tolist() == [10]
    assert condition_on(dit, class_label=0).class_labels.tolist() == [0]


def test_classes_of_unets(pipelines):
    assert condition_on(alone(CLASSES), class_label=2).class_labels.tolist() == [2]
    with pytest.raises(ValueError, match="needs a class label, from 0 to 2"):
        condition_on(alone(CLASSES))
    with pytest.raises(ValueError, match="class label must be at most 2, got 3"):
        condition_on(alone(CLASSES), class_label=3)
    with pytest.raises(ValueError, match="class label must be at least 0"):
        condition_on(pipelines["dit"], class_label=-1)
    with pytest.raises(ValueError, match="class label must be at most 10, got 11"):
        condition_on(pipelines["dit"], class_label=11)
    timesteps = PIXEL | {"class_embed_type": "timestep"}
    assert condition_on(alone(timesteps), class_label=500).class_labels.dtype == jnp.float32
    with pytest.raises(ValueError, match="vectors, not numbers"):
        condition_on(alone(PIXEL | {"class_embed_type": "identity"}), class_label=1)
    with pytest.raises(ValueError, match="no null class"):
        null_condition(alone(CLASSES))


def test_what_a_network_does_not_take_is_refused(pipelines):
    with pytest.raises(ValueError, match="reads no text"):
        condition_on(pipelines["pixel"], "a cat")
    with pytest.raises(ValueError, match="has no classes"):
        condition_on(pipelines["latent"], class_label=1)
    with pytest.raises(ValueError, match="unconditional, so it cannot be guided"):
        null_condition(pipelines["pixel"])
    with pytest.raises(ValueError, match="there is no text encoder"):
        condition_on(alone(LATENT), "a cat")
    refiner = alone(SDXL | {"projection_class_embeddings_input_dim": 5 * 16 + 12})
    assert json.loads(refiner.network.source)["addition_time_embed_dim"] == 16
    text = pipelines["xl"]._replace(network=refiner.network)
    with pytest.raises(ValueError, match="more numbers than SDXL.s six sizes"):
        condition_on(text, "a cat")


def test_the_refiner_of_xl_is_refused(pipelines):
    refiner = alone(
        LATENT
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "cross_attention_dim": 20,
            "projection_class_embeddings_input_dim": 20 + 5 * 4,
        }
    )
    added = refiner.network.apply.inputs("float32")[1]["added"]
    assert (added["text_embeds"].shape, added["time_ids"].shape) == ((1, 20), (1, 5))
    for settings in ({}, {"requires_aesthetics_score": True}):
        with pytest.raises(ValueError, match="aesthetic score of SDXL's refiner"):
            condition_on(pipelines["xl"]._replace(network=refiner.network, settings=settings), "a cat")
    with pytest.raises(ValueError, match="aesthetic score"):
        condition_on(pipelines["xl"]._replace(settings={"requires_aesthetics_score": True}), "a cat")
    wide = alone(SDXL | {"projection_class_embeddings_input_dim": 13 + 6 * SDXL["addition_time_embed_dim"]})
    with pytest.raises(ValueError, match="pooled text has 12 channels, and the network takes 13"):
        condition_on(pipelines["xl"]._replace(network=wide.network), "a cat")


def test_tokens_beyond_the_vocabulary_are_refused(pipelines):
    pipeline = pipelines["latent"]
    encoder = pipeline.text_encoders[0]
    for token in (len(VOCAB), -1):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, {len(VOCAB)}\), the vocabulary"):
            api.encode_text(encoder, ids().at[0, 1].set(token))

    def tokenizer(*_, **__):
        return {"input_ids": [START, len(VOCAB), END]}

    tokenizer.model_max_length = TOKENS
    with pytest.raises(ValueError, match="tokenize with this model's own"):
        condition_on(pipeline._replace(tokenizers=(tokenizer,)), "a cat")


def test_a_prompt_is_unicode_text(pipelines):
    with pytest.raises(ValueError, match=r"prompt 'a \\ud800 cat' is not Unicode text"):
        condition_on(pipelines["latent"], "a \ud800 cat")


def test_sizes_in_pixels(pipelines):
    assert pixel_size(pipelines["pixel"]) == (8, 8)
    assert pixel_size(pipelines["latent"]) == (16, 16)
    assert pixel_size(pipelines["dit"]) == (16, 16)
