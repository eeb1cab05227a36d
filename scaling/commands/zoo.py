"""The ``zoo`` command: list the models that come with the package, or train one again by its recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling.commands import train as train_command
from sims.flags import parse_out

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "list the small models that come with this package; with a name and --out, train one again; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="model whose card to print (default: list all)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=parse_out,
        help="train the model: the run in DIR/training, the result in DIR/NAME",
    )
    parser.add_argument("--quiet", action="store_true", help="print neither progress nor summary")


def run(args: argparse.Namespace) -> None:
    """List all, print the card of one, or train it."""
    from scaling import zoo

    if args.name is None:
        if args.out is not None:
            raise ValueError("--out needs the name of a model; without both, all are listed.")
        text = "\n".join(_line(name) for name in zoo.names())
    elif args.out is None:
        text = (zoo.folder(args.name) / "README.md").read_text(encoding="utf-8")
    else:
        text = _train(args)
    if not args.quiet:
        print(text)


def _train(args: argparse.Namespace) -> str:
    from scaling import zoo
    from scaling.training.run import train
    from scaling.zoo.packing import claim, pack
    from sims.terminal import Bar

    recipe = zoo.recipe(args.name)
    parser = argparse.ArgumentParser()
    train_command.add_flags(parser)
    flags = parser.parse_args([*recipe, "--out", str(Path(args.out) / "training")])
    target = Path(args.out) / args.name
    claim(target)
    with Bar(args.quiet, "steps") as bar:
        train(train_command.spec_from_flags(flags), flags.out, save_every=flags.save_every, on_steps=bar.move)
    out = pack(flags.out, target, args.name, recipe)
    return f"Written: {out}/model_index.json, {out}/README.md, {out}/membership.json"


def _line(name: str) -> str:
    from scaling import zoo
    from scaling.zoo.packing import ETAS
    from sims.store.files import read_json

    card = read_json(zoo.folder(name) / "card.json")
    counts = " and ".join(f"{card[name]['count']} (η = {eta:g})" for name, eta in ETAS.items())
    return (
        f"{name:18s} {card['dataset']:14s} {card['parameters']:9,d} parameters, {card['training_rows']:5d} rows, "
        f"{counts} of {card['copies']['total']} samples are copies"
    )
