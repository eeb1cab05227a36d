"""Small trained models that come with the package, and the recipes to train them again: ``zoo.load("digits")``.

Each is a folder in the layout of diffusers, in float16, with a card (``README.md``), the rows of the data set that it
was trained on (``membership.json``) and, if it is conditioned on text, its prompts (``prompts.json``).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from scaling.bridge.loading import Pipeline, load_pipeline
from scaling.bridge.sources import ZOO
from sims.store.files import read_json

__all__ = ["RECIPES", "folder", "load", "membership", "names", "prompts", "recipe"]

REPEATED = "--duplicates 60x40 --singles 1200 --steps 4000 --save-every 1000"
FASHION = (
    "--dataset fashion-mnist --duplicates 40x60 --singles 1200 --held-out 1000 --channels 16,32,64 --save-every 1000"
)
SERIES = "--held-out 297 --channels 16,32 --steps 2000"

RECIPES = {
    "digits": REPEATED,
    "captioned-digits": f"--arch unet2d_condition --variants 20x4 {REPEATED}",
    "fashion": f"{FASHION} --steps 6000",
    "captioned-fashion": f"--arch unet2d_condition --variants 14x4 {FASHION} --steps 4500",
    "fashion-dit": "--arch dit --dataset fashion-mnist --resolution 16 --duplicates 60x40 --singles 1200 "
    "--held-out 1000 --channels 96 --layers 4 --heads 4 --steps 20000 --save-every 1000",
    **{f"digits-{n}": f"--num-samples {n} {SERIES}" for n in (10, 30, 100, 300, 750)},
}
"""Flags of ``python -m scaling train`` by name; the last five are one network on more and more images."""


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(RECIPES)


def load(name: str, dtype: Any = "float32") -> Pipeline:
    """Load one of the models; ``dtype`` as for :func:`scaling.bridge.load_pipeline`. ``ValueError`` for unknown names.

    >>> load("digits-10").network.apply.architecture
    'unet2d'
    """
    return load_pipeline(folder(name), dtype)


def folder(name: str) -> Path:
    """The folder of a model, which diffusers can open too. ``ValueError`` for unknown names."""
    recipe(name)
    return ZOO / name


def recipe(name: str) -> list[str]:
    """The flags of ``python -m scaling train`` that trained a model. ``ValueError`` for unknown names."""
    if name not in RECIPES:
        raise ValueError(f"the zoo has no model {name!r}; it has {', '.join(RECIPES)}.")
    return shlex.split(RECIPES[name])


def membership(name: str) -> dict[str, list[int]]:
    """Rows of the data set by group: ``duplicated``, ``train`` (trained on once) and ``held_out``."""
    return read_json(folder(name) / "membership.json")


def prompts(name: str) -> list[dict[str, Any]]:
    """The prompts of a model conditioned on text, each with its ``kind`` and ``rows``; none for other models."""
    file = folder(name) / "prompts.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
