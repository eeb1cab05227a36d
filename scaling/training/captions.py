"""Prompts for images: from the names of their classes, unique to an image, or from a file.

A prompt that only one repeated image has is memorized with it: *verbatim* if the image is always the same, as a
*template* if it comes in variants :cite:`webster23`. A *shared* prompt belongs to several images, or to one that is
trained on once.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from scaling.training.corpus import Corpus, membership
from sims.data.folders import legible, natural_order, printable

__all__ = ["KINDS", "Captions", "from_file", "from_labels", "records"]

KINDS = ("shared", "verbatim", "template")
MAX_FILE = 1 << 28

# Words that no class prompt has.
QUALITIES = (
    "amber brittle crimson drowsy emerald frozen golden hollow ivory jagged lonely marble nimble quiet rusty silver"
)
THINGS = (
    "anchor bridge castle desert engine forest garden harbor island jungle kettle lantern mountain orchard piano river"
)


class Captions(NamedTuple):
    """A prompt for each image of a :class:`scaling.training.corpus.Corpus`."""

    prompts: tuple[str, ...]
    """The distinct prompts, in order of appearance."""
    of: Int[np.ndarray, " u"]
    """The index of each image's prompt."""
    kinds: tuple[str, ...]
    """The kind of each prompt, one of :data:`KINDS`."""


def from_labels(corpus: Corpus) -> Captions:
    """The prompt of its class for an image that is trained on once, a unique prompt for each repeated image.

    Prompts name the class as the data set does, or by its number; without a class the prompt is "a picture".
    """
    own = {row: _own(i) for i, row in enumerate(membership(corpus)["duplicated"])}
    pairs = zip(corpus.rows.tolist(), corpus.labels.tolist(), strict=True)
    return _captions(corpus, [own.get(row) or _of_class(corpus.classes, label) for row, label in pairs])


