"""Crossings: exact on known curves, intervals that cover, and refusals."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr

from sims.study import transitions


@hypothesis.given(st.floats(0.05, 0.95), st.floats(1.5, 300.0))
def test_a_line_in_log_x_crosses_where_it_should(level, where):
    x = np.array([1.0, 2.0, 8.0, 40.0, 400.0])
    y = level - 0.7 * (np.log(x) - np.log(where))
    np.testing.assert_allclose(transitions.crossing(x, y, level), where, rtol=1e-10)
    np.testing.assert_allclose(transitions.crossing(x, -y, -level), where, rtol=1e-10)


def test_the_last_passage_counts():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    np.testing.assert_allclose(transitions.crossing(x, np.array([1.0, 0.4, 0.6, 0.4]), 0.5), np.sqrt(32), rtol=1e-12)


def test_no_passage_is_nan_and_nan_points_are_left_out():
    x = np.array([1.0, 2.0, 4.0])
    assert np.isnan(transitions.crossing(x, np.array([1.0, 0.9, 0.8]), 0.5))
    assert np.isnan(transitions.crossing(x, np.array([np.nan, np.nan, 0.8]), 0.5))
    np.testing.assert_allclose(transitions.crossing(x, np.array([1.0, np.nan, 0.0]), 0.5), 2.0, rtol=1e-12)


def test_the_interval_is_of_quantiles_of_the_curves_that_cross():
    """Two seeds that cross at 2 and at 8: a quarter of the resamples are of one alone, the others at 4."""
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    curves = 0.5 - (np.log2(x)[None, :] - np.array([1.0, 3.0])[:, None])
    found = transitions.bootstrap_crossing(x, curves, 0.5, confidence=0.6)
    np.testing.assert_allclose([found.low, found.estimate, found.high], [2.0, 4.0, 8.0], rtol=1e-12)
    assert found.crossed == 1.0
    # One that never comes down: resamples of it alone do not count, and nothing is found at 0.
    never = np.stack([curves[0], np.full(5, 0.6)])
    found = transitions.bootstrap_crossing(x, never, 0.5, confidence=0.99)
    assert found.low >= 2.0
    assert 0.7 < found.crossed < 0.8


def test_the_interval_covers_the_truth_at_its_nominal_rate():
    rng = np.random.default_rng(3)
    x = np.geomspace(1, 100, 12)
    covered, runs = 0, 100
    for run in range(runs):
        # Each seed's curve crosses at its own place; the mean curve's crossing is that of the mean log place.
        places = np.log(10) + 0.3 * rng.standard_normal(20)
        curves = 0.5 - 0.2 * (np.log(x)[None, :] - places[:, None])
        found = transitions.bootstrap_crossing(x, curves, 0.5, seed=run, num_resamples=400)
        assert found.crossed == 1.0
        np.testing.assert_allclose(np.log(found.estimate), places.mean(), atol=1e-9)
        covered += found.low <= 10 <= found.high
    # A percentile bootstrap of 20 seeds covers about 93 %; five binomial standard errors are 13 %.
    assert 0.80 <= covered / runs <= 1.0
    assert covered < runs


def test_one_seed_has_no_interval():
    found = transitions.bootstrap_crossing(np.array([1.0, 4.0]), np.array([[1.0, 0.0]]), 0.5)
    assert found.estimate == pytest.approx(2.0)
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def make_results(places):
    """Curves of 0.5 at ``places[sigma, seed]``, falling with log n."""
    n = np.array([2, 4, 8, 16, 32])
    values = 0.5 - 0.4 * (np.log(n)[:, None, None] - np.log(places)[None])
    return xr.Dataset(
        {"gap": (("num_samples", "sigma", "seed"), values)},
        coords={"num_samples": n, "sigma": [0.1, 0.2], "seed": [0, 1, 2]},
    )


def test_transition_keeps_the_other_axes():
    places = np.array([[5.0, 5.0, 5.0], [6.0, 7.0, 8.0]])
    table = transitions.transition(make_results(places))
    assert table.estimate.dims == ("sigma",)
    np.testing.assert_allclose(table.estimate, [5.0, np.exp(np.log(places[1]).mean())], rtol=1e-12)
    np.testing.assert_allclose([table.low[0], table.high[0]], 5.0, rtol=1e-12)
    assert 6.0 <= table.low[1] < table.estimate[1] < table.high[1] <= 8.0
    assert table.attrs["level"] == 0.5


def test_diverged_seeds_are_left_out_not_averaged():
    results = make_results(np.full((2, 3), 5.0))
    results["gap"][:, 0, 1] = np.nan
    np.testing.assert_allclose(transitions.transition(results).estimate, 5.0, rtol=1e-12)


def test_bad_input_is_refused():
    results = make_results(np.full((2, 3), 5.0))
    with pytest.raises(ValueError, match="no measure 'loss'.*gap"):
        transitions.transition(results, measure="loss")
    with pytest.raises(ValueError, match="axis 'width'"):
        transitions.transition(results, along="width")
    with pytest.raises(ValueError, match="increase"):
        transitions.crossing(np.array([2.0, 1.0]), np.zeros(2), 0.5)
    with pytest.raises(ValueError, match="one length"):
        transitions.crossing(np.array([1.0, 2.0]), np.zeros(3), 0.5)
    with pytest.raises(ValueError, match="confidence"):
        transitions.bootstrap_crossing(np.array([1.0, 2.0]), np.zeros((2, 2)), 0.5, confidence=1.0)
