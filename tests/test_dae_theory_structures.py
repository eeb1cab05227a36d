"""The structure search: against a brute force of its own, with duplicates, outliers and scarce units, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import conditions, energies, minimizers, risk, structures

TRIANGLE = 2.0 * np.array([[1.0, 0, 0, 0], [-0.5, 0.75**0.5, 0, 0], [-0.5, -(0.75**0.5), 0, 0]])
SIMPLEX = 1.5 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
LABELS = np.array([0, 0, 0, 1, 1, 2, 2])


def reference(data, labels, sigma, penalty, width):
    """Energy with the best ranks, and the margin of the constructed units, for one partition; plain numpy."""
    n, directions, second = len(data), [], 0.0
    for k in np.unique(labels):
        x = data[labels == k]
        lam, u = np.linalg.eigh(x.T @ x)
        second += lam.sum() / n
        for s, axis in zip(lam[::-1] / len(x), u.T[::-1], strict=True):
            rho = len(x) / n
            q = max(s - penalty / rho, 0) / (s + sigma**2)
            directions.append((rho * q**2 * (s + sigma**2), k, q, axis))
    kept = sorted((entry for entry in directions if entry[0] > 1e-13), key=lambda entry: -entry[0])[:width]
    margin = np.inf
    for k in np.unique(labels):
        block = [(q, axis) for _, owner, q, axis in kept if owner == k]
        if block:
            mean, own = data[labels == k].mean(0), labels == k
            root = np.stack([np.sqrt(q) * np.sign(axis @ mean) * axis for q, axis in block], axis=1)
            w = root @ minimizers.orthogonal_factor(len(block)).T
            distance = data @ (w / np.linalg.norm(w, axis=0))
            margin = min(margin, np.min(np.where(own[:, None], distance, -distance)))
    return second - sum(entry[0] for entry in kept), margin


def every_partition(size):
    """Set partitions by the other recursion: the last element joins a block or stands alone."""
    if size == 0:
        yield []
        return
    for rest in every_partition(size - 1):
        for label in range(max(rest, default=-1) + 2):
            yield [*rest, label]


def test_partitions_are_counted_by_bell_numbers():
    for size, bell in enumerate([1, 2, 5, 15, 52, 203], start=1):
        found = [tuple(labels.tolist()) for labels in structures._partitions(size)]
        assert len(found) == len(set(found)) == bell
        assert set(found) == {tuple(labels) for labels in every_partition(size)}
        assert found[0] == (0,) * size


def tight(key, *, spread=0.15):
    return jnp.asarray(TRIANGLE[LABELS]) + spread * jax.random.normal(key, (7, 4))


@pytest.mark.parametrize(("sigma", "penalty", "width"), [(0.1, 1e-4, 5), (0.5, 1e-2, 4), (0.2, 1e-3, 2), (0.2, 0.3, 7)])
def test_search_finds_the_best_of_all_partitions(key, sigma, penalty, width):
    data = tight(key)
    best = structures.best_structure(data, LABELS, sigma, penalty, width)
    solved = [reference(np.asarray(data), np.array(labels), sigma, penalty, width) for labels in every_partition(7)]
    valid = [energy for energy, margin in solved if margin > 0]
    # Where five units are too many for every partition, the best that fails, and it says so.
    assert best.holds is bool(valid) is (width != 5)
    np.testing.assert_allclose(best.energy, min(valid or [energy for energy, _ in solved]), rtol=1e-10)
    assert best.search == "every partition of 7 samples and the named candidates"


def test_every_candidate_is_what_the_public_functions_say(key):
    """Labels and ranks go into the minimizer, its energy and its margins come out; so does the exact objective."""
    data, sigma, penalty = tight(key, spread=0.05), 0.2, 1e-3

    def solve(data, labels, ranks):
        energy = energies.block_energy(data, labels, sigma, penalty, ranks)
        dae = minimizers.block_minimizer(data, labels, sigma, penalty, ranks)
        exact = risk.exact_objective(dae, data, sigma, penalty)
        return energy, conditions.check_conditions(data, labels, sigma, penalty, ranks).margin, exact

    found = structures.compare_structures(data, LABELS, sigma, penalty, 5)
    assert any(one.holds for one in found)
    for one in found:
        energy, margin, exact = jax.jit(functools.partial(solve, labels=one.labels, ranks=one.ranks))(data)
        np.testing.assert_allclose([one.energy, one.risk], [energy.objective, energy.risk], rtol=1e-11)
        np.testing.assert_allclose(one.margin, margin, rtol=1e-8)
        assert one.holds == (one.margin > 0)
        if one.holds:
            np.testing.assert_allclose(one.energy, exact, rtol=1e-2)


def test_candidates_whose_margins_hold_come_first():
    # One draw in which the clusters' margins hold although single samples would have less energy.
    data = tight(jax.random.key(0))
    found = structures.compare_structures(data, LABELS, 0.2, 1e-3, 7, exhaustive_limit=0)
    assert [one.name for one in found] == ["given clusters", "single samples"]
    assert found[0].holds
    # Samples of one cluster fire each other's units: less energy on paper, none in fact.
    assert not found[1].holds
    assert found[1].energy < found[0].energy
    assert all(one.search == "the named candidates" for one in found)


def test_separable_samples_are_memorized():
    best = structures.best_structure(jnp.asarray(SIMPLEX), [0, 0, 1, 1], 0.2, 1e-3, 4)
    assert best.name == "single samples"
    assert best.ranks == (1, 1, 1, 1)
    np.testing.assert_allclose(
        best.energy, energies.memorizing_energy(jnp.asarray(SIMPLEX), 0.2, 1e-3).objective, rtol=1e-12
    )


def pairs_and_one(filed_under):
    """Two tight pairs and one sample, about the corners of a triangle; where the one is filed."""
    rows = TRIANGLE[[0, 0, 1, 1, 2]] + 0.1 * np.array(
        [[0, 0, 1, 0], [0, 0, -1, 0], [0, 0, 0, 1], [0, 0, 0, -1], [0] * 4]
    )
    return jnp.asarray(rows), [0, 0, 1, 1, filed_under]


@pytest.mark.parametrize(("copies", "unit"), [(1, 0), (2, 1)])
def test_duplication_causes_memorization(copies, unit):
    """Under decay a sample survives only if N > nλ/m: here N = 4 and nλ = 4.5 at one copy, nλ/m = 2.7 at two."""
    data, labels = pairs_and_one(2)
    best = structures.best_structure(data, labels, 0.1, 0.9, 8, multiplicity=[1, 1, 1, 1, copies], exhaustive_limit=0)
    assert best.ranks == (1, 1, unit)
    assert best.holds


def test_duplicates_leave_a_cluster_they_do_not_belong_to():
    data, labels = pairs_and_one(0)
    found = structures.compare_structures(data, labels, 0.1, 0.01, 3, multiplicity=[1, 1, 1, 1, 9], exhaustive_limit=0)
    assert [(one.name, one.holds) for one in found] == [
        ("duplicates apart", True),
        ("given clusters", False),
        ("single samples", False),
    ]
    assert found[0].ranks == (1, 1, 1)
    np.testing.assert_array_equal(found[0].labels, [0, 0, 1, 1, 2])


def test_multiplicity_and_repeated_rows_are_one_thing(key):
    data = tight(key)
    times = np.array([1, 5, 1, 1, 1, 3, 1])
    repeated = np.repeat(np.arange(7), times)
    counted = structures.compare_structures(data, LABELS, 0.2, 1e-2, 6, multiplicity=times, exhaustive_limit=0)
    written = structures.compare_structures(data[repeated], LABELS[repeated], 0.2, 1e-2, 6, exhaustive_limit=0)
    assert [one.name for one in counted] == [one.name for one in written]
    assert "duplicates apart" in [one.name for one in counted]
    for one, other in zip(counted, written, strict=True):
        np.testing.assert_allclose([one.energy, one.margin], [other.energy, other.margin], rtol=1e-10)
        assert one.ranks == other.ranks
        np.testing.assert_array_equal(one.labels[repeated], other.labels)


def test_greedy_splitting_frees_the_misplaced_one_by_one():
    """Two samples that belong to no cluster, both filed under the first; enough units for them."""
    rows = np.array([[3.0, 0, 0], [3.1, 0.1, 0], [-1, 3.0, -0.2], [-1, -1.2, 3.0], [-1, -1.3, -3.0]])
    labels = [0, 0, 0, 0, 1]
    found = {
        s.name: s for s in structures.compare_structures(jnp.asarray(rows), labels, 0.3, 1e-3, 4, exhaustive_limit=0)
    }
    split = found["samples split off"]
    assert split.holds
    np.testing.assert_array_equal(split.labels, [0, 0, 2, 3, 1])
    assert split.energy < found["given clusters"].energy
    np.testing.assert_allclose(split.energy, reference(rows, split.labels, 0.3, 1e-3, 4)[0], rtol=1e-10)
    # One step at a time is optimal here: the brute force agrees.
    assert structures.best_structure(jnp.asarray(rows), labels, 0.3, 1e-3, 4).energy == pytest.approx(split.energy)


def test_no_unit_pays_under_a_heavy_penalty(key):
    data = tight(key)
    best = structures.best_structure(data, LABELS, 0.1, 1e3, 5, exhaustive_limit=0)
    assert not any(best.ranks)
    assert best.holds
    assert np.isinf(best.margin)
    np.testing.assert_allclose(best.energy, np.mean(np.sum(np.square(data), axis=1)), rtol=1e-13)


def test_more_dimensions_than_samples_change_nothing(key):
    """The search works in the span of the rows."""
    data = tight(key)
    turn = np.linalg.qr(np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (11, 11))))[0][:, :4]
    ours = structures.compare_structures(data, LABELS, 0.2, 1e-3, 5, exhaustive_limit=0)
    lifted = structures.compare_structures(data @ jnp.asarray(turn).T, LABELS, 0.2, 1e-3, 5, exhaustive_limit=0)
    for one, other in zip(ours, lifted, strict=True):
        assert one.name == other.name
        assert one.ranks == other.ranks
        np.testing.assert_allclose([one.energy, one.margin], [other.energy, other.margin], rtol=1e-8)


DATA = jnp.asarray(SIMPLEX)
search = functools.partial(structures.best_structure, DATA, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search(-0.1, 0.0, 4), "sigma must not be negative"),
        (lambda: search(0.1, -1.0, 4), "penalty must not be negative"),
        (lambda: search(0.1, 0.0, 0), "width must be at least 1"),
        (lambda: search(0.1, 0.0, 2, multiplicity=[1, 1]), r"shape \(4,\)"),
        (lambda: search(0.1, 0.0, 2, exhaustive_limit=-1), "exhaustive_limit must be at least 0"),
        (lambda: structures.best_structure(DATA, [0, 0], 0.1, 0.0, 2), "-2 labels"),
        (lambda: structures.best_structure(DATA.at[1].set(DATA[0]), [0, 1, 1, 1], 0.1, 0.0, 2), "1 rows equal"),
        (lambda: structures.best_structure(DATA * jnp.nan, [0, 1, 1, 1], 0.1, 0.0, 2), "12 non-finite"),
        (lambda: jax.jit(lambda s: search(s, 0.0, 2).energy)(0.1), "outside jit"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
