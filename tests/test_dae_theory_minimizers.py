"""Closed-form minimizers: stationarity by two routes, golden gradients, limits, symmetries, hard corners, bad input."""

import functools
import itertools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dae_theory import minimizers, risk, spectra
from dae_theory.mixture import GaussianMixture

# Regular simplex of 4 points in R^3, squared norm 6.75.
SIMPLEX = 1.5 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
LABELS = np.array([5, 0, 0, 2, 0, 2, 5, 0, 2])
RANKS = (3, 1, 2)


@functools.lru_cache
def compiled(labels, ranks, width):
    return jax.jit(
        lambda data, sigma, penalty: minimizers.block_minimizer(
            data, np.array(labels), sigma, penalty, ranks, width=width
        )
    )


def block_minimizer(data, labels, sigma, penalty, ranks, width=None):
    """The function under test, compiled once for each structure."""
    return compiled(tuple(np.asarray(labels).tolist()), ranks, width)(data, sigma, penalty)


def clusters(key, *, each=6, dim=7, spread=0.1, length=2.0):
    """Three tight clusters about a regular triangle in R^dim."""
    corners = length * np.array([[1, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    labels = np.repeat([0, 1, 2], each)
    return jnp.asarray(np.pad(corners, ((0, 0), (0, dim - 2)))[labels]) + spread * jax.random.normal(
        key, (3 * each, dim)
    ), labels


def gated_objective(dae, data, labels, owners, sigma, penalty):
    """The objective with the gates held: units of block k see cluster k, and all of it. Written as loops."""
    total = penalty * sum(jnp.sum(w**2) for w in dae)
    for k, label in enumerate(np.unique(labels)):
        q = dae.w2[:, owners == k] @ dae.w1[:, owners == k].T
        x = data[label == labels]
        total += (jnp.sum((x @ q.T - x) ** 2) + len(x) * sigma**2 * jnp.sum(q**2)) / len(data)
    return total


@functools.lru_cache
def stationarity(n, d, labels, ranks):
    """Jitted: gradient of the gated objective at the closed form, and the size of the terms it is a sum of."""
    names, owners = np.array(labels), np.repeat(np.arange(len(ranks)), ranks)

    def gradient(data, sigma, penalty):
        dae = minimizers.block_minimizer(data, names, sigma, penalty, ranks)
        grads = jax.grad(gated_objective)(dae, data, names, owners, sigma, penalty)
        largest = jnp.max(jnp.linalg.eigvalsh(data.T @ data)) / n + sigma**2 + penalty
        return jnp.sqrt(sum(jnp.sum(g**2) for g in grads)), largest * jnp.sqrt(jnp.sum(dae.w1**2))

    return jax.jit(gradient)


@hypothesis.given(
    world=st.sampled_from([(5, 3, (0, 0, 1, 1, 1), (2, 1)), (9, 6, tuple(LABELS), RANKS), (4, 9, (0, 0, 0, 0), (4,))]),
    seed=st.integers(0, 2**20),
    scale=st.floats(-3, 3),
    noise=st.sampled_from([0.0, 1e-6, 1e-2, 0.3, 1.0, 30.0]),
    decay=st.sampled_from([0.0, 1e-8, 1e-3, 0.03, 0.3, 100.0]),
    degenerate=st.sampled_from(["no", "repeated", "zero", "collinear"]),
)
def test_gradient_of_the_main_term_vanishes(world, seed, scale, noise, decay, degenerate):
    """Whether or not margins hold, q is clipped, or rows repeat, vanish or line up."""
    n, d, labels, ranks = world
    data = 10**scale * np.asarray(jax.random.normal(jax.random.key(seed), (n, d)))
    if degenerate == "repeated":
        data[1] = data[0]
    elif degenerate == "zero":
        data[2] = 0.0
    elif degenerate == "collinear":
        data[:] = data[:, :1] * data[:1]
    gradient, size = stationarity(n, d, labels, ranks)(jnp.asarray(data), 10**scale * noise, 100**scale * decay)
    # Where everything is clipped both are 0; else rounding of a few products of matrices of size <= 9.
    assert float(gradient) <= 1e3 * np.finfo(float).eps * float(size)


@pytest.mark.parametrize(
    ("sigma", "norm"), [(0.2, 7.515e-7), (0.25, 3.650e-5), (0.3, 3.260e-4), (0.4, 2.953e-3), (0.5, 6.616e-3)]
)
def test_exact_gradient_on_the_simplex_is_golden(sigma, norm):
    """The leak through the gates, from the exact objective: four digits known beforehand."""
    data = jnp.asarray(SIMPLEX)
    dae = minimizers.memorizing_minimizer(data, sigma, 1e-3, 4)
    gradient = jax.jit(jax.grad(risk.exact_objective))(dae, data, sigma, 1e-3)
    assert float(f"{np.sqrt(sum(np.sum(np.square(g)) for g in gradient)):.3e}") == pytest.approx(norm, rel=1e-12)


def test_exact_gradient_of_blocks_dies_with_the_noise(key):
    """Tight clusters, two units each: the gradient falls as the noise leaves the gates; a random O keeps it."""
    data, labels = clusters(key, spread=0.02)
    gradient = jax.jit(jax.grad(risk.exact_objective))

    def norm(dae, sigma):
        return float(np.sqrt(sum(np.sum(np.square(g)) for g in gradient(dae, data, sigma, 1e-4))))

    ours = [norm(block_minimizer(data, labels, s, 1e-4, 2), s) for s in (0.3, 0.15)]
    assert ours[1] < 1e-2 * ours[0]
    w = block_minimizer(data, labels, 0.15, 1e-4, 2).w1
    # Turning a block's units into one another changes W_k W_k', the main term, nothing; but now one unit is clipped.
    turn = np.kron(np.eye(3), [[np.cos(1.2), -np.sin(1.2)], [np.sin(1.2), np.cos(1.2)]])
    assert norm(minimizers.ReluDae(w @ turn, w @ turn), 0.15) > 1e2 * ours[1]


def test_memorizing_columns_by_hand():
    data = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.1, 0.0], [-1.0, 1.0]])
    w = minimizers.memorizing_minimizer(data, 0.5, 0.01, 6).w1
    for i, x in enumerate(np.asarray(data)):
        size = x @ x
        r = np.sqrt((size - 4 * 0.01) / (size**2 + 0.25 * size)) if size > 0.04 else 0.0
        np.testing.assert_allclose(w[:, i], r * x, rtol=1e-14)
    # The zero sample and the one below nλ store nothing; the extra columns are zero.
    np.testing.assert_array_equal(w[:, [1, 2, 4, 5]], 0.0)


