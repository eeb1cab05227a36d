"""Loading pipelines: what a model_index.json lists, which class reads which file, where files are looked for."""

import argparse
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from networks import network
from pipelines import (
    DDIM,
    LATENT,
    PIXEL,
    SMALL_DIT,
    SMALL_VAE,
    TEXT_XL,
    save,
    save_latent,
    save_pixel,
    save_tokenizer,
    save_xl,
    text,
    write,
)

from scaling import as_denoiser, load_model, load_pipeline, save_pretrained, zoo
from scaling.bridge import loading, sources
from scaling.bridge.latents import to_latents
from scaling.bridge.loading import read_checkpoints
from scaling.commands import options
from scaling.diffusion import schedules
from scaling.diffusion.solvers import make_solver
from scaling.models.model import parse_config
from scaling.models.taps import each_edit


def change(path, **fields):
    """Set fields of a JSON file; None as a value removes the field."""
    content = json.loads(path.read_text()) | fields
    write(path, {name: value for name, value in content.items() if value is not None})


def latent_without_text(folder, *, name="vae"):
    """A latent model and an autoencoder listed as ``name``."""
    return save(folder, {"unet": PIXEL | {"in_channels": 4, "out_channels": 4}, name: SMALL_VAE}, DDIM)


def test_an_autoencoder_is_one_under_each_of_its_names(tmp_path):
    plain = load_pipeline(latent_without_text(tmp_path / "vae"))
    other = load_pipeline(latent_without_text(tmp_path / "vqvae", name="vqvae"))
    assert other.vae is not None
    assert list(read_checkpoints(tmp_path / "vqvae")) == ["unet", "vqvae"]
    jax.tree.map(np.testing.assert_array_equal, other.vae.params, plain.vae.params)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vqvae": ["diffusers", "VQGAN"]}, "vqvae of class VQGAN: supported are AutoencoderKL, VQModel.*unet"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae of class AutoencoderTiny: supported are AutoencoderKL"),
        ({"bert": ["ldm", "LDMBertModel"]}, "bert of class LDMBertModel: pipelines with one are not supported"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet of class ControlNetModel.*--scheduler"),
        ({"movq": ["diffusers", "VQModel"]}, "movq of class VQModel"),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder of class T5EncoderModel: supported are CL",
        ),
        ({"unet": ["diffusers", "UNet1DModel"]}, "unet of class UNet1DModel: supported are UNet2DModel"),
        ({"transformer": ["diffusers", "DiTTransformer2DModel"]}, "either a unet or a transformer"),
        ({"vqvae": ["diffusers", "AutoencoderKL"], "vae": ["diffusers", "AutoencoderKL"]}, "at most one autoencoder"),
        ({"is_distilled": True}, "sets is_distilled = True, which is not supported"),
        ({"unet": ["diffusers", "DiTTransformer2DModel"]}, "says DiTTransformer2DModel, config.json says UNet2DModel"),
    ],
)
def test_components_that_are_not_read_are_refused_by_name(entries, message, tmp_path):
    folder = save_pixel(tmp_path)
    change(folder / "model_index.json", **entries)
    for read in (load_pipeline, read_checkpoints):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_components_that_do_not_matter_are_left_out(tmp_path):
    folder = save_pixel(tmp_path)
    entries = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "controlnet": [None, None],
        "requires_safety_checker": True,
        "is_distilled": False,
        "_name_or_path": "somewhere",
    }
    change(folder / "model_index.json", **entries)
    assert load_pipeline(folder).vae is None


def test_the_index_names_the_class_of_the_scheduler(tmp_path):
    folder = save_latent(tmp_path)
    assert load_pipeline(folder).schedule.method == "ddim"
    for name, method in {
        "PNDMScheduler": "pndm",
        "FlaxPNDMScheduler": "pndm",
        "EulerDiscreteScheduler": "euler",
    }.items():
        change(folder / "model_index.json", scheduler=["diffusers", name])
        schedule = load_pipeline(folder).schedule
        assert schedule.method == method
        # Fields that the file lacks take the defaults of the class that reads it.
        assert schedule.timestep_spacing == ("linspace" if method == "euler" else "leading")
        assert schedule.config["_class_name"] == name.removeprefix("Flax")
    # A scheduler given by hand is read as its own file says.
    assert load_pipeline(folder, scheduler=folder / "scheduler").schedule.method == "ddim"
    change(folder / "scheduler" / "scheduler_config.json", _class_name="FlaxDDIMScheduler")
    assert load_pipeline(folder, scheduler=folder / "scheduler").schedule.method == "ddim"
    change(folder / "model_index.json", scheduler=[None, None])
    assert load_pipeline(folder).schedule.method == "ddim"


