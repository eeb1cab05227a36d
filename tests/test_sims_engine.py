"""Sweeps: cells equal single runs, groups do not matter, runs resume, custom measures join in, bad input is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import sims
from sims import engine, store
from sims.engine import Numbers, fit_cell, recipe_of, segments_of
from sims.measures import MEASURES, CellSpec
from sims.spec import Spec
from sims.worlds import cell_data, make_world

SPEC = Spec(
    num_samples=(3, 6), width=4, sigma=(0.3, 0.6), penalty=(1e-3, 1e-2), seeds=2, steps=6, record_steps=(2, 6),
    eval_samples=5, eval_draws=2, held_out=20,
)  # fmt: skip
NAMES = ("train_error", "gap")


@pytest.fixture(scope="module")
def results():
    return sims.sweep(SPEC, NAMES)


def test_the_result_is_labeled_by_the_axes(results):
    assert dict(results.sizes) == SPEC.shape
    assert set(results) == set(NAMES)
    assert results.train_error.dims == tuple(SPEC.shape)
    assert np.all(np.isfinite(results.train_error))
    np.testing.assert_array_equal(results.sigma, [0.3, 0.6])
    np.testing.assert_array_equal(results.step, [2, 6])


@pytest.mark.parametrize(
    "where",
    [
        {"num_samples": 3, "seed": 1, "penalty": 1e-2, "sigma": 0.6},
        {"num_samples": 6, "seed": 0, "penalty": 1e-3, "sigma": 0.3},
    ],
)
def test_a_cell_equals_the_single_experiment(results, where):
    world = make_world(SPEC)
    key, data, identity = cell_data(world, SPEC, where["num_samples"], where["seed"])
    numbers = Numbers(*(jnp.float32(x) for x in (where["penalty"], 3e-3, 0.1, where["sigma"])))
    evaluation = CellSpec(0.0, 0.0, 5, 2, identity)
    _, (alone,) = fit_cell(
        key, data, numbers, recipe_of(SPEC, 4), jnp.asarray(segments_of(SPEC)), evaluation, (MEASURES["train_error"],)
    )
    together = results.train_error.sel(where).squeeze()
    # Float32 sums in another order, over six steps.
    np.testing.assert_allclose(together, alone, rtol=2e-5)


@pytest.mark.slow
def test_grouping_by_memory_changes_nothing_but_rounding(results):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        compiled = engine._compile

        def spy(function, numbers, key, data, *, memory):
            run = compiled(function, numbers, key, data, memory=memory)
            seen.append(numbers.sigma.shape)
            return run

        patch.setattr(engine, "_compile", spy)
        needed = []
        for memory in (2 << 30, 60_000):
            needed.append(sims.sweep(SPEC, NAMES, memory=memory))
    np.testing.assert_allclose(needed[1].train_error, results.train_error, rtol=2e-5)
    assert seen == [(4,)] * 4


def test_a_budget_too_small_for_one_cell_says_so():
    with pytest.raises(ValueError, match=r"one cell needs .* raise --memory"):
        sims.sweep(SPEC, NAMES, memory=10)


def test_disk_and_memory_agree_and_a_finished_run_is_read_back(results, tmp_path):
    seen = []
    first = sims.sweep(SPEC, NAMES, out=tmp_path / "run", on_unit=seen.append)
    for name in NAMES:
        np.testing.assert_array_equal(first[name], results[name])
    assert [p.done for p in seen] == [0, 4, 8, 12, 16]
    assert seen[-1].unit == {"num_samples": 6, "width": 4, "seed": 1}
    again = []
    sims.sweep(SPEC, NAMES, out=tmp_path / "run", on_unit=again.append)
    assert [p.done for p in again] == [16]
    with xr.open_zarr(tmp_path / "run" / "results.zarr") as plain:
        np.testing.assert_array_equal(plain.train_error, results.train_error)


def test_an_interrupted_run_resumes_to_the_same_numbers(results, tmp_path):
    def stop(progress):
        if progress.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sims.sweep(SPEC, NAMES, out=tmp_path / "run", on_unit=stop)
    half = store.load(tmp_path / "run")
    assert int(np.isfinite(half.train_error).sum()) == 8 * 2
    resumed = sims.sweep(SPEC, NAMES, out=tmp_path / "run")
    np.testing.assert_array_equal(resumed.train_error, results.train_error)


def test_another_experiment_in_the_folder_is_refused(tmp_path):
    sims.sweep(SPEC, NAMES, out=tmp_path / "run")
    other = Spec.from_dict(SPEC.to_dict() | {"steps": 7, "record_steps": [2, 7]})
    with pytest.raises(ValueError, match="steps"):
        sims.sweep(other, NAMES, out=tmp_path / "run")
    with pytest.raises(ValueError, match="measures"):
        sims.sweep(SPEC, ("gap",), out=tmp_path / "run")


def test_custom_measures_of_any_shape_are_swept():
    def column_norms(params, data, spec):
        """Norms of the encoder's columns."""
        return jnp.linalg.norm(params.w1, axis=0)

    def named(params, data, spec):
        return jnp.stack([spec.sigma, jnp.asarray(spec.penalty)])

    named.labels = {"what": ["sigma", "penalty"]}
    found = sims.sweep(SPEC, [column_norms, named, "gap"])
    assert found.column_norms.dims == (*SPEC.shape, "column_norms_0")
    assert found.column_norms.shape[-1] == 4
    np.testing.assert_allclose(found.named.sel(what="sigma", sigma=0.6).squeeze().values, 0.6, rtol=1e-6)


def test_common_random_numbers_sharpen_differences():
    """Paired differences over sigma vary less over seeds than the values themselves."""
    spec = Spec(num_samples=20, width=8, sigma=(0.5, 0.55), seeds=12, steps=30, eval_samples=20, eval_draws=2)
    found = sims.sweep(spec, ("train_error",)).train_error.squeeze()
    difference = found.isel(sigma=1) - found.isel(sigma=0)
    assert float(difference.std()) < 0.3 * float(found.isel(sigma=0).std())


def test_divergence_is_kept_as_such():
    spec = Spec(num_samples=4, width=4, sigma=0.3, optimizer="sgd", learning_rate=(1e-3, 1e3), seeds=1, steps=100)
    found = sims.sweep(spec, ("train_error",)).train_error.squeeze()
    assert np.isfinite(found.sel(learning_rate=1e-3))
    assert not np.isfinite(found.sel(learning_rate=1e3))


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (["loss"], "unknown measure 'loss'; known are objective"),
        (["gap", "gap"], "listed twice"),
        ([], "no measures"),
        ([lambda params, data, spec: 0.0], "needs a name"),
    ],
)
def test_bad_measures_are_refused(measures, message):
    with pytest.raises(ValueError, match=message):
        sims.sweep(SPEC, measures)


def test_a_unit_lowers_for_accelerators():
    function, *arguments = engine._cells(
        SPEC, make_world(SPEC), {n: MEASURES[n] for n in NAMES}, engine._units(SPEC)[0]
    )
    assert jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu", "cuda")).as_text()
