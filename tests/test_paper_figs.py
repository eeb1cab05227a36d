"""Figures: every one computed, drawn and saved in its quick form; a run drawn; numbers beside pictures."""

import csv
import importlib
import json
import pathlib

import matplotlib.text
import numpy as np
import pytest
import scaling_commands
import xarray as xr
from PIL import Image

import sims
from paper_figs import __main__ as cli
from paper_figs import artifacts, fig_deep_duplication, fig_deep_series, fig_phase_diagram, networks
from sims.sweeps.spec import Spec

pytestmark = pytest.mark.tiny


def run(*argv):
    return cli._run(cli._parse(["paper_figs", *map(str, argv)]))


# These compile deep networks, or train on many rows: `codes` and `columns` are made below from one step.
LONG = ("deep", "detection", "codes", "columns")
FIGURES = [pytest.param(n, marks=pytest.mark.slow) if n.startswith(LONG) else n for n in cli.FIGURES]


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
    assert f"known are {', '.join(cli.FIGURES)} (or list, all)" in capsys.readouterr().err
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
    assert found.keys() == {"a", "a_se", "b", "seeds"}
    assert int(found["seeds"]) == 3
    np.testing.assert_allclose(found["a"][1, 0], np.mean([36, 64, 100]))
    np.testing.assert_allclose(found["a_se"][1, 0] ** 2, np.var([36, 64, 100]) / 2)


@pytest.mark.parametrize("gaps", [(0.9, 0.1), (0.9, 0.8), (0.2, 0.1)])
def test_words_stand_only_where_the_numbers_say_so(gaps):
    dims = {"num_samples": [2, 8, 32], "sigma": [0.5, 1.0], "penalty": [0.1, 0.2], "seed": [0, 1], "step": [5]}
    values = np.ones([len(labels) for labels in dims.values()])
    results = xr.Dataset({name: (tuple(dims), values) for name in fig_phase_diagram._MEASURES}, dims)
    results["gap"] = results.gap * xr.DataArray(np.linspace(*gaps, 3), dims="num_samples")
    results["gap"][:, :, :, 1] = np.nan
    arrays = fig_phase_diagram._reduced(results, ["penalty=0.1"])
    # One of two seeds is done.
    assert int(arrays["seeds"]) == 1
    figure = fig_phase_diagram.draw(arrays)
    words = {text.get_text() for text in figure.axes[0].texts}
    holds = {"memorizes": gaps[0] > 0.5, "generalizes": gaps[1] < 0.5}
    assert words == {word for word, held in holds.items() if held}
    assert figure.get_suptitle() == "penalty 0.1, step 5"


def several(**axes):
    """Results of a sweep over these axes, whose gap falls with n."""
    dims = {"num_samples": [2, 8, 32], "sigma": [0.5, 1.0], **axes, "seed": [0, 1], "step": [5, 10]}
    values = np.ones([len(labels) for labels in dims.values()])
    results = xr.Dataset({name: (tuple(dims), values) for name in fig_phase_diagram._MEASURES}, dims)
    results["gap"] = results.gap * xr.DataArray([0.9, 0.6, 0.1], dims="num_samples")
    for axis, labels in axes.items():
        # Another gap at every value.
        results["gap"] = results.gap * xr.DataArray(0.9 ** np.arange(len(labels)), dims=axis)
    return results


def test_one_axis_of_several_values_is_drawn_as_facets():
    results = several(penalty=[0.1, 0.2, 0.4], duplicates=[""])
    arrays = fig_phase_diagram._reduced(results)
    assert arrays["gap"].shape == (3, 3, 2)
    np.testing.assert_allclose(arrays["gap"][2, 0, 0], 0.9 * 0.81)
    figure = fig_phase_diagram.draw(arrays)
    shown = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert shown == ["penalty 0.1", "penalty 0.2", "penalty 0.4"]
    assert figure.get_suptitle().endswith("duplicates none, step 10")
    assert "95 % interval over seeds" in figure.get_suptitle()


