"""Training: unbiased gradient, common noise, exact resume, and the meaning of weight decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dae_theory import AffineDae, denoise
from sims.sweeps import train
from sims.sweeps.train import Recipe

RATES = {"sigma": 0.3, "penalty": 1e-3, "learning_rate": 1e-2}


def rows(key, n=6, d=4):
    return jax.random.normal(jax.random.fold_in(key, 100), (n, d))


def run(key, data, recipe, steps, **changes):
    rates = RATES | changes
    state = train.start(
        key, data.shape[1], recipe, learning_rate=rates["learning_rate"], init_scale=0.3, dtype=data.dtype
    )
    return train.advance(state, jax.random.fold_in(key, 1), data, steps, recipe, **rates)


@functools.partial(jax.jit, static_argnames="recipe")
def compiled_run(key, data, recipe, steps, rates):
    """As :func:`run`, compiled once for all numbers of steps and all rates."""
    return run(key, data, recipe, steps, **rates)


@pytest.mark.parametrize("name", ["sgd", "momentum", "rmsprop", "adam", "adamw"])
@pytest.mark.parametrize(("tied", "biases"), [(False, False), (True, False), (False, True)])
def test_every_optimizer_lowers_the_objective(key, name, tied, biases):
    data = rows(key)
    recipe = Recipe(width=8, optimizer=name, tied=tied, biases=biases, weight_decay=1e-4 if name == "adamw" else 0.0)
    start, end = (compiled_run(key, data, recipe, steps, RATES) for steps in (0, 300))
    eps = jax.random.normal(jax.random.fold_in(key, 5), data.shape)
    before, after = (train.noisy_objective(s.params, data, eps, 0.3, 1e-3) for s in (start, end))
    assert float(after) < 0.6 * float(before)
    assert int(end.step) == 300
    assert bool(jnp.all(end.dae.w1 == end.dae.w2)) == tied
    assert isinstance(end.dae, AffineDae) == biases
    if biases:
        assert float(jnp.min(jnp.abs(end.dae.b2))) > 0


def test_biases_take_the_gradient_of_the_objective_with_them_and_are_not_penalized(key):
    """At a penalty that pulls weights to zero, b2 goes to the mean of the rows; tied networks share W alone."""
    data = rows(key)
    for tied in (False, True):
        recipe = Recipe(width=3, optimizer="adam", tied=tied, biases=True)
        end = compiled_run(key, data, recipe, 1500, RATES | {"penalty": 30.0, "learning_rate": 1e-2}).dae
        np.testing.assert_allclose(end.b2, data.mean(axis=0), atol=0.05)
        assert float(jnp.max(jnp.abs(end.w1))) < 0.05
    dae = run(key, data, recipe, 0).params
    eps = jnp.zeros_like(data)
    whole = train.noisy_objective(dae, data, eps, 0.3, 0.1)
    network = train.as_dae(dae)._replace(b1=jnp.full(3, 0.2), b2=jnp.full(4, 0.1))
    errors = [jnp.sum(jnp.square(denoise(network, x) - x)) for x in data]
    expected = jnp.mean(jnp.stack(errors)) + 0.1 * (jnp.sum(network.w1**2) + jnp.sum(network.w2**2))
    np.testing.assert_allclose(train.noisy_objective(network, data, eps, 0.3, 0.1), expected, rtol=1e-12)
    assert float(whole) != float(expected)


def test_one_sgd_step_is_the_gradient_by_hand(key):
    data = rows(key)
    recipe = Recipe(width=3, optimizer="sgd")
    before, after = run(key, data, recipe, 0).dae, run(key, data, recipe, 1).dae
    step_key = jax.random.fold_in(jax.random.fold_in(key, 1), 0)
    noise_key = jax.random.split(step_key)[1]
    eps = np.stack([jax.random.normal(jax.random.fold_in(noise_key, i), (4,)) for i in range(6)])
    w1, w2, x = (np.asarray(a) for a in (*before, data))
    y = x + 0.3 * eps
    h = np.maximum(y @ w1, 0)
    residual = h @ w2.T - x
    g2 = 2 / 6 * residual.T @ h + 2e-3 * w2
    g1 = 2 / 6 * y.T @ ((residual @ w2) * (h > 0)) + 2e-3 * w1
    np.testing.assert_allclose(after.w1, w1 - 1e-2 * g1, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(after.w2, w2 - 1e-2 * g2, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_update_rules_are_those_of_pytorch(schedule):
    """Three steps of a parameter by hand, with the formulas and constants of torch.optim."""
    gradients, rate, decay, eps = [1.0, -0.5, 2.0], 0.1, 0.3, 1e-8
    rates = [rate * (0.5 * (1 + np.cos(np.pi * t / 10)) if schedule == "cosine" else 1.0) for t in range(3)]

    def steps(name):
        x, m, v = 1.0, 0.0, 0.0
        for t, (g, r) in enumerate(zip(gradients, rates, strict=True), 1):
            if name == "sgd":
                update = g
            elif name == "momentum":
                m = update = 0.9 * m + g
            elif name == "rmsprop":
                v = 0.99 * v + 0.01 * g * g
                update = g / (np.sqrt(v) + eps)
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps)
                update += decay * x if name == "adamw" else 0.0
            x -= r * update
        return x

    for name in ("sgd", "momentum", "rmsprop", "adam", "adamw"):
        recipe = Recipe(width=1, optimizer=name, schedule=schedule, steps=10, weight_decay=decay)
        rule, x = train.optimizer(recipe, rate), jnp.ones(1)
        with jax.numpy_dtype_promotion("standard"):
            state = rule.init(x)
            for g in gradients:
                update, state = rule.update(jnp.full(1, g), state, x)
                x = x + update
        np.testing.assert_allclose(x[0], steps(name), rtol=1e-12, err_msg=name)


def test_mini_batch_gradients_average_to_the_full_gradient(key):
    data, recipe = rows(key), Recipe(width=3, optimizer="sgd", batch_size=2)
    params = run(key, data, recipe, 0).params

    @functools.partial(jax.jit, static_argnames="batch_size")
    @functools.partial(jax.vmap, in_axes=(0, None))
    def gradients(i, batch_size):
        batch, eps = train._draw(jax.random.fold_in(key, i), data, batch_size)
        return jax.grad(train.noisy_objective)(params, batch, eps, 0.3, 1e-3).w2

    mini = np.asarray(gradients(jnp.arange(4000), 2))
    full = np.asarray(gradients(jnp.arange(4000, 8000), 0))
    error = np.sqrt(mini.var(0) / 4000 + full.var(0) / 4000)
    assert np.all(np.abs(mini.mean(0) - full.mean(0)) < 5 * error)
    # A sixth of the rows' noise is averaged away by a batch of two: the comparison above is not of equals.
    assert mini.var() > 2 * full.var()


def test_a_run_in_pieces_equals_a_run_in_one_bit_for_bit(key):
    data, recipe = rows(key), Recipe(width=5, batch_size=3, schedule="cosine", steps=40)
    whole = run(key, data, recipe, 40)
    state = run(key, data, recipe, 13)
    pieces = train.advance(state, jax.random.fold_in(key, 1), data, 27, recipe, **RATES)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_keep_their_noise_when_others_join(key):
    data = rows(key, n=9)
    _, few = train._draw(jax.random.clone(key), data[:4], 0)
    _, many = train._draw(key, data, 0)
    np.testing.assert_array_equal(few, many[:4])


def test_mapping_over_sigma_equals_single_runs(key):
    data, recipe = rows(key), Recipe(width=5)
    sigmas = jnp.array([0.1, 0.5])
    together = jax.vmap(lambda s: run(key, data, recipe, 20, sigma=s).dae.w1)(sigmas)
    for i, sigma in enumerate((0.1, 0.5)):
        alone = compiled_run(key, data, recipe, 20, RATES | {"sigma": sigma}).dae
        np.testing.assert_allclose(together[i], alone.w1, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("parameters", ["free", "tied"])
def test_coupled_weight_decay_is_the_stated_penalty(key, parameters):
    """A script's loss, averaged over pixels, with its optimizer's decay, has its gradient along the objective's."""
    data, decay = rows(key), 0.3
    d = data.shape[1]
    tied = parameters == "tied"
    eps = jax.random.normal(jax.random.fold_in(key, 5), data.shape)
    params = run(key, data, Recipe(width=3, tied=tied), 0).params

    def script_loss(params):
        return train.noisy_objective(params, data, eps, 0.3, 0.0) / d

    rule = optax.chain(optax.add_decayed_weights(decay))
    script, _ = rule.update(jax.grad(script_loss)(params), rule.init(params), params)
    penalty = train.penalty_from_weight_decay(decay, d, parameters=parameters)
    ours = jax.grad(train.noisy_objective)(params, data, eps, 0.3, penalty)
    for a, b in zip(jax.tree.leaves(script), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(d * a, b, rtol=1e-12, atol=1e-14)


def test_two_parameters_over_one_memory_decay_as_free_ones():
    assert train.penalty_from_weight_decay(1e-2, 1024, parameters="shared") == pytest.approx(5.12)
    assert train.penalty_from_weight_decay(1e-2, 1024, parameters="tied") == pytest.approx(2.56)


def test_divergence_is_an_outcome_not_an_error(key):
    end = run(key, rows(key), Recipe(width=4, optimizer="sgd"), 200, learning_rate=1e3)
    assert not np.all(np.isfinite(end.dae.w1))


def test_one_trace_serves_all_numbers_and_lengths(key):
    data, recipe, traces = rows(key), Recipe(width=4), []

    @jax.jit
    def go(sigma, penalty, rate, steps):
        traces.append(1)
        return run(key, data, recipe, steps, sigma=sigma, penalty=penalty, learning_rate=rate).dae

    for sigma in (0.1, 0.2):
        go(jnp.asarray(sigma), jnp.asarray(sigma / 9), jnp.asarray(1e-3 * sigma), jnp.asarray(int(10 * sigma)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"sigma": np.nan}, "sigma has 1 non-finite"),
    ],
)
def test_impossible_numbers_are_refused(key, changes, message):
    with pytest.raises(ValueError, match=message):
        run(key, rows(key), Recipe(width=2), 1, **changes)


