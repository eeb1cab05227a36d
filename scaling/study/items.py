"""What is examined for memorization: images, prompts or both, each with what is known of its part in training."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from dae_theory.checks import check_integer
from scaling.bridge.conditioning import image_channels, pixel_size
from scaling.bridge.loading import Pipeline
from scaling.measures.codes import pictures, read_images
from scaling.measures.neighbors import Images, Training, of_array
from scaling.training import corpus
from scaling.training.corpus import GROUPS
from sims.store import checksum
from sims.store.files import read_small

__all__ = [
    "MEMBERS",
    "OTHERS",
    "UNKNOWN",
    "Items",
    "Prompt",
    "from_record",
    "join",
    "members_of",
    "of_images",
    "of_prompts",
    "read_prompts",
    "read_rows",
    "training_of",
    "training_of_record",
]

MEMBERS = ("duplicated", "members")
"""Groups whose items count as memorized: repeated in training by the model's record, or named by the user."""

OTHERS = ("train", "held_out", "others")
"""Groups with which memorized items are compared, each by itself."""

UNKNOWN = "images"
"""The group of items of which nothing is known."""

TYPES = {"VM": "verbatim", "TM": "template", "MV": "verbatim", "TV": "template"}
"""Kinds of prompts by their labels in published files :cite:`webster23`."""


class Prompt(NamedTuple):
    """A prompt, and its kind if that is known: ``verbatim``, ``template``, ``shared`` or ""."""

    text: str
    kind: str


class Items(NamedTuple):
    """What is scored: images, prompts, or pairs of both."""

    images: Float[np.ndarray, "n c h w"] | None
    """In [-1, 1]."""
    prompts: tuple[Prompt, ...]
    """One for each image, or none."""
    groups: tuple[str, ...]
    """``duplicated``, ``train`` (trained on once) and ``held_out`` by the model's record; ``members`` and ``others`` as
    the user says; else :data:`UNKNOWN`."""
    names: tuple[str, ...]
    """Files, or rows of the data set."""


def join(parts: Sequence[Items]) -> Items:
    """Items one after the other. ``ValueError`` if there are none, or only some have images or prompts."""
    if not sum(len(part.groups) for part in parts):
        raise ValueError(
            "there is nothing to score: give --train with a model that has a record, --images or --prompts."
        )
    if len({part.images is None for part in parts}) > 1 or len({bool(part.prompts) for part in parts}) > 1:
        raise ValueError("either all items have images, or none has; and so with prompts: give them for every group.")
    images = [part.images for part in parts if part.images is not None]
    sizes = sorted({each.shape[1:] for each in images})
    if len(sizes) > 1:
        raise ValueError(f"images of sizes {' and '.join(map(str, sizes))} cannot be scored together.")
    return Items(
        np.concatenate(images) if images else None,
        tuple(itertools.chain.from_iterable(part.prompts for part in parts)),
        tuple(itertools.chain.from_iterable(part.groups for part in parts)),
        tuple(itertools.chain.from_iterable(part.names for part in parts)),
    )


def of_images(
    source: str,
    pipeline: Pipeline,
    group: str,
    prompts: Sequence[Prompt] = (),
    *,
    color: str = "",
    skip_bad: bool = False,
) -> Items:
    """All images of a source, read as by :func:`scaling.measures.codes.read_images`, with a prompt for each or none.

    ``ValueError`` for another number of prompts.
    """
    read = read_images(source, pipeline, color=color, skip_bad=skip_bad)
    count = len(read.rows)
    images = pictures(read, np.arange(count), image_channels(pipeline))
    if prompts and len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts do not match the {count} images of {source}: give one for each.")
    names = read.names or tuple(f"{source}[{row}]" for row in range(count))
    return Items(np.asarray(images), tuple(prompts), (group,) * count, tuple(names))


