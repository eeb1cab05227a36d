"""Rows of cells: nested, shared by all axes but n and the seed, centered on what is trained on."""

import jax
import numpy as np
import pytest

from sims.sweeps.spec import Spec
from sims.sweeps.worlds import cell_data, facts, make_world

SMALL = {"num_samples": (4, 9), "seeds": 2, "steps": 1, "dtype": "float64"}


def test_training_sets_are_nested_in_n_and_differ_between_seeds():
    spec = Spec(**SMALL)
    world = make_world(spec)
    few = cell_data(world, spec, 4, 0)[1]
    many = cell_data(world, spec, 9, 0)[1]
    other = cell_data(world, spec, 9, 1)[1]
    np.testing.assert_array_equal(few.train, many.train[:4])
    assert not np.array_equal(many.train, other.train)
    np.testing.assert_array_equal(many.held_out, other.held_out)


def test_held_out_rows_are_never_trained_on():
    spec = Spec(**SMALL)
    world = make_world(spec)
    pool, held_out = ({row.tobytes() for row in rows} for rows in (world.pool, world.held_out))
    # Digits has 1,797 rows, of which a fifth is held out; a few rows may be equal by value.
    assert len(world.pool) + len(world.held_out) == 1797
    assert len(pool & held_out) <= 1


def test_keys_differ_between_seeds_and_roles():
    spec = Spec(**SMALL)
    world = make_world(spec)
    keys = [
        key for seed in (0, 1) for key in (cell_data(world, spec, 4, seed)[0], cell_data(world, spec, 4, seed)[1].key)
    ]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4


def test_centering_is_by_the_rows_trained_on_and_moves_the_population():
    plain, centered = Spec(**SMALL), Spec(**SMALL, center=True)
    world = make_world(centered)
    before, after = cell_data(make_world(plain), plain, 4, 0)[1], cell_data(world, centered, 4, 0)[1]
    mean = before.train.mean(0)
    np.testing.assert_allclose(after.train, before.train - mean[None, :], atol=1e-14)
    np.testing.assert_allclose(after.held_out, before.held_out - mean[None, :], atol=1e-14)
    np.testing.assert_allclose(after.population.means, before.population.means - mean[None, :], atol=1e-14)
    np.testing.assert_array_equal(after.population.covariances, before.population.covariances)


def test_separable_rows_keep_negative_cosines():
    spec = Spec(separable=8, center=True, num_samples=8, seeds=1)
    world = make_world(spec)
    train = np.asarray(cell_data(world, spec, 8, 0)[1].train)
    units = train / np.linalg.norm(train, axis=1, keepdims=True)
    assert np.max((units @ units.T)[~np.eye(8, dtype=bool)]) < 0
    assert facts(world, spec)["beta_by_num_samples"][0] < 0


def test_duplicates_repeat_rows_and_say_which():
    spec = Spec(duplicates="2x3", singles=2, seeds=1, dtype="float64")
    _, data, identity = cell_data(make_world(spec), spec, spec.num_samples[0], 0)
    assert identity == (0, 0, 0, 1, 1, 1, 2, 3)
    distinct = np.unique(data.train, axis=0)
    assert len(distinct) == 4
    np.testing.assert_array_equal(data.train[0], data.train[2])


def test_duplication_keeps_the_distinct_rows_and_their_order():
    """Along an axis of duplicates the images are the same, as far as the training set has room for them."""
    spec = Spec(num_samples=8, duplicates=("", "2x3"), seeds=1, dtype="float64")
    world = make_world(spec)
    plain, repeated = (cell_data(world, spec, 8, 0, name)[1].train for name in ("", "2x3"))
    np.testing.assert_array_equal(repeated[np.array([0, 3, 6, 7])], plain[:4])


def test_separation_moves_the_modes_of_a_mixture():
    spec = Spec(dataset="mixture:modes=2,dim=3", separation=(1.0, 5.0), num_samples=4, seeds=1, held_out=50)
    for separation in spec.separation:
        means = make_world(spec, spec.dataset[0], separation).population.means
        np.testing.assert_allclose(np.linalg.norm(means, axis=1), separation, rtol=1e-6)


def test_a_synthetic_population_is_exact():
    spec = Spec(dataset="mixture:modes=2,dim=3,seed=1", num_samples=4, seeds=1, held_out=50)
    world = make_world(spec)
    assert world.population.means.shape == (2, 3)
    assert len(world.held_out) == 50


def test_too_few_rows_are_named():
    with pytest.raises(ValueError, match="5000 distinct training rows are asked for, but digits has 1438"):
        make_world(Spec(num_samples=5000))
    with pytest.raises(ValueError, match="nowhere"):
        make_world(Spec(dataset="nowhere.npz"))


def test_facts_are_json_and_record_beta():
    import json

    spec = Spec(**SMALL)
    found = facts(make_world(spec), spec)
    json.dumps(found, allow_nan=False)
    assert found["dim"] == 64
    assert len(found["beta_by_num_samples"]) == 2
    assert 0 < found["beta_by_num_samples"][0] <= found["beta_by_num_samples"][1] < 1
