"""Grids: which timesteps and levels are visited."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scheduler_side import COSINE, STABLE, ZERO_SNR

from dae_theory.sampling import geometric_schedule, karras_schedule
from scaling.diffusion.grids import sigma_grid, timestep_grid
from scaling.diffusion.schedules import from_config

SPACINGS = ("leading", "trailing", "linspace")


def of(method, spacing="leading", base=STABLE, **fields):
    return from_config(base | {"timestep_spacing": spacing} | fields, method)


def test_the_three_spacings_by_hand():
    np.testing.assert_array_equal(timestep_grid(of("ddim"), 4), [751, 501, 251, 1])
    np.testing.assert_array_equal(timestep_grid(of("ddim", "trailing"), 4), [999, 749, 499, 249])
    np.testing.assert_array_equal(timestep_grid(of("ddim", "linspace"), 4), [999, 666, 333, 0])
    # Euler keeps fractions; DPM-Solver++ places one more point, and leaves out the last.
    np.testing.assert_allclose(sigma_grid(of("euler", "linspace"), 3)[0], [999, 499.5, 0])
    np.testing.assert_array_equal(sigma_grid(of("dpmsolver++", "linspace"), 3)[0], [999, 666, 333])
    np.testing.assert_array_equal(sigma_grid(of("dpmsolver++"), 3)[0], [751, 501, 251])


@hypothesis.given(st.sampled_from(["ddim", "euler", "dpmsolver++"]), st.sampled_from(SPACINGS), st.integers(1, 400))
def test_grids_fall_and_stay_in_range(method, spacing, number):
    schedule = of(method, spacing)
    if method == "ddim":
        t = timestep_grid(schedule, number)
    else:
        t, sigmas = sigma_grid(schedule, number)
        assert sigmas.shape == (number + 1,)
        assert np.all(np.diff(sigmas) < 0)
        assert sigmas[-1] == 0
    assert t.shape == (number,)
    assert np.all(np.diff(t) < 0)
    assert 0 <= t[-1] <= t[0] <= 999


def test_levels_are_linear_in_t_between_timesteps():
    schedule = of("euler", "linspace")
    _, sigmas = sigma_grid(schedule, 3)
    np.testing.assert_allclose(sigmas[1], (schedule.sigmas[499] + schedule.sigmas[500]) / 2, rtol=1e-14)


@pytest.mark.parametrize("method", ["euler", "heun", "dpmsolver++"])
def test_karras_and_geometric_levels(method):
    schedule = of(method, "trailing", use_karras_sigmas=True, sigma_min=0.05, sigma_max=12.0)
    t, sigmas = sigma_grid(schedule, 8)
    np.testing.assert_allclose(sigmas, karras_schedule(12.0, 0.05, 8), rtol=1e-12)
    # The timesteps have these levels, up to DPM-Solver++'s rounding.
    sigmas_of_t = np.exp(np.interp(t, np.arange(1000), np.log(schedule.sigmas)))
    np.testing.assert_allclose(sigmas_of_t, sigmas[:-1], rtol=1e-12 if method != "dpmsolver++" else 0.02)
    if method != "dpmsolver++":
        even = of(method, "trailing", use_exponential_sigmas=True, sigma_min=0.05, sigma_max=12.0)
        np.testing.assert_allclose(sigma_grid(even, 8)[1], geometric_schedule(12.0, 0.05, 8), rtol=1e-12)


def test_ends():
    # Where no ends are given: those of the grid, or for DPM-Solver++ of the whole table.
    for method in ("euler", "dpmsolver++"):
        schedule = of(method, use_karras_sigmas=True)
        _, sigmas = sigma_grid(schedule, 5)
        t = [801, 1] if method == "euler" else [999, 0]
        np.testing.assert_allclose(sigmas[[0, -2]], schedule.sigmas[t], rtol=1e-12)
    low = of("euler", final_sigmas_type="sigma_min")
    assert sigma_grid(low, 5)[1][-1] == low.sigmas[0]
    np.testing.assert_allclose(sigma_grid(of("euler", "trailing", ZERO_SNR), 5)[1][0], np.sqrt(2**24 - 1))
    velocity = of("euler", timestep_type="continuous", prediction_type="v_prediction")
    t, sigmas = sigma_grid(velocity, 5)
    np.testing.assert_allclose(t, np.log(sigmas[:-1]) / 4)


def test_clipped_levels_leave_out_the_noisiest_timesteps():
    schedule = of("dpmsolver++", "linspace", COSINE, lambda_min_clipped=-1.0)
    t, sigmas = sigma_grid(schedule, 6)
    assert -1.0 <= -np.log(sigmas[0]) < -0.95
    assert -np.log(schedule.sigmas[int(t[0]) + 1]) < -1.0


@pytest.mark.parametrize(
    ("schedule", "number", "message"),
    [
        (of("ddim"), 1000, "steps_offset 1 leads to timestep 1000, past the last one, 999; take fewer than 1000"),
        (of("dpmsolver++"), 1000, "1000 steps are too many"),
        (of("dpmsolver++", use_karras_sigmas=True, base=COSINE), 10, "rounding errors decide"),
    ],
)
def test_refused(schedule, number, message):
    with pytest.raises(ValueError, match=message):
        (timestep_grid if schedule.method == "ddim" else sigma_grid)(schedule, number)
