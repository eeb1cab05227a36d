"""Loading pipelines: what a model_index.json lists, which class reads which file, where files are looked for."""

import json

import jax
import numpy as np
import pytest
from networks import network
from pipelines import DDIM, LATENT, PIXEL, SMALL_VAE, TEXT_XL, save, save_latent, save_pixel, save_xl, text, write

from scaling import load_pipeline, save_pretrained
from scaling.bridge.loading import read_checkpoints


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
        ({"vqvae": ["diffusers", "VQModel"]}, "vqvae of class VQModel: supported are AutoencoderKL.*unet"),
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
