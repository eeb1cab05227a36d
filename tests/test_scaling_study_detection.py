"""A run of detectors from images to the report: groups, halves, resuming, tables, bad input."""

import csv
import json

import numpy as np
import pandas
import pytest
import scaling_commands
import xarray as xr

from scaling import zoo
from scaling.detection.detectors import DETECTORS, DetectionSetting
from scaling.detection.evaluation import auroc, auroc_over_seeds
from scaling.study import detection, detection_report, items
from scaling.study.items import Items, Prompt
from scaling.training import corpus
from sims import store

QUICK = ["--detectors", "std,error", "--draws", 1, "--sigma", "0.5,1", "--quiet"]


@pytest.fixture(scope="module")
def pipeline():
    return zoo.load("digits-10")


def results_of(scores, groups, kinds=None, options=None):
    """Scores as of a finished run: ``std`` over taps, ``error_min`` without options."""
    count = len(groups)
    coords = {"image": range(count), "group": ("image", list(groups)), "kind": ("image", list(kinds or [""] * count))}
    coords |= {name: ("image", [""] * count) for name in ("name", "prompt")} | {"tap": list(options or ["a"])}
    taps = np.atleast_2d(scores)
    variables = {
        "std": (("image", "tap"), taps.T),
        "error_min": ("image", taps[0]),
        "seconds": ("image", np.ones(count)),
    }
    return xr.Dataset(variables, coords)


CHOSEN = [DETECTORS["std"], DETECTORS["error_min"]]


def test_every_group_of_others_is_compared_apart_and_kinds_too():
    groups = ["duplicated"] * 8 + ["train"] * 6 + ["held_out"] * 5 + ["images"] * 3
    kinds = ["verbatim"] * 4 + ["template"] * 4 + ["shared"] * 14
    scores = np.arange(22.0)[::-1]
    rows = detection.evaluate(results_of(scores, groups, kinds), CHOSEN)
    pairs = [(row.positives, row.negatives, row.num_positives, row.num_negatives) for row in rows[::2]]
    assert pairs == [
        ("all", "train", 8, 6), ("template", "train", 4, 6), ("verbatim", "train", 4, 6),
        ("all", "held_out", 8, 5), ("template", "held_out", 4, 5), ("verbatim", "held_out", 4, 5),
    ]  # fmt: skip
    assert all(row.area.value == 1 and row.area.low < 1 for row in rows)
    assert rows[0].difference is None
    assert rows[1].difference.value == 0


def test_a_tap_is_chosen_on_one_half_and_all_are_rated_on_the_other():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 40))
    scores[1, :20] += 4
    results = results_of(scores, ["members"] * 20 + ["others"] * 20, options=["weak", "strong"])
    tap, single = detection.evaluate(results, CHOSEN)
    assert (tap.option, tap.num_positives, single.option, single.num_positives) == ("strong", 10, "", 10)
    assert tap.area.value > 0.9
    ups, downs = scores[0, 1:20:2], scores[0, 21:40:2]
    assert single.area.value == np.mean(ups[:, None] > downs[None, :])


def test_several_runs_are_rated_over_seeds():
    """The tap of the first run, the same items, and the interval over seeds and images; other items are refused."""
    rng = np.random.default_rng(1)
    groups, runs = ["members"] * 20 + ["others"] * 20, []
    for _ in range(3):
        scores = rng.normal(size=(2, 40))
        scores[1, :20] += 2
        runs.append(results_of(scores, groups, options=["weak", "strong"]))
    tap, single = detection.over_seeds(runs, CHOSEN)
    assert (tap.option, tap.negatives, tap.seeds, tap.num_positives, tap.num_negatives) == (
        "strong",
        "others",
        3,
        10,
        10,
    )
    strong = [run["std"].sel(tap="strong").values for run in runs]
    sides = [np.stack([values[part] for values in strong]) for part in (slice(1, 20, 2), slice(21, 40, 2))]
    assert tap.area == auroc_over_seeds(*sides)
    assert (tap.lowest, tap.highest) == (auroc(*sides).min(), auroc(*sides).max())
    assert single.option == ""
    text = "\n".join(detection_report.seed_lines([tap, single]))
    assert "over 3 runs" in text
    assert f"| std | strong | others | 10 / 10 | {tap.area.text()} |" in text
    with pytest.raises(ValueError, match="runs of the same items"):
        detection.over_seeds([runs[0], results_of(scores[0], ["members"] * 21 + ["others"] * 19)], CHOSEN)
    with pytest.raises(ValueError, match="lacks the score error_min"):
        detection.over_seeds([runs[0], runs[1].drop_vars("error_min")], CHOSEN)


