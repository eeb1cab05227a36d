"""The ``detect`` command: memorization scores of images and prompts, and how well they tell."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.commands import options
from scaling.detection.options import NAMES, DetectionSetting
from sims.flags import add_fields, given, parse_names

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "score images and prompts by every memorization detector, and say how well each tells; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    options.add_sources(parser)
    add = parser.add_argument_group("the rating").add_argument
    add(
        "--detectors",
        default="all",
        metavar="NAME,...",
        help=f"among {', '.join(NAMES)} (default: all that the model and the data allow)",
    )
    add(
        "--false-positive-rate",
        type=float,
        default=0.01,
        metavar="R",
        help="share of others above the threshold, from 0 to below 1 (default: 0.01)",
    )
    add(
        "--ordinary-prompts",
        metavar="FILE",
        help="prompts that are not memorized, with whose neurons those of the items are compared; formats as --prompts",
    )
    add(
        "--with",
        dest="others",
        type=parse_names,
        default=(),
        metavar="DIR,...",
        help="finished runs of the same items, of networks trained from other seeds or with another --seed: areas with "
        "intervals over seeds and items",
    )
    add_fields(parser, DetectionSetting)
    options.add_pipeline_run(parser, batch_size=32)


def run(args: argparse.Namespace) -> None:
    """Score what the run does not have yet; write the tables and the sheet; print the report."""
    from scaling.detection.detectors import check_setting
    from scaling.measures.copies import find_copies
    from scaling.study import detection, detection_report
    from scaling.study.items import join, read_prompts
    from sims.store.files import claim_run
    from sims.terminal import Bar

    if not 0 <= args.false_positive_rate < 1:
        raise ValueError(f"--false-positive-rate must be at least 0 and below 1, got {args.false_positive_rate}.")
    claim_run(args.out)
    pipeline = options.load(args)
    parts, train = options.items_of(args, pipeline)
    items = join(parts)
    setting = check_setting(
        DetectionSetting(**given(args, DetectionSetting)), pipeline.network, pipeline.schedule.num_train_timesteps
    )
    names: Any = "all" if args.detectors == "all" else args.detectors.split(",")
    ordinary = [prompt.text for prompt in read_prompts(args.ordinary_prompts)] if args.ordinary_prompts else []
    given_here = {"images": items.images is not None, "prompts": bool(items.prompts), "ordinary": bool(ordinary)}
    chosen = detection.resolve(names, pipeline, **given_here)
    originals = None if train is None else train.images
    nearest = None if originals is None or items.images is None else find_copies(items.images, originals)
    with Bar(args.quiet, "items") as bar:
        results = detection.score_items(
            pipeline,
            items,
            args.out,
            detectors=chosen,
            setting=setting,
            ordinary=ordinary,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {name: getattr(args, name) for name in ("model", "train", "images")}},
            on_batch=bar.move,
        )
    rate = args.false_positive_rate
    rows = detection.evaluate(results, chosen, false_positive_rate=rate)
    text = detection_report.report(results, chosen, rows, setting, false_positive_rate=rate)
    if args.others:
        runs = [results, *(detection.read_scores(folder) for folder in args.others)]
        text += "\n".join(detection_report.seed_lines(detection.over_seeds(runs, chosen)))
    files = detection_report.write_tables(
        args.out,
        results,
        chosen,
        rows,
        text,
        false_positive_rate=rate,
        nearest=nearest,
        names=() if train is None else train.names,
    )
    files += detection_report.write_sheet(args.out, results, chosen[0], items, nearest=nearest, train=originals)
    if not args.quiet:
        print(text)
        print(f"Written: {', '.join(map(str, files))}, {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "image")
