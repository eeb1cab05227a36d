"""Leakage through gates: closed forms against the exact risk, signs, the factors it selects, and certificates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from dae_theory import ReluDae, block_minimizer, certify, minimize_exact_objective
from dae_theory.conditions import all_hold, check_conditions
from dae_theory.energies import main_term
from dae_theory.factors import best_factors, margin_ratios, nearest_factors, turned_minimizer
from dae_theory.leakage import gate_leakage, objective_leakage
from dae_theory.minimizers import orthogonal_factor
from dae_theory.risk import exact_objective, exact_risk_at

PENALTY = 1e-3
THIRDS = (0.0, 2 * np.pi / 3, -2 * np.pi / 3)
CASES = {
    # Lengths and angles of the means, and whether the leakage holds the turns of each block.
    "three": ((3.0, 3.0, 3.0), THIRDS, [True, True, True]),
    "one": ((3.0,), (0.0,), [False]),
    "unequal opposite": ((2.0, 3.0), (0.0, np.pi), [False, True]),
    "three, one short": ((2.4, 6.0, 6.0), THIRDS, [False, True, True]),
}


def clusters(name, jitter=0.0):
    """Clusters of two samples, a mean in the plane and a spread of ±.5 across, with their labels."""
    lengths, angles, _ = CASES[name]
    means = [length * np.array([np.cos(angle), np.sin(angle)]) for length, angle in zip(lengths, angles, strict=True)]
    rows = np.array([np.append(mean, side) for mean in means for side in (0.5, -0.5)])
    rows = rows + jitter * np.random.default_rng(0).normal(size=rows.shape)
    return jnp.asarray(rows), np.repeat(np.arange(len(means)), 2)


def balanced(data, labels, sigma):
    return turned_minimizer(data, labels, sigma, PENALTY, 2, [orthogonal_factor(2)] * (labels.max() + 1))


def turned(dae, block, degrees):
    """The units of one block of two, mixed."""
    c, s = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    i, j = 2 * block, 2 * block + 1
    return ReluDae(*(w.at[:, i].set(c * w[:, i] + s * w[:, j]).at[:, j].set(c * w[:, j] - s * w[:, i]) for w in dae))


def leaked(dae, data, sigma):
    return float(exact_objective(dae, data, sigma, PENALTY) - main_term(dae, data, sigma, PENALTY).objective)


def pair_bound(dae, data, sigma):
    """Bound on what pairs of gates leak.

    In units of their deviations two gates at distances a, b and correlation r are both flipped beyond a corner at
    distance D, and there ``E[v_j]₊ [v_k]₊ <= s_j s_k exp(−D²/2)/2``.
    """
    w1, w2 = (np.asarray(w) for w in dae)
    norms, total = np.linalg.norm(w1, axis=0), 0.0
    for x in np.asarray(data):
        mean = x @ w1
        sign, distance = np.where(mean > 0, -1.0, 1.0), np.abs(mean) / (sigma * norms)
        for j in range(len(mean)):
            for k in range(j):
                r = sign[j] * sign[k] * (w1[:, j] @ w1[:, k]) / (norms[j] * norms[k])
                near, far = sorted((distance[j], distance[k]))
                beyond = far * far if r * far >= near else (near**2 + far**2 - 2 * r * near * far) / (1 - r * r)
                size = abs(w2[:, j] @ w2[:, k]) * sigma**2 * norms[j] * norms[k]
                total += 2 * size * np.exp(-beyond / 2) / 2
    return total / len(data)


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [("three", (0.4, 0.3, 0.2)), ("one", (0.6, 0.5, 0.4)), ("unequal opposite", (0.5, 0.4, 0.3))],
)
def test_leakage_is_the_objective_minus_its_main_term(name, sigmas):
    data, labels = clusters(name, jitter=0.05)
    shares = []
    for sigma in sigmas:
        dae = balanced(data, labels, sigma)
        leak = jax.vmap(functools.partial(gate_leakage, sigma=sigma), in_axes=(None, 0))(dae, data)
        total, leakage = leaked(dae, data, sigma), float(objective_leakage(dae, data, sigma))
        # Pairs, and the rounding of the objective.
        assert abs(total - leakage) <= pair_bound(dae, data, sigma) + 1e-15
        # Where gates of opposite blocks almost coincide, pairs are smaller by two powers of the noise only.
        share = abs(total - leakage) / float(jnp.sum(jnp.abs(leak.leakage)) / len(data))
        assert share < float(sigma / jnp.min(leak.distances)) ** 2
        shares.append(share)
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < (0.06 if name == "unequal opposite" else 1e-5)


def test_one_gate_leaks_exactly_this_at_any_noise(key):
    """On or off, tied or not, and noise as large as the sample."""
    w1, w2, x = jax.random.normal(key, (3, 4))
    leak = jax.jit(lambda dae, sigma: jnp.sum(gate_leakage(dae, x, sigma).leakage))
    for sign in (1.0, -1.0):
        for sigma in (0.1, 0.7, 3.0):
            dae = ReluDae(sign * w1[:, None], w2[:, None])
            expected = exact_risk_at(dae, x, sigma) - main_term(dae, x[None], sigma, 0.0).risk
            np.testing.assert_allclose(leak(dae, sigma), expected, rtol=1e-9, atol=1e-14)


def test_the_crossing_error_is_the_leading_term(key):
    """Up to a share of order 1/a², a quarter at twice the distance."""
    w1, w2, x = jax.random.normal(key, (3, 4))
    for sign in (1.0, -1.0):
        dae = ReluDae(sign * w1[:, None], w2[:, None])
        distance = float(gate_leakage(dae, x, 0.0).distances[0])
        off = []
        for a in (10.0, 20.0):
            leak = gate_leakage(dae, x, distance / a)
            density = np.exp(-a * a / 2) / np.sqrt(2 * np.pi)
            scale = 2 * distance / a * np.linalg.norm(w1) * density / a**2
            off.append(float(leak.leakage[0]) / (scale * float(leak.errors[0])) - 1)
        assert abs(off[1]) < 0.05
        np.testing.assert_allclose(off[0] / off[1], 4, rtol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_own_samples_attract_and_others_repel(name):
    data, labels = clusters(name, jitter=0.05)
    leak = jax.vmap(functools.partial(gate_leakage, sigma=0.1), in_axes=(None, 0))(balanced(data, labels, 0.1), data)
    is_own = labels[:, None] == np.repeat(np.arange(labels.max() + 1), 2)[None, :]
    np.testing.assert_array_equal(leak.is_on, is_own)
    np.testing.assert_array_equal(leak.errors < 0, is_own)


def outliers():
    """One cluster: eight samples at its mean and two outliers, under a penalty of three fifths of their moment."""
    return jnp.asarray([[1.0, 0.0]] * 8 + [[1.0, 0.98], [1.0, -0.98]]), np.zeros(10, int), 0.12


def test_under_a_large_penalty_own_samples_can_repel():
    data, labels, penalty = outliers()
    dae = turned_minimizer(data, labels, 0.05, penalty, 2, [orthogonal_factor(2)])
    errors = jax.vmap(lambda x: gate_leakage(dae, x, 0.05).errors)(data)
    # At each outlier one gate is near, and repelled; all others are attracted.
    np.testing.assert_array_equal(jnp.sum(errors > 0, axis=1), [0] * 8 + [1, 1])
    best = best_factors(data, labels, 0.05, penalty, 2)[0]
    assert best.holds_turns
    # Without the penalty, gates this near would be attracted.
    assert best_factors(data, labels, 0.0, 0.0, 2)[0].error < 0


@pytest.mark.parametrize("name", CASES)
def test_the_best_factor_of_two_units_by_hand(name):
    """Here it is the balanced one, whose smallest margins are those of the nearer of mean and other means."""
    lengths, angles, holds = CASES[name]
    data, labels = clusters(name)
    best = best_factors(data, labels, 0.2, PENALTY, 2)
    assert [b.holds_turns for b in best] == holds
    for k, b in enumerate(best):
        n = len(data)
        # Moments L² and .25 of the block.
        q = [(s - n / 2 * PENALTY) / (s + 0.04) for s in (lengths[k] ** 2, 0.25)]
        toward = [
            -np.cos(angles[k] - angle) * length
            for i, (length, angle) in enumerate(zip(lengths, angles, strict=True))
            if i != k
        ]
        margins = [
            (np.sqrt(q[0]) * reach - np.sqrt(q[1]) * 0.5) / np.sqrt(sum(q)) if np.isfinite(reach) else np.inf
            for reach in (lengths[k], min(toward, default=np.inf))
        ]
        np.testing.assert_allclose([b.own, b.other], margins, rtol=1e-7)
        np.testing.assert_allclose(np.abs(b.factor), np.sqrt(0.5), rtol=1e-6)


def test_the_best_factor_is_that_of_a_grid():
    data, labels = clusters("three", jitter=0.1)
    best = best_factors(data, labels, 0.2, PENALTY, 2)
    angles = np.deg2rad(np.arange(0, 90, 0.05))
    for k, b in enumerate(best):
        signs = jnp.where(jnp.asarray(labels == k), 1.0, -1.0)[:, None]

        def smallest(angle, k=k, signs=signs):
            factor = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [jnp.sin(angle), -jnp.cos(angle)]])
            factors = [factor if m == k else jnp.eye(2) for m in range(3)]
            w = turned_minimizer(data, labels, 0.2, PENALTY, 2, factors).w1[:, 2 * k : 2 * k + 2]
            return jnp.min(signs * (data @ w) / jnp.linalg.norm(w, axis=0)[None, :])

        found = float(jnp.max(jax.jit(jax.vmap(smallest))(jnp.asarray(angles))))
        # The grid misses the maximum by at most its step times the samples' length.
        assert found - 1e-9 <= b.margin <= found + np.deg2rad(0.05) * 4


def random_clusters(seed, lengths=(3.0, 3.0, 3.0), count=6):
    """Clusters about means in the plane, at equal angles, spread over two more dimensions."""
    rng = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(len(lengths)) / len(lengths)
    means = np.stack([np.cos(angles), np.sin(angles), 0 * angles, 0 * angles], axis=1) * np.array(lengths)[:, None]
    spread = rng.normal(size=(len(lengths), count, 4)) * [0.03, 0.03, 0.3, 0.2]
    return jnp.asarray((means[:, None] + spread).reshape(-1, 4)), np.repeat(np.arange(len(lengths)), count)


def test_no_turn_widens_the_best_factor_of_three_units():
    data, labels = random_clusters(0)
    best = best_factors(data, labels, 0.1, PENALTY, 3)
    factors = [b.factor for b in best]
    margins = check_conditions(data, labels, 0.1, PENALTY, 3).margins
    assert np.all([b.margin for b in best] > np.asarray(margins))
    signs = np.where(labels[:, None] == np.repeat(np.arange(3), 3)[None, :], 1.0, -1.0)
    rng = np.random.default_rng(1)
    smallest = []
    for _ in range(100):
        skews = rng.normal(size=(3, 3, 3)) * 10.0 ** rng.uniform(-3, 0)
        w = turned_minimizer(
            data, labels, 0.1, PENALTY, 3, [f @ linalg.expm(a - a.T) for f, a in zip(factors, skews, strict=True)]
        ).w1
        distances = np.asarray(data @ w) / np.linalg.norm(w, axis=0) * signs
        smallest.append(distances.min(axis=0).reshape(3, 3).min(axis=1))
    assert np.all(np.max(smallest, axis=0) <= np.array([b.margin for b in best]) + 1e-8)


def test_ratios_by_hand_and_against_directions():
    for name, expected in (
        ("one", [0.0]),
        # The long block: (3 c − s/2)/(2 c − s/2) at 2 c − s/2 = 1 and the largest s, 1/margin.
        ("unequal opposite", [2 / 3, 2.0]),
        ("three, one short", [0.8]),
    ):
        data, labels = clusters(name)
        ratios = margin_ratios(data, labels, 2, margin=0.5)
        np.testing.assert_allclose(ratios[: len(expected)], expected, rtol=1e-7)
        assert np.all(np.isinf(margin_ratios(data, labels, 1)))
    data, labels = random_clusters(2, lengths=(2.0, 3.5))
    frame = np.asarray(turned_minimizer(data, labels, 0.1, PENALTY, 2, [np.eye(2)] * 2).w1[:, :2])
    frame = frame / np.linalg.norm(frame, axis=0)
    w = frame @ np.stack([np.cos(turn := np.linspace(0, 2 * np.pi, 20000)), np.sin(turn)])
    own = np.min(np.asarray(data)[labels == 0] @ w, axis=0)
    other = np.min(-np.asarray(data)[labels == 1] @ w, axis=0)
    for margin in (0.2, 0.8):
        inside = np.minimum(own, other) >= margin
        ratio = margin_ratios(data, labels, 2, margin=margin)[0]
        assert 0.5 < np.max(own[inside] / other[inside]) <= ratio
    assert ratio < margin_ratios(data, labels, 2)[0]
    # Both on one side: no direction separates them.
    assert margin_ratios(jnp.abs(data), labels, 2)[0] <= 0


def test_turned_minimizers_and_back(key):
    data, labels = random_clusters(4)
    closed = block_minimizer(data, labels, 0.2, PENALTY, 3)
    same = turned_minimizer(data, labels, 0.2, PENALTY, 3, [orthogonal_factor(3)] * 3)
    np.testing.assert_allclose(same.w1, closed.w1, atol=1e-13)
    # Of three units: factors of two can be symmetric.
    factors = jnp.linalg.qr(jax.random.normal(key, (3, 3, 3)))[0]
    dae = turned_minimizer(data, labels, 0.2, PENALTY, 3, list(factors))
    np.testing.assert_allclose(dae.w2 @ dae.w1.T, closed.w2 @ closed.w1.T, atol=1e-13)
    # Row i of the factor is unit i.
    frame = turned_minimizer(data, labels, 0.2, PENALTY, 3, [np.eye(3)] * 3).w1[:, 3:6]
    np.testing.assert_allclose(dae.w1[:, 4], frame @ factors[1][1], atol=1e-13)
    found = nearest_factors(dae, data, labels, 0.2, PENALTY, 3)
    np.testing.assert_allclose(jnp.stack(found), factors, atol=1e-12)
    # Nearest: the factors it came from are farther from a network that was moved.
    moved = ReluDae(dae.w1 + 0.1, dae.w2 - 0.05)
    back = turned_minimizer(data, labels, 0.2, PENALTY, 3, nearest_factors(moved, data, labels, 0.2, PENALTY, 3))
    distance = [
        sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(moved, other, strict=True)) for other in (back, dae)
    ]
    assert distance[0] < distance[1]


@pytest.mark.parametrize(
    "name", [name if name == "one" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_sign_of_the_curvature_along_turns(name):
    """Of the exact objective at the balanced factor, as the leakage says: up where it holds, down where not."""
    data, labels = clusters(name)
    for block, holds in enumerate(CASES[name][2]):
        nearest = min(best_factors(data, labels, 0.2, PENALTY, 2)[block].margin, 2.0)
        # Five standard deviations to the nearest sample of this block: leakage well above rounding.
        sigma = nearest / 5
        dae = balanced(data, labels, sigma)

        def exact(angle, dae=dae, block=block, sigma=sigma):
            return exact_objective(turned(dae, block, angle), data, sigma, PENALTY)

        def leak(angle, dae=dae, block=block, sigma=sigma):
            return objective_leakage(turned(dae, block, angle), data, sigma)

        curved, predicted = (float(jax.jit(jax.grad(jax.grad(f)))(0.0)) for f in (exact, leak))
        assert (curved > 0) == holds
        if name != "three, one short":  # where gates of the long blocks are two standard deviations from the short one
            np.testing.assert_allclose(curved, predicted, rtol=0.05)


@pytest.mark.parametrize("name", ["one", "unequal opposite"])
def test_where_all_own_samples_are_nearest_it_falls_all_the_way_to_a_gate(name):
    """Every premise of Theorem 3.1 holds, and no factor is a minimum: the exact objective falls from the balanced
    factor until a gate is two standard deviations from a sample, either way."""
    data, labels = clusters(name)
    sigma = 0.3
    conditions = check_conditions(data, labels, sigma, PENALTY, 2)
    assert bool(all_hold(conditions))
    assert margin_ratios(data, labels, 2)[0] < 1
    dae = balanced(data, labels, sigma)
    values = jax.jit(jax.vmap(lambda angle: exact_objective(turned(dae, 0, angle), data, sigma, PENALTY)))
    margin = jax.vmap(lambda angle: jnp.min(data[:2] @ turned(dae, 0, angle).w1[:, :2]) / jnp.linalg.norm(dae.w1[:, 0]))
    for side in (1.0, -1.0):
        angles = side * jnp.arange(0.0, 40.0, 2.0)
        inside = np.asarray(margin(angles)) > 2 * sigma
        assert inside.sum() >= 5
        assert float(jnp.max(jnp.diff(values(angles)[inside]))) < 0


@pytest.mark.slow
@pytest.mark.parametrize("units", [2, 3])
def test_where_all_own_samples_are_nearest_the_objective_is_superharmonic(units):
    """At random factors of the short block: the Laplacian along its turns is negative, so that none is a minimum."""
    data, labels = random_clusters(3, lengths=(1.5, 3.0), count=4)
    best = best_factors(data, labels, 0.2, PENALTY, units)
    sigma = best[0].margin / 5
    assert margin_ratios(data, labels, units, margin=3 * sigma)[0] < 1
    above = np.triu_indices(units, 1)

    def exact(angles, w):
        skew = jnp.zeros((units, units)).at[above].set(angles)
        w = w.at[:, :units].set(w[:, :units] @ jax.scipy.linalg.expm(skew - skew.T))
        return exact_objective(ReluDae(w, w), data, sigma, PENALTY)

    laplacian = jax.jit(lambda w: jnp.trace(jax.hessian(exact)(jnp.zeros(len(above[0])), w)))
    rng, found = np.random.default_rng(0), []
    while len(found) < 20:
        skew = rng.normal(size=(units, units)) * rng.uniform(0, 0.5)
        w = turned_minimizer(
            data, labels, sigma, PENALTY, units, [best[0].factor @ linalg.expm(skew - skew.T), best[1].factor]
        ).w1
        distances = np.asarray(data @ w[:, :units]) / np.linalg.norm(w[:, :units], axis=0)
        if np.min(np.where(labels == 0, 1.0, -1.0)[:, None] * distances) > 3 * sigma:
            found.append(float(laplacian(w)))
    assert max(found) < 0


@pytest.mark.slow
@pytest.mark.optimized
def test_a_block_that_others_repel_is_certified_exponentially_near():
    """Three clusters, two units each: strict, at a distance that vanishes like exp(−γ²/σ²)."""
    data, labels = clusters("three")
    logs, sigmas = [], (0.2, 0.17, 0.15)
    for sigma in sigmas:
        best = best_factors(data, labels, sigma, PENALTY, 2)
        assert all(b.holds_turns for b in best)
        c = certify(balanced(data, labels, sigma), data, sigma, PENALTY)
        assert c.verdict == "strict"
        assert int(c.num_rotations) == 3
        near = turned_minimizer(
            data, labels, sigma, PENALTY, 2, nearest_factors(c.refined, data, labels, sigma, PENALTY, 2)
        )
        distance = sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(c.refined, near, strict=True))
        # By symmetry the balanced factor is the nearest.
        np.testing.assert_allclose(distance, c.distance_sq, rtol=1e-5)
        logs.append(np.log(distance))
    np.testing.assert_allclose(np.exp(logs), [1.107e-4, 7.848e-7, 4.487e-9], rtol=1e-3)
    slope = np.diff(logs) / np.diff(np.array(sigmas) ** -2.0)
    margin_sq = best_factors(data, labels, 0.15, PENALTY, 2)[0].margin ** 2
    np.testing.assert_allclose(slope[-1], -margin_sq, rtol=0.1)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_single_cluster_is_a_saddle_exponentially_near():
    """The refinement converges next to the closed form, and the objective falls along the block's turn."""
    data, labels = clusters("one")
    c = certify(balanced(data, labels, 0.35), data, 0.35, PENALTY)
    assert bool(c.converged)
    assert float(c.distance_sq) < 1e-10
    np.testing.assert_allclose(c.min_rotation_curvature, -3.78e-7, rtol=0.01)
    assert c.verdict == "falls along a turn"


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("name", "sigma"), [("one", 0.5), ("one", 0.4), ("unequal opposite", 0.25), ("three", 0.17)])
def test_where_minimization_ends(name, sigma):
    """From small turns of the balanced factor: with a gate within one deviation of a sample, at a distance of order σ
    from every closed form, where own samples attract; next to the closed form where others repel."""
    data, labels = clusters(name)
    for degrees in (0.5, -5.0):
        start = turned(balanced(data, labels, sigma), 0, degrees)
        end = minimize_exact_objective(start, data, sigma, PENALTY, method="dense", tolerance=1e-11, max_newton=200)
        assert float(end.gradient_norm) < 1e-10
        factors = nearest_factors(end.dae, data, labels, sigma, PENALTY, 2)
        near = turned_minimizer(data, labels, sigma, PENALTY, 2, factors)
        distance = sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(end.dae, near, strict=True))
        w = end.dae.w1[:, :2]
        signs = jnp.where(jnp.asarray(labels == 0), 1.0, -1.0)[:, None]
        margin = float(jnp.min(signs * (data @ w) / jnp.linalg.norm(w, axis=0)[None, :]))
        if name == "three":
            assert margin > 4 * sigma
            assert distance < 1e-6
        else:
            assert 0 < margin < sigma
            assert 0.5 < distance / sigma**2 < 2


