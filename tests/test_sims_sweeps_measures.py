"""Measures: each against its definition, on networks where the answer is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory import ReluDae, empirical_denoiser, memorizing_minimizer, mixture_denoiser
from dae_theory import mixture as mx
from dae_theory.affine_minimizers import affine_memorizing_minimizer
from sims.sweeps import measure_names, measures
from sims.sweeps.measures import MEASURES, CellData, CellSpec


@functools.partial(jax.jit, static_argnums=(0, 3))
def measured(measure, dae, data, spec):
    """A measure in one program; the number of rows, and all of ``spec``, are part of it."""
    return measure(dae, data, spec)


def simplex(size=3.0):
    """Four points of a regular simplex in R³, pairwise negative cosines."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    return jnp.asarray(size * corners)


@pytest.fixture
def cell(key):
    train = simplex()
    held_out = 2 * jax.random.normal(jax.random.fold_in(key, 1), (20, 3))
    data = CellData(train, held_out, mx.fit(train, np.zeros(4, int), ridge=0.1), jax.random.fold_in(key, 2))
    return data, CellSpec(0.3, 1e-3, 100, 50, (0, 1, 2, 3))


def identity_network(dim=3, scale=1.0):
    """f(y) = scale · y, from units that come in pairs of opposite sign."""
    w = jnp.concatenate([jnp.eye(dim), -jnp.eye(dim)], axis=1)
    return ReluDae(w, scale * w)


def test_errors_of_the_identity_network_are_the_noise(cell):
    data, spec = cell
    count = spec.eval_samples * spec.eval_draws
    for name in ("train_error", "held_out_error"):
        # ‖σε‖² has mean σ²d and standard deviation σ²√(2d).
        error = 0.09 * np.sqrt(2 * 3 / count)
        assert abs(float(measured(MEASURES[name], identity_network(), data, spec)) - 0.27) < 5 * error


def test_gap_is_zero_for_the_identity_and_one_for_a_perfect_memory(cell):
    data, spec = cell
    # Pairs share their noise by index.
    assert abs(float(measured(measures.gap, identity_network(), data, spec))) < 1e-12
    memory = memorizing_minimizer(data.train, 0.3, 1e-3, 4)
    assert float(measured(measures.gap, memory, data, spec)) > 0.95


def test_objective_is_error_plus_penalty(cell):
    data, spec = cell
    dae = identity_network(scale=0.5)
    difference = measured(measures.objective, dae, data, spec) - measured(measures.train_error, dae, data, spec)
    np.testing.assert_allclose(difference, 1e-3 * (6 + 6 * 0.25), rtol=1e-10)


@pytest.mark.parametrize("rows", ["train", "held_out"])
def test_distances_vanish_only_for_the_denoiser_itself(cell, rows):
    data, spec = cell
    _, noisy = measures.noisy_pairs(getattr(data, rows), data, spec)
    zero = ReluDae(jnp.zeros((3, 2)), jnp.zeros((3, 2)))
    for name, denoiser in (
        ("empirical", functools.partial(empirical_denoiser, data=data.train)),
        ("population", functools.partial(mixture_denoiser, mixture=data.population)),
    ):
        # f = 0 is at the denoiser's own mean square.
        target = jax.vmap(lambda y, denoiser=denoiser: denoiser(y, 0.3))(noisy)
        found = measured(MEASURES[f"distance_to_{name}_{rows}"], zero, data, spec)
        np.testing.assert_allclose(found, np.mean(np.sum(np.square(target), -1)), rtol=1e-12)


def test_the_closed_form_is_at_distance_zero_from_itself_and_its_symmetries(cell):
    data, spec = cell
    closed = memorizing_minimizer(data.train, 0.3, 1e-3, 5)
    halves = ReluDae(*(jnp.concatenate([w, w], axis=1) / jnp.sqrt(2.0) for w in closed))
    for dae in (closed, halves):
        assert float(measured(measures.distance_to_closed_form, dae, data, spec)) < 1e-25
    assert float(measured(measures.distance_to_closed_form, identity_network(), data, spec)) > 1e-3


def test_the_distance_to_the_closed_form_is_relative(cell):
    """A network that does nothing is at distance 1."""
    data, spec = cell
    zero = ReluDae(jnp.zeros((3, 4)), jnp.zeros((3, 4)))
    assert float(measured(MEASURES["distance_to_closed_form"], zero, data, spec)) == pytest.approx(1.0, rel=1e-12)


def test_duplicates_have_their_own_closed_form(cell):
    """Corollary 3.4: a row repeated m times shrinks as if λ were λ/m."""
    data, spec = cell
    repeated = data._replace(train=jnp.concatenate([data.train[:1]] * 3 + [data.train[1:]]))
    spec = spec._replace(identity=(0, 0, 0, 1, 2, 3), penalty=0.5)
    n, m, norm = 6, np.array([3, 1, 1, 1]), 9.0
    q = (norm - n / m * 0.5) / (norm + 0.09)
    w = data.train.T * jnp.sqrt(q / norm)[None, :]
    assert float(measured(measures.distance_to_closed_form, ReluDae(w, w), repeated, spec)) < 1e-25


def test_no_closed_form_for_more_rows_than_units(cell):
    data, spec = cell
    narrow = ReluDae(jnp.ones((3, 2)), jnp.ones((3, 2)))
    assert np.isnan(measured(measures.distance_to_closed_form, narrow, data, spec))
    assert np.all(np.isnan(measured(measures.conditions_hold, narrow, data, spec)))


