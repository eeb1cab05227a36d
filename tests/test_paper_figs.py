"""Figures: every one computed, drawn and saved in its quick form; a run drawn; numbers beside pictures."""

import json
import pathlib

import numpy as np
import pytest
import xarray as xr
from PIL import Image

import sims
from paper_figs import __main__ as cli
from paper_figs import artifacts, fig_phase_diagram
from sims.sweeps.spec import Spec


def run(*argv):
    return cli._run(cli._parse(["paper_figs", *map(str, argv)]))


# Two figures examine deep networks; one of them stays in the default suite.
FIGURES = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("deep") else n for n in cli.FIGURES]


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_saved_with_its_numbers_and_spec(name, tmp_path, capsys):
    assert run(name, "--quick", "--out", tmp_path) == 0
    assert [pathlib.Path(line).name for line in capsys.readouterr().out.split()] == [
        f"{name}.{s}" for s in ("npz", "json", "png")
    ]
    picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
    assert min(picture.shape) > 300
    # Not one flat color: something was drawn.
    assert picture.std() > 10
    arrays = artifacts.load_arrays(tmp_path / f"{name}.npz")
    assert all(np.all(np.isfinite(a)) for key, a in arrays.items() if a.dtype.kind == "f" and "transition" not in key)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["environment"]["versions"]["jax"]
    assert record["spec"]


def test_the_phase_diagram_of_a_run_shows_the_runs_numbers(tmp_path):
    spec = Spec(num_samples=(2, 8, 64), width=8, sigma=(0.5, 2.0), seeds=2, steps=60, eval_samples=8, eval_draws=2)
    results = sims.sweep(spec, ("gap", "train_error", "held_out_error"), out=tmp_path / "run")
    assert run("phase_diagram", "--run", tmp_path / "run", "--out", tmp_path / "figs") == 0
    arrays = artifacts.load_arrays(tmp_path / "figs" / "phase_diagram.npz")
    np.testing.assert_allclose(arrays["gap"], results.gap.mean("seed").squeeze().values, rtol=1e-6)
    np.testing.assert_array_equal(arrays["num_samples"], [2, 8, 64])
    assert json.loads((tmp_path / "figs" / "phase_diagram.json").read_text())["spec"]["steps"] == 60


def test_a_run_without_the_measures_is_refused(tmp_path, capsys):
    spec = Spec(num_samples=(2, 4), width=2, sigma=0.5, seeds=1, steps=1, eval_samples=2, eval_draws=1)
    sims.sweep(spec, ("train_error",), out=tmp_path / "run")
    assert run("phase_diagram", "--run", tmp_path / "run", "--out", tmp_path) == 2
    assert "needs the measures gap" in capsys.readouterr().err


def test_bad_requests_are_refused(tmp_path, capsys):
    assert run("fig9", "--out", tmp_path) == 2
    assert "known are codes, columns, deep_duplication, deep_series, phase_diagram" in capsys.readouterr().err
    assert run("columns", "--run", tmp_path, "--out", tmp_path) == 2
    assert run("phase_diagram", "--run", tmp_path / "none", "--out", tmp_path) == 2


def test_list_names_every_figure(capsys):
    assert run("list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.FIGURES)


def test_cell_edges_enclose_their_centers():
    centers = np.array([1.0, 2.0, 8.0])
    edges = fig_phase_diagram._edges(centers)
    assert np.all(edges[:-1] < centers)
    assert np.all(centers < edges[1:])
    np.testing.assert_allclose(edges[1:-1] ** 2, centers[:-1] * centers[1:])


def test_a_series_that_is_none_is_refused(tmp_path, capsys):
    spec = Spec(num_samples=(2, 4), width=2, sigma=0.5, seeds=1, steps=1, eval_samples=2, eval_draws=1)
    sims.sweep(spec, ("train_error",), out=tmp_path / "run")
    assert run("deep_series", "--run", tmp_path / "run", "--out", tmp_path) == 2
    assert "no finished run of `python -m scaling transition`" in capsys.readouterr().err


def test_standard_errors_are_over_seeds():
    values = np.arange(12.0).reshape(2, 3, 2) ** 2
    found = artifacts.over_seeds({"a": values, "b": values[:, :1]})
    assert found.keys() == {"a", "a_se", "b"}
    np.testing.assert_allclose(found["a"][1, 0], np.mean([36, 64, 100]))
    np.testing.assert_allclose(found["a_se"][1, 0] ** 2, np.var([36, 64, 100]) / 2)


@pytest.mark.parametrize("gaps", [(0.9, 0.1), (0.9, 0.8), (0.2, 0.1)])
def test_words_stand_only_where_the_numbers_say_so(gaps):
    dims = {"num_samples": [2, 8, 32], "sigma": [0.5, 1.0], "penalty": [0.1, 0.2], "seed": [0, 1], "step": [5]}
    values = np.ones([len(labels) for labels in dims.values()])
    results = xr.Dataset({name: (tuple(dims), values) for name in fig_phase_diagram._MEASURES}, dims)
    results["gap"] = results.gap * xr.DataArray(np.linspace(*gaps, 3), dims="num_samples")
    results["gap"][:, :, :, 1] = np.nan
    arrays = fig_phase_diagram._reduced(results)
    # One of two seeds is done, and the first of two penalties is drawn.
    assert int(arrays["seeds"]) == 1
    figure = fig_phase_diagram.draw(arrays)
    words = {text.get_text() for text in figure.axes[0].texts}
    holds = {"memorizes": gaps[0] > 0.5, "generalizes": gaps[1] < 0.5}
    assert words == {word for word, held in holds.items() if held}
    assert figure.get_suptitle() == "at penalty = 0.1, of several values"
