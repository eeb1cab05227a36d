"""Solvers: the reference's states, what every consistent solver does exactly, and orders of convergence."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scheduler_side
from safetensors import safe_open

from scaling.diffusion import samplers
from scaling.diffusion.denoisers import from_denoiser
from scaling.diffusion.grids import sigma_grid
from scaling.diffusion.schedules import METHODS, from_config
from scaling.diffusion.solvers import make_solver

GOLDEN = pathlib.Path(__file__).parent / "golden"
# In float64 the reference's own tables were made float64 too.
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}


MEAN, VARIANCE = np.array([0.5, -1.0, 0.0]), np.array([1.5, 0.2, 0.02])
# Many timesteps, so that their integers do not blur the order of a method.
FINE = {"num_train_timesteps": 6400, "beta_start": 1e-5, "beta_end": 2.5e-3, "clip_sample": False}


def of(method, **fields):
    return from_config(scheduler_side.STABLE | fields, method)


def denoiser(y, sigma):
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (y - MEAN)


@functools.partial(jax.jit, static_argnames="schedule")
def gaussian_states(init, solver, schedule):
    """States where the data are Gaussian and the network is exact."""
    batched = jax.vmap(from_denoiser(denoiser, schedule), in_axes=(0, None))
    return samplers.reverse(
        jax.random.key(1),
        lambda x, t, step: batched(x, t),
        solver,
        init.shape,
        init=init,
        trajectory=True,
        dtype=jnp.float64,
    ).states


def exact(y, sigma, to):
    """The flow from one level to another: each coordinate keeps its number of standard deviations."""
    return MEAN + np.sqrt((VARIANCE + to**2) / (VARIANCE + sigma**2)) * (np.asarray(y) - MEAN)


def slope(numbers, errors):
    return np.polyfit(np.log(numbers), np.log(errors), 1)[0]


@functools.lru_cache
def golden(method):
    with safe_open(GOLDEN / f"schedules_{method.rstrip('+')}.safetensors", "numpy") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@functools.partial(jax.jit, static_argnames="dtype")
def walk(noise, solver, dtype):
    """States of the analytic network, with the noise of a table."""
    drawn = jnp.asarray(noise, dtype)
    key = jax.random.key(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "noise_at", lambda key, item, call, shape, dtype: drawn[call, item])
        return samplers.reverse(
            key,
            lambda x, t, step: scheduler_side.network(jnp, x, t.astype(x.dtype)),
            solver,
            noise.shape[1:],
            trajectory=True,
            dtype=dtype,
        ).states


def distance(states, expected):
    """Per call, as a fraction of the largest value."""
    return np.max(np.abs(states - expected), axis=(1, 2, 3, 4)) / np.max(np.abs(expected), axis=(1, 2, 3, 4))


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_states_are_the_reference_s_call_by_call(method, dtype):
    listed, tensors = golden(method)
    assert len(listed) == len(scheduler_side.cases(method))
    for i, case in enumerate(listed):
        solver = make_solver(from_config(case["config"], method), case["steps"], eta=case["eta"])
        np.testing.assert_allclose(solver.calls.t, tensors[f"{i}.timesteps"], atol=2e-3, err_msg=str(case))
        states, double = np.asarray(walk(tensors["noise"], solver, dtype)), tensors[f"{i}.float64"]
        allowed = TOLERANCE[dtype]
        if dtype == "float32":
            # A few starts amplify rounding: there the reference's own error is the measure.
            allowed = np.maximum(allowed, 3 * distance(tensors[f"{i}.float32"], double))
        assert np.all(distance(states, tensors[f"{i}.{dtype}"]) <= allowed), case


POINT = np.array([[0.4, -0.7, 0.2]])


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ddim", {}),
        ("ddim", {"prediction_type": "v_prediction"}),
        ("ddim", {"prediction_type": "sample"}),
        # PNDM extrapolates the output itself: the noise stays, v turns along the path.
        ("pndm", {}),
        ("pndm", {"skip_prk_steps": False}),
        ("euler", {}),
        ("euler", {"prediction_type": "v_prediction"}),
        ("heun", {}),
        ("heun", {"prediction_type": "sample"}),
        ("dpmsolver++", {}),
        ("dpmsolver++", {"solver_type": "heun", "prediction_type": "v_prediction"}),
        ("dpmsolver++", {"solver_order": 3}),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}),
        ("euler_ancestral", {}),
        ("lms", {}),
        ("unipc", {}),
        ("unipc", {"solver_order": 3, "solver_type": "bh1"}),
    ],
)
def test_one_training_image_is_reached_exactly(method, fields):
    # x - alpha c is one noise scaled by sigma all the way, so that no step of any order errs.
    schedule = of(method, set_alpha_to_one=True, timestep_spacing="leading", **fields)
    # A whole number of timesteps a step, and an even one, so that PNDM's half steps meet.
    solver = make_solver(schedule, 10)
    batched = jax.vmap(from_denoiser(lambda y, sigma: jnp.asarray(POINT[0]), schedule), in_axes=(0, None))
    key = jax.random.key(3)
    out = samplers.reverse(key, lambda x, t, step: batched(x, t), solver, (1, 3), trajectory=True, dtype=jnp.float64)
    np.testing.assert_allclose(out.x, POINT, atol=1e-11)
    if method == "ddim":
        unit = np.asarray(samplers.noise_at(key, 0, 0, (3,), jnp.float64))
        alpha_bar = np.append(schedule.alpha_bar[solver.calls.t[1:]], 1.0)[:, None, None]
        start = schedule.alpha_bar[solver.calls.t[0]]
        e = (unit - np.sqrt(start) * POINT) / np.sqrt(1 - start)
        np.testing.assert_allclose(out.states, np.sqrt(alpha_bar) * POINT + np.sqrt(1 - alpha_bar) * e, atol=1e-11)


def test_ddim_euler_and_first_order_dpm_solver_are_one_method():
    # DDIM's and Euler's levels coincide where the offset is 0 and T/num_steps is whole.
    init = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    fields = {"timestep_spacing": "leading", "steps_offset": 0}
    ddim, euler = of("ddim", set_alpha_to_one=True, **fields), of("euler", **fields)
    solvers = make_solver(ddim, 10), make_solver(euler, 10)
    np.testing.assert_allclose(solvers[0].calls.t, solvers[1].calls.t)
    preserving = gaussian_states(init, solvers[0], ddim)
    # The start of Euler's walk, sigma e, is hypot(1, sigma) e where the spacing is leading: DDIM's, divided by alpha.
    exploding = gaussian_states(init, solvers[1], euler)
    alpha = np.sqrt(np.append(ddim.alpha_bar[solvers[0].calls.t[1:]], 1.0))[:, None, None]
    np.testing.assert_allclose(preserving / alpha, exploding, rtol=1e-10)
    first = of("dpmsolver++", solver_order=1, **fields)
    solver = make_solver(first, 10)
    _, sigmas = sigma_grid(first, 10)
    ratio, ends = sigmas[1:] / sigmas[:-1], 1 / np.hypot(1, sigmas)
    np.testing.assert_allclose(solver.calls.states[:, 0], ratio * ends[1:] / ends[:-1], rtol=1e-12)
    np.testing.assert_allclose(solver.calls.history, (ends[1:] * (1 - ratio))[:, None], rtol=1e-12)


def test_ddim_with_all_its_noise_is_ddpm():
    fields = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    ddim, ddpm = of("ddim", **fields), of("ddpm", **fields)
    noise = np.random.RandomState(1).standard_normal((21, *scheduler_side.SHAPE))
    a, b = (walk(noise, solver, "float64") for solver in (make_solver(ddim, 20, eta=1.0), make_solver(ddpm, 20)))
    np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "fields", "order"),
    [
        ("euler", {"use_karras_sigmas": True}, 1),
        ("heun", {"use_karras_sigmas": True}, 2),
        ("dpmsolver++", {"timestep_spacing": "leading", "solver_order": 1}, 1),
        ("dpmsolver++", {"use_karras_sigmas": True}, 2),
        ("dpmsolver++", {"use_karras_sigmas": True, "solver_type": "heun"}, 2),
        # Of order 4, but its first steps are not.
        ("lms", {"use_karras_sigmas": True}, 3.5),
        # The corrector adds an order to the predictor's.
        ("unipc", {"use_karras_sigmas": True, "disable_corrector": [*range(80)]}, 2),
        ("unipc", {"use_karras_sigmas": True}, 3),
        ("unipc", {"use_karras_sigmas": True, "solver_type": "bh1"}, 3),
    ],
)
def test_order_of_methods_in_sigma(method, fields, order):
    schedule = from_config(FINE | fields, method)
    init = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    numbers, errors = (20, 40, 80), []
    for number in numbers:
        solver = make_solver(schedule, number)
        _, sigmas = sigma_grid(schedule, number)
        # Before the last step, which goes to 0 in one jump whatever the number.
        state, sigma = gaussian_states(init, solver, schedule)[-2], sigmas[-2]
        preserving = method in ("dpmsolver++", "unipc")
        y, start = (np.hypot(1, sigma) if preserving else 1.0) * state, np.hypot(1, sigmas[0]) if preserving else None
        expected = exact(init * (solver.start if start is None else start), sigmas[0], sigma)
        errors.append(np.max(np.abs(y - expected)))
    assert abs(slope(numbers, errors) + order) < 0.25, errors


@pytest.mark.parametrize(("method", "skip", "order"), [("ddim", True, 1), ("pndm", True, 2), ("pndm", False, 2)])
def test_order_of_methods_in_t(method, skip, order):
    schedule = from_config(FINE | {"skip_prk_steps": skip}, method)
    init = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    numbers, errors = (32, 64, 128), []
    for number in numbers:
        solver = make_solver(schedule, number)
        # Half-way: towards t = 0 the network is not smooth in t.
        t = solver.calls.t[0], solver.calls.t[0] - number // 2 * (schedule.num_train_timesteps // number)
        call = np.flatnonzero(solver.calls.step == number // 2 - 1)[-1]
        start, end = schedule.sigmas[np.asarray(t)]
        y = np.hypot(1, end) * gaussian_states(init, solver, schedule)[call]
        errors.append(np.max(np.abs(y - exact(np.hypot(1, start) * init, start, end))))
    assert abs(slope(numbers, errors) + order) < 0.25, errors


def test_calls_and_steps():
    count = {method: make_solver(of(method), 50).calls.step for method in METHODS}
    for method in {*METHODS} - {"heun", "pndm"}:
        np.testing.assert_array_equal(count[method], np.arange(50))
    np.testing.assert_array_equal(count["heun"], np.arange(99) // 2)
    np.testing.assert_array_equal(count["pndm"], np.maximum(np.arange(51) - 1, 0))
    pndm = make_solver(of("pndm"), 50)
    np.testing.assert_array_equal(pndm.calls.t[:5], [981, 961, 961, 941, 921])
    assert pndm.calls.t.dtype == np.int32
    slow = make_solver(of("pndm", skip_prk_steps=False), 50)
    np.testing.assert_array_equal(slow.calls.step[:13], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert len(slow.calls.t) == 12 + 47


def test_the_start_s_noise_has_the_level_of_the_first_timestep():
    for spacing, method in itertools.product(("leading", "trailing", "linspace"), ("euler", "heun")):
        schedule = of(method, timestep_spacing=spacing)
        _, sigmas = sigma_grid(schedule, 10)
        assert make_solver(schedule, 10).start == pytest.approx(np.hypot(sigmas[0], spacing == "leading"))
    assert make_solver(of("dpmsolver++"), 10).start == 1.0


def test_one_step():
    for method in METHODS:
        solver = make_solver(of(method, set_alpha_to_one=True, timestep_spacing="trailing"), 1)
        assert len(solver.calls.t) == 1
        assert np.all(np.isfinite(walk(np.ones((2, *scheduler_side.SHAPE)), solver, "float64")))


@pytest.mark.parametrize(
    ("method", "fields", "steps", "eta", "message"),
    [
        ("ddim", {}, 0, 0.0, "num_steps must be at least 1"),
        ("ddim", {}, 1001, 0.0, "num_steps must be at most 1000"),
        ("ddim", {}, 10, 1.5, "eta must lie in"),
        ("euler", {}, 10, 0.5, "every method but ddim"),
        ("ddim", {}, 1000, 0.0, "steps_offset 1 leads to timestep 1000"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, 0.0, "ddim: no clean sample"),
        ("ddpm", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, 0.0, "ddpm: no clean sample"),
        ("pndm", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, 0.0, "pndm cannot start"),
        ("pndm", {"prediction_type": "sample"}, 10, 0.0, "pndm takes the prediction types"),
        ("pndm", {"skip_prk_steps": False}, 3, 0.0, "at least 4"),
        ("dpmsolver++", {"timestep_spacing": "leading"}, 999, 0.0, "take fewer"),
        ("unipc", {"use_exponential_sigmas": True}, 9, 0.0, "unipc with use_exponential_sigmas"),
        ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 9, 0.0, "take solver_order 2"),
        ("unipc", {"lower_order_final": False}, 9, 0.0, "no finite result"),
        ("unipc", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 9, 0.0, "no finite result"),
        ("lcm", {}, 51, 0.0, "take at most 50 steps"),
        ("dpmsolver++", {"use_exponential_sigmas": True}, 9, 0.0, "use_exponential_sigmas"),
        ("dpmsolver++", {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"}, 9, 0.0, "lambda_min_clipped"),
    ],
)
def test_what_a_schedule_does_not_admit_is_refused(method, fields, steps, eta, message):
    with pytest.raises(ValueError, match=message):
        make_solver(of(method, **fields), steps, eta=eta)