def test_values_are_selected_by_their_axis():
    results = several(penalty=[0.1, 0.2], duplicates=["", "4x16"])
    arrays = fig_phase_diagram._reduced(results, ["penalty=.2", "duplicates=4x16", "step=5"])
    np.testing.assert_allclose(arrays["gap"][:, 0], np.array([0.9, 0.6, 0.1]) * 0.81)
    assert str(arrays["fixed"]) == "penalty 0.2, duplicates 4x16, step 5"
    arrays = fig_phase_diagram._reduced(results, ["duplicates=none"])
    assert (str(arrays["facet"]), list(arrays["facet_values"])) == ("penalty", ["0.1", "0.2"])
    for select, message in (
        ([], r"penalty: 0.1, 0.2; duplicates: none, 4x16\): choose, as in --select penalty=0.1"),
        (["penalti=0.1"], "no axis 'penalti' to choose from, did you mean penalty"),
        (["penalty=0.3"], "penalty has the values 0.1, 0.2"),
        (["sigma=0.5"], "no axis 'sigma'"),
    ):
        with pytest.raises(ValueError, match=message):
            fig_phase_diagram._reduced(results, select)
    with pytest.raises(ValueError, match="one axis of at most 6 values"):
        fig_phase_diagram._reduced(several(width=[*range(1, 8)]))


def test_pictures_come_in_several_formats_and_the_same_bytes(tmp_path, capsys):
    spec = Spec(num_samples=(2, 4), width=2, sigma=0.5, seeds=1, steps=1, eval_samples=2, eval_draws=1)
    sims.sweep(spec, ("gap", "train_error", "held_out_error"), out=tmp_path / "run")
    asked = ("phase_diagram", "--run", tmp_path / "run", "--select", "width=2", "--format", "png,svg,pdf", "--out")
    for out in ("a", "b"):
        assert run(*asked, tmp_path / out) == 0
    assert [pathlib.Path(line).suffix for line in capsys.readouterr().out.split()[:5]] == [
        ".npz", ".json", ".png", ".svg", ".pdf"
    ]  # fmt: skip
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        picture = (tmp_path / "a" / f"phase_diagram.{kind}").read_bytes()
        assert picture.startswith(start)
        assert picture == (tmp_path / "b" / f"phase_diagram.{kind}").read_bytes()
    assert json.loads((tmp_path / "a" / "phase_diagram.json").read_text())["spec"]["select"] == ["width=2"]
    for more, message in (
        (["--format", "gif"], "unknown format 'gif'; choose from png, pdf, svg"),
        (["--select", "width=3"], "width has the values 2"),
    ):
        assert run(*asked[:3], *more, "--out", tmp_path / "c") == 2
        assert message in capsys.readouterr().err
    assert run("columns", "--select", "width=2", "--out", tmp_path) == 2
    assert "columns has no axes to select from" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("columns", "--out", tmp_path / "file") == 2
    assert "is a file: choose a folder" in capsys.readouterr().err


def test_deep_figures_say_what_their_bars_are_and_label_every_axis():
    rng = np.random.default_rng(0)
    names = ("copies", "gap", "gap_two_layer", "spikiness", "spikiness_two_layer", "rank_train", "rank_held_out")
    names += ("to_empirical", "to_population", "agreement", "chance")
    series = artifacts.over_seeds({name: rng.uniform(0.1, 1, (2, 3)) for name in names})
    series |= {"num_samples": np.array([10, 30]), "sigma": np.asarray(1.0)}
    curves = {name: rng.uniform(0.1, 1, (2, 3)) for name in ("auroc_std", "auroc_l4_over_l2", "auroc_error")}
    curves |= {"copies": rng.uniform(size=(2, 3, 2))}
    curves |= {name: rng.uniform(0.1, 1, (2, 3, 3)) for name in ("kept", "fit_error")}
    repeated = artifacts.over_seeds(curves) | {"steps": np.array([10, 20]), "etas": np.array([0.0, 1.0])}
    repeated |= {"units": np.asarray(1), "sigma": np.asarray(0.25)}
    for draw, arrays in ((fig_deep_series.draw, series), (fig_deep_duplication.draw, repeated)):
        with matplotlib.rc_context(fname=artifacts.STYLE):
            figure = draw(arrays)
            figure.canvas.draw()
        assert figure.get_suptitle() == "means over 3 seeds; bars: ± one standard error over seeds"
        assert all(axis.get_ylabel() for axis in figure.axes)
        for axis in figure.axes:
            # No point lies under the legend.
            box = axis.get_legend().get_window_extent()
            for line in axis.get_lines():
                if len(line.get_xdata()) == 2 and line.get_marker() == "o":
                    points = axis.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
                    assert not any(box.contains(*point) for point in points)
    assert artifacts.bars({"seeds": np.asarray(1)}) == "one seed, no error bars"


