"""Networks as functions: Monte Carlo and fifty digits beside the closed form, near networks, derivatives."""

import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from dae_theory import function_space
from dae_theory.model import ReluDae, denoise

SEEDS = st.integers(0, 2**32 - 1)
EPS = float(np.finfo(np.float64).eps)

# Called eagerly, a scan compiles anew in every call.
function_distance_sq = jax.jit(function_space.function_distance_sq)
function_inner_product = jax.jit(function_space.function_inner_product)


def random_dae(seed, dim=4, width=5, scale=1.0):
    rng = np.random.default_rng(seed)
    return ReluDae(*(jnp.asarray(scale * rng.normal(size=(dim, width))) for _ in range(2)))


def moved(dae, seed, size):
    return jax.tree.map(lambda w, s: w + size * s, dae, random_dae(seed, *dae.w1.shape))


def same_function(dae, seed):
    """Units split, rescaled, shuffled, and a dead one: the same network."""
    rng = np.random.default_rng(seed)
    p = dae.w1.shape[1]
    share = rng.uniform(0.05, 0.95, p)
    pieces = jnp.asarray(np.concatenate([np.sqrt(share), np.sqrt(1 - share), [0.0]]))
    scales = jnp.asarray(3.0 ** rng.uniform(-1, 1, 2 * p + 1))
    order = jnp.asarray(rng.permutation(2 * p + 1))
    w1, w2 = (jnp.concatenate([w, w, w[:, :1]], axis=1) * pieces[None, :] for w in dae)
    return ReluDae((w1 * scales[None, :])[:, order], (w2 / scales[None, :])[:, order])


def by_fifty_digits(dae_a, dae_b):
    """The expanded square, whose cancellation fifty digits can afford."""
    with mpmath.workdps(50):
        units = []
        for sign, net in ((1, dae_a), (-1, dae_b)):
            for w1, w2 in zip(np.asarray(net.w1).T, np.asarray(net.w2).T, strict=True):
                u = [mpmath.mpf(float(x)) for x in w1]
                norm = mpmath.sqrt(mpmath.fsum(x * x for x in u))
                if norm > 0:
                    units.append(([x / norm for x in u], [sign * norm * mpmath.mpf(float(x)) for x in w2]))
        total = mpmath.mpf(0)
        for e, c in units:
            for f, g in units:
                cosine = max(min(mpmath.fdot(e, f), mpmath.mpf(1)), mpmath.mpf(-1))
                t = mpmath.acos(cosine)
                kernel = (mpmath.sin(t) + (mpmath.pi - t) * mpmath.cos(t)) / (2 * mpmath.pi)
                total += mpmath.fdot(c, g) * kernel
        return max(float(total), 0.0)


def norm_sq(dae):
    return float(function_inner_product(dae, dae))


def test_inner_product_and_distance_are_means_over_the_gaussian(key):
    a, b = random_dae(0), random_dae(1, width=3)
    ys = jax.random.normal(key, (40_000, 4))
    f_a, f_b = (np.asarray(jax.vmap(lambda y, net=net: denoise(net, y))(ys)) for net in (a, b))
    for ours, samples in (
        (function_inner_product(a, b), np.sum(f_a * f_b, axis=1)),
        (function_distance_sq(a, b), np.sum((f_a - f_b) ** 2, axis=1)),
    ):
        assert abs(float(ours) - samples.mean()) < 5 * samples.std() / math.sqrt(len(samples))


