"""Sweeps: cells equal single runs, groups do not matter, runs resume, custom measures join in, bad input is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import sims
from sims import store
from sims.data import readers
from sims.sweeps import engine, programs
from sims.sweeps.measures import MEASURES
from sims.sweeps.programs import Numbers, fit_cell, segments_of, unit_program
from sims.sweeps.spec import Spec
from sims.sweeps.worlds import make_world

pytestmark = pytest.mark.tiny

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
    assert set(results) == {*NAMES, "diverged"}
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
    unit = next(u for u in engine.all_units(SPEC) if (u.num_samples, u.seed) == (where["num_samples"], where["seed"]))
    program, key, data = unit_program(SPEC, unit, world)
    numbers = Numbers(*(jnp.float32(x) for x in (where["penalty"], 3e-3, 0.1, where["sigma"])))
    measures = {"train_error": MEASURES["train_error"]}
    _, alone = fit_cell(key, data, numbers, program, jnp.asarray(segments_of(SPEC)), measures)
    together = results.train_error.sel(where).squeeze()
    # Float32 sums in another order, over six steps.
    np.testing.assert_allclose(together, alone["train_error"], rtol=2e-5)


def test_arrays_are_data_sets_known_by_their_values(results, tmp_path):
    digits = readers.read("digits")
    # The same rows, classes and scale are the same data set, under another name.
    found = sims.sweep(SPEC, NAMES, data=digits, out=tmp_path / "a")
    for name in NAMES:
        np.testing.assert_array_equal(found[name], results[name])
    assert found.dataset.item().startswith("array:")
    seen = []
    sims.sweep(SPEC, NAMES, data=digits._replace(rows=digits.rows.copy()), out=tmp_path / "a", on_unit=seen.append)
    assert [progress.done for progress in seen] == [SPEC.num_cells]
    for other in (digits.rows, digits._replace(rows=digits.rows[::-1]), digits._replace(span=(0.0, 17.0))):
        with pytest.raises(ValueError, match="dataset is"):
            sims.sweep(SPEC, NAMES, data=other, out=tmp_path / "a")
    with pytest.raises(ValueError, match="omit dataset and executor"):
        sims.sweep(dataclasses.replace(SPEC, dataset="mixture:modes=2"), NAMES, data=digits)
    for bad, message in (
        (np.zeros(3), "shape"),
        (np.full((3, 2), np.nan), "non-finite"),
        (np.zeros((2, 2), bool), "bool"),
    ):
        with pytest.raises(ValueError, match=message):
            sims.sweep(SPEC, NAMES, data=bad)


@pytest.mark.slow
def test_grouping_by_memory_changes_nothing_but_rounding(results, monkeypatch):
    groups = []
    compile_job = programs.compile_job

    def spy(*args):
        found = compile_job(*args)
        groups.append(found)
        return found

    monkeypatch.setattr(programs, "compile_job", spy)
    sims.sweep(SPEC, NAMES)
    budget = max(found.memory for found in groups) - 1
    assert [found.group for found in groups] == [4, 4]
    groups.clear()
    small = sims.sweep(SPEC, NAMES, memory=budget)
    assert min(found.group for found in groups) < 4
    assert all(found.memory <= budget for found in groups)
    np.testing.assert_allclose(small.train_error, results.train_error, rtol=2e-5)


@pytest.fixture
def compilations():
    """Of whatever JAX compiles, or reads from its cache on disk, while a test runs: a growing list."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_sweep_of_equal_shapes_compiles_nothing(compilations):
    spec = dataclasses.replace(SPEC, dataset="mixture:modes=2,dim=3")

    def norm(params, data, spec):
        return jnp.linalg.norm(params.w1)

    first, many = sims.sweep(spec, [norm, "gap"]), len(compilations)
    assert many >= 2
    other = dataclasses.replace(spec, sigma=(0.4, 0.5), penalty=(0.0, 1e-3), seed=1, record_steps=(1, 6))
    found = sims.sweep(other, [norm, "gap"])
    assert np.all(found.gap.values != first.gap.values)
    xr.testing.assert_identical(sims.sweep(spec, [norm, "gap"]), first)
    assert len(compilations) == many

    # Another function of that name is another measure.
    def twice(params, data, spec):
        return 2 * jnp.linalg.norm(params.w1)

    twice.__name__ = "norm"
    np.testing.assert_array_equal(sims.sweep(spec, [twice, "gap"]).norm, 2 * first.norm)
    assert len(compilations) > many


