"""The ``inspect`` command: what a model is, without its weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from scaling.commands import options

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "print architecture, configuration, size and taps of a model; reads no weights"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    parser.add_argument(
        "--part", metavar="NAME", help="part of a pipeline whose taps to list, for example vae (default: the denoiser)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the model's parts, and the configuration and taps of one of them."""
    from scaling.bridge.loading import read_checkpoints

    parts = read_checkpoints(args.model, args.revision)
    shown = args.part or next(iter(parts))
    if shown not in parts:
        raise ValueError(f"{args.model} has no part {shown!r}; it has {', '.join(parts)}.")
    taps = {name: (list(tap.shape), str(tap.dtype)) for name, tap in parts[shown].taps().items()}
    summaries: dict[str, dict[str, Any]] = {
        name: {
            "architecture": part.apply.architecture,
            "class": part.config.get("_class_name") or part.config["architectures"][0],
            "parameters": part.num_parameters,
            "bytes": part.num_bytes,
            "dtype": ", ".join(part.dtypes),
            "config": part.config,
        }
        for name, part in parts.items()
    }
    if args.json:
        listed = [{"name": name, "shape": shape, "dtype": dtype} for name, (shape, dtype) in taps.items()]
        print(json.dumps({"parts": summaries, "taps_of": shown, "taps": listed}))
        return
    for name, part in summaries.items():
        print(f"{name}: {part['class']}, {part['parameters']:,} parameters, {part['dtype']}, {part['bytes']:,} bytes")
    print("\nconfig.json of the", shown)
    for field, value in summaries[shown]["config"].items():
        print(f"  {field} = {json.dumps(value)}")
    print(f"\n{len(taps)} taps of the {shown}, with their shapes for one example of the default size")
    width = max(map(len, taps), default=0)
    for name, (shape, dtype) in taps.items():
        print(f"  {name:{width}s}  {' x '.join(map(str, shape)):18s}  {dtype}")
