"""Crossings: exact on known curves, intervals that cover, and refusals."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import xarray as xr
from scipy import stats

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


def test_of_lines_the_interval_is_students_over_the_seeds():
    """Curves linear in log x, alike but for their place: the crossing is the mean place, the jackknife its error."""
    x, places = np.geomspace(1, 64, 7), np.log([3.0, 8.0, 5.0, 6.0])
    curves = 0.5 - 0.2 * (np.log(x)[None, :] - places[:, None])
    found = transitions.crossing_over_seeds(x, curves, 0.5, confidence=0.9)
    reach = stats.t.ppf(0.95, 3) * places.std(ddof=1) / 2
    expected = np.exp(places.mean() + np.array([0, -reach, reach]))
    np.testing.assert_allclose(found[:3], expected, rtol=1e-9)
    assert (found.crossed, found.side) == (1.0, 0.0)


def test_what_lies_outside_the_grid_leaves_an_interval_open():
    x, log = np.array([2.0, 4.0, 8.0, 16.0]), np.log

    def curves(*places):
        return 0.5 - 0.2 * (log(x)[None, :] - log(np.array(places))[:, None])

    below = transitions.crossing_over_seeds(x, curves(1.0, 1.5), 0.5)
    assert np.isnan(below.estimate)
    assert (below.low, below.side, below.crossed) == (0.0, -1.0, 0.0)
    # Nothing beyond the grid was measured: a crossing below it is only known to be below its first point.
    assert below.high >= 2.0
    above = transitions.crossing_over_seeds(x, curves(100.0, 101.0), 0.5)
    assert (above.low, above.high, above.side) == (16.0, np.inf, 1.0)
    half = transitions.crossing_over_seeds(x, curves(10.0, 30.0, 12.0), 0.5)
    assert half.crossed == pytest.approx(2 / 3)
    assert half.low < half.estimate < 16 < half.high == np.inf
    # Without one seed the curve never comes down at all.
    never = np.concatenate([curves(6.0, 6.0), np.linspace(0.7, 0.9, 4)[None, :]])
    assert transitions.crossing_over_seeds(x, never, 0.5)[1:3] == (0.0, np.inf)


@pytest.mark.parametrize("seeds", [3, pytest.param(4, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize(("where", "spread", "noise"), [(30.0, 0.3, 0.02), (30.0, 0.2, 0.08), (2.5, 0.4, 0.02)])
def test_the_interval_covers_the_truth_at_its_nominal_rate(seeds, where, spread, noise):
    """Planted transitions, some of them at the edge of the grid; the percentile bootstrap covers .72 to .95."""
    rng, runs, x = np.random.default_rng(seeds), 400, np.geomspace(2, 512, 9)
    shift = np.log(where) + spread * rng.standard_normal((runs, seeds, 1))
    curves = 1 / (1 + np.exp((np.log(x) - shift) / 0.8)) + noise * rng.standard_normal((runs, seeds, 9))
    # By symmetry the expected curve passes 1/2 at `where`, up to the interpolation between grid points.
    many = np.log(where) + spread * rng.standard_normal((100_000, 1))
    truth = transitions.crossing(x, np.mean(1 / (1 + np.exp((np.log(x) - many) / 0.8)), axis=0), 0.5)
    found = [transitions.crossing_over_seeds(x, curve, 0.5) for curve in curves]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    # Four binomial standard errors at 400 runs are 0.044; kinks between segments cost 0.02.
    assert covered >= 0.95 - 0.044 - 0.02
    # Not by being wide: inside the grid, ends are closed nearly always and as far apart as Student's t says.
    if where == 30.0 and seeds == 20:
        assert covered <= 1 - 1 / runs
        assert np.mean([np.log(one.high / one.low) for one in found]) < 8 * (spread + 4 * noise) / np.sqrt(seeds)


def test_one_seed_has_no_interval():
    found = transitions.crossing_over_seeds(np.array([1.0, 4.0]), np.array([[1.0, 0.0]]), 0.5)
    assert found.estimate == pytest.approx(2.0)
    assert np.isnan(found.low)
    assert np.isnan(found.high)
    nothing = transitions.crossing_over_seeds(np.array([1.0, 4.0]), np.full((2, 2), np.nan), 0.5)
    assert np.all(np.isnan(nothing))


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
    assert table.low[1] < 6.0 < table.estimate[1] < 8.0 < table.high[1]
    assert table.attrs["level"] == 0.5


def test_diverged_seeds_are_left_out_not_averaged():
    results = make_results(np.full((2, 3), 5.0))
    results["gap"][:, 0, 1] = np.nan
    np.testing.assert_allclose(transitions.transition(results).estimate, 5.0, rtol=1e-12)


def test_bad_input_is_refused():
    results = make_results(np.full((2, 3), 5.0))
    with pytest.raises(ValueError, match="no measure 'loss'.*gap"):
        transitions.transition(results, measure="loss")
    with pytest.raises(ValueError, match="no measure 'gapp' in these results, did you mean gap"):
        transitions.transition(results, measure="gapp")
    with pytest.raises(ValueError, match="'num_sample' is no axis of gap, did you mean num_samples"):
        transitions.transition(results, along="num_sample")
    with pytest.raises(ValueError, match="the interval is over the seeds; the axes are num_samples, sigma"):
        transitions.transition(results, along="seed")
    with pytest.raises(ValueError, match="axis 'sigma' needs at least two values"):
        transitions.transition(results.isel(sigma=[0]), along="sigma")
    with pytest.raises(ValueError, match="increase"):
        transitions.crossing(np.array([2.0, 1.0]), np.zeros(2), 0.5)
    with pytest.raises(ValueError, match="one length"):
        transitions.crossing(np.array([1.0, 2.0]), np.zeros(3), 0.5)
    with pytest.raises(ValueError, match="confidence"):
        transitions.crossing_over_seeds(np.array([1.0, 2.0]), np.zeros((2, 2)), 0.5, confidence=1.0)
