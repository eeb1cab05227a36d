"""Symmetries of the weights: merging, one form for a class, tangents of the group, distance modulo it."""

import itertools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dae_theory
from dae_theory import symmetry
from dae_theory.minimizers import block_minimizer, memorizing_minimizer, shrinkage
from dae_theory.model import ReluDae, denoise, live_columns

SEEDS = st.integers(0, 2**32 - 1)

# Called eagerly, a scan compiles anew in every call.
groups_of = jax.jit(symmetry.parallel_groups)
merge = jax.jit(symmetry.merge_parallel_columns)
canonicalize = jax.jit(symmetry.canonicalize)
match = jax.jit(symmetry.match_columns)
weight_distance_sq = jax.jit(symmetry.weight_distance_sq)


def random_dae(seed, dim=5, width=7, scale=1.0):
    rng = np.random.default_rng(seed)
    return ReluDae(*(jnp.asarray(scale * rng.normal(size=(dim, width))) for _ in range(2)))


def balanced(dae):
    ratio = jnp.sqrt(jnp.linalg.norm(dae.w2, axis=0) / jnp.linalg.norm(dae.w1, axis=0))[None, :]
    return ReluDae(dae.w1 * ratio, dae.w2 / ratio)


def permuted(dae, order):
    return ReluDae(dae.w1[:, order], dae.w2[:, order])


def rescaled(dae, factors):
    return ReluDae(dae.w1 * factors[None, :], dae.w2 / factors[None, :])


def split(dae, shares):
    """Each unit as two, (c₁w₁, c₁w₂) and (c₂w₁, c₂w₂), which changes neither function nor penalty."""
    c1, c2 = jnp.sqrt(shares)[None, :], jnp.sqrt(1 - shares)[None, :]
    return ReluDae(*(jnp.concatenate([w * c1, w * c2], axis=1) for w in dae))


def transformed(dae, seed, scale=3.0):
    """A network of the same function: every unit split, some shares zero, all rescaled and shuffled."""
    rng = np.random.default_rng(seed)
    p = dae.w1.shape[1]
    shares = rng.uniform(0.1, 0.9, p) * (rng.uniform(size=p) < 0.7)
    twice = rescaled(split(dae, jnp.asarray(shares)), jnp.asarray(scale ** rng.uniform(-1, 1, 2 * p)))
    return permuted(twice, jnp.asarray(rng.permutation(2 * p)))


@jax.jit
def outputs(dae):
    ys = jnp.asarray(np.random.default_rng(0).normal(size=(40, dae.w1.shape[0])))
    return jax.vmap(lambda y: denoise(dae, y))(ys)


def penalty(dae):
    return sum(float(jnp.sum(jnp.square(w))) for w in dae)


def simplex_rows(num=4, scale=1.5):
    centered = np.eye(num) - 1 / num
    basis = np.linalg.svd(centered)[2][: num - 1]
    return jnp.asarray(scale * centered @ basis.T / np.linalg.norm(centered[0]))


# Merging


