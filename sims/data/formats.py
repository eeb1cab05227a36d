"""From the bytes of a data file to an array. Files are untrusted.

Sizes in a header are compared with the size of the file before anything is allocated; nothing is unpickled. Every error
is a ``ValueError`` that names the file and says what it should be.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

__all__ = [
    "FORMATS",
    "image_size",
    "labels_of",
    "npz_keys",
    "read_cifar10",
    "read_idx",
    "read_image",
    "read_npy",
    "read_npz",
    "read_picture",
]

MAX_DEFLATE = 1032
"""The largest factor by which a deflated stream can expand."""

FREE_EXPANSION = 1 << 28
PLAIN_EXPANSION = 100
"""Compressed data of more than FREE_EXPANSION bytes may expand by this factor; images and arrays expand by less."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Formats of pictures that are decoded, whatever a file's name is: others may start other programs."""

COMPONENTS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Modes of Pillow with at most 8 bits a channel; others would be clipped silently."""


def read_idx(file: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with ``ndim`` dimensions (3: images, 1: labels), plain or gzipped."""
    what = f"an IDX file of unsigned bytes in {ndim} dimension{'s' * (ndim > 1)}"
    with _readable(file, what), _unzipped(file) as (stream, expansion):
        size = file.stat().st_size
        magic = stream.read(4)
        sizes = struct.unpack(f">{ndim}I", stream.read(4 * ndim)) if magic == bytes((0, 0, 8, ndim)) else ()
        claimed = math.prod(sizes)
        plausible = sizes and claimed <= expansion * size and _is_plain(claimed, size)
        body = stream.read(claimed + 1) if plausible else b""
    if not sizes:
        raise ValueError(f"{file} is not {what}: it begins with {magic.hex()}, not {bytes((0, 0, 8, ndim)).hex()}.")
    if not plausible or len(body) != claimed:
        claim = " x ".join(map(str, sizes))
        most = min(expansion * size, max(FREE_EXPANSION, PLAIN_EXPANSION * size))
        actual = f"{len(body)}{'+' * (len(body) > claimed)}" if plausible else f"at most {most}"
        raise ValueError(f"{file} claims {claim} = {claimed} bytes of data but holds {actual}; get it again.")
    return np.frombuffer(body, np.uint8).reshape(sizes)


def read_cifar10(file: Path) -> UInt8[np.ndarray, "N 3073"]:
    """Read a batch of CIFAR-10, binary version: records of a label and 32 x 32 red, green and blue values."""
    with _readable(file, "a batch of CIFAR-10, binary version"):
        size = file.stat().st_size
        records = np.fromfile(file, np.uint8)
    if size == 0 or size % 3073:
        raise ValueError(f"{file} has {size} bytes; a batch of CIFAR-10 (binary version) has records of 3073.")
    records = records.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{file} has a label {records[:, 0].max()}; CIFAR-10 (binary version) has labels 0 to 9.")
    return records


def read_npy(file: Path) -> np.ndarray:
    """Read a .npy file."""
    with _readable(file, "a .npy file"), file.open("rb") as stream:
        return _read_array(stream, file.stat().st_size)


