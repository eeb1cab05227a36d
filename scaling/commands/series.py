"""The ``transition`` and ``duplication`` commands: their flags, and runs from them."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scaling.commands.train import add_network_flags, add_source_flags, add_training_flags, spec_from_flags
from scaling.measures.copies import wilson_interval
from scaling.study.examination import STANDARD, Setting
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from scaling.study.series import NUM_SAMPLES, duplication, transition, two_layer
from scaling.training.architectures import ARCHS
from scaling.training.run import TrainSpec
from sims.flags import parse_floats, parse_ints, parse_names
from sims.store.files import write_text
from sims.terminal import Bar

__all__ = [
    "DUPLICATION",
    "TRANSITION",
    "add_duplication_flags",
    "add_transition_flags",
    "run_duplication",
    "run_transition",
]

TRANSITION = "train networks on more and more images, two on disjoint halves: where do they stop copying? resumable"
DUPLICATION = "train networks some of whose images repeat: which images do they copy? resumable"
CHANNELS = (16, 32)
"""Of a series over n, unless told: small, for many are trained."""

SHOWN = 16
"""Samples of each network on the sheets."""


def add_transition_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``transition``."""
    add = add_source_flags(parser)
    add(
        "--num-samples",
        type=parse_ints,
        default=NUM_SAMPLES,
        metavar="N,...",
        help="training images of each half, increasing, >= 2 (10,30,100,300,750)",
    )
    add_network_flags(parser, ("unet2d",))
    parser.set_defaults(channels=CHANNELS)
    add_training_flags(parser)("--steps", type=int, metavar="N", help="of each training >= 1 (2000)")
    _add_examination_flags(parser)


