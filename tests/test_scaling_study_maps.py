"""Maps over layers, timesteps and pooling: values are those of codes, and places are rated with intervals."""

import csv

import jax
import numpy as np
import pytest
import scaling_commands
import xarray as xr

from dae_theory.spikiness import MEASURES
from scaling import zoo
from scaling.detection.evaluation import auroc
from scaling.measures.codes import codes
from scaling.study import maps
from scaling.study.items import Items, Prompt, of_prompts

TAPS = ("mid_block", "up_blocks.0.resnets.1")


@pytest.fixture(scope="module")
def pipeline():
    return zoo.load("digits-10")


@pytest.fixture(scope="module")
def items():
    images = np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    return Items(images, (), ("members",) * 2 + ("others",) * 3, tuple("abcde"))


@pytest.mark.slow
def test_every_place_has_the_measures_of_its_codes(pipeline, items, tmp_path):
    """One pass for all layers gives what a pass for each gives; batches make no difference."""
    found = maps.score_maps(pipeline, items, tmp_path, taps=TAPS, timesteps=(10, 200), seed=4, batch_size=3)
    assert found["std"].dims == ("image", "timestep", "tap", "pool")
    for t, pool in ((10, "max"), (200, "mean")):
        slow = codes(jax.random.key(4), pipeline.network, pipeline.schedule, items.images, TAPS, t, pool=pool)
        for tap in TAPS:
            for name, measure in MEASURES.items():
                expected = jax.vmap(measure)(slow[tap])
                here = found[name].sel(timestep=t, tap=tap, pool=pool)
                np.testing.assert_allclose(here, expected, rtol=2e-4, err_msg=f"{name} {tap}")
    places = maps.rate(found)
    assert len(places) == 5 * 2 * 2 * 2
    # Spiky codes have a low participation ratio.
    for place in [place for place in places if place.measure == "participation_ratio"]:
        here = found.participation_ratio.sel(timestep=place.timestep, tap=place.tap, pool=place.pool)
        values = -here.values.astype(float)
        assert place.area.value == auroc(values[:2], values[2:])
    # Too few of each to choose on a half.
    assert "| - | - |" in maps.report(found, places)


def test_the_best_place_is_chosen_on_one_half_and_rated_on_the_other():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(80, 2, 3, 2))
    values[:40, 1, 2, 0] += 4
    coords = {"timestep": [10, 50], "tap": list("abc"), "pool": ["max", "mean"]}
    results = xr.Dataset(
        dict.fromkeys(MEASURES, (("image", "timestep", "tap", "pool"), values)),
        {"image": range(80), "group": ("image", ["duplicated"] * 40 + ["held_out"] * 40), **coords},
    )
    text = maps.report(results, maps.rate(results))
    assert "| std | 50 | c | max | 0.9" in text or "| std | 50 | c | max | 1.0" in text
    assert "t = 50, c, max" in text
    assert "## Against held out" in text


def test_all_layers_have_positions(pipeline):
    taps = maps.all_taps(pipeline.network)
    shapes = pipeline.network.apply.taps(np.float32)
    assert TAPS[0] in taps
    assert all(len(shapes[name].shape) > 2 for name in taps)
    assert "time_embedding.linear_1" not in taps


def test_the_command_writes_a_map(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["ablate", "digits-10", "--train", "digits", "--num", 4, "--out", out, "--quiet"]
    command += ["--layers", "mid_block", "--timesteps", "50", "--pools", "max"]
    assert scaling_commands.run(*command) == 0, capsys.readouterr().err
    # The ten images of this model were trained on once: none counts as memorized.
    assert "No place can be rated" in (out / "summary.md").read_text()
    (head,) = csv.reader((out / "map.csv").open())
    assert head[:4] == ["negatives", "measure", "timestep", "tap"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "mid_blok"], "mid_block"),
        (["--pools", "none"], "pools must be among"),
        (["--timesteps", "50,50"], "none twice"),
        (["--timesteps", "1000"], "timesteps"),
    ],
)
def test_bad_input_is_told(flags, message, tmp_path, capsys):
    command = ["ablate", "digits-10", "--train", "digits", "--num", 2, "--layers", "mid_block", "--quiet"]
    assert scaling_commands.run(*command, "--out", tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_prompts_alone_have_no_map(pipeline, tmp_path):
    with pytest.raises(ValueError, match="maps are of images"):
        maps.score_maps(pipeline, of_prompts([Prompt("a", "")], "images"), tmp_path)
