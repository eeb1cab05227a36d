"""Networks with biases: behind the same functions, closed forms against the exact objective, and certificates."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dae_theory import certificate, codes, energies, model, population, risk, symmetry
from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import (
    affine_block_cost,
    affine_block_minimizer,
    affine_cells,
    affine_generalizing_cost,
    affine_generalizing_minimizer,
    affine_memorizing_minimizer,
)
from dae_theory.convexity import gate_distance, hull_distances, memorizing_costs, project_on_hulls
from dae_theory.exact_training import minimize_exact_objective
from dae_theory.minimizers import memorizing_minimizer
from dae_theory.mixture import GaussianMixture
from dae_theory.model import AffineDae, ReluDae, with_biases
from dae_theory.second_order import objective_hessian, to_matrix

GOLDEN = [(5, 0.1, 1.9175, 1.9181, 1.5589, 1.5569), (7, 0.05, 1.0431, 1.0436, 2.8630, 2.8582),
          (9, 0.03, 0.6527, 0.6530, 4.5657, 4.5552)]  # fmt: skip
"""Points on a circle of radius 3 at a penalty of 1e-3: n, sigma, gate predicted and found, gain likewise."""


def circle(n, radius=3.0):
    turns = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def random_dae(key, dim=3, width=4):
    parts = [(dim, width), (width,), (dim, width), (dim,)]
    return AffineDae(*(jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(parts)))


@pytest.fixture(scope="module")
def rows():
    return jax.random.normal(jax.random.key(5), (6, 3))


def found_gates(dae, data):
    """Distances of each sample to the gate of its own unit, in a network of one unit a sample."""
    return (np.sum(np.asarray(data).T * dae.w1, axis=0) + dae.b1) / np.linalg.norm(dae.w1, axis=0)


def test_a_network_is_the_sum_of_its_units_and_the_offset(key, rows):
    dae = random_dae(key)
    y = rows[0]
    by_unit = sum(np.maximum(dae.w1[:, j] @ y + dae.b1[j], 0.0) * dae.w2[:, j] for j in range(4)) + dae.b2
    np.testing.assert_allclose(model.denoise(dae, y), by_unit, rtol=1e-13)
    np.testing.assert_allclose(model.jacobian(dae, y), jax.jacfwd(model.denoise, argnums=1)(dae, y), rtol=1e-12)
    encoder, decoder = model.augmented(dae)
    code = np.maximum(np.append(y, 1.0) @ encoder, 0.0)
    np.testing.assert_allclose(decoder @ np.append(code, 1.0), by_unit, rtol=1e-13)
    jax.tree.map(np.testing.assert_array_equal, model.from_augmented(encoder, decoder), dae)
    assert isinstance(model.from_augmented(dae.w1, dae.w2), ReluDae)


def test_biases_of_zero_change_nothing(key, rows):
    """To rounding: what is added is zero, but sums may be ordered otherwise."""
    plain = ReluDae(*(jax.random.normal(jax.random.fold_in(key, i), (3, 4)) for i in range(2)))
    zero = with_biases(plain)
    mixture = GaussianMixture(jnp.ones(1), rows[:1], jnp.eye(3)[None])
    x = rows[0]
    functions = [
        lambda dae: risk.exact_objective(dae, rows, 0.3, 0.1),
        lambda dae: risk.code_moments(dae, x, 0.3),
        lambda dae: risk.monte_carlo_estimate(jax.random.key(1), dae, rows, 0.3, num_draws=20),
        lambda dae: risk.monte_carlo_estimate(jax.random.key(1), dae, rows, 0.3, num_draws=20, gram=True),
        lambda dae: codes.gate_probabilities(dae, x, 0.3),
        lambda dae: codes.jacobian_energy(dae, x, 0.3),
        lambda dae: codes.local_linear(dae, x).singular_values,
        lambda dae: energies.main_term(dae, rows, 0.3, 0.1),
        lambda dae: population.population_objective(dae, mixture, 0.3, 0.1),
        lambda dae: symmetry.canonicalize(dae)[0],
        lambda dae: symmetry.merge_parallel_columns(dae)[0],
    ]
    for function in functions:
        for with_none, with_zero in zip(jax.tree.leaves(function(plain)), jax.tree.leaves(function(zero)), strict=True):
            np.testing.assert_allclose(with_zero, with_none, rtol=1e-11, atol=1e-13)
    assert symmetry.weight_distance_sq(plain, zero) < 1e-25
    assert with_biases(zero) is zero


def test_the_exact_risk_is_what_noise_draws_average(key, rows):
    """Both Monte Carlo forms within five standard errors, and population risk of a point within rounding."""
    dae = random_dae(key)
    exact = risk.exact_risk(dae, rows, 0.7)
    for gram in (False, True):
        drawn = risk.monte_carlo_estimate(jax.random.key(1), dae, rows, 0.7, num_draws=4000, gram=gram)
        assert abs(drawn.mean - exact) < 5 * drawn.standard_error
        assert drawn.standard_error < 0.01 * exact
    points = GaussianMixture(jnp.full(6, 1 / 6), rows, jnp.zeros((6, 3, 3)))
    np.testing.assert_allclose(population.population_risk(dae, points, 0.7), exact, rtol=1e-12)


def test_the_hessian_is_that_of_automatic_differentiation(key, rows):
    dae = random_dae(key)
    x, unravel = ravel_pytree(dae)
    expected = jax.hessian(lambda x: risk.exact_objective(unravel(x), rows, 0.7, 0.1))(x)
    found = to_matrix(objective_hessian(dae, rows, 0.7, 0.1))
    np.testing.assert_allclose(found, expected, atol=1e-13 * float(jnp.max(jnp.abs(expected))))


def test_zero_columns_have_no_hessian_and_stay_zero(key, rows):
    dae = model.by_unit(random_dae(key), lambda part: part.at[..., 1].set(0.0))
    blocks = objective_hessian(dae, rows, 0.7, 0.1)
    undefined = np.isnan(np.asarray(blocks.cross)).any(axis=(1, 3))
    # The row and the column of the unit, of four units and the offset.
    np.testing.assert_array_equal(undefined, (np.arange(4)[:, None] == 1) | (np.arange(5) == 1)[None, :])
    assert np.isfinite(blocks.outer).all()
    trained = minimize_exact_objective(dae, rows, 0.7, 0.1, method="dense", max_newton=2)
    assert not np.any(trained.dae.w1[:, 1])
    assert not np.any(trained.dae.w2[:, 1])
    assert trained.objective < risk.exact_objective(dae, rows, 0.7, 0.1)
    assert np.any(trained.dae.b2 != dae.b2)


def test_split_rescaled_and_permuted_units_are_put_together(key):
    dae = random_dae(key)
    c1, c2 = 0.6, 0.8
    first = [part[..., :1] for part in (dae.w1, dae.b1, dae.w2)]
    split = [
        jnp.concatenate([c1 * part, dae_part[..., 1:] * scale, c2 * part], axis=-1)
        for part, dae_part, scale in zip(first, (dae.w1, dae.b1, dae.w2), (2.0, 2.0, 0.5), strict=True)
    ]
    # A unit that sees nothing adds its constant to the offset.
    w1, b1, w2 = (jnp.concatenate([part, extra], axis=-1) for part, extra in
                  zip(split, (jnp.zeros((3, 1)), jnp.full(1, 2.0), jnp.ones((3, 1))), strict=True))  # fmt: skip
    other = AffineDae(w1, b1, w2, dae.b2 - 2.0)
    y = jax.random.normal(jax.random.fold_in(key, 9), (3,))
    np.testing.assert_allclose(model.denoise(other, y), model.denoise(dae, y), rtol=1e-12)
    merged = symmetry.merge_parallel_columns(other)
    np.testing.assert_allclose(model.denoise(merged, y), model.denoise(dae, y), rtol=1e-12)
    assert np.sum(np.any(merged.w1 != 0, axis=0)) == 4
    assert symmetry.weight_distance_sq(other, dae) < 1e-24
    assert symmetry.weight_distance_sq(other, dae._replace(b1=dae.b1 + 0.1)) > 1e-3
    # Parallel encoders with gates elsewhere are different units.
    apart = AffineDae(jnp.ones((3, 2)), jnp.array([0.0, 1.0]), jnp.ones((3, 2)), jnp.zeros(3))
    assert symmetry.parallel_groups(apart).tolist() == [0, 1]


@pytest.mark.parametrize(("n", "sigma", "gate", "found", "gain", "found_gain"), GOLDEN)
def test_golden_gates_of_the_general_rule(n, sigma, gate, found, gain, found_gain):
    """On a circle the rule for any data is that for spheres, and the offset is the center."""
    memorized = memorize(circle(n), sigma, 1e-3)
    np.testing.assert_allclose(memorized.gates, gate, atol=6e-5)
    np.testing.assert_allclose(memorized.gains, gain, atol=6e-5)
    cosines = np.cos(2 * np.pi * np.arange(1, n) / n)
    np.testing.assert_allclose(memorized.gates, gate_distance(3.0, cosines, sigma, n * 1e-3), rtol=3e-6)
    np.testing.assert_allclose(memorized.offset, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "sigma", "gate", "found", "gain", "found_gain"),
    [GOLDEN[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in GOLDEN[1:])],
)
def test_exact_training_finds_the_golden_gates(n, sigma, gate, found, gain, found_gain):
    data = jnp.asarray(circle(n))
    start = affine_memorizing_minimizer(data, sigma, 1e-3)
    trained = minimize_exact_objective(start, data, sigma, 1e-3, method="dense")
    assert trained.converged
    np.testing.assert_allclose(found_gates(trained.dae, data), found, atol=6e-5)
    np.testing.assert_allclose(np.sum(np.square(trained.dae.w1), axis=0), found_gain, atol=6e-5)
    np.testing.assert_allclose(symmetry.group_sums(trained.dae, data), found_gain, atol=6e-5)
    assert affine_cells(trained.dae, data).alone.all()


def test_the_golden_network_is_a_strict_minimum_until_it_has_another_unit():
    data = jnp.asarray(circle(5))
    start = affine_memorizing_minimizer(data, 0.1, 1e-3)
    certified = certificate.certify(start, data, 0.1, 1e-3, tolerance=1e-11)
    assert certified.verdict == "strict"
    assert float(certified.min_curvature) == pytest.approx(2.3e-3, abs=5e-5)
    assert int(certified.num_symmetries) == int(certified.num_live) == 5
    assert 0 < certified.distance_sq < 1e-3
    # The direction found for one more unit lowers the objective, by what its slack says for a small unit.
    dead = certified.dead
    assert dead.slack < 0
    step = 1e-3

    def padded(unit):
        added = unit * dead.encoder, unit * dead.bias, unit * dead.decoder
        grown = (
            jnp.concatenate([part, jnp.reshape(new, (*part.shape[:-1], 1))], axis=-1)
            for part, new in zip((certified.refined.w1, certified.refined.b1, certified.refined.w2), added, strict=True)
        )
        w1, b1, w2 = grown
        return AffineDae(w1, b1, w2, certified.refined.b2)

    change = risk.exact_objective(padded(step), data, 0.1, 1e-3) - risk.exact_objective(padded(0.0), data, 0.1, 1e-3)
    np.testing.assert_allclose(change, 2 * step**2 * dead.slack, rtol=1e-3)


def test_the_affine_network_has_the_energy_of_centered_directions():
    """Gates beyond all samples: exact up to rounding, and the best network that is affine."""
    data = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)) * [2, 1, 0.5, 0.3] + 3)
    for rank in (0, 2, 4):  # all in one program, of five units
        dae = affine_generalizing_minimizer(data, 0.3, 0.01, rank, width=5)
        objective = risk.exact_objective(dae, data, 0.3, 0.01)
        np.testing.assert_allclose(objective, affine_generalizing_cost(data, 0.3, 0.01, rank), rtol=1e-10)
        # A direction with less energy than the penalty has no unit.
        assert affine_cells(dae, data).on.sum() == 9 * np.sum(np.any(dae.w1, axis=0))
    assert affine_generalizing_cost(data, 0.3, 0.01, 4) < affine_generalizing_cost(data, 0.3, 0.01, 3)


def clusters(key, sigma=0.02):
    """Five clusters around the points of a planar circle, in eight dimensions, spread orthogonally to the plane."""
    rng = np.random.default_rng(0)
    means = np.pad(circle(5, 3.0), ((0, 0), (0, 6)))
    spread = np.pad(0.1 * rng.normal(size=(5, 6, 6)), ((0, 0), (0, 0), (2, 0)))
    spread -= spread.mean(axis=1, keepdims=True)
    data = (means[:, None, :] + spread).reshape(30, 8)
    return data, np.repeat(np.arange(5), 6), means


def test_affine_clusters_have_the_energy_of_the_formula(key):
    """Means with cosines of +.31, which no theorem without biases allows: the formula less the exact objective is what
    crosses gates, 1e-11 of it at most for gates 5 standard deviations of the units' noise away."""
    data, labels, means = clusters(key)
    where = {"gates": np.full(5, 1.7), "offset": np.zeros(8)}
    dae = affine_block_minimizer(jnp.asarray(data), labels, 0.02, 1e-4, 3, normals=means / 3.0, **where)
    cells = affine_cells(dae, jnp.asarray(data))
    np.testing.assert_array_equal(cells.on, np.repeat(labels[:, None] == np.arange(5), 3, axis=1))
    cost = affine_block_cost(jnp.asarray(data), labels, 0.02, 1e-4, 3, **where)
    objective = risk.exact_objective(dae, jnp.asarray(data), 0.02, 1e-4)
    np.testing.assert_allclose(objective, cost, atol=1e-11)
    np.testing.assert_allclose(sum(energies.main_term(dae, jnp.asarray(data), 0.02, 1e-4)), cost, rtol=1e-12)
    assert np.cos(2 * np.pi / 5) > 0.3


