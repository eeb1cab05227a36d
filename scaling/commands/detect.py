"""The ``detect`` command: memorization scores of images and prompts, and how well they tell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.commands import options
from scaling.detection.options import NAMES, DetectionSetting
from sims.flags import add_fields, given

if TYPE_CHECKING:
    from scaling.bridge.loading import Pipeline
    from scaling.study.items import Items

__all__ = ["SUMMARY", "add_flags", "add_sources", "items_of", "run"]

PROMPTS = {
    "--prompts": "--images",
    "--known-member-prompts": "--known-members",
    "--known-other-prompts": "--known-others",
}

SUMMARY = "score images and prompts by every memorization detector, and say how well each tells; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    add_sources(parser)
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
    add_fields(parser, DetectionSetting)
    options.add_pipeline_run(parser, batch_size=32)


def add_sources(parser: argparse.ArgumentParser, *, prompts: bool = True) -> None:
    """Add the images, with what is known of them, and with ``prompts`` their prompts."""
    add = parser.add_argument_group("what to score").add_argument
    kinds = "folder of images, .npz or .npy file, or a data set as for `extract`"
    add(
        "--train",
        metavar="SOURCE",
        help="the data set that the model was trained on: repeated, single and held-out images by the model's "
        "membership.json are scored, and the nearest training image of every image is found; without a "
        "membership.json all of it counts as training data",
    )
    add("--num", type=int, default=100, metavar="N", help="images >= 1 of each of these groups (default: 100)")
    add("--images", metavar="SOURCE", help=f"images of which nothing is known: {kinds}")
    add("--known-members", metavar="SOURCE", help="images that are known to be memorized")
    add("--known-others", metavar="SOURCE", help="images that are known not to be")
    for name, whose in PROMPTS.items() if prompts else ():
        add(
            name,
            metavar="FILE",
            help=f"a prompt for each of {whose}, or without it prompts alone: .txt, .jsonl, .csv, .json",
        )
    options.add_color(add)
    options.add_skip_bad(add)


def run(args: argparse.Namespace) -> None:
    """Score what the run does not have yet; write the tables and the sheet; print the report."""
    from scaling.detection.detectors import check_setting
    from scaling.study import detection, detection_report
    from scaling.study.items import join
    from sims.store.files import claim_run
    from sims.terminal import Bar

    if not 0 <= args.false_positive_rate < 1:
        raise ValueError(f"--false-positive-rate must be at least 0 and below 1, got {args.false_positive_rate}.")
    claim_run(args.out)
    pipeline = options.load(args)
    parts, train = items_of(args, pipeline)
    items = join(parts)
    setting = check_setting(
        DetectionSetting(**given(args, DetectionSetting)), pipeline.network, pipeline.schedule.num_train_timesteps
    )
    names: Any = "all" if args.detectors == "all" else args.detectors.split(",")
    chosen = detection.resolve(names, pipeline, images=items.images is not None, prompts=bool(items.prompts))
    nearest = None if train is None or items.images is None else detection.nearest_images(items, train)
    with Bar(args.quiet, "items") as bar:
        results = detection.score_items(
            pipeline,
            items,
            args.out,
            detectors=chosen,
            setting=setting,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {name: getattr(args, name) for name in ("model", "train", "images")}},
            on_batch=bar.move,
        )
    rate = args.false_positive_rate
    rows = detection.evaluate(results, chosen, false_positive_rate=rate)
    text = detection_report.report(results, chosen, rows, setting, false_positive_rate=rate)
    files = detection_report.write_tables(
        args.out, results, chosen, rows, text, false_positive_rate=rate, nearest=nearest
    )
    files += detection_report.write_sheet(args.out, results, chosen[0], items, nearest=nearest, train=train)
    if not args.quiet:
        print(text)
        print(f"Written: {', '.join(map(str, files))}, {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "image")


def items_of(args: argparse.Namespace, pipeline: Pipeline) -> tuple[list[Items], Any]:
    """What the command line names, and the training images."""
    from scaling.study import items

    reads_text = bool(pipeline.text_encoders)
    parts, train = [], None
    if args.train:
        record = options.record_of(args.model)
        if record is None:
            train = items.of_images(args.train, pipeline, "train").images
        else:
            membership, prompts = record
            part, train = items.from_record(
                args.train, pipeline, membership, prompts if reads_text else (), num=args.num
            )
            parts.append(part)
    for group, source, file in (
        (items.UNKNOWN, args.images, "prompts"),
        ("members", args.known_members, "known_member_prompts"),
        ("others", args.known_others, "known_other_prompts"),
    ):
        # Commands that score images alone have no such flags.
        file = getattr(args, file, None)
        if file and not reads_text:
            raise ValueError(f"{args.model} reads no text: omit the prompts in {file}.")
        prompts = items.read_prompts(Path(file)) if file else ()
        if source:
            how = {"color": args.color or "", "skip_bad": args.skip_bad}
            parts.append(items.of_images(source, pipeline, group, prompts, **how))
        elif prompts:
            parts.append(items.of_prompts(prompts, group))
    return parts, train
