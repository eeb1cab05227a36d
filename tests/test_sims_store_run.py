"""Runs on disk: kills, resumes, second writers, damage, full disks. What is finished stays; messages say what to do."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import xarray as xr

from sims import store
from sims.store import chunks
from sims.store import run as run_module
from sims.store.repair import repair
from sims.store.run import StoreError

SPEC = {"sigma": [0.1, 0.5], "data": {"name": "digits", "n": [2, 4, 8]}}
CHUNKS = {"n": 1, "optimizer": 1}
UNIT = {"n": slice(1, 2), "optimizer": slice(0, 1)}


def make_template():
    return store.blank(
        {"n": ("n", [2, 4, 8], {"units": "samples"}), "optimizer": ["adam", "rmsprop"], "sigma": [0.1, 0.5]},
        {
            "gap": (("sigma", "n", "optimizer"), np.float64, {"long_name": "train and held-out gap"}),
            "norm": (("n", "optimizer"), np.float32),
            "columns": (("n", "optimizer", "sigma"), np.int32),
            "converged": (("n", "optimizer"), bool),
        },
    ).assign_attrs(title="a run")


def compute(unit):
    """Numbers that depend on the unit only, some of them NaN."""
    part = make_template().isel(unit)
    random = np.random.default_rng([part.n.item(), len(part.optimizer.item())])
    arrays = {name: random.integers(0, 99, variable.shape) / 7 for name, variable in part.data_vars.items()}
    arrays["gap"][1] = np.nan
    arrays["columns"] = arrays["columns"].astype(int)
    arrays["converged"] = arrays["converged"] > 7
    return arrays


def work(out, units=None, spec=SPEC, chunk_sizes=CHUNKS):
    """Compute at most ``units`` pending units."""
    with store.open_run(out, spec, make_template(), chunk_sizes, {"commit": "abc"}) as run:
        for unit in store.pending(run)[:units]:
            store.write_chunk(run, unit, compute(unit), wall_s=1.5)
        return store.progress(run)


def assert_same(out, other):
    """Bit for bit, NaN included: every array file under both folders has the same bytes."""
    files = [
        {path.relative_to(folder): path.read_bytes() for path in (folder / "results.zarr").rglob("*") if path.is_file()}
        for folder in (out, other)
    ]
    # Zarr lists the members of a group in no fixed order.
    groups = [json.loads(contents.pop(pathlib.Path("results.zarr/zarr.json"))) for contents in files]
    assert groups[0] == groups[1]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert work(out) == (6, 6)
    return out


@pytest.fixture
def copied(tmp_path, undisturbed):
    """A finished run to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "copy")


def test_results_are_what_was_computed(undisturbed):
    loaded = store.load(undisturbed)
    assert loaded.attrs["title"] == "a run"
    assert loaded.gap.attrs == {"long_name": "train and held-out gap"}
    assert loaded.n.attrs == {"units": "samples"}
    for i, j in np.ndindex(3, 2):
        for name, values in compute({"n": slice(i, i + 1), "optimizer": slice(j, j + 1)}).items():
            stored = loaded[name].isel(n=[i], optimizer=[j])
            assert stored.dtype == make_template()[name].dtype
            np.testing.assert_array_equal(stored, values.astype(stored.dtype))
    assert loaded.done.all()
    np.testing.assert_array_equal(loaded.wall_s, np.full((3, 2), 1.5))


def test_plain_xarray_reads_a_run_without_a_warning(undisturbed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_zarr(str(undisturbed / "results.zarr"))
    xr.testing.assert_identical(plain.load().drop_vars("seal"), store.load(undisturbed))
    assert plain.sel(optimizer="adam", n=4).gap.shape == (2,)
    assert json.loads(plain.attrs["record"])["spec"] == SPEC


def test_runs_are_made_and_written_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work(tmp_path, units=1)


def test_the_record_tells_of_spec_and_sessions(tmp_path):
    work(tmp_path / "run", units=2)
    work(tmp_path / "run")
    work(tmp_path / "run")
    record = store.read_spec(tmp_path / "run")
    assert record["spec"] == SPEC
    assert record["format"] == store.FORMAT
    # The last one found nothing to do.
    assert [session["chunks"] for session in record["sessions"]] == [2, 4]
    assert all(session["commit"] == "abc" and session["started"] <= session["ended"] for session in record["sessions"])


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, undisturbed):
    out = tmp_path / "run"
    assert work(out, units=2) == (2, 6)
    first = store.load(out)
    assert int(first.done.sum()) == 2
    assert first.gap.isnull().sum() == 12 - 2
    assert not first.columns.where(~first.done, 0).any()
    assert work(out, units=1) == (3, 6)
    assert work(out) == (6, 6)
    assert_same(out, undisturbed)


