"""``python -m sims train``: one network, with its weights and the measures along its training."""

from __future__ import annotations

import argparse

from sims.commands import options
from sims.terminal import Bar

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "train one network (axes of one value) and keep its weights and its measures at every recorded step"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of a spec, its measures and the run."""
    options.add_spec_flags(parser)
    options.add_measures_flag(parser)
    options.add_run_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Train, and print the measures after the last step."""
    from sims.sweeps import single

    spec = options.spec_from_flags(args)
    options.set_precision(spec.dtype)
    with Bar(args.quiet, "steps") as bar:
        rows = single.run(spec, options.measures_from_flags(args), args.out, on_record=bar.move)
    if not args.quiet:
        for name, value in rows[-1].items():
            # Some measures are lists.
            numbers = value if isinstance(value, list) else [value]
            print(f"{name:34s} {' '.join(f'{number:.6g}' for number in numbers)}")
        print(f"Written: {args.out}/weights.safetensors, {args.out}/course.json, {args.out}/spec.json")
