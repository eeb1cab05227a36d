"""The ``train`` command: a small diffusion model on images."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling.commands import options
from scaling.training.spec import DEFAULTS, TrainSpec, spec_of
from sims.flags import add_fields

__all__ = ["SUMMARY", "add_flags", "architecture_defaults", "run", "spec_from_flags"]

SUMMARY = "train a small diffusion model on images, some of them repeated; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of :class:`scaling.training.spec.TrainSpec`, and those of the run."""
    parser.epilog = architecture_defaults()
    add_fields(parser, TrainSpec)
    options.add_color(parser.add_argument)
    add = parser.add_argument_group("the run").add_argument
    add("--devices", type=int, metavar="N", help="devices >= 1 to split a batch over (default: all, if they divide it)")
    add("--save-every", type=int, default=500, metavar="N", help="steps >= 1 between checkpoints (default: 500)")
    options.add_output(add)


def architecture_defaults() -> str:
    """One sentence on defaults that depend on the architecture."""
    parts = []
    for arch, defaults in DEFAULTS.items():
        values = (",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in defaults.values())
        shown = [f"--{name.replace('_', '-')} {value}" for name, value in zip(defaults, values, strict=True)]
        parts += [f"with --arch {arch}, {', '.join(shown)}"] if shown else []
    return f"Defaults differ {'; '.join(parts)}."


def spec_from_flags(args: argparse.Namespace) -> TrainSpec:
    """The spec that the command line gives; ``ValueError`` for values that ``TrainSpec`` refuses."""
    return spec_of(options.training_of(args))


def run(args: argparse.Namespace) -> None:
    """Train, or resume."""
    from scaling.training.run import RECORD, train
    from sims.store.files import read_json
    from sims.terminal import Bar

    spec = spec_from_flags(args)
    with Bar(args.quiet, "steps") as bar:
        train(spec, args.out, save_every=args.save_every, devices=args.devices, on_steps=bar.move)
    if not args.quiet:
        repeats = read_json(Path(args.out) / RECORD).get("repeats", 0)
        if repeats:
            print(f"{repeats} rows of the data set repeat an earlier one: equal rows are one image, on one side.")
        print(f"Written: {args.out}/model_index.json, {args.out}/membership.json, {args.out}/training.json")