def test_units_may_be_larger_and_end_unevenly(tmp_path, undisturbed):
    out = tmp_path / "run"
    with store.open_run(out, SPEC, make_template(), {"n": 2}) as run:
        units = store.pending(run)
        assert units == [{"n": slice(0, 2)}, {"n": slice(2, 3)}]
        for unit in units:
            store.write_chunk(run, unit, {name: array.isel(unit) for name, array in store.load(undisturbed).items()
                                          if name in make_template()})  # fmt: skip
    loaded, other = store.load(out), store.load(undisturbed)
    xr.testing.assert_equal(loaded.drop_vars(["done", "wall_s"]), other.drop_vars(["done", "wall_s"]))
    # What goes on keeps its units.
    with store.open_run(out, SPEC, make_template(), CHUNKS) as run:
        assert run.chunks == {"n": 2}


def test_a_run_may_be_one_unit(tmp_path):
    with store.open_run(tmp_path, {}, store.blank({}, {"x": ((), float)}), {}) as run:
        assert store.pending(run) == [{}]
        store.write_chunk(run, {}, {"x": 3.0})
        assert store.progress(run) == (1, 1)
    assert store.load(tmp_path).x.item() == 3.0


def test_a_blank_template_takes_no_memory():
    template = store.blank({"i": np.arange(10**6)}, {"x": (("i",), float), "y": (("i",), bool)})
    assert template.x.variable.values.strides == (0,)
    assert np.isnan(template.x[5])
    assert not template.y[5]


CHILD = """
    import os, sys, time
    sys.path.insert(0, sys.argv[2])
    from tests import test_sims_store_run as t
    from sims import store
    from sims.store import chunks

    with store.open_run(sys.argv[1], t.SPEC, t.make_template(), t.CHUNKS, {}) as run:
        first, second = store.pending(run)[:2]
        store.write_chunk(run, first, t.compute(first))
        flush = chunks._flush
        def hang(run, names, unit):
            if MOMENT in names:
                print("ready", flush=True)
                time.sleep(60)
            flush(run, names, unit)
        chunks._flush = hang
        store.write_chunk(run, second, t.compute(second))
"""


@pytest.fixture
def child(tmp_path):
    """Starts a process that writes one unit and then hangs in the middle of another."""
    started = []

    def start(moment):
        root = os.path.dirname(os.path.dirname(__file__))
        code = textwrap.dedent(CHILD).replace("MOMENT", repr(moment))
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run"), root], stdout=subprocess.PIPE, text=True, cwd=root
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("moment", "finished"), [("gap", 1), pytest.param("done", 2, marks=pytest.mark.slow)])
def test_a_killed_unit_is_done_or_computed_again(tmp_path, undisturbed, child, moment, finished):
    out = tmp_path / "run"
    process = child(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Killed before the flag was written, its arrays are there and do not count; after, they do.
    assert (out / "results.zarr" / "gap" / "c" / "0" / "0" / "1").exists()
    loaded = store.load(out)
    assert int(loaded.done.sum()) == finished
    assert int(loaded.gap.isnull().sum()) == 12 - finished
    assert store.read_spec(out)["sessions"][0]["ended"] is None
    (out / "results.zarr" / "gap" / "c" / "0.torn.partial").write_text("half")
    assert work(out) == (6, 6)
    loaded, other = (store.load(folder).drop_vars("wall_s") for folder in (out, undisturbed))
    xr.testing.assert_identical(loaded, other)
    assert not list(out.rglob("*.partial"))


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path, child):
    out = tmp_path / "run"
    child("gap")
    with pytest.raises(StoreError, match=f"another process is writing in {out}"):
        work(out)
    assert int(store.load(out).done.sum()) == 1