def of_prompts(prompts: Sequence[Prompt], group: str) -> Items:
    """Prompts without images."""
    return Items(None, tuple(prompts), (group,) * len(prompts), tuple(f"prompt {i}" for i in range(len(prompts))))


def from_record(
    dataset: str,
    pipeline: Pipeline,
    membership: Mapping[str, Sequence[int]],
    prompts: Sequence[Mapping[str, Any]] = (),
    *,
    num: int = 100,
) -> tuple[Items, Items]:
    """The first ``num`` images of each group of ``membership`` in a data set; returns also all that were trained on,
    without prompts.

    ``prompts`` are those of ``prompts.json``, with the rows that belong to each: an image that was never trained on
    gets the shared prompt of its class. ``ValueError`` for rows that the data set lacks, and for images that do not fit
    the network.
    """
    check_integer("num", num, minimum=1)
    whole, places = read_rows(dataset, pipeline)
    groups = members_of(membership, whole.size, otherwise="omit --train")
    picked = [(name, row) for name, members in groups.items() for row in members[:num]]
    chosen = [row for _, row in picked]
    texts: tuple[Prompt, ...] = ()
    if prompts:
        of_row = {row: Prompt(each["prompt"], each["kind"]) for each in prompts for row in each["rows"]}
        shared = {whole.labels[places[row]]: prompt for row, prompt in of_row.items() if prompt.kind == "shared"}
        texts = tuple(of_row.get(row) or shared.get(whole.labels[places[row]], Prompt("", "shared")) for row in chosen)
    rows = [*groups["duplicated"], *groups["train"]]
    train = Items(whole.images[places[rows]], (), ("train",) * len(rows), _names(whole, rows))
    return Items(whole.images[places[chosen]], texts, tuple(name for name, _ in picked), _names(whole, chosen)), train


def read_rows(dataset: str, pipeline: Pipeline) -> tuple[corpus.Corpus, Int[np.ndarray, " size"]]:
    """A data set with the size and channels of the network, and for each of its rows the place of its image.

    It is read as by :func:`scaling.training.corpus.load`, so that rows are those of ``membership.json``; equal rows are
    one image. Gray images are repeated over the channels of a network for colored ones. ``ValueError`` for any other
    mismatch.
    """
    (height, width), channels = pixel_size(pipeline), image_channels(pipeline)
    side = height if height == width else None
    whole = corpus.load(dataset, held_out=0, resolution=side, gray=corpus.is_folder(dataset) and channels == 1)
    if whole.images.shape[1] not in (1, channels):
        found = whole.images.shape[1]
        raise ValueError(f"{dataset}: the images have {found} channels and the network takes {channels}.")
    images = np.broadcast_to(whole.images, (len(whole.images), channels, *whole.images.shape[2:]))
    order = np.argsort(whole.rows)
    return whole._replace(images=images), order[np.searchsorted(whole.rows[order], whole.first)]


