"""What is measured of trained models, against networks whose answers are known; series: resumed, continued, refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paper_figs import __main__ as figures
from paper_figs.artifacts import load_arrays
from scaling import __main__ as cli
from scaling import initialize
from scaling.bridge.loading import Pipeline
from scaling.commands import series as series_command
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.samplers import sample
from scaling.diffusion.schedules import from_config
from scaling.measures.jacobian import full_jacobian
from scaling.study import examination, series
from scaling.study.examination import Setting, examine, sampled_prompts, variables
from scaling.training import corpus
from scaling.training.architectures import network_config, scheduler_config
from scaling.training.captions import KINDS, from_labels
from scaling.training.corpus import GROUPS
from scaling.training.run import TrainSpec, read_corpus, read_spec, train
from sims import store

SMALL = Setting(samples=4, sampler_steps=2, images=3, jacobians=2, draws=2, sigmas=(0.5, 1.5), fits=1, units=(2,))
BASE = TrainSpec(channels=(8,), batch_size=2, steps=2)
NET = ["--channels", "8", "--batch-size", "2", "--quiet"]
LOOK = "--samples 4 --sampler-steps 2 --images 3 --jacobians 2 --draws 2 --sigma 0.5,1.5 --fits 1 --units 2".split()


def run(*argv):
    """The exit code of a command in this process."""
    args = cli._parse(["scaling", *map(str, argv)])
    return args.run(args)


@pytest.fixture(scope="module")
def digits():
    return corpus.load("digits", duplicates="5x4", singles=20, held_out=60)


@pytest.fixture(scope="module")
def silent(digits):
    """A network that sees no noise at all: every weight is 0, so D(y, σ) = y."""
    model = initialize(jax.random.key(0), network_config("unet2d", digits.images.shape[1:], channels=(8,)))
    model = dataclasses.replace(model, params={name: jnp.zeros_like(value) for name, value in model.params.items()})
    return Pipeline(model, from_config(scheduler_config()), None, (), (), {})


@pytest.fixture(scope="module")
def of_silent(silent, digits):
    setting = SMALL._replace(images=20, draws=4)
    return setting, examine(jax.random.key(0), silent, digits, setting)


def test_a_network_that_returns_its_input_has_the_noise_as_error_and_the_identity_as_jacobian(of_silent):
    setting, found = of_silent
    d = 64
    for at, group in enumerate(GROUPS):
        # Duplicated are 5 images: fewer draws.
        draws = setting.draws * min(setting.images, 5 if group == "duplicated" else 20)
        for level, sigma in enumerate(setting.sigmas):
            spread = sigma**2 * np.sqrt(2 * d / draws)
            assert abs(found["error"][at, level] - sigma**2 * d) < 5 * spread
            # One set of draws at every level.
            np.testing.assert_allclose(found["error"][at, level] / sigma**2, found["error"][at, 0] / 0.25, rtol=1e-4)
    np.testing.assert_allclose(found["jacobian_rank"], d, rtol=1e-5)
    np.testing.assert_allclose(found["jacobian_energy"], d, rtol=1e-5)
    np.testing.assert_array_equal(found["jacobian_kept"], d)


def test_the_same_network_has_silent_codes_that_tell_nothing(of_silent):
    _, found = of_silent
    np.testing.assert_array_equal(found["std"], 0)
    np.testing.assert_array_equal(found["auroc_std"][:2], 0.5)
    assert np.all(np.isnan(found["auroc_std"][2]))
    np.testing.assert_allclose(found["copy_share"], found["copied"].mean(axis=1))


def test_every_sampler_starts_from_the_same_noise(of_silent, silent):
    setting, found = of_silent
    sample_key = jax.random.split(jax.random.key(0), 3)[0]
    for k, eta in enumerate(setting.etas):
        drawn = sample(
            jax.random.clone(sample_key),
            silent.network,
            silent.schedule,
            setting.samples,
            setting.sampler_steps,
            method="ddim",
            eta=eta,
        )
        np.testing.assert_allclose(found["samples"][k], np.clip(drawn.x, -1, 1), rtol=1e-6)
    assert not np.array_equal(*found["samples"])


def test_everything_listed_is_returned_with_the_shape_that_is_listed(of_silent, digits):
    setting, found = of_silent
    listed = variables(setting, digits.images.shape[1:])
    assert found.keys() == listed.keys()
    for name, (dims, _) in listed.items():
        assert np.shape(found[name]) == tuple(map(len, dims.values())), name


def test_distances_are_of_the_optima(silent, digits, monkeypatch):
    """With the optimum of the training set in the network's place its distance is 0, and only its."""
    images = jnp.asarray(digits.images[corpus.training_rows(digits)].reshape(-1, 64))
    from dae_theory import empirical_denoiser

    def optimum(network, schedule, **condition):
        return lambda y, sigma: empirical_denoiser(y, sigma, images)

    monkeypatch.setattr(examination, "as_denoiser", optimum)
    examination._compiled.cache_clear()
    jax.clear_caches()
    found = examine(jax.random.key(0), silent, digits, SMALL)
    examination._compiled.cache_clear()
    assert np.max(found["distance_to_empirical"]) < 1e-6
    assert np.min(found["distance_to_population"]) > 0.1
    # It gives trained images back at little noise, and others not: the error tells them apart.
    assert np.all(found["auroc_error"][:2, 0] == 1)


