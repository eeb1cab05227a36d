"""What to say of a model without readable weights: what lies there instead, and how to convert it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["no_weights", "not_safetensors"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WHY = (
    "only safetensors weights are read, because .bin, .pt and .ckpt files are pickles, which can run any code when "
    "opened. If you trust them, convert once, with PyTorch"
)


def not_safetensors(path: Path, named: str) -> str:
    """The message for a weights file that is no safetensors file; ``named`` is the class of its config.json, or empty.

    Files with the ending of a pickle get a command that converts them.
    """
    if path.suffix not in PICKLES:
        return f"{path}: not a .safetensors file; give such a file, or the folder of a model."
    if named:
        return f"{path.name}: {WHY}: {_by_class(named, str(path.parent))}"
    target = str(path.with_suffix(""))
    return (
        f"{path.name}: {WHY}. A checkpoint of a whole Stable Diffusion without a config.json becomes a pipeline by "
        f"{_command('diffusers', f'StableDiffusionPipeline.from_single_file({json.dumps(str(path))})', target)}"
    )


def no_weights(place: str, names: Sequence[str] | None, expected: Sequence[str], named: str) -> str:
    """The message for a folder without the ``expected`` files.

    ``names`` are those that it holds, None if that is not known; ``named`` is the class of its weights.
    """
    wanted = f"{place}: no weights; expected {' or '.join(expected)}"
    if names is None:
        return f"{wanted}. Weights in other formats must be converted to safetensors first, with PyTorch."
    if special := [name for name in names if name in expected]:
        return f"{place}/{special[0]}: not a file, but a folder, a device, a pipe or a link that leads nowhere."
    if variants := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{wanted}; there are only {', '.join(variants)}. To load one of these, give its own path; in a pipeline, "
            f"copy it to {expected[0]} first."
        )
    if any(name.endswith(PICKLES) and (Path(place) / name).is_file() for name in names):
        return f"{wanted}; {WHY}: {_by_class(named, place)}"
    return f"{wanted}."


def _by_class(named: str, place: str) -> str:
    library = "transformers" if named.startswith("CLIP") else "diffusers"
    target = f"{place}-safetensors"
    load = f"{named}.from_pretrained({json.dumps(place)}, use_safetensors=False)"
    return f"{_command(library, load, target)}, then load {target}, or copy its safetensors files into {place}"


def _command(library: str, load: str, target: str) -> str:
    code = f"import {library}; {library}.{load}.save_pretrained({json.dumps(target)})"
    return f"python -c {shlex.quote(code)}"
