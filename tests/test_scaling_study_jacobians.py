"""Jacobians of a model at images, as a run and as a command: values, groups, resuming, pictures, bad input."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from PIL import Image
from pipelines import DDIM, DDPM, PIXEL, SMALL_DIT, SMALL_VAE, save_pictures, write
from scaling_commands import parse, run

from scaling import as_denoiser, load_pipeline, save_pretrained
from scaling.bridge.loading import Pipeline
from scaling.commands import jacobian as jacobian_command
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import from_config
from scaling.study.jacobians import analyze, choose, group_means, read_corpus_images, write_pictures
from scaling.study.settings import JacobianSetting
from sims import store
from sims.data.folders import with_options
from sims.store.chunks import BOOKKEEPING

MEMBERSHIP = {"duplicated": [4, 1], "train": [0], "held_out": [5, 2]}
GRAY = PIXEL | {"in_channels": 1, "out_channels": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Six gray pictures, and a small model that says which of them it was trained on."""
    folder = tmp_path_factory.mktemp("jacobian")
    save_pictures(folder / "pictures", 6)
    model = folder / "model"
    save_pretrained(network(GRAY), model)
    write(model / "scheduler_config.json", DDPM)
    (model / "membership.json").write_text(json.dumps(MEMBERSHIP))
    return folder


@pytest.fixture(scope="module")
def finished(home):
    out = home / "out"
    asked = [
        "--timesteps",
        "20,300",
        "--rank",
        "3",
        "--num",
        "2",
        "--iterations",
        "0",
        "--full",
        "--quiet",
        "--out",
        out,
    ]
    assert run("jacobian", home / "model", "--images", home / "pictures", *asked) == 0
    return out


def test_rows_are_those_of_the_data_set_also_where_some_are_equal(home, tmp_path):
    """membership.json counts every row: equal ones must not move those after them."""
    pipeline = load_pipeline(home / "model")
    values = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    values[2] = values[0]
    np.savez(tmp_path / "rows.npz", images=values)
    images = read_corpus_images(f"npz:{tmp_path}/rows.npz", pipeline)
    np.testing.assert_allclose(images[:, 0], values / np.float32(127.5) - 1, atol=1e-6)


def test_a_folder_with_options_has_the_models_size_and_channels(home, tmp_path):
    pipeline = load_pipeline(home / "model")
    plain = read_corpus_images(str(home / "pictures"), pipeline)
    shutil.copytree(home / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "torn.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 7 images cannot be used"):
        read_corpus_images(str(tmp_path / "pictures"), pipeline)
    name = with_options(str(tmp_path / "pictures"), skip_bad=True)
    np.testing.assert_array_equal(read_corpus_images(name, pipeline), plain)
    args = parse("jacobian", "m", "--images", home / "pictures", "--out", "o", "--skip-bad", "--color", "gray")
    assert (args.skip_bad, args.color) == (True, "gray")


def test_the_command_writes_what_the_library_computes(home, finished):
    found = store.load(finished)
    assert found.row.values.tolist() == [4, 1, 0, 5, 2]
    assert found.group.values.tolist() == ["duplicated", "duplicated", "train", "held_out", "held_out"]
    np.testing.assert_allclose(found.timestep, [20, 300], atol=1e-3)
    assert found.right.dims == ("image", "level", "component", "channel", "height", "width")
    pipeline = load_pipeline(home / "model")
    images = read_corpus_images(str(home / "pictures"), pipeline)
    assert images.shape == (6, 1, 8, 8)
    denoiser = as_denoiser(pipeline.network, pipeline.schedule)
    row, sigma = 5, jnp.float32(found.sigma.values[1])
    noise = noise_at(jax.random.fold_in(jax.random.key(0), 0), row, 0, (1, 8, 8), jnp.float32)
    y = jnp.asarray(images[row]) + sigma * noise
    at = found.isel(image=3, level=1)
    np.testing.assert_allclose(at.noisy, y, atol=1e-6)
    denoised, whole = jax.jit(lambda y: (denoiser(y, sigma), jax.jacfwd(denoiser)(y, sigma)))(y)
    np.testing.assert_allclose(at.denoised, denoised, atol=1e-4)
    whole = np.asarray(whole, np.float64).reshape(64, 64)
    s = np.linalg.svd(whole, compute_uv=False)
    np.testing.assert_allclose(at.full_singular_values, s, atol=1e-5 * s[0])
    assert float(at.full_trace) == pytest.approx(np.trace(whole), abs=1e-4 * s[0])
    # Below, and within what the run says of itself.
    assert np.all(at.singular_values <= s[:3] * (1 + 1e-5))
    assert np.all(s[:3] ** 2 <= at.singular_values.values**2 + float(at.error) ** 2)
    left, right = (at[name].values.reshape(3, 64) for name in ("left", "right"))
    values = at.singular_values.values
    np.testing.assert_allclose(whole.T @ left.T, right.T * values[None, :], atol=1e-4 * s[0])
    assert int(at.kept) == np.sum(values > 0.5)
    assert float(at.top_energy) == pytest.approx(np.sum(values**2) / float(at.energy), rel=1e-5)


