"""``python -m sims certify``: what the theorems say of given data."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from sims.commands import options
from sims.flags import parse_out
from sims.presets import CERTIFY
from sims.terminal import tell

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "what the theorems say of given data: conditions, regime and certificate"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of the data and the objective, and of the certificate."""
    options.add_data_flags(parser, defaults=CERTIFY)
    add = parser.add_argument
    add(
        "--max-size",
        type=int,
        default=1500,
        metavar="N",
        help="largest Hessian to diagonalize, in rows; larger ones go to Lanczos' method (default: 1500)",
    )
    add("--out", metavar="DIR", required=True, type=parse_out, help="folder for certificate.json and certificate.md")
    add("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> None:
    """Write the certificate as JSON and as Markdown, and print the latter."""
    from sims import store
    from sims.store.files import write_text
    from sims.study import certification

    args.out = pathlib.Path(args.out)
    spec = options.spec_from_flags(args, **CERTIFY)
    options.set_precision("float64")
    with store.locked(args.out) as check:
        earlier = _earlier(args.out)
        result = certification.certification(spec, max_size=args.max_size, told=tell(args.quiet))
        if earlier is not None and earlier != _identity(json.loads(json.dumps(result))):
            raise ValueError(f"{args.out} holds the certificate of other data or noise levels: choose another folder.")
        text = certification.as_text(result)
        check()
        write_text(args.out / "certificate.json", json.dumps(result, indent=1) + "\n")
        write_text(args.out / "certificate.md", text)
    if not args.quiet:
        print(text)
        print(f"Written: {args.out}/certificate.json, {args.out}/certificate.md")


def _earlier(out: pathlib.Path) -> Any:
    """Identity of the certificate in ``out``, None if the folder is empty; ``ValueError`` if it holds other files."""
    from sims.store.files import own_folder

    path = out / "certificate.json"
    if not own_folder(out, (path.name,)):
        return None
    try:
        return _identity(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no certificate ({type(error).__name__}): choose another folder.") from error


def _identity(result: dict[str, Any]) -> Any:
    return result["data"], [entry["sigma"] for entry in result["certificates"]]