def test_merging_undoes_splitting():
    whole = balanced(random_dae(1))
    merged = merge(split(whole, jnp.linspace(0.1, 0.9, 7)))
    assert int(live_columns(merged).sum()) == 7
    np.testing.assert_allclose(merged.w1[:, :7], whole.w1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.w2[:, :7], whole.w2, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(merged.w1[:, 7:], 0.0)


def test_merging_keeps_the_function_and_never_raises_the_penalty():
    dae = random_dae(2)
    # Parallel encoders with different decoders still make one unit.
    dae = dae._replace(w1=dae.w1.at[:, 4].set(2.5 * dae.w1[:, 1]).at[:, 5].set(0.0))
    merged = merge(dae)
    np.testing.assert_allclose(outputs(merged), outputs(dae), rtol=1e-12, atol=1e-12)
    assert penalty(merged) < penalty(dae)
    assert int(live_columns(merged).sum()) == 5
    np.testing.assert_allclose(jnp.linalg.norm(merged.w1, axis=0), jnp.linalg.norm(merged.w2, axis=0), rtol=1e-13)


def test_merging_does_not_depend_on_scales():
    """Also where the group is only nearly parallel: members count by what they contribute."""
    dae = random_dae(3)
    near = dae._replace(w1=dae.w1.at[:, 4].set(0.3 * dae.w1[:, 1] + 0.01 * dae.w1[:, 2]))
    assert int(groups_of(near)[4]) == 1
    factors = jnp.asarray(10.0 ** np.linspace(-2, 2, 7))
    for ours, theirs in zip(merge(rescaled(near, factors)), merge(near), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_antiparallel_columns_stay_apart():
    w = jnp.array([[1.0, -1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(groups_of(ReluDae(w, w)), [0, 1])


def test_tolerance_means_what_it_says_down_to_rounding():
    angle = 1e-7
    w = jnp.array([[1.0, 2.0 * math.cos(angle), 0.0, 3.0, 0.0], [0.0, 2.0 * math.sin(angle), 0.0, 0.0, 0.0]])
    groups = {tol: groups_of(ReluDae(w, w), tolerance=tol) for tol in (1e-30, 4.9e-15, 5.1e-15)}
    # 1 − cos = angle²/2 = 5e-15; silent units form one group.
    np.testing.assert_array_equal(groups[1e-30], [0, 1, 2, 0, 2])
    np.testing.assert_array_equal(groups[4.9e-15], [0, 1, 2, 0, 2])
    np.testing.assert_array_equal(groups[5.1e-15], [0, 0, 2, 0, 2])


def test_dead_networks_stay_finite_in_value_and_gradient():
    dead = ReluDae(jnp.zeros((3, 4)), jnp.zeros((3, 4)))
    assert not bool(live_columns(dead).any())
    for function in (symmetry.merge_parallel_columns, symmetry.canonicalize):
        chex.assert_trees_all_equal(function(dead), dead)
        one_dead = ReluDae(*(w.at[:, 2].set(0.0) for w in random_dae(4, 3, 4)))
        derivative_of = jax.jit(jax.jacrev(function))
        chex.assert_tree_all_finite(derivative_of(one_dead))
        chex.assert_tree_all_finite(derivative_of(dead))


# The canonical form


@hypothesis.given(SEEDS, SEEDS, st.sampled_from([1e-3, 1.0, 1e3]))
def test_one_form_for_all_networks_of_a_class(seed, other, scale):
    dae = random_dae(seed, scale=scale)
    wide = symmetry.pad_columns(dae, 14)
    form = canonicalize(wide, tolerance=1e-9)
    again = canonicalize(transformed(dae, other), tolerance=1e-9)
    chex.assert_trees_all_close(again, form, rtol=1e-11, atol=1e-11 * scale)
    np.testing.assert_allclose(outputs(form), outputs(dae), rtol=1e-10, atol=1e-11 * scale**2)
    norms = np.linalg.norm(form.w1, axis=0)
    np.testing.assert_allclose(norms, np.linalg.norm(form.w2, axis=0), rtol=1e-13)
    assert np.all(np.diff(norms) <= 1e-7 * norms[0])
    assert np.all(norms[:7] > 0)
    np.testing.assert_array_equal(norms[7:], 0.0)
    assert penalty(form) <= penalty(dae) * (1 + 1e-13)


@hypothesis.given(SEEDS)
def test_ties_of_the_norm_are_broken_alike(seed):
    """A memorizing network of equal norms: here rounding would decide a sort by norm alone."""
    dae = memorizing_minimizer(simplex_rows(), 0.3, 1e-3, 4)
    form = canonicalize(symmetry.pad_columns(dae, 8))
    chex.assert_trees_all_close(canonicalize(transformed(dae, seed)), form, rtol=1e-12, atol=1e-13)


@hypothesis.given(SEEDS)
def test_canonicalizing_twice_changes_nothing(seed):
    form = canonicalize(random_dae(seed))
    chex.assert_trees_all_close(canonicalize(form), form, rtol=1e-13, atol=1e-14)


def test_columns_below_the_tolerance_are_dropped():
    dae = balanced(random_dae(5))
    faint = ReluDae(*(w.at[:, 3].multiply(1e-3) for w in dae))
    assert int(jnp.sum(symmetry.column_norms(canonicalize(faint).w1) > 0)) == 6
    assert int(jnp.sum(symmetry.column_norms(canonicalize(faint, tolerance=1e-9).w1) > 0)) == 7


# Weight space


def test_matching_is_the_best_of_all_permutations():
    for seed in range(4):
        a, b = random_dae(seed, 3, 5), random_dae(seed + 100, 3, 5)
        order = match(a, b)
        assert sorted(order.tolist()) == list(range(5))

        def cost(order, a=a, b=b):
            return sum(np.sum((np.asarray(x) - np.asarray(y)[:, order]) ** 2) for x, y in zip(a, b, strict=True))

        best = min(cost(list(order)) for order in itertools.permutations(range(5)))
        np.testing.assert_allclose(cost(np.asarray(order)), best, rtol=1e-13)


def test_matching_is_invertible_and_survives_nan():
    a = random_dae(6)
    order = jnp.asarray(np.random.default_rng(0).permutation(7))
    np.testing.assert_array_equal(order[match(a, permuted(a, order))], np.arange(7))
    assert match(a, ReluDae(a.w1 * jnp.nan, a.w2)).shape == (7,)
    with pytest.raises(ValueError, match="the same shape"):
        match(a, random_dae(6, 5, 8))


@hypothesis.given(SEEDS, SEEDS)
def test_weight_distance_is_zero_on_a_class(seed, other):
    dae = random_dae(seed)
    distance_sq = weight_distance_sq(dae, transformed(dae, other), tolerance=1e-9)
    assert float(distance_sq) < (1e-14 * 100) ** 2 * penalty(dae)


def test_weight_distance_of_a_small_step_is_its_length():
    """Columns of a tied network moved by δ stay balanced, so the distance is ``√2 ‖δ‖`` whatever the order."""
    w = random_dae(7).w1
    step = 1e-4 * random_dae(8).w1
    moved = permuted(ReluDae(w + step, w + step), jnp.asarray([3, 1, 0, 2, 6, 5, 4]))
    distance_sq = weight_distance_sq(ReluDae(w, w), split(moved, jnp.linspace(0.2, 0.8, 7)), tolerance=1e-9)
    np.testing.assert_allclose(distance_sq, 2 * float(jnp.sum(step**2)), rtol=1e-9)


@hypothesis.given(SEEDS)
def test_weight_distance_is_a_metric(seed):
    nets = [random_dae(seed), random_dae(seed + 1), random_dae(seed + 2)]
    ab, ba, bc, ac = (
        math.sqrt(float(weight_distance_sq(nets[i], nets[j]))) for i, j in ((0, 1), (1, 0), (1, 2), (0, 2))
    )
    np.testing.assert_allclose(ab, ba, rtol=1e-12)
    assert ac <= (ab + bc) * (1 + 1e-12)
    assert ab > 0.1


def test_weight_distance_to_nothing_is_the_balanced_penalty():
    dae = random_dae(9)
    nothing = ReluDae(jnp.zeros((5, 1)), jnp.zeros((5, 1)))
    expected = penalty(canonicalize(dae))
    np.testing.assert_allclose(weight_distance_sq(dae, nothing), expected, rtol=1e-13)
    np.testing.assert_allclose(expected, 2 * np.sum(symmetry.column_norms(balanced(dae).w1) ** 2), rtol=1e-12)


# Corollary 3.2 by group sums


@pytest.mark.parametrize("penalty_", [0.0, 1e-2])
def test_group_sums_of_a_split_minimizer_are_its_shrinkage(penalty_):
    data = simplex_rows() * jnp.array([1.0, 1.5, 0.7, 2.0])[:, None]
    norm_sq = jnp.sum(data**2, axis=1)
    dae = transformed(memorizing_minimizer(data, 0.4, penalty_, 6), 11)
    expected = (norm_sq - 4 * penalty_) / (norm_sq + 0.16)
    np.testing.assert_allclose(symmetry.group_sums(dae, data), expected, rtol=1e-12)
    np.testing.assert_allclose(shrinkage(norm_sq, 0.25, 0.4, penalty_), expected, rtol=1e-12)


def test_group_sums_of_repeated_rows_count_the_copies():
    rows = simplex_rows()
    labels = np.array([0, 1, 1, 1, 2, 3])
    data = rows[labels]
    sums = jax.jit(lambda data: symmetry.group_sums(block_minimizer(data, labels, 0.4, 1e-2, 1), data))(data)
    norm_sq = float(rows[0] @ rows[0])
    copies = np.bincount(labels)[labels]
    np.testing.assert_allclose(sums, (norm_sq - 6 / copies * 1e-2) / (norm_sq + 0.16), rtol=1e-12)


def test_group_sums_leave_out_what_is_not_aligned():
    row = jnp.array([2.0, 0.0])
    tilt = jnp.array([math.cos(0.1), math.sin(0.1)])
    w1 = jnp.stack([row, -row, tilt, 3 * row, jnp.zeros(2), row], axis=1)
    w2 = jnp.stack([row / 2, -row, tilt, tilt, row, -row], axis=1)
    data = jnp.stack([row, jnp.zeros(2)])
    # 1 − cos 0.1 = 0.005; at a loose tolerance the tilted units count.
    np.testing.assert_allclose(symmetry.group_sums(ReluDae(w1, w2), data), [2.0, 0.0], rtol=1e-14)
    np.testing.assert_allclose(
        symmetry.group_sums(ReluDae(w1, w2), data, tolerance=0.01), [2.0 + 1.0 + 6.0, 0.0], rtol=1e-14
    )
    with pytest.raises(ValueError, match="non-finite"):
        symmetry.group_sums(ReluDae(w1, w2), data * jnp.nan)


# Tangents


def block_example():
    """Two clusters of opposite means, three units and two, with the first of them split; and a dead column."""
    rng = np.random.default_rng(0)
    spread = 0.3 * rng.normal(size=(12, 4))
    data = jnp.asarray(spread + np.array([[2.0, 0, 0, 0]] * 6 + [[-2.0, 0, 0, 0]] * 6))
    labels = np.repeat([0, 1], 6)
    dae = jax.jit(lambda data: block_minimizer(data, labels, 0.2, 1e-3, (3, 2), width=6))(data)
    first = ReluDae(*(w[:, :1] * 0.6 for w in dae))
    rest = ReluDae(*(w.at[:, 0].multiply(0.8) for w in dae))
    return ReluDae(*(jnp.concatenate(pair, axis=1) for pair in zip(first, rest, strict=True))), data


def derivative(function, dae, tangent):
    return jax.jvp(function, (dae,), (ReluDae(*tangent),))[1]


def test_tangents_are_orthonormal_and_counted():
    dae, data = block_example()
    # Columns: 0 and 1 one unit in two, 2 and 3 of its block, 4 and 5 the other block, 6 dead.
    counts = {("rescaling",): 6, ("splitting",): 1, ("rotation",): 6 + 1, ("splitting", "rotation"): 6 + 1}
    counts[("rescaling", "splitting", "rotation")] = 6 + 6 + 1
    for families, count in counts.items():
        basis = np.asarray(symmetry.symmetry_tangents(dae, families=families, data=data))
        assert basis.shape == (count, 2, 4, 7)
        flat = basis.reshape(count, -1)
        np.testing.assert_allclose(flat @ flat.T, np.eye(count), atol=1e-13)
        np.testing.assert_allclose(basis[..., 6], 0.0, atol=1e-14)


def test_rotations_of_three_parallel_units_are_their_two_splittings():
    unit = balanced(random_dae(10, 3, 1))
    dae = ReluDae(*(w * jnp.array([1.0, 2.0, 3.0])[None, :] for w in unit))
    splitting = symmetry.symmetry_tangents(dae, families=("splitting",)).reshape(-1, 18)
    rotation = symmetry.symmetry_tangents(dae, families=("rotation",), data=unit.w1.T).reshape(-1, 18)
    assert splitting.shape == rotation.shape == (2, 18)
    np.testing.assert_allclose(splitting.T @ splitting, rotation.T @ rotation, atol=1e-13)


def test_group_actions_move_within_the_span():
    """Curves of networks with the same function, differentiated: their velocities lie in the span, others do not."""
    whole = balanced(random_dae(12, 4, 3))

    def curve(t):
        # Unit 0 split with an angle that moves, all units rescaled.
        angle = 0.7 + 0.3 * t
        twice = ReluDae(
            *(jnp.concatenate([w[:, :1] * jnp.cos(angle), w[:, :1] * jnp.sin(angle), w[:, 1:]], axis=1) for w in whole)
        )
        return rescaled(twice, jnp.exp(t * jnp.array([0.5, -0.2, 0.1, 1.0])))

    start, velocity = jax.jvp(curve, (0.0,), (1.0,))
    basis = symmetry.symmetry_tangents(start).reshape(-1, 32)
    assert basis.shape[0] == 5
    flat = jnp.concatenate([velocity.w1.ravel(), velocity.w2.ravel()])
    np.testing.assert_allclose(basis.T @ (basis @ flat), flat, atol=1e-12)
    for family in ("rescaling", "splitting"):
        part = symmetry.symmetry_tangents(start, families=(family,)).reshape(-1, 32)
        assert np.linalg.norm(part.T @ (part @ flat) - flat) > 0.1


@jax.jit
def output_changes(dae, basis):
    return jax.vmap(lambda tangent: derivative(outputs, dae, tangent))(basis)


@hypothesis.given(SEEDS)
def test_rescalings_and_splittings_keep_function_and_penalty_to_first_order(seed):
    dae = split(balanced(random_dae(seed, 4, 3)), jnp.array([0.3, 0.5, 0.8]))
    basis = symmetry.symmetry_tangents(dae)
    assert basis.shape[0] == 6 + 3
    np.testing.assert_allclose(output_changes(dae, basis), 0.0, atol=1e-12)
    # Half the derivative of ‖W‖².
    np.testing.assert_allclose(jnp.einsum("kwdp,wdp->k", basis, jnp.stack(dae)), 0.0, atol=1e-12)


def test_units_of_one_encoder_but_two_decoders_are_no_splitting():
    dae = random_dae(13, 3, 2)
    dae = dae._replace(w1=dae.w1.at[:, 1].set(2.0 * dae.w1[:, 0]))
    assert symmetry.symmetry_tangents(dae, families=("splitting",)).shape[0] == 0


def test_curvature_along_tangents_of_the_main_term():
    """With the gates held at the data's, the objective has curvature 4λ along rescalings and 0 along the rest."""
    dae, data = block_example()
    sigma, weight = 0.2, 1e-3
    gates = (data @ dae.w1 > 0).astype(data.dtype)

    def main_term(net):
        maps = jnp.einsum("dp,np,ep->nde", net.w2, gates, net.w1)
        bias = jnp.sum(jnp.square(jnp.einsum("nde,ne->nd", maps, data) - data), axis=1)
        noise = sigma**2 * jnp.sum(jnp.square(maps), axis=(1, 2))
        return jnp.mean(bias + noise) + weight * sum(jnp.sum(jnp.square(w)) for w in net)

    @jax.jit
    def curvature(tangent):
        return derivative(lambda net: derivative(main_term, net, tangent), dae, tangent)

    gradient = jax.grad(main_term)(dae)
    np.testing.assert_allclose(jnp.concatenate([g.ravel() for g in gradient]), 0.0, atol=1e-12)
    for family, expected in (("rescaling", 4 * weight), ("splitting", 0.0), ("rotation", 0.0)):
        for tangent in symmetry.symmetry_tangents(dae, families=(family,), data=data):
            np.testing.assert_allclose(curvature(tangent), expected, atol=1e-12)
    generic = np.random.default_rng(1).normal(size=(2, 4, 7))
    assert curvature(jnp.asarray(generic / np.linalg.norm(generic))) > 0.05


def test_rotations_need_gates_that_are_open_somewhere():
    dae, data = block_example()
    # Rows of the first cluster alone: units of the second are off on all of them, and say nothing.
    assert symmetry.symmetry_tangents(dae, families=("rotation",), data=data[:6]).shape[0] == 6


def test_no_tangents_of_a_dead_network_and_bad_input():
    dead = ReluDae(jnp.zeros((3, 4)), jnp.zeros((3, 4)))
    assert symmetry.symmetry_tangents(dead).shape == (0, 2, 3, 4)
    dae = random_dae(14)
    with pytest.raises(ValueError, match="needs data"):
        symmetry.symmetry_tangents(dae, families=("rotation",))
    with pytest.raises(ValueError, match=r"unknown families \['scaling'\]"):
        symmetry.symmetry_tangents(dae, families=("scaling",))
    with pytest.raises(ValueError, match="concrete"):
        jax.jit(symmetry.symmetry_tangents)(dae)


def test_merging_is_exported_and_functions_lower_for_accelerators():
    assert dae_theory.merge_parallel_columns is symmetry.merge_parallel_columns
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    net = ReluDae(leaf, leaf)
    rows = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    for function, args in (
        (symmetry.merge_parallel_columns, (net,)),
        (symmetry.canonicalize, (net,)),
        (symmetry.weight_distance_sq, (net, net)),
        (symmetry.group_sums, (net, rows)),
    ):
        assert jax.jit(function).trace(*args).lower(lowering_platforms=("tpu", "cuda")).as_text()


def test_one_trace_serves_all_networks_and_batches():
    traces = []

    @jax.jit
    def distances(a, b):
        traces.append(1)
        return jax.vmap(symmetry.weight_distance_sq)(a, b)

    stack = jax.tree.map(lambda *w: jnp.stack(w), *(random_dae(s) for s in range(3)))
    values = distances(stack, jax.tree.map(lambda w: w[::-1], stack))
    distances(stack, stack)
    assert len(traces) == 1
    alone = weight_distance_sq(random_dae(0), random_dae(2))
    np.testing.assert_allclose(values, [alone, 0.0, alone], rtol=1e-12, atol=1e-25)