def test_groups_have_means_and_standard_errors(finished):
    found, means = store.load(finished), json.loads((finished / "groups.json").read_text())
    assert means == group_means(found)
    assert [entry["group"] for entry in means] == ["duplicated"] * 2 + ["train"] * 2 + ["held_out"] * 2
    values = found.singular_values.values[3:, 0, 0].astype(float)
    assert means[4]["largest"] == pytest.approx(values.mean())
    assert means[4]["largest_se"] == pytest.approx(abs(values[0] - values[1]) / 2)
    assert means[2]["largest_se"] is None
    # The command's table has the same numbers.
    rows = [line.split(" | ") for line in jacobian_command.summary(found).splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [entry["group"] for entry in means]
    assert rows[4][3:5] == ["0", f"{means[4]['largest']:.3g} ± {means[4]['largest_se']:.1g}"]
    assert rows[2][4] == f"{means[2]['largest']:.3g}"


def test_sheets_have_a_line_for_every_image(finished):
    with Image.open(finished / "right_1.png") as picture:
        sheet = np.asarray(picture)
    # Tiles of 8 pixels enlarged 12 times: noisy, denoised and three vectors of each of the five images, and labels.
    head, room = sheet.shape[0] - (5 * 98 + 2), sheet.shape[1] - (5 * 98 + 2)
    assert min(head, room) > 10
    sheet = sheet[head:, room:]
    at = store.load(finished).isel(image=1, level=1)
    vector = at.right.values[2, 0]
    tile = sheet[98 + 2 : 98 + 98, 4 * 98 + 2 : 5 * 98][6::12, 6::12].astype(float) / 127.5 - 1
    np.testing.assert_allclose(tile, vector / np.max(np.abs(vector)), atol=1 / 127)
    with np.load(finished / "jacobian.npz") as arrays:
        assert {"row", "group", "sigma", "singular_values", "right", "left"} <= set(arrays)
        assert all(array.dtype != object for array in arrays.values())


def test_a_cut_run_goes_on_with_the_same_numbers(home, finished, tmp_path):
    pipeline = load_pipeline(home / "model")
    chosen = choose(read_corpus_images(str(home / "pictures"), pipeline), MEMBERSHIP, num=2)
    setting = JacobianSetting(rank=3, iterations=0, full=True)
    asked = functools.partial(analyze, pipeline, chosen, tmp_path, timesteps=[20, 300], setting=setting)

    def cut(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(on_batch=cut)
    with pytest.raises(ValueError, match="no finished Jacobians"):
        write_pictures(tmp_path)
    seen = []
    asked(on_batch=lambda *where: seen.append(where))
    assert seen[0] == (2, 5)
    found, expected = store.load(tmp_path), store.load(finished)
    for name in set(expected.data_vars) - set(BOOKKEEPING):
        np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(ValueError, match="rank is 3 there and 2 here"):
        asked(setting=JacobianSetting(rank=2, iterations=0, full=True))


@pytest.mark.slow
def test_latents_are_looked_at_with_a_class(tmp_path):
    pipeline = Pipeline(network(SMALL_DIT | {"num_layers": 1}), from_config(DDIM), network(SMALL_VAE), (), (), {})
    save_pictures(tmp_path / "pictures", 2)
    chosen = choose(read_corpus_images(str(tmp_path / "pictures"), pipeline), num=1)
    setting = JacobianSetting(rank=1, iterations=0)
    analyze(pipeline, chosen, tmp_path / "out", sigmas=[0.5], setting=setting, class_label=3)
    found = store.load(tmp_path / "out")
    assert found.right.shape == (1, 1, 1, 4, 8, 8)
    assert found.group.values.tolist() == ["image"]
    assert np.all(np.isfinite(found.singular_values))
    write_pictures(tmp_path / "out")
    with Image.open(tmp_path / "out" / "left_0.png") as sheet:
        # Four channels side by side: tiles of 8 x 32, enlarged 3 times, of the image, its denoised one and a vector.
        assert sheet.mode == "L"
        assert np.all(np.asarray(sheet)[-26:-2, -98 * 3 : -2].std(axis=0) >= 0)
        assert sheet.size[0] > 3 * 98 + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--rank", "65"], "rank must be at most 64, got 65"),
        (["--timesteps", "1000"], "timesteps must be at most 999, got 1000"),
        (["--noise-levels", "0"], "noise levels must be positive"),
        (["--noise-levels", "1,1"], "name every noise level once"),
        (["--rows", "6"], "rows must be at most 5, got 6"),
        (["--rows", "1,1"], "rows must name each image once"),
        (["--num", "0"], "num must be at least 1"),
        (["--prompt", "a cat"], "reads no text"),
        (["--images", "nowhere"], "there is no 'nowhere'"),
        (["--chunk-size", "0"], "chunk_size must be at least 1"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(flags, message, home, tmp_path, capsys):
    images = [] if "--images" in flags else ["--images", home / "pictures"]
    assert run("jacobian", home / "model", *images, *flags, "--quiet", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_membership_must_fit_the_data_set():
    images = np.zeros((3, 1, 2, 2), np.float32)
    with pytest.raises(ValueError, match="at least 6 rows, and this one has 3"):
        choose(images, MEMBERSHIP)
    with pytest.raises(ValueError, match="names no rows"):
        choose(images, {})
    assert choose(images, num=2).groups == ("image", "image")
    assert choose(images, {"train": [2]}, rows=[2, 0]).groups == ("train", "image")


def test_colors_and_damaged_membership_are_refused(home, tmp_path, capsys):
    np.savez(tmp_path / "colored.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    out = ["--quiet", "--out", tmp_path / "out"]
    assert run("jacobian", home / "model", "--images", tmp_path / "colored.npz", *out) == 2
    assert "3 channels and the network takes 1" in capsys.readouterr().err
    model = tmp_path / "model"
    save_pretrained(network(GRAY), model)
    write(model / "scheduler_config.json", DDPM)
    (model / "membership.json").write_text(json.dumps({"train": "all"}))
    assert run("jacobian", model, "--images", home / "pictures", *out) == 2
    assert "train must be a list of row numbers" in capsys.readouterr().err