def add_duplication_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``duplication``."""
    add = add_source_flags(parser)
    add(
        "--duplicates",
        type=parse_names,
        default=(TrainSpec.duplicates,),
        metavar="KxM,...",
        help="K images M times each, a network for each (20x60)",
    )
    add("--singles", type=int, metavar="N", help="so many images once beside them >= 0 (1200)")
    add_network_flags(parser, ARCHS)
    add_training_flags(parser)(
        "--steps", type=parse_ints, default=(1000, 2000), metavar="N,...", help="of training, increasing (1000,2000)"
    )
    _add_examination_flags(parser)


def _add_examination_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is looked at").add_argument
    numbers = {
        "samples": "samples of each network",
        "sampler_steps": "steps of the sampler",
        "images": "images of each group",
        "jacobians": "of them, those whose Jacobians are computed",
        "draws": "noise draws for each image and level",
        "fits": "images of each group around which two-layer autoencoders are fitted",
    }
    for name, told in numbers.items():
        default = getattr(STANDARD, name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"{told} >= 1 ({default})")
    levels, taps = ",".join(map(str, STANDARD.sigmas)), ",".join(STANDARD.taps)
    add("--sigma", type=parse_floats, default=STANDARD.sigmas, metavar="S,...", help=f"noise levels > 0 ({levels})")
    add(
        "--eta",
        type=parse_floats,
        default=STANDARD.etas,
        metavar="E,...",
        help="fresh noise of the samplers, from 0, DDIM, to 1, ancestral sampling (0,1)",
    )
    add(
        "--timestep",
        type=int,
        default=STANDARD.timestep,
        metavar="T",
        help=f"at which codes are read, from 0 to T - 1 ({STANDARD.timestep})",
    )
    add(
        "--taps",
        type=lambda text: tuple(text.split(",")),
        default=STANDARD.taps,
        metavar="NAME,...",
        help=f"where codes are read ({taps})",
    )
    units = ",".join(map(str, STANDARD.units))
    add(
        "--units",
        type=parse_ints,
        default=STANDARD.units,
        metavar="P,...",
        help=f"of those autoencoders >= 1 ({units})",
    )
    add(
        "--source",
        default=STANDARD.source,
        metavar="NAME",
        help=f"from where to the first of the taps a block is fitted ({STANDARD.source})",
    )
    add = parser.add_argument_group("the run").add_argument
    add("--seeds", type=int, default=3, metavar="N", help="networks of each kind, with other rows and noise >= 1 (3)")
    add("--workers", type=int, default=1, metavar="N", help="processes side by side >= 1 (1)")
    add("--out", metavar="DIR", required=True, help="networks and results; the same command again resumes")
    add("--quiet", action="store_true", help="no progress bar and no summary")


def run_transition(args: argparse.Namespace) -> str:
    """Train and look, or go on, then sweep the two-layer autoencoder; returns what to tell."""
    sizes, args.num_samples = args.num_samples, None
    base = spec_from_flags(args)
    with Bar(args.quiet, "pairs") as bar:
        results = transition(base, sizes, args.out, **_common(args), on_unit=bar.move)
    with Bar(args.quiet, "cells") as bar:
        shallow = two_layer(
            base,
            sizes,
            args.out,
            seeds=args.seeds,
            sigmas=args.sigma,
            on_unit=lambda progress: bar.move(progress.done, progress.total, ""),
        )
    return _written(args.out, results, transition_lines(results, shallow), ("num_samples", "seed", "half"))


def run_duplication(args: argparse.Namespace) -> str:
    """Train and look, or go on; returns what to tell."""
    duplicates, args.duplicates = args.duplicates, None
    steps, args.steps = args.steps, None
    with Bar(args.quiet, "trainings") as bar:
        results = duplication(spec_from_flags(args), duplicates, steps, args.out, **_common(args), on_unit=bar.move)
    return _written(args.out, results, duplication_lines(results), ("duplicates", "steps", "seed"))


def _common(args: argparse.Namespace) -> dict[str, Any]:
    plural = {"sigmas": "sigma", "etas": "eta"}
    setting = Setting(**{name: getattr(args, plural.get(name, name)) for name in Setting._fields})
    return {"seeds": args.seeds, "setting": setting, "workers": args.workers}


def transition_lines(results: xr.Dataset, shallow: xr.Dataset) -> list[str]:
    """A Markdown table over n, means over seeds with their standard errors."""
    level = results.sizes["sigma"] // 2
    sigma, tap = float(results.sigma[level]), str(results.tap.values[0])
    deep = results.mean("half")
    groups = list(results.group.values)
    train, out = ({"group": groups.index(name)} for name in ("train", "held_out"))
    at, first = {"sigma": level}, {"tap": 0}
    columns = {
        **{f"copies, η = {eta:g}": deep.copy_share.sel(eta=eta) for eta in results.eta.values},
        "agreement": results.agreement,
        "by chance": results.agreement_unpaired,
        f"gap, σ = {sigma:g}": deep.gap.isel(at),
        "gap, two layers": _flat(shallow.gap).isel(at),
        "std, trained": deep["std"].isel(train | first),
        "held out": deep["std"].isel(out | first),
        "rank of J, trained": deep.jacobian_rank.isel(train | at),
        "rank, held out": deep.jacobian_rank.isel(out | at),
        "from empirical": deep.distance_to_empirical.isel(train | at),
        "from population": deep.distance_to_population.isel(out | at),
    }
    return [
        f"Means over {results.sizes['seed']} seeds ± standard errors; codes at {tap}.",
        "",
        *_table("n", results.num_samples.values, columns, "num_samples"),
    ]


def duplication_lines(results: xr.Dataset) -> list[str]:
    """A Markdown table over repeats and training times; shares with Wilson's interval over all samples."""
    etas = [float(eta) for eta in results.eta.values]
    head = ["repeats", "steps"]
    for eta in etas:
        head += [f"copies, η = {eta:g}", "of repeated images"]
    head += ["AUROC of std", "of l4/l2", "of error", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    repeated = list(results.group.values).index("duplicated")
    for value, steps in itertools.product(results.duplicates.values, results.steps.values):
        here = results.sel(duplicates=value, steps=steps)
        cells = []
        for eta in etas:
            drawn = here.sel(eta=eta)
            count, total = int(drawn.copied.sum()), drawn.copied.size
            low, high = wilson_interval(count, total)
            among = (drawn.duplicated_share * drawn.copied.sum("sample")).sum("seed").item() / max(count, 1)
            cells += [f"{count / total:.3f} ({low:.3f} to {high:.3f})", f"{among:.3f}" if count else "-"]
        of = here.isel(group=repeated)
        cells += [_shown(of[f"auroc_{name}"].max("tap")) for name in ("std", "l4_over_l2")]
        cells += [_shown(of.auroc_error.max("sigma")), str(here.sizes["seed"])]
        lines.append(f"| {value} | {steps} | " + " | ".join(cells) + " |")
    lines += ["", "AUROC: repeated against held-out images, at the best tap or noise level.", ""]
    return [*lines, *fit_lines(results)]


def fit_lines(results: xr.Dataset) -> list[str]:
    """A Markdown table of the two-layer autoencoders fitted at the longest training, for every number of repeats."""
    units = [int(p) for p in results.units.values]
    head = [
        "repeats",
        "fitted to",
        "at images",
        *(f"error of {p}" for p in units),
        "gates open",
        "std of its code",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    last = results.isel(steps=-1)
    for value, fitted, group in itertools.product(*(last[dim].values for dim in ("duplicates", "fitted", "group"))):
        here = last.sel(duplicates=value, fitted=fitted, group=group)
        cells = [_shown(here.fit_error.sel(units=p)) for p in units]
        cells += [_shown(here[name].isel(units=-1)) for name in ("fit_open", "fit_std")]
        lines.append(f"| {value} | {fitted} | {group} | " + " | ".join(cells) + " |")
    note = (
        "Best ReLU autoencoders of so many units around an image: their error relative to the output's square; of the"
    )
    return [*lines, "", f"{note} widest, the share of gates that are open all over the noise, and its code."]


def _flat(values: xr.DataArray) -> xr.DataArray:
    """Without the axes of a sweep that have one value."""
    return values.isel({dim: 0 for dim in values.dims if dim not in ("num_samples", "sigma", "seed")})


def _table(head: str, labels: np.ndarray, columns: dict[str, xr.DataArray], dim: str) -> list[str]:
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for i, label in enumerate(labels):
        lines.append(f"| {label} | " + " | ".join(_shown(column.isel({dim: i})) for column in columns.values()) + " |")
    return lines


def _shown(values: xr.DataArray) -> str:
    """Mean over seeds, and its standard error where there are several."""
    numbers = values.values.reshape(-1)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return "-"
    error = f" ± {numbers.std(ddof=1) / len(numbers) ** 0.5:.2g}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.3g}{error}"


def _written(out: str, results: xr.Dataset, lines: list[str], dims: tuple[str, ...]) -> str:
    """Write the summary and a sheet of samples, a line for each network; returns what to tell."""
    folder, text = Path(out), "\n".join(lines) + "\n"
    write_text(folder / "summary.md", text)
    shown = results.samples.isel(eta=0).transpose(*dims, "sample", "channel", "height", "width").values
    shown = shown.reshape(-1, *shown.shape[len(dims) :])[:, :SHOWN]
    tiles = shown.reshape(-1, *shown.shape[2:])
    if tiles.shape[1] not in (1, 3):
        return f"{text}\nWritten: {out}/results.zarr, {out}/spec.json, {out}/summary.md, {out}/models"
    write_png(folder / "samples.png", contact_sheet(to_bytes(np.nan_to_num(tiles)), columns=shown.shape[1]))
    listed = ("results.zarr", "spec.json", "summary.md", "samples.png", "models")
    return f"{text}\nWritten: {', '.join(f'{out}/{name}' for name in listed)}"