def test_a_second_writer_in_this_process_is_refused(tmp_path):
    with (
        store.open_run(tmp_path, SPEC, make_template(), CHUNKS),
        pytest.raises(StoreError, match="another process is writing"),
    ):
        work(tmp_path)
    assert work(tmp_path, units=1) == (1, 6)


def test_another_spec_is_refused_with_its_differences(undisturbed):
    spec = {"sigma": [0.1], "data": {"name": "digits", "n": [2, 4, 8]}, "steps": 5}
    with pytest.raises(StoreError) as error:
        work(undisturbed, spec=spec)
    assert "sigma is [0.1, 0.5] there and [0.1] here; steps is null there and 5 here" in str(error.value)
    assert "data" not in str(error.value)
    with pytest.raises(StoreError, match=r'data\.name is "digits" there and "mixture" here'):
        work(undisturbed, spec=SPEC | {"data": SPEC["data"] | {"name": "mixture"}})


def test_other_variables_or_labels_under_the_same_spec_are_refused(undisturbed):
    for template in (
        make_template().drop_vars("norm"),
        make_template().assign_coords(n=[2, 4, 9]),
        make_template().assign(norm=make_template().norm.astype(float)),
    ):
        with (
            pytest.raises(StoreError, match="other variables or labels"),
            store.open_run(undisturbed, SPEC, template, CHUNKS),
        ):
            pass


def edit_record(out, **fields):
    record = store.read_spec(out)
    (out / "spec.json").write_text(json.dumps(record | fields))


def test_a_newer_format_is_refused(copied):
    edit_record(copied, format=store.FORMAT + 1)
    for use in (store.load, work, store.read_spec):
        with pytest.raises(
            StoreError, match=f"has format {store.FORMAT + 1}, this version reads {store.FORMAT}; update"
        ):
            use(copied)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"format": 1}', '{"format": "x"}', "\x00\xff"])
def test_a_damaged_record_is_refused(copied, content):
    (copied / "spec.json").write_text(content)
    for use in (store.load, work):
        with pytest.raises(StoreError, match=rf"spec\.json.*run `python -m sims repair {copied}`"):
            use(copied)
    if '"x"' in content:
        return
    found = repair(copied)
    assert found.record
    assert found[1:] == ([], [], (6, 6))
    assert work(copied) == (6, 6)


def test_a_lost_record_is_mended_by_the_same_command(tmp_path, undisturbed):
    work(tmp_path, units=2)
    (tmp_path / "spec.json").unlink()
    assert int(store.load(tmp_path).done.sum()) == 2
    assert work(tmp_path) == (6, 6)
    assert_same(tmp_path, undisturbed)
    assert store.read_spec(tmp_path)["spec"] == SPEC


def test_a_lost_record_does_not_let_another_spec_in(copied):
    (copied / "spec.json").unlink()
    with pytest.raises(StoreError, match="another experiment: sigma is"):
        work(copied, spec=SPEC | {"sigma": [9.0]})


def test_an_edited_spec_is_noticed(copied):
    edit_record(copied, spec=SPEC | {"sigma": [0.2, 0.5]})
    for use in (store.load, work):
        with pytest.raises(StoreError, match=r"spec\.json and .*zarr\.json describe different runs"):
            use(copied)


@pytest.mark.parametrize("file", ["zarr.json", "gap/zarr.json", "done/zarr.json", "n/zarr.json", "n/c/0"])
@pytest.mark.parametrize("damage", ["lost", "truncated", "edited"])
def test_damaged_layout_is_named_and_mended_by_the_same_command(copied, undisturbed, file, damage):
    path = copied / "results.zarr" / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:-1] + b" ")
    if damage == "lost":
        path.unlink()
    for use in (store.load, work) if damage != "lost" else (store.load,):
        with pytest.raises(StoreError, match=f"{path} was changed, damaged or lost; run `python -m sims repair"):
            use(copied)
    assert repair(copied, dry_run=True) == repair(copied)
    assert not path.exists()
    assert work(copied) == (6, 6)
    assert_same(copied, undisturbed)
    store.load(copied)


