"""Data files, whole, damaged and hostile: each is read right or refused by name, before memory is taken."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from sims.data import formats

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx_bytes(array, kind=8, sizes=None):
    sizes = array.shape if sizes is None else sizes
    return bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + array.tobytes()


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(content, name="data"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(file, pack):
    np.testing.assert_array_equal(formats.read_idx(file(pack(idx_bytes(PIXELS))), 3), PIXELS)
    labels = np.array([3, 1, 9], np.uint8)
    np.testing.assert_array_equal(formats.read_idx(file(pack(idx_bytes(labels))), 1), labels)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(PIXELS)[:-1], r"claims 2 x 3 x 4 = 24 bytes of data but holds 23"),
        (idx_bytes(PIXELS) + b"\0", r"claims 2 x 3 x 4 = 24 bytes of data but holds 25\+"),
        (idx_bytes(PIXELS, kind=13), r"begins with 00000d03, not 00000803"),
        (idx_bytes(PIXELS[0]), r"begins with 00000802, not 00000803"),
        (idx_bytes(PIXELS)[:9], "damaged"),
        (b"", "begins with , not 00000803"),
        (b"not an IDX file at all", "begins with 6e6f7420"),
    ],
)
def test_damaged_idx_is_refused(file, pack, content, message):
    path = file(pack(content))
    with pytest.raises(ValueError, match=message) as error:
        formats.read_idx(path, 3)
    assert str(path) in str(error.value)


def test_truncated_gzip_is_refused(file):
    content = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 9, 9), np.uint8)))
    for cut in (3, 15, len(content) // 2, len(content) - 4):
        with pytest.raises(ValueError, match="damaged"):
            formats.read_idx(file(content[:cut]), 3)


def refused_without_memory(read, message):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sizes", [(60000, 28, 28), (2**32 - 1,) * 3, (2**31, 2**31, 4)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_absurd_idx_sizes_take_no_memory(file, pack, sizes):
    path = file(pack(idx_bytes(PIXELS, sizes=sizes)))
    refused_without_memory(lambda: formats.read_idx(path, 3), "claims")


@pytest.mark.parametrize(
    "array", [PIXELS, np.asfortranarray(np.eye(3)[:2]), np.array([1.5, -2.0], ">f4"), np.array([True])]
)
def test_npy_round_trip(file, array):
    np.testing.assert_array_equal(formats.read_npy(file(npy_bytes(array))), array)


def with_header(shape, descr="<f8", data=b"\0" * 16):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("shape", [(2**40, 2**40), (10**9,), (-1, -2), (1,), (3,)])
def test_npy_headers_that_lie_take_no_memory(file, shape):
    path = file(with_header(shape))
    refused_without_memory(lambda: formats.read_npy(path), "header claims|damaged")


def test_an_honest_handmade_header_is_read(file):
    np.testing.assert_array_equal(formats.read_npy(file(with_header((2,)))), np.zeros(2))


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(file):
    boxed = np.array([Explosive()], dtype=object)
    for content in (npy_bytes(boxed), pickle.dumps(Explosive()), npy_bytes(np.array(["text"]))):
        with pytest.raises(ValueError, match=r"damaged, or not a \.npy file"):
            formats.read_npy(file(content))
    stream = io.BytesIO()
    np.savez(stream, x=boxed)
    with pytest.raises(ValueError, match="unpickled"):
        formats.read_npz(file(stream.getvalue()), [["x"]])


@pytest.mark.parametrize("content", [npy_bytes(PIXELS)[:-1], npy_bytes(PIXELS)[:20], b"", npy_bytes(PIXELS) + b"0"])
def test_damaged_npy_is_refused(file, content):
    path = file(content)
    with pytest.raises(ValueError, match=r"damaged, or not a \.npy file") as error:
        formats.read_npy(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_takes_the_first_key_that_is_there(file, save):
    stream = io.BytesIO()
    save(stream, x=PIXELS, images=PIXELS + 1)
    array, other = formats.read_npz(file(stream.getvalue()), [["data", "images", "x"], ["labels"]])
    np.testing.assert_array_equal(array, PIXELS + 1)
    assert other is None


def test_damaged_npz_is_refused(file):
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.random.default_rng(0).random(1000))
    content = bytearray(stream.getvalue())
    for damaged in (content[:-10], content[:100], content[:500] + bytes(20) + content[520:], b"PK"):
        with pytest.raises(ValueError, match="npz archive"):
            formats.read_npz(file(bytes(damaged)), [["x"]])


def test_npz_members_that_lie_take_no_memory(file):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", with_header((10**9,)))
        archive.writestr("y.npy", npy_bytes(PIXELS), zipfile.ZIP_BZIP2)
    path = file(stream.getvalue())
    refused_without_memory(lambda: formats.read_npz(path, [["x"]]), "header claims")
    refused_without_memory(lambda: formats.read_npz(path, [["y"]]), "neither stored nor deflated")


def record(label, value):
    return bytes([label]) + bytes([value]) * 3072


def test_cifar10_records(file):
    records = formats.read_cifar10(file(record(3, 7) + record(9, 255)))
    assert records.shape == (2, 3073)
    np.testing.assert_array_equal(records[:, 0], [3, 9])


@pytest.mark.parametrize(
    ("content", "message"),
    [(record(1, 2)[:-1], "has 3072 bytes"), (b"", "has 0 bytes"), (record(10, 0), "a label 10")],
)
def test_damaged_cifar10_is_refused(file, content, message):
    with pytest.raises(ValueError, match=message):
        formats.read_cifar10(file(content))


@pytest.mark.parametrize("read", [lambda f: formats.read_idx(f, 3), formats.read_npy, formats.read_cifar10])
def test_missing_files_are_named(tmp_path, read):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="cannot read") as error:
            read(path)
        assert str(path) in str(error.value)


def save_image(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_images_keep_their_channels(tmp_path):
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    color = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(formats.read_image(save_image(tmp_path / "g.png", gray)), gray[..., None])
    path = save_image(tmp_path / "c.png", color)
    np.testing.assert_array_equal(formats.read_image(path), color)
    luma = color @ np.array([0.299, 0.587, 0.114])
    # Rounded to an integer, with weights of 16 bits.
    np.testing.assert_allclose(formats.read_image(path, gray=True)[..., 0], luma, atol=0.51)


def test_resizing_crops_about_the_center(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    path = save_image(tmp_path / "wide.png", wide)
    np.testing.assert_array_equal(formats.read_image(path, size=(4, 4)), np.full((4, 4, 1), 200))
    assert formats.read_image(path, size=(2, 6)).shape == (2, 6, 1)


def test_the_orientation_tag_is_obeyed(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    wide = np.array([[10, 20, 30]], np.uint8)
    path = save_image(tmp_path / "turned.png", wide, exif=tags)
    np.testing.assert_array_equal(formats.read_image(path)[..., 0], wide.T)


def test_damaged_and_clipping_images_are_refused(tmp_path):
    path = save_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (30, 30), np.uint8))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        formats.read_image(path)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is damaged, or not an image"):
        formats.read_image(path)
    deep = save_image(tmp_path / "deep.png", np.full((2, 2), 40000, np.uint16))
    with pytest.raises(ValueError, match=r"deep\.png has pixels of mode I;16"):
        formats.read_image(deep)


def test_only_formats_of_photographs_are_decoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    for read in (formats.read_image, formats.image_size):
        with pytest.raises(ValueError, match=r"a\.png is damaged, or not an image: cannot identify"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("read", [formats.read_image, formats.read_npy, formats.read_cifar10, formats.npz_keys])
def test_pipes_are_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: it is no regular file"):
        read(tmp_path / "pipe")


def test_expansion_is_bounded_before_it_happens(file, monkeypatch):
    monkeypatch.setattr(formats, "FREE_EXPANSION", 1 << 12)
    zeros = np.zeros((100, 100, 100), np.uint8)
    stream = io.BytesIO()
    np.savez_compressed(stream, x=zeros)
    path = file(stream.getvalue())
    refused_without_memory(lambda: formats.read_npz(path, [["x"]]), "claims 1000128 bytes from")
    path = file(gzip.compress(idx_bytes(zeros)))
    refused_without_memory(lambda: formats.read_idx(path, 3), "holds at most")
    Image.new("RGB", (100, 100)).save(path.with_suffix(".png"))
    for read in (formats.image_size, formats.read_image):
        refused_without_memory(lambda read=read: read(path.with_suffix(".png")), "claims 100 x 100 pixels from")


def test_an_archive_that_lies_about_its_own_bytes_is_bounded_by_its_size(file, monkeypatch):
    monkeypatch.setattr(formats, "FREE_EXPANSION", 1 << 12)
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros(10**6, np.uint8))
    content = bytearray(stream.getvalue())
    # The compressed size in the archive's table.
    place = content.index(b"PK\x01\x02") + 20
    content[place : place + 4] = struct.pack("<I", 10**6)
    path = file(bytes(content))
    refused_without_memory(lambda: formats.read_npz(path, [["x"]]), "claims 1000128 bytes from")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = save_image(tmp_path / "bomb.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"bomb\.png is damaged.*exceeds limit"):
        formats.read_image(path)
