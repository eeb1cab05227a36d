"""The progress bar: what an estimate of the time left is made of."""

from sims.terminal import Bar


def test_compilation_and_earlier_work_are_not_in_the_time_left():
    with Bar(False, "cells") as bar:
        clock = [0.0]
        bar._bar._time = lambda: clock[0]

        def left():
            facts = bar._bar.format_dict
            return None if facts["rate"] is None else (facts["total"] - facts["n"]) / facts["rate"]

        # Ten were there before; the first takes long, for it is compiled.
        bar.move(10, 20)
        clock[0] += 100
        bar.move(11, 20)
        assert left() is None
        for done in range(12, 15):
            clock[0] += 2
            bar.move(done, 20)
        assert abs(left() - 6 * 2) < 1e-9
        assert bar._bar.n == 14


def test_a_quiet_bar_counts_nothing_and_accepts_all():
    with Bar(True, "cells") as bar:
        for done in (0, 1, 5):
            bar.move(done, 5, "label")
