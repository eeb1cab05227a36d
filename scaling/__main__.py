"""``python -m scaling``: look into diffusion models, turn images into codes, sample, and train small models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, get_args

from absl import app, logging
from absl.flags import argparse_flags

from scaling.backend import limit_blas_threads
from scaling.bridge.loading import Pipeline, load_pipeline, read_checkpoints
from scaling.commands import jacobian as jacobian_command
from scaling.commands import series as series_command
from scaling.commands import train as train_command
from scaling.commands import zoo as zoo_command
from scaling.diffusion.schedules import METHODS
from scaling.measures import codes as representation
from scaling.study import generation
from sims.terminal import Bar, guarded

TEXT_GUIDANCE, CLASS_GUIDANCE = 7.5, 4.0
"""What diffusers takes if it is not told."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    logging.set_verbosity(logging.WARNING)
    limit_blas_threads()
    app.run(lambda args: args.run(args), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(prog="python -m scaling", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=guarded(run))
        sub.add_argument(
            "model", metavar="MODEL", help="folder of a diffusers pipeline or of one network, or its name on the hub"
        )
        sub.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub (its main branch)")
        return sub

    inspect = command("inspect", _inspect, "architecture, configuration, size and taps of a model; reads no weights")
    inspect.add_argument("--part", metavar="NAME", help="of a pipeline: whose taps, for example vae (the UNet's)")
    inspect.add_argument("--json", action="store_true", help="all of it as one JSON object")

    extract = command("extract", _extract, "images to codes: noise them, read the network at taps, pool; resumable")
    extract.add_argument(
        "--images",
        required=True,
        metavar="SOURCE",
        help="folder of images (cropped and resized to the model's size), .npz or .npy file, or idx:, cifar10:, npz:, "
        "images:, patches:PATH with options as in images:PATH?resize=64",
    )
    extract.add_argument(
        "--taps",
        required=True,
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="modules to read, as `inspect` lists them",
    )
    extract.add_argument(
        "--timestep", type=int, default=50, metavar="T", help="how much noise: a timestep from 0 to T - 1 (50)"
    )
    extract.add_argument(
        "--pool",
        choices=get_args(representation.Pool),
        default="max",
        help="over the positions of an image or tokens (max)",
    )
    extract.add_argument(
        "--latent", choices=get_args(representation.Latent), default="mean", help="of the autoencoder's Gaussian (mean)"
    )
    _add_condition_flags(extract)
    _add_run_flags(extract, batch_size=8, batch="images")

    sample = command("sample", _sample, "images from noise, with a contact sheet; resumable")
    sample.add_argument("--num", type=int, default=16, metavar="N", help="images >= 1 (16)")
    sample.add_argument("--steps", type=int, default=40, metavar="N", help="steps of the sampler, from 1 to T (40)")
    sample.add_argument("--sampler", choices=METHODS, help="how to walk down the noise (the scheduler's own)")
    sample.add_argument("--eta", type=float, default=0.0, help="fresh noise of ddim, from 0 to 1 (0)")
    sample.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (the empty prompt)")
    sample.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="classifier-free guidance scale; 1: none, and no second pass (7.5 with --prompt, 4 with the class of a "
        "DiT, else 1)",
    )
    sample.add_argument("--size", type=_sides, metavar="N|HxW", help="pixels, positive (the model's own)")
    _add_condition_flags(sample)
    _add_run_flags(sample, batch_size=4, batch="images")

    jacobian = command("jacobian", _telling(jacobian_command.run), jacobian_command.SUMMARY)
    jacobian_command.add_flags(jacobian)
    _add_condition_flags(jacobian)
    _add_run_flags(jacobian, batch_size=1, batch="images")

    for name, run, add_flags, summary in (
        ("train", train_command.run, train_command.add_flags, train_command.SUMMARY),
        ("transition", series_command.run_transition, series_command.add_transition_flags, series_command.TRANSITION),
        (
            "duplication",
            series_command.run_duplication,
            series_command.add_duplication_flags,
            series_command.DUPLICATION,
        ),
        ("zoo", zoo_command.run, zoo_command.add_flags, zoo_command.SUMMARY),
    ):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=guarded(_telling(run)))
        add_flags(sub)
    return parser.parse_args(argv[1:])


def _telling(run: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], None]:
    """A command that prints what ``run`` has to tell, unless it is to be quiet."""

    def told(args: argparse.Namespace) -> None:
        text = run(args)
        if not args.quiet:
            print(text)

    return told


def _add_condition_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the condition").add_argument
    add("--prompt", metavar="TEXT", help="for models that read a text (empty)")
    add("--class-label", type=int, metavar="K", help="for models with classes: an integer from 0 (a DiT's null class)")


def _add_run_flags(parser: argparse.ArgumentParser, *, batch_size: int, batch: str) -> None:
    add = parser.add_argument_group("the run").add_argument
    add("--scheduler", metavar="PATH", help="scheduler_config.json, or its folder, in place of the pipeline's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as they are stored)")
    add("--seed", type=int, default=0, help="root of all randomness >= 0 (0)")
    add("--batch-size", type=int, default=batch_size, metavar="B", help=f"{batch} at a time >= 1 ({batch_size})")
    add("--out", metavar="DIR", required=True, help="results; the same command again resumes")
    add("--quiet", action="store_true", help="no progress bar and no summary")


def _sides(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in (text if "x" in text else f"{text}x{text}").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 256 or 256x320") from None
    return height, width


def _inspect(args: argparse.Namespace) -> None:
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
    print(f"\n{len(taps)} taps of the {shown}, for one example of its own size")
    width = max(map(len, taps), default=0)
    for name, (shape, dtype) in taps.items():
        print(f"  {name:{width}s}  {' x '.join(map(str, shape)):18s}  {dtype}")


def _extract(args: argparse.Namespace) -> None:
    pipeline = _load(args)
    images = representation.read_images(args.images, pipeline)
    with Bar(args.quiet, "images") as bar:
        representation.extract(
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


def _sample(args: argparse.Namespace) -> None:
    pipeline = _load(args)
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


def _load(args: argparse.Namespace) -> Pipeline:
    return load_pipeline(args.model, args.dtype, args.revision, scheduler=args.scheduler)


def _guidance(args: argparse.Namespace, architecture: str) -> float:
    if args.guidance is not None:
        return args.guidance
    if args.prompt:
        return TEXT_GUIDANCE
    return CLASS_GUIDANCE if args.class_label is not None and architecture == "dit" else 1.0


if __name__ == "__main__":
    main()
