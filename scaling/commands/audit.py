"""The ``audit`` command: does a model copy its training data, whose, and how often?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from scaling.commands import options
from scaling.detection.options import DetectionSetting
from scaling.study.settings import AuditSetting
from sims.flags import add_fields, given, parse_names

if TYPE_CHECKING:
    import xarray as xr

    from scaling.bridge.loading import Pipeline
    from scaling.measures.neighbors import Training
    from scaling.study.items import Items

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "sample a model and say which training images it copies, how often, and which are at risk; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    add = parser.add_argument_group("the data").add_argument
    add(
        "--train",
        required=True,
        metavar="SOURCE",
        help=f"the training images: {options.KINDS}; with the model's membership.json, the rows that it names",
    )
    add("--held-out", metavar="SOURCE", help="images that were not trained on (default: those of membership.json)")
    add("--prompts", metavar="FILE", help="prompts, in turn: .txt, .jsonl, .csv, .json (default: the model's own)")
    options.add_color(add)
    options.add_skip_bad(add)
    add = parser.add_argument_group("the audit").add_argument
    add(
        "--detectors",
        type=parse_names,
        default=("std", "error"),
        metavar="NAME,...",
        help="scores of training and held-out images, as for `detect` (default: std,error)",
    )
    add("--scored", type=int, metavar="N", help="training images >= 1 to score, the first ones (default: all)")
    add(
        "--features",
        default="pixels",
        metavar="SOURCE",
        help="by what samples are compared with training images: pixels; tap:NAME, a module of the model, at timestep "
        "50, averaged over positions; or a folder of CLIP's vision weights (default: pixels)",
    )
    add("--against", metavar="DIR", help="folder of an earlier audit to compare with")
    add(
        "--max-copy-share",
        type=float,
        metavar="X",
        help="limit from 0 to 1: exit with status 3 if the whole interval of the share of copies lies above it",
    )
    add("--no-images", action="store_true", help="keep no image: name them by number and hash, and write no pictures")
    add_fields(parser, AuditSetting)
    options.add_pipeline_run(parser, batch_size=64)


def run(args: argparse.Namespace) -> None:
    """Sample, compare, score what the run does not have yet; write and print the audit."""
    from pathlib import Path

    from scaling.measures.features import of_source
    from scaling.study import audit, audit_report
    from scaling.study.contamination import contamination, plan
    from sims.store.files import claim_run
    from sims.terminal import Bar, OverLimitError

    limit = args.max_copy_share
    if limit is not None and not 0 <= limit <= 1:
        raise ValueError(f"--max-copy-share must lie in [0, 1], got {limit}.")
    claim_run(args.out)
    before = audit.read(args.against) if args.against else None
    pipeline, setting = options.load(args), AuditSetting(**given(args, AuditSetting))
    seen = of_source(args.features, pipeline, seed=args.seed)
    training, held_out, prompts = _data(args, pipeline)
    if setting.contamination:
        # Told before hours of sampling.
        plan(pipeline, training, setting)
    where = {"paths": {"model": args.model, "train": args.train, "features": args.features}}
    # The bar of features stands only where there are some.
    with Bar(args.quiet, "samples") as bar, Bar(args.quiet or seen is None, "training images") as below:
        drawn = audit.draw(
            pipeline,
            training,
            args.out,
            setting,
            representation=seen,
            prompts=prompts,
            keep_images=not args.no_images,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance=where,
            on_batch=bar.move,
            on_features=below.move,
        )
    scores = None if held_out is None else _scores(args, pipeline, training, held_out)
    found = audit.conclude(
        drawn,
        training,
        setting,
        representation=seen,
        scores=scores,
        detectors=args.detectors,
        anonymous=args.no_images,
    )
    if setting.contamination:
        how = {"seed": args.seed, "batch_size": args.batch_size, "provenance": where}
        with Bar(args.quiet, "images in views") as bar:
            views = Path(args.out) / "views"
            found["contamination"] = contamination(pipeline, training, views, setting, on_batch=bar.move, **how)
    if before is not None:
        found["against"] = audit.compare(found, before)
    files = audit_report.write(Path(args.out), found, drawn, training, pictures=not args.no_images)
    if not args.quiet:
        print(audit_report.report(found))
        print(f"Written: {', '.join(map(str, files))}")
    share = found["samples"]
    if limit is not None and share["low"] > limit:
        raise OverLimitError(
            f"the share of copies is {share['share']:.4g} ({share['low']:.4g} to {share['high']:.4g}): the "
            f"interval lies above {limit:g}."
        )


def _data(args: argparse.Namespace, pipeline: Pipeline) -> tuple[Training, Items | None, tuple[str, ...]]:
    """The training images, the held-out ones if there are any, and the prompts."""
    from scaling.study import items

    how = {"color": args.color or "", "skip_bad": args.skip_bad}
    reads_text, record, prompts = bool(pipeline.text_encoders), options.record_of(args.model), ()
    if record is None:
        training, held_out = items.training_of(args.train, pipeline, **how), None
    else:
        training, held_out = items.training_of_record(args.train, pipeline, record[0])
        prompts = tuple(each["prompt"] for each in record[1]) if reads_text else ()
    if args.held_out:
        held_out = items.of_images(args.held_out, pipeline, "held_out", **how)
    if args.prompts:
        if not reads_text:
            raise ValueError(f"{args.model} reads no text: omit --prompts.")
        prompts = tuple(prompt.text for prompt in items.read_prompts(args.prompts))
    return training, held_out, prompts


def _scores(args: argparse.Namespace, pipeline: Pipeline, training: Training, held_out: Items) -> xr.Dataset:
    """Scores of the first training images and of the held-out ones."""
    from dae_theory.checks import check_integer
    from scaling.study.detection import score_items
    from scaling.study.items import Items, join
    from sims.terminal import Bar

    count = training.images.count
    count = count if args.scored is None else min(check_integer("scored", args.scored, minimum=1), count)
    images = training.images.read(0, count).reshape(count, *training.shape)
    names = tuple(str(row) for row in range(count))
    both = join([Items(images, (), ("train",) * count, names), held_out._replace(prompts=())])
    with Bar(args.quiet, "images") as bar:
        return score_items(
            pipeline,
            both,
            f"{args.out}/scores",
            detectors=list(args.detectors),
            setting=DetectionSetting(),
            seed=args.seed,
            batch_size=args.batch_size,
            on_batch=bar.move,
        )
