"""The loop that fills a run: what is pending is computed, written and reported, in any order, once."""

import numpy as np
import pytest

from sims import store


def template():
    return store.blank({"n": [1, 2, 3], "seed": [0, 1]}, {"x": (("n", "seed"), float)})


def opened(out):
    return store.open_run(out, {"what": "squares"}, template(), {"n": 1, "seed": 1})


def values_at(region):
    return {"x": np.full((1, 1), 10.0 * region["n"].start + region["seed"].start)}


def test_units_may_be_finished_in_any_order_and_some_left_out(tmp_path):
    reports = []

    def backwards(pending):
        for region in reversed(pending[:4]):
            yield region, values_at(region), 0.5

    with opened(tmp_path) as run:
        store.fill_units(run, backwards, on_unit=lambda *report: reports.append(report))
        assert store.progress(run) == (4, 6)
    assert [report[:2] for report in reports] == [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6)]
    assert reports[0][2] is None
    assert reports[1][2] == {"n": slice(1, 2), "seed": slice(1, 2)}
    half = store.load(tmp_path)
    np.testing.assert_array_equal(half.x, [[0, 1], [10, 11], [np.nan, np.nan]])
    np.testing.assert_array_equal(half.wall_s, [[0.5, 0.5], [0.5, 0.5], [np.nan, np.nan]])

    asked = []

    def rest(pending):
        asked.extend(pending)
        return [(region, values_at(region), 0.1) for region in pending]

    # Of the units with seed 0 one is left.
    mine = [{"n": slice(i, i + 1), "seed": slice(0, 1)} for i in range(3)]
    with opened(tmp_path) as run:
        store.fill_units(run, rest, regions=mine, on_unit=lambda *report: reports.append(report))
        assert store.progress(run) == (5, 6)
    assert asked == mine[2:]
    assert [report[:2] for report in reports[5:]] == [(2, 3), (3, 3)]


def test_what_fails_in_the_middle_keeps_what_is_finished(tmp_path):
    def failing(pending):
        yield pending[0], values_at(pending[0]), 0.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        store.fill_units(run, failing)
    assert int(store.load(tmp_path).done.sum()) == 1


def test_batches_have_one_size_and_the_last_repeats_its_last_item(tmp_path):
    batches, reports = [], []

    def squares(rows):
        batches.append(rows.tolist())
        if len(batches) == 2:
            raise KeyboardInterrupt
        return {"x": rows.astype(float) ** 2}

    def work(size):
        blank = store.blank({"item": range(5)}, {"x": (("item",), float)})
        store.fill(tmp_path, {}, blank, size, squares, on_batch=lambda *report: reports.append(report))

    with pytest.raises(KeyboardInterrupt):
        work(2)
    # A run that goes on keeps the size of its batches.
    work(3)
    assert batches == [[0, 1], [2, 3], [2, 3], [4, 4]]
    assert reports == [(0, 5), (2, 5), (2, 5), (4, 5), (5, 5)]
    np.testing.assert_array_equal(store.load(tmp_path).x, [0, 1, 4, 9, 16])