def test_what_code_depends_on_is_in_its_key():
    measures, place = {"gap": MEASURES["gap"]}, programs.placement()
    worlds = engine.worlds_of(SPEC)

    def key(spec, place=place, measures=measures, unit=0):
        return programs.compile_key(spec, programs.job_of(spec, engine.all_units(spec)[unit], worlds), measures, place)

    assert key(SPEC) == key(SPEC, unit=1) == key(dataclasses.replace(SPEC, sigma=(1.0, 2.0), record_steps=(1, 6)))
    others = [
        key(SPEC, unit=2),
        key(dataclasses.replace(SPEC, sigma=0.5)),
        key(dataclasses.replace(SPEC, record_steps=6)),
        key(dataclasses.replace(SPEC, optimizer="sgd")),
        key(dataclasses.replace(SPEC, eval_draws=3)),
        key(SPEC, place._replace(memory=1)),
        key(SPEC, place._replace(group=2)),
        key(SPEC, measures={"gap": MEASURES["train_error"]}),
        key(SPEC, measures={"renamed": MEASURES["gap"]}),
    ]
    with jax.default_matmul_precision("bfloat16"):
        others.append(key(SPEC))
    assert len({key(SPEC), *others}) == 1 + len(others)


def test_segments_are_the_steps_between_records():
    assert segments_of(SPEC).tolist() == [2, 4]
    assert segments_of(Spec(steps=9, record_steps=(0, 4, 9))).tolist() == [0, 4, 5]


def test_groups_of_three_of_four_cells_are_filled_up_and_cut(results):
    found = sims.sweep(SPEC, NAMES, group=3)
    np.testing.assert_allclose(found.train_error, results.train_error, rtol=2e-5)


def test_biases_are_an_axis():
    """Along it networks differ, with and without ties, and each is what a sweep of one value finds."""
    base = {"dataset": "mixture:modes=2,dim=3", "num_samples": 4, "seeds": 1, "steps": 3, "eval_samples": 4}
    base |= {"eval_draws": 1, "held_out": 40, "width": 3, "sigma": 0.4, "tied": (False, True)}
    whole = sims.sweep(Spec(**base, biases=(False, True)), ("train_error",)).train_error
    assert whole.dims[:2] == ("tied", "biases")
    assert len(np.unique(whole)) == 4
    alone = sims.sweep(Spec(**base, biases=True), ("train_error",))
    np.testing.assert_array_equal(alone.train_error, whole.sel(biases=True))
    assert alone.biases
    # Records of sweeps without biases are as they were before there were any.
    assert "biases" not in sims.sweep(Spec(**base), ("train_error",)).coords


@pytest.mark.slow
def test_every_axis_is_swept():
    """Cells of a grid over all axes equal those of sweeps of one axis at a time."""
    base = {"seeds": 1, "steps": 3, "eval_samples": 4, "eval_draws": 1, "held_out": 40, "width": 3, "sigma": 0.4}
    axes = {
        "separation": (1.0, 2.0), "duplicates": ("", "2x2"), "optimizer": ("adam", "sgd"), "batch_size": (0, 3),
        "tied": (False, True), "num_samples": (5, 7), "penalty": (1e-3, 0.1), "learning_rate": (1e-3, 1e-2),
        "init_scale": (0.1, 0.5),
    }  # fmt: skip
    whole = sims.sweep(Spec(dataset="mixture:modes=2,dim=3", **base, **axes), ("train_error",)).train_error
    at = {name: values[1] for name, values in axes.items()}
    for name, values in axes.items():
        line = Spec(dataset="mixture:modes=2,dim=3", **base, **at | {name: values})
        found = sims.sweep(line, ("train_error",)).train_error.squeeze()
        np.testing.assert_allclose(
            whole.sel({axis: value for axis, value in at.items() if axis != name}).squeeze(), found, rtol=2e-5
        )
        assert len(np.unique(found)) == 2