def test_zero_units_and_no_noise_leak_nothing():
    data, labels = clusters("three")
    dae = balanced(data, labels, 0.2)
    padded = ReluDae(*(jnp.pad(w, ((0, 0), (0, 1))) for w in dae))
    leak = gate_leakage(padded, data[0], 0.2)
    assert np.isinf(leak.distances[-1])
    assert float(leak.leakage[-1]) == float(leak.errors[-1]) == 0
    np.testing.assert_allclose(leak.leakage[:-1], gate_leakage(dae, data[0], 0.2).leakage, rtol=1e-12)
    assert not np.any(np.asarray(gate_leakage(dae, data[0], 0.0).leakage))
    gradient = jax.grad(lambda dae: objective_leakage(dae, data, 0.2))(padded)
    assert all(np.all(np.isfinite(g)) for g in gradient)


def test_bad_input_is_refused():
    data, labels = clusters("three")
    dae, factors = balanced(data, labels, 0.2), [np.eye(2)] * 3
    with pytest.raises(ValueError, match="sigma"):
        gate_leakage(dae, data[0], -0.2)
    with pytest.raises(ValueError, match="x has 2 entries"):
        gate_leakage(dae, data[0, :2], 0.2)
    with pytest.raises(ValueError, match="data is empty"):
        objective_leakage(dae, data[:0], 0.2)
    with pytest.raises(ValueError, match="one per cluster: got 2 for 3"):
        turned_minimizer(data, labels, 0.2, PENALTY, 2, factors[:2])
    with pytest.raises(ValueError, match=r"factors\[1\] must have shape \(2, 2\)"):
        turned_minimizer(data, labels, 0.2, PENALTY, 2, [np.eye(2), np.eye(3), np.eye(2)])
    with pytest.raises(ValueError, match="penalty"):
        turned_minimizer(data, labels, 0.2, -1.0, 2, factors)
    with pytest.raises(ValueError, match=r"w1 must have shape \(3, 3\)"):
        nearest_factors(dae, data, labels, 0.2, PENALTY, 1)
    with pytest.raises(ValueError, match="num_starts"):
        best_factors(data, labels, 0.2, PENALTY, 2, num_starts=0)
    with pytest.raises(ValueError, match="margin"):
        margin_ratios(data, labels, 2, margin=-0.1)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda data: best_factors(data, labels, 0.2, PENALTY, 2))(data)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda data: margin_ratios(data, labels, 2))(data)
