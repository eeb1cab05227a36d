"""Series of trainings: what they store and summarize, resumed, continued, refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from quick_fits import few_draws as few_draws
from scaling_commands import run

from paper_figs import __main__ as figures
from paper_figs.artifacts import load_arrays
from scaling import load_pipeline
from scaling.commands import duplication as duplication_command
from scaling.measures.copies import share_over_networks
from scaling.study import series
from scaling.study.examination import examine
from scaling.study.settings import ExaminationSetting
from scaling.training.run import read_corpus, read_spec, train
from scaling.training.spec import TrainSpec
from sims import store

pytestmark = pytest.mark.tiny

# The setting of test_scaling_study_examination.py, so that the compiler's cache serves both.
SMALL = ExaminationSetting(
    samples=4, sampler_steps=2, images=20, jacobians=2, draws=4, sigmas=(0.5, 1.5), fits=1, units=(2,)
)
BASE = TrainSpec(channels=(8,), batch_size=2, steps=2)
NET = ["--channels", "8", "--batch-size", "2", "--quiet"]
LOOK = "--samples 4 --sampler-steps 2 --images 20 --jacobians 2 --draws 4 --sigma 0.5,1.5 --fits 1 --units 2".split()


def test_agreement_is_the_cosine_about_the_mean():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 400, 1, 8, 8))
    mean = random.standard_normal((1, 8, 8))
    assert series.agreement(a, a, mean)[0] == pytest.approx(1, abs=1e-12)
    assert series.agreement(a, 2 * mean - a, mean)[0] == pytest.approx(-1, abs=1e-12)
    same, chance = series.agreement(a, b, 0 * mean)
    # The cosine of two Gaussian vectors of 64 entries has variance 1/64.
    assert max(abs(same), abs(chance)) < 5 / 8 / np.sqrt(400)


@pytest.fixture(scope="module")
def over_n(tmp_path_factory):
    out = tmp_path_factory.mktemp("transition")
    asked = ["--num-samples", "3,6", "--seeds", 1, "--steps", 2, *NET, *LOOK, "--out", out]
    assert run("transition", *asked) == 0
    return out, asked


def test_a_series_over_n_trains_disjoint_halves_and_keeps_what_was_found(over_n):
    out, _ = over_n
    results = store.load(out)
    assert dict(results.sizes) | {"num_samples": 2, "seed": 1, "half": 2} == dict(results.sizes)
    assert bool(results.done.all())
    # The identity of runs made by earlier versions; they must resume.
    spec = store.read_spec(out)["spec"]
    assert spec["setting"] == {
        "samples": 4,
        "sampler_steps": 2,
        "etas": [0.0, 1.0],
        "images": 20,
        "jacobians": 2,
        "draws": 4,
        "sigmas": [0.5, 1.5],
        "timestep": 50,
        "taps": ["up_blocks.0.resnets.0", "up_blocks.0.resnets.1"],
        "fits": 1,
        "units": [2],
        "source": "mid_block",
    }
    assert spec["train"] == {
        "arch": "unet2d",
        "singles": 0,
        "variants": "",
        "resolution": None,
        "gray": False,
        "skip_bad": False,
        "channels": [8],
        "layers": 1,
        "heads": 8,
        "patch_size": 2,
        "text_channels": 32,
        "text_layers": 2,
        "prediction": "epsilon",
        "timesteps": 1000,
        "beta_schedule": "linear",
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 0.001,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "warmup": 0,
        "clip": 0.0,
        "ema": 0.995,
        "prompt_dropout": 0.1,
    }
    rows = {}
    for half in (0, 1):
        spec = read_spec(out / "models" / f"n00006-seed0-half{half}")
        rows[half] = set(read_corpus(spec).rows.tolist())
        other = read_corpus(read_spec(out / "models/n00003-seed0-half0"))
        assert read_corpus(spec).held_out_rows.tolist() == other.held_out_rows.tolist()
    assert not rows[0] & rows[1]
    assert set(read_corpus(read_spec(out / "models/n00003-seed0-half1")).rows.tolist()) < rows[1]
    train, held_out = (results.error.sel(group=group) for group in ("train", "held_out"))
    np.testing.assert_allclose(results.gap, 1 - train / held_out, rtol=1e-5)
    assert bool(np.isnan(results.error.sel(group="duplicated")).all())
    both = results.samples.isel(seed=0, num_samples=1, eta=0).values
    expected = series.agreement(both[0], both[1], read_corpus(spec).held_out.mean(axis=0))
    np.testing.assert_allclose([results.agreement[1, 0], results.agreement_unpaired[1, 0]], expected, rtol=1e-5)


def test_a_series_may_be_moved_and_have_any_name(over_n, tmp_path):
    out, asked = over_n
    moved = tmp_path / "what? it & that"
    shutil.copytree(out, moved)
    before = (moved / "summary.md").read_text()
    # Nothing is left to compute, and nothing is refused.
    assert run("transition", *asked[:-1], moved) == 0
    assert (moved / "summary.md").read_text() == before
    assert str(out) not in (moved / "two_layer" / "spec.json").read_text()


@pytest.mark.slow
def test_a_series_equals_looking_at_its_folders(over_n):
    out, _ = over_n
    folder = out / "models/n00006-seed0-half1"
    spec = read_spec(folder)
    expected = examine(jax.random.fold_in(jax.random.key(0), 2), load_pipeline(folder), read_corpus(spec), SMALL)
    here = store.load(out).isel(num_samples=1, seed=0, half=1)
    for name, variable in expected.data_vars.items():
        np.testing.assert_array_equal(here[name], variable.astype(here[name].dtype), err_msg=str(name))
        assert here[name].dims == variable.dims


def test_the_two_layer_networks_stand_beside_them(over_n):
    out, _ = over_n
    shallow = store.load(out / "two_layer")
    assert shallow.num_samples.values.tolist() == [3, 6]
    assert shallow.sigma.values.tolist() == [0.5, 1.5]
    summary = (out / "summary.md").read_text()
    assert "gap, two layers" in summary
    # Two halves of four samples of one seed: none of eight is a copy, or so many that the interval says so.
    copied = store.load(out).copied.isel(eta=0, num_samples=0, seed=0).sum().item()
    share = share_over_networks([copied], [8])
    assert f"| 3 | {share.share:.3f} ({share.low:.3f} to {share.high:.3f}) |" in summary
    assert summary.count("\n| ") == 3
    # Both distances at both groups, each under a head that names it.
    head, row = ([cell.strip() for cell in line.split("|")] for line in summary.splitlines()[2:5:2])
    results = store.load(out).sel(num_samples=3, seed=0, sigma=1.5).mean("half")
    for optimum, name in (("emp", "empirical"), ("pop", "population")):
        for group in ("training", "held-out"):
            value = results[f"distance_to_{name}"].sel(group="train" if group == "training" else "held_out").item()
            assert row[head.index(f"‖D − D_{optimum}‖² at {group} images")] == f"{value:.3g}"
    assert (out / "samples.png").exists()


def test_its_figure_shows_its_numbers(over_n, tmp_path):
    out, _ = over_n
    figures.make("deep_series", tmp_path, run=str(out))
    arrays, results = load_arrays(tmp_path / "deep_series.npz"), store.load(out)
    np.testing.assert_allclose(arrays["agreement"], results.agreement.mean("seed"), rtol=1e-6)
    expected = results.jacobian_rank.sel(group="held_out", sigma=1.5).mean(["half", "seed"])
    np.testing.assert_allclose(arrays["rank_held_out"], expected, rtol=1e-5)
    assert arrays["sigma"] == 1.5


def test_the_same_command_again_computes_nothing(over_n, monkeypatch):
    _, asked = over_n
    monkeypatch.setattr(series, "_examined", None)
    assert run("transition", *asked) == 0


def test_a_figure_of_another_series_is_refused(over_n, tmp_path):
    out, _ = over_n
    with pytest.raises(ValueError, match="no finished run of `python -m scaling duplication`"):
        figures.make("deep_duplication", tmp_path, run=str(out))


def test_another_experiment_in_its_folder_is_refused(over_n, capsys):
    _, asked = over_n
    assert run("transition", *asked, "--draws", 3) == 2
    assert "another experiment" in capsys.readouterr().err


@pytest.mark.slow
def test_longer_trainings_go_on_from_shorter_ones(tmp_path):
    results = series.duplication(BASE, ("4x3",), (1, 3), tmp_path, seeds=1, setting=SMALL)
    straight = train(read_spec(tmp_path / "models/4x3-seed0-steps3"), tmp_path / "straight")
    continued = tmp_path / "models/4x3-seed0-steps3/unet/diffusion_pytorch_model.safetensors"
    assert continued.read_bytes() == (straight / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "models/4x3-seed0-steps1/training.json").read_text())["trained"] == 1
    assert results.steps.values.tolist() == [1, 3]
    assert bool(np.isfinite(results.error).all())
    assert not np.array_equal(results.error[0, 0, 0], results.error[0, 0, 1])
    # The tables show what is stored.
    lines = duplication_command.summary(results).splitlines()
    (copies,) = [line.split(" | ") for line in lines if line.startswith("| 4x3 | 3 | ")]
    shares = [float(copies[at].split()[0]) for at in (2, 4)]
    np.testing.assert_allclose(shares, results.copied.sel(steps=3).mean("sample").values.reshape(-1), atol=5e-4)
    (fits,) = [line.split(" | ") for line in lines if line.startswith("| 4x3 | block | held_out | ")]
    expected = results.fit_error.sel(fitted="block", group="held_out", steps=3).item()
    assert float(fits[3]) == pytest.approx(expected, rel=5e-3)
    # And so does the figure.
    figures.make("deep_duplication", tmp_path / "figures", run=str(tmp_path))
    arrays = load_arrays(tmp_path / "figures/deep_duplication.npz")
    np.testing.assert_array_equal(arrays["copies"], results.copy_share.squeeze().values)
    np.testing.assert_array_equal(arrays["kept"], results.jacobian_kept.sel(sigma=0.5).squeeze().values)
    np.testing.assert_array_equal(arrays["fit_error"], results.fit_error.sel(fitted="denoiser").squeeze().values)
    assert arrays["steps"].tolist() == [1, 3]


@pytest.mark.slow
def test_processes_side_by_side_and_the_command_find_the_same(tmp_path):
    asked = ["--duplicates", "4x3,2x6", "--singles", 30, "--steps", "1,2", "--seeds", 1, *NET, *LOOK]
    assert run("duplication", *asked, "--out", tmp_path / "one") == 0
    assert run("duplication", *asked, "--workers", 2, "--out", tmp_path / "two") == 0
    one, two = (store.load(tmp_path / name) for name in ("one", "two"))
    # Another number of threads may sum in another order.
    np.testing.assert_allclose(one.error, two.error, rtol=1e-4)
    assert "| 4x3 | 2 |" in (tmp_path / "one/summary.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["transition", "--num-samples", "10,5"], "must increase"),
        (["transition", "--num-samples", "1,5"], "at least 2"),
        (["transition", "--num-samples", "10,900"], "two disjoint halves of 900"),
        (["transition", "--num-samples", "10,20", "--draws", "0"], "draws"),
        (["transition", "--num-samples", "10,20", "--timestep", "1000"], "timestep"),
        (["transition", "--num-samples", "10,20", "--sigma", "0"], "sigmas"),
        (["transition", "--num-samples", "10,20", "--seeds", "0"], "seeds"),
        (["transition", "--num-samples", "10,20", "--workers", "0"], "workers"),
        (["transition", "--num-samples", "10,20", "--eta", "0,1.5"], "etas must lie in [0, 1], got 0.0, 1.5"),
        (["transition", "--num-samples", "10,20", "--eta", "1,1"], "none twice"),
        (["transition", "--num-samples", "10,20", "--units", "0"], "units"),
        (["transition", "--num-samples", "10,20", "--fits", "0"], "fits"),
        (["transition", "--num-samples", "10,20", "--source", "mid_blok"], "no tap named 'mid_blok'"),
        (["transition", "--num-samples", "10,20", "--taps", "mid_block"], "before the source"),
        (["transition", "--num-samples", "10,20", "--taps", "up_blocks.0.resnets.0,mid_blok"], "'mid_block'"),
        (["duplication", "--arch", "dit", "--channels", "8", "--heads", "2"], "no tap named 'up_blocks.0.resnets.0'"),
        (["duplication", "--steps", "20,10"], "steps must increase"),
        (["duplication", "--duplicates", "20x60,20x60"], "different"),
        (["duplication", "--duplicates", "20by60"], "20by60"),
        (["duplication", "--images", "900"], "held out"),
    ],
)
def test_bad_input_is_refused(flags, message, tmp_path, capsys):
    assert run(*flags, *NET, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_equal_rows_count_once_where_halves_are_disjoint(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=np.concatenate([images, images[:10]]))
    flags = ["--dataset", tmp_path / "a.npz", "--num-samples", "4,10", *NET, *LOOK, "--out", tmp_path / "out"]
    assert run("transition", *flags) == 2
    assert "two disjoint halves of 10 leave 10 to hold out" in capsys.readouterr().err
