"""What was trained here opens in PyTorch's libraries with equal outputs; and PyTorch takes the same training steps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from torch_side import TOLERANCE, difference  # noqa: E402

import scaling  # noqa: E402
from scaling.diffusion.noise import noise_at  # noqa: E402
from scaling.training import steps as training  # noqa: E402
from scaling.training.run import TrainSpec, train  # noqa: E402

SPEC = TrainSpec(
    channels=(8,),
    heads=2,
    text_channels=8,
    text_layers=1,
    patch_size=4,
    duplicates="4x4",
    variants="2x2",
    singles=20,
    batch_size=4,
    steps=2,
)
CLASSES = {"unet2d": "DDIMPipeline", "unet2d_condition": "StableDiffusionPipeline", "dit": "DiTPipeline"}
STEPS = 4


@pytest.fixture(scope="module", params=CLASSES)
def trained(request, tmp_path_factory):
    """A small model of each architecture after two steps, opened in both."""
    folder = train(dataclasses.replace(SPEC, arch=request.param), tmp_path_factory.mktemp(request.param))
    pixels = {} if request.param == "unet2d" else {"vae": None}
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, **pixels)
    return request.param, folder, scaling.load_pipeline(folder), theirs


def test_networks_give_equal_outputs(trained):
    arch, _, ours, theirs = trained
    assert type(theirs).__name__ == CLASSES[arch]
    random = np.random.default_rng(0)
    x, t = random.standard_normal((2, 1, 8, 8)).astype(np.float32), np.array([40, 900])
    states = random.standard_normal((2, 8, 8)).astype(np.float32)
    labels = np.array([3, 10])
    mine = {"unet2d_condition": {"context": jnp.asarray(states)}, "dit": {"class_labels": jnp.asarray(labels)}}
    other = {
        "unet2d_condition": {"encoder_hidden_states": torch.from_numpy(states)},
        "dit": {"class_labels": torch.from_numpy(labels)},
    }
    module = theirs.transformer if arch == "dit" else theirs.unet
    with torch.no_grad():
        expected = module(torch.from_numpy(x), timestep=torch.from_numpy(t), **other.get(arch, {})).sample
    out, _ = ours.network.apply(ours.network.params, jnp.asarray(x), jnp.asarray(t), **mine.get(arch, {}))
    assert difference(out, expected) < TOLERANCE["float32"]


def test_samples_are_equal(trained, key):
    arch, folder, ours, theirs = trained
    if arch == "dit":
        pytest.skip("diffusers' pipeline decodes what it samples, and there is no autoencoder")
    noise = torch.from_numpy(np.array(noise_at(key, 0, 0, (1, 1, 8, 8), jnp.float32)))
    init = jnp.asarray(noise.numpy())
    condition = None
    theirs.set_progress_bar_config(disable=True)
    if arch == "unet2d":
        theirs.scheduler.set_timesteps(STEPS)
        expected = noise
        with torch.no_grad():
            for t in theirs.scheduler.timesteps:
                expected = theirs.scheduler.step(theirs.unet(expected, t).sample, t, expected).prev_sample
    else:
        prompt = json.loads((folder / "prompts.json").read_text())[0]["prompt"]
        condition = scaling.condition_on(ours, prompt)
        expected = theirs(
            prompt, guidance_scale=1.0, num_inference_steps=STEPS, latents=noise, output_type="latent"
        ).images
        ids = theirs.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        assert ids.tolist() == [ours.tokenizers[0](prompt, padding="max_length", max_length=8)["input_ids"]]
    out = scaling.sample(key, ours.network, ours.schedule, 1, STEPS, condition=condition, init=init).x
    # Four passes through the network.
    assert difference(out, expected) < 5 * TOLERANCE["float32"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_steps_are_those_of_pytorch(trained, key, prediction):
    """Three steps of AdamW with clipping on the same batches: losses, and the networks afterwards."""
    arch, _, ours, theirs = trained
    if arch != "unet2d":
        pytest.skip("one architecture says it all")
    schedule = scaling.diffusion.schedules.from_config(ours.schedule.config | {"prediction_type": prediction})
    recipe = TrainSpec(batch_size=4, optimizer="adamw", weight_decay=0.1, clip=0.05, ema=0.0).recipe()
    networks = training.Networks(ours.network.apply, None, schedule)
    images = jax.random.uniform(key, (6, 1, 8, 8), jnp.float32, -1, 1)
    examples = training.Examples(images, jnp.arange(6, dtype=jnp.int32))
    step = jax.jit(training.train_step, static_argnames=("networks", "recipe"))
    state = training.start({"network": ours.network}, recipe)

    module = diffusers.UNet2DModel.from_config(theirs.unet.config)
    module.load_state_dict(theirs.unet.state_dict())
    noising = diffusers.DDPMScheduler.from_config(theirs.scheduler.config, prediction_type=prediction)
    rule = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.1)
    for i in range(3):
        batch = training.draw(jax.random.fold_in(key, i), examples, schedule, recipe)
        state, loss = step(state, key, examples, networks=networks, recipe=recipe)
        x, noise, t = (torch.from_numpy(np.array(part)) for part in (batch.images, batch.noise, batch.t))
        target = noise if prediction == "epsilon" else noising.get_velocity(x, noise, t)
        expected = torch.nn.functional.mse_loss(module(noising.add_noise(x, noise, t), t).sample, target)
        rule.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        assert norm > 0.05
        rule.step()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    # Not weight by weight: a bias before a norm of single channels has a gradient of rounding alone, and Adam takes
    # its sign.
    x, t = examples.images, jnp.full(6, 300)
    before, after = (ours.network.apply(params, x, t)[0] for params in (ours.network.params, state.params["network"]))
    with torch.no_grad():
        expected = module(torch.from_numpy(np.array(x)), 300).sample
    assert difference(after, expected) < 1e-4
    assert difference(before, expected) > 1e-2