def test_gates_through_the_offset_at_zero_are_the_corollary():
    data = jnp.array([[2.0, 0.1, 0.0], [-1.5, 0.3, 0.2], [0.0, -0.4, -1.9]])
    lengths = np.linalg.norm(data, axis=1)
    dae = affine_block_minimizer(
        data, [0, 1, 2], 0.3, 0.01, 1, gates=lengths, normals=np.asarray(data) / lengths[:, None], offset=np.zeros(3)
    )
    plain = memorizing_minimizer(data, 0.3, 0.01, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), dae, with_biases(plain))


def test_without_noise_and_penalty_the_rows_themselves_are_fixed():
    """A bias-free network returns multiples of rows; this one moves any row by a share σ² + l of it."""
    data = np.random.default_rng(3).normal(size=(7, 6)) + 2.0
    errors = []
    for sigma in (0.02, 0.01):
        dae = affine_memorizing_minimizer(jnp.asarray(data), sigma, 0.0)
        assert affine_cells(dae, jnp.asarray(data)).alone.all()
        errors.append(np.abs(jax.vmap(lambda y, dae=dae: model.denoise(dae, y))(jnp.asarray(data)) - data).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] < 1e-2


closed_objective = jax.jit(risk.exact_objective)


@hypothesis.given(seed=st.integers(0, 2**20), clear=st.floats(5, 20))
def test_over_geometries_first_order_is_what_leaks(seed, clear):
    """Six random points in four dimensions, of any shape, at a noise for which the nearest hull is 5 to 20 σ away: the
    objective to first order is within .5 % of the exact one of its network, where what leaks is up to 10 % of it."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(6, 4)) * 2 + rng.normal(size=4)
    distances = hull_distances(data)
    hypothesis.assume(distances.min() > 0.05)
    sigma = float(distances.min() / clear)
    found = memorize(data, sigma, 1e-5)
    assert np.all((found.gates > 0) & (found.gates < distances))
    dae = affine_memorizing_minimizer(jnp.asarray(data), sigma, 1e-5, memorized=found)
    exact = float(closed_objective(dae, jnp.asarray(data), sigma, 1e-5))
    assert abs(found.objective / exact - 1) < 5e-3
    main = float(np.mean(memorizing_costs(found.lengths, found.gates, sigma, 6e-5)))
    assert abs(main / exact - 1) < 0.1
    # The law of the gates: some standard deviations before the hull, of order √ln(L/σ).
    gaps = (distances - found.gates) / sigma
    assert np.all(gaps < 4 * np.sqrt(1 + np.log(found.lengths / sigma)))


def test_what_cannot_be_memorized_is_named():
    """A sample inside, and all where the penalty forbids it, have no unit; nothing is NaN."""
    data = np.concatenate([circle(6), np.zeros((1, 2))])
    found = memorize(data, 0.1, 1e-3)
    assert np.flatnonzero(found.gains == 0).tolist() == [6]
    assert all(np.isfinite(part).all() for part in found)
    np.testing.assert_allclose(found.costs[6], found.lengths[6] ** 2, atol=1e-12)
    assert found.objective == pytest.approx(found.costs.mean())
    # The costs have the leakage in them: to first order they are the exact objective.
    whole = memorize(circle(6), 0.1, 1e-3)
    rows = jnp.asarray(circle(6))
    exact = risk.exact_objective(affine_memorizing_minimizer(rows, 0.1, 1e-3), rows, 0.1, 1e-3)
    assert whole.objective == pytest.approx(float(exact), rel=1e-4)
    dae = affine_memorizing_minimizer(jnp.asarray(data), 0.1, 1e-3, width=9)
    assert np.flatnonzero(~np.any(dae.w1, axis=0)).tolist() == [6, 7, 8]
    assert not memorize(circle(5), 0.1, 10.0).gains.any()
    # Nothing but the offset is left: the objective is the variance.
    assert memorize(circle(5), 0.1, 10.0).objective == pytest.approx(9.0)


def test_hulls_in_many_dimensions_are_those_of_single_problems():
    """Loose tolerances bound the relative error of squared distances."""
    data = np.random.default_rng(1).normal(size=(40, 12))
    exact = hull_distances(data)
    loose = project_on_hulls(data, tolerance=1e-3)
    assert np.all(loose.distances >= exact * (1 - 1e-12))
    assert np.all(loose.distances**2 <= exact**2 * (1 + 1.01e-3) + 1e-12)
    np.testing.assert_allclose(np.linalg.norm(data - loose.nearest, axis=1), loose.distances, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "gates", "energy"), [(0.2, 0.075, 0.065), (0.1, 0.04, 0.03)])
def test_raw_digits_are_memorized_as_predicted(sigma, gates, energy):
    """All cosines are positive, and exact training keeps every one of twelve images: gates within the stated share,
    which falls with σ, and the objective above its minimum by at most another."""
    from sklearn.datasets import load_digits

    data = jnp.asarray(load_digits().data[:12] / 8 - 1)
    assert float(jnp.min(data @ data.T)) > 0
    memorized = memorize(np.asarray(data), sigma, 1e-3)
    trained = minimize_exact_objective(
        affine_memorizing_minimizer(data, sigma, 1e-3, memorized=memorized), data, sigma, 1e-3, tolerance=1e-8
    )
    assert trained.converged
    np.testing.assert_allclose(found_gates(trained.dae, data), memorized.gates, rtol=gates)
    np.testing.assert_allclose(trained.objective, memorized.objective, rtol=energy)
    assert trained.objective < affine_generalizing_cost(data, sigma, 1e-3, 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memorize(np.zeros((1, 3)), 0.1, 0.0), "two samples or more"),
        (lambda: memorize(circle(5), 0.0, 0.0), "sigma"),
        (lambda: memorize(np.concatenate([circle(5), circle(5)[1:2]]), 0.1, 0.0), "1 samples repeat.*rows 1 and 5"),
        (lambda: memorize(circle(5), 0.1, -1.0), "penalty"),
        (lambda: affine_memorizing_minimizer(jnp.asarray(circle(5)), 0.1, 0.0, width=4), "width"),
        (lambda: affine_generalizing_minimizer(jnp.ones((2, 2)), 0.1, 0.0, 3), "rank = 3 is more than the 2"),
        (
            lambda: risk.exact_risk(
                AffineDae(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 3)), jnp.ones(2)), jnp.ones((4, 2)), 0.1
            ),
            r"b1 and b2 must have shapes \(3,\) and \(2,\)",
        ),
        (
            lambda: risk.exact_risk(
                AffineDae(jnp.ones((2, 3)), jnp.full(3, jnp.nan), jnp.ones((2, 3)), jnp.ones(2)), jnp.ones((4, 2)), 0.1
            ),
            "b1",
        ),
        (
            lambda: affine_block_minimizer(
                jnp.asarray(circle(4)), [0, 0, 1, 1], 0.1, 0.0, [1, 0],
                gates=np.ones(2), normals=np.eye(2), offset=np.zeros(2),
            ),
            "at least 1",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