def read_npz(file: Path, choices: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
    """Read a .npz archive: for each of ``choices`` the array of the first key that the archive has, or None."""
    with _readable(file, "a .npz archive"), zipfile.ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        keys = [next((key for key in choice if key in members), None) for choice in choices]
        limit = file.stat().st_size
        return [None if key is None else _read_member(archive, members[key], limit) for key in keys]


def npz_keys(file: Path) -> list[str]:
    """The names of the arrays in a .npz archive."""
    with _readable(file, "a .npz archive"), zipfile.ZipFile(file) as archive:
        return [member.filename.removesuffix(".npy") for member in archive.infolist()]


def labels_of(path: Path, key: str, stored: Sequence[str]) -> str | None:
    """The array of labels that belongs to the array ``key`` by its name; ``ValueError`` if only others are there."""
    pairs = {"data": ("labels", "targets", "y"), "images": ("labels", "targets", "y"), "arr_0": ("arr_1",)}
    pairs |= {"x": ("y", "labels"), "X": ("y", "Y", "labels")}
    for stem, names in pairs.items():
        for name in names:
            candidate = re.sub(rf"(?<![a-zA-Z0-9]){stem}(?![a-zA-Z0-9])", name, key)
            if candidate != key and candidate in stored:
                return candidate
    others = [name for name in stored if re.fullmatch(r"(.*_)?([yY]|labels?|targets?)(_.*)?", name)]
    if others:
        raise ValueError(
            f"{path}: which labels belong to {key}? There are {', '.join(others)}; say ?labels=KEY, or ?labels=none."
        )
    return None


def image_size(file: Path) -> tuple[int, int]:
    """Height and width of an image as it will be read, from its header alone."""
    with _readable(file, "an image"), _opened_picture(file) as stored:
        width, height = stored.size
        # Values 5 to 8 of the orientation tag turn an image by 90 degrees.
        turned = stored.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_image(file: Path, *, gray: bool = False, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w c"]:
    """Read an image as (height, width, channels): one channel if it is gray or ``gray`` is set, else three.

    With ``size`` (height, width) it is cropped about its center to that aspect ratio and resampled.
    """
    return read_picture(file, gray=gray, size=size)[0]


def read_picture(
    file: Path, *, gray: bool = False, size: tuple[int, int] | None = None
) -> tuple[UInt8[np.ndarray, "h w c"], str]:
    """An image as from :func:`read_image`, and what of the file was not used: further frames, transparency."""
    notes: list[str] = []
    with _readable(file, "an image"), _opened_picture(file) as stored:
        stored.load()
        mode = stored.mode
        if getattr(stored, "n_frames", 1) > 1:
            notes.append("its first frame is used")
        if stored.has_transparency_data and np.asarray(stored.convert("RGBA"))[..., 3].min() < 255:
            notes.append("its transparency is not used")
        picture = ImageOps.exif_transpose(stored)
        if mode in COMPONENTS:
            picture = picture.convert("L" if gray or mode in ("1", "L", "LA") else "RGB")
        if size:
            picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
        values = np.asarray(picture)
    if mode not in COMPONENTS:
        raise ValueError(f"{file} has pixels of mode {mode}; images need 8 bits a channel: convert it first.")
    return values.reshape(*values.shape[:2], -1), f"{file}: {', '.join(notes)}" if notes else ""


@contextlib.contextmanager
def _opened_picture(file: Path) -> Iterator[Image.Image]:
    """An image whose header has been read, and whose pixels are no more than its file can hold."""
    with Image.open(file, formats=FORMATS) as stored:
        (width, height), size = stored.size, file.stat().st_size
        if not _is_plain(width * height * len(stored.getbands()), size):
            raise ValueError(f"it claims {width} x {height} pixels from {size} bytes")
        yield stored


@contextlib.contextmanager
def _readable(file: Path, what: str) -> Iterator[None]:
    # A pipe or a device would never begin, or never end.
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"cannot read {file}: it is no regular file; it should be {what}.")
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; it should be {what}.") from error
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        SyntaxError,
        tokenize.TokenError,
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{file} is damaged, or not {what}: {error}.") from error


@contextlib.contextmanager
def _unzipped(file: Path) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """The file's bytes, decompressed if it is gzipped, and the largest factor by which they can exceed its size."""
    with file.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if zipped:
            with gzip.open(raw) as stream:
                yield stream, MAX_DEFLATE
        else:
            yield raw, 1


def _is_plain(claimed: int, size: int) -> bool:
    """Whether ``size`` compressed bytes may become ``claimed`` ones: no more than images and arrays do."""
    return claimed <= max(FREE_EXPANSION, PLAIN_EXPANSION * size)


def _read_array(stream: io.BufferedIOBase | IO[bytes], size: int) -> np.ndarray:
    """Read an array in NumPy's format from a stream of ``size`` bytes."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in headers:
        raise ValueError(f"version {version} of NumPy's format holds no plain numbers")
    shape, fortran, dtype = headers[version](stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"its dtype {dtype} is not of real numbers (nothing is unpickled)")
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if min(shape, default=0) < 0 or claimed != held:
        raise ValueError(f"its header claims {claimed} bytes of data, shape {shape}, but it holds {held}")
    return np.frombuffer(stream.read(claimed), dtype).reshape(shape, order="F" if fortran else "C")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is neither stored nor deflated")
    # What the archive says of its own bytes may be as wrong as the rest.
    held = min(member.compress_size, limit)
    if member.file_size > MAX_DEFLATE * held or not _is_plain(member.file_size, held):
        raise ValueError(
            f"{member.filename} claims {member.file_size} bytes from {held}; if that is right, store it uncompressed "
            "(numpy.savez)"
        )
    with archive.open(member) as stream:
        return _read_array(stream, member.file_size)
