"""Separability and the inequalities: by hand, one failing at a time, against loops and the exact objective."""

import functools
import itertools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dae_theory import conditions, minimizers, risk, zero_columns

pytestmark = pytest.mark.optimized

SIMPLEX = 1.5 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
LABELS = np.repeat([0, 1, 2], 4)


def clusters(key, *, dim=6, spread=0.05, angle=120.0):
    """Four samples about each of three directions in a plane, ``angle`` degrees apart."""
    turns = np.deg2rad(angle) * np.arange(3)
    corners = 2.0 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return jnp.asarray(np.pad(corners, ((0, 0), (0, dim - 2)))[LABELS]) + spread * jax.random.normal(key, (12, dim))


@functools.partial(jax.jit, static_argnums=(3, 4))
def check(data, sigma, penalty, ranks=(2, 2, 2), width=None):
    return conditions.check_conditions(data, LABELS, sigma, penalty, ranks, width=width)


def failing(report):
    return [row.name for row in conditions.rows(report) if not row.holds]


def test_separability_by_hand():
    data = jnp.array([[2.0, 1.0], [2.0, -1.0], [0.0, 3.0], [-1.0, 0.0], [-3.0, 0.0]])
    found = conditions.separability(data, [4, 4, 7, 9, 9])
    np.testing.assert_allclose(found.means, [[2, 0], [0, 3], [-2, 0]])
    np.testing.assert_allclose(found.alphas, [0.5, 0.0, 0.5])
    np.testing.assert_allclose(found.betas, [0.0, 0.0, 0.0])
    np.testing.assert_allclose([found.alpha, found.beta], [0.5, 0.0])


def test_separability_of_the_extremes():
    one = conditions.separability(jnp.array([[1.0, 0.0], [3.0, 0.0]]), [1, 1])
    assert float(one.alpha) == 0.5
    assert float(one.beta) == -1.0
    centered = conditions.separability(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]), [0, 0, 1])
    assert np.isinf(centered.alpha)
    assert float(centered.beta) == 0.0
    np.testing.assert_allclose(conditions.separability(jnp.asarray(SIMPLEX), np.arange(4)).beta, -1 / 3)


@hypothesis.given(seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3))
def test_separability_against_loops(seed, scale):
    data = scale * np.asarray(jax.random.normal(jax.random.key(seed), (12, 5)))
    found = conditions.separability(jnp.asarray(data), LABELS)
    means = [data[label == LABELS].mean(0) for label in range(3)]
    alpha = max(np.linalg.norm(x - means[k]) / np.linalg.norm(means[k]) for x, k in zip(data, LABELS, strict=True))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(means, 2)]
    np.testing.assert_allclose([found.alpha, found.beta], [alpha, max(cosines)], rtol=1e-11)
    # Unit vectors' sum has a square of at least 0: beta >= -1/(M - 1).
    assert float(found.beta) >= -1 / 2 - 1e-14