def test_classes_of_flax_are_read_as_those_of_pytorch(tmp_path):
    folder = save_latent(tmp_path)
    entries = {
        part: ["diffusers", f"Flax{named}"]
        for part, named in (("unet", LATENT["_class_name"]), ("vae", "AutoencoderKL"))
    }
    change(folder / "model_index.json", **entries, text_encoder=["transformers", "FlaxCLIPTextModel"])
    change(folder / "unet" / "config.json", _class_name="FlaxUNet2DConditionModel")
    assert load_pipeline(folder).network.apply.architecture == "unet2d_condition"


def test_the_index_decides_whether_a_text_encoder_projects(tmp_path):
    folder = save_xl(tmp_path)
    expected = load_pipeline(folder).text_encoders[1]
    # The configuration without its class, or with the class that a conversion by another class has written.
    for architectures in (None, ["CLIPTextModel"]):
        change(folder / "text_encoder_2" / "config.json", architectures=architectures)
        encoder = load_pipeline(folder).text_encoders[1]
        assert encoder.config == expected.config
        assert encoder.config.projection is not None
    # Weights that have lost the projection on the way, and weights that have one too many.
    save_pretrained(network(text(TEXT_XL, 24) | {"architectures": ["CLIPTextModel"]}), folder / "text_encoder_2")
    with pytest.raises(ValueError, match="text_encoder_2: the weights do not fit.*missing: text_projection.weight"):
        load_pipeline(folder)
    save_pretrained(network(text(TEXT_XL, 24)), folder / "text_encoder")
    with pytest.raises(ValueError, match="text_encoder: the weights do not fit.*unexpected: text_projection.weight"):
        load_pipeline(folder)


def test_the_hub_gives_the_tokens_of_the_same_folder_on_disk(tmp_path, monkeypatch):
    repository, cache = save_latent(tmp_path / "repository"), tmp_path / "cache"
    size = len(json.loads((repository / "tokenizer" / "vocab.json").read_text()))
    write(repository / "tokenizer" / "added_tokens.json", {"<sks>": size})

    monkeypatch.setattr(sources, "_unreachable", lambda: None)

    def download(_, name, revision=None):
        if not (repository / name).is_file():
            raise EntryNotFoundError(name)
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(repository / name, cache / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (here,), (there,) = load_pipeline(repository).tokenizers, load_pipeline("owner/name").tokenizers
    assert here("a <sks>")["input_ids"] == there("a <sks>")["input_ids"]
    assert size in there("a <sks>")["input_ids"]


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_tokenizer_needs_a_vocabulary(missing, tmp_path):
    folder = save_latent(tmp_path)
    (folder / "tokenizer" / missing).unlink()
    with pytest.raises(ValueError, match=r"tokenizer: no vocabulary.*vocab.json and merges.txt, or tokenizer.json"):
        load_pipeline(folder)


@pytest.mark.parametrize("config", [PIXEL, LATENT, SMALL_DIT, SMALL_VAE], ids=lambda config: config["_class_name"])
def test_averaged_weights_of_training_load(config):
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 100, "power": 2 / 3}
    average |= {"update_after_step": 0, "use_ema_warmup": True}
    assert parse_config(config | average) == parse_config(config)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = network(PIXEL)
    params = dict(model.params)
    params["conv_in.bias"] = params["conv_in.bias"].at[jnp.array([1, 3])].set(jnp.array([jnp.nan, jnp.inf], "float32"))
    save_pretrained(dataclasses.replace(model, params=params), tmp_path)
    for dtype in (None, "bfloat16"):
        with pytest.raises(ValueError, match="conv_in.bias has 2 entries that are NaN or infinite"):
            load_model(tmp_path, dtype=dtype)
    # Numbers that only the narrower type cannot hold.
    params["conv_in.bias"] = params["conv_in.bias"].at[jnp.array([1, 3])].set(1e30)
    save_pretrained(dataclasses.replace(model, params=params), tmp_path)
    load_model(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="conv_in.bias has 2 entries .* as float16.*another dtype"):
        load_model(tmp_path, dtype="float16")