@pytest.mark.parametrize("name", ["columns", "codes"])
def test_figures_of_two_layers_name_n_sigma_and_the_regime_of_their_numbers(name, tmp_path, monkeypatch):
    """The words are those of the measured gap, also where training was too short for the case's name."""
    module = importlib.import_module(f"paper_figs.fig_{name}")
    case = {"dataset": "digits", "width": 4, "sigma": 0.5, "seeds": 1, "steps": 1, "num_samples": 4}
    trained = networks.train(Spec.from_dict(case))
    assert trained.gap < 0.5
    assert trained.caption == f"n = 4, σ = 0.5, width 4; generalizes (gap {trained.gap:.2f})"
    # Steps so large that the weights are no longer finite: said, and no word for a regime.
    with pytest.raises(ValueError, match="non-finite entries"):
        networks.train(Spec.from_dict(case | {"learning_rate": 1e30, "steps": 4}))
    cases = dict.fromkeys(module.SPEC["cases"], case)
    small = module.QUICK | {"columns": 2, "noisy": 4, "cases": cases}
    figure = module.draw(module.compute(small))
    texts = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    assert texts.count(trained.caption) == len(cases)
    # And so does the command.
    monkeypatch.setattr(module, "QUICK", small)
    assert run(name, "--quick", "--out", tmp_path) == 0
    assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 10
    assert json.loads((tmp_path / f"{name}.json").read_text())["spec"] == json.loads(json.dumps(small))


@pytest.mark.slow
def test_maps_of_a_run_are_drawn_as_they_are_rated(tmp_path, capsys):
    """Areas are those of map.csv, each at its measure, timestep, pooling and layer."""
    out = tmp_path / "run"
    command = ["ablate", "digits", "--train", "digits", "--num", 6, "--layers", "mid_block,up_blocks.0.resnets.0"]
    assert scaling_commands.run(*command, "--timesteps", "50,200", "--out", out, "--quiet") == 0, (
        capsys.readouterr().err
    )
    assert run("detection_map", "--run", out, "--out", tmp_path) == 0
    arrays = artifacts.load_arrays(tmp_path / "detection_map.npz")
    names = {name: arrays[name].tolist() for name in ("measures", "timesteps", "pools", "taps")}
    with (out / "map.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["negatives"] == "held_out"]
    for row in rows:
        if row["measure"] in names["measures"]:
            where = [
                names[axis].index(value)
                for axis, value in (
                    ("measures", row["measure"]),
                    ("timesteps", int(row["timestep"])),
                    ("pools", row["pool"]),
                    ("taps", row["tap"]),
                )
            ]
            assert arrays["area"][(*where, 0)] == pytest.approx(float(row["area"]))
    assert np.isfinite(arrays["area"]).all()
    assert arrays["counts"].tolist() == [6, 6]


@pytest.mark.slow
def test_detectors_of_a_run_are_drawn_as_they_are_rated(tmp_path, capsys):
    """Areas are those of the run's report; a run in which nothing is known rates nothing."""
    out = tmp_path / "run"
    command = ["detect", "digits", "--train", "digits", "--num", 10, "--detectors", "std,error", "--draws", 1]
    assert scaling_commands.run(*command, "--sigma", "0.5", "--out", out, "--quiet") == 0, capsys.readouterr().err
    assert run("detection", "--run", out, "--out", tmp_path) == 0
    arrays = artifacts.load_arrays(tmp_path / "detection.npz")
    with (out / "evaluation.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["negatives"] == "held_out"]
    np.testing.assert_allclose(arrays["area"][:, 0], [float(row["area"]) for row in rows])
    assert arrays["against"] == "held_out"
    # At a rate of 0 the share found is that above all others.
    above = np.mean(arrays["positives"][0] > arrays["negatives"][0].max())
    assert arrays["found"][0, 0, 0] == above
    assert np.all(np.diff(arrays["found"][:, :, 0], axis=1) >= 0)
    assert run("detection_map", "--run", out, "--out", tmp_path) == 2
    assert "no finished run of `python -m scaling ablate`" in capsys.readouterr().err
    other = ["detect", "digits", "--images", "digits", "--detectors", "std", "--batch-size", 599, "--quiet"]
    assert scaling_commands.run(*other, "--out", tmp_path / "unknown") == 0
    assert run("detection", "--run", tmp_path / "unknown", "--out", tmp_path) == 2
    assert "no detector can be rated" in capsys.readouterr().err
