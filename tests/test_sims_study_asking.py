"""``sims ask``: what is said of given data, by word and number, and training beside it."""

import json

import numpy as np
import pytest

import sims
from sims.__main__ import _parse
from sims.study.asking import as_text, sizes_up_to


def circle(n, radius=3.0):
    turns = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def run(*argv):
    args = _parse(["sims", *map(str, argv)])
    return args.run(args)


def test_three_points_are_memorized_with_and_without_biases_and_six_by_neither():
    three = sims.ask(circle(3), sigma=0.1, penalty=1e-4)
    (answer,) = three["answers"]
    assert answer["without_biases"] == {"condition_holds": True, "regime": "memorizing", "pays_up_to": 3}
    assert answer["with_biases"] == {"condition_holds": True, "regime": "memorizing", "pays_up_to": 3}
    assert "All cosines are negative" in as_text(three)
    (answer,) = sims.ask(circle(6), sigma=0.1, penalty=1e-4)["answers"]
    assert answer["without_biases"]["regime"] == "not covered"
    assert answer["with_biases"]["regime"] == "generalizing"


def test_what_is_odd_about_the_data_is_said():
    """Repeats, a constant pixel, and a sample inside the hull of the others."""
    rows = np.concatenate([circle(5), circle(5)[:2], np.zeros((1, 2))])
    result = sims.ask(np.concatenate([rows, np.ones((8, 1))], axis=1), sigma=[0.1, 0.2], penalty=1e-4)
    assert result["data"]["num_distinct"] == 6
    assert result["data"]["num_constant_pixels"] == 1
    assert [answer["prices"][-1]["memorizable"] for answer in result["answers"]] == [5, 5]
    text = as_text(result)
    assert "5 of 6 samples can be memorized; 1 lie" in text
    assert "(6 distinct)" in text
    assert result["data"]["repeats"] == [5, 6]
    assert result["data"]["inside_hull"] == [7]
    assert "Rows 5, 6 repeat an earlier sample." in text
    assert "Rows 7 lie inside the hull of the others." in text
    assert text.count("## At noise") == 2
    json.dumps(result, allow_nan=False)
    (one,) = sims.ask(circle(4), sigma=0.1, width=2, penalty=1e-4)["answers"]
    assert one["without_biases"]["condition_holds"] is False


def test_sizes_double_up_to_all():
    assert sizes_up_to(2) == [2]
    assert sizes_up_to(12) == [2, 4, 8, 12]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sims.ask(np.ones((3, 2)), sigma=0.1), "1 distinct"),
        (lambda: sims.ask(np.full((3, 2), np.nan), sigma=0.1), "data"),
        (lambda: sims.ask(circle(3), sigma=0.0), "sigma"),
        (lambda: sims.ask(circle(3), sigma=0.1, penalty=-1.0), "penalty"),
        (lambda: sims.ask(circle(3), sigma=0.1, train=True), "held_out"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_number_all_training_rows_are_asked_about_and_duplicates_are_repeated(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.concatenate([circle(8), circle(2, 1.0)]))
    data = ["--dataset", f"npz:{tmp_path}/rows.npz?values=keep", "--held-out", 3, "--sigma", 0.2, "--quiet"]
    assert not run("ask", *data, "--out", tmp_path / "all")
    result = json.loads((tmp_path / "all" / "ask.json").read_text())
    assert result["data"]["num_samples"] == 7
    assert result["spec"]["num_samples"] is None
    assert not run("ask", *data, "--duplicates", "2x3", "--singles", 1, "--out", tmp_path / "repeated")
    repeated = json.loads((tmp_path / "repeated" / "ask.json").read_text())["data"]
    assert (repeated["num_samples"], repeated["num_distinct"]) == (7, 3)
    assert repeated["repeats"] == [1, 2, 4, 5]


def test_the_command_writes_a_page_and_numbers_and_trains(tmp_path, capsys):
    out = tmp_path / "ask"
    assert not run("ask", "--num-samples", 6, "--sigma", 0.2, "--width", 8, "--train", "--steps", 3, "--seeds", 2,
                   "--out", out)  # fmt: skip
    result = json.loads((out / "ask.json").read_text())
    assert (out / "ask.md").read_text() in capsys.readouterr().out
    assert result["spec"]["sigma"] == [0.2]
    (answer,) = result["answers"]
    for kind in ("without_biases", "with_biases"):
        assert 0 <= answer[kind]["trained"]["gap"] <= 1
        assert answer[kind]["trained"]["regime"] in ("memorizing", "generalizing")
    assert [price["num_samples"] for price in answer["prices"]] == [2, 4, 6]
    assert run("ask", "--num-samples", 7, "--out", out) == 2
    assert "answers another question" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert run("ask", "--num-samples", 6, "--out", tmp_path / "full") == 2
    assert "other files" in capsys.readouterr().err
    assert run("ask", "--num-samples", 6, "--width", "4,8", "--out", tmp_path / "other") == 2
    assert "width has 2 values" in capsys.readouterr().err
