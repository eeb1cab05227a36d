"""The ``transition`` command: networks on more and more training images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from scaling.commands import options
from scaling.commands.summaries import cell, share_cell, write_summary
from scaling.study.settings import NUM_SAMPLES, ExaminationSetting
from scaling.training.spec import TrainSpec, spec_of
from sims.flags import add_fields, parse_ints

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SUMMARY", "add_flags", "run", "summary"]

SUMMARY = "train networks on more and more images, two on disjoint halves: when do they stop copying? resumable"

CHANNELS = (16, 32)
"""Default channels: small networks, because a series trains many."""

FIXED = (
    "num_samples",
    "duplicates",
    "singles",
    "variants",
    "held_out",
    "offset",
    "split_seed",
    "captions",
    "text_channels",
    "text_layers",
    "tokenizer",
    "prompt_dropout",
    "seed",
)
"""Fields of the training spec that are no options here: the series sets them, or they have no effect."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--num-samples",
        dest="sizes",
        type=parse_ints,
        default=NUM_SAMPLES,
        metavar="N,...",
        help=f"training images of each half, increasing, >= 2 (default: {','.join(map(str, NUM_SAMPLES))})",
    )
    add_fields(parser, TrainSpec, leave_out=FIXED, defaults={"channels": CHANNELS})
    options.add_color(parser.add_argument)
    add_fields(parser, ExaminationSetting)
    options.add_series_run(parser)


def run(args: argparse.Namespace) -> None:
    """Train and examine, or resume; sweep two-layer autoencoders; write and print a summary."""
    from scaling.study.series import transition, two_layer
    from sims.terminal import Bar

    base = spec_of({"channels": CHANNELS, **options.training_of(args)})
    setting = options.examination_of(args)
    with Bar(args.quiet, "pairs") as bar:
        results = transition(
            base, args.sizes, args.out, seeds=args.seeds, setting=setting, workers=args.workers, on_unit=bar.move
        )
    with Bar(args.quiet, "cells") as bar:
        shallow = two_layer(
            base,
            args.sizes,
            args.out,
            seeds=args.seeds,
            sigmas=setting.sigmas,
            on_unit=lambda progress: bar.move(progress.done, progress.total, ""),
        )
    text = summary(results, shallow)
    written = write_summary(args.out, results, text, ("num_samples", "seed", "half"))
    if not args.quiet:
        print(f"{text}\n{written}")


def summary(results: xr.Dataset, shallow: xr.Dataset) -> str:
    """A Markdown table over n: means over seeds ± standard errors, of the deep and of the two-layer networks.

    Shares of copies have intervals over seeds and samples together.
    """
    from sims.study.tables import markdown

    sigma, tap = results.sigma.values[results.sizes["sigma"] // 2], results.tap.values[0]
    deep = results.mean("half")
    train, held_out = (deep.sel(group=group, sigma=sigma, tap=tap) for group in ("train", "held_out"))
    two = shallow.gap.sel(sigma=sigma)
    columns = {
        "agreement": results.agreement,
        "agreement by chance": results.agreement_unpaired,
        f"gap, σ = {sigma:g}": deep.gap.sel(sigma=sigma),
        "gap, two layers": two.isel({dim: 0 for dim in two.dims if dim not in ("num_samples", "seed")}),
        "std of codes at training images": train["std"],
        "std at held-out images": held_out["std"],
        "rank of J at training images": train.jacobian_rank,
        "rank at held-out images": held_out.jacobian_rank,
        "‖D − D_emp‖² at training images": train.distance_to_empirical,
        "‖D − D_emp‖² at held-out images": held_out.distance_to_empirical,
        "‖D − D_pop‖² at training images": train.distance_to_population,
        "‖D − D_pop‖² at held-out images": held_out.distance_to_population,
    }
    # The halves of a seed share their order of the data: they count as one network of twice as many samples.
    copied = {
        f"copies, η = {eta:g} (95 % interval)": results.copied.sel(eta=eta).stack(drawn=("half", "sample"))
        for eta in results.eta.values
    }
    rows = [
        [
            n,
            *(share_cell(of_eta.sel(num_samples=n), results.done.sel(num_samples=n)) for of_eta in copied.values()),
            *(cell(column.sel(num_samples=n)) for column in columns.values()),
        ]
        for n in results.num_samples.values
    ]
    return (
        f"Means over {results.sizes['seed']} seeds ± standard errors; codes at {tap}.\n\n"
        f"{markdown(['n', *copied, *columns], rows)}\n\n"
        f"Rank of the Jacobian J and distances at σ = {sigma:g}. Squared distances are sums over pixels; D_emp is the "
        "optimal denoiser of the training set, D_pop that of the population, the Wiener filter of held-out images.\n"
    )
