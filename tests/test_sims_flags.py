"""Flags: axes, sizes, spec files, and what wins over what."""

import argparse
import json
import os

import numpy as np
import pytest
from PIL import Image

from sims import flags
from sims.commands import options
from sims.sweeps.spec import Spec


def parse(*argv):
    parser = argparse.ArgumentParser()
    options.add_spec_flags(parser)
    options.add_measures_flag(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1", (0.1,)),
        ("1,2.5,4", (1.0, 2.5, 4.0)),
        ("lin:0:1:5", (0, 0.25, 0.5, 0.75, 1)),
        ("geom:1:100:3", (1, 10, 100)),
    ],
)
def test_float_axes(text, values):
    np.testing.assert_allclose(flags.parse_floats(text), values, rtol=1e-6)


def test_integer_ranges_round_and_merge():
    assert flags.parse_ints("geom:1:8:7") == (1, 2, 3, 4, 6, 8)
    assert flags.parse_ints("2,4,8") == (2, 4, 8)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "geom:0:1:3", "geom:1:2", "lin:0:1:0", "lin:0:1:x", "2.5x"])
def test_bad_axes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not an axis"):
        flags.parse_floats(text)


@pytest.mark.parametrize(
    ("text", "size"), [("100", 100), ("500MB", 500 * 10**6), ("2GiB", 2 << 30), ("1.5 KiB", 1536), ("2gib", 2 << 30)]
)
def test_memory_sizes(text, size):
    assert flags.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1MB", "0", "1e30GB"])
def test_bad_memory_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        flags.parse_bytes(text)


def test_every_field_of_the_spec_has_a_flag():
    spec = options.spec_from_flags(
        parse(
            *"--dataset digits --center --separable 4 --split-seed 3 --held-out 0.1 --width 3".split(),
            *["--num-samples", "2,4"],
            *"--penalty 0.1 --learning-rate 0.2 --init-scale 0.3 --sigma 0.4,0.5 --seeds 2 --optimizer adamw".split(),
            *"--schedule cosine --batch-size 7 --steps 9 --record-steps 1,9 --tied --weight-decay 0.6".split(),
            "--biases",
            *"--eval-samples 8 --eval-draws 1 --dtype float64 --seed 5".split(),
        )
    )
    default = Spec()
    same = {name for name in vars(default) if getattr(spec, name) == getattr(default, name)}
    assert same == {"dataset", "separation", "duplicates", "singles"}
    assert options.spec_from_flags(parse("--duplicates", "2x3", "--singles", "1")).num_samples == (7,)


def test_flags_of_folders_are_part_of_the_names_of_data_sets(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    spec = options.spec_from_flags(parse("--dataset", str(tmp_path), "--skip-bad", "--color", "gray"))
    assert spec.dataset == (f"images:{tmp_path}?color=gray&skip_bad=1",)
    several = parse("--dataset", f"patches:{tmp_path}?size=4", "--dataset", str(tmp_path), "--skip-bad")
    assert options.spec_from_flags(several).dataset == (
        f"patches:{tmp_path}?size=4&skip_bad=1",
        f"images:{tmp_path}?skip_bad=1",
    )
    with pytest.raises(ValueError, match="digits is no folder of images: omit skip_bad"):
        options.spec_from_flags(parse("--skip-bad"))


def test_axes_of_names_are_lists():
    spec = options.spec_from_flags(
        parse(
            *"--dataset mixture:modes=2 --dataset mixture:modes=3,dim=4 --separation 1,2 --tied false,true".split(),
            *"--duplicates none,2x3 --num-samples 9 --optimizer adam,sgd --batch-size 0,4".split(),
        )
    )
    assert spec.dataset == ("mixture:modes=2", "mixture:modes=3,dim=4")
    assert spec.separation == (1.0, 2.0)
    assert (spec.duplicates, spec.optimizer) == (("", "2x3"), ("adam", "sgd"))
    assert (spec.tied, spec.batch_size) == ((False, True), (0, 4))
    assert options.spec_from_flags(parse("--no-tied")).tied == (False,)
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' must be true, false"):
        flags.parse_bools("maybe")


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path, suffix):
    path = tmp_path / f"spec{suffix}"
    fields = {"steps": 11, "sigma": [0.1, 0.9], "center": True}
    text = "steps = 11\nsigma = [0.1, 0.9]\ncenter = true\n" if suffix == ".toml" else json.dumps(fields)
    path.write_text(text)
    spec = options.spec_from_flags(parse("--spec", str(path), "--steps", "12", "--no-center"), steps=13, width=(5,))
    assert (spec.steps, spec.sigma, spec.center, spec.width) == (12, (0.1, 0.9), False, (5,))


def test_a_finished_runs_record_is_a_spec_file(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"format": 1, "spec": {**Spec(steps=7).to_dict(), "measures": ["gap"]}}))
    assert options.spec_from_flags(parse("--spec", str(path))) == Spec(steps=7)
    assert options.measures_from_flags(parse("--spec", str(path))) == ["gap"]
    assert options.measures_from_flags(parse("--spec", str(path), "--measures", "norm1")) == ["norm1"]
    path.write_text(json.dumps({"single": {**Spec(steps=8).to_dict(), "measures": "gap"}}))
    assert options.spec_from_flags(parse("--spec", str(path))) == Spec(steps=8)
    with pytest.raises(ValueError, match="measures must be a list of names, got 'gap'"):
        options.measures_from_flags(parse("--spec", str(path)))


def test_bad_spec_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.toml: no such file"):
        options.spec_from_flags(parse("--spec", str(tmp_path / "nowhere.toml")))
    path = tmp_path / "bad.toml"
    path.write_text("steps = ")
    with pytest.raises(ValueError, match="not valid TOML"):
        options.spec_from_flags(parse("--spec", str(path)))
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        options.spec_from_flags(parse("--spec", str(path)))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: no regular file"):
        options.spec_from_flags(parse("--spec", str(tmp_path / "pipe.json")))


@pytest.mark.parametrize("text", ["geom:0.1:2:1000000000", "lin:1:1e300:3", "lin:0:1e400:3", "1e400"])
def test_axes_beyond_bounds_are_refused(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError), match=r"more than 100,000 points|at most|not an axis"):
        Spec(num_samples=flags.parse_ints(text))
