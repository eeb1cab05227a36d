"""The ``zoo`` command: what there is, and any of it trained anew by its recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaling import zoo
from scaling.bridge.weights import read_json
from scaling.commands import train as train_command
from scaling.training.run import train
from scaling.zoo.packing import ETAS, pack
from sims.terminal import Bar

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "the small models that come with this package; with a name and --out, train one anew by its recipe; resumable"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a model (all are listed)")
    parser.add_argument("--out", metavar="DIR", help="train the model there: DIR/training, and packed in DIR/NAME")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def run(args: argparse.Namespace) -> str:
    """List, tell the card of one, or train it; returns what to tell."""
    if args.name is None:
        if args.out is not None:
            raise ValueError("--out needs the name of a model; without both, all are listed.")
        return "\n".join(_line(name) for name in zoo.names())
    flags = zoo.recipe(args.name)
    if args.out is None:
        return (zoo.folder(args.name) / "README.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    train_command.add_flags(parser)
    asked = parser.parse_args([*flags, "--out", str(Path(args.out) / "training")])
    with Bar(args.quiet, "steps") as bar:
        train(train_command.spec_from_flags(asked), asked.out, save_every=asked.save_every, on_steps=bar.move)
    out = pack(asked.out, Path(args.out) / args.name, args.name, flags)
    return f"Written: {out}/model_index.json, {out}/README.md, {out}/membership.json"


def _line(name: str) -> str:
    card = read_json(zoo.folder(name) / "card.json")
    counts = " and ".join(f"{card[name]['count']} (η = {eta:g})" for name, eta in ETAS.items())
    return (
        f"{name:18s} {card['dataset']:14s} {card['parameters']:9,d} parameters, {card['training_rows']:5d} rows, "
        f"{counts} of {card['copies']['total']} samples are copies"
    )