def test_single_samples_are_blocks_of_one(key):
    data = jax.random.normal(key, (6, 4))
    blocks = block_minimizer(data, np.arange(6), 0.3, 0.01, 1, width=8)
    chex.assert_trees_all_close(blocks, minimizers.memorizing_minimizer(data, 0.3, 0.01, 8), rtol=1e-13)


@hypothesis.given(times=st.sampled_from([1, 2, 7, 40]), penalty=st.floats(1e-6, 1.0), sigma=st.floats(1e-3, 3.0))
def test_a_repeated_sample_is_shrunk_as_the_corollary_says(times, penalty, sigma):
    """Corollary 3.4: q = (N - nλ/m)/(N + σ²), clipped at 0, beside a block of rank two."""
    others = np.array([[-1.0, 0.3, 0.2], [-1.2, -0.3, 0.1], [-0.9, 0.0, -0.4]])
    x = np.array([1.5, 0.1, 0.2])
    data = np.concatenate([others, np.tile(x, (times, 1))])
    labels = np.array([1, 1, 1] + [0] * times)
    w = block_minimizer(jnp.asarray(data), labels, sigma, penalty, (1, 2)).w1
    expected = max((x @ x - len(data) / times * penalty) / (x @ x + sigma**2), 0.0)
    np.testing.assert_allclose(w[:, 0] @ w[:, 0], expected, rtol=1e-12, atol=1e-13)
    if expected > 1e-9:
        np.testing.assert_allclose(w[:, 0] / np.linalg.norm(w[:, 0]), x / np.linalg.norm(x), atol=1e-12)


def test_blocks_are_shrunken_projections(key):
    data = jax.random.normal(key, (9, 6))
    w = block_minimizer(data, LABELS, 0.4, 0.02, RANKS, width=7).w1
    np.testing.assert_array_equal(w[:, 6], 0.0)
    start = 0
    for label, p in zip([0, 2, 5], RANKS, strict=True):
        x = np.asarray(data)[label == LABELS]
        lam, u = np.linalg.eigh(x.T @ x)
        lam, u = lam[::-1][:p], u[:, ::-1][:, :p]
        q = np.maximum(lam - 9 * 0.02, 0) / (lam + len(x) * 0.16)
        block = w[:, start : start + p]
        np.testing.assert_allclose(block @ block.T, (u * q) @ u.T, atol=1e-13)
        # The leading direction is shared equally, and with the sign of the mean.
        shares = (u[:, 0] * np.sign(u[:, 0] @ x.mean(0))) @ block
        np.testing.assert_allclose(shares, np.sqrt(q[0] / p), atol=1e-13)
        start += p