def test_every_kind_of_prompt_is_sampled_equally_often():
    captions = from_labels(corpus.load("digits", duplicates="6x4", variants="2x2", singles=20, held_out=20))
    kinds = np.asarray(captions.kinds)[sampled_prompts(captions, 30)]
    assert [int(np.sum(kinds == kind)) for kind in KINDS] == [10, 10, 10]
    # Four verbatim prompts by turns.
    verbatim = [i for i in sampled_prompts(captions, 30) if captions.kinds[i] == "verbatim"]
    assert verbatim[:4] == verbatim[4:8]
    assert len(set(verbatim)) == 4


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


def test_a_series_equals_looking_at_its_folders(over_n):
    out, _ = over_n
    from scaling import load_pipeline

    folder = out / "models/n00006-seed0-half1"
    spec = read_spec(folder)
    found = examine(jax.random.fold_in(jax.random.key(0), 2), load_pipeline(folder), read_corpus(spec), SMALL)
    here = store.load(out).isel(num_samples=1, seed=0, half=1)
    for name in ("error", "jacobian_rank", "std", "copied", "samples"):
        np.testing.assert_array_equal(here[name].values, found[name], err_msg=name)


def test_the_two_layer_networks_stand_beside_them(over_n):
    out, _ = over_n
    shallow = store.load(out / "two_layer")
    assert shallow.num_samples.values.tolist() == [3, 6]
    assert shallow.sigma.values.tolist() == [0.5, 1.5]
    summary = (out / "summary.md").read_text()
    assert "gap, two layers" in summary
    assert summary.count("\n| ") == 3
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


def test_longer_trainings_go_on_from_shorter_ones(tmp_path):
    setting = SMALL._replace(samples=2)
    results = series.duplication(BASE, ("4x3",), (1, 3), tmp_path, seeds=1, setting=setting)
    straight = train(read_spec(tmp_path / "models/4x3-seed0-steps3"), tmp_path / "straight")
    there = tmp_path / "models/4x3-seed0-steps3/unet/diffusion_pytorch_model.safetensors"
    assert there.read_bytes() == (straight / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "models/4x3-seed0-steps1/training.json").read_text())["trained"] == 1
    assert results.steps.values.tolist() == [1, 3]
    assert bool(np.isfinite(results.error).all())
    assert not np.array_equal(results.error[0, 0, 0], results.error[0, 0, 1])
    # The tables tell what is stored.
    lines = series_command.duplication_lines(results)
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


def test_a_jacobian_is_that_of_the_denoiser(digits):
    """A trained network's, one image and level, without the batches of :func:`examine`."""
    model = initialize(jax.random.key(3), network_config("unet2d", digits.images.shape[1:], channels=(8,)))
    pipeline = Pipeline(model, from_config(scheduler_config()), None, (), (), {})
    setting = SMALL._replace(images=1, jacobians=1, draws=1, sigmas=(0.7,))
    found = examine(jax.random.key(5), pipeline, digits, setting)
    _, noise_key, _ = jax.random.split(jax.random.key(5), 3)
    key = jax.random.fold_in(noise_key, GROUPS.index("held_out"))
    x = jnp.asarray(digits.held_out[0].reshape(-1))
    y = x + 0.7 * jax.random.normal(jax.random.fold_in(key, 0), x.shape, x.dtype)
    denoiser = as_denoiser(model, pipeline.schedule)
    whole = np.asarray(full_jacobian(denoiser, y, 0.7), np.float64)
    error = np.sum(np.square(np.asarray(denoiser(y, 0.7) - x, np.float64)))
    np.testing.assert_allclose(found["jacobian_energy"][2, 0], np.sum(whole**2), rtol=1e-4)
    np.testing.assert_allclose(found["error"][2, 0], error, rtol=1e-4)