def test_conditions_hold_on_the_simplex_and_not_on_one_side(cell):
    data, spec = cell
    square = ReluDae(jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert np.all(measured(measures.conditions_hold, square, data, spec) == 1)
    names = list(measures.conditions_hold.labels["condition"])
    one_side = data._replace(train=jnp.abs(data.train) + 0.1)
    values = measured(measures.conditions_hold, identity_network(), one_side, spec)
    held = dict(zip(names, np.asarray(values), strict=True))
    assert held["negative_cosines"] == 0
    assert held["other_gates"] == 0
    assert held["own_gates"] == 1


def test_zero_columns_are_units_beyond_one_per_row(cell):
    """On the simplex at σ 0.3 a fifth unit grows, so the closed form with zeros is no minimizer; four units are."""
    data, spec = cell
    for width, holds in ((4, 1), (5, 0)):
        dae = memorizing_minimizer(data.train, 0.3, 1e-3, width)
        values = dict(zip(measures.Checks._fields, measured(measures.conditions_hold, dae, data, spec), strict=True))
        assert values.pop("zero_columns") == holds
        assert all(value == 1 for value in values.values())


def test_columns_are_counted_after_merging(cell):
    data, spec = cell
    closed = memorizing_minimizer(data.train, 0.3, 1e-3, 6)
    halves = ReluDae(*(jnp.concatenate([w, w], axis=1) / jnp.sqrt(2.0) for w in closed))
    assert float(measured(measures.num_live_columns, halves, data, spec)) == 4
    assert float(measured(measures.num_aligned_columns, halves, data, spec)) == 4
    # The axes have cosine 1/√3 with the simplex.
    assert float(measured(measures.num_live_columns, identity_network(), data, spec)) == 6
    assert float(measured(measures.num_aligned_columns, identity_network(), data, spec)) == 0


def test_memorized_codes_are_one_hot(cell):
    data, spec = cell
    memory = memorizing_minimizer(data.train, 0.3, 1e-3, 4)
    small = spec._replace(sigma=1e-3)
    assert float(measured(MEASURES["l4_over_l2_train"], memory, data, small)) == pytest.approx(1.0, abs=1e-6)
    assert float(measured(MEASURES["participation_ratio_train"], memory, data, small)) == pytest.approx(1.0, abs=1e-5)


def test_evaluation_noise_is_common_to_all_noise_levels_and_widths(cell):
    data, spec = cell
    clean, noisy = measures.noisy_pairs(data.train, data, spec)
    _, noisier = measures.noisy_pairs(data.train, data, spec._replace(sigma=0.6))
    np.testing.assert_allclose(noisier - clean, 2 * (noisy - clean), atol=1e-14)
    assert clean.shape == (5000, 3)
    few, _ = measures.noisy_pairs(data.train, data, spec._replace(eval_samples=2))
    assert few.shape == (100, 3)


def test_every_measure_is_documented_and_finite(cell):
    data, spec = cell
    dae = memorizing_minimizer(data.train, 0.3, 1e-3, 5)
    assert all(measure.__doc__ for measure in MEASURES.values())
    values = jax.jit(lambda dae, data: [measure(dae, data, spec) for measure in MEASURES.values()])(dae, data)
    assert all(bool(jnp.all(jnp.isfinite(value))) for value in values)


def test_with_biases_measures_compare_with_what_biases_allow(cell):
    """Four rows whose cosines are positive: the closed form with biases is at distance 0 from itself, its columns are
    those of the rows as seen from b2, and the theorem says nothing."""
    data, spec = cell
    data = data._replace(train=data.train + 4.0)
    dae = affine_memorizing_minimizer(data.train, 0.3, 1e-3, width=5)
    values = jax.jit(lambda dae, data: {name: measure(dae, data, spec) for name, measure in MEASURES.items()})(
        dae, data
    )
    assert float(values["distance_to_closed_form"]) < 1e-20
    assert int(values["num_aligned_columns"]) == int(values["num_live_columns"]) == 4
    assert np.isnan(values["conditions_hold"]).all()
    assert float(values["gap"]) > 0.5
    moved = measured(MEASURES["distance_to_closed_form"], dae._replace(b2=dae.b2 + 0.1), data, spec)
    assert 1e-5 < float(moved) < 1e-2
    repeated = spec._replace(identity=(0, 0, 1, 2))
    assert np.isnan(measured(MEASURES["distance_to_closed_form"], dae, data, repeated))


def test_the_names_for_command_lines_are_those_of_the_measures():
    assert tuple(MEASURES) == measure_names.NAMES
    assert measures.DEFAULT == measure_names.DEFAULT
    assert set(measures.DEFAULT) <= set(MEASURES)


@pytest.mark.slow
def test_every_measure_lowers_for_accelerators(cell):
    data, spec = cell
    dae = memorizing_minimizer(data.train, 0.3, 1e-3, 5)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (dae, data))

    def everything(dae, data):
        return [measure(dae, data, spec) for measure in MEASURES.values()]

    assert jax.jit(everything).trace(*shapes).lower(lowering_platforms=("tpu", "cuda")).as_text()


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_measure_of_few_rows_takes_as_many_noisy_pairs(num_rows, key):
    rows = jax.random.normal(key, (num_rows, 3))
    data = CellData(rows, rows, None, jax.random.key(1))
    clean, noisy = measures.noisy_pairs(rows, data, CellSpec(0.5, 0.0, 32, 4, tuple(range(num_rows))))
    used = min(num_rows, 32)
    assert 128 <= len(clean) < 128 + used
    np.testing.assert_array_equal(jnp.unique(clean, axis=0, size=used), jnp.unique(rows[:used], axis=0, size=used))
    assert clean.shape == noisy.shape
    # The noise of a pair is its own: no two are equal, and their mean square is sigma².
    noise = np.asarray(noisy - clean)
    assert len(np.unique(noise, axis=0)) == len(noise)
    assert abs(np.mean(noise**2) - 0.25) < 5 * 0.25 * np.sqrt(2 / noise.size)
