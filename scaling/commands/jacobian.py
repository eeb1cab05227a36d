"""The ``jacobian`` command: its flags, and a run from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.bridge.loading import load_pipeline
from scaling.bridge.weights import read_json
from scaling.measures.jacobian import CHUNK
from scaling.study.jacobians import TIMESTEPS, analyze, choose, group_means, read_images, write_pictures
from scaling.training.corpus import GROUPS
from sims import store
from sims.flags import parse_floats, parse_ints
from sims.terminal import Bar

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "singular values and vectors of the denoiser's Jacobian at chosen images and noise levels; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that are the command's own."""
    add = parser.add_argument
    add(
        "--images",
        required=True,
        metavar="SOURCE",
        help="the data set, as of `train`: digits, fashion-mnist, a folder of images, a .npz file, idx:PATH; brought "
        "to the model's size",
    )
    add("--rows", type=parse_ints, metavar="I,...", help="rows of the data set (the first of each group)")
    add(
        "--num",
        type=int,
        default=4,
        metavar="N",
        help="without --rows: images of each group of the model's membership.json, or of the data set, >= 1 (4)",
    )
    levels = parser.add_mutually_exclusive_group()
    shown = ",".join(map(str, TIMESTEPS))
    levels.add_argument("--timesteps", type=parse_ints, metavar="T,...", help=f"from 0 to T - 1 ({shown})")
    levels.add_argument(
        "--noise-levels", type=parse_floats, metavar="S,...", help="instead: sigma > 0 of y = x + sigma e"
    )
    add("--rank", type=int, default=16, metavar="R", help="singular triplets >= 1 (16)")
    add("--oversample", type=int, default=2, metavar="K", help="further directions of the sketch >= 0 (2)")
    add("--iterations", type=int, default=2, metavar="Q", help="power iterations >= 0; more are more exact (2)")
    add("--full", action="store_true", help="also the whole Jacobian: all singular values, ranks, trace, asymmetry")
    add("--chunk-size", type=int, default=CHUNK, metavar="B", help=f"directions in work at once >= 1 ({CHUNK})")


def run(args: argparse.Namespace) -> str:
    """Compute, or go on, and write the sheets; returns what to tell."""
    pipeline = load_pipeline(args.model, args.dtype, args.revision, scheduler=args.scheduler)
    images = read_images(args.images, pipeline)
    chosen = choose(images, _membership(args.model), rows=args.rows, num=args.num)
    with Bar(args.quiet, "images") as bar:
        analyze(
            pipeline,
            chosen,
            args.out,
            timesteps=args.timesteps,
            sigmas=args.noise_levels,
            rank=args.rank,
            oversample=args.oversample,
            iterations=args.iterations,
            full=args.full,
            chunk_size=args.chunk_size,
            prompt=args.prompt,
            class_label=args.class_label,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {"model": args.model, "images": args.images}},
            on_batch=bar.move,
        )
    files = write_pictures(args.out)
    table = _table(group_means(store.load(args.out)))
    return f"{table}\nWritten: {', '.join(map(str, files))}, {args.out}/results.zarr, {args.out}/spec.json"


def _membership(model: str) -> dict[str, list[int]] | None:
    path = Path(model) / "membership.json"
    if not path.exists():
        return None
    found = read_json(path)
    for name in GROUPS:
        rows = found.get(name, [])
        if not isinstance(rows, list) or any(isinstance(row, bool) or not isinstance(row, int) for row in rows):
            raise ValueError(f"{path}: {name} must be a list of row numbers.")
    return {name: found.get(name, []) for name in GROUPS}


def _table(means: Sequence[Mapping[str, Any]]) -> str:
    labels = [name for name in means[0] if not name.endswith("_se") and name not in ("group", "sigma", "images")]
    lines = [f"{'group':11s} {'sigma':>9s} {'images':>6s} " + " ".join(f"{label:>19s}" for label in labels)]
    for entry in means:
        cells = []
        for label in labels:
            error = entry[f"{label}_se"]
            cells.append(f"{entry[label]:.4g}" + ("" if error is None else f" +- {error:.2g}"))
        head = f"{entry['group']:11s} {entry['sigma']:9.4g} {entry['images']:6d} "
        lines.append(head + " ".join(f"{cell:>19s}" for cell in cells))
    return "\n".join(lines)
