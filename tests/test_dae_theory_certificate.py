"""Certificates: the golden table, exact training from anywhere, the residual law, and unstable zero columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import ReluDae, block_minimizer, memorizing_minimizer, minimize_exact_objective
from dae_theory.certificate import certify, residual_law
from dae_theory.conditions import all_hold, check_conditions
from dae_theory.dead_units import dead_direction, error_correlation
from dae_theory.exact_training import from_span, span_basis, to_span
from dae_theory.risk import exact_objective
from dae_theory.turns import lowest_turn

# Four points of a regular simplex in R³, ‖x‖² = 6.75.
SIMPLEX = jnp.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1.5
GOLDEN = {
    # sigma: gradient norm, squared distance, least curvature, least modulo rescaling
    0.2: (7.515e-7, 1.241e-14, 4.0000e-3, 0.0220),
    0.25: (3.650e-5, 2.927e-11, 4.0000e-3, 0.0355),
    0.3: (3.260e-4, 2.335e-9, 4.0000e-3, 0.0613),
    0.4: (2.953e-3, 1.921e-7, 4.0000e-3, 0.168),
    0.5: (6.616e-3, 9.691e-7, 4.0000e-3, 0.322),
}

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def certificates():
    return {s: certify(memorizing_minimizer(SIMPLEX, s, 1e-3, 4), SIMPLEX, s, 1e-3) for s in GOLDEN}


@pytest.mark.parametrize("sigma", GOLDEN)
def test_the_golden_table_to_all_its_digits(certificates, sigma):
    c, (gradient, distance, least, modulo) = certificates[sigma], GOLDEN[sigma]
    # Half a unit of the last printed digit; for the distance at sigma 0.2, 1e-14 is near rounding.
    np.testing.assert_allclose(c.gradient_norm, gradient, rtol=0.0005 / 2.9)
    np.testing.assert_allclose(c.distance_sq, distance, rtol=0.0005 / 1.2)
    np.testing.assert_allclose(c.min_curvature, least, rtol=2e-5)
    np.testing.assert_allclose(c.min_curvature_modulo_symmetry, modulo, rtol=0.0005 / 0.168 if modulo > 0.1 else 3e-3)
    assert bool(c.converged)
    assert bool(c.strict)
    assert int(c.num_live) == int(c.num_symmetries) == 4
    assert float(c.refined_gradient_norm) < 1e-12


@pytest.mark.slow
def test_lanczos_certifies_what_is_too_large_to_diagonalize(certificates):
    """The same network with a limit of no coordinates: the same numbers, by another road, with a bound that is kept."""
    dense = certificates[0.3]
    c = certify(memorizing_minimizer(SIMPLEX, 0.3, 1e-3, 4), SIMPLEX, 0.3, 1e-3, max_size=0)
    assert bool(c.strict)
    np.testing.assert_allclose(c.min_curvature, dense.min_curvature, rtol=1e-8)
    np.testing.assert_allclose(c.min_curvature_modulo_symmetry, dense.min_curvature_modulo_symmetry, rtol=1e-8)
    assert float(c.curvature_error) < 1e-8
    np.testing.assert_allclose(c.distance_sq, dense.distance_sq, rtol=1e-4)


def test_the_least_curvature_is_the_rescalings_fourfold(certificates):
    curvatures = certificates[0.3].curvatures
    np.testing.assert_allclose(curvatures[:4], 4e-3, rtol=1e-6)
    assert float(curvatures[4]) > 1e-2


def test_a_saddle_is_found_out():
    """One unit for two samples, split in halves: stationary, but the halves would rather part."""
    # In shapes of the golden table, which share its programs: the zero column stays zero until the halves take it.
    rows = SIMPLEX.at[3].set(jnp.array([-1.5, 1.0, -1.0]))
    shared = jnp.stack([SIMPLEX[0], SIMPLEX[1], 0.5 * (rows[2] + rows[3]), jnp.zeros(3)], axis=1) / 3
    alone = minimize_exact_objective(
        ReluDae(shared, shared), rows, 0.2, 1e-2, method="products", tolerance=1e-12, max_rough=0
    )
    halves = ReluDae(*(w.at[:, 2:].set(w[:, 2:3] / np.sqrt(2)) for w in alone.dae))
    c = certify(halves, rows, 0.2, 1e-2)
    assert bool(c.converged)
    assert float(c.distance_sq) < 1e-20
    assert float(c.min_curvature_modulo_symmetry) < -1e-3
    assert not bool(c.strict)
    assert c.verdict == "negative curvature"


def test_the_direction_of_a_new_unit_is_stationary_on_the_sphere():
    """At a maximum of ‖g‖² over unit vectors its gradient is along the vector."""
    # In shapes of the golden table, which share its program.
    rows = jnp.array([[2.0, 0.5, 0.1], [0.3, 1.5, -0.4], [-0.6, 0.2, 1.2], [0.2, 0.1, 0.3]])
    dae = memorizing_minimizer(rows[:1], 0.3, 1e-2, 4)
    direction = dead_direction(dae, rows, 1.0, 1e-2)
    correlation = jax.jit(functools.partial(error_correlation, dae, rows, 1.0))
    slope = jax.grad(lambda a: jnp.sum(jnp.square(correlation(a))))(direction.encoder)
    across = slope - (slope @ direction.encoder) * direction.encoder
    # The search stops when the value changes by rounding only, so its direction is exact to the root of that.
    assert float(jnp.linalg.norm(across)) < 1e-7 * float(jnp.linalg.norm(slope))


def test_live_directions_are_neutral_to_new_units(certificates):
    """At a minimum ‖g(a)‖ = λ along each live unit, so splitting it is free and the slack at most 0."""
    assert all(float(c.dead.slack) < 1e-12 for c in certificates.values())
    assert abs(float(certificates[0.2].dead.slack)) < 1e-12


@pytest.mark.slow
def test_a_block_is_flat_along_the_turns_of_its_orthogonal_factor():
    """Two far clusters, three units each: three turns a block, flat to rounding; curved in all other directions."""
    mean = jnp.array([4.0, 0.0, 0.0, 0.0])
    # Different spreads: of two equal directions either could be kept, one more thing for nothing.
    spread = jnp.diag(jnp.array([0.1, 0.4, 0.3, 0.2]))
    offsets = jnp.concatenate([spread, -spread])
    data = jnp.concatenate([mean[None] + offsets, -mean[None] + offsets])
    closed = block_minimizer(data, np.repeat([0, 1], 8), 0.1, 1e-3, 3)
    c = certify(closed, data, 0.1, 1e-3)
    assert int(c.num_rotations) == 6
    assert int(c.num_symmetries) == 6 + 6
    assert abs(float(c.min_rotation_curvature)) < 1e-12
    assert float(c.min_curvature_modulo_symmetry) > 1e-3
    # Nothing falls, not even after a turn of 37 degrees, but nothing tells a strict minimum from a flat one either.
    assert abs(float(c.turn.change)) < 1e-15
    assert not bool(c.falls_along_turn)
    assert bool(c.flat_along_turns)
    assert not bool(c.strict)
    assert c.verdict == "flat along turns to rounding"


def opposite_clusters(sigma, mean=1.2):
    """Two opposite clusters of four rows with two units each, for which every condition holds."""
    rows = 0.15 * jax.random.normal(jax.random.key(3), (8, 6))
    data = rows + jnp.repeat(jnp.array([mean, -mean]), 4)[:, None] * jnp.eye(6)[:1]
    labels = np.repeat([0, 1], 4)
    assert bool(all_hold(check_conditions(data, labels, sigma, 1e-3, 2)))
    return data, block_minimizer(data, labels, sigma, 1e-3, 2)


@pytest.mark.parametrize("sigma", [0.15, pytest.param(0.25, marks=pytest.mark.slow)])
def test_the_objective_can_fall_along_a_turn_though_every_condition_holds(sigma):
    data, closed = opposite_clusters(sigma)
    turn = lowest_turn(closed, data, sigma, 1e-3)
    assert float(turn.change) < -1e-4
    assert abs(float(turn.degrees)) > 20
    c, s = np.cos(np.deg2rad(float(turn.degrees))), np.sin(np.deg2rad(float(turn.degrees)))
    mix = np.array([[c, -s], [s, c]])
    turned = [
        ReluDae(*(jnp.asarray(w).at[:, block].set(w[:, block] @ mix) for w in closed))
        for block in (slice(0, 2), slice(2, 4))
    ]
    # The turn keeps the linear map and the penalty: what changes is what crosses gates.
    for dae in turned:
        np.testing.assert_allclose(dae.w2 @ dae.w1.T, closed.w2 @ closed.w1.T, atol=1e-14)
    before = exact_objective(closed, data, sigma, 1e-3)
    changes = [float(exact_objective(dae, data, sigma, 1e-3) - before) for dae in turned]
    np.testing.assert_allclose(min(changes), turn.change, rtol=1e-8)


def test_single_units_have_no_turn(certificates):
    c = certificates[0.3]
    assert np.isinf(c.turn.change)
    assert not bool(c.falls_along_turn)
    assert not bool(c.flat_along_turns)
    assert c.verdict == "strict"


@pytest.mark.slow
def test_a_block_that_falls_along_a_turn_is_not_certified():
    """Margins of seven σ: stationary and flat to rounding where the closed form is, and lower after a large turn."""
    data, closed = opposite_clusters(0.15, mean=2.0)
    c = certify(closed, data, 0.15, 1e-3)
    assert float(c.distance_sq) < 1e-20
    assert abs(float(c.min_rotation_curvature)) < 1e-10
    assert float(c.turn.change) < -1e-4
    assert bool(c.falls_along_turn)
    assert not bool(c.strict)


@pytest.mark.slow
def test_a_strict_minimum_can_be_far_from_the_closed_form():
    """Margins of two σ: the refinement leaves the block's turns behind, so the distance is not exponentially small."""
    data, closed = opposite_clusters(0.25)
    c = certify(closed, data, 0.25, 1e-3)
    assert c.verdict == "strict"
    assert float(c.min_rotation_curvature) > 1e-3
    assert float(c.turn.change) > 0
    assert float(c.distance_sq) > 1


