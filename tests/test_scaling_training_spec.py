"""Specs of trainings: fields, flags and defaults, each in one place."""

import dataclasses

import pytest
from PIL import Image
from scaling_commands import parse

from scaling.commands import train as train_command
from scaling.training.spec import ARCHS, DEFAULTS, Recipe, TrainSpec, spec_of
from sims.flags import flag_of


def spec(*flags):
    return train_command.spec_from_flags(parse("train", "--out", "x", *flags))


def test_every_field_is_a_flag_whose_help_names_its_default():
    shown = parse("train", "--out", "x")
    for field in dataclasses.fields(TrainSpec):
        assert flag_of(field) is not None, field.name
        # Left out, so that the default of the spec or of the architecture holds.
        assert getattr(shown, field.name) is None
        assert f"{field.name}: " in TrainSpec.__doc__


def test_defaults_of_the_command_are_the_reference():
    assert spec() == TrainSpec()
    assert (spec().duplicates, spec().singles, spec().channels, spec().ema) == ("20x60", 1200, (32, 64), 0.995)
    assert spec("--num-samples", "9") == TrainSpec(num_samples=9, duplicates="", singles=0)
    assert spec("--duplicates", "none") == TrainSpec(duplicates="", singles=0)
    assert spec("--arch", "dit").channels == (64,)
    assert spec("--channels", "8,16", "--gray").gray


def test_the_color_of_a_folder_is_part_of_its_name(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    assert spec("--dataset", tmp_path, "--color", "rgb").dataset == f"images:{tmp_path}?color=rgb"
    assert spec("--dataset", f"images:{tmp_path}?resize=4", "--color", "gray").dataset.endswith("resize=4&color=gray")
    assert spec("--dataset", tmp_path).dataset == str(tmp_path)
    with pytest.raises(ValueError, match="digits is no folder of images: omit color"):
        spec("--color", "rgb")
    with pytest.raises(ValueError, match="gives color=gray, which contradicts color=rgb"):
        spec("--dataset", f"images:{tmp_path}?color=gray", "--color", "rgb")


@pytest.mark.parametrize("arch", ARCHS)
def test_defaults_of_an_architecture_give_way_to_flags(arch):
    for name, value in DEFAULTS[arch].items():
        assert getattr(spec("--arch", arch), name) == value
        assert f"--{name.replace('_', '-')}" in train_command.architecture_defaults()
    assert spec("--arch", arch, "--steps", "7").steps == 7


def test_values_of_every_kind_are_read():
    given = spec(
        "--resolution", "16", "--held-out", "5", "--clip", "0.5", "--optimizer", "adamw", "--weight-decay", "0.1",
        "--prediction", "sample", "--skip-bad", "--variants", "2x4", "--tokenizer", "folder", "--seed", "3",
    )  # fmt: skip
    assert given == TrainSpec(
        resolution=16, held_out=5, clip=0.5, optimizer="adamw", weight_decay=0.1, prediction="sample", skip_bad=True,
        variants="2x4", tokenizer="folder", seed=3,
    )  # fmt: skip


def test_a_recipe_takes_its_values_from_the_spec_and_has_none_of_its_own():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(Recipe))
    recipe = TrainSpec(arch="dit", batch_size=3, ema=0.5, prompt_dropout=0.25).recipe()
    assert (recipe.batch_size, recipe.ema, recipe.dropout) == (3, 0.5, 0.25)
    assert TrainSpec(prompt_dropout=0.25).recipe().dropout == 0
    assert hash(recipe) == hash(dataclasses.replace(recipe))


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="arch must be one of unet2d, unet2d_condition, dit; got 'vit'"):
        spec_of({"arch": "vit"})