@pytest.mark.parametrize("file", ["gap/c/0/1/0", "columns/c/1/0/0", "wall_s/c/1/0", "done/c/1/0"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "foreign", "lost"])
def test_a_damaged_chunk_is_named_and_computed_anew(copied, undisturbed, file, damage):
    path, done = copied / "results.zarr" / file, copied / "results.zarr" / "done" / "c" / "1" / "0"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    if damage == "lost":
        path.unlink()
    else:
        foreign = (copied / "results.zarr" / "norm" / "c" / "0" / "0").read_bytes()
        damaged = {"truncated": content[:-3], "emptied": b"", "flipped": bytes(flipped), "foreign": foreign}
        path.write_bytes(damaged[damage])
    if done.exists():
        for use in (store.load, work):
            with pytest.raises(StoreError, match=f"1 finished unit is damaged: {path} is damaged or lost") as error:
                use(copied)
            assert "chunk n[1:2], optimizer[0:1]" in str(error.value)
        assert [unit for unit, _ in repair(copied, dry_run=True).units] == [UNIT]
        assert repair(copied).progress == (5, 6)
    with store.open_run(copied, SPEC, make_template(), CHUNKS) as run:
        (unit,) = store.pending(run)
        assert unit == UNIT
        store.write_chunk(run, unit, compute(unit), wall_s=1.5)
    assert_same(copied, undisturbed)


@pytest.mark.parametrize("pair", [("gap/c/0/0/0", "gap/c/0/1/0"), ("wall_s/c/0/0", "wall_s/c/1/0"), ("gap", "twin")])
def test_chunks_that_changed_places_are_noticed(tmp_path, pair):
    template = store.blank({"n": [1, 2], "m": [0]}, dict.fromkeys(("gap", "twin"), (("n", "m"), float)))
    with store.open_run(tmp_path, {}, template, {"n": 1, "m": 1}) as run:
        for i, unit in enumerate(store.pending(run)):
            store.write_chunk(run, unit, {"gap": [[i + 0.5]], "twin": [[i + 2.5]]}, wall_s=float(i))
    names = [name.replace("c/0/0/0", "c/0/0").replace("c/0/1/0", "c/1/0") for name in pair]
    one, other = (tmp_path / "results.zarr" / (name if "/" in name else f"{name}/c/1/0") for name in names)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(StoreError, match="come from other units or variables"):
        store.load(tmp_path)
    assert len(repair(tmp_path).units) == (2 if "/" in pair[0] else 1)


def test_all_damaged_units_are_named_and_mended_at_once(copied, undisturbed):
    for path in (copied / "results.zarr" / "gap" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(StoreError, match="6 finished units are damaged") as error:
        store.load(copied)
    assert str(error.value).count("is damaged or lost") == 6
    (copied / "results.zarr" / "norm" / "c" / "0" / "0").unlink()
    (copied / "results.zarr" / "norm" / "c" / "0" / "0").mkdir()
    assert repair(copied).progress == (0, 6)
    assert work(copied) == (6, 6)
    assert_same(copied, undisturbed)


@pytest.mark.parametrize("name", [".spec.json.partial", ".layout", "results.zarr", "results.zarr/gap", ".lock"])
def test_links_below_the_folder_are_not_followed(tmp_path, undisturbed, name):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "file").write_text("mine")
    if "/" in name:
        shutil.copytree(undisturbed, out)
        shutil.rmtree(out / name)
    else:
        out.mkdir()
    (out / name).symlink_to(outside / "file" if name.startswith(".s") or name == ".lock" else outside)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link: nothing is written through links"):
        work(out)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"


