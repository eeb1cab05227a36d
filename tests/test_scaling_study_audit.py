"""Audits: planted copies are counted and named, repeats in the training data found, what samples exclude is said."""

import html
import json
import re

import jax.numpy as jnp
import numpy as np
import pipelines
import pytest
import scaling_commands
import xarray as xr
from networks import network

import scaling
from scaling import zoo
from scaling.diffusion.samplers import Samples
from scaling.measures.features import of_source
from scaling.measures.neighbors import Training, of_array
from scaling.study import audit, audit_report, items
from scaling.study.settings import AuditSetting
from sims import store
from sims.store.files import claim_run

SHAPE = (1, 8, 8)


def training_of(rows, digest="planted"):
    flat = np.asarray(rows, np.float32).reshape(len(rows), -1)
    return Training(of_array(flat), SHAPE, lambda i: f"image {i}", digest)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).uniform(-1, 1, (40, *SHAPE)).astype(np.float32)


@pytest.fixture
def planted(rows, monkeypatch):
    """A model that returns a training image, with a little noise, as every tenth sample on average."""

    def sample(key, network, schedule, num, steps, *, first, **how):
        def one(i):
            rng = np.random.default_rng(i)
            if rng.random() < 0.1:
                # Mostly the third image.
                original = rows[2] if rng.random() < 0.6 else rows[rng.integers(len(rows))]
                return original + 0.01 * rng.standard_normal(SHAPE)
            return rng.uniform(-1, 1, SHAPE)

        return Samples(jnp.asarray(np.stack([one(first + i) for i in range(num)]), jnp.float32), None, {})

    monkeypatch.setattr(audit, "sample", sample)
    return zoo.load("digits-10")


def test_a_planted_copier_is_audited_to_its_share(planted, rows, tmp_path):
    """300 samples of which each is a copy with probability .1; the third image stands twice, and nearly once more."""
    near = rows[2] + np.float32(0.02)
    training = training_of(np.concatenate([rows, rows[2:3], near[None]]))
    setting = AuditSetting(samples=300, steps=2)
    drawn = audit.draw(planted, training, tmp_path / "run", setting, batch_size=70)
    found = audit.conclude(drawn, training, setting)
    draws = [np.random.default_rng(i) for i in range(300)]
    copies = [i for i, rng in enumerate(draws) if rng.random() < 0.1]
    assert found["samples"]["copies"] == len(copies)
    assert found["samples"]["low"] < 0.1 < found["samples"]["high"]
    first = found["copied"][0]
    assert (first["image"], first["exact"], first["near"], first["numbers"]) == ("image 2", 2, 1, [2, 40, 41])
    assert sum(entry["copies"] for entry in found["copied"]) == len(copies)
    assert all(entry["exact"] == 1 and entry["near"] == 0 for entry in found["copied"][1:])
    text = audit_report.report(found)
    assert f"**{len(copies)} of 300 samples are copies" in text
    assert "| image 2 |" in text
    # Other batches, the same samples.
    again = audit.draw(planted, training, tmp_path / "again", setting, batch_size=300)
    np.testing.assert_array_equal(again.nearest, drawn.nearest)


def test_a_model_that_generalizes_excludes_what_its_samples_can(planted, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        audit,
        "sample",
        lambda *args, first, **how: Samples(
            jnp.asarray(np.random.default_rng(1000 + first).uniform(-1, 1, (args[3], *SHAPE)), jnp.float32), None, {}
        ),
    )
    setting = AuditSetting(samples=60, steps=2)
    training = training_of(rows)
    found = audit.conclude(audit.draw(planted, training, tmp_path, setting), training, setting)
    assert found["samples"]["copies"] == 0
    assert found["samples"]["excluded_above"] == pytest.approx(1 - 0.05 ** (1 / 60))
    text = audit_report.report(found)
    assert "more than 4.87 % of samples are copies; smaller shares they cannot exclude" in text
    assert "Which images" not in text


def test_samples_that_are_not_finite_are_no_copies(planted, rows, tmp_path, monkeypatch):
    values = jnp.full((3, *SHAPE), jnp.nan, jnp.float32)
    monkeypatch.setattr(audit, "sample", lambda *args, **how: Samples(values, None, {}))
    setting, training = AuditSetting(samples=3, steps=2), training_of(rows)
    found = audit.conclude(audit.draw(planted, training, tmp_path, setting), training, setting)
    assert (found["samples"]["copies"], found["samples"]["not_finite"]) == (0, 3)


def scored(values, groups):
    count = len(groups)
    return xr.Dataset({"error": (("image", "sigma"), np.asarray(values, float)[:, None])}, {
        "image": range(count), "sigma": [0.5], "group": ("image", groups),
    })  # fmt: skip