def test_axes_of_one_value_stay_as_labels(results, tmp_path):
    assert results.optimizer == "adam"
    assert not results.tied
    stored = sims.sweep(SPEC, NAMES, out=tmp_path / "run")
    assert stored.optimizer == "adam"
    with xr.open_zarr(tmp_path / "run" / "results.zarr") as plain:
        assert plain.optimizer == "adam"


def test_shards_partition_the_work(results):
    parts = [sims.sweep(SPEC, NAMES, shard=(i, 3)).train_error for i in (1, 2, 3)]
    finite = np.stack([np.isfinite(part) for part in parts])
    assert np.all(finite.sum(0) == 1)
    np.testing.assert_array_equal(np.where(finite, np.stack(parts), 0).sum(0), results.train_error)
    with pytest.raises(ValueError, match="shard 9/9: there are 4 units of work; use at most"):
        sims.sweep(SPEC, NAMES, shard=(9, 9))
    with pytest.raises(ValueError, match="shard 0/2 does not exist"):
        sims.sweep(SPEC, NAMES, shard=(0, 2))


def test_a_budget_too_small_for_one_cell_says_so():
    with pytest.raises(ValueError, match=r"one cell needs .* raise --memory"):
        sims.sweep(SPEC, ("train_error",), memory=10)


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
    spec = dataclasses.replace(SPEC, num_samples=3)
    found = sims.sweep(spec, [column_norms, named, "gap"])
    assert found.column_norms.dims == (*spec.shape, "column_norms_0")
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


def failing(params, data, spec):
    raise RuntimeError("no such thing")


def mislabeled(params, data, spec):
    return params.w1[0]


mislabeled.labels = {"which": ["a", "b"]}


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (["loss"], "unknown measure 'loss'; known are objective"),
        (["gap", "gap"], "listed twice"),
        ([], "no measures"),
        ([lambda params, data, spec: 0.0], "needs a name"),
        ([failing], "measure 'failing' failed: no such thing"),
        ([mislabeled], r"returns shape \(4,\), but its labels have lengths \(2,\)"),
    ],
)
def test_bad_measures_are_refused(measures, message):
    with pytest.raises(ValueError, match=message):
        sims.sweep(SPEC, measures)


def test_a_unit_lowers_for_accelerators():
    program, key, data = unit_program(SPEC, engine.all_units(SPEC)[0], make_world(SPEC))
    measures, segments = {name: MEASURES[name] for name in NAMES}, segments_of(SPEC)
    numbers = jax.tree.map(lambda axis: axis[0], programs.grid_of(SPEC))
    function = jax.jit(lambda *args: fit_cell(*args, program, segments, measures)[1])
    assert function.trace(key, data, numbers).lower(lowering_platforms=("tpu", "cuda")).as_text()


def test_divergence_is_recorded_whatever_is_measured():
    """A learning rate that overflows, beside one that does not: counts of columns alone would not tell."""
    spec = dataclasses.replace(SPEC, num_samples=3, optimizer="sgd", learning_rate=(1e-3, 1e12), steps=20)
    found = sims.sweep(dataclasses.replace(spec, record_steps=()), ["num_live_columns"])
    assert found.diverged.dtype == bool
    assert found.diverged.sel(learning_rate=1e12).all()
    assert not found.diverged.sel(learning_rate=1e-3).any()
    assert np.isfinite(found.num_live_columns).all()


def test_a_measure_cannot_take_the_name_of_divergence():
    def diverged(params, data, spec):
        return jnp.float32(0)

    with pytest.raises(ValueError, match="'diverged' needs another name"):
        sims.sweep(SPEC, [diverged])


def test_a_run_begun_without_divergence_resumes_without(tmp_path, monkeypatch):
    """As earlier versions began it; what it measures is as in a run of its own."""
    whole = sims.sweep(SPEC, NAMES, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "with_divergence", dict)
        patch.setattr(engine, "_begun_without_divergence", lambda out: False)
        sims.sweep(SPEC, NAMES, out=tmp_path / "old", shard=(1, 2))
    found = sims.sweep(SPEC, NAMES, out=tmp_path / "old")
    assert "diverged" in whole
    assert "diverged" not in found
    for name in NAMES:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