def test_without_noise_and_penalty_blocks_are_projections(key):
    data = jax.random.normal(key, (9, 6))
    owners = np.repeat([0, 1, 2], RANKS)
    small, gaps = np.array([1e-1, 1e-2, 1e-3]), []
    for sigma in small:
        w = np.asarray(block_minimizer(data, LABELS, float(sigma), 0.0, RANKS).w1)
        gaps.append([np.linalg.norm(b @ b.T @ b @ b.T - b @ b.T) for b in (w[:, owners == k] for k in range(3))])
    # q (1 - q) ~ σ²/s: the distance to a projection has slope two in σ.
    slopes = np.polyfit(np.log(small), np.log(gaps), 1)[0]
    np.testing.assert_allclose(slopes, 2.0, atol=0.1)
    w = np.asarray(block_minimizer(data, LABELS, 0.0, 0.0, RANKS).w1)
    for k in range(3):
        b = w[:, owners == k]
        np.testing.assert_allclose(b @ b.T @ b, b, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
def test_lengths_scale_out(key, scale):
    """x -> cx, σ -> cσ, λ -> c²λ leaves the weights as they are."""
    data = jax.random.normal(key, (9, 6))
    ours = block_minimizer(data, LABELS, 0.3, 0.02, RANKS)
    scaled = block_minimizer(scale * data, LABELS, scale * 0.3, scale**2 * 0.02, RANKS)
    chex.assert_trees_all_close(ours, scaled, atol=1e-12)
    ours = minimizers.memorizing_minimizer(data, 0.3, 0.02, 9)
    scaled = minimizers.memorizing_minimizer(scale * data, scale * 0.3, scale**2 * 0.02, 9)
    chex.assert_trees_all_close(ours, scaled, atol=1e-13)


@pytest.mark.parametrize("dim", [3, 12])
def test_units_turn_with_the_data(key, dim):
    k1, k2 = jax.random.split(key)
    data = 1.0 + jax.random.normal(k1, (9, dim))
    turn = jnp.linalg.qr(jax.random.normal(k2, (dim, dim)))[0]
    ours = block_minimizer(data, LABELS, 0.3, 0.02, RANKS).w1
    turned = block_minimizer(data @ turn.T, LABELS, 0.3, 0.02, RANKS).w1
    np.testing.assert_allclose(turned, turn @ ours, atol=1e-11)


def test_rows_and_names_may_be_permuted(key):
    data = 1.0 + jax.random.normal(key, (9, 6))
    ours = block_minimizer(data, LABELS, 0.3, 0.02, RANKS).w1
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(block_minimizer(data[order], LABELS[order], 0.3, 0.02, RANKS).w1, ours, atol=1e-12)
    # Negated labels reverse the order of the blocks.
    back = block_minimizer(data, -LABELS, 0.3, 0.02, RANKS[::-1]).w1
    np.testing.assert_allclose(np.concatenate([back[:, 3:], back[:, 2:3], back[:, :2]], axis=1), ours, atol=1e-12)


def test_a_block_of_rank_zero_has_no_unit(key):
    data = jax.random.normal(key, (9, 6))
    ours = block_minimizer(data, LABELS, 0.3, 0.02, (3, 0, 2)).w1
    np.testing.assert_array_equal(
        ours, block_minimizer(data, LABELS, 0.3, 0.02, RANKS).w1[:, np.array([0, 1, 2, 4, 5])]
    )


def test_population_blocks_are_empirical_ones_of_equal_moments(key):
    """Corollary 3.3 from the data's own means and covariances gives the same units."""
    data = 1.0 + jax.random.normal(key, (9, 6))
    parts = [np.asarray(data)[label == LABELS] for label in (0, 2, 5)]
    world = GaussianMixture(
        jnp.array([len(x) / 9 for x in parts]),
        jnp.array([x.mean(0) for x in parts]),
        jnp.array([np.cov(x.T, bias=True) for x in parts]),
    )
    ours = jax.jit(lambda world: minimizers.generalizing_minimizer(world, 0.4, 0.02, RANKS, width=8))(world)
    chex.assert_trees_all_close(ours, block_minimizer(data, LABELS, 0.4, 0.02, RANKS, width=8), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 31, 32, 100])
