"""The ``duplication`` command: networks some of whose training images repeat."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from scaling.commands import options
from scaling.commands.summaries import cell, share_cell, write_summary
from scaling.study.settings import ExaminationSetting
from scaling.training.spec import TrainSpec, spec_of
from sims.flags import add_fields, parse_ints, parse_names

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SUMMARY", "add_flags", "run", "summary"]

SUMMARY = "train networks some of whose images repeat: which images do they copy? resumable"

STEPS = (1000, 2000)
"""Default training times."""

FIXED = (
    "num_samples",
    "duplicates",
    "variants",
    "held_out",
    "offset",
    "split_seed",
    "captions",
    "text_channels",
    "text_layers",
    "tokenizer",
    "steps",
    "prompt_dropout",
    "seed",
)
"""Fields of the training spec that are no options here: the series sets them, or all networks take the default."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--duplicates",
        dest="repeats",
        type=parse_names,
        default=(TrainSpec.duplicates,),
        metavar="KxM,...",
        help=f"repeat K images M times each; a network for each KxM (default: {TrainSpec.duplicates})",
    )
    parser.add_argument(
        "--steps",
        dest="times",
        type=parse_ints,
        default=STEPS,
        metavar="N,...",
        help=f"training steps >= 1, increasing, after each of which the network is examined (default: "
        f"{','.join(map(str, STEPS))})",
    )
    add_fields(parser, TrainSpec, leave_out=FIXED)
    options.add_color(parser.add_argument)
    add_fields(parser, ExaminationSetting)
    options.add_series_run(parser)


def run(args: argparse.Namespace) -> None:
    """Train and examine, or resume; write and print a summary."""
    from scaling.study.series import duplication
    from sims.terminal import Bar

    with Bar(args.quiet, "trainings") as bar:
        results = duplication(
            spec_of(options.training_of(args)),
            args.repeats,
            args.times,
            args.out,
            seeds=args.seeds,
            setting=options.examination_of(args),
            workers=args.workers,
            on_unit=bar.move,
        )
    text = summary(results)
    written = write_summary(args.out, results, text, ("duplicates", "steps", "seed"))
    if not args.quiet:
        print(f"{text}\n{written}")


def summary(results: xr.Dataset) -> str:
    """Two Markdown tables: copies and detection over repeats and training times, and two-layer fits."""
    from sims.study.tables import markdown

    head = ["repeats", "steps"]
    for eta in results.eta.values:
        head += [f"copies, η = {eta:g} (95 % interval)", "of repeated images"]
    head += ["AUROC of std", "AUROC of l4/l2", "AUROC of error", "seeds"]
    rows = []
    for value, steps in itertools.product(results.duplicates.values, results.steps.values):
        of_run = results.sel(duplicates=value, steps=steps)
        cells = [value, steps]
        for eta in results.eta.values:
            drawn = of_run.sel(eta=eta)
            copied = drawn.copied.where(drawn.done, False) if "done" in drawn else drawn.copied
            count = int(copied.sum())
            among = float((drawn.duplicated_share * copied.sum("sample")).sum("seed")) / max(count, 1)
            shown = share_cell(drawn.copied.rename(sample="drawn"), drawn.get("done"))
            cells += [shown, f"{among:.3f}" if count else "-"]
        repeated = of_run.sel(group="duplicated")
        cells += [cell(repeated[f"auroc_{name}"].max("tap")) for name in ("std", "l4_over_l2")]
        rows.append([*cells, cell(repeated.auroc_error.max("sigma")), of_run.sizes["seed"]])
    return (
        f"{markdown(head, rows)}\n\n"
        "Copies: intervals over seeds and samples together (of one seed: over its samples). AUROC: repeated against "
        "held-out images, at the best tap or noise level. ± standard errors over seeds.\n\n"
        f"{_fits(results.isel(steps=-1))}\n"
    )


def _fits(results: xr.Dataset) -> str:
    """A Markdown table of the two-layer autoencoders fitted to the networks, for every number of repeats."""
    from sims.study.tables import markdown

    units = results.units.values
    head = ["repeats", "fitted to", "at images", *(f"error, {p} units" for p in units), "gates open", "std of codes"]
    rows = []
    for value, fitted, group in itertools.product(*(results[dim].values for dim in ("duplicates", "fitted", "group"))):
        fits = results.sel(duplicates=value, fitted=fitted, group=group)
        cells = [cell(fits.fit_error.sel(units=p)) for p in units]
        cells += [cell(fits[name].sel(units=units[-1])) for name in ("fit_open", "fit_std")]
        rows.append([value, fitted, group, *cells])
    return (
        f"{markdown(head, rows)}\n\n"
        "Two-layer ReLU autoencoders fitted around an image, after the longest training: their error relative to the "
        "squared norm of the output; for the most units, the share of gates that are open for every noise draw, and "
        "the std of the codes."
    )