def without_weights(folder, config):
    """A folder of a configuration alone."""
    save_pretrained(network(config), folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


def test_conversions_name_the_class_and_another_folder(tmp_path):
    encoder = without_weights(tmp_path / "encoder", text(TEXT_XL, 24))
    (encoder / "pytorch_model.bin").touch()
    command = f'CLIPTextModelWithProjection.from_pretrained("{encoder}", use_safetensors=False)'
    target = f'.save_pretrained("{encoder}-safetensors")'
    for path in (encoder, encoder / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="can run any code") as error:
            load_model(path)
        assert f"transformers.{command}{target}" in str(error.value)
    single = tmp_path / "v1-5.ckpt"
    single.touch()
    with pytest.raises(ValueError, match=rf"StableDiffusionPipeline.from_single_file\(.{single}.\).save_pretrained"):
        load_model(single)


def test_no_conversion_is_advised_where_there_is_nothing_to_convert(tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    folder = without_weights(tmp_path / "empty", PIXEL)
    messages = {}

    def refused(case):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load_model(folder)
        messages[case] = str(error.value)

    refused("empty")
    (folder / name).mkdir()
    refused("folder")
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    refused("pipe")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused("loop")
    (folder / name).unlink()
    (folder / "diffusion_pytorch_model.bin").mkdir()
    refused("pickle")
    (folder / "diffusion_pytorch_model.bf16.safetensors").touch()
    refused("variant")
    assert not any("python -c" in message for message in messages.values())
    assert all("not a file, but a folder" in messages[case] for case in ("folder", "pipe", "loop"))
    assert all("no weights; expected" in messages[case] for case in ("empty", "pickle", "variant"))
    assert "there are only diffusion_pytorch_model.bf16.safetensors" in messages["variant"]


def test_an_unknown_name_is_told_at_once_without_a_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_unreachable", lambda: "no answer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("digitz", "nobody/nothing"):
        with pytest.raises(ValueError, match=rf"{name}: no folder.*digits-10.*the hub was not asked: no answer"):
            load_model(name)
    # What the cache holds of a repository is read from there.
    asked = []

    def download(*_, **options):
        asked.append(options["local_files_only"])
        raise EntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "models--nobody--nothing").mkdir()
    with pytest.raises(ValueError, match="no config.json here, nor in the cache"):
        load_model("nobody/nothing")
    assert asked
    assert all(asked)


@pytest.mark.parametrize("name", loading.TOKENIZER_FILES)
def test_files_of_a_tokenizer_that_do_not_fit_are_named(name, tmp_path):
    """Whatever a file holds, the tokenizer works or its folder is named; its readers raise many other things."""
    folder = tmp_path / "tokenizer"
    save_tokenizer(folder)
    source = sources.locate(tmp_path, None)
    size = len(json.loads((folder / "vocab.json").read_text()))
    contents = [[], 3, None, "a", {}, {"a": "b"}, {"a": -1}, {"a": 1 << 40}, {"a": [1]}, {"model": {}}]
    contents += [{"model_max_length": value} for value in (-1, "a", 1.5, None)]
    contents += [{"unk_token": 3}, {"bos_token": {"content": "<s>"}}, {"added_tokens_decoder": {"x": 3}}, {"<a>": size}]
    written = [json.dumps(content) for content in contents]
    written += ["", "{", "#version: 0.2\na", "a b c\n", "\x00\x01", "a b\n" * 3]
    messages = []
    for content in written:
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(content)
        try:
            tokenizer = loading._tokenizer(source, "tokenizer")
            assert len(tokenizer("the cat", padding="max_length", max_length=8)["input_ids"]) == 8
        except ValueError as error:
            messages.append(str(error))
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(before)
    assert messages
    assert all(message.startswith(f"{folder}: ") for message in messages)


def test_a_hub_that_stays_silent_is_awaited_for_seconds(monkeypatch):
    class Silent:
        def head(self, *_, **__):
            threading.Event().wait(60)

    monkeypatch.setattr(sources, "REACH", 0.1)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Silent)
    assert sources._unreachable() == "no answer within 0.1 seconds"