def members_of(membership: Mapping[str, Sequence[int]], size: int, *, otherwise: str) -> dict[str, list[int]]:
    """The rows of each group, for a data set of ``size`` rows.

    ``ValueError`` if there are none, which says to repair the file or do ``otherwise``, or if some lie outside.
    """
    groups = {name: list(membership.get(name, ())) for name in GROUPS}
    rows = [row for members in groups.values() for row in members]
    if not rows:
        raise ValueError(f"membership.json names no rows under {', '.join(GROUPS)}; repair it, or {otherwise}.")
    if not 0 <= min(rows) <= max(rows) < size:
        raise ValueError(
            f"the model was trained on a data set of at least {max(rows) + 1} rows, and this one has {size}: give "
            "the data set that it was trained on."
        )
    return groups


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts in a file, in its order.

    * ``.txt``: a prompt in each line;
    * ``.jsonl``: objects with ``caption`` or ``prompt``, as published with :cite:`wen24`; the kind is ``overfit_type``;
    * ``.csv``: a column ``Caption`` or ``prompt``, separated by semicolons or commas, as published by Hintersdorf et
      al. (arXiv 2406.02366); the kind is ``type`` or ``kind``;
    * ``.json``: a list of strings, or of objects as in ``prompts.json``.

    Kinds that published files label VM or MV are ``verbatim``, TM or TV ``template``. ``ValueError`` that names the
    file for anything else.
    """
    path = Path(path)
    raw = read_small(path)
    try:
        text = raw.decode("utf-8-sig")
        match path.suffix:
            case ".txt":
                found = [{"prompt": line} for line in text.splitlines() if line.strip()]
            case ".jsonl":
                found = [json.loads(line) for line in text.splitlines() if line.strip()]
            case ".csv":
                head = text.partition("\n")[0]
                found = list(csv.DictReader(io.StringIO(text), delimiter=";" if ";" in head else ","))
            case ".json":
                content = json.loads(text)
                found = [{"prompt": each} if isinstance(each, str) else each for each in content]
            case _:
                raise ValueError("the name must end in .txt, .jsonl, .csv or .json")
        prompts = tuple(_prompt(entry) for entry in found)
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"prompts {path}: {error}; see `python -m scaling detect --help` for the formats.") from error
    if not prompts:
        raise ValueError(f"prompts {path}: the file holds no prompt.")
    return prompts


def _prompt(entry: Any) -> Prompt:
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no object with a prompt")
    text = next((entry[name] for name in ("Caption", "caption", "prompt") if name in entry), None)
    if not isinstance(text, str):
        raise ValueError(f"{str(entry)[:80]} has no text under Caption, caption or prompt")
    kind = next((entry[name] for name in ("type", "overfit_type", "kind") if entry.get(name)), "")
    kind = TYPES.get(kind, kind) if isinstance(kind, str) else ""
    return Prompt(text, kind if kind in ("verbatim", "template", "shared") else "")


def _names(whole: corpus.Corpus, rows: Sequence[int]) -> tuple[str, ...]:
    return tuple(whole.files[row] if whole.files else f"{whole.name}[{row}]" for row in rows)


def training_of(source: str, pipeline: Pipeline, *, color: str = "", skip_bad: bool = False) -> Training:
    """All images of a source as a training set that is read by blocks; read as by :func:`of_images`."""
    found, channels = read_images(source, pipeline, color=color, skip_bad=skip_bad), image_channels(pipeline)
    count, shape = len(found.rows), pictures(found, np.arange(1), channels).shape[1:]
    dim = int(np.prod(shape))

    def read(start: int, stop: int) -> Float32[np.ndarray, "k d"]:
        block = pictures(found, np.arange(start, min(stop, count)), channels)
        return np.ascontiguousarray(block.reshape(len(block), dim))

    def name(number: int) -> str:
        return found.names[number] if found.names else f"{source}[{number}]"

    images = Images(read, count, dim)
    return Training(images, (shape[0], shape[1], shape[2]), name, checksum(found.rows))


def training_of_record(
    dataset: str, pipeline: Pipeline, membership: Mapping[str, Sequence[int]]
) -> tuple[Training, Items | None]:
    """What a model's record says it was trained on, each image once, and what was held out, if anything."""
    whole, places = read_rows(dataset, pipeline)
    groups = members_of(membership, whole.size, otherwise="omit --train")
    rows = [*groups["duplicated"], *groups["train"]]
    images, held_out = whole.images[places[rows]], groups["held_out"]
    flat = images.reshape(len(rows), -1)

    def name(number: int) -> str:
        repeated = " (repeated in training)" if number < len(groups["duplicated"]) else ""
        return f"{dataset}[{rows[number]}]{repeated}"

    shape = (images.shape[1], images.shape[2], images.shape[3])
    training = Training(of_array(flat), shape, name, checksum(flat))
    if not held_out:
        return training, None
    count = len(held_out)
    return training, Items(whole.images[places[held_out]], (), ("held_out",) * count, _names(whole, held_out))
