"""``python -m sims demo``: the phase diagram of the embedded digits."""

from __future__ import annotations

import argparse

from sims.commands import options, sweep
from sims.presets import DEMO

__all__ = ["SUMMARY", "add_flags", "run"]

SUMMARY = "the phase diagram of the embedded digits: a sweep over n and sigma, and its transition"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sweep, with the demo's defaults."""
    options.add_spec_flags(parser, defaults=DEMO)
    options.add_measures_flag(parser)
    options.add_sweep_flags(parser)
    options.add_run_flags(parser, default_out="runs/demo")


def run(args: argparse.Namespace) -> None:
    """Compute the sweep; write and print its summary."""
    sweep.run(args, **DEMO)