def test_images_at_risk_are_those_above_the_held_out_that_were_not_generated(rows):
    """Image 0 was copied; images 1 and 2 lie above all held-out images."""
    setting, training = AuditSetting(), training_of(rows)
    drawn = xr.Dataset({"nearest": ("sample", [0]), "distance": ("sample", [0.0]), "second": ("sample", [9.0])})
    scores = scored([9, 8, 7, 1, 0, *range(5)], ["train"] * 5 + ["held_out"] * 5)
    found = audit.conclude(drawn, training, setting, scores=scores, detectors=["error"])
    assert [entry["number"] for entry in found["at_risk"]] == [1, 2]
    area = found["membership"]["error@0.5"]
    # Pairs: 9, 8, 7 above all five, 1 above one and equal to one, 0 equal to one.
    assert area["area"] == pytest.approx((15 + 1.5 + 0.5) / 25)
    assert "At risk, although never generated here: 2" in audit_report.report(found)


def test_names_are_hashes_where_images_must_not_be_shown(rows):
    setting, training = AuditSetting(), training_of(rows)
    drawn = xr.Dataset({"nearest": ("sample", [3]), "distance": ("sample", [0.0]), "second": ("sample", [9.0])})
    found = audit.conclude(drawn, training, setting, anonymous=True)
    name = found["copied"][0]["image"]
    assert name.startswith("3 sha256:")
    assert len(name.split(":")[1]) == 16
    assert "<img" not in audit_report.page(found, drawn, training, pictures=False)


def test_what_changed_against_an_earlier_audit():
    def of(copied, share, digest="a"):
        return {
            "samples": {"share": share, "low": share / 2, "high": 2 * share},
            "copied": [{"image": name, "copies": 1} for name in copied],
            "training": {"digest": digest},
        }

    found = audit.compare(of("ab", 0.2), of("bc", 0.1, "b"))
    assert (found["newly_copied"], found["no_longer_copied"]) == (["a"], ["c"])
    assert (found["share"], found["same_training_data"], found["same_distance"]) == (0.1, False, True)
    with pytest.raises(ValueError, match="earlier audit lacks"):
        audit.compare(of("ab", 0.2), {"samples": {}})


def test_the_page_holds_everything_and_no_name_is_markup(rows):
    setting = AuditSetting()
    training = training_of(rows)._replace(name=lambda i: "<b>|x---y")
    images = ("sample", "channel", "height", "width"), rows[3:4]
    drawn = xr.Dataset(
        {"nearest": ("sample", [3]), "distance": ("sample", [0.0]), "second": ("sample", [9.0]), "images": images}
    )
    found = audit.conclude(drawn, training, setting)
    page = audit_report.page(found, drawn, training)
    assert html.escape("<b>") in page
    # Dashes in a name are no line of a table.
    assert "x---y" in page
    assert "<b>" not in page
    assert 'src="data:image/png;base64,' in page


def test_the_command_audits_gates_and_compares(tmp_path, capsys):
    """A small model of the zoo; the limit is one that no share exceeds, then one that any copy does."""
    command = [
        "audit",
        "digits-10",
        "--train",
        "digits",
        "--samples",
        24,
        "--steps",
        6,
        "--detectors",
        "std",
        "--quiet",
    ]
    assert scaling_commands.run(*command, "--out", tmp_path / "a", "--max-copy-share", 1) == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert first["samples"]["count"] == 24
    assert first["training"]["images"] == 10
    assert first["membership"]["std@up_blocks.0.resnets.0"]["held_out"] == 297
    # Ten images are memorized: most samples are copies.
    assert first["samples"]["low"] > 0.2
    more = ["--against", tmp_path / "a", "--no-images", "--max-copy-share", 0.1]
    assert scaling_commands.run(*command, "--out", tmp_path / "b", *more) == 3
    assert "lies above 0.1" in capsys.readouterr().err
    second = json.loads((tmp_path / "b" / "audit.json").read_text())
    assert second["samples"] == first["samples"]
    assert second["against"]["same_training_data"]
    assert "images" not in store.load(tmp_path / "b")
    assert "sha256:" in (tmp_path / "b" / "audit.md").read_text()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "clip"
    scaling.save_pretrained(network(pipelines.CASES["clip_vision"].config), folder)
    return str(folder)


