"""The ``jacobian`` command: singular values and vectors of the denoiser's Jacobian."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from scaling.commands import options
from scaling.study.settings import TIMESTEPS, JacobianSetting
from sims.flags import add_fields, given, parse_floats, parse_ints

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SUMMARY", "add_flags", "run", "summary"]

SUMMARY = "compute singular values and vectors of the denoiser's Jacobian at chosen images and noise levels; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    add = parser.add_argument
    add(
        "--images",
        required=True,
        metavar="SOURCE",
        help="data set, as for `train`: digits, fashion-mnist, a folder of images, a .npz file, idx:PATH; resized to "
        "the model's size",
    )
    options.add_color(add)
    options.add_skip_bad(add)
    add("--rows", type=parse_ints, metavar="I,...", help="rows of the data set (default: the first of each group)")
    add(
        "--num",
        type=int,
        default=4,
        metavar="N",
        help="without --rows: images >= 1 of each group in the model's membership.json, or of all (default: 4)",
    )
    levels = parser.add_mutually_exclusive_group()
    shown = ",".join(map(str, TIMESTEPS))
    levels.add_argument(
        "--timesteps", type=parse_ints, metavar="T,...", help=f"timesteps, from 0 to T - 1 (default: {shown})"
    )
    levels.add_argument(
        "--noise-levels", type=parse_floats, metavar="S,...", help="noise levels sigma > 0 of y = x + sigma e, instead"
    )
    add_fields(parser, JacobianSetting)
    options.add_condition(parser)
    options.add_pipeline_run(parser, batch_size=1)


def run(args: argparse.Namespace) -> None:
    """Compute what the run does not have yet, write the sheets, print means over each group."""
    from scaling.study.jacobians import analyze, choose, read_corpus_images, write_pictures
    from sims import store
    from sims.data.folders import with_options
    from sims.store.files import claim_run
    from sims.terminal import Bar

    claim_run(args.out)
    pipeline = options.load(args)
    images = read_corpus_images(with_options(args.images, color=args.color or "", skip_bad=args.skip_bad), pipeline)
    chosen = choose(images, options.membership_of(args.model), rows=args.rows, num=args.num)
    with Bar(args.quiet, "images") as bar:
        analyze(
            pipeline,
            chosen,
            args.out,
            timesteps=args.timesteps,
            sigmas=args.noise_levels,
            setting=JacobianSetting(**given(args, JacobianSetting)),
            prompt=args.prompt,
            class_label=args.class_label,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {"model": args.model, "images": args.images}},
            on_batch=bar.move,
        )
    results = store.load(args.out)
    files = write_pictures(args.out, results)
    if not args.quiet:
        print(summary(results))
        print(f"\nWritten: {', '.join(map(str, files))}, {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "image")


def summary(results: xr.Dataset) -> str:
    """A Markdown table: means ± standard errors over the images of each group and noise level.

    Images of which a value is not finite are counted, not averaged.
    """
    from scaling.study.jacobians import SUMMARIZED, group_values
    from sims.study.tables import markdown, mean_and_error

    head = ("group", "sigma", "images", "not finite", *(name.replace("_", " ") for name in SUMMARIZED))
    rows = [
        (
            entry["group"],
            f"{entry['sigma']:.4g}",
            entry["images"],
            entry["not_finite"],
            *map(mean_and_error, values.values()),
        )
        for entry, values in group_values(results)
    ]
    return markdown(head, rows)
