"""Summaries: what is printed of a run whatever its axes are, whatever diverged and whatever is not computed yet."""

import numpy as np
import pytest
import xarray as xr

from sims.commands.summaries import summary_of
from sims.study import report
from sims.sweeps.spec import Spec

FACTS = [{"name": "digits", "dim": 64}]


def make_results(spec, measures=("gap", "train_error"), done=True):
    """A finished run whose gap is 1/2 at n = 3 √10, and whose other measures are 1."""
    shape, dims = tuple(spec.shape.values()), tuple(spec.shape)
    coords = {"seed": range(spec.seeds), "step": list(spec.record_steps)}
    coords |= {dim: list(getattr(spec, dim)) for dim in dims if dim not in coords}
    variables = {name: (dims, np.ones(shape)) for name in measures}
    units = tuple(dim for dim in dims if dim in ("num_samples", "width", "seed"))
    results = xr.Dataset(variables, coords)
    results["done"] = (units, np.full([spec.shape[dim] for dim in units], done))
    results["wall_s"] = results.done * np.nan
    if "gap" in measures:
        places = np.log(3 * np.sqrt(10)) + 0.02 * np.arange(spec.seeds)
        curve = 0.5 - 0.2 * (np.log(results.num_samples) - xr.DataArray(places, dims="seed"))
        results["gap"] = (curve * results["gap"]).transpose(*dims)
    return results


def text_of(results, spec):
    return report.summary(results, {**spec.to_dict(), "measures": list(results)}, FACTS)


def test_the_interval_says_its_side_and_what_it_covers():
    spec = Spec(num_samples=(2, 8, 32), sigma=(0.5, 1.0, 2.0), seeds=3)
    results = make_results(spec)
    # At σ = 1 all curves are below the level already, at σ = 2 still above it.
    results["gap"][..., 1, :] = np.array([0.4, 0.3, 0.2]).reshape(3, 1, 1, 1, 1, 1, 1)
    results["gap"][..., 2, :] = np.array([0.9, 0.8, 0.7]).reshape(3, 1, 1, 1, 1, 1, 1)
    text = text_of(results, spec)
    assert "| 0.5 | 9.68 | " in text
    assert "| 1 | below 2 | " in text
    assert "| 2 | above 32 | " in text
    assert "95 % interval over 3 seeds (jackknife, Student's t), which covers training rows, starts and noise" in text


def test_what_is_not_computed_yet_is_no_side():
    spec = Spec(num_samples=(2, 8, 32), sigma=(0.5, 1.0), seeds=2)
    results = make_results(spec, done=False)
    results["gap"][:] = np.nan
    text = text_of(results, spec)
    assert text.count("not computed yet | - |") == 2
    assert "interval over 0 seeds" in text


def test_divergence_is_counted_whatever_is_measured():
    spec = Spec(num_samples=(2, 8), sigma=(0.5, 1.0), seeds=2)
    for name in ("l4_over_l2_train", "train_error"):
        results = make_results(spec, (name,))
        results[name][0, 0, 1, 0, 0, 0, 1, 0] = np.nan
        results[name][1, 0, 1, 0, 0, 0, 1, 0] = np.inf
        assert "Diverged: 2 of 8." in text_of(results, spec)
    # Runs record it; NaN in another measure is then not taken for it.
    results["diverged"] = xr.zeros_like(results[name], bool)
    results.diverged[0, 0, 1, 0, 0, 0, 1, 0] = True
    assert "Diverged: 1 of 8." in text_of(results, spec)
    # NaN where no closed form exists says nothing of the weights.
    results = make_results(spec, ("distance_to_closed_form",))
    results["distance_to_closed_form"][:] = np.nan
    assert "Diverged: 0 of 8." in text_of(results, spec)


def test_one_n_has_a_table_of_means_over_the_other_axes():
    spec = Spec(num_samples=4, sigma=(0.5, 1.0), penalty=(0.1, 0.2), seeds=3)
    results = make_results(spec)
    results["train_error"][0, 0, :, 1, 0, 0, 0, 0] = [2.0, 3.0, 4.0]
    text = text_of(results, spec)
    assert "| penalty | sigma | denoising error, training rows |" in text
    assert "| 0.2 | 0.5 | 3 ± 0.6 |" in text
    assert "Where memorization ends" not in text


def test_the_two_ends_name_every_axis_that_is_fixed():
    spec = Spec(num_samples=(2, 8), sigma=(0.5, 1.0), penalty=(0.1, 0.2), seeds=2)
    assert "## The two ends, at sigma = 1, penalty = 0.1" in text_of(make_results(spec), spec)


def test_the_run_of_another_command_is_no_sweep():
    results = xr.Dataset({"code": ("image", [1.0])})
    with pytest.raises(ValueError, match="this run is no sweep: it has code"):
        summary_of(results, {"spec": {"taps": []}, "sessions": []})