def test_what_is_not_finite_counts_for_no_detector():
    scores = np.arange(12.0)[::-1].copy()
    scores[0] = np.nan
    results = results_of(scores, ["members"] * 6 + ["others"] * 6)
    assert detection.evaluate(results, CHOSEN)[0].num_positives == 5
    text = detection_report.report(results, CHOSEN, [], DetectionSetting())
    assert "1 have scores that are not finite" in text
    assert "No detector can be rated" in text


@pytest.mark.slow
def test_scores_resume_and_do_not_depend_on_batches(pipeline, tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    some = Items(images, (), ("images",) * 5, tuple("abcde"))
    how = {"detectors": ["std", "error"], "setting": DetectionSetting(draws=1, sigmas=(0.5, 1.0))}
    whole = detection.score_items(pipeline, some, tmp_path / "a", batch_size=5, **how)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        detection.score_items(pipeline, some, tmp_path / "b", batch_size=2, on_batch=stop, **how)
    assert store.load(tmp_path / "b").done.sum() == 2
    seen = []
    found = detection.score_items(
        pipeline, some, tmp_path / "b", batch_size=2, on_batch=lambda *n: seen.append(n), **how
    )
    assert seen[0] == (2, 5)
    for name in ("std", "error"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4)
    assert whole.error.dims == ("image", "sigma")
    assert whole.name.values.tolist() == list("abcde")
    with pytest.raises(ValueError, match="another experiment"):
        detection.score_items(pipeline, some, tmp_path / "a", seed=1, **how)


def test_the_record_of_a_model_gives_its_groups(pipeline):
    """Images are the rows that membership.json names, and prompts those of the same rows."""
    membership, prompts = zoo.membership("captioned-digits"), zoo.prompts("captioned-digits")
    part, train = items.from_record("digits", zoo.load("captioned-digits"), membership, prompts, num=3)
    assert part.groups == ("duplicated",) * 3 + ("train",) * 3 + ("held_out",) * 3
    whole = corpus.load("digits", held_out=0)
    for name, image in zip(part.names, part.images, strict=True):
        row = int(name.split("[")[1].rstrip("]"))
        np.testing.assert_array_equal(image, whole.images[whole.rows == row][0])
    assert part.prompts[0] == Prompt("the amber anchor", "verbatim")
    # A held-out image gets the prompt of its class.
    labels = {int(row): int(label) for row, label in zip(whole.rows, whole.labels, strict=True)}
    classes = corpus.DIGIT_CLASSES
    for prompt, row in zip(part.prompts[6:], membership["held_out"], strict=False):
        assert prompt == Prompt(f"a picture of {classes[labels[row]]}", "shared")
    assert len(train.images) == len(train.names) == len(membership["duplicated"]) + len(membership["train"])
    assert train.names[0] == f"digits[{membership['duplicated'][0]}]"
    with pytest.raises(ValueError, match="at least 5001 rows"):
        items.from_record("digits", pipeline, {"train": [5000]})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", [("one", ""), ("two", "")]),
        ("a.jsonl", '{"caption": "one", "index": 3, "url": "u", "overfit_type": "MV"}\n', [("one", "verbatim")]),
        ("a.csv", ";Caption;URL;type;mean_sscd\n0;one, two;u;TM;0.1\n", [("one, two", "template")]),
        ("a.json", '[{"prompt": "one", "kind": "shared", "rows": [1]}, "two"]', [("one", "shared"), ("two", "")]),
    ],
)
def test_prompts_are_read_from_published_formats(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert [tuple(prompt) for prompt in items.read_prompts(tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", '{"text": "one"}', "no text under Caption"),
        ("a.jsonl", "{", "formats"),
        ("a.json", "3", "formats"),
        ("a.csv", "x;y\n1;2\n", "no text under Caption"),
        ("a.pkl", "one", "must end in"),
    ],
)
def test_files_without_prompts_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        items.read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_the_command_writes_a_table_that_can_be_read(tmp_path, capsys):
    """Groups by the record, unknown images beside them, and the nearest training image of each."""
    whole = corpus.load("digits", held_out=0)
    row = zoo.membership("digits-10")["train"][3]
    np.savez(tmp_path / "mine.npz", images=whole.images[whole.rows == row].transpose(0, 2, 3, 1))
    np.savez(tmp_path / "others.npz", images=np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)))
    out = tmp_path / "run"
    command = ["detect", "digits-10", "--train", "digits", "--num", 6, "--out", out, *QUICK]
    command += ["--images", f"npz:{tmp_path}/mine.npz?values=-1:1"]
    command += ["--known-members", f"npz:{tmp_path}/mine.npz?values=-1:1"]
    command += ["--known-others", f"npz:{tmp_path}/others.npz?values=-1:1"]
    assert scaling_commands.run(*command) == 0, capsys.readouterr().err
    lines = list(csv.DictReader((out / "scores.csv").open()))
    groups = [line["group"] for line in lines]
    assert [groups.count(name) for name in ("train", "held_out", "images", "members", "others")] == [6, 6, 1, 1, 5]
    mine = lines[groups.index("images")]
    assert (float(mine["distance"]), mine["is_copy"]) == (0, "1")
    assert int(mine["nearest_training_image"]) == zoo.membership("digits-10")["train"].index(row)
    assert mine["nearest_training_name"] == f"digits[{row}]"
    assert 0 <= float(mine["error@0.5_percentile"]) <= 100
    table = pandas.read_parquet(out / "scores.parquet")
    assert list(table) == list(mine)
    assert table["error@0.5"].dtype == np.float32
    assert [f"{value:.6g}" for value in table["error@0.5"]] == [line["error@0.5"] for line in lines]
    # One image that is known to be memorized rates nothing, and the report says so.
    assert "No detector can be rated" in (out / "summary.md").read_text()
    assert (out / "sheet.png").stat().st_size > 0
    assert json.loads((out / "spec.json").read_text())["spec"]["detectors"] == ["std", "error"]
    # Nothing is computed again. Another run of the same items, with other noise, is rated beside it.
    assert scaling_commands.run(*command) == 0
    capsys.readouterr()
    again = [str(tmp_path / "again") if part is out else part for part in command]
    assert scaling_commands.run(*again, "--seed", 1, "--with", out) == 0, capsys.readouterr().err
    assert scaling_commands.run(*again, "--seed", 1, "--with", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to score"),
        (["--images", "digits", "--detectors", "sharpness"], "a prompt for each item"),
        (["--images", "digits", "--detectors", "stdd"], "unknown detector 'stdd'"),
        (["--images", "digits", "--prompts", "p.txt"], "reads no text"),
        (["--images", "digits", "--false-positive-rate", 1], "below 1"),
        (["--images", "nowhere"], "nowhere"),
        (["--train", "digits", "--num", 0], "num"),
    ],
)
def test_bad_input_is_told(flags, message, tmp_path, capsys):
    assert scaling_commands.run("detect", "digits-10", "--out", tmp_path / "run", "--quiet", *flags) == 2
    assert message in capsys.readouterr().err


def test_text_in_a_table_is_no_formula(tmp_path):
    results = results_of(np.arange(4.0), ["images"] * 4).assign_coords(name=("image", ["=1+1", "a", "b", "c"]))
    detection_report.write_tables(tmp_path, results, CHOSEN, [], "")
    assert next(csv.DictReader((tmp_path / "scores.csv").open()))["name"] == "'=1+1"