@pytest.mark.slow
def test_a_duplicate_beside_a_generalizing_block_is_a_minimum_up_to_turns():
    """Corollary 3.4: five copies of one sample have a unit of their own, with the duplicate's q; a cluster three."""
    spread = jnp.diag(jnp.array([0.1, 0.4, 0.3, 0.2]))
    mean = jnp.array([4.0, 0.0, 0.0, 0.0])
    data = jnp.concatenate([mean[None] + spread, mean[None] - spread, jnp.broadcast_to(-0.75 * mean, (5, 4))])
    closed = block_minimizer(data, np.repeat([0, 1], [8, 5]), 0.15, 1e-3, (3, 1))
    c = certify(closed, data, 0.15, 1e-3)
    # Flat to rounding nearby, but 8e-10 lower after a turn of 30 degrees.
    assert abs(float(c.min_rotation_curvature)) < 1e-12
    assert float(c.turn.change) < -1e-10
    assert abs(float(c.turn.degrees)) >= 30
    assert c.verdict == "falls along a turn"
    assert float(c.min_curvature_modulo_symmetry) > 1e-3
    assert float(c.distance_sq) < 1e-20
    q = (9.0 - 13 / 5 * 1e-3) / (9.0 + 0.15**2)
    np.testing.assert_allclose(jnp.sum(jnp.square(c.refined.w1[:, 3])), q, rtol=1e-10)


