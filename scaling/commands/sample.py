"""The ``sample`` command: images from noise."""

from __future__ import annotations

import argparse

from scaling.commands import options
from scaling.diffusion.choices import METHODS

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "draw images from noise, with a contact sheet; resumable"

TEXT_GUIDANCE, CLASS_GUIDANCE = 7.5, 4.0
"""The default guidance scales of diffusers."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_model(parser)
    add = parser.add_argument
    add("--num", type=int, default=16, metavar="N", help="images >= 1 (default: 16)")
    add("--steps", type=int, default=40, metavar="N", help="steps of the sampler, from 1 to T (default: 40)")
    add("--sampler", choices=METHODS, help="sampling method (default: the one that the scheduler's config names)")
    add("--eta", type=float, default=0.0, help="share of fresh noise in ddim, from 0 to 1 (default: 0)")
    add("--negative-prompt", metavar="TEXT", help="prompt that guidance leads away from (default: the empty prompt)")
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="scale of classifier-free guidance; 1: none, and no second pass (default: 7.5 with --prompt, 4 with the "
        "class of a DiT, else 1)",
    )
    add("--size", type=_sides, metavar="N|HxW", help="size in pixels, positive (default: the model's own)")
    options.add_condition(parser)
    options.add_pipeline_run(parser, batch_size=4)


def run(args: argparse.Namespace) -> None:
    """Draw the images that the run does not have yet, and write them as pictures."""
    from scaling.study import generation
    from sims.store.files import claim_run
    from sims.terminal import Bar

    claim_run(args.out)
    pipeline = options.load(args)
    guidance = _guidance(args, pipeline.network.apply.architecture)
    with Bar(args.quiet, "images") as bar:
        generation.generate(
            pipeline,
            args.num,
            args.steps,
            args.out,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            class_label=args.class_label,
            guidance=None if guidance == 1 else guidance,
            method=args.sampler,
            eta=args.eta,
            size=args.size,
            seed=args.seed,
            batch_size=args.batch_size,
            provenance={"paths": {"model": args.model}},
            on_batch=bar.move,
        )
    files = generation.write_pictures(args.out)
    if not args.quiet:
        print(f"Written: {files[0].parent}, {files[-2]}, {files[-1]}, {args.out}/results.zarr, {args.out}/spec.json")
    options.check_finite(args.out, "sample")


def _sides(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in (text if "x" in text else f"{text}x{text}").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 256 or 256x320") from None
    return height, width


def _guidance(args: argparse.Namespace, architecture: str) -> float:
    if args.guidance is not None:
        return args.guidance
    if args.prompt:
        return TEXT_GUIDANCE
    return CLASS_GUIDANCE if args.class_label is not None and architecture == "dit" else 1.0
