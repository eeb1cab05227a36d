"""``python -m scaling.bench``: speed and memory of the JAX networks beside PyTorch's, with random or the zoo's weights.

Each row alternates ours and a rival in the same run; the ratio is rival / ours, so more is better. PyTorch is the rival
where it is installed: eager, in float32, with one thread or one per core, whichever is faster.

==================== ============================================== ===============================================
row                  ours                                           rival
==================== ============================================== ===============================================
``load``             :func:`scaling.load_model` of the folder       one read of its file and one transpose a tensor
``compile``          tracing and compiling the forward pass         none
``attention_memory`` attention of 4096 tokens, 8 heads              the same with the whole matrix in memory
``sd14_forward``     the forward pass, batch 1, 64x64 latents       diffusers' in PyTorch
``sd14_extract``     one pass up to ``DETECTOR_TAP``                diffusers' full pass with a hook on that layer
``train_step``       one step of training a small UNet              diffusers' with torch.optim.Adam
``jacobian_900``     a whole Jacobian, 900x900, of 20 convolutions  ``torch.func.jacrev`` in chunks
``jacobian_unet``    the same of the zoo's UNet of digits, 64x64    the same of diffusers'
``detect``           the std of one image's codes at that layer     diffusers' full pass with a hook on it
``detect_all``       all detectors of images on the zoo's digits    none
``audit_search``     1,000 nearest neighbors among 60,000 images    blocked products of matrices in numpy
==================== ============================================== ===============================================

The first five and ``detect`` are about the UNet of Stable Diffusion 1.4. The notes of a row hold its other
measurements, among them peaks of memory, each from a process of its own, and bytes of temporaries.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, logging
from absl.flags import argparse_flags

__all__ = ["ROWS", "main"]

ROWS = {
    "load": "unet.load",
    "compile": "unet.compilation",
    "attention_memory": "unet.attention_memory",
    "sd14_forward": "unet.forward",
    "sd14_extract": "unet.extract",
    "train_step": "training.train_step",
    "jacobian_900": "jacobian.jacobian_900",
    "jacobian_unet": "jacobian.jacobian_unet",
    "detect": "detection.detect",
    "detect_all": "detection.detect_all",
    "audit_search": "detection.audit_search",
}
"""Rows in the order in which they run, each with its module and function, which are imported when they run."""

SMALL = {"train_step", "jacobian_900", "jacobian_unet", "detect_all", "audit_search"}
"""Rows that do not use the UNet of Stable Diffusion."""
WITHOUT_WEIGHTS = {"compile", "attention_memory"} | SMALL
"""Rows that do not need its weights."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input or too small a machine."""
    app.run(_run, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(
        prog="python -m scaling.bench",
        description="Speed and memory of networks, such as the UNet of Stable Diffusion 1.4, beside PyTorch's.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs >= 1 (5)")
    parser.add_argument("--quick", action="store_true", help="a network ten times narrower, to try the command")
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> int:
    try:
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}.")
        # Here, so that --help and refused flags need no JAX.
        from scaling.backend import limit_blas_threads
        from sims.bench.timing import write_json

        logging.set_verbosity(logging.WARNING)
        limit_blas_threads()
        rows = _measured(args)
        if args.json:
            write_json(args.json, rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(args: argparse.Namespace) -> list[Any]:
    from scaling.bench.setting import QUICK, SD14, Bench, check_room, has_torch
    from scaling.bench.unet import write_network
    from sims.bench.timing import apart, table, threads

    config, rows = QUICK if args.quick else SD14, []
    if set(args.only) - SMALL:
        check_room(config)
    with tempfile.TemporaryDirectory() as folder:
        if set(args.only) - WITHOUT_WEIGHTS:
            apart(write_network, pathlib.Path(folder), config)
        bench = Bench(pathlib.Path(folder), config, args.repeats, args.quick)
        for name in [name for name in ROWS if name in args.only]:
            measured = _function(name)(bench)
            rows.append(measured._replace(notes={**measured.notes, "quick": True}) if args.quick else measured)
            print(f"{name} done", file=sys.stderr)
    cores = f"{threads()} threads, load average {os.getloadavg()[0]:.1f}"
    print(f"{table(rows)}\n\n{cores}, PyTorch {'beside it' if has_torch() else 'not installed'}")
    return rows


def _function(row: str) -> Callable[[Any], Any]:
    module, name = ROWS[row].split(".")
    return getattr(importlib.import_module(f"scaling.bench.{module}"), name)


if __name__ == "__main__":
    main()
