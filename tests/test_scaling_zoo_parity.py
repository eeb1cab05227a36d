"""The models of the zoo in PyTorch: equal outputs, prompts included."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from torch_side import TOLERANCE, difference  # noqa: E402

import scaling  # noqa: E402
from scaling import zoo  # noqa: E402

CLASSES = {"unet2d": "DDIMPipeline", "unet2d_condition": "StableDiffusionPipeline", "dit": "DiTPipeline"}


@pytest.mark.parametrize("name", zoo.names())
def test_both_libraries_open_it_with_equal_outputs(name):
    ours = zoo.load(name)
    arch = ours.network.apply.architecture
    missing = {"vae": None} if arch != "unet2d" else {}
    theirs = getattr(diffusers, CLASSES[arch]).from_pretrained(
        zoo.folder(name), torch_dtype=torch.float32, low_cpu_mem_usage=False, **missing
    )
    network = theirs.transformer if arch == "dit" else theirs.unet
    (example, *_), _ = ours.network.apply.inputs(jnp.float32)
    x = np.random.default_rng(0).standard_normal((2, *example.shape[1:]), np.float32)
    given, told = {}, {}
    if arch == "dit":
        given["class_labels"], told["class_labels"] = jnp.asarray([3, 10]), torch.tensor([3, 10])
    if arch == "unet2d_condition":
        prompts = [prompt["prompt"] for prompt in zoo.prompts(name)[:2]]
        states = [scaling.condition_on(ours, prompt).context for prompt in prompts]
        given["context"] = jnp.concatenate(states)
        tokens = theirs.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            told["encoder_hidden_states"] = theirs.text_encoder(tokens).last_hidden_state
        assert difference(given["context"], told["encoder_hidden_states"].numpy()) < TOLERANCE["float32"]
    out, _ = ours.network.apply(ours.network.params, jnp.asarray(x), jnp.asarray([5, 700]), **given)
    with torch.no_grad():
        expected = network(torch.from_numpy(x), torch.tensor([5, 700]), **told).sample.numpy()
    assert difference(np.asarray(out), expected) < TOLERANCE["float32"]
