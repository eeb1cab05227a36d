"""The benchmarks run at tiny sizes, with the fields that others read; what they compare agrees."""

import json
import math

import jax
import pytest

from dae_theory import memorizing_minimizer
from dae_theory.risk import monte_carlo_estimate
from sims.bench import __main__ as bench
from sims.bench import theory
from sims.bench.timing import Row, per_unit

pytestmark = pytest.mark.tiny

FIELDS = ["name", "ours_s", "rival_s", "ratio_median", "ratio_min", "ratio_max", "notes"]


def run(*argv):
    args = bench._parse(["bench", *map(str, argv)])
    return args.run(args)


@pytest.mark.slow
def test_every_row_at_tiny_sizes(tmp_path, capsys):
    assert run("--only", "theory", "--quick", "--repeats", 2, "--json", tmp_path / "rows.json") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == list(bench.GROUPS["theory"])
    assert all(list(row) == FIELDS and row["ours_s"] > 0 for row in rows)
    by_name = {row["name"]: row for row in rows}
    for name in ("exact_risk_generalizing", "exact_risk_memorizing"):
        row = by_name[name]
        _has_a_ratio_unless_busy(row)
        # The estimate that is timed is one of the number that ours is exact for.
        assert row["notes"]["difference_in_standard_errors"] < 5
    training = by_name["exact_training"]["notes"]
    assert training["converged"]
    assert training["gradient_norm"] <= 1e-10 < training["floor_of_adam"]
    assert training["course"][-1][1] == training["gradient_norm"]
    assert all(math.isfinite(size) for _, size in training["course"] + training["course_of_adam"])
    assert "exact_training" in capsys.readouterr().out


@pytest.mark.slow
def test_every_row_of_sweeps_at_tiny_sizes(tmp_path):
    assert run("--only", "sweeps", "--quick", "--repeats", 2, "--json", tmp_path / "rows.json") == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == list(bench.GROUPS["sweeps"])
    assert all(list(row) == FIELDS and row["ours_s"] > 0 for row in rows.values())
    limit = rows["paper_step"]["notes"]
    assert limit["ours_by_limit"] == pytest.approx(
        rows["paper_step"]["ours_s"] / (limit["products_s"] + limit["noise_s"])
    )
    assert rows["time_to_objective"]["notes"]["reached"]
    per_cell = rows["linear_cells"]["notes"]["per_cell_s"]
    assert list(per_cell) == ["10", "20"]
    assert per_cell["20"] == rows["linear_cells"]["ours_s"]
    # Both sides are processes of ours, so this row never lacks a rival; on a busy machine it gives no ratio.
    devices = rows["devices_2"]
    assert devices["rival_s"] > 0
    _has_a_ratio_unless_busy(devices)


def _has_a_ratio_unless_busy(row):
    if "busy" in row["notes"]:
        assert row["ratio_median"] is None
    else:
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]


def test_a_sampler_is_charged_for_the_draws_that_its_precision_takes(monkeypatch):
    """With every call a second long, the rival takes as many seconds as it needs runs of the draws timed."""
    monkeypatch.setattr(theory, "seconds", lambda way: 1.0)
    row = theory.exact_risk_memorizing(2, True)
    key = jax.random.key(1)
    data = 0.53 * jax.random.normal(jax.random.key(0), (6, 16))
    dae = memorizing_minimizer(data, 0.2, 1e-3, 6)
    found = monte_carlo_estimate(key, dae, data[:1], 0.2, num_draws=200, gram=False)
    runs = (float(found.standard_error) / float(found.mean) / 1e-4) ** 2
    assert row.rival_s == pytest.approx(runs, rel=1e-6)
    assert row.notes["draws_needed"] == round(200 * runs)


def test_times_of_calls_become_times_of_cell_steps():
    found = per_unit(Row("a", 6.0, 8.0, 4 / 3, 1.0, 2.0, {}), 60, 4)
    assert (found.ours_s, found.rival_s) == pytest.approx((0.1, 2.0))
    assert (found.ratio_median, found.ratio_min, found.ratio_max) == pytest.approx((20.0, 15.0, 30.0))
    alone = per_unit(Row("a", 6.0, None, None, None, None, {}), 60, 4)
    assert alone == Row("a", 0.1, None, None, None, None, {})


def test_one_row_by_name(capsys):
    assert run("--only", "exact_risk_memorizing", "--quick", "--repeats", 1) == 0
    assert "exact_risk_memorizing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"), [(["--only", "nothing"], "choose among theory"), (["--repeats", "0"], "at least 1")]
)
def test_bad_input_exits_with_2(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_rows_of_the_store_read_the_runs_that_they_time(tmp_path):
    """A finished run lies in few files, an unfinished one in some for each unit."""
    assert run("--only", "store", "--quick", "--repeats", 1, "--json", tmp_path / "rows.json") == 0
    finished, unfinished = json.loads((tmp_path / "rows.json").read_text())
    assert [finished["name"], unfinished["name"]] == list(bench.GROUPS["store"])
    assert 5 * finished["notes"]["files"] < 8 * 599 < unfinished["notes"]["files"]