def test_runs_without_seals_open_and_resume(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        older = {name: dtype for name, dtype in chunks.BOOKKEEPING.items() if name != "seal"}
        patch.setattr(chunks, "BOOKKEEPING", older)
        patch.setattr(run_module, "BOOKKEEPING", older)
        work(tmp_path, units=2)
    assert int(store.load(tmp_path).done.sum()) == 2
    (tmp_path / "results.zarr" / "zarr.json").unlink()
    assert work(tmp_path) == (6, 6)
    assert not (tmp_path / "results.zarr" / "seal").exists()
    xr.testing.assert_identical(store.load(tmp_path).drop_attrs(), store.load(undisturbed).drop_attrs())


def test_records_that_name_files_elsewhere_are_refused(copied):
    record = store.read_spec(copied)
    for change in ({"files": {"../../x": ""}}, {"files": {"/etc/x": ""}}, {"variables": ["../x"]}, {"sessions": [3]}):
        (copied / "spec.json").write_text(json.dumps(record | change))
        with pytest.raises(StoreError, match=r"spec\.json is damaged"):
            store.load(copied)
    (copied / "spec.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match=r"nested too deep"):
        store.load(copied)
    (copied / "spec.json").write_text("\ufeff" + json.dumps(record))
    assert int(store.load(copied).done.sum()) == 6


@pytest.mark.parametrize("moment", ["array", "flush", "flag"])
def test_a_full_disk_keeps_what_is_finished(tmp_path, undisturbed, monkeypatch, moment):
    from zarr.storage import _local

    put, full = _local._put, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing_put(path, *args, **kwargs):
        if "columns/c" in str(path) if moment == "array" else "done/c" in str(path):
            raise full
        return put(path, *args, **kwargs)

    def failing_sync(*args):
        raise full

    with store.open_run(tmp_path, SPEC, make_template(), CHUNKS) as run:
        units = store.pending(run)
        store.write_chunk(run, units[0], compute(units[0]), wall_s=1.5)
        with monkeypatch.context() as patch:
            if moment == "flush":
                patch.setattr(os, "fsync", failing_sync)
            else:
                patch.setattr(_local, "_put", failing_put)
            with pytest.raises(StoreError, match=r"free some space and run the same command again: finished") as error:
                store.write_chunk(run, units[1], compute(units[1]), wall_s=1.5)
            assert "cannot write chunk n[0:1], optimizer[1:2]" in str(error.value)
        assert store.progress(run) == (1, 6)
    assert work(tmp_path) == (6, 6)
    assert_same(tmp_path, undisturbed)


def test_an_error_in_the_work_keeps_what_is_finished(tmp_path):
    def interrupted():
        with store.open_run(tmp_path, SPEC, make_template(), CHUNKS) as run:
            unit = store.pending(run)[0]
            store.write_chunk(run, unit, compute(unit))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert work(tmp_path, units=0) == (1, 6)
    assert store.read_spec(tmp_path)["sessions"][0]["chunks"] == 1


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=f"cannot write in {out}.*choose a folder that can be written"):
            work(out)
        with pytest.raises(StoreError, match="holds no run"):
            store.load(out)
    # Root may write anywhere, so permission is refused by hand.
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(StoreError, match=r"cannot write in .*Permission denied"):
            work(tmp_path / "new")


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(StoreError, match=r"holds no run: there is no .*spec\.json"):
        store.load(tmp_path)
    (tmp_path / "spec.json").write_text('{"my": "file"}')
    with pytest.raises(StoreError, match=r"spec\.json exists without results\.zarr; move it away"):
        work(tmp_path)
    assert (tmp_path / "spec.json").read_text() == '{"my": "file"}'
    (tmp_path / "other" / "results.zarr").mkdir(parents=True)
    with pytest.raises(StoreError, match="holds no run"):
        work(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"gap": a["gap"][:1]}, r"'gap' of chunk .* must have shape \(2, 1, 1\) .*got \(1, 1, 1\)"),
        (lambda a: a | {"columns": a["columns"] / 2}, "'columns' .* dtype int32, got .* float64"),
        (lambda a: a | {"extra": 1.0}, "needs exactly the variables"),
        (lambda a: {"gap": a["gap"]}, "needs exactly the variables"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(tmp_path, change, message):
    with store.open_run(tmp_path, SPEC, make_template(), CHUNKS) as run:
        unit = store.pending(run)[0]
        with pytest.raises(StoreError, match=message):
            store.write_chunk(run, unit, change(compute(unit)))
        assert store.progress(run).done == 0


def test_a_unit_is_written_once_and_must_exist(tmp_path):
    with store.open_run(tmp_path, SPEC, make_template(), CHUNKS) as run:
        unit = store.pending(run)[0]
        store.write_chunk(run, unit, compute(unit))
        for wrong in (unit, {"n": slice(0, 2), "optimizer": slice(0, 1)}, {"n": slice(0, 1)}):
            with pytest.raises(StoreError, match="is not pending"):
                store.write_chunk(run, wrong, compute(unit))


@pytest.mark.parametrize(
    ("template", "chunk_sizes", "message"),
    [
        (store.blank({"n": [1]}, {"x": ((), float)}), {"n": 1}, r"'x' lacks the chunked dimensions \['n'\]"),
        (store.blank({"n": []}, {"x": (("n",), float)}), {"n": 1}, "'n' is empty"),
        (store.blank({"n": [1]}, {"x": (("n",), float)}), {"m": 1}, r"chunks\['m'\] = 1"),
        (store.blank({"n": [1]}, {"x": (("n",), float)}), {"n": 0}, r"chunks\['n'\] = 0"),
        (store.blank({"n": [1]}, {"done": (("n",), float)}), {"n": 1}, "needs another name"),
        (store.blank({"n": [1]}, {"a/b": (("n",), float)}), {"n": 1}, "needs another name"),
        (store.blank({"n": [1]}, {"x": (("n",), "U3")}), {"n": 1}, "has dtype <U3"),
    ],
)
def test_unfit_templates_are_refused(tmp_path, template, chunk_sizes, message):
    with pytest.raises(StoreError, match=message), store.open_run(tmp_path / "run", {}, template, chunk_sizes):
        pass
    assert not (tmp_path / "run").exists()


def test_unfit_specs_are_refused(tmp_path):
    for spec in ({"sigma": float("nan")}, {"f": print}):
        with pytest.raises(StoreError, match="spec must be plain JSON"):
            work(tmp_path, spec=spec)
    with pytest.raises(StoreError, match="without a coordinate"):
        store.blank({"n": [1]}, {"x": (("n", "m"), float)})


def test_nonfinite_cells_are_kept_and_counted(tmp_path):
    template = store.blank({"n": [1, 2, 3]}, {"x": (("n",), float), "k": (("n",), int)})
    with store.open_run(tmp_path, {}, template, {"n": 1}) as run:
        first, second, _ = store.pending(run)
        store.write_chunk(run, first, {"x": [np.inf], "k": [1]})
        store.write_chunk(run, second, {"x": [np.nan], "k": [1]})
    loaded = store.load(tmp_path)
    np.testing.assert_array_equal(loaded.x, [np.inf, np.nan, np.nan])
    assert store.count_finite(loaded) == {"x": (0, 2, 1)}
    assert store.count_finite(xr.Dataset({"x": ("n", [1.0, np.nan])})) == {"x": (1, 1, 0)}


def test_a_unit_of_nothing_but_nan_counts_as_written(tmp_path):
    template = store.blank({"n": [1]}, {"x": (("n",), float)})
    with store.open_run(tmp_path, {}, template, {"n": 1}) as run:
        store.write_chunk(run, store.pending(run)[0], {"x": [np.nan]})
    assert store.load(tmp_path).done.all()
    assert chunks.RESULTS == "results.zarr"


def test_arrays_of_jax_are_taken(tmp_path, key):
    import jax

    values = jax.random.normal(key, (1, 2))
    template = store.blank({"n": [1], "i": [0, 1]}, {"x": (("n", "i"), np.float32)})
    with store.open_run(tmp_path, {}, template, {"n": 1}) as run:
        store.write_chunk(run, store.pending(run)[0], {"x": values})
    np.testing.assert_array_equal(store.load(tmp_path).x, np.asarray(values, np.float32))


def test_the_environment_is_json_and_names_what_computes():
    facts = store.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["device"]["platform"] == "cpu"
    assert facts["commit"] is None or len(facts["commit"].removesuffix("-dirty")) == 40