def test_names_of_the_zoo_are_models_unless_a_folder_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.zoo_names() == sorted(zoo.names())
    here = load_model("digits-10", subfolder="unet").params["conv_in.weight"]
    np.testing.assert_array_equal(here, zoo.load("digits-10", None).network.params["conv_in.weight"])
    # Computed with, their weights are single precision.
    args = argparse.Namespace(model="digits-10", dtype=None, revision=None, scheduler=None)
    assert options.load(args).network.params["conv_in.weight"].dtype == np.float32
    (tmp_path / "digits-10").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        load_model("digits-10")


def test_paths_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: asked.append(1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    names = ["runs/unet", "./unet", "~/unet", "/unet", "a/b/c", "a/unet.safetensors", "unet.ckpt", Path("a/b")]
    for path in names:
        with pytest.raises(ValueError, match=str(path).removeprefix("./")):
            load_model(path)
    for path in (tmp_path / "loop", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="special file or a link that leads nowhere"):
            load_model(path)
    assert not asked


@pytest.mark.parametrize(
    ("named", "fields", "message"),
    [
        ("TCDScheduler", {"original_inference_steps": 50}, "steps of TCDScheduler.*--sampler"),
        ("SASolverScheduler", {"predictor_order": 3}, "steps of SASolverScheduler are not supported"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
    ],
)
def test_steps_that_are_not_supported_are_refused_by_sampling_alone(named, fields, message, tmp_path):
    folder = save_pixel(tmp_path)
    change(folder / "scheduler" / "scheduler_config.json", **fields)
    change(folder / "model_index.json", scheduler=["diffusers", named])
    schedule = load_pipeline(folder).schedule
    plain = schedules.from_config({"_class_name": named} | {"num_train_timesteps": 1000}, "ddim")
    np.testing.assert_array_equal(schedule.alpha_bar, plain.alpha_bar)
    assert schedule.config["_class_name"] == named
    with pytest.raises(ValueError, match=message):
        make_solver(schedule, 5)
    for chosen in (schedules.with_method(schedule, "ddim"), load_pipeline(folder, method="ddim").schedule):
        assert chosen.method == "ddim"
        make_solver(chosen, 5)


@pytest.mark.parametrize(
    ("named", "fields", "message"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0},
            "FlowMatchEulerDiscreteScheduler is the schedule of a rectified flow",
        ),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ("UniPCMultistepScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale = 3.0: this field is not supported"),
        ("CogVideoXDDIMScheduler", {}, "'CogVideoXDDIMScheduler' is not supported"),
    ],
)
def test_another_noise_is_refused_at_loading(named, fields, message, tmp_path):
    folder = save_pixel(tmp_path)
    change(folder / "scheduler" / "scheduler_config.json", **fields)
    change(folder / "model_index.json", scheduler=["diffusers", named])
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


def test_latents_need_sides_that_the_autoencoder_divides():
    vae = network(SMALL_VAE)
    for shape in ((1, 3, 15, 16), (1, 3, 16, 1)):
        with pytest.raises(ValueError, match="resize them to multiples of 2"):
            to_latents(vae, jnp.zeros(shape, "float32"))
    with pytest.raises(ValueError, match=r"run from 255 to 255, .*images / 127\.5 - 1"):
        to_latents(vae, jnp.full((1, 3, 16, 16), 255, "float32"))


def test_a_denoiser_returns_as_many_channels_as_it_takes():
    schedule = schedules.from_config({"_class_name": "DDIMScheduler"})
    for channels in (1, 4):
        denoiser = as_denoiser(network(PIXEL | {"out_channels": channels}), schedule)
        with pytest.raises(ValueError, match=f"turns 3 channels into {channels}, so it is no denoiser"):
            denoiser(jnp.zeros((3, 8, 8), "float32"), 0.5)


@pytest.mark.parametrize("edit", [0.5, [0.5, 1.0], None, "add", np.zeros(8)], ids=lambda edit: type(edit).__name__)
def test_what_is_no_edit_is_refused(edit):
    # Not through Tap or sample, whose types the suite itself checks.
    with pytest.raises(ValueError, match=r"edit of 'mid_block': it must be an Edit.*write for example"):
        each_edit("mid_block", edit)
