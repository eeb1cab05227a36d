"""The command line on folders that PyTorch diffusers saved: codes are what hooks see, samples what pipelines return."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import diffusers.pipelines.ddpm.pipeline_ddpm as of_pipeline  # noqa: E402
import diffusers.pipelines.dit.pipeline_dit as of_dit  # noqa: E402
import diffusers.schedulers.scheduling_ddpm as of_scheduler  # noqa: E402
import diffusers.schedulers.scheduling_lcm as of_lcm  # noqa: E402
import scaling_commands  # noqa: E402
from pipelines import (  # noqa: E402
    DDIM,
    DDPM,
    LATENT,
    ONE_BLOCK,
    PIXEL,
    SDXL,
    SMALL_DIT,
    SMALL_VAE,
    TEXT_14,
    TEXT_XL,
    save_pictures,
    save_tokenizer,
    text,
)
from torch_side import TOLERANCE, difference, randomize  # noqa: E402

from scaling import load_pipeline  # noqa: E402
from scaling.diffusion.noise import noise_at  # noqa: E402
from scaling.measures.codes import pictures as in_range  # noqa: E402
from scaling.measures.codes import read_images  # noqa: E402
from sims import store  # noqa: E402

ATTENTION = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "attention_head_dim": 4}
CROSS = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
TAPS = {
    "pixel": ["mid_block", "up_blocks.0.resnets.1.nonlinearity", "conv_out"],
    "latent": ["up_blocks.0.resnets.1.nonlinearity", "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"],
    "xl": ["add_embedding", "mid_block.attentions.0"],
    "dit": ["transformer_blocks.1.ff.net.0", "transformer_blocks.1"],
}
PROMPT, LABEL, T, STEPS = "the cat", 3, 40, 4


def module(cls, config, **changes):
    fields = {name: value for name, value in (config | changes).items() if not name.startswith("_")}
    return randomize(cls.from_config(fields), "float32")


def encoder(cls, config):
    return randomize(cls(transformers.CLIPTextConfig(**config)), "float32")


def tokenizer(folder):
    save_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def pixel(folder):
    unet = module(diffusers.UNet2DModel, PIXEL | ONE_BLOCK | ATTENTION)
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler.from_config(DDPM))


def latent(folder, scheduler=None, **fields):
    return diffusers.StableDiffusionPipeline(
        vae=module(diffusers.AutoencoderKL, SMALL_VAE),
        text_encoder=encoder(transformers.CLIPTextModel, text(TEXT_14, 48)),
        tokenizer=tokenizer(folder / "tokens"),
        unet=module(diffusers.UNet2DConditionModel, LATENT | CROSS, **fields),
        scheduler=scheduler or diffusers.DDIMScheduler.from_config(DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(folder):
    added = {name: SDXL[name] for name in ("addition_embed_type", "addition_time_embed_dim")}
    added |= {"projection_class_embeddings_input_dim": 12 + 6 * SDXL["addition_time_embed_dim"]}
    return diffusers.StableDiffusionXLPipeline(
        vae=module(diffusers.AutoencoderKL, SMALL_VAE),
        text_encoder=encoder(transformers.CLIPTextModel, text(TEXT_14, 24)),
        text_encoder_2=encoder(transformers.CLIPTextModelWithProjection, text(TEXT_XL, 24)),
        tokenizer=tokenizer(folder / "tokens"),
        tokenizer_2=tokenizer(folder / "tokens_2"),
        unet=module(diffusers.UNet2DConditionModel, LATENT | added),
        scheduler=diffusers.DDIMScheduler.from_config(DDIM),
    )


def dit(folder):
    return diffusers.DiTPipeline(
        # Its class takes 1000 for the null class, whatever the network's.
        transformer=module(diffusers.DiTTransformer2DModel, SMALL_DIT, num_embeds_ada_norm=1000),
        vae=module(diffusers.AutoencoderKL, SMALL_VAE),
        scheduler=diffusers.DDIMScheduler.from_config(DDIM),
        id2label={i: f"class {i}" for i in range(10)},
    )


@pytest.fixture(scope="module", params=[pixel, latent, xl, dit], ids=lambda make: make.__name__)
def saved(request, tmp_path_factory):
    """The kind, PyTorch's pipeline, and the folder that it saved."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    theirs = request.param(folder)
    theirs.save_pretrained(folder / "saved")
    theirs.set_progress_bar_config(disable=True)
    return request.param.__name__, theirs, folder / "saved"


def run(*argv):
    assert scaling_commands.run(*argv) == 0


def condition(kind):
    return {"pixel": [], "dit": ["--class-label", LABEL]}.get(kind, ["--prompt", PROMPT])


def network_call(kind, theirs, x, t):
    """PyTorch's network on x with the condition that its own pipeline makes."""
    if kind == "pixel":
        return theirs.unet(x, t)
    if kind == "dit":
        return theirs.transformer(x, torch.full((len(x),), t), class_labels=torch.full((len(x),), LABEL))
    if kind == "latent":
        states, _ = theirs.encode_prompt(PROMPT, "cpu", len(x), False)
        return theirs.unet(x, t, encoder_hidden_states=states)
    states, _, embeds, _ = theirs.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(x), 1)
    added = {"text_embeds": embeds.repeat(len(x), 1), "time_ids": sizes}
    return theirs.unet(x, t, encoder_hidden_states=states.repeat(len(x), 1, 1), added_cond_kwargs=added)


