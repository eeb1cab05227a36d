"""Rectified flows: the line between noise and image, exact sampling where the direction is known, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.diffusion import flow, samplers

CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "base_shift": 0.5, "_diffusers_version": "0"}


def test_the_line_goes_from_the_image_to_the_noise(key):
    schedule = flow.from_config(CONFIG)
    x, noise = jax.random.normal(key, (2, 3, 4))
    np.testing.assert_array_equal(flow.add_noise(schedule, x, noise, 0.0), x)
    np.testing.assert_array_equal(flow.add_noise(schedule, x, noise, 1000.0), noise)
    t = jnp.array([100.0, 500.0, 900.0])
    on_line = flow.add_noise(schedule, x, noise, t)
    np.testing.assert_allclose(on_line, x + (t / 1000)[:, None] * flow.target(x, noise), rtol=1e-6)
    # Its derivative in s = t/T is the target.
    slope = jax.jvp(lambda t: flow.add_noise(schedule, x, noise, t), (500.0,), (1000.0,))[1]
    np.testing.assert_allclose(slope, flow.target(x, noise), atol=1e-5)
    for bad in (-1.0, 1001.0, jnp.zeros(2)):
        with pytest.raises(ValueError, match="t must"):
            flow.add_noise(schedule, x, noise, bad)


@pytest.mark.parametrize("steps", [1, 7])
def test_one_image_is_reached_exactly_and_a_gaussian_to_first_order(steps, key):
    schedule = flow.from_config(CONFIG)
    image = jnp.array([[0.4, -0.7, 0.2]])

    def direction(x, t, step):
        # E[ε − x₀ | x] for one image: the noise that x holds.
        return (x - image) / (t / 1000)

    drawn = samplers.reverse(key, direction, flow.make_solver(schedule, steps), (1, 3), dtype=jnp.float64)
    np.testing.assert_allclose(drawn.x, image, atol=1e-12)
    variance, errors = 0.25, []
    for number in (40, 80):

        def of_gaussian(x, t, step):
            s = t / 1000
            return x * (s - (1 - s) * variance) / (s**2 + (1 - s) ** 2 * variance)

        solver = flow.make_solver(schedule, number)
        found = samplers.reverse(key, of_gaussian, solver, (4, 3), init=jnp.ones((4, 3)), dtype=jnp.float64).x
        # The flow keeps the number of standard deviations.
        errors.append(float(jnp.max(jnp.abs(found - variance**0.5))))
    assert 1.6 < errors[0] / errors[1] < 2.4


def test_levels_are_shifted_towards_noise():
    plain, moved = flow.FlowSchedule(shift=1.0), flow.FlowSchedule(shift=3.0)
    np.testing.assert_allclose(flow.levels(plain, 4), [*np.linspace(1, 1e-3, 4), 0])
    assert np.all(flow.levels(moved, 4)[1:-1] > flow.levels(plain, 4)[1:-1])
    assert flow.levels(moved, 4)[0] == 1.0
    with pytest.raises(ValueError, match="num_steps must be at most 1000"):
        flow.levels(plain, 1001)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "_class_name = 'EulerDiscreteScheduler'"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"shift_terminal": 0.1}, "shift_terminal"),
        ({"shift": 0}, "shift = 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"beta_start": 0.1}, "beta_start = 0.1: this field is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        flow.from_config(CONFIG | fields)