def test_antiparallel_pairs_are_linear_maps():
    """``[u]₊ − [−u]₊ = u``: the identity, of squared norm d, and the product with any map is its trace."""
    eye = jnp.eye(3)
    identity = ReluDae(jnp.concatenate([eye, -eye], axis=1), jnp.concatenate([eye, -eye], axis=1))
    np.testing.assert_allclose(norm_sq(identity), 3.0, rtol=1e-15)
    a = random_dae(2, 3, 4)
    doubled = ReluDae(*(jnp.concatenate([w, -w], axis=1) for w in a))
    trace = float(jnp.trace(a.w2 @ a.w1.T))
    np.testing.assert_allclose(function_inner_product(identity, doubled), trace, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
def test_near_networks_are_told_apart(size):
    """Error of the order of rounding × distance × norm: four digits are left at a squared distance of 1e-22."""
    for seed in range(3):
        dae = random_dae(seed)
        # Also where units correspond only after splitting.
        other = moved(same_function(dae, seed) if seed else dae, seed + 50, size)
        exact = by_fifty_digits(dae, other)
        assert abs(float(function_distance_sq(dae, other)) - exact) < 20 * EPS * math.sqrt(exact * norm_sq(dae))


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-5, 1e-2, 1.5])
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_columns_near_parallel_and_antiparallel_within_and_between_networks(angle, flip):
    turned = jnp.array([math.cos(angle), math.sin(angle), 0.0])
    w1 = jnp.stack([jnp.array([1.0, 0.0, 0.0]), 2.0 * flip * turned, jnp.array([0.3, 0.4, -0.5])], axis=1)
    a = ReluDae(w1, random_dae(3, 3, 3).w2)
    for size in (0.0, 1e-9, 1e-4, 1.0):
        b = moved(a, 4, size)
        exact = by_fifty_digits(a, b)
        bound = 20 * EPS * math.sqrt(exact * norm_sq(a)) + (20 * EPS) ** 2 * norm_sq(a)
        assert abs(float(function_distance_sq(a, b)) - exact) < bound
    single = ReluDae(w1[:, :1], a.w2[:, :1])
    other = ReluDae(w1[:, 1:2], a.w2[:, :1])
    np.testing.assert_allclose(
        function_distance_sq(single, other), by_fifty_digits(single, other), rtol=1e-14, atol=1e-30
    )


@hypothesis.given(SEEDS, SEEDS, st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_network_is_at_no_distance_from_itself_in_other_weights(seed, other, scale):
    dae = random_dae(seed, scale=scale)
    # The squared distance, relative: two roundings multiplied, not one.
    assert float(function_distance_sq(dae, same_function(dae, other))) < (40 * EPS) ** 2 * norm_sq(dae)


@hypothesis.given(SEEDS, SEEDS)
def test_distance_between_classes_does_not_depend_on_the_weights(seed, other):
    a, b = random_dae(seed), random_dae(seed + 1, width=3)
    expected = float(function_distance_sq(a, b))
    ours = float(function_distance_sq(same_function(a, other), same_function(b, other + 1)))
    np.testing.assert_allclose(ours, expected, rtol=1e-13)
    expanded = norm_sq(a) - 2 * float(function_inner_product(a, b)) + norm_sq(b)
    np.testing.assert_allclose(expected, expanded, rtol=1e-12)


@hypothesis.given(SEEDS)
def test_distance_is_a_metric(seed):
    nets = [random_dae(seed), random_dae(seed + 1, width=3), moved(random_dae(seed), seed, 1e-5)]
    ab, ba, bc, ac = (
        math.sqrt(float(function_distance_sq(nets[i], nets[j]))) for i, j in ((0, 1), (1, 0), (1, 2), (0, 2))
    )
    np.testing.assert_allclose(ab, ba, rtol=1e-13)
    assert ab <= (ac + bc) * (1 + 1e-13)
    assert bc <= (ab + ac) * (1 + 1e-13)
    assert ac > 1e-7


def test_equal_functions_that_no_change_of_units_connects():
    """Three encoders that sum to zero with one decoder equal their negatives; the identity has many bases."""
    angles = 2 * math.pi * np.arange(3) / 3
    star = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]))
    decoder = jnp.ones((2, 3))
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    pairs = [ReluDae(*(2 * (jnp.concatenate([q, -q], axis=1),))) for q in (jnp.eye(3), turn)]
    for a, b in ((ReluDae(star, decoder), ReluDae(-star, decoder)), pairs):
        assert 0 <= float(function_distance_sq(a, b)) < 20 * EPS * norm_sq(a)


def test_distance_to_nothing_is_the_norm():
    dae = random_dae(5)
    nothing = ReluDae(jnp.zeros((4, 2)), jnp.zeros((4, 2)))
    np.testing.assert_allclose(function_distance_sq(dae, nothing), norm_sq(dae), rtol=1e-14)
    assert float(function_distance_sq(nothing, nothing)) == 0.0
    # Gaussian features of one unit: E [u]₊² = ‖w₁‖²/2.
    single = ReluDae(dae.w1[:, :1], dae.w2[:, :1])
    half = 0.5 * float(jnp.sum(single.w1**2) * jnp.sum(single.w2**2))
    np.testing.assert_allclose(norm_sq(single), half, rtol=1e-14)