def test_orthogonal_factor(rank):
    factor = minimizers.orthogonal_factor(rank)
    np.testing.assert_allclose(factor.T @ factor, np.eye(rank), atol=1e-13)
    np.testing.assert_allclose(factor[:, 0], rank**-0.5)
    flat = rank & -rank
    np.testing.assert_allclose(np.abs(factor[:, :flat]), rank**-0.5)
    for j in range(flat, rank, 2):
        np.testing.assert_allclose(np.sum(factor[:, j : j + 2] ** 2, axis=1), 2 / rank)


@pytest.mark.parametrize("rank", [6, 8, 11])
def test_orthogonal_factor_serves_the_worst_unit_of_an_ellipsoid(key, rank):
    """Its worst support over an ellipsoid of decaying axes is near the least possible; few random ones are as good."""
    axes = 1.0 / np.arange(1, rank)
    least = np.sqrt(np.sum(axes**2) / rank)

    def worst(factor):
        return np.sqrt(np.max(factor[:, 1:] ** 2 @ axes**2))

    ours = worst(minimizers.orthogonal_factor(rank))
    assert ours < (1 + 1e-12 if rank == 8 else 1.25) * least
    draws = np.array(jax.random.normal(key, (200, rank, rank)))
    draws[:, :, 0] = 1.0
    others = [worst(np.linalg.qr(draw)[0]) for draw in draws]
    assert ours < np.quantile(others, 0.02)


def test_shrinkage_is_between_zero_and_one_and_clips():
    q = minimizers.shrinkage(jnp.array([0.0, 0.5, 1.0, 4.0]), 0.25, 0.5, 0.2)
    np.testing.assert_allclose(q, [0.0, 0.0, 0.2 / 1.25, 3.2 / 4.25], rtol=1e-13)
    np.testing.assert_array_equal(minimizers.shrinkage(jnp.zeros(2), jnp.array([0.0, 1.0]), 0.0, 0.0), 0.0)


def test_hard_corners_stay_finite_with_finite_slopes():
    """No noise, no penalty, zero and repeated rows, everything clipped: values and slopes in σ, λ are numbers."""
    data = jnp.array([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])
    at = jnp.array(list(itertools.product((0.0, 1e-9, 1.0), (0.0, 1e-3, 1e3))))
    for minimizer in (
        lambda v: minimizers.block_minimizer(data, np.array([0, 0, 0, 1]), v[0], v[1], (2, 1)),
        lambda v: minimizers.memorizing_minimizer(data, v[0], v[1], 5),
    ):
        chex.assert_tree_all_finite(jax.jit(jax.vmap(minimizer))(at))
        chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.jacfwd(minimizer)))(at))
        chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.jacrev(minimizer)))(at))


def test_memorizing_minimizer_differentiates_in_the_data():
    data = jnp.array([[1.0, 2.0], [0.0, 0.0], [0.01, 0.0]])
    gradient = jax.grad(lambda x: jnp.sum(minimizers.memorizing_minimizer(x, 0.2, 0.1, 3).w1 ** 2))(data)
    # d/dx (N - nλ)/(N + σ²) = 2 x (σ² + nλ)/(N + σ²)²
    expected = 2 * np.array([1.0, 2.0]) * (0.04 + 0.3) / (5.04**2)
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(gradient[1:], 0.0)


def test_float32_agrees_with_float64(key):
    data, labels = clusters(key)
    eps = np.finfo(np.float32).eps
    ours = block_minimizer(data.astype(jnp.float32), labels, 0.2, 1e-3, (1, 2, 1))
    assert ours.w1.dtype == jnp.float32
    expected = block_minimizer(data, labels, 0.2, 1e-3, (1, 2, 1)).w1
    # An axis is known to the rounding of the largest moment over the gap to the next one.
    assert np.max(np.abs(np.asarray(ours.w1) - np.asarray(expected))) < 100 * eps * 4 / 0.02


def test_batches_and_compiles_once(key):
    data = jax.random.normal(key, (9, 6))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def batched(data, sigmas, penalty):
        return jax.vmap(lambda s: minimizers.block_minimizer(data, LABELS, s, penalty, RANKS))(sigmas)

    for start in (0.1, 0.2):
        sigmas = jnp.array([start, 0.3])
        many = batched(data, sigmas, 0.01)
        for i, sigma in enumerate(sigmas):
            np.testing.assert_allclose(many.w1[i], block_minimizer(data, LABELS, sigma, 0.01, RANKS).w1, atol=1e-13)