@pytest.fixture
def copier(rows, monkeypatch):
    """A model whose first six samples are training images and whose next six are mirror images of others, all with a
    little noise; six more are new."""
    rng = np.random.default_rng(3)
    images = np.concatenate([rows[:6], rows[6:12, ..., ::-1]]) + 0.003 * rng.standard_normal((12, *SHAPE))
    images = np.concatenate([images, rng.uniform(-1, 1, (6, *SHAPE))]).astype(np.float32)

    def sample(key, network, schedule, num, steps, *, first, **how):
        return Samples(jnp.asarray(images[np.minimum(np.arange(first, first + num), 17)]), None, {})

    monkeypatch.setattr(audit, "sample", sample)
    return zoo.load("digits-10")


@pytest.mark.parametrize("source", ["pixels", "tap:down_blocks.0", "clip"])
def test_planted_copies_are_found_by_features_and_mirrored_ones_where_asked(source, copier, rows, tmp_path, vision):
    """Noise of .003 lies far below the distances of random images. Exact repeats stay measured in pixels."""
    training = training_of(np.concatenate([rows, rows[2:3]]))
    seen = of_source(vision if source == "clip" else source, copier)
    for mirrors, copies in ((False, 6), (True, 12)):
        setting = AuditSetting(samples=18, steps=2, near=0.01, mirrors=mirrors)
        drawn = audit.draw(copier, training, tmp_path / str(mirrors), setting, representation=seen, batch_size=7)
        found = audit.conclude(drawn, training, setting, representation=seen)
        assert found["samples"]["copies"] == copies
        assert sorted(entry["number"] for entry in found["copied"]) == list(range(copies))
        assert {entry["number"]: entry["exact"] for entry in found["copied"]}[2] == 2
        assert np.isfinite(drawn.second).all()
        distance, text = found["distance"], audit_report.report(found)
        assert (distance["near"], distance["mirrors"]) == (0.01, mirrors)
        assert ("or its mirror image" in text) == mirrors
        if seen is None:
            assert (distance["features"], distance["pixel_near"]) == ("pixels", 0.01)
            assert "within 0.01 (root mean square over pixels in [-1, 1]) count as one" in text
        else:
            # A chord of unit vectors is at most 2, a distance of pixels up to 16.
            assert float(drawn.distance.max()) < 2
            assert distance["pixel_near"] == 0.1
            assert "model" not in distance["identity"]
            assert {"clip": "CLIP's image vectors", "tap:down_blocks.0": "tap down_blocks.0, timestep 50"}[
                source
            ] in text
            assert "within 0.01 (a chord, from 0 to 2) count as one" in text


def test_an_audit_by_features_resumes_and_is_no_other(copier, rows, tmp_path):
    """Stopped while the training set is encoded: the folder is a run's, and what was encoded is not again."""
    seen, training, setting = (
        of_source("tap:down_blocks.0", copier),
        training_of(rows),
        AuditSetting(samples=18, near=0.01),
    )

    class Stop(Exception):
        pass

    def stop(done, total):
        if done:
            raise Stop

    how = {"representation": seen, "batch_size": 9}
    with pytest.raises(Stop):
        audit.draw(copier, training, tmp_path, setting, on_features=stop, **how)
    claim_run(tmp_path)
    encoded = []
    drawn = audit.draw(copier, training, tmp_path, setting, on_features=lambda *n: encoded.append(n), **how)
    assert encoded[0] == (9, 40)
    assert int(drawn.done.sum()) == 18
    audit.draw(copier, training, tmp_path, setting, on_features=encoded.append, **how)
    with pytest.raises(ValueError, match="another experiment"):
        audit.draw(copier, training, tmp_path, setting)
    with pytest.raises(ValueError, match="another experiment"):
        audit.draw(copier, training, tmp_path, AuditSetting(samples=18, near=0.01, mirrors=True), **how)


def test_what_does_not_change_samples_does_not_change_the_run(copier, rows, tmp_path):
    """Also a run from before these settings: its record has the first five alone."""
    training = training_of(rows)
    audit.draw(copier, training, tmp_path, AuditSetting(samples=18))
    assert list(store.read_spec(tmp_path)["spec"]["setting"]) == ["samples", "steps", "eta", "guidance", "near"]
    audit.draw(copier, training, tmp_path, AuditSetting(samples=18, coverage_sigma=2.0, contamination=7, views=4))


def test_a_training_set_that_counts_as_one_image_has_no_copies(copier, rows, tmp_path):
    with pytest.raises(ValueError, match="all 3 training images lie within near = 0.1"):
        audit.draw(copier, training_of(rows[[0, 0, 0]]), tmp_path, AuditSetting(samples=18))


