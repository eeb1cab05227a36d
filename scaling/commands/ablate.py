"""The ``ablate`` command: maps of detection by codes over layers, timesteps and pooling."""

from __future__ import annotations

import argparse

from scaling.commands import options

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "map over layers, timesteps and pooling how well codes tell memorized images; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    options.add_sources(parser, prompts=False)
    add = parser.add_argument_group("the map").add_argument
    options.add_places(add)
    options.add_pipeline_run(parser, batch_size=32)


def run(args: argparse.Namespace) -> None:
    """Measure what the run does not have yet; write the map; print the best places."""
    from scaling.study import maps
    from scaling.study.items import join
    from sims.store.files import claim_run
    from sims.terminal import Bar

    claim_run(args.out)
    pipeline = options.load(args)
    parts, _ = options.items_of(args, pipeline, prompts=False)
    with Bar(args.quiet, "images") as bar:
        results = maps.score_maps(
            pipeline,
            join(parts),
            args.out,
            **options.places_of(args),
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {name: getattr(args, name) for name in ("model", "train", "images")}},
            on_batch=bar.move,
        )
    places = maps.rate(results)
    files = maps.write_maps(args.out, results, places)
    if not args.quiet:
        print(maps.report(results, places))
        print(f"Written: {', '.join(map(str, files))}, {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "image")