WORLD = GaussianMixture(jnp.ones(1), jnp.ones((1, 2)), jnp.eye(2)[None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: minimizers.memorizing_minimizer(x, -0.1, 0.0, 9), "sigma must not be negative, got -0.1"),
        (lambda x: minimizers.memorizing_minimizer(x, 0.1, -1e-3, 9), "penalty must not be negative"),
        (lambda x: minimizers.memorizing_minimizer(x, 0.1, 0.0, 7), "width = 7 is 2 less than n = 9"),
        (lambda x: minimizers.memorizing_minimizer(x, 0.1, 0.0, 0), "width must be at least 1"),
        (lambda x: minimizers.memorizing_minimizer(x.at[2, 1].set(jnp.inf), 0.1, 0.0, 9), "1 non-finite"),
        (lambda x: minimizers.block_minimizer(x.at[0].set(jnp.nan), LABELS, 0.1, 0.0, RANKS), "6 non-finite"),
        (lambda x: minimizers.block_minimizer(x, LABELS, -1.0, 0.0, RANKS), "sigma must not be negative"),
        (lambda x: minimizers.block_minimizer(x, LABELS, 1.0, -2.0, RANKS), "penalty must not be negative"),
        (lambda x: minimizers.block_minimizer(x, LABELS[1:], 0.1, 0.0, RANKS), r"got \(8,\), -1 labels"),
        (lambda x: minimizers.block_minimizer(x, LABELS, 0.1, 0.0, (3, 1, 3)), r"ranks\[2\] = 3 exceeds by 1"),
        (lambda x: minimizers.block_minimizer(x, LABELS, 0.1, 0.0, RANKS, width=4), "sum to 6, 2 more than width = 4"),
        (lambda x: minimizers.block_minimizer(x, LABELS, 0.1, 0.0, 0), "at least one block needs a unit"),
        (lambda x: minimizers.generalizing_minimizer(WORLD, -1.0, 0.0, 1), "sigma must not be negative"),
        (lambda x: minimizers.generalizing_minimizer(WORLD, 1.0, 0.0, 3), "exceeds by 1"),
        (lambda x: minimizers.generalizing_minimizer(WORLD, 1.0, 0.0, 2, width=1), "1 more than width = 1"),
        (
            lambda x: minimizers.generalizing_minimizer(WORLD._replace(weights=jnp.full(1, 0.5)), 1.0, 0.0, 2),
            "sum to 1",
        ),
        (lambda x: minimizers.orthogonal_factor(0), "at least 1"),
    ],
)
def test_bad_input_is_refused_by_how_much(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.arange(54.0).reshape(9, 6))


def test_lowers_for_accelerators():
    spec, scalar = jax.ShapeDtypeStruct((9, 6), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    world = GaussianMixture(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2,), (2, 6), (2, 6, 6))))
    for first, function in [
        (spec, lambda x, s, r: minimizers.memorizing_minimizer(x, s, r, 9)),
        (spec, lambda x, s, r: minimizers.block_minimizer(x, LABELS, s, r, RANKS)),
        (world, lambda w, s, r: minimizers.generalizing_minimizer(w, s, r, (2, 1))),
    ]:
        jax.jit(function).trace(first, scalar, scalar).lower(lowering_platforms=("tpu", "cuda"))


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("rows", ["repeated", "collinear", "equal eigenvalues"])
def test_gradients_in_the_data_are_finite_where_eigenvalues_vanish_or_coincide(rows, dim):
    """From either Gram matrix; the projection onto coinciding axes has its true derivative."""
    block = {
        "repeated": np.array([[2.0, 1.0, 0.0]] * 3),
        "collinear": np.outer([1.0, 2.0, 3.0], [1.0, 1.0, 0.0]),
        "equal eigenvalues": np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]),
    }[rows]
    data = jnp.asarray(np.pad(block, ((0, 0), (0, dim - 3))))

    def gain(data):
        w = minimizers.block_minimizer(data, np.zeros(3, int), 0.5, 1e-3, 2).w1
        return jnp.sum(jnp.cos(jnp.arange(dim * dim, dtype=w.dtype)).reshape(dim, dim) * (w @ w.T))

    gradient = jax.jit(jax.grad(gain))(data)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    if rows == "equal eigenvalues":
        move = 1e-5 * jnp.asarray(np.pad([[1.0, 2.0, 3.0], [0.5, -1.0, 0.2], [0.3, 0.1, 1.0]], ((0, 0), (0, dim - 3))))

        @jax.jit
        def projected(data):
            axes = spectra.principal_axes(data, 2)[1]
            return jnp.sum(jnp.cos(jnp.arange(dim * dim, dtype=axes.dtype)).reshape(dim, dim) * (axes @ axes.T))

        difference = projected(data + move) - projected(data - move)
        np.testing.assert_allclose(2 * jnp.sum(jax.jit(jax.grad(projected))(data) * move), difference, rtol=1e-6)
