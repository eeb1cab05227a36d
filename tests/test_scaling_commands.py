"""The command line on a folder of every architecture: what it prints and writes, messages, exit codes, resuming."""

import argparse
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from networks import network
from PIL import Image
from pipelines import CLASSES, DDPM, PIXEL, SAVERS, save_pictures, write
from safetensors.numpy import load_file, save_file
from scaling_commands import run

import scaling
from scaling.commands import COMMANDS
from scaling.study import generation
from sims import store

ROOT = pathlib.Path(__file__).parents[1]
TAPS = {
    "pixel": "mid_block,up_blocks.0.resnets.1.nonlinearity",
    "latent": "mid_block.attentions.0.transformer_blocks.0.ff.net.0",
    "xl": "add_embedding,mid_block",
    "dit": "transformer_blocks.1,transformer_blocks.0.norm1",
}
SHAPES = {"pixel": [8, 8], "latent": [32], "xl": [32, 8], "dit": [32, 32]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_pictures(folder / "pictures", 3)
    for name, save in SAVERS.items():
        save(folder / name)
    return folder


@pytest.mark.parametrize("kind", SAVERS)
def test_inspect_extract_and_sample(kind, home, tmp_path, capsys):
    assert run("inspect", home / kind, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    part = shown["taps_of"]
    assert part == ("transformer" if kind == "dit" else "unet")
    model = scaling.load_model(home / kind, part)
    assert shown["parts"][part]["parameters"] == sum(value.size for value in model.params.values())
    assert shown["parts"][part]["config"] == json.loads((home / kind / part / "config.json").read_text())
    taps = {tap["name"]: tap["shape"] for tap in shown["taps"]}
    assert taps == {name: list(shape.shape) for name, shape in scaling.models.taps.names(model).items()}

    prompt = ["--prompt", "the cat"] if kind in ("latent", "xl") else []
    label = ["--class-label", "3"] if kind == "dit" else []
    more = ["--timestep", "10", "--batch-size", "2", "--out", tmp_path / "codes", *prompt, *label]
    assert run("extract", home / kind, "--images", home / "pictures", "--taps", TAPS[kind], *more) == 0
    printed = capsys.readouterr()
    assert "results.zarr" in printed.out
    assert "3/3" in printed.err
    codes = store.load(tmp_path / "codes")
    names = TAPS[kind].split(",")
    assert [codes[name].shape for name in names] == [(3, size) for size in SHAPES[kind]]
    for name in names:
        assert np.all(np.isfinite(codes[name]))
    assert np.std(codes[names[0]], axis=0).max() > 0 or names[0] == "add_embedding"

    more = ["--steps", "2", "--seed", "1", "--batch-size", "2", "--out", tmp_path / "samples", *prompt, *label]
    assert run("sample", home / kind, "--num", "3", *more) == 0
    assert "sheet.png" in capsys.readouterr().out
    assert len(list((tmp_path / "samples" / "images").glob("*.png"))) == 3
    with Image.open(tmp_path / "samples" / "sheet.png") as sheet:
        assert min(sheet.size) > 64
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert set(arrays) == ({"images"} if kind == "pixel" else {"images", "latents"})
        assert np.std(arrays["images"]) > 0
    record = store.read_spec(tmp_path / "samples")
    assert record["spec"]["guidance"] == {"pixel": None, "latent": 7.5, "xl": 7.5, "dit": 4.0}[kind]
    assert record["sessions"][0]["paths"] == {"model": str(home / kind)}
    assert record["sessions"][0]["device"]["platform"] == "cpu"


def test_inspect_prints_a_table_and_reads_no_weights(home, tmp_path, capsys):
    copy = shutil.copytree(home / "latent", tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:
        file.truncate(header)
        # Holes read as zeros.
        file.truncate(size)
    assert run("inspect", copy) == 0
    lines = capsys.readouterr().out.splitlines()
    model = scaling.load_model(home / "latent", "unet")
    count = sum(value.size for value in model.params.values())
    assert lines[0] == f"unet: UNet2DConditionModel, {count:,} parameters, float32, {4 * count:,} bytes"
    assert [line.split(":")[0] for line in lines[:3]] == ["unet", "vae", "text_encoder"]
    assert "  cross_attention_dim = 48" in lines
    row = next(line for line in lines if line.split()[:1] == ["mid_block"])
    assert row.split() == ["mid_block", *"1 x 8 x 8 x 8".split(), "float32"]


def test_inspect_shows_other_parts_and_single_networks(home, tmp_path, capsys):
    assert run("inspect", home / "xl", "--part", "vae") == 0
    assert "taps of the vae" in capsys.readouterr().out
    assert run("inspect", home / "xl" / "text_encoder_2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["parts"]) == ["model"]
    assert shown["parts"]["model"]["class"] == "CLIPTextModelWithProjection"
    for dtype in ("bfloat16", "float16", "float64"):
        scaling.save_pretrained(network(PIXEL, dtype), tmp_path / dtype)
        assert run("inspect", tmp_path / dtype / "diffusion_pytorch_model.safetensors") == 0
        assert f"parameters, {dtype}," in capsys.readouterr().out
    assert run("inspect", home / "xl", "--part", "safety_checker") == 2
    assert "it has unet, vae, text_encoder, text_encoder_2" in capsys.readouterr().err


def test_a_network_alone_takes_a_scheduler(home, tmp_path, capsys):
    scaling.save_pretrained(network(CLASSES), tmp_path / "net")
    arguments = ["--num", "2", "--steps", "2", "--class-label", "1", "--quiet", "--out", tmp_path / "out"]
    assert run("sample", tmp_path / "net", *arguments) == 2
    assert "no scheduler_config.json" in capsys.readouterr().err
    assert run("sample", tmp_path / "net", "--scheduler", home / "pixel" / "scheduler", *arguments) == 0
    assert capsys.readouterr() == ("", "")
    # A file, or one beside the network, means the same.
    file = home / "pixel" / "scheduler" / "scheduler_config.json"
    assert run("sample", tmp_path / "net", "--scheduler", file, *arguments) == 0
    write(tmp_path / "net" / "scheduler_config.json", DDPM)
    assert run("sample", tmp_path / "net", *arguments) == 0
    write(tmp_path / "other.json", DDPM | {"beta_end": 0.03})
    assert run("sample", tmp_path / "net", "--scheduler", tmp_path / "other.json", *arguments) == 2
    assert "model.scheduler.beta_end is null there and 0.03 here" in capsys.readouterr().err


def test_early_pipelines_have_their_network_at_the_root(tmp_path, capsys):
    scaling.save_pretrained(network(PIXEL), tmp_path)
    write(tmp_path / "scheduler_config.json", DDPM)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    write(tmp_path / "model_index.json", {"_class_name": "DDPMPipeline"} | parts)
    assert run("inspect", tmp_path) == 0
    assert capsys.readouterr().out.startswith("unet: UNet2DModel")
    assert run("sample", tmp_path, "--num", "1", "--steps", "1", "--out", tmp_path / "out") == 0


def test_samples_are_images_to_extract_from(home, tmp_path):
    assert run("sample", home / "pixel", "--num", "3", "--steps", "2", "--quiet", "--out", tmp_path / "s") == 0
    for i, images in enumerate((tmp_path / "s" / "images", tmp_path / "s" / "samples.npz")):
        more = ["--taps", "mid_block", "--pool", "none", "--dtype", "float32", "--quiet", "--out", tmp_path / str(i)]
        assert run("extract", home / "pixel", "--images", images, *more) == 0
    pictures, arrays = (store.load(tmp_path / str(i)).mid_block.values for i in (0, 1))
    # The pictures have been rounded to bytes.
    assert 0 < np.max(np.abs(pictures - arrays)) < 0.1 * np.max(np.abs(arrays))


def test_results_that_are_not_finite_are_counted_marked_and_end_with_1(home, tmp_path, capsys):
    """The last convolution's weights are finite, and overflow: in samples always, in codes only at its own tap."""
    folder = shutil.copytree(home / "pixel", tmp_path / "pixel")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    params = load_file(weights)
    save_file(params | {"conv_out.weight": np.full_like(params["conv_out.weight"], 3e38)}, weights)
    flags = ["--batch-size", 2, "--quiet", "--out"]
    assert run("sample", folder, "--num", 3, "--steps", 2, *flags, tmp_path / "samples") == 1
    assert "3 of 3 samples are not finite (numbers 0, 1, 2)" in capsys.readouterr().err
    written = np.asarray(Image.open(tmp_path / "samples" / "images" / "00000.png"))
    assert {*np.unique(written)} == {0, 255}
    assert np.all(np.isnan(np.load(tmp_path / "samples" / "samples.npz")["images"]))
    pictures = save_pictures(tmp_path / "pictures", 3)
    for tap, code in (("mid_block", 0), ("conv_out", 1)):
        argv = ["--images", pictures, "--taps", tap, *flags, tmp_path / tap]
        assert run("extract", folder, *argv) == code
    assert "3 of 3 images are not finite" in capsys.readouterr().err
    assert run("jacobian", folder, "--images", pictures, "--rank", 1, *flags[:2], "--out", tmp_path / "jacobian") == 1
    printed = capsys.readouterr()
    assert "3 of 3 images are not finite" in printed.err
    assert "| not finite |" in printed.out


def test_one_bad_picture_stops_no_extraction_that_may_skip_it(home, tmp_path, capsys):
    shutil.copytree(home / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "torn.png").write_bytes(b"no image")
    more = ["--images", tmp_path / "pictures", "--taps", "mid_block", "--quiet", "--out", tmp_path / "run"]
    assert run("extract", home / "pixel", *more) == 2
    assert "1 of 4 images cannot be used: " in capsys.readouterr().err
    assert run("extract", home / "pixel", *more, "--skip-bad") == 0
    codes = store.load(tmp_path / "run")
    files = sorted(file.relative_to(home / "pictures").as_posix() for file in (home / "pictures").rglob("*.png"))
    assert codes.name.values.tolist() == files
    assert codes.mid_block.shape == (3, 8)


EXTRACT = ["--images", "HOME/pictures", "--taps"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "HOME/missing"], "neither a folder nor"),
        (["inspect", "HOME/pictures"], "no config.json"),
        (["inspect", "HOME/pixel/scheduler"], "no config.json"),
        (["extract", "HOME/pixel", "--images", "HOME/none", "--taps", "mid_block"], "there is no"),
        (["extract", "HOME/pixel", "--images", "HOME/pixel/unet", "--taps", "mid_block"], "holds no images"),
        (["extract", "HOME/pixel", *EXTRACT, "mid_blok"], "the nearest are 'mid_block'"),
        (["extract", "HOME/pixel", *EXTRACT, "mid_block", "--timestep", "1000"], "at most 999"),
        (["extract", "HOME/pixel", *EXTRACT, "mid_block", "--prompt", "x"], "reads no text"),
        (["extract", "HOME/latent/vae", *EXTRACT, "encoder", "--scheduler", "HOME/xl/scheduler"], "removes no noise"),
        (["sample", "HOME/pixel", "--num", "0"], "num must be at least 1"),
        (["sample", "HOME/pixel", "--steps", "1001"], "at most 1000"),
        (["sample", "HOME/pixel", "--guidance", "3"], "cannot be guided"),
        (["sample", "HOME/dit", "--class-label", "11"], "at most 10"),
        (["sample", "HOME/dit", "--size", "9"], "multiples of 2"),
        (["sample", "HOME/dit", "--scheduler", "HOME/none.json"], "no such file"),
        (["sample", "HOME/latent/unet", "--scheduler", "HOME/latent/scheduler"], "no text encoder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(argv, message, home, tmp_path, capsys):
    out = [] if argv[0] == "inspect" else ["--out", tmp_path / "out"]
    assert run(*(a.replace("HOME", str(home)) for a in argv), *out) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line and "images/s]" not in line]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_bad_flags_exit_with_2(capsys):
    for argv in (
        ["extract", "m", "--images", "i", "--out", "o"],
        ["extract", "m", "--taps", "a", "--images", "i", "--out", "o", "--pool", "median"],
        ["sample", "m", "--out", "o", "--size", "big"],
        ["sample", "m", "--out", "o", "--sampler", "rk4"],
        ["sample", "m", "--out", "o", "--dtype", "int8"],
        ["sample", "m", "--num", "three", "--out", "o"],
        ["inspect"],
        [],
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*argv)
        assert stopped.value.code == 2
        assert "usage" in capsys.readouterr().err


def test_help_explains_every_flag_with_its_range(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("sample", "--help")
    assert stopped.value.code == 0
    assert "from 1 to T" in capsys.readouterr().out
    assert COMMANDS == (
        "inspect", "extract", "sample", "jacobian", "detect", "ablate", "stress", "audit", "train", "transition",
        "duplication", "zoo",
    )  # fmt: skip
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"scaling.commands.{name}").add_flags(parser)
        for action in parser._actions:
            assert action.help, action.dest
            if action.type in (int, float):
                assert re.search(r"from \d|>= \d|positive|1: none", action.help), action.dest


HEAVY = {"jax", "numpy", "xarray", "zarr", "flax", "scipy", "transformers", "diffusers"}


def test_help_and_mistyped_flags_import_nothing_heavy():
    """In one process all commands, one after the other; what is imported stays imported."""
    program = """
import sys
from scaling.commands import COMMANDS
from sims.terminal import parse_command
for argv in [["--help"], *([name, flag] for name in COMMANDS for flag in ("--help", "--mistyped"))]:
    try:
        parse_command(argv, "python -m scaling", None, "scaling.commands", COMMANDS)
        raise AssertionError(argv)
    except SystemExit as stopped:
        print(*argv, stopped.code, file=sys.stderr)
print("modules:", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    ends = [line for line in done.stderr.splitlines() if re.fullmatch(r"[\w -]+ \d", line)]
    assert len(ends) == 1 + 2 * len(COMMANDS)
    assert all(line.endswith("--help 0" if "--help" in line else "--mistyped 2") for line in ends)
    loaded = done.stdout.splitlines()[-1].split()
    assert "scaling.training.spec" in loaded
    assert not HEAVY & set(loaded)


def test_an_interrupt_keeps_what_was_sampled_and_the_same_command_resumes(home, tmp_path, capsys, monkeypatch):
    real, calls = generation.sample, []

    def interrupted(*args, **more):
        calls.append(more["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    command = ["sample", home / "pixel", "--num", "3", "--steps", "2", "--batch-size", "1", "--out", tmp_path / "run"]
    monkeypatch.setattr(generation, "sample", interrupted)
    assert run(*command) == 130
    assert "The same command again resumes" in capsys.readouterr().err
    monkeypatch.undo()
    # The first call only told the shapes.
    assert int(store.load(tmp_path / "run").done.sum()) == 1
    assert run(*command) == 0
    assert run(*command[:-1], tmp_path / "whole") == 0
    for name in ("images/00000.png", "images/00002.png", "sheet.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_the_module_runs_as_a_program(home):
    command = [sys.executable, "-m", "scaling", "inspect", str(home / "pixel"), "--json"]
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["taps_of"] == "unet"
    done = subprocess.run([*command[:-2], str(home / "nowhere")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
