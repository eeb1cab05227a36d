"""The risk three ways: exact, by quadrature in the plane, by Monte Carlo in both forms; its derivatives and limits."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dae_theory import risk
from dae_theory.model import ReluDae, denoise, encode, jacobian
from dae_theory.relu_gaussian import relu_mean, relu_second_moment

value = jax.jit(risk.exact_risk, static_argnames="chunk_size")
moments_at, risk_at = jax.jit(risk.code_moments), jax.jit(risk.exact_risk_at)


@jax.jit
def slopes(dae, data, sigma, penalty=0.0):
    """All first derivatives of the objective, two samples at a time."""
    return jax.grad(functools.partial(risk.exact_objective, chunk_size=2), argnums=(0, 1, 2, 3))(
        dae, data, sigma, penalty
    )


def gradient(dae, data, sigma):
    return slopes(dae, data, sigma)[0]


@jax.jit
def hessian_product(dae, turn, data, sigma):
    return jax.jvp(lambda dae: jax.grad(risk.exact_risk)(dae, data, sigma, chunk_size=2), (dae,), (turn,))[1]


def degenerate_dae(key, dim):
    """Six units: two generic, one parallel and one antiparallel to the first, one without encoder, one dead."""
    k1, k2 = jax.random.split(key)
    w1, w2 = jax.random.normal(k1, (dim, 6)), jax.random.normal(k2, (dim, 6))
    w1 = w1.at[:, 2].set(1.7 * w1[:, 0]).at[:, 3].set(-0.6 * w1[:, 0]).at[:, 4:].set(0.0)
    return ReluDae(w1, w2.at[:, 5].set(0.0))


@functools.cache
def degenerate_case():
    """The network, data and noise that most tests share, compiled once."""
    key = jax.random.key(7)
    return degenerate_dae(key, 5), jax.random.normal(jax.random.fold_in(key, 2), (4, 5)), 0.6


def keys_of(key, count):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def tree_flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def by_polar_quadrature(dae, x, sigma):
    """``E‖f(y) − x‖²`` in the plane, smooth in polar coordinates between the gates, which are rays from 0."""
    w1, w2, x = (np.asarray(a) for a in (*dae, x))
    live = w1[:, np.abs(w1).sum(0) > 0]
    gates = np.arctan2(live[1], live[0])[:, None] + np.pi / 2 * np.array([1, -1])
    # Extra cuts around the direction of x, where the density sits.
    toward = np.arctan2(x[1], x[0]) + np.array([-np.pi, -1, -0.3, -0.1, 0, 0.1, 0.3, 1])
    cuts = np.sort(np.concatenate([gates.ravel(), toward]) % (2 * np.pi))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    low, high = cuts[:, None], np.append(cuts[1:], cuts[0] + 2 * np.pi)[:, None]
    angle, w_angle = (low + (high - low) * (nodes + 1) / 2).ravel(), ((high - low) / 2 * weights).ravel()
    edges = np.clip(np.linalg.norm(x) + sigma * np.linspace(-9, 9, 7), 0, None)
    low, high = edges[:-1, None], edges[1:, None]
    radius, w_radius = (low + (high - low) * (nodes + 1) / 2).ravel(), ((high - low) / 2 * weights).ravel()
    y = radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], -1)[None]
    density = np.exp(-np.sum((y - x) ** 2, -1) / (2 * sigma**2)) / (2 * np.pi * sigma**2) * radius[:, None]
    loss = np.sum((np.maximum(y @ w1, 0) @ w2.T - x) ** 2, -1)
    return w_radius @ (density * loss) @ w_angle


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_exact_risk_against_quadrature_in_the_plane(key, sigma):
    dae, data = degenerate_dae(key, 2), jax.random.normal(jax.random.fold_in(key, 2), (3, 2))
    expected = np.mean([by_polar_quadrature(dae, x, sigma) for x in data])
    np.testing.assert_allclose(value(dae, data, sigma), expected, rtol=1e-12)


def test_exact_risk_on_the_line():
    """In one dimension all pairs are parallel or antiparallel, and f has one slope on each side of 0."""
    w1, w2 = jnp.array([[1.0, 2.0, -0.5, 0.0, -3.0]]), jnp.array([[0.3, -0.1, 0.8, 5.0, 0.2]])
    x, s = jnp.array(0.4), jnp.array(0.7)
    # E(f − x)² with f = up [y]₊ + down [−y]₊.
    up, down = (jnp.sum(jnp.maximum(side * w1, 0) * w2) for side in (1, -1))
    expected = up**2 * relu_second_moment(x, s) + down**2 * relu_second_moment(-x, s) + x**2
    expected -= 2 * x * (up * relu_mean(x, s) + down * relu_mean(-x, s))
    np.testing.assert_allclose(value(ReluDae(w1, w2), x[None, None], 0.7), expected, rtol=1e-13)


def test_exact_risk_is_the_raw_moment_formula():
    """``N − 2 (W₂ᵀx)ᵀ E[h] + tr(W₂ᵀW₂ E[h hᵀ])``, with the moments that ``code_moments`` reports."""
    dae, data, sigma = degenerate_case()
    x = data[0]
    moments = moments_at(dae, x, sigma)
    np.testing.assert_array_equal(moments.covariance, moments.covariance.T)
    assert np.linalg.eigvalsh(moments.covariance).min() > -1e-14
    raw = x @ x - 2 * (x @ dae.w2) @ moments.mean + jnp.sum((dae.w2.T @ dae.w2) * moments.second)
    np.testing.assert_allclose(risk_at(dae, x, sigma), raw, rtol=1e-13)


def test_code_moments_against_monte_carlo(key):
    dae, data, sigma = degenerate_case()
    noise = sigma * jax.random.normal(key, (40_000, 5))
    codes = np.asarray(jax.vmap(lambda e: encode(dae, data[0] + e))(noise))
    moments = moments_at(dae, data[0], sigma)
    for sample, exact in [(codes, moments.mean), (codes[:, :, None] * codes[:, None, :], moments.second)]:
        error = sample.std(0) / np.sqrt(len(codes))
        assert (np.abs(sample.mean(0) - exact) <= 4.5 * error + 1e-15).all()


def test_without_noise_the_risk_is_that_of_the_data(key):
    dae, data, _ = degenerate_case()
    still = jnp.mean(jnp.sum(jnp.square(jax.vmap(lambda x: denoise(dae, x))(data) - data), axis=1))
    np.testing.assert_allclose(value(dae, data, 0.0), still, rtol=1e-14)
    for sampled in (risk.monte_carlo_risk, risk.gram_monte_carlo_risk):
        np.testing.assert_allclose(sampled(jax.random.clone(key), dae, data, 0.0, num_draws=7), still, rtol=1e-14)
    # Away from the gates the noise adds σ²‖J‖² exactly, so the rate is 2 with this constant.
    sigmas = np.array([1e-5, 1e-4, 1e-3])
    rise = np.array([value(dae, data, s) for s in sigmas]) - still
    slope = np.mean([np.sum(jacobian(dae, x) ** 2) for x in data])
    np.testing.assert_allclose(rise[1:] / sigmas[1:] ** 2, slope, rtol=1e-5)
    assert abs(np.polyfit(np.log(sigmas), np.log(rise), 1)[0] - 2) < 1e-3
    assert np.isfinite(tree_flat(slopes(dae, data, 0.0))).all()


def test_much_noise_leaves_the_homogeneous_part():
    dae, data, _ = degenerate_case()
    pure = value(dae, jnp.zeros_like(data), 1.0)
    np.testing.assert_allclose(value(dae, data, 1e6) / 1e12, pure, rtol=1e-5)


@pytest.mark.parametrize("gram", [False, True])
def test_monte_carlo_agrees_within_its_standard_error(key, gram):
    dae, data, sigma = degenerate_case()
    estimate = functools.partial(risk.monte_carlo_estimate, num_draws=50, gram=gram)
    mean, error = jax.jit(jax.vmap(lambda key: estimate(key, dae, data, sigma)))(keys_of(key, 200))
    score = (np.asarray(mean) - float(value(dae, data, sigma))) / np.asarray(error)
    # Scores are about t-distributed: their mean is within 4/√200, their spread within 4/√400, of standard.
    assert abs(score.mean()) < 4 / np.sqrt(200)
    assert abs(score.std() - 1) < 4 / np.sqrt(400)


def test_both_monte_carlo_forms_have_one_law(key):
    dae, data, sigma = degenerate_case()
    keys = keys_of(key, 8000)

    def losses(function, keys):
        return np.asarray(jax.jit(jax.vmap(lambda key: function(key, dae, data[:1], sigma, num_draws=1)))(keys))

    direct, gram = losses(risk.monte_carlo_risk, keys[:4000]), losses(risk.gram_monte_carlo_risk, keys[4000:])
    assert scipy.stats.ks_2samp(direct, gram).pvalue > 1e-3
    spread = [np.var((x - x.mean()) ** 2) / x.size for x in (direct, gram)]
    assert abs(direct.var() - gram.var()) < 4 * np.sqrt(sum(spread))
    assert abs(direct.mean() - gram.mean()) < 4 * np.sqrt((direct.var() + gram.var()) / 4000)


def test_monte_carlo_gradients_are_unbiased_and_the_gram_form_varies_less(key):
    """Two parallel units and one other in 24 dimensions, where the noise of 3 dimensions is far less than all of it."""
    k1, k2, k3 = jax.random.split(key, 3)
    dae = ReluDae(*jax.random.normal(k1, (2, 24, 3)) / 24**0.5)
    dae = dae._replace(w1=dae.w1.at[:, 2].set(1.7 * dae.w1[:, 0]))
    data, sigma, spread = jax.random.normal(k2, (2, 24)), 1.0, {}
    exact = tree_flat(gradient(dae, data, sigma))
    for sampled in (risk.monte_carlo_risk, risk.gram_monte_carlo_risk):
        slope = jax.grad(functools.partial(sampled, num_draws=4), argnums=1)
        draws = jax.jit(jax.vmap(lambda key, slope=slope: slope(key, dae, data, sigma)))(keys_of(k3, 1000))
        draws = np.concatenate([np.asarray(leaf).reshape(1000, -1) for leaf in draws], axis=1)
        spread[sampled] = draws[:, :72].var(0).sum()
        # 144 entries: the largest of so many scores exceeds 4.5 once in 1,000.
        assert (np.abs(draws.mean(0) - exact) < 4.5 * np.sqrt(draws.var(0) / 1000)).all()
    assert spread[risk.gram_monte_carlo_risk] < 0.7 * spread[risk.monte_carlo_risk]


def test_results_do_not_depend_on_chunks(key):
    dae, data, sigma = degenerate_case()
    for chunk_size in (1, 3):
        np.testing.assert_allclose(value(dae, data, sigma, chunk_size=chunk_size), value(dae, data, sigma), rtol=1e-14)
    for gram, chunk_size in [(False, 3), (True, 15)]:
        found = [
            risk.monte_carlo_estimate(jax.random.clone(key), dae, data, sigma, num_draws=7, gram=gram, chunk_size=chunk)
            for chunk in (chunk_size, None)
        ]
        np.testing.assert_allclose(*found, rtol=1e-13)


def test_noise_is_keyed_by_sample_and_draw(key):
    """So more samples or more draws extend fewer."""
    dae, data, sigma = degenerate_case()
    keys = [[jax.random.fold_in(jax.random.fold_in(key, i), t) for t in range(7)] for i in range(4)]
    errors = [
        denoise(dae, x + sigma * jax.random.normal(k, (5,))) - x for x, row in zip(data, keys, strict=True) for k in row
    ]
    found = risk.monte_carlo_risk(key, dae, data, sigma, num_draws=7)
    np.testing.assert_allclose(found, 5 * np.mean(np.square(errors)), rtol=1e-13)


def test_vmap_over_data_and_objective(key):
    dae, data, sigma = degenerate_case()
    each = jax.jit(jax.vmap(risk.exact_risk_at, in_axes=(None, 0, None)))(dae, data, sigma)
    np.testing.assert_allclose(jnp.mean(each), value(dae, data, sigma), rtol=1e-14)
    weights = sum(float(jnp.sum(w**2)) for w in dae)
    exact = risk.exact_objective(dae, data, sigma, 0.3)
    np.testing.assert_allclose(exact, value(dae, data, sigma) + 0.3 * weights, rtol=1e-14)
    sampled = risk.monte_carlo_objective(key, dae, data, sigma, 0.3, num_draws=7)
    plain = risk.monte_carlo_risk(jax.random.clone(key), dae, data, sigma, num_draws=7)
    np.testing.assert_allclose(sampled - plain, 0.3 * weights, rtol=1e-12)


def test_gradients_against_differences_and_hessian_products_against_gradients(key):
    """With parallel and antiparallel columns, turned out of their line."""
    dae, data, sigma = degenerate_case()
    turn, other, third = (ReluDae(*jax.random.normal(jax.random.fold_in(key, i), (2, 5, 6))) for i in range(3))
    # Every unit alive: zero columns have no second derivative.
    dae = ReluDae(dae.w1.at[:, 4:].set(third.w1[:, 4:]), dae.w2.at[:, 5].set(third.w2[:, 5]))
    step = 1e-5

    def shifted(sign):
        return jax.tree.map(lambda w, t: w + sign * step * t, dae, turn)

    slope = tree_flat(gradient(dae, data, sigma))
    rise = (value(shifted(1), data, sigma) - value(shifted(-1), data, sigma)) / (2 * step)
    np.testing.assert_allclose(slope @ tree_flat(turn), rise, rtol=1e-8)
    product = tree_flat(hessian_product(dae, turn, data, sigma))
    change = tree_flat(gradient(shifted(1), data, sigma)) - tree_flat(gradient(shifted(-1), data, sigma))
    # The Hessian has a kink at parallel columns: differences see it to first order in the step.
    np.testing.assert_allclose(product, change / (2 * step), rtol=0, atol=20 * step)
    backward = tree_flat(hessian_product(dae, other, data, sigma)) @ tree_flat(turn)
    np.testing.assert_allclose(product @ tree_flat(other), backward, rtol=1e-12)


def test_gradient_in_sigma_data_and_penalty(key):
    dae, data, sigma = degenerate_case()
    _, in_data, in_sigma, in_penalty = slopes(dae, data, sigma, 0.1)
    step, turn = 1e-5, jax.random.normal(key, data.shape)
    for found, (up, down) in [
        (jnp.vdot(in_data, turn), [(data + s * turn, sigma) for s in (step, -step)]),
        (in_sigma, [(data, sigma + s) for s in (step, -step)]),
    ]:
        np.testing.assert_allclose(found, (value(dae, *up) - value(dae, *down)) / (2 * step), rtol=1e-7)
    np.testing.assert_allclose(in_penalty, sum(float(jnp.sum(w**2)) for w in dae), rtol=1e-14)


def test_a_zero_column_has_the_mean_of_the_one_sided_derivatives(key):
    dae, data, sigma = degenerate_case()
    turn = jax.random.normal(key, (5,))
    # The mean of the sides is off by a term in step, besides rounding of the value over step.
    step = 1e-7
    found = gradient(dae, data, sigma).w1[:, 4] @ turn
    ahead, behind = (value(dae._replace(w1=dae.w1.at[:, 4].set(s * turn)), data, sigma) for s in (step, -step))
    here = value(dae, data, sigma)
    # The two sides differ: it is a kink; their mean is what the gradient gives.
    assert abs((ahead - here) / step - (here - behind) / step) > 0.1
    np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-6)


def test_a_dead_unit_wakes_homogeneously_of_degree_two_but_not_quadratically(key):
    dae, data, sigma = degenerate_case()
    here = value(dae, data, sigma)
    assert np.all(tree_flat(gradient(dae, data, sigma)).reshape(2, 5, 6)[:, :, 5] == 0)
    turn = jax.random.normal(key, (2, 5))

    def rise(t1, t2):
        awake = ReluDae(dae.w1.at[:, 5].set(t1 * turn[0]), dae.w2.at[:, 5].set(t2 * turn[1]))
        return float(value(awake, data, sigma) - here)

    # Leading order t², next t⁴.
    assert abs(rise(1e-3, 1e-3) / rise(1e-2, 1e-2) - 1e-2) < 1e-4
    # A quadratic form would give the two signs of t₁ opposite cross terms.
    assert abs(rise(1e-3, 1e-3) + rise(-1e-3, 1e-3)) > 0.1 * abs(rise(1e-3, 1e-3))


def test_exact_risk_in_the_span_of_the_data(key):
    """With columns in span(X) of rank 3: the risk in an orthonormal basis of it, and a gradient that stays there."""
    k1, k2, k3 = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(k1, (5, 3)))[0]
    data = jax.random.normal(k2, (4, 3))
    small = ReluDae(*jax.random.normal(k3, (2, 3, 6)))
    large = ReluDae(basis @ small.w1, basis @ small.w2)
    np.testing.assert_allclose(value(large, data @ basis.T, 0.7), value(small, data, 0.7), rtol=1e-13)
    for wide, narrow in zip(gradient(large, data @ basis.T, 0.7), gradient(small, data, 0.7), strict=True):
        np.testing.assert_allclose(wide, basis @ narrow, rtol=0, atol=1e-13 * np.abs(narrow).max())


def simplex(scale=1.5):
    """Four points in three dimensions with pairwise cosines −1/3 and N = 3 scale²."""
    return scale * jnp.array([(1.0, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])


@pytest.mark.parametrize(
    ("sigma", "golden"), [(0.2, 7.515e-7), (0.25, 3.650e-5), (0.3, 3.260e-4), (0.4, 2.953e-3), (0.5, 6.616e-3)]
)
def test_the_memorizing_minimizer_is_almost_stationary(sigma, golden):
    """Corollary 3.2 on a simplex: columns ``r x``, ``r² = (N − nλ)/(N² + σ²N)``, and zeros; golden gradient norms."""
    data, n, penalty, square = simplex(), 4, 1e-3, 6.75
    w = data.T * jnp.sqrt((square - n * penalty) / (square**2 + sigma**2 * square))
    dae = ReluDae(*(2 * [jnp.pad(w, ((0, 0), (0, 2)))]))
    slope = tree_flat(slopes(dae, data, sigma, penalty)[0])
    # Half a unit of the fourth digit.
    np.testing.assert_allclose(np.linalg.norm(slope), golden, rtol=0, atol=5e-4 * 10 ** np.floor(np.log10(golden)))
    main = (square * sigma**2 + (n * penalty) ** 2) / (square + sigma**2)
    # Up to the noise that crosses gates, Φ(−γ/σ) with γ = ‖x‖/3.
    assert abs(value(dae, data, sigma) - main) < scipy.stats.norm.cdf(-np.sqrt(square) / 3 / sigma)


exponent = st.floats(-3, 3).map(lambda e: 10**e)


@given(
    exponent,
    exponent,
    st.lists(st.sampled_from(["live", "dead", "split", "turned"]), min_size=6, max_size=6),
    st.data(),
)
def test_scales_and_degenerate_configurations(scale, balance, kinds, drawn):
    seed = drawn.draw(st.integers(0, 2**20))
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    w1, w2 = (np.array(jax.random.normal(k, (5, 6))) for k in (k1, k2))
    for j, kind in enumerate(kinds):
        if kind == "dead":
            w1[:, j] = 0
        elif kind != "live":
            w1[:, j] = w1[:, 0] * (0.8 if kind == "split" else -1.3)
    dae, data, sigma = ReluDae(jnp.asarray(w1), jnp.asarray(w2)), jax.random.normal(k3, (4, 5)), 0.7
    here = float(value(dae, data, sigma))
    # f is homogeneous of degree one in y and in each unit: (c w₁, w₂/c) is the same network.
    stretched = value(ReluDae(dae.w1 * balance, dae.w2 / balance), scale * data, scale * sigma)
    np.testing.assert_allclose(stretched, scale**2 * here, rtol=1e-12)
    # A unit split in two, (c₁w₁, c₁w₂) and (c₂w₁, c₂w₂), c₁² + c₂² = 1.
    c = jnp.array([0.6, 0.8])[None, :]
    halves = [jnp.concatenate([w[:, :5], w[:, 5:] * c], axis=1) for w in dae]
    np.testing.assert_allclose(value(ReluDae(*halves), data, sigma), here, rtol=1e-12)
    slope = gradient(ReluDae(dae.w1 * balance, dae.w2 / balance), scale * data, scale * sigma)
    # Euler: the sum of W₁·∂W₁ equals that of W₂·∂W₂, as rescaling changes nothing.
    both = [float(jnp.vdot(w, g)) for w, g in zip((dae.w1 * balance, dae.w2 / balance), slope, strict=True)]
    assert np.isfinite(tree_flat(slope)).all()
    assert abs(both[0] - both[1]) < 1e-11 * scale**2 * max(here, 1.0)


def test_float32_keeps_its_digits_where_raw_moments_would_cancel():
    # N = 6.75e4 and risk about σ² = 1e-4: nine digits apart, more than float32 has.
    data, sigma = simplex(150.0), 0.01
    w = data.T / jnp.linalg.norm(data[0])
    single = ReluDae(*(2 * [w.astype(jnp.float32)]))
    low = risk.exact_risk(single, data.astype(jnp.float32), sigma)
    double = jax.tree.map(lambda a: a.astype(jnp.float64), single)
    high = risk.exact_risk(double, data.astype(jnp.float32).astype(jnp.float64), sigma)
    assert low.dtype == jnp.float32
    variance = 1e-4
    # The bias ‖W₂E[h] − x‖ is rounding of x itself, some ulp of 150 in each of three coordinates.
    ulp = np.finfo(np.float32).eps * 128
    assert abs(float(low) - float(high)) < 50 * ulp**2 + 1e-5 * variance


def test_memory_is_bounded_by_the_chunk():
    w, data = jax.ShapeDtypeStruct((32, 100), jnp.float64), jax.ShapeDtypeStruct((10_000, 32), jnp.float64)
    for function in (risk.exact_risk, jax.grad(risk.exact_risk)):
        memory = jax.jit(function).lower(ReluDae(w, w), data, 0.2).compile().memory_analysis()
        # One array of all samples and pairs would take 404 MB.
        assert memory.temp_size_in_bytes < 50e6


def test_one_trace_for_all_noise_levels_and_penalties():
    traces = []
    traced = jax.jit(lambda *args: traces.append(1) or risk.exact_objective(*args))
    dae, data, _ = degenerate_case()
    for sigma, penalty in [(0.1, 0.0), (0.2, 0.5)]:
        traced(dae, data, sigma, penalty)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -0.1}, "sigma must not be negative, got -0.1"),
        ({"sigma": np.nan}, "sigma has 1 non-finite"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"data": jnp.full((2, 5), jnp.inf)}, "data has 10 non-finite"),
        ({"data": jnp.ones(5)}, r"shape \(n, d\)"),
        ({"data": jnp.ones((0, 5))}, "empty"),
        ({"data": jnp.ones((2, 5), int)}, "floating point"),
        ({"data": jnp.ones((2, 5), jnp.float32)}, "float32 but the weights are float64"),
        ({"data": jnp.ones((2, 4))}, "4 columns but the weights have 5 rows"),
        ({"dae": ReluDae(jnp.ones((5, 2)), jnp.ones((5, 3)))}, "must have the same shape"),
        ({"dae": ReluDae(jnp.full((5, 2), jnp.nan), jnp.ones((5, 2)))}, "w1 has 10 non-finite"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(key, monkeypatch, change, message):
    # Wrong ranks and dtypes must be refused without the type checker of the tests, too.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    dae, data, sigma = degenerate_case()
    given = {"dae": dae, "data": data, "sigma": sigma, "penalty": 0.1, **change}
    draws = given.pop("num_draws", 2)
    for function in (functools.partial(risk.monte_carlo_objective, key, num_draws=draws), risk.exact_objective):
        with pytest.raises(ValueError, match=message):
            function(**given)
        if "num_draws" in change:
            break


def test_bad_input_of_one_example_and_of_the_estimate(key):
    dae, data, sigma = degenerate_case()
    with pytest.raises(ValueError, match="3 columns but the weights have 5 rows"):
        risk.exact_risk_at(dae, data[0, :3], sigma)
    with pytest.raises(ValueError, match="sigma must not be negative"):
        risk.code_moments(dae, data[0], -1.0)
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        risk.monte_carlo_estimate(key, dae, data, sigma, num_draws=1)


def test_lowers_for_accelerators():
    w, data = jax.ShapeDtypeStruct((8, 5), jnp.float32), jax.ShapeDtypeStruct((7, 8), jnp.float32)
    scalar, x = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    dae, key = ReluDae(w, w), jax.eval_shape(lambda: jax.random.key(0))
    for function, args in [
        (jax.grad(risk.exact_objective), (dae, data, scalar, scalar)),
        (risk.exact_risk, (dae, data, scalar)),
        (risk.exact_risk_at, (dae, x, scalar)),
        (risk.code_moments, (dae, x, scalar)),
        (functools.partial(risk.monte_carlo_objective, num_draws=3, chunk_size=4), (key, dae, data, scalar, scalar)),
        (functools.partial(risk.monte_carlo_estimate, num_draws=3), (key, dae, data, scalar)),
        (functools.partial(risk.gram_monte_carlo_risk, num_draws=3), (key, dae, data, scalar)),
    ]:
        jax.jit(function).trace(*args).lower(lowering_platforms=("tpu", "cuda"))
