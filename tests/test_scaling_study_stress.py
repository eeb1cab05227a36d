"""Representation against loss on hard cases: planted scores, the Gaussian reference, words, and the command."""

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling_commands
from sklearn.covariance import LedoitWolf

from dae_theory.denoisers import gaussian_denoiser
from scaling import zoo
from scaling.detection.evaluation import Estimate
from scaling.study import stress, stress_report
from scaling.study.items import Items
from scaling.study.stress import CASES, VARIANTS, Finding, Study


def planted(members=40, others=80, *, told=("plain",), lost=(), near=None, reference=None):
    """Representation b and loss 1 tell memorized images in the variants ``told``; the loss fails in ``lost``."""
    rng, count = np.random.default_rng(0), members + others
    high = np.arange(count) < members
    representation, loss = {}, {}
    for variant in VARIANTS:
        noise = rng.normal(size=(2, count))
        representation[variant] = noise + np.array([[0.0], [6.0]]) * high * (variant in told)
        noise = rng.normal(size=(2, count))
        loss[variant] = noise + np.array([[0.0], [6.0]]) * high * (variant in told and variant not in lost)
    known = np.zeros((2, count)) if reference is None else np.stack([reference] * 2)
    return Study(
        representation, loss, dict.fromkeys(VARIANTS, known), ("a", "b"), (0.5, 1.0),
        np.arange(members), np.arange(members, count), np.zeros(count) if near is None else near,
    )  # fmt: skip


def by_name(study):
    return {(each.case, each.score): each for each in stress.compare(study)}


def test_what_only_the_representation_knows_is_found():
    found = by_name(planted(told=("plain", "redrawn", "occlude", "flip"), lost=("occlude",)))
    first = found["as they are", "representation"]
    assert (first.option, first.num_positives, first.num_negatives) == ("b", 20, 40)
    assert found["as they are", "loss"].option == "sigma = 1"
    words = {
        case.name: stress_report.verdict(found[case.name, "representation"], found[case.name, "loss"]) for case in CASES
    }
    assert words["occlude"] == "the representation tells more"
    assert words["as they are"] == words["flip"] == words["new noise"] == "both tell all apart"
    assert words["shift"] == "neither tells"
    text = stress_report.report(list(found.values()))
    assert "better than the loss in 1 of 13 cases (occlude); the loss tells them better in no case.**" in text


def test_a_place_that_tells_only_altered_images_is_chosen_anew():
    study = planted(told=("plain", "crop"), lost=("crop",))
    study.representation["crop"][:] = study.representation["crop"][::-1]
    found = by_name(study)
    assert found["crop", "representation"].area.low < 0.5 < 0.99 < found["crop", "representation, anew"].area.value
    assert found["crop", "representation, anew"].option == "a"
    assert found["crop", "loss, anew"].area.low < 0.5


def test_useless_scores_are_at_chance_although_one_was_chosen():
    """The best of 40 places on one half is at chance on the other: within four standard errors over 30 data sets."""
    areas = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        study = planted(members=20, others=20)
        noise = {variant: rng.normal(size=(40, 40)) for variant in VARIANTS}
        study = study._replace(representation=noise, options=tuple(map(str, range(40))))
        areas.append(stress.compare(study, CASES[:1])[0].area.value)
    # Of ten against ten scores at chance, the area has the variance (10 + 10 + 1)/(12 * 10 * 10).
    assert abs(np.mean(areas) - 0.5) < 4 * np.sqrt(21 / 1200 / 30)


def test_no_image_that_was_chosen_on_is_rated():
    """Scores of even images, on which everything is chosen, change no area of odd ones once the choice stands."""
    study = planted(told=("plain", "crop"))
    before = by_name(study)["crop", "representation"]
    for variant in set(VARIANTS) - {"plain"}:
        study.representation[variant][:, ::2] = 0
    assert by_name(study)["crop", "representation"] == before


def test_near_others_and_equal_difficulty():
    near = np.tile([1.0, 2.0, 3.0, 4.0], 30)
    difficulty = np.concatenate([np.linspace(0, 1, 40), np.linspace(0, 1, 80)])
    study = planted(near=near, reference=difficulty)
    members, others = study.members[1::2], study.others[1::2]
    cases = {case.name: case for case in CASES}
    chosen = stress._others(cases["near others"], study, members, others, difficulty)
    assert len(chosen) == 20
    assert near[chosen].max() <= near[np.setdiff1d(others, chosen)].min()
    matched = stress._others(cases["equal difficulty"], study, members, others, difficulty)
    assert len(set(matched)) == 20
    # Others lie 1/79 apart, every second of them is rated.
    np.testing.assert_allclose(np.sort(difficulty[matched]), difficulty[members], atol=1.01 / 79)
    same = stress._others(cases["near-duplicates"], study, members, others, difficulty)
    np.testing.assert_array_equal(same, members)


def test_a_loss_that_is_only_difficulty_is_found_out_by_calibration():
    """Memorized images that are merely easy: the loss tells them, and its ratio to the reference's does not."""
    rng = np.random.default_rng(2)
    easy = rng.normal(size=120) - 6.0 * (np.arange(120) < 40)
    study = planted(told=(), reference=easy)
    study = study._replace(loss={name: -easy + 0.1 * rng.normal(size=(2, 120)) for name in VARIANTS})
    found = by_name(study)
    assert found["as they are", "loss"].area.value > 0.99
    calibrated = found["as they are", "calibrated loss"].area
    assert calibrated.low < 0.5 < calibrated.high


