"""Where starts of the reverse process end: predictions against closed forms, integration and simulation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dae_theory import AffineDae, denoise, exact_objective
from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import affine_memorizing_minimizer
from dae_theory.basins import fixed_gates_denoiser, flow_ends, no_unit_share, return_exponent, unit_flow
from dae_theory.flow_limits import limit_exponents, off_share, pair_shares, separating_score, share_interval
from dae_theory.sampling import geometric_schedule, probability_flow

PAIR = np.array([[3.0, 0.0], [-3.0, 0.0]])
TRIANGLE = np.array([[0.0, 0.0], [4.0, 0.0], [1.5, 3.0]])
"""Acute: the feet of all altitudes lie inside the opposite sides."""


def regular_simplex(n, radius=3.0):
    rows = np.eye(n) - 1 / n
    rows = rows @ np.linalg.svd(rows)[2][: n - 1].T
    return radius * rows / np.linalg.norm(rows, axis=1)[:, None]


def limit_family(data):
    """Gates at the hull of the others, and the offset of small noise; with the weights of the offset."""
    found = memorize(data, 1e-7, 0.0)
    weights = found.hulls**-2.0 / np.sum(found.hulls**-2.0)
    parts = (data, weights @ data, found.normals, found.hulls)
    return fixed_gates_denoiser(*(jnp.asarray(part) for part in parts)), jnp.asarray(weights @ data), weights, found


def barycentric(data, points):
    system = np.vstack([data.T, np.ones(len(data))])
    return np.linalg.solve(system, np.vstack([points.T, np.ones(len(points))])).T


@functools.partial(jax.jit, static_argnums=0)
def flow(denoiser, starts, sigmas):
    return jax.vmap(lambda y: probability_flow(denoiser, y, sigmas))(starts)


@pytest.mark.parametrize("gate", [6.0, 4.0, 3.0, 2.0, 1.5])
def test_the_limit_law_is_that_of_the_flow_of_one_unit(gate):
    """Exponents from .5 to -1, in two pieces from 1e4 to 1e-3; corrections are of order 1/σ₀² and σ."""
    x, normal, zero = jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0]), jnp.zeros(2)
    gamma = 3.0 / gate
    for score in (0.2, 1.0, 2.5):
        middle = unit_flow(jnp.array([1e4 * score, 0.0]), 1e4, 3.0, x, zero, normal, gate)
        end = unit_flow(middle, 3.0, 1e-3, x, zero, normal, gate)
        scale = gate * (1e-3 / gate) ** (1 - gamma)
        np.testing.assert_allclose((end[0] - 3.0) / scale, score - separating_score(gamma), atol=2e-6)


def test_separating_scores_at_both_ends_and_in_between():
    gamma = np.array([1e-9, 1.0, 2.0, 1e6])
    found = jax.jit(separating_score)(jnp.asarray(gamma))
    np.testing.assert_allclose(found[:3], [math.pi / 2 * 1e-9, 1.0, math.pi / 2], rtol=1e-6)
    # Stirling's formula, whose next term is a share of 1/(4γ).
    np.testing.assert_allclose(found[3], np.sqrt(np.pi * 1e6 / 2), rtol=1e-6)
    assert np.all(np.diff(separating_score(jnp.linspace(0.1, 9.0, 90))) > 0)


@pytest.mark.parametrize("data", [PAIR[:, :1], TRIANGLE, regular_simplex(4)])
def test_a_simplex_returns_every_sample_at_the_rate_of_its_weight(data):
    """Exponents are the weights of the offset, and nearly those of the best gates at small noise, which stay 5 σ from
    the hull, at distances of 2.7 and more."""
    _, _, weights, _ = limit_family(data)
    found = limit_exponents(data)
    np.testing.assert_allclose(found, weights, rtol=1e-9)
    best = memorize(data, 1e-4, 0.0)
    cosines = np.sum(best.normals * (data - best.offset), axis=1) / best.lengths
    others = [
        return_exponent(*(float(part) for part in parts))
        for parts in zip(best.lengths, best.gates, cosines, strict=True)
    ]
    np.testing.assert_allclose(others, found, atol=2e-4)


def test_samples_other_than_simplices_repel():
    """A circle in closed form; an obtuse triangle; and one inside the hull of the others, which has no unit."""
    turns = 2 * np.pi * np.arange(7) / 7
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    np.testing.assert_allclose(limit_exponents(circle), 1 - 1 / (1 - np.cos(turns[1])), rtol=1e-9)
    shifted = limit_exponents(5.0 - 3.0 * circle)
    np.testing.assert_allclose(shifted, limit_exponents(circle), rtol=1e-9)
    obtuse = np.array([[0.0, 0.0], [6.0, 0.0], [7.0, 1.0]])
    assert (limit_exponents(obtuse) < 0).sum() == 1
    # That one has no unit: without noise it alone holds the offset. It is what all others face, so they neither repel
    # nor attract, as without biases.
    data = np.concatenate([TRIANGLE, np.array([[1.2, 0.8]])])
    best = memorize(data, 1e-4, 0.0)
    np.testing.assert_allclose(best.offset, data[3], atol=1e-6)
    heights = np.sum(best.normals[:3] * (data[:3] - data[3]), axis=1)
    np.testing.assert_allclose(limit_exponents(data), [*(1 - heights / best.hulls[:3]), np.nan], atol=1e-12)
    np.testing.assert_allclose(heights, best.hulls[:3], rtol=1e-12)


@pytest.mark.parametrize("data", [TRIANGLE, regular_simplex(4)])
def test_the_family_of_a_simplex_is_the_identity_on_its_hull(data):
    """Up to ``σ²/(D² + σ²)`` of ``x_i - b₂`` times each barycentric coordinate, exactly."""
    denoiser, offset, _, found = limit_family(data)
    shares = np.random.default_rng(0).dirichlet(np.ones(len(data)), size=5)
    for sigma in (0.3, 1e-3):
        short = sigma**2 / (found.hulls**2 + sigma**2)
        expected = shares @ data - (shares * short) @ (data - np.asarray(offset))
        ends = [denoiser(jnp.asarray(y), sigma) for y in shares @ data]
        np.testing.assert_allclose(ends, expected, rtol=1e-7, atol=1e-9)


def test_flows_reach_the_faces_of_a_simplex_at_the_rate_of_their_weights():
    """Starts near a corner and beside two sides: what is left of negative coordinates falls like σ^w."""
    denoiser, _, weights, _ = limit_family(TRIANGLE)
    starts = np.array([[1.02, -0.01, -0.01], [0.5, 0.52, -0.02], [0.4, -0.02, 0.62]]) @ TRIANGLE
    outside = []
    for sigma in (1e-5, 1e-6):
        ends = flow(denoiser, jnp.asarray(starts), geometric_schedule(1e-3, sigma, 4000, to_zero=False))
        outside.append(-np.minimum(barycentric(TRIANGLE, np.asarray(ends)), 0).sum(axis=1))
    slopes = np.log(outside[0] / outside[1]) / math.log(10)
    expected = [weights[0], weights[0] + weights[1], weights[0] + weights[2]]
    np.testing.assert_allclose(slopes, expected, atol=1e-3)


def test_of_two_samples_those_starts_return_whose_score_exceeds_the_threshold():
    """The others end between the samples, wherever they are: with gates at the hull the flow stops there."""
    denoiser, _, _, _ = limit_family(PAIR)
    threshold = float(separating_score(0.5))
    scores = threshold + np.array([-0.5, -0.01, 0.01, 0.5])
    starts = jnp.asarray(1e4 * np.stack([scores, np.array([0.3, -2.0, 1.0, 0.1])], axis=1))
    ends = np.asarray(flow(denoiser, starts, geometric_schedule(1e4, 1e-8, 4000, to_zero=False)))
    np.testing.assert_array_equal(ends[:, 0] > 3.0, [False, False, True, True])
    assert ends[0, 0] < 2.9
    np.testing.assert_allclose(ends[2:, 0], 3.0, atol=1e-3)
    np.testing.assert_allclose(ends[:, 1], 0.0, atol=1e-4)


def test_shares_of_two_samples_lie_in_their_intervals():
    """2Φ(-t) of the starts at the samples, half of them at each, within the interval that fails once in 10,000."""
    denoiser, offset, _, _ = limit_family(PAIR)
    schedule = geometric_schedule(300.0, 1e-6, 600, to_zero=False)
    first = np.asarray(flow_ends(jax.random.key(3), denoiser, schedule, offset, num_starts=3000))[:, 0]
    expected = float(stats.norm.sf(separating_score(0.5)))
    for sign in (1, -1):
        low, high = share_interval(float(np.mean(sign * first > 3.0)), 3000, level=1 - 1e-4)
        assert low < expected < high


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "expected"), [(0.5, 0.4025), (0.1, 0.363)])
def test_with_the_best_gates_a_third_of_the_starts_or_more_never_leaves_the_middle(frozen, expected):
    """Gates move to the hull with σ, from where they are at the level ``frozen``; of gates that stay there, ever fewer
    starts end in the middle. The shares of 500 quantiles against those of 4,000 and another program."""
    levels = np.geomspace(1e-4, frozen, 60)
    gaps = np.array([6.0 - memorize(PAIR, level, 0.0).gates[0] for level in levels]) / levels
    data, normals, zero = jnp.asarray(PAIR), jnp.asarray(PAIR) / 3, jnp.zeros(2)

    def family(moves):
        def denoiser(y, sigma):
            level = jnp.minimum(sigma, frozen) if moves else jnp.asarray(frozen)
            gap = level * jnp.interp(jnp.log(level), jnp.log(jnp.asarray(levels)), jnp.asarray(gaps))
            return fixed_gates_denoiser(data, zero, normals, jnp.broadcast_to(6.0 - gap, 2))(y, sigma)

        return denoiser

    scores = stats.norm.ppf((np.arange(500) + 0.5) / 500)
    starts = jnp.asarray(300.0 * np.stack([scores, np.zeros(500)], axis=1))
    lows = (1e-4, 1e-8, 1e-12)
    moving, staying = (
        [np.mean(np.abs(flow(denoiser, starts, geometric_schedule(300.0, low, 4000, to_zero=False))[:, 0]) < 2.97)
         for low in lows]
        for denoiser in (family(True), family(False))
    )  # fmt: skip
    np.testing.assert_allclose(moving, expected, atol=0.005)
    assert staying[1] < 0.7 * staying[0]
    assert staying[2] < 0.7 * staying[1]


def test_two_units_that_make_a_step_have_a_lower_objective_and_return_the_rows():
    """From -3 to 3 between gates at -c and c, of the best c for σ = .1: both units with the row space of one."""
    c, root = 2.65, math.sqrt(3.0 / 2.65)
    w1, w2 = jnp.array([[root, root], [0.0, 0.0]]), jnp.array([[root, -root], [0.0, 0.0]])
    step = AffineDae(w1, jnp.array([root * c, -root * c]), w2, jnp.array([-3.0, 0.0]))
    data = jnp.asarray(PAIR)
    memorizing = affine_memorizing_minimizer(data, 0.1, 1e-5)
    assert exact_objective(memorizing, data, 0.1, 1e-5) == pytest.approx(2.779e-3, rel=1e-3)
    assert exact_objective(step, data, 0.1, 1e-5) == pytest.approx(4.56e-5, rel=1e-2)
    starts = jnp.array([[0.01, 1.0], [-1.0, -2.0], [40.0, 3.0], [-7.0, 0.0]])
    ends = flow(lambda y, sigma: denoise(step, y), starts, geometric_schedule(10.0, 1e-8, 2000, to_zero=False))
    # Beyond the gates the map is constant, and what is left is in proportion to σ; 1e-8 of 50.
    np.testing.assert_allclose(ends[1:], PAIR[[1, 0, 1]], atol=1e-6)
    # From the middle the way out takes σ to the power 1 - 3/c, which is small.
    assert 0.1 < ends[0, 0] < 3.0


def test_shares_with_all_units_off_are_orthants():
    """A pair in closed form, orthogonal and antipodal units, a simplex, and draws: four standard errors of 1e5."""
    for cosine in (-0.7, 0.2):
        pair = np.array([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
        assert off_share(pair) == pytest.approx(float(no_unit_share(cosine)), abs=1e-4)
    assert off_share(np.eye(3)) == pytest.approx(1 / 8, abs=1e-3)
    assert off_share(PAIR / 3, 1.0) == pytest.approx(stats.norm.cdf(1) - stats.norm.cdf(-1), rel=1e-9)
    assert off_share(regular_simplex(4, 1.0)) == 0
    rows = np.random.default_rng(0).normal(size=(5, 3))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    scores = np.array([0.5, 1.0, 0.3, 2.0, 0.8])
    drawn = np.mean(np.all(np.random.default_rng(1).normal(size=(100_000, 3)) @ rows.T < scores, axis=1))
    assert off_share(rows, scores) == pytest.approx(drawn, abs=4 * math.sqrt(drawn * (1 - drawn) / 1e5) + 1e-3)
    # What no normal spans does not matter.
    assert off_share(np.pad(rows, ((0, 0), (0, 2))), scores) == pytest.approx(off_share(rows, scores), abs=2e-3)


@pytest.mark.parametrize("gate", [1.5, 2.4])
def test_of_samples_on_orthogonal_axes_the_share_that_falls_back_is_exact(gate):
    """± 3 e_j, gates nearer than the offset: no two units that are on together see one another."""
    data = np.concatenate([3 * np.eye(2), -3 * np.eye(2)])
    denoiser = fixed_gates_denoiser(*(jnp.asarray(a) for a in (data, np.zeros(2), data / 3, np.full(4, gate))))
    schedule = geometric_schedule(300.0, 1e-8, 600, to_zero=False)
    ends = np.asarray(flow_ends(jax.random.key(5), denoiser, schedule, jnp.zeros(2), num_starts=3000))
    fallen = np.linalg.norm(ends, axis=1) < 1e-3
    threshold = float(separating_score(3.0 / gate))
    expected = off_share(data / 3, threshold)
    assert expected == pytest.approx((2 * stats.norm.cdf(threshold) - 1) ** 2, abs=1e-4)
    low, high = share_interval(float(fallen.mean()), 3000, level=1 - 1e-4)
    assert low < expected < high


@pytest.mark.parametrize(("norms", "cosine"), [((3.0, 1.0), -0.3), ((1.5, 3.0), -0.8)])
def test_shares_of_two_unequal_samples_are_those_of_all_directions(norms, cosine):
    """Without biases a direction decides: 4,000 of them around the circle, each of a share of 2.5e-4."""
    units = np.array([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    data = jnp.asarray(np.array(norms)[:, None] * units)
    denoiser = fixed_gates_denoiser(data, jnp.zeros(2), jnp.asarray(units), jnp.asarray(norms))
    turns = 2 * np.pi * (np.arange(4000) + 0.5) / 4000
    starts = jnp.asarray(10.0 * np.stack([np.cos(turns), np.sin(turns)], axis=1))
    scores = np.asarray(flow(denoiser, starts, geometric_schedule(10.0, 1e-5, 600, to_zero=False))) @ units.T
    expected = pair_shares(norms, cosine, 10.0)
    wins = [np.mean((scores[:, i] > 0) & (scores[:, i] > scores[:, 1 - i])) for i in range(2)]
    np.testing.assert_allclose([*wins, np.mean(np.all(scores <= 0, axis=1))], expected, atol=1e-3)
    assert (expected.first > expected.second) == (norms[0] > norms[1])


def test_shares_of_two_samples_at_their_limits():
    assert sum(pair_shares((3.0, 1.0), -0.3, 5.0)) == pytest.approx(1, abs=1e-12)
    first, second, neither = pair_shares((2.0, 2.0), -0.4, 7.0)
    assert first == pytest.approx(second, abs=1e-9)
    assert neither == pytest.approx(float(no_unit_share(-0.4)))
    # Only the noise in units of the norms matters, and little of it sees no difference between them.
    np.testing.assert_allclose(pair_shares((3.0, 1.0), -0.3, 5.0), pair_shares((6.0, 2.0), -0.3, 10.0), atol=1e-9)
    small = pair_shares((3.0, 1.0), -0.3, 1e-3)
    assert small.first == pytest.approx(small.second, abs=1e-5)


def test_intervals_of_shares_cover():
    """Of 200 batches of 50 starts: at least as often as 95 %, less what chance takes once in 10,000."""
    denoiser = fixed_gates_denoiser(*(jnp.asarray(a) for a in (PAIR, np.zeros(2), PAIR / 3, np.full(2, 1.5))))
    schedule = geometric_schedule(300.0, 1e-3, 200, to_zero=False)
    ends = np.asarray(flow_ends(jax.random.key(11), denoiser, schedule, jnp.zeros(2), num_starts=10_000))
    fallen = (np.linalg.norm(ends, axis=1) < 0.01).reshape(200, 50).mean(axis=1)
    threshold = float(separating_score(2.0))
    expected = 2 * stats.norm.cdf(threshold) - 1
    covered = sum(low <= expected <= high for low, high in (share_interval(float(share), 50) for share in fallen))
    assert covered >= stats.binom.ppf(1e-4, 200, 0.95)
    # And not by being wide: intervals of a level of one half cover less.
    covered = sum(low <= expected <= high for low, high in (share_interval(float(s), 50, 0.5) for s in fallen))
    assert covered <= stats.binom.ppf(1 - 1e-4, 200, 0.7)
    assert share_interval(0.0, 100)[0] == 0
    assert share_interval(0.0, 100)[1] == pytest.approx(1 - 0.025**0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: separating_score(0.0), "gamma must be positive"),
        (lambda: limit_exponents(np.ones((1, 2))), "two samples or more"),
        (lambda: off_share(np.eye(2), -1.0), "scores must not be negative"),
        (lambda: pair_shares((1.0, 1.0), 0.1, 1.0), "cosine must lie between -1 and 0"),
        (lambda: pair_shares((1.0, 0.0), -0.1, 1.0), "norms must be positive"),
        (lambda: pair_shares((1.0, 1.0), -0.1, 0.0), "sigma must be positive"),
        (lambda: share_interval(1.1, 10), "share must lie in"),
        (lambda: share_interval(0.5, 10, 1.0), "level must lie between"),
        (lambda: share_interval(0.5, 0), "num_starts"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
