"""Rows of a comparison: ratios pair by pair, what JSON and the table say, and a process's peak of memory."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from sims.bench import timing as benchmarks
from sims.bench.timing import Row, compare, peak_memory, per_unit, row, seconds, table, write_json


def clock(monkeypatch, durations):
    """Make each timed call last the next of ``durations``."""
    ticks = [0.0]
    for duration in durations:
        ticks += [ticks[-1] + duration] * 2
    times = iter(ticks)
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: next(times))


def test_ratios_are_of_pairs_and_more_is_better(monkeypatch):
    calls = []
    # A warm-up of each, then ours 1, 2, 4 beside the rival's 3, 4, 5.
    clock(monkeypatch, [9, 9, 1, 3, 2, 4, 4, 5])
    found = compare("a", lambda: calls.append("ours"), lambda: calls.append("rival"), 3, notes={"bytes": 5})
    assert calls == ["ours", "rival"] * 4
    assert found == Row("a", 2, 4, 2, 1.25, 3, {"bytes": 5})


def test_a_rival_in_pytorch_has_the_better_number_of_threads(monkeypatch):
    """With all threads it takes 50 seconds, as beside other work; with one it takes 1."""
    now, count, used = [0.0], [2], []

    class Torch:
        set_num_threads = staticmethod(lambda number: count.__setitem__(0, number))

    def rival():
        used.append(count[0])
        now[0] += 1.0 if count[0] == 1 else 50.0

    def ours():
        now[0] += 0.5

    monkeypatch.setitem(sys.modules, "torch", Torch)
    monkeypatch.setattr(benchmarks.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: now[0])
    assert compare("a", ours, rival, 3) == Row("a", 0.5, 1.0, 2.0, 2.0, 2.0, {"rival_threads": 1})
    assert sorted(used[:4]) == [1, 1, 2, 2]
    assert used[4:] == [1] * 4


def test_without_an_idle_machine_there_is_no_ratio():
    found = row("a", [1.0, 1.0], [2.0, 50.0], notes={"bytes": 5})
    assert (found.ratio_median, found.ratio_min, found.ratio_max) == (None, None, None)
    assert "from 2 to 50 s, so the machine is not idle" in found.notes["busy"]
    assert "| -" in table([found])
    # Of half the work, too.
    assert per_unit(found, 2, 2).ratio_median is None


def test_without_a_rival_and_without_a_warm_up(monkeypatch):
    clock(monkeypatch, [3, 1, 2])
    assert compare("a", lambda: None, None, 3, warm_up=False) == Row("a", 2, None, None, None, None, {})
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        compare("a", lambda: None, None, 0)


def test_times_measured_elsewhere_come_in_pairs():
    assert row("a", [1.0, 2.0], [2.0, 2.0]).ratio_median == 1.5
    with pytest.raises(ValueError, match="zip"):
        row("a", [1.0, 2.0], [2.0])


def test_time_lasts_until_arrays_are_computed():
    blocked = []

    class Pending:
        def block_until_ready(self):
            blocked.append(self)
            return self

    assert 0 <= seconds(lambda: {"a": Pending(), "b": [Pending(), jnp.zeros(2), 3, None]}) < 10
    assert len(blocked) == 2


def test_json_and_table_have_every_field(tmp_path):
    rows = [row("fast", [0.5], [1.0], notes={"peak_bytes": 7, "tap": "mid"}), row("alone", [2.0], None)]
    write_json(tmp_path / "rows.json", rows)
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert first == {
        "name": "fast", "ours_s": 0.5, "rival_s": 1.0, "ratio_median": 2.0, "ratio_min": 2.0, "ratio_max": 2.0,
        "notes": {"peak_bytes": 7, "tap": "mid"},
    }  # fmt: skip
    assert second["rival_s"] is second["ratio_median"] is None
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["fast", "0.5", "1", "2", "2", "2", "peak_bytes 7, tap mid"]
    assert cells[3] == ["alone", "2", "-", "-", "-", "-", ""]


@pytest.mark.slow
def test_peak_memory_is_of_the_process_alone_and_of_its_past():
    def peak(code):
        program = f"from sims.bench.timing import peak_memory\n{code}\nprint(peak_memory())"
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)

    # Large memory here must not count there.
    held = bytearray(600_000_000)
    base, used = peak(""), peak("held = bytearray(300_000_000); del held")
    assert base < 500_000_000 < len(held) <= peak_memory()
    assert 290_000_000 < used - base < 310_000_000