def test_the_error_of_the_gaussian_is_that_of_its_denoiser(key):
    """The closed form against draws: within five standard errors, at two noise levels."""
    images, learned = np.random.default_rng(1).normal(size=(3, 4)), np.random.default_rng(2).normal(size=(30, 4)) * 2
    fitted = LedoitWolf().fit(learned)
    exact = stress.gaussian_error(images, learned, (0.3, 2.0))
    noise = jax.random.normal(key, (2000, 4))
    for sigma, row in zip((0.3, 2.0), exact, strict=True):
        denoiser = functools.partial(
            gaussian_denoiser, mean=jnp.asarray(fitted.location_), covariance=jnp.asarray(fitted.covariance_)
        )
        for x, expected in zip(images, row, strict=True):
            draws = jax.vmap(lambda e, x=x, s=sigma, d=denoiser: jnp.sum((d(jnp.asarray(x) + s * e, s) - x) ** 2))(
                noise
            )
            assert abs(draws.mean() - expected) < 5 * draws.std() / np.sqrt(2000)


def test_the_error_of_the_gaussian_has_its_limits():
    """At little noise it is the noise, at much noise the distance from the mean; a rank below full is no obstacle."""
    rng = np.random.default_rng(3)
    learned, images = rng.normal(size=(5, 12)), rng.normal(size=(2, 12))
    low, high = stress.gaussian_error(images, learned, (1e-4, 1e5))
    np.testing.assert_allclose(low, 12 * 1e-8, rtol=1e-3)
    np.testing.assert_allclose(high, np.sum((images - learned.mean(0)) ** 2, axis=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("areas", "difference", "words"),
    [
        (((0.9, 0.8, 1), (0.6, 0.4, 0.7)), (0.3, 0.1, 0.5), "the representation tells more"),
        (((0.6, 0.4, 0.7), (0.9, 0.8, 1)), (-0.3, -0.5, -0.1), "the loss tells more"),
        (((0.5, 0.4, 0.6), (0.3, 0.2, 0.4)), (0.2, 0.1, 0.3), "neither tells"),
        (((0.9, 0.8, 1), (0.8, 0.7, 0.9)), (0.1, -0.1, 0.3), "both tell; no difference shown"),
        (((0.9, 0.8, 1), (0.6, 0.4, 0.8)), (0.3, -0.1, 0.5), "the representation tells; no difference shown"),
        (((0.6, 0.4, 0.8), (0.9, 0.8, 1)), (-0.3, -0.5, 0.1), "the loss tells; no difference shown"),
        (((1, 0.9, 1), (1, 0.9, 1)), (0, 0, 0), "both tell all apart"),
    ],
)
def test_verdicts(areas, difference, words):
    first, second = (Estimate(*map(float, area)) for area in areas)
    none = Finding("a", "loss", "", 10, 10, second, None, None, None)
    own = none._replace(area=first, difference=Estimate(*map(float, difference)))
    assert stress_report.verdict(own, none) == words


def test_too_few_images_are_told(tmp_path):
    pipeline = zoo.load("digits-10")
    some = Items(np.zeros((10, 1, 8, 8), np.float32), (), ("members",) * 3 + ("others",) * 7, tuple("abcdefghij"))
    with pytest.raises(ValueError, match="3 memorized images and 7 that were never trained on: give at least eight"):
        stress.score_variants(pipeline, some, tmp_path)
    large = Items(np.zeros((16, 3, 64, 64), np.float32), (), ("members",) * 8 + ("others",) * 8, ("x",) * 16)
    with pytest.raises(ValueError, match="12288 values are too large for a Gaussian reference: give --reference"):
        stress.score_variants(pipeline, large, tmp_path)


@pytest.mark.slow
def test_the_command_writes_table_words_and_pictures_and_resumes(tmp_path, capsys):
    """On a model that copies its repeated images both tell them as they are; a second call computes nothing."""
    command = ["stress", "digits", "--train", "digits", "--num", 16, "--layers", "mid_block,up_blocks.0.resnets.1"]
    command += ["--timesteps", "50", "--pools", "max", "--draws", 1, "--sigma", "0.5", "--out", tmp_path / "run"]
    assert scaling_commands.run(*command, "--quiet") == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "run" / "stress.csv").open()))
    assert len(rows) == len(CASES) * len(stress.SCORES)
    assert all(0 <= float(row["area_low"]) <= float(row["area"]) <= float(row["area_high"]) <= 1 for row in rows)
    loss = next(row for row in rows if row["score"] == "loss")
    assert (loss["num_positives"], loss["num_negatives"], loss["difference"]) == ("8", "8", "")
    assert float(loss["area"]) > 0.9
    assert (tmp_path / "run" / "alterations.png").stat().st_size
    before = (tmp_path / "run" / "summary.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*results.zarr*")}
    assert scaling_commands.run(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*results.zarr*")} == stamps
    assert before.strip() in capsys.readouterr().out
    # A reference model in place of the Gaussian adds runs and changes the calibrated loss alone.
    assert scaling_commands.run(*command, "--quiet", "--reference", "digits-10") == 0
    anew = list(csv.DictReader((tmp_path / "run" / "stress.csv").open()))
    changed = {row["score"] for row, other in zip(rows, anew, strict=True) if row["area"] != other["area"]}
    assert "calibrated loss" in changed
    # The matched others change with the reference, and with them every score of that case.
    assert {
        row["case"]
        for row, other in zip(rows, anew, strict=True)
        if row["score"] == "loss" and row["area"] != other["area"]
    } <= {"equal difficulty"}
