"""Sampling: noise by item, guidance, edits by step, gradients, laws, and what compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import LATENT
from scheduler_side import DDPM, STABLE, UNET, network, tiny_model

from scaling.diffusion import samplers
from scaling.diffusion.noise import noise_at
from scaling.diffusion.samplers import Samples, guided, sample
from scaling.diffusion.schedules import METHODS, from_config
from scaling.diffusion.solvers import make_solver
from scaling.models.model import Apply, Condition
from scaling.models.taps import Edit

MID, EARLY = "mid_block.resnets.0", "conv_in"
unet = functools.cache(tiny_model)
reverse = jax.jit(samplers.reverse, static_argnames=("model_fn", "shape", "trajectory", "has_aux", "dtype"))


@functools.cache
def classes():
    return tiny_model(UNET | {"num_class_embeds": 4})


def of(method="ddim", **fields):
    return from_config(STABLE | fields, method)


def analytic(x, t, step):
    return network(jnp, x, t.astype(x.dtype))


def labels(*values):
    return Condition(class_labels=jnp.array(values))


def test_noise_goes_by_item_whatever_the_batch(key):
    solver = make_solver(of(), 5, eta=1.0)
    whole = reverse(key, analytic, solver, (5, 3)).x
    np.testing.assert_array_equal(reverse(key, analytic, solver, (3, 3)).x, whole[:3])
    np.testing.assert_array_equal(reverse(key, analytic, solver, (2, 3), first=3).x, whole[3:])
    assert whole.dtype == jnp.float32
    # Different items, calls and keys draw independent noise.
    draws = [noise_at(key, i, c, (4000,), jnp.float64) for i in (0, 1) for c in (0, 1)]
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.max(np.abs(correlation)) < 5 / np.sqrt(4000)


def test_the_start_may_be_given(key):
    solver = make_solver(of("euler"), 5)
    drawn = jnp.stack([noise_at(key, i, 0, (3,), jnp.float32) for i in range(2)])
    # Not jitted: what the compiler fuses with the start may be rounded otherwise.
    np.testing.assert_array_equal(
        samplers.reverse(key, analytic, solver, (2, 3), init=drawn).x, samplers.reverse(key, analytic, solver, (2, 3)).x
    )
    with pytest.raises(ValueError, match=r"init must have the shape of the samples, \(2, 3\)"):
        reverse(key, analytic, solver, (2, 3), init=drawn[:1])


def test_states_and_taps_come_by_call(key):
    solver = make_solver(of("heun"), 4)
    plain = reverse(key, analytic, solver, (2, 3))
    assert isinstance(plain, Samples)
    assert plain.states is None
    assert plain.taps == {}

    def observed(x, t, step):
        return analytic(x, t, step), {"step": step, "t": t, "x": x}

    out = reverse(key, observed, solver, (2, 3), trajectory=True, has_aux=True)
    np.testing.assert_array_equal(out.states[-1], plain.x)
    np.testing.assert_array_equal(out.taps["step"], solver.calls.step)
    np.testing.assert_allclose(out.taps["t"], solver.calls.t, rtol=1e-6)
    # What the model sees has the preserving scale.
    scales = solver.calls.scale[1:, None, None]
    np.testing.assert_allclose(out.taps["x"][1:], scales * np.asarray(out.states[:-1]), rtol=1e-5)
    with pytest.raises(ValueError, match="outputs of its input's shape"):
        reverse(key, lambda x, t, step: x[:1], solver, (2, 3))


def test_ancestral_samples_have_the_right_law(key):
    # Data N(mu, s): the exact chain is Gaussian, and its mean and variance follow by hand, step by step.
    schedule = from_config(DDPM | {"clip_sample": False}, "ddpm")
    solver, mu, s, num = make_solver(schedule, 40), 1.5, 0.25, 4000
    power = schedule.alpha_bar[solver.calls.t]
    mean, variance = 0.0, 1.0
    for a, to in zip(power, np.append(power[1:], 1.0), strict=True):
        # x0 given x is mu + g (x - sqrt(a) mu); the step draws x' from q(x' | x, x0).
        g = np.sqrt(a) * s / (a * s + 1 - a)
        of_clean, of_state = np.sqrt(to) * (1 - a / to) / (1 - a), np.sqrt(a / to) * (1 - to) / (1 - a)
        slope = of_state + of_clean * g
        mean = slope * mean + of_clean * (mu - g * np.sqrt(a) * mu)
        variance = slope**2 * variance + (1 - to) / (1 - a) * (1 - a / to)
    tables = jnp.asarray(np.sqrt(schedule.alpha_bar))

    def exact(x, t, step):
        alpha = tables[t]
        clean = mu + alpha * s / (alpha**2 * s + 1 - alpha**2) * (x - alpha * mu)
        return (x - alpha * clean) / jnp.sqrt(1 - alpha**2)

    x = reverse(key, exact, solver, (num, 1), dtype=jnp.float64).x
    # Five standard errors; the chain itself is near the data.
    assert abs(float(jnp.mean(x)) - mean) < 5 * np.sqrt(variance / num)
    assert abs(float(jnp.var(x)) - variance) < 5 * variance * np.sqrt(2 / num)
    assert mean == pytest.approx(mu, abs=0.05)
    assert variance == pytest.approx(s, rel=0.3)


def test_guidance_is_a_line_through_both_halves(key):
    solver = make_solver(of("dpmsolver++"), 6)

    def halves(x, t, step):
        first, second = jnp.split(x, 2)
        return jnp.concatenate([analytic(first, t, step), 0.5 * second])

    def single(x, t, step):
        return 0.5 * x

    for scale, model in ((0.0, analytic), (1.0, single)):
        guided_x = reverse(key, halves, solver, (2, 3), guidance=scale).x
        np.testing.assert_allclose(guided_x, reverse(key, model, solver, (2, 3)).x, rtol=1e-5)
    ramp = jnp.linspace(0.0, 7.5, 6)

    def combined(x, t, step):
        return analytic(x, t, step) + ramp[step].astype(x.dtype) * (0.5 * x - analytic(x, t, step))

    np.testing.assert_allclose(
        reverse(key, halves, solver, (2, 3), guidance=ramp).x, reverse(key, combined, solver, (2, 3)).x, rtol=1e-5
    )
    out, aux = guided(lambda x, t, step: (x, t), jnp.asarray(2.0), has_aux=True)(
        jnp.ones((1, 3)), jnp.int32(0), jnp.int32(0)
    )
    assert out.shape == (1, 3)
    assert aux == 0
    with pytest.raises(ValueError, match=r"guidance must be a number or one per step, shape \(6,\)"):
        reverse(key, halves, solver, (2, 3), guidance=ramp[:3])


def test_gradients_through_a_whole_run(key):
    solver = make_solver(of("pndm"), 5)
    init = jax.random.normal(key, (1, 3), jnp.float64)

    @jax.jit
    def final(init, shift):
        def model(x, t, step):
            return analytic(x, t, step) + shift[step]

        return jnp.sum(jnp.sin(samplers.reverse(key, model, solver, (1, 3), init=init, dtype=jnp.float64).x))

    shift = jnp.linspace(-0.1, 0.1, 5)
    gradients = jax.jit(jax.grad(final, argnums=(0, 1)))(init, shift)
    for argument, gradient in enumerate(gradients):
        directions = np.random.RandomState(0).standard_normal((2, *gradient.shape))
        for direction in directions:
            ahead, behind = (
                final(*[a + h * direction if i == argument else a for i, a in enumerate((init, shift))])
                for h in (1e-5, -1e-5)
            )
            # Central differences: h² plus rounding over h.
            assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(ahead - behind) / 2e-5, abs=1e-8)
    tangent = jax.jvp(lambda init: final(init, shift), (init,), (jnp.ones_like(init),))[1]
    assert float(tangent) == pytest.approx(float(jnp.sum(gradients[0])), rel=1e-9)


def test_solvers_of_one_shape_share_a_compilation(key):
    traces = []

    @jax.jit
    def run(key, solver, guidance):
        def model(x, t, step):
            traces.append(None)
            return jnp.tanh(x)

        return samplers.reverse(key, model, solver, (2, 3), guidance=guidance).x

    for schedule in (of(), of(beta_end=0.02), of("ddpm")):
        for scale in (1.0, 2.0):
            run(key, make_solver(schedule, 6, eta=0.5 if schedule.method == "ddim" else 0.0), scale)
    # DDPM's table has the shape of DDIM's with noise.
    assert len(traces) == 1


@pytest.mark.parametrize("method", METHODS)
def test_lowers_for_accelerators(method, key):
    fields = {"thresholding": True} if method in ("ddim", "ddpm", "dpmsolver++") else {}
    solver = make_solver(of(method, **fields), 6)
    reverse.trace(key, analytic, solver, (2, 3)).lower(lowering_platforms=("tpu", "cuda"))


@pytest.mark.slow
def test_a_model_is_sampled_in_its_own_size(key):
    out = sample(key, unet(), of(), 2, 3)
    assert out.x.shape == (2, 3, 8, 8)
    assert out.x.dtype == jnp.float32
    solver = make_solver(of(), 3)

    def by_hand(x, t, step):
        return unet().apply(unet().params, x, t)[0]

    np.testing.assert_allclose(out.x, reverse(key, by_hand, solver, (2, 3, 8, 8)).x, atol=2e-5)
    chunk = sample(key, unet(), of(), 1, 3, first=1)
    np.testing.assert_allclose(chunk.x, out.x[1:], atol=2e-5)
    shape = jax.eval_shape(lambda key: sample(key, unet(), of(), 1, 3, size=(4, 6)), key).x.shape
    assert shape == (1, 3, 4, 6)


def test_the_method_may_be_chosen(key):
    two = [sample(key, unet(), of(), 1, 2, method=method).x for method in (None, "euler")]
    np.testing.assert_allclose(two[1], sample(key, unet(), of("euler"), 1, 2).x, atol=2e-5)
    assert float(jnp.max(jnp.abs(two[0] - two[1]))) > 1e-3


@pytest.mark.slow
def test_strengths_are_windows_in_time(key):
    steps, value = 4, jnp.ones(8)
    run = functools.partial(sample, key, unet(), of(), 2, steps, trajectory=True, capture=(MID,))
    free = run(edits={MID: Edit("add", value, 0.0)})
    late = run(edits={MID: Edit("add", value, jnp.array([0.0, 0.0, 3.0, 0.0]))})
    # Until the third step the runs are one; there the tap shows the edit, and from then on the states differ.
    np.testing.assert_array_equal(late.states[:2], free.states[:2])
    np.testing.assert_array_equal(late.taps[MID][:2], free.taps[MID][:2])
    np.testing.assert_allclose(late.taps[MID][2], free.taps[MID][2] + 3.0, atol=1e-5)
    assert float(jnp.max(jnp.abs(late.states[2] - free.states[2]))) > 1e-3
    # A number acts at every step alike; several edits act in order.
    constant = run(edits={MID: Edit("add", value, 0.5)})
    rows = run(edits={MID: [Edit("add", value, jnp.full(steps, 0.25))] * 2})
    np.testing.assert_allclose(rows.x, constant.x, atol=2e-5)
    # Steps first, then what an edit takes: here one strength per example.
    one = run(edits={MID: Edit("add", value, jnp.tile(jnp.array([0.0, 0.5]), (steps, 1)))})
    np.testing.assert_allclose(one.x[0], free.x[0], atol=2e-5)
    np.testing.assert_allclose(one.x[1], constant.x[1], atol=2e-5)
    with pytest.raises(ValueError, match=r"edit of 'mid_block.resnets.0'.*\(4, ...\); got shape \(3,\)"):
        run(edits={MID: Edit("add", value, jnp.ones(3))})
    with pytest.raises(ValueError, match="no tap named 'mid'"):
        run(edits={"mid": Edit("add", value)})


@pytest.mark.slow
def test_gradients_in_a_strength(key):
    ramp = jnp.array([0.3, -0.2])

    def size(strength):
        edits = {MID: Edit("add", jnp.ones(8), strength)}
        return jnp.mean(jnp.square(sample(key, unet(), of("euler"), 1, 2, edits=edits).x))

    gradient = jax.grad(size)(ramp)
    ahead, behind = size(ramp + 0.1), size(ramp - 0.1)
    # Central differences in float32: h² / 6 times the third derivative, and 1e-7 / h.
    assert float(jnp.sum(gradient)) == pytest.approx(float(ahead - behind) / 0.2, rel=0.02)
    assert bool(jnp.all(gradient != 0))


@pytest.mark.slow
def test_edits_see_the_two_halves(key):
    steps, num = 2, 2
    given = {"condition": labels(1, 2), "unconditional": labels(0), "guidance": 3.0, "capture": (EARLY,)}
    run = functools.partial(sample, key, classes(), of(), num, steps, **given)
    free = run(edits={EARLY: Edit("add", jnp.ones(8), jnp.zeros((steps, 2 * num)))})
    assert free.taps[EARLY].shape == (steps, 2 * num, 8, 8, 8)
    # Both halves see the same x; their labels enter later.
    np.testing.assert_allclose(free.taps[EARLY][:, :num], free.taps[EARLY][:, num:], atol=1e-5)
    mask = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0]), (steps, 1))
    shifted = run(edits={EARLY: Edit("add", jnp.ones(8), mask)})
    difference = shifted.taps[EARLY] - free.taps[EARLY]
    np.testing.assert_allclose(difference[0, :num], 0.0, atol=1e-5)
    np.testing.assert_allclose(difference[0, num:], 1.0, atol=1e-5)

    def by_hand(x, t, step):
        return classes().apply(classes().params, x, t, class_labels=jnp.array([0, 0, 1, 2]))[0]

    expected = reverse(key, by_hand, make_solver(of(), steps), (num, 3, 8, 8), guidance=3.0).x
    np.testing.assert_allclose(free.x, expected, atol=5e-5)


def test_nothing_recompiles_over_values(monkeypatch):
    traces, call = [], Apply.__call__
    monkeypatch.setattr(Apply, "__call__", lambda *args, **given: traces.append(None) or call(*args, **given))
    for strength, scale, label, seed in ((0.0, 1.0, 1, 0), (jnp.ones(3), 7.5, 2, 1)):
        sample(
            jax.random.key(seed),
            classes(),
            of(beta_end=0.01 + 0.001 * seed),
            2,
            3,
            condition=labels(label),
            unconditional=labels(0),
            guidance=scale,
            edits={MID: Edit("add", jnp.full(8, 1.0 * seed), strength)},
        )
    assert len(traces) == 1


def test_the_variance_that_a_model_also_returns_is_left_out(key):
    model = tiny_model(UNET | {"out_channels": 6})
    schedule = of()

    def by_hand(x, t, step):
        return model.apply(model.params, x, t)[0][:, :3]

    expected = reverse(key, by_hand, make_solver(schedule, 2), (1, 3, 8, 8)).x
    np.testing.assert_allclose(sample(key, model, schedule, 1, 2).x, expected, atol=2e-5)


def test_half_precision_networks_are_walked_in_float32(key):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), unet())
    out = sample(key, model, of(), 1, 3).x
    assert out.dtype == jnp.float32
    # Three calls of a network with 8 bits.
    np.testing.assert_allclose(out, sample(key, unet(), of(), 1, 3).x, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"guidance": 2.0}, "guidance and unconditional go together"),
        ({"unconditional": labels(0)}, "guidance and unconditional go together"),
        ({"guidance": 2.0, "unconditional": Condition()}, "must give the same inputs"),
        ({"condition": labels(0, 1, 2)}, r"batch axis of size 2 or 1 first, got shapes \(3,\)"),
        ({"method": "deis"}, "method 'deis' is not known"),
        ({"eta": 2.0}, "eta must lie in"),
    ],
)
def test_bad_input_is_refused(given, message, key):
    defaults = {"num": 2, "num_steps": 3, "condition": labels(1)}
    with pytest.raises(ValueError, match=message):
        sample(key, classes(), of(), **(defaults | given))


def test_a_network_that_embeds_the_guidance_needs_the_embedding(key):
    model = tiny_model(LATENT | {"time_cond_proj_dim": 8})
    schedule = from_config({"_class_name": "DDIMScheduler"})
    context = jnp.zeros((1, 4, 48))
    with pytest.raises(ValueError, match="guidance scale as an embedding"):
        sample(key, model, schedule, 1, 2, condition=Condition(context))
    # Its activations can still be read.
    model.apply(model.params, jnp.zeros((1, 4, 8, 8)), 5, context)
    with pytest.raises(ValueError, match="guidance must be one number"):
        sample(key, model, schedule, 1, 2, condition=Condition(context), guidance=jnp.ones(2))
    drawn = sample(key, model, schedule, 1, 2, condition=Condition(context), guidance=3.0).x
    added = {"timestep_cond": samplers.guidance_embedding(3.0, 8)}
    # One pass on the condition alone, whatever the other half is.
    given = {"condition": Condition(context, None, added), "guidance": 7.0, "unconditional": Condition(context + 1)}
    np.testing.assert_array_equal(sample(key, model, schedule, 1, 2, **given).x, drawn)
    assert (
        jnp.max(jnp.abs(sample(key, model, schedule, 1, 2, condition=Condition(context), guidance=1.0).x - drawn)) > 0
    )