def test_masked_rows_leave_no_trace(key):
    data = clusters(key)
    kept = np.array([1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    masked = conditions.masked_separability(data, jnp.asarray(LABELS), jnp.asarray(kept, float), 3)
    alone = conditions.separability(data[kept > 0], LABELS[kept > 0])
    np.testing.assert_allclose([masked.alpha, masked.beta], [alone.alpha, alone.beta], rtol=1e-13)
    assert float(masked.betas[2]) == -1.0


def test_everything_holds_for_tight_obtuse_clusters(key):
    report = check(clusters(key), 0.05, 1e-4)
    assert failing(report) == []
    assert bool(conditions.all_hold(report))
    assert int(report.clipped) == 0
    np.testing.assert_allclose(report.exponent, (report.margin / 0.05) ** 2)


@pytest.mark.slow
def test_margins_against_loops(key):
    """The units themselves, sample by sample; spread wide enough that some margins fail."""
    data = clusters(key, spread=0.6)
    report = check(data, 0.3, 1e-3, (3, 1, 2))
    w = np.asarray(minimizers.block_minimizer(data, LABELS, 0.3, 1e-3, (3, 1, 2)).w1)
    own, other = np.inf, np.inf
    margins = [np.inf] * 3
    for unit, owner in zip(w.T, [0, 0, 0, 1, 2, 2], strict=True):
        for x, label in zip(np.asarray(data), LABELS, strict=True):
            distance = unit @ x / np.linalg.norm(unit)
            if label == owner:
                own = min(own, distance)
            else:
                other = min(other, -distance)
            margins[owner] = min(margins[owner], distance if label == owner else -distance)
    np.testing.assert_allclose(report.margins, margins, rtol=1e-10)
    np.testing.assert_allclose(report.margin, min(margins), rtol=1e-10)
    np.testing.assert_allclose(report.checks.own_gates.slack, own, rtol=1e-10)
    np.testing.assert_allclose(report.checks.other_gates.slack, other, rtol=1e-10)


def test_each_inequality_can_fail_by_itself(key):
    tight = clusters(key)
    # Acute clusters: cosines, and gates that fire on the neighbour.
    assert failing(check(clusters(jax.random.fold_in(key, 1), angle=80.0), 0.05, 1e-4)) == [
        "negative_cosines",
        "other_gates",
    ]
    # A penalty between the two kept eigenvalues clips the second of each block.
    heavy = check(tight, 0.05, 0.2)
    assert failing(heavy) == ["penalty"]
    assert int(heavy.clipped) == 3
    np.testing.assert_allclose(
        heavy.checks.penalty.slack,
        min(np.linalg.svd(x, compute_uv=False)[1] ** 2 for x in np.split(np.asarray(tight), 3)) - 12 * 0.2,
        rtol=1e-12,
    )
    # Four copies of one sample cannot carry two units.
    same = tight.at[:4].set(tight[:1])
    copies = check(same, 0.05, 0.0)
    assert failing(copies) == ["rank", "penalty"]
    assert float(copies.checks.rank.slack) == -1.0
    # A cluster as wide as its mean is far: no room for a second unit, though one unit would still fit.
    wide = tight.at[0].add(jnp.array([0.0, 0, 0, 0, 0, 3.0])).at[1].add(jnp.array([0.0, 0, 0, 0, 0, -3.0]))
    assert "spread" in failing(check(wide, 0.05, 1e-4))
    assert "spread" not in failing(check(wide, 0.05, 1e-4, (1, 2, 2)))


@pytest.mark.slow
def test_more_than_rank_plus_one_clusters_are_counted():
    """Five directions in a plane: two more than can have negative cosines."""
    turns = 2 * np.pi * np.arange(5) / 5
    data = jnp.asarray(np.stack([np.cos(turns), np.sin(turns), 0 * turns], axis=1))
    report = conditions.check_conditions(data, np.arange(5), 0.1, 1e-3, 1)
    assert not report.checks.few_clusters.holds
    assert float(report.checks.few_clusters.slack) == -2.0
    assert not report.checks.negative_cosines.holds


def grown_change(dae, data, sigma, penalty, owned, delta):
    """The change of the exact objective per δ² as the last, zero column grows in the direction that is worst for it."""
    live = owned.shape[1]
    correlation = zero_columns.main_term_correlation(dae.w1[:, :live], data, jnp.asarray(owned), sigma)
    starts = jnp.concatenate([zero_columns.starting_directions(data), zero_columns.subset_directions(data, 512)])
    a, g = zero_columns.maximize_on_sphere(correlation, starts, 50)
    grown = minimizers.ReluDae(dae.w1.at[:, -1].set(delta * a), dae.w2.at[:, -1].set(-delta * g / jnp.linalg.norm(g)))
    difference = risk.exact_objective(grown, data, sigma, penalty) - risk.exact_objective(dae, data, sigma, penalty)
    return difference / delta**2


def test_zero_columns_move_the_exact_objective_as_predicted(key):
    """The second-order change of the objective as a unit grows, with its sign, on both sides; no dimension to spare."""
    flat, full = clusters(key).at[:, 5].set(0.0), clusters(jax.random.fold_in(key, 1))
    for data, rank in ((flat, 2), (full, 1)):
        ranks, width = (rank,) * 3, 3 * rank + 1
        owned = np.repeat([0, 1, 2], rank)[None, :] == LABELS[:, None]

        @jax.jit
        def change(data, penalty, rank=rank, width=width, owned=owned):
            dae = minimizers.block_minimizer(data, LABELS, 0.05, penalty, rank, width=width)
            return grown_change(dae, data, 0.05, penalty, owned, 1e-3)

        unstable = check(data, 0.05, 1e-6, ranks, width)
        # The main term is the objective only where the gates of the blocks are certain.
        assert float(unstable.margin) > 6 * 0.05
        assert not bool(unstable.checks.zero_columns.holds)
        # Next order in δ: δ⁴ terms, a relative 1e-6 of σ² + |slack|; and the rounding of the difference.
        predicted = 2 * unstable.checks.zero_columns.slack
        np.testing.assert_allclose(change(data, 1e-6), predicted, rtol=1e-3, atol=1e-7)
        stable = check(data, 0.05, 1e-2, ranks, width).checks.zero_columns
        assert bool(stable.holds)
        assert 0 <= float(stable.slack) < 1e-2
        # δ² (σ² + |slack|) of the next order.
        assert float(change(data, 1e-2)) > -1e-5
    # Without zero columns there is nothing to say.
    assert np.isinf(check(flat, 0.05, 1e-6).checks.zero_columns.slack)


def test_a_direction_orthogonal_to_all_data_grows_by_the_mean_residual(key):
    """There ‖g‖ is σ/√(2π) times the norm of the mean residual, for blocks of any rank."""
    data = clusters(key).at[:, 5].set(0.0)
    w = minimizers.block_minimizer(data, LABELS, 0.05, 1e-6, 2).w1
    owned = np.repeat([0, 1, 2], 2)[None, :] == LABELS[:, None]
    residual = np.mean(data - np.where(owned, data @ w, 0.0) @ w.T, axis=0)
    axis = zero_columns.subset_directions(data, 1)
    np.testing.assert_allclose(jnp.abs(axis), jnp.eye(6)[5:], atol=1e-12)
    g = zero_columns.main_term_correlation(w, data, jnp.asarray(owned), 0.05)(axis[0])
    np.testing.assert_allclose(g, -0.05 / np.sqrt(2 * np.pi) * residual, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize(
    ("norm_sq", "dim", "sigma", "penalty", "change"),
    [
        pytest.param(6.75, 4, 0.1, 1e-9, -8.8521e-5, marks=pytest.mark.slow),
        (9.0, 3, 0.3, 1e-3, -1.607e-4),
    ],
)
def test_zero_columns_are_a_saddle_on_the_simplex(norm_sq, dim, sigma, penalty, change):
    """The mean residual vanishes there, but directions orthogonal to one or two of the samples are enough."""
    data = jnp.asarray(np.sqrt(norm_sq / 6.75) * np.pad(SIMPLEX, ((0, 0), (0, dim - 3))))
    report = conditions.check_conditions(data, np.arange(4), sigma, penalty, 1, width=5)
    assert not report.checks.zero_columns.holds
    assert not conditions.all_hold(report)
    np.testing.assert_allclose(2 * report.checks.zero_columns.slack, change, rtol=1e-3)
    assert "zero columns grow" in {row.name: row for row in conditions.rows(report)}["zero_columns"].explanation
    dae = minimizers.memorizing_minimizer(data, sigma, penalty, 5)
    exact = jax.jit(grown_change, static_argnums=(2, 3, 5))(dae, data, sigma, penalty, np.eye(4, dtype=bool), 1e-4)
    # At sigma 0.3 noise that crosses the gates moves it by 4 percent.
    np.testing.assert_allclose(exact, change, rtol=0.05 if sigma > 0.2 else 1e-3)


def test_one_sample_is_enough_by_the_formula():
    """On the simplex at σ 0.3: a orthogonal to one sample, on for a second, off for the others."""
    data, sigma, penalty = 2 / np.sqrt(3) * SIMPLEX, 0.3, 1e-3
    units = data / 3
    a = units[3] - (units[3] @ units[1]) * units[1]
    a /= np.linalg.norm(a)
    fraction = (4 * penalty + sigma**2) / (9 + sigma**2)
    g = -sigma / (4 * np.sqrt(2 * np.pi)) * fraction * data[1] - penalty * units[3] * (units[3] @ a)
    w = minimizers.memorizing_minimizer(jnp.asarray(data), sigma, penalty, 4).w1
    computed = zero_columns.main_term_correlation(w, jnp.asarray(data), jnp.eye(4, dtype=bool), sigma)(jnp.asarray(a))
    # Gates at 4.7 standard deviations are certain to 1e-6.
    np.testing.assert_allclose(computed, g, rtol=1e-4)
    assert np.linalg.norm(g) > penalty


def test_zero_columns_are_stable_under_a_large_penalty():
    data = jnp.asarray(2 / np.sqrt(3) * SIMPLEX)
    check = conditions.check_conditions(data, np.arange(4), 0.2, 1e-3, 1, width=5).checks.zero_columns
    assert bool(check.holds)
    assert 0 <= float(check.slack) < 1e-6


def test_the_gates_decide_over_definition_three_one(key):
    """Beta < 0 and a small alpha do not suffice for two units a block: a second axis along another cluster."""
    data = np.array(clusters(key, spread=1e-3))
    # Spread the first cluster along the direction that separates the other two.
    data[:4, 1] += np.array([0.2, -0.2, 0.1, -0.1])
    report = check(jnp.asarray(data), 1e-3, 0.0)
    assert bool(report.checks.negative_cosines.holds)
    assert bool(report.checks.spread.holds)
    assert float(report.separability.alpha) < 0.2
    assert not report.checks.other_gates.holds


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_slacks_scale_like_what_they_bound(key, scale):
    data = clusters(key, spread=0.3)
    ours, scaled = check(data, 0.1, 1e-3), check(scale * data, scale * 0.1, scale**2 * 1e-3)
    powers = {"penalty": 2, "zero_columns": 2, "own_gates": 1, "other_gates": 1}
    for name, one, other in zip(ours.checks._fields, ours.checks, scaled.checks, strict=True):
        np.testing.assert_allclose(other.slack, scale ** powers.get(name, 0) * one.slack, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(scaled.exponent, ours.exponent, rtol=1e-9)


def test_the_limit_without_noise_is_defined(key):
    report = check(clusters(key), 0.0, 0.0)
    assert np.isposinf(report.exponent)
    acute = check(clusters(jax.random.fold_in(key, 1), angle=80.0), 0.0, 0.0)
    assert np.isneginf(acute.exponent)


def test_everything_clipped_is_a_report_not_an_error(key):
    report = check(clusters(key), 0.1, 1e3)
    assert int(report.clipped) == 6
    assert failing(report) == ["penalty"]
    assert np.isinf(report.margin)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(report))


def test_rows_say_by_how_much(key):
    table = {row.name: row for row in conditions.rows(check(clusters(key, angle=80.0), 0.05, 0.2, (2, 2, 2), 8))}
    assert tuple(table) == conditions.Checks._fields
    cosine = table["negative_cosines"]
    assert not cosine.holds
    assert f"{-cosine.slack:.3g}" in cosine.explanation
    assert "3 have q clipped" in table["penalty"].explanation
    assert "at most rank + 1 = 7" in table["few_clusters"].explanation
    assert all(isinstance(row.holds, bool) and isinstance(row.slack, float) for row in table.values())


def test_rows_refuse_traced_conditions(key):
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda data: conditions.rows(conditions.check_conditions(data, LABELS, 0.1, 0.0, 1)))(clusters(key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -1.0}, "sigma must not be negative"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"labels": LABELS[:-2]}, "-2 labels"),
        ({"ranks": (2, 5, 1)}, r"ranks\[1\] = 5 exceeds by 1"),
        ({"width": 5}, "width must be at least 6, got 5"),
        ({"data": jnp.full((12, 6), jnp.nan)}, "72 non-finite"),
    ],
)
def test_bad_input_is_refused(key, change, message):
    arguments = {"data": clusters(key), "labels": LABELS, "sigma": 0.1, "penalty": 0.0, "ranks": 2, **change}
    with pytest.raises(ValueError, match=message):
        conditions.check_conditions(**arguments)


def test_compiles_once_and_batches(key):
    data = clusters(key)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def batched(data, sigmas):
        return jax.vmap(lambda s: conditions.check_conditions(data, LABELS, s, 1e-4, 2))(sigmas)

    for sigmas in ([0.05, 0.1], [0.2, 0.3]):
        many = batched(data, jnp.array(sigmas))
        for i, sigma in enumerate(sigmas):
            one = check(data, sigma, 1e-4)
            chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], many.checks), one.checks, rtol=1e-9)


def test_lowers_for_accelerators():
    spec, scalar = jax.ShapeDtypeStruct((12, 6), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    jitted = jax.jit(lambda x, s, r: conditions.check_conditions(x, LABELS, s, r, (2, 1, 2), width=7))
    jitted.trace(spec, scalar, scalar).lower(lowering_platforms=("tpu", "cuda"))
    jax.jit(lambda x: conditions.separability(x, LABELS)).trace(spec).lower(lowering_platforms=("tpu", "cuda"))
