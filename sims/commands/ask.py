"""``python -m sims ask``: does a two-layer autoencoder on these data memorize at this noise?"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from sims.commands import options
from sims.flags import parse_out
from sims.presets import ASK
from sims.terminal import tell

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "does a two-layer autoencoder on your data memorize at this noise: the theory's answer on one page"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of the data, noise, width and penalty, and those of training."""
    options.add_data_flags(parser, defaults=ASK)
    add = parser.add_argument
    add("--train", action="store_true", help="train networks too, with and without biases, and compare")
    add("--steps", type=int, default=4000, metavar="T", help="steps of that training, >= 1 (default: 4000)")
    add("--seeds", type=int, default=3, metavar="K", help="repetitions of it, >= 1 (default: 3)")
    add("--out", metavar="DIR", required=True, type=parse_out, help="folder for ask.json and ask.md")
    add("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> None:
    """Write the answer as JSON and as Markdown, and print the latter."""
    from sims import store
    from sims.data import datasets
    from sims.store.files import write_text
    from sims.study import asking, certification

    out = pathlib.Path(args.out)
    # The sizes of nested sets are found in the data: every row is asked about unless a number is given.
    every = args.spec is None and not {"num_samples", "duplicates"} & options.given(args, options.Spec).keys()
    spec = options.spec_from_flags(args, **ASK | ({"num_samples": (2,)} if every else {}))
    options.set_precision("float64")
    asked = spec.to_dict() | {
        "width": _width(args, spec),
        "train": args.train,
        "steps": args.steps,
        "seeds": args.seeds,
    }
    if every:
        asked |= {"num_samples": None}
    with store.locked(out) as check:
        _refuse_another(out, asked)
        data = certification.only_data(spec, "ask about one", every=every)
        result = asking.ask(
            data.train,
            sigma=spec.sigma,
            width=_width(args, spec),
            penalty=spec.penalty[0],
            train=args.train,
            steps=args.steps,
            seeds=args.seeds,
            held_out=data.held_out,
            told=tell(args.quiet),
        )
        result["spec"] = asked
        result["data"] = datasets.describe(data) | result["data"]
        text = asking.as_text(result)
        check()
        write_text(out / "ask.json", json.dumps(result, indent=1) + "\n")
        write_text(out / "ask.md", text)
    if not args.quiet:
        print(text)
        print(f"Written: {out}/ask.json, {out}/ask.md")


def _refuse_another(out: pathlib.Path, asked: dict[str, Any]) -> None:
    """``ValueError`` if the folder holds other files, or the answer to another question."""
    from sims.store.files import own_folder, read_json

    path = out / "ask.json"
    if not own_folder(out, (path.name,)):
        return
    try:
        earlier = read_json(path)["spec"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no answer of this command ({error}): choose another folder.") from error
    if earlier != json.loads(json.dumps(asked)):
        raise ValueError(f"{path} answers another question: choose another folder.")


def _width(args: argparse.Namespace, spec: Any) -> int | None:
    """The width that was given; without one, a unit for each row."""
    return spec.width[0] if args.spec is not None or "width" in options.given(args, options.Spec) else None
