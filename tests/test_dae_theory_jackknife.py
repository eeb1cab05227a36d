"""The jackknife: of a mean it is Student's interval."""

import numpy as np
import pytest
from scipy import stats

from dae_theory.jackknife import jackknife_error, jackknife_reach


@pytest.mark.parametrize("count", [2, 3, 20])
def test_of_a_mean_it_is_students_interval(count):
    values = np.random.default_rng(count).standard_normal(count)
    without = (values.sum() - values) / (count - 1)
    np.testing.assert_allclose(jackknife_error(without), stats.sem(values), rtol=1e-12)
    low, high = stats.t.interval(0.9, count - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose(2 * jackknife_reach(without, 0.9), high - low, rtol=1e-9)