def noise(item, call, shape, seed):
    return np.asarray(noise_at(jax.random.key(seed), item, call, shape, "float32"))


def test_inspect_tells_the_size_and_every_tap_is_a_module(saved, capsys):
    _, theirs, folder = saved
    run("inspect", folder, "--json")
    shown = json.loads(capsys.readouterr().out)
    network = getattr(theirs, shown["taps_of"])
    modules = dict(network.named_modules())
    assert {tap["name"] for tap in shown["taps"]} <= set(modules)
    for name, part in shown["parts"].items():
        assert part["parameters"] == sum(p.numel() for p in getattr(theirs, name).parameters())
        assert part["class"] == type(getattr(theirs, name)).__name__
    assert set(shown["parts"]) == {
        name for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)
    }


@pytest.mark.parametrize("pool", ["max", "none"])
def test_codes_are_what_hooks_see(saved, pool, tmp_path):
    kind, theirs, folder = saved
    pictures = save_pictures(tmp_path / "pictures", 3)
    taps = ["--images", pictures, "--taps", ",".join(TAPS[kind]), "--timestep", T, "--pool", pool, "--seed", 5]
    run("extract", folder, *taps, "--batch-size", 2, "--quiet", "--out", tmp_path / "out", *condition(kind))
    codes = store.load(tmp_path / "out")

    ours = load_pipeline(folder)
    images = torch.from_numpy(in_range(read_images(str(pictures), ours), np.arange(3, dtype=np.int32), 3).copy())
    seen = {}
    network = theirs.transformer if kind == "dit" else theirs.unet

    def record(name):
        def hook(_module, _args, output):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen[name] = output.detach()

        return hook

    handles = [network.get_submodule(name).register_forward_hook(record(name)) for name in TAPS[kind]]
    with torch.no_grad():
        x = images
        if kind != "pixel":
            x = theirs.vae.encode(images).latent_dist.mean * theirs.vae.config.scaling_factor
        eps = torch.from_numpy(np.stack([noise(i, 0, x.shape[1:], 5) for i in range(3)]))
        network_call(kind, theirs, theirs.scheduler.add_noise(x, eps, torch.full((3,), T)), T)
    for handle in handles:
        handle.remove()
    for name in TAPS[kind]:
        wanted = seen[name]
        if len(wanted) == 1:
            wanted = wanted.repeat(3, *[1] * (wanted.ndim - 1))
        if pool == "max" and wanted.ndim > 2:
            wanted = wanted.amax((2, 3) if wanted.ndim == 4 else 1)
        assert difference(codes[name].values, wanted) <= TOLERANCE["float32"], name


def test_samples_are_what_the_pipeline_returns(saved, tmp_path, monkeypatch):
    kind, theirs, folder = saved
    num = ["--num", 2, "--steps", STEPS, "--seed", 6, "--batch-size", 1]
    run("sample", folder, *num, "--quiet", "--out", tmp_path, *condition(kind))
    ours = np.load(tmp_path / "samples.npz")

    calls = []

    def drawn(shape, *_, **__):
        item_shape = tuple(shape)[1:]
        calls.append(item_shape)
        return torch.from_numpy(np.stack([noise(i, len(calls) - 1, item_shape, 6) for i in range(2)]))

    for library in (of_pipeline, of_scheduler, of_dit):
        monkeypatch.setattr(library, "randn_tensor", drawn)
    if kind == "pixel":
        images = theirs(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    elif kind == "dit":
        images = theirs(class_labels=[LABEL] * 2, num_inference_steps=STEPS, output_type="np").images
    else:
        start = torch.from_numpy(np.stack([noise(i, 0, (4, 8, 8), 6) for i in range(2)]))
        more = {"latents": start, "num_inference_steps": STEPS, "output_type": "np"}
        images = theirs([PROMPT] * 2, guidance_scale=7.5, **more).images
    found = (ours["images"].transpose(0, 2, 3, 1) + 1) / 2
    # Some ten float32 roundings per step, multiplied by the guidance.
    np.testing.assert_allclose(found, images, atol=2e-5)
    assert np.std(found) > 0.05


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_network_that_embeds_the_guidance_is_sampled_as_by_its_pipeline(guidance, tmp_path, monkeypatch):
    scheduler = diffusers.LCMScheduler.from_config(DDIM | {"timestep_scaling": 10.0})
    theirs = latent(tmp_path, scheduler, time_cond_proj_dim=32)
    theirs.save_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    options = ["--num", 2, "--steps", STEPS, "--seed", 6, "--guidance", guidance, "--prompt", PROMPT, "--quiet"]
    run("sample", tmp_path / "saved", *options, "--out", tmp_path / "out")
    ours = np.load(tmp_path / "out" / "samples.npz")

    def drawn(call):
        return torch.from_numpy(np.stack([noise(i, call, (4, 8, 8), 6) for i in range(2)]))

    calls = iter(range(1, STEPS))
    monkeypatch.setattr(of_lcm, "randn_tensor", lambda *_, **__: drawn(next(calls)))
    more = {"latents": drawn(0), "num_inference_steps": STEPS, "output_type": "np"}
    images = theirs([PROMPT] * 2, guidance_scale=guidance, **more).images
    np.testing.assert_allclose((ours["images"].transpose(0, 2, 3, 1) + 1) / 2, images, atol=2e-5)
    assert np.std(images) > 0.05
