"""The ``extract`` command: images to codes."""

from __future__ import annotations

import argparse

from scaling.commands import options
from scaling.measures.options import LATENTS, POOLS

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "turn images into codes: add noise, read the network at taps, pool; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    add = parser.add_argument
    add(
        "--images",
        required=True,
        metavar="SOURCE",
        help="folder of images (cropped and resized to the model's size), .npz or .npy file, or idx:, cifar10:, npz:, "
        "images:, patches:PATH with options as in images:PATH?resize=64",
    )
    options.add_color(add)
    options.add_skip_bad(add)
    add(
        "--taps",
        required=True,
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="modules whose activations to read; `inspect` lists them",
    )
    add(
        "--timestep",
        type=int,
        default=50,
        metavar="T",
        help="timestep of the noise to add, from 0 to T - 1 (default: 50)",
    )
    add("--pool", choices=POOLS, default="max", help="how to pool over positions or tokens (default: max)")
    add(
        "--latent",
        choices=LATENTS,
        default="mean",
        help="which latents to take from the autoencoder's Gaussian (default: mean)",
    )
    options.add_condition(parser)
    options.add_pipeline_run(parser, batch_size=8)


def run(args: argparse.Namespace) -> None:
    """Compute the codes that the run does not have yet."""
    from scaling.measures.codes import extract, read_images
    from sims.store.files import claim_run
    from sims.terminal import Bar

    claim_run(args.out)
    pipeline = options.load(args)
    images = read_images(args.images, pipeline, color=args.color or "", skip_bad=args.skip_bad)
    with Bar(args.quiet, "images") as bar:
        extract(
            pipeline,
            images,
            args.taps,
            args.timestep,
            args.out,
            pool=args.pool,
            prompt=args.prompt,
            class_label=args.class_label,
            latent=args.latent,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {"model": args.model, "images": args.images}},
            on_batch=bar.move,
        )
    if not args.quiet:
        print(f"Written: {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "image")
