"""The benchmarks run at tiny sizes, with the fields that others read; what they compare agrees."""

import json
import math

import pytest

from sims import bench

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
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        # The estimate that is timed is one of the number that ours is exact for.
        assert row["notes"]["difference_in_standard_errors"] < 5
    training = by_name["exact_training"]["notes"]
    assert training["converged"]
    assert training["gradient_norm"] <= 1e-10 < training["floor_of_adam"]
    assert training["course"][-1][1] == training["gradient_norm"]
    assert all(math.isfinite(size) for _, size in training["course"] + training["course_of_adam"])
    assert "exact_training" in capsys.readouterr().out


def test_one_row_by_name(capsys):
    assert run("--only", "memorizing_minimizer", "--quick", "--repeats", 1) == 0
    assert "memorizing_minimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"), [(["--only", "nothing"], "choose among theory"), (["--repeats", "0"], "at least 1")]
)
def test_bad_input_exits_with_2(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err