@pytest.mark.slow
def test_zero_columns_on_the_simplex_are_a_saddle_for_both():
    """Conditions and certificate agree, on a simplex without and with a dimension to spare."""
    for data, sigma, penalty in (
        (2 / np.sqrt(3) * SIMPLEX, 0.3, 1e-3),
        (jnp.pad(SIMPLEX, ((0, 0), (0, 1))), 0.1, 1e-9),
    ):
        closed = memorizing_minimizer(data, sigma, penalty, 5)
        dead = dead_direction(closed, data, sigma, penalty)
        checked = check_conditions(data, np.arange(4), sigma, penalty, 1, width=5).checks.zero_columns
        assert not bool(checked.holds)
        assert float(dead.slack) < 0
        np.testing.assert_allclose(dead.slack, checked.slack, rtol=0.05)


@pytest.mark.slow
def test_zero_columns_off_the_simplex_are_a_saddle():
    """A direction orthogonal to data whose weighted mean is not zero: the printed minimizer with zeros is unstable."""
    data = jnp.pad(SIMPLEX * jnp.array([1.0, 1.2, 0.9])[None, :], ((0, 0), (0, 1))).at[0].multiply(1.3)
    sigma, penalty, delta = 0.1, 1e-4, 1e-4
    certificate = certify(memorizing_minimizer(data, sigma, penalty, 5), data, sigma, penalty)
    assert float(certificate.dead.slack) < 0
    assert not bool(certificate.strict)
    grown = ReluDae(
        certificate.refined.w1.at[:, 4].set(delta * certificate.dead.encoder),
        certificate.refined.w2.at[:, 4].set(delta * certificate.dead.decoder),
    )
    change = exact_objective(grown, data, sigma, penalty) - exact_objective(certificate.refined, data, sigma, penalty)
    np.testing.assert_allclose(change, 2 * delta**2 * float(certificate.dead.slack), rtol=1e-2)


def test_the_residual_vanishes_as_the_margin_says():
    law = residual_law(SIMPLEX, jnp.array([0.2, 0.25, 0.3, 0.4]), 1e-3)
    assert law.r_squared > 0.999
    np.testing.assert_allclose(law.margin_sq, 0.75, rtol=1e-12)
    # -γ² up to polynomial factors, which steepen the slope here.
    assert -1.0 < law.slope < -0.75


def test_the_residuals_law_is_of_one_matrix():
    law = residual_law(SIMPLEX, jnp.array([0.3, 0.4]), 1e-3)
    for sigma, log_sq in zip((0.3, 0.4), law.log_residual_sq, strict=True):
        closed = memorizing_minimizer(SIMPLEX, sigma, 1e-3, 4)
        refined = certify(closed, SIMPLEX, sigma, 1e-3).refined
        np.testing.assert_allclose(np.exp(log_sq), np.sum(np.square(refined.w1 - closed.w1)), rtol=1e-6)


