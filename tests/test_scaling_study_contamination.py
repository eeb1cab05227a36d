"""The contamination ratio of a model: its views, its features, its run and its line in the audit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling_commands

from scaling import zoo
from scaling.measures.codes import codes
from scaling.measures.contamination import contamination_interval, view_covariances
from scaling.measures.neighbors import Training, of_array
from scaling.study.contamination import RIDGE, augmented, contamination, plan
from scaling.study.settings import AuditSetting
from sims import store

SHAPE = (1, 8, 8)
TAP = "down_blocks.0"


@pytest.fixture(scope="module")
def pipeline():
    return zoo.load("digits-10")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (21, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def training(images):
    return Training(of_array(images), SHAPE, str, "d")


def test_augmented_images_are_the_image_mirrored_and_shifted(key):
    """Each of the two orientations and of the nine shifts comes up as often as it should, to five standard errors."""
    image = jnp.arange(12.0).reshape(1, 3, 4)
    padded = np.pad(np.asarray(image), ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifts = [padded[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]

    def draws(number, *augment):
        keys = jax.random.split(jax.random.fold_in(key, number), 900)
        return np.asarray(jax.vmap(lambda k: augmented(k, image, augment))(keys))

    np.testing.assert_array_equal(draws(0), np.broadcast_to(image, (900, 1, 3, 4)))
    for number, augment, known in (
        (1, "flip", [np.asarray(image), np.asarray(image)[..., ::-1]]),
        (2, "shift", shifts),
    ):
        found = draws(number, augment)
        counts = np.array([np.sum((found == each).all((1, 2, 3))) for each in known])
        assert counts.sum() == 900
        share = 1 / len(known)
        assert np.abs(counts - 900 * share).max() < 5 * np.sqrt(900 * share * (1 - share))
    both = draws(3, "flip", "shift")
    flipped = np.pad(np.asarray(image)[..., ::-1], ((0, 0), (1, 1), (1, 1)), mode="edge")
    all_known = [*shifts, *(flipped[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3))]
    assert sum(np.sum((both == each).all((1, 2, 3))) for each in all_known) == 900


def test_it_is_the_ratio_of_codes_of_noise_draws(pipeline, training, images, tmp_path):
    """As of `codes` with the key of each view; evenly spaced images, in batches that resume."""
    setting = AuditSetting(contamination=11, contamination_tap=TAP, views=14)
    found = contamination(pipeline, training, tmp_path / "a", setting, batch_size=4)
    chosen = np.arange(0, 21, 2)
    assert plan(pipeline, training, setting).images.tolist() == chosen.tolist()
    key = jax.random.key(0)
    by_hand = np.stack([
        np.concatenate([
            codes(jax.random.fold_in(key, a), pipeline.network, pipeline.schedule, images[i : i + 1], [TAP], 50,
                  pool="mean", batch_size=1, first=int(i))[TAP]
            for i in chosen[:3]
        ])
        for a in range(2)
    ], axis=1)  # fmt: skip
    features = store.load(tmp_path / "a").views.values
    # float32 through a few layers, in batches of other sizes.
    np.testing.assert_allclose(features[:3, :2], by_hand, rtol=1e-3, atol=1e-4)
    ridge = RIDGE * np.trace(view_covariances(features)[0]) / features.shape[2]
    expected = contamination_interval(features, ridge=float(ridge))
    assert {name: found[name] for name in expected._fields} == pytest.approx(expected._asdict(), rel=1e-6)
    assert 0 < found["low"] < found["value"] < found["high"]
    assert (found["tap"], found["timestep"], found["images"], found["views"]) == (TAP, 50, 11, 14)
    # The ridge is too small to matter.
    assert contamination_interval(features).value == pytest.approx(expected.value, rel=0.01)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        contamination(pipeline, training, tmp_path / "b", setting, batch_size=4, on_batch=stop)
    seen = []
    again = contamination(pipeline, training, tmp_path / "b", setting, batch_size=4, on_batch=lambda *n: seen.append(n))
    assert (again, seen[0]) == (found, (4, 11))


def test_views_that_differ_more_contaminate_more(pipeline, training, tmp_path):
    """Mirror images and shifts of random images share nothing that pooled features keep."""
    setting = AuditSetting(contamination=21, contamination_tap=TAP, views=8)
    noise = contamination(pipeline, training, tmp_path / "a", setting)
    setting = AuditSetting(contamination=21, contamination_tap=TAP, views=8, augment=("flip", "shift"))
    augment = contamination(pipeline, training, tmp_path / "b", setting)
    assert augment["value"] > noise["high"]
    with pytest.raises(ValueError, match="another experiment"):
        contamination(pipeline, training, tmp_path / "a", setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contamination": 2}, "contamination must be at least 3"),
        ({"views": 1}, "views must be at least 2"),
        ({"augment": ("crop", "flip")}, "augment names crop; known are flip, shift"),
        ({"contamination_tap": "down_block"}, "no tap named 'down_block'"),
        ({"views": 3}, "21 training images in 3 views are few for the 16 features of down_blocks.0: .* at least 64"),
    ],
)
def test_bad_settings_are_named_before_anything_is_computed(changes, message, pipeline, training):
    setting = {"contamination": 100, "contamination_tap": TAP, "views": 9} | changes
    with pytest.raises(ValueError, match=message):
        plan(pipeline, training, AuditSetting(**setting))


@pytest.mark.slow
def test_the_audit_says_it_in_a_line(tmp_path, capsys):
    command = ["audit", "digits-10", "--train", "digits", "--samples", 4, "--steps", 2, "--detectors", "std", "--quiet"]
    command += ["--scored", 4, "--contamination", 10, "--contamination-tap", TAP, "--views", 8, "--augment", "shift"]
    command += ["--features", f"tap:{TAP}", "--out", tmp_path]
    assert scaling_commands.run(*command) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "audit.json").read_text())
    each = found["contamination"]
    assert each["low"] < each["value"] < each["high"]
    line = f"**Invariant contamination ratio** at {TAP}, timestep 50: {each['value']:.3f} ({each['low']:.3f} to "
    text = (tmp_path / "audit.md").read_text()
    assert line in text
    assert "of 10 training images in 8 views each (noise, shifts)" in text
    assert "second-hand" in text
    assert found["distance"]["identity"]["tap"] == TAP
    assert scaling_commands.run(*command) == 0
    assert scaling_commands.run(*command, "--views", 2, "--out", tmp_path / "other") == 2
    assert "must be at least 64" in capsys.readouterr().err
    assert not (tmp_path / "other" / "results.zarr").exists()
