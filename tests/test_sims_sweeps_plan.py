"""What a sweep will take: counts by hand, time exact for a machine whose clock is known, nothing written."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

import sims
from sims import __main__ as cli
from sims.sweeps import plan as planning
from sims.sweeps import programs
from sims.sweeps.plan import as_text, plan
from sims.sweeps.spec import Spec

SPEC = Spec(
    dataset="mixture:modes=2,dim=3", num_samples=(3, 6), width=4, sigma=(0.3, 0.6, 0.9), penalty=(1e-3, 1e-2), seeds=5,
    steps=6, record_steps=(0, 2, 6), eval_samples=5, eval_draws=2, held_out=20,
)  # fmt: skip
START, STEP = 3.0, 0.25
"""Seconds of the known machine: to launch a group, and for each cell, row and step."""


@pytest.fixture
def known_machine(monkeypatch):
    """A clock that only compiling (2 s) and launching move, and which devices there are; returns the launches."""
    now, launches = [0.0], []

    def make(devices, group):
        place = programs.placement(group=group)
        monkeypatch.setattr(planning, "placement", lambda **_: place._replace(devices=place.devices * devices))

        def compiled(spec, job, measures, place):
            now[0] += 2.0
            rows, size = len(job.data.train), min(place.group, spec.cells_per_unit)

            def launch(groups, segments):
                assert len(groups) == len(place.devices)
                (cells,) = {len(numbers.sigma) for _, numbers in groups}
                launches.append((rows, cells, int(segments.sum())))
                now[0] += START + STEP * rows * cells * int(segments.sum())
                return [{"gap": np.zeros((size, len(segments)), np.float32)} for _ in groups]

            return programs.Compiled(size, 100 * rows, launch)

        monkeypatch.setattr(planning, "compile_job", compiled)
        monkeypatch.setattr(planning.time, "perf_counter", lambda: now[0])
        return launches

    return make


def hand_seconds(spec, devices, group):
    """Rounds of groups over devices, for every n."""
    per_unit = math.ceil(6 / group)
    rounds = math.ceil(spec.seeds * per_unit / devices)
    return sum(rounds * (START + STEP * n * min(group, 6) * spec.steps) for n in spec.num_samples)


@pytest.mark.parametrize(("devices", "group"), [(1, 6), (1, 4), (2, 6), (2, 1), (8, 2), (8, 100)])
@pytest.mark.parametrize("steps", [6, 600])
@pytest.mark.parametrize("num_samples", [(3,), (3, 6), (3, 4, 6)])
def test_time_is_exact_where_it_is_linear(known_machine, devices, group, steps, num_samples):
    """In steps, and in the operations of a step: then probes at both ends tell all."""
    launches = known_machine(devices, group)
    spec = dataclasses.replace(SPEC, steps=steps, num_samples=num_samples)
    found = plan(spec, ["gap"], group=group)
    np.testing.assert_allclose(found.run_s, hand_seconds(spec, devices, group), rtol=1e-12)
    assert found.compile_s == 2.0 * len(num_samples)
    assert (found.cells, found.units, found.programs) == (30 * len(num_samples), 5 * len(num_samples), len(num_samples))
    assert found.group == min(group, 6)
    assert found.memory == 100 * max(num_samples)
    assert found.results == found.cells * 3 * 4
    # However long the sweep, probes are short.
    assert max(taken for _, _, taken in launches) == planning.PROBE_STEPS


def test_counts_follow_the_axes():
    spec = dataclasses.replace(
        SPEC, dataset=("mixture:modes=2,dim=3", "mixture:modes=3,dim=3"), separation=(1.0, 2.0, 4.0),
        optimizer=("adam", "sgd"), batch_size=(0, 2), tied=(False, True), width=(2, 4), seeds=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "compile_job", lambda *_: programs.Compiled(6, 1, launch))
        found = plan(spec, ["gap"])
        fewer = plan(dataclasses.replace(spec, width=4), ["gap"])
    units = 2 * 3 * 2 * 2 * 2 * 2 * 2 * 2
    assert found.units == units == math.prod(spec.shape.values()) // (6 * 3)
    assert found.cells == spec.num_cells == units * 6
    # Seeds share a program. So do separations, but other axes lie between them: only where all programs are kept.
    assert found.programs == units // 2 == 192
    assert fewer.programs == fewer.units // (2 * 3) == programs.REMEMBERED
    assert found.group == 6


def launch(groups, segments):
    return [{"gap": np.zeros((6, len(segments)), np.float32)} for _ in groups]


def test_an_estimate_of_this_machine_is_positive_and_knows_the_results():
    """Results as large as they become; a custom measure has its own shape."""

    def norms(params, data, spec):
        return jnp.linalg.norm(params.w1, axis=0)

    spec = dataclasses.replace(SPEC, num_samples=3)
    found = plan(spec, ["train_error", norms])
    assert min(found.memory, found.compile_s, found.run_s) > 0
    assert (found.cells, found.units, found.programs, found.group) == (30, 5, 1, 6)
    swept = sims.sweep(spec, ["train_error", norms])
    assert found.results == swept.train_error.nbytes + swept.norms.nbytes + swept.diverged.nbytes
    assert swept.norms.nbytes == 4 * swept.train_error.nbytes


def test_a_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    argv = "--dataset mixture:modes=2,dim=3 --num-samples 3 --sigma 0.3,0.6 --seeds 2 --width 4 --steps 6".split()
    argv += "--eval-samples 5 --eval-draws 2 --held-out 20 --measures train_error --dry-run".split()
    args = cli._parse(["sims", "sweep", *argv, "--out", str(tmp_path / "run"), "--log", str(tmp_path / "log")])
    assert args.run(args) == 0
    printed, told = capsys.readouterr()
    assert told.splitlines() == ["reading the data", "compiling and timing the unit of the least work"]
    lines = printed.splitlines()
    assert lines[0] == "4 cells in 2 units of work; 1 compiled programs, 2 cells at a time."
    assert lines[1].startswith("Memory: about ")
    assert lines[2].startswith("Time: about ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_shard_plans_that_shard(known_machine):
    known_machine(1, 6)
    whole, mine = plan(SPEC, ["gap"], group=6), plan(SPEC, ["gap"], group=6, shard=(2, 5))
    # Units 2 and 7 of ten: a seed of either n.
    assert (whole.units, mine.units, mine.cells) == (10, 2, 12)
    assert mine.run_s == pytest.approx(sum(START + STEP * n * 6 * SPEC.steps for n in SPEC.num_samples))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "10B"], "raise --memory"),
        (["--measures", "loss"], "unknown measure 'loss'"),
        (["--num-samples", "99999"], "distinct training rows are asked for"),
        (["--group", "0"], "group must be at least 1, got 0"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(argv, message, tmp_path, capsys):
    base = ["--num-samples", "3", "--width", "4", "--sigma", "0.3", "--seeds", "1", "--steps", "2", "--held-out", "20"]
    base += ["--measures", "train_error"]
    args = cli._parse(["sims", "sweep", *base, "--dry-run", "--out", str(tmp_path / "run"), *argv])
    assert args.run(args) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "size", "text"),
    [
        (0.4, 7, ("7 B", "0 s")),
        (119, 1536, ("1.5 KiB", "119 s")),
        (600, 3 << 20, ("3 MiB", "10 min")),
        (9000, 5 << 40, ("5.12e+03 GiB", "2.5 h")),
    ],
)
def test_units_of_the_text(seconds, size, text):
    found = planning.Plan(
        cells=1000, units=10, programs=2, group=100, memory=size, compile_s=seconds, run_s=seconds, results=size
    )
    assert as_text(found) == (
        "1,000 cells in 10 units of work; 2 compiled programs, 100 cells at a time.\n"
        f"Memory: about {text[0]} of temporaries on each device; results about {text[0]}.\n"
        f"Time: about {text[1]} to compile and {text[1]} to run.\n"
    )