def test_bad_data_and_names_are_refused(key):
    with pytest.raises(ValueError, match="data has 1 non-finite"):
        run(key, rows(key).at[0, 0].set(jnp.inf), Recipe(width=2), 1)
    with pytest.raises(ValueError, match="optimizer must be one of sgd.*'lion'"):
        run(key, rows(key), Recipe(width=2, optimizer="lion"), 1)
    with pytest.raises(ValueError, match="schedule must be one of"):
        run(key, rows(key), Recipe(width=2, schedule="step"), 1)
    with pytest.raises(ValueError, match="parameters must be one of"):
        train.penalty_from_weight_decay(1.0, 3, parameters="both")


def test_lowers_for_accelerators():
    recipe = Recipe(width=3, batch_size=2)

    def go(data, sigma):
        state = train.start(jax.random.key(0), 4, recipe, learning_rate=0.1, init_scale=0.1)
        return train.advance(state, jax.random.key(1), data, 3, recipe, sigma=sigma, penalty=0.0, learning_rate=0.1).dae

    traced = jax.jit(go).trace(jax.ShapeDtypeStruct((5, 4), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    assert traced.lower(lowering_platforms=("tpu", "cuda")).as_text()


@pytest.mark.parametrize("batch_size", [0, 3])
def test_cells_in_turn_and_side_by_side_take_the_same_steps(key, batch_size, monkeypatch):
    """Both ways of mapping are those of cells alone, to rounding; which one is taken is seen in the program."""
    data, recipe = rows(key), Recipe(width=4, batch_size=batch_size)
    sigmas = jnp.asarray([0.1, 0.3, 0.9])
    found, loops = {}, {}
    for turn in (False, True):
        monkeypatch.setattr(train, "in_turn", lambda *_, turn=turn: turn)
        mapped = jax.jit(jax.vmap(lambda sigma: run(key, data, recipe, 20, sigma=sigma).dae))
        found[turn] = mapped(sigmas)
        loops[turn] = mapped.lower(sigmas).as_text().count("stablehlo.while")
    # One more, in that over steps: the loop over cells.
    assert loops[True] == loops[False] + 1
    alone = [compiled_run(key, data, recipe, 20, RATES | {"sigma": float(sigma)}).dae for sigma in sigmas]
    for dae in found.values():
        for i, one in enumerate(alone):
            np.testing.assert_allclose(dae.w1[i], one.w1, rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(dae.w2[i], one.w2, rtol=1e-11, atol=1e-13)


def test_large_cells_go_in_turn_where_a_cache_bounds_them():
    assert not train.in_turn(64, 64, 64, "cpu")
    assert train.in_turn(1024, 64, 64, "cpu")
    assert not train.in_turn(1024, 64, 64, "gpu")