def test_coverage_stands_beside_copied_images_and_those_at_risk(rows):
    """The copied image stands twice, so it is covered once by its repeat; one at risk has a neighbor at distance .4."""
    near = rows[1].copy()
    near[0, 0, 0] += 0.4
    setting, training = AuditSetting(coverage_sigma=0.2), training_of(np.concatenate([rows, rows[:1], near[None]]))
    drawn = xr.Dataset({"nearest": ("sample", [0]), "distance": ("sample", [0.0]), "second": ("sample", [9.0])})
    scores = scored([9, 8, 1, 1, 0, *range(5)], ["train"] * 5 + ["held_out"] * 5)
    found = audit.conclude(drawn, training, setting, scores=scores, detectors=["error"])
    assert found["copied"][0]["coverage"] == pytest.approx(1)
    assert found["at_risk"][0]["coverage"] == pytest.approx(np.exp(-2), rel=1e-4)
    assert "coverage" not in found["membership"]["error@0.5"]
    text = audit_report.report(found)
    assert "| image 0 | 1 | 2 | 0 | 1 |" in text
    assert "| image 1 | error@0.5 | 0.14 |" in text
    assert text.count("coverage, σ = 0.2") == 2
    alone = audit.conclude(drawn, training_of(rows), AuditSetting(coverage_sigma=0.001))
    assert "| image 0 | 1 | 1 | 0 | below 1e-300 |" in audit_report.report(alone)


def test_audits_by_another_distance_are_told_apart(copier, rows, tmp_path):
    setting, training = AuditSetting(samples=18, near=0.01), training_of(rows)
    found = []
    for seen in (None, of_source("tap:down_blocks.0", copier)):
        drawn = audit.draw(copier, training, tmp_path / str(seen is None), setting, representation=seen)
        found.append(audit.conclude(drawn, training, setting, representation=seen))
    assert audit.compare(found[0], found[0])["same_distance"]
    then = audit.compare(found[1], found[0])
    assert not then["same_distance"]
    assert ", by another distance" in audit_report.report(found[1] | {"against": then})
    # From before other distances could be chosen.
    earlier = {name: value for name, value in found[0].items() if name != "distance"}
    assert audit.compare(found[0], earlier)["same_distance"]


@pytest.mark.parametrize(
    "name",
    ["<img src=x onerror=y>", "a|b\\", "`c` **d** _e_", "f\n\n# g\n| h |", "[i](http://j)![k](http://l)<http://m>"],
)
def test_the_page_shows_names_as_they_are(name, rows):
    """In a cell of its own; the page has no link, no picture from elsewhere, and no literal asterisks."""
    training = training_of(rows)._replace(name=lambda i: f"{i} {name}")
    drawn = xr.Dataset({
        "nearest": ("sample", range(30)), "distance": ("sample", np.zeros(30)), "second": ("sample", np.full(30, 9.0)),
    })  # fmt: skip
    scores = scored([9] * 40 + list(range(5)), ["train"] * 40 + ["held_out"] * 5)
    found = audit.conclude(drawn, training, AuditSetting(), scores=scores, detectors=["error"])
    page = audit_report.page(found, drawn, training)
    shown = html.escape(name.replace("\n", "\\n"), quote=False).replace('"', "&quot;")
    for i in (0, 23, 30):
        assert f"<td>{i} {shown}</td>" in page
    assert "<strong>30 of 30 samples are copies" in page
    assert "**" not in page.replace(shown, "")
    assert page.count("<td>") == 24 * 5 + 4 + 10 * 3
    assert "<p>And 6 more, in audit.json.</p>" in page
    assert not re.search("<a|<img|<code|<em", page)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "tap:nowhere"], "no tap named 'nowhere'"),
        (["--features", "nowhere"], "neither pixels, nor tap:NAME"),
        (["--contamination", 2], "contamination must be at least 3"),
        (["--coverage-sigma", 0], "coverage_sigma must be positive"),
        (["--max-copy-share", 2], "must lie in"),
        (["--samples", 0], "samples"),
        (["--near", 3], "near"),
        (["--against", "nowhere"], "audit.json"),
        (["--prompts", "p.txt"], "reads no text"),
        (["--detectors", "sharpness"], "a prompt for each item"),
    ],
)
def test_bad_input_is_told(flags, message, tmp_path, capsys):
    command = ["audit", "digits-10", "--train", "digits", "--samples", 2, "--steps", 2, "--quiet"]
    assert scaling_commands.run(*command, "--out", tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_source_is_read_by_blocks(tmp_path):
    """Bytes become values in [-1, 1]; blocks are parts of the whole."""
    values = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "train.npz", images=values)
    training = items.training_of(f"npz:{tmp_path}/train.npz", zoo.load("digits-10"))
    assert (training.images.count, training.images.dim, training.shape) == (7, 64, (1, 8, 8))
    whole = values.reshape(7, -1) / 127.5 - 1
    np.testing.assert_allclose(training.images.read(2, 5), whole[2:5], atol=1e-6)
    assert len(training.images.read(6, 9)) == 1
