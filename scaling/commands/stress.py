"""The ``stress`` command: representation against loss on hard cases."""

from __future__ import annotations

import argparse
import dataclasses

from scaling.commands import options
from scaling.detection.options import DetectionSetting
from sims.flags import add_fields, given

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "compare representation and loss as detectors on altered, easy and near-duplicate images; resumable"

USED = ("sigmas", "draws")
"""Fields of the setting that count here."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    options.add_sources(parser, prompts=False, num=400)
    add = parser.add_argument_group("the comparison").add_argument
    add(
        "--reference",
        metavar="MODEL",
        help="a model that was not trained on the memorized images, to calibrate the loss by (default: a Gaussian of "
        "the images that are not rated)",
    )
    options.add_places(add)
    unused = [field.name for field in dataclasses.fields(DetectionSetting) if field.name not in USED]
    add_fields(parser, DetectionSetting, leave_out=unused)
    options.add_pipeline_run(parser, batch_size=64)


def run(args: argparse.Namespace) -> None:
    """Score what the run does not have yet; write and print the comparison."""
    from scaling.bridge.loading import load_pipeline
    from scaling.study import stress, stress_report
    from scaling.study.items import join
    from sims.store.files import claim_run
    from sims.terminal import Bar

    claim_run(args.out)
    pipeline = options.load(args)
    items = join(options.items_of(args, pipeline, prompts=False)[0])
    reference = None if args.reference is None else load_pipeline(args.reference, "float32")
    with Bar(args.quiet, "images") as bar:
        study = stress.score_variants(
            pipeline,
            items,
            args.out,
            **options.places_of(args),
            setting=DetectionSetting(**given(args, DetectionSetting)),
            reference=reference,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {name: getattr(args, name) for name in ("model", "train", "images")}},
            on_batch=bar.move,
        )
    findings = stress.compare(study)
    name = args.reference or ""
    files = stress_report.write(args.out, findings, items, reference=name, seed=args.seed)
    if not args.quiet:
        print(stress_report.report(findings, reference=name))
        print(f"Written: {', '.join(map(str, files))}")