@pytest.mark.slow
def test_training_finds_a_strict_minimum_from_a_random_start(key):
    start = ReluDae(*(0.3 * jax.random.normal(jax.random.fold_in(key, i), (3, 6)) for i in (0, 1)))
    found = minimize_exact_objective(start, SIMPLEX, 0.3, 1e-2, max_rough=0)
    assert bool(found.converged)
    assert float(found.gradient_norm) < 1e-10
    assert float(found.objective) < float(exact_objective(start, SIMPLEX, 0.3, 1e-2))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "products"])
def test_both_methods_end_at_the_same_minimum_and_hold_dead_units(method):
    """From the closed form with zeros: to the golden distance, the zeros untouched."""
    closed = memorizing_minimizer(SIMPLEX, 0.3, 1e-3, 6)
    found = minimize_exact_objective(closed, SIMPLEX, 0.3, 1e-3, method=method, max_rough=0, tolerance=1e-12)
    assert bool(found.converged)
    assert not np.any(np.asarray(found.dae.w1[:, 4:]))
    distance = sum(jnp.sum(jnp.square(a - b)) for a, b in zip(found.dae, closed, strict=True))
    np.testing.assert_allclose(distance, GOLDEN[0.3][1], rtol=5e-4)


@pytest.mark.slow
def test_the_span_has_the_same_minimum(key):
    frame = jnp.linalg.qr(jax.random.normal(key, (7, 3)))[0]
    data = SIMPLEX @ frame.T
    basis = span_basis(data)
    assert basis.shape == (7, 3)
    closed = memorizing_minimizer(data, 0.3, 1e-3, 4)
    small, rows = to_span(closed, data, basis)
    np.testing.assert_allclose(
        exact_objective(small, rows, 0.3, 1e-3), exact_objective(closed, data, 0.3, 1e-3), rtol=1e-12
    )
    np.testing.assert_allclose(from_span(small, basis).w1, closed.w1, atol=1e-13)
    np.testing.assert_allclose(certify(closed, data, 0.3, 1e-3).distance_sq, GOLDEN[0.3][1], rtol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "products"])
def test_too_few_steps_are_an_outcome(method):
    closed = memorizing_minimizer(SIMPLEX, 0.5, 1e-3, 4)
    found = minimize_exact_objective(
        closed, SIMPLEX, 0.5, 1e-3, method=method, max_rough=0, max_newton=1, tolerance=1e-18
    )
    assert not bool(found.converged)
    assert np.isfinite(found.objective)


@pytest.mark.parametrize("method", ["dense", "products"])
def test_the_gradient_norm_told_is_that_of_the_weights(method):
    """Not that in the metric of the method, where it stops early."""
    start = ReluDae(*(w + 0.1 for w in memorizing_minimizer(SIMPLEX, 0.5, 1e-3, 6)))
    found = minimize_exact_objective(start, SIMPLEX, 0.5, 1e-3, method=method, max_rough=0, tolerance=1e-2)
    assert 1e-9 < float(found.gradient_norm) <= 1e-2
    gradient = jax.grad(exact_objective)(found.dae, SIMPLEX, 0.5, 1e-3)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradient)))
    np.testing.assert_allclose(found.gradient_norm, norm, rtol=1e-6)


def test_bad_input_is_refused(key):
    closed = memorizing_minimizer(SIMPLEX, 0.3, 1e-3, 4)
    with pytest.raises(ValueError, match="all columns"):
        certify(ReluDae(closed.w1 * 0, closed.w2 * 0), SIMPLEX, 0.3, 1e-3)
    with pytest.raises(ValueError, match="sigma"):
        certify(closed, SIMPLEX, -0.3, 1e-3)
    with pytest.raises(ValueError, match="sigma"):
        minimize_exact_objective(closed, SIMPLEX, -0.3, 1e-3)
    with pytest.raises(ValueError, match="sigma"):
        minimize_exact_objective(closed, SIMPLEX, 0.0, 1e-3, method="dense")
    with pytest.raises(ValueError, match="method is 'newton'"):
        minimize_exact_objective(closed, SIMPLEX, 0.3, 1e-3, method="newton")
    with pytest.raises(ValueError, match="at least two"):
        residual_law(SIMPLEX, jnp.array([0.3]), 1e-3)
    wide = jnp.pad(SIMPLEX, ((0, 0), (0, 2)))
    stray = ReluDae(*(jnp.pad(w, ((0, 2), (0, 0)), constant_values=0.1) for w in closed))
    with pytest.raises(ValueError, match="outside the span"):
        certify(stray, wide, 0.3, 1e-3)