def test_gradient_is_that_of_finite_differences():
    a, b, step = random_dae(6), random_dae(7, width=3), random_dae(8)
    gradient = jax.grad(function_distance_sq)(a, b)
    slope = sum(float(jnp.sum(g * s)) for g, s in zip(gradient, step, strict=True))
    h = 1e-5
    ahead, behind = (jax.tree.map(lambda w, s, h=h: w + h * s, a, step) for h in (h, -h))
    difference = (function_distance_sq(ahead, b) - function_distance_sq(behind, b)) / (2 * h)
    # Central differences err by h² and by rounding/h.
    np.testing.assert_allclose(slope, difference, rtol=1e-8)
    chex.assert_tree_all_finite(gradient)


def test_derivatives_at_equal_networks():
    """The gradient vanishes there, and the curvature is twice the squared distance of a small step."""
    a, step = random_dae(9), random_dae(10)
    size = math.sqrt(norm_sq(a))
    for gradient in (jax.grad(function_distance_sq)(a, a), jax.grad(function_distance_sq, argnums=1)(a, a)):
        chex.assert_trees_all_close(gradient, jax.tree.map(jnp.zeros_like, a), atol=100 * EPS * size)

    def slope(net):
        return jax.jvp(lambda net: function_distance_sq(net, a), (net,), (step,))[1]

    curvature = jax.jvp(slope, (a,), (step,))[1]
    h = 1e-6
    near = jax.tree.map(lambda w, s: w + h * s, a, step)
    # The next term of the distance is a relative h.
    np.testing.assert_allclose(curvature, 2 * float(function_distance_sq(near, a)) / h**2, rtol=1e-4)


def test_derivatives_stay_finite_at_degenerate_columns():
    dae = random_dae(11)
    w1 = dae.w1.at[:, 1].set(0.0).at[:, 2].set(2.0 * dae.w1[:, 0]).at[:, 3].set(-dae.w1[:, 0])
    dae = dae._replace(w1=w1)
    for function in (function_distance_sq, function_inner_product):
        chex.assert_tree_all_finite(jax.grad(function)(dae, dae))
        chex.assert_tree_all_finite(jax.hessian(function)(dae, dae))


def test_single_precision_keeps_its_own_digits():
    a, b = random_dae(12), random_dae(13)
    low = [jax.tree.map(lambda w: w.astype(jnp.float32), net) for net in (a, b, moved(a, 14, 1e-3))]
    ours = function_distance_sq(low[0], low[1])
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, function_distance_sq(a, b), rtol=1e-5)
    exact = by_fifty_digits(low[0], low[2])
    bound = 20 * float(np.finfo(np.float32).eps) * math.sqrt(exact * norm_sq(a))
    assert abs(float(function_distance_sq(low[0], low[2])) - exact) < bound


def test_unequal_dimensions_are_refused():
    for function in (function_distance_sq, function_inner_product):
        with pytest.raises(ValueError, match="same dimension d, got 4 and 3"):
            function(random_dae(0), random_dae(0, dim=3))


def test_batches_in_one_trace_and_lowers_for_accelerators():
    traces = []

    @jax.jit
    def distances(a, b):
        traces.append(1)
        return jax.vmap(function_distance_sq)(a, b)

    stack = jax.tree.map(lambda *w: jnp.stack(w), *(random_dae(s) for s in range(3)))
    values = distances(stack, jax.tree.map(lambda w: w[::-1], stack))
    distances(stack, stack)
    assert len(traces) == 1
    alone = function_distance_sq(random_dae(0), random_dae(2))
    np.testing.assert_allclose(values, [alone, 0.0, alone], rtol=1e-13, atol=1e-28)
    wide, narrow = (ReluDae(*2 * (jax.ShapeDtypeStruct((4, p), jnp.float32),)) for p in (5, 3))
    for function in (function_distance_sq, function_inner_product, jax.grad(function_distance_sq)):
        assert jax.jit(function).trace(wide, narrow).lower(lowering_platforms=("tpu", "cuda")).as_text()
