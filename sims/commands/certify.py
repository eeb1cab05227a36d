"""``python -m sims certify``: what the theorems say of given data."""

from __future__ import annotations

import argparse
import json
import pathlib

from sims.commands import options
from sims.presets import CERTIFY

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
    add("--out", metavar="DIR", required=True, type=pathlib.Path, help="folder for certificate.json and certificate.md")
    add("--quiet", action="store_true", help="print nothing")


def run(args: argparse.Namespace) -> None:
    """Write the certificate as JSON and as Markdown, and print the latter."""
    from sims.store.files import write_text
    from sims.study import certification

    spec = options.spec_from_flags(args, **CERTIFY)
    options.set_precision("float64")
    result = certification.certification(spec, max_size=args.max_size)
    text = certification.as_text(result)
    write_text(args.out / "certificate.json", json.dumps(result, indent=1) + "\n")
    write_text(args.out / "certificate.md", text)
    if not args.quiet:
        print(text)
        print(f"Written: {args.out}/certificate.json, {args.out}/certificate.md")
