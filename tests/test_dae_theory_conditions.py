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

from dae_theory import conditions, minimizers, risk

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


def test_more_than_rank_plus_one_clusters_are_counted():
    """Five directions in a plane: two more than can have negative cosines."""
    turns = 2 * np.pi * np.arange(5) / 5
    data = jnp.asarray(np.stack([np.cos(turns), np.sin(turns), 0 * turns], axis=1))
    report = conditions.check_conditions(data, np.arange(5), 0.1, 1e-3, 1)
    assert not report.checks.few_clusters.holds
    assert float(report.checks.few_clusters.slack) == -2.0
    assert not report.checks.negative_cosines.holds


def test_zero_columns_move_the_exact_objective_as_predicted(key):
    """A unit off the span of the data: the second-order change of the objective, with its sign, on both sides."""
    data = clusters(key).at[:, 5].set(0.0)
    labels, sigma = LABELS, 0.05

    def change(penalty, delta=1e-3):
        dae = minimizers.block_minimizer(data, labels, sigma, penalty, 2, width=7)
        w = np.asarray(dae.w1)
        own = np.repeat([0, 1, 2], 2)[None, :] == labels[:, None]
        g = np.mean(data - np.where(own, data @ w[:, :6], 0.0) @ w[:, :6].T, axis=0)
        grown = minimizers.ReluDae(
            dae.w1.at[5, 6].set(delta), dae.w2.at[:, 6].set(delta * jnp.asarray(g / np.linalg.norm(g)))
        )
        objective = jax.jit(risk.exact_objective)
        return float(objective(grown, data, sigma, penalty) - objective(dae, data, sigma, penalty)) / delta**2

    for penalty, stable in ((1e-6, False), (1e-2, True)):
        report = check(data, sigma, penalty, (2, 2, 2), 7)
        slack = float(report.checks.zero_columns.slack)
        assert bool(report.checks.zero_columns.holds) is stable is (slack > 0)
        # Next order in δ: δ⁴ terms, a relative 1e-6 of σ² + |slack|; and the rounding of the difference.
        np.testing.assert_allclose(change(penalty), 2 * slack, rtol=1e-3, atol=1e-7)
    # Without zero columns, or with data that fill the space, there is nothing to say.
    assert np.isinf(check(data, sigma, 1e-6).checks.zero_columns.slack)
    assert np.isinf(check(clusters(jax.random.fold_in(key, 1)), sigma, 1e-6, (2, 2, 2), 7).checks.zero_columns.slack)


def test_zero_columns_are_stable_on_the_simplex():
    """The mean residual vanishes there."""
    data = jnp.asarray(np.pad(SIMPLEX, ((0, 0), (0, 1))))
    report = conditions.check_conditions(data, np.arange(4), 0.1, 1e-9, 1, width=6)
    np.testing.assert_allclose(report.checks.zero_columns.slack, 1e-9, atol=1e-16)


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