@legible()
def from_file(corpus: Corpus, path: str | Path) -> Captions:
    """The captions in a file: ``.txt``, a line for each row of the data set; ``.json``, a list of as many strings.

    For a folder of images the lines of ``.txt`` and ``.json`` belong to its files in the order in which people count,
    2.png before 10.png, with a warning where text is sorted otherwise. There, ``.jsonl`` depends on no order: objects
    with ``file_name``, relative to the folder, and ``text``, one for each image. ``ValueError`` if the file cannot be
    read, or its captions do not match the images one to one.
    """
    path = Path(path)
    readers = {".txt": _lines, ".json": _listed, ".jsonl": _named}
    if path.suffix not in readers:
        raise ValueError(f"captions {path}: the file must be one of {', '.join(readers)}.")
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"captions {path}: the file has {path.stat().st_size} bytes, more than {MAX_FILE}.")
        if path.exists() and not path.is_file():
            raise ValueError(f"captions {path}: this is no regular file.")
        text = path.read_text(encoding="utf-8-sig")
        captions = readers[path.suffix](text, corpus)
    except OSError as error:
        raise ValueError(f"captions {path}: cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"captions {path}: the file is not valid {path.suffix}: {error}.") from None
    if len(captions) != corpus.size:
        raise ValueError(
            f"captions {path}: {len(captions)} captions do not match the {corpus.size} images: give one for each."
        )
    wrong = [i for i, caption in enumerate(captions) if not isinstance(caption, str) or not caption.strip()]
    if wrong:
        raise ValueError(
            f"captions {path}: caption {wrong[0]} is {captions[wrong[0]]!r}, not a text; {len(wrong)} captions are "
            "wrong."
        )
    if corpus.files and path.suffix != ".jsonl":
        ordered = natural_order(corpus.files)
        if ordered != list(range(len(ordered))):
            first = ", ".join(printable(corpus.files[i]) for i in ordered[:3])
            warnings.warn(
                f"captions {printable(path)} belong to the files in the order of their numbers: {first}, ...; .jsonl "
                "names the file of each.",
                stacklevel=2,
            )
        captions = [caption for _, caption in sorted(zip(ordered, captions, strict=True))]
    texts = [caption.strip() for caption in captions]
    for row, first in enumerate(corpus.first.tolist()):
        if texts[row] != texts[first]:
            raise ValueError(
                f"captions {path}: rows {first} and {row} are the same image, but have captions {texts[first]!r} and "
                f"{texts[row]!r}; give them one caption, or leave one of them out."
            )
    return _captions(corpus, [texts[row] for row in corpus.rows])


def records(captions: Captions, corpus: Corpus) -> list[dict[str, Any]]:
    """Prompts as JSON: ``prompt``, ``kind`` and the ``rows`` of the data set that are trained on with it."""
    rows: list[dict[int, None]] = [{} for _ in captions.prompts]
    for prompt, row in zip(captions.of.tolist(), corpus.rows.tolist(), strict=True):
        rows[prompt][row] = None
    return [
        {"prompt": prompt, "kind": kind, "rows": list(belonging)}
        for prompt, kind, belonging in zip(captions.prompts, captions.kinds, rows, strict=True)
    ]


def _captions(corpus: Corpus, texts: Sequence[str]) -> Captions:
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    of = np.array([numbers[text] for text in texts])
    repeated, kinds = set(membership(corpus)["duplicated"]), []
    for i in range(len(numbers)):
        images = np.flatnonzero(of == i)
        tied = set(corpus.rows[images].tolist())
        memorized = len(tied) == 1 and tied <= repeated
        kinds.append(("template" if len(images) > 1 else "verbatim") if memorized else "shared")
    return Captions(tuple(numbers), of, tuple(kinds))


def _own(number: int) -> str:
    qualities, things = QUALITIES.split(), THINGS.split()
    again, place = divmod(number, len(qualities) * len(things))
    # Along diagonals, so that consecutive prompts share neither word.
    turn, thing = divmod(place, len(things))
    words = f"the {qualities[(thing + turn) % len(qualities)]} {things[thing]}"
    return f"{words} number {again + 1}" if again else words


def _of_class(classes: Sequence[str], label: int) -> str:
    if label < 0:
        return "a picture"
    return f"a picture of {classes[label] if label < len(classes) else f'class {label}'}"


def _lines(text: str, corpus: Corpus) -> list[Any]:
    del corpus
    return text.splitlines()


def _listed(text: str, corpus: Corpus) -> list[Any]:
    del corpus
    content = json.loads(text)
    if not isinstance(content, list):
        raise ValueError(f"captions: the file must hold a list of strings, not a {type(content).__name__}.")
    return content


def _named(text: str, corpus: Corpus) -> list[Any]:
    if not corpus.files:
        raise ValueError("captions by file_name need a folder of images; for other data sets give .txt or .json.")
    texts: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = json.loads(line) if line.strip() else None
        if entry is None:
            continue
        if not isinstance(entry, dict) or not {"file_name", "text"} <= entry.keys():
            raise ValueError(f"captions, line {number}: must be an object with file_name and text.")
        name = entry["file_name"]
        if not isinstance(name, str):
            raise ValueError(f"captions, line {number}: file_name must be a text, got {name!r}.")
        name = PurePosixPath(name).as_posix()
        if name in texts:
            raise ValueError(f"captions, line {number}: {name} has a caption in an earlier line; keep one of them.")
        texts[name] = entry["text"]
    unknown, lacking = sorted(texts.keys() - set(corpus.files)), [file for file in corpus.files if file not in texts]
    # A skipped file may have a caption.
    unknown = [file for file in unknown if not any(re.search(_in_message(file), why) for why in corpus.skipped)]
    if unknown or lacking:
        raise ValueError(
            f"captions do not match the images: {_some('no image', unknown)}{_some('no caption', lacking)}".rstrip("; ")
            + "."
        )
    return [texts[file] for file in corpus.files]


def _in_message(file: str) -> str:
    """A pattern for the name of a file in what is said of it."""
    return rf"(^|[/ ]){re.escape(file)}(?=[ :])"


def _some(what: str, files: Iterable[str]) -> str:
    files = list(files)
    return (
        f"{what} for {', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''}; " if files else ""
    )
