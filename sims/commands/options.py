"""Options that several commands share, and a :class:`sims.sweeps.spec.Spec` from them.

Fields of the spec are options by themselves (:mod:`sims.flags`); here is what they do not cover. A TOML or JSON file
(``--spec FILE``) may give any field of the spec; options override it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from sims.data.folders import with_options
from sims.flags import AXIS, add_fields, flag_of, given, parse_bytes, parse_out, parse_shard
from sims.sweeps.measure_names import DEFAULT, NAMES
from sims.sweeps.spec import DATA_FLAGS, TRAINING_FLAGS, Spec

__all__ = [
    "add_data_flags",
    "add_measures_flag",
    "add_run_flags",
    "add_spec_flags",
    "add_sweep_flags",
    "measures_from_flags",
    "set_precision",
    "spec_from_flags",
]


def add_data_flags(parser: argparse.ArgumentParser, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Add ``--spec`` and the fields of the spec that define the training rows, σ, the width and the penalty."""
    training = [f.name for f in dataclasses.fields(Spec) if (own := flag_of(f)) and own.group != DATA_FLAGS]
    _add_fields(parser, training, defaults)


def add_spec_flags(parser: argparse.ArgumentParser, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Add ``--spec`` and an option for each field of the spec; ``defaults`` are the command's own."""
    groups = _add_fields(parser, (), defaults)
    no_tied = {"dest": "tied", "action": "store_const", "const": (False,), "help": "the same as --tied false"}
    groups[TRAINING_FLAGS].add_argument("--no-tied", **no_tied)


def add_run_flags(parser: argparse.ArgumentParser, *, default_out: str | None = None) -> None:
    """Add the options that change no number: the output folder, memory and verbosity."""
    add = parser.add_argument_group("the run").add_argument
    add(
        "--out",
        metavar="DIR",
        type=parse_out,
        default=default_out,
        required=default_out is None,
        help="folder for the results; the same command resumes"
        + ("" if default_out is None else f" (default: {default_out})"),
    )
    add(
        "--memory",
        type=parse_bytes,
        default=2 << 30,
        metavar="SIZE",
        help="bound on the temporaries of a compiled program on each device (default: 2GiB)",
    )
    add("--quiet", action="store_true", help="no progress bar and no summary")


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose which machines compute a sweep, and how progress is reported."""
    add = parser.add_argument_group("many machines").add_argument
    add("--devices", type=int, metavar="N", help="split the cores of a CPU into N devices >= 1 (default: one device)")
    add(
        "--group",
        type=int,
        metavar="CELLS",
        help="cells computed together >= 1; with one value results are bitwise equal on any number of devices "
        "(default: as many as fit)",
    )
    add("--shard", type=parse_shard, metavar="I/N", help="compute every N-th unit of work from the I-th; see merge")
    add("--scheduler", metavar="ADDRESS", help="compute on the Dask cluster of this scheduler, such as tcp://host:8786")
    add(
        "--local-workers",
        type=int,
        default=0,
        metavar="N",
        help="start N Dask workers here and compute on them (default: 0)",
    )
    add("--distributed", action="store_true", help="join the processes of a cluster, named by its environment (SLURM)")
    add("--coordinator", metavar="HOST:PORT", help="join the processes that the first one coordinates at this address")
    add("--num-processes", type=int, metavar="N", help="number of processes, with --coordinator")
    add("--process-id", type=int, metavar="I", help="number of this process, from 0, with --coordinator")
    add(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the other processes, or for the scheduler, > 0 (default: 60)",
    )
    add("--dry-run", action="store_true", help="print the number of cells and programs, memory and time, and stop")
    add("--log", metavar="FILE", type=pathlib.Path, help="append a line to this file for each finished unit of work")


def add_measures_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--measures``."""
    others = ", ".join(name for name in NAMES if name not in DEFAULT)
    parser.add_argument(
        "--measures",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help=f"what to measure (default: {', '.join(DEFAULT)}); there are also {others}",
    )


def set_precision(dtype: str) -> None:
    """Enable 64-bit types in JAX if ``dtype`` is ``float64``."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def spec_from_flags(args: argparse.Namespace, **defaults: Any) -> Spec:
    """The spec of the command line: options given override the fields of ``--spec FILE``, which override ``defaults``.

    ``ValueError`` for a file that cannot be read and for all that :class:`Spec` refuses.
    """
    values = ({} if args.spec is None else _read_fields(args.spec)) | given(args, Spec)
    values.pop("measures", None)
    if args.color or args.skip_bad:
        names = values.get("dataset", defaults.get("dataset", Spec.dataset))
        folders = [names] if isinstance(names, str) else names
        values["dataset"] = tuple(
            with_options(name, color=args.color or "", skip_bad=args.skip_bad) for name in folders
        )
    # Duplicates imply the number of rows; a default must not contradict them.
    dropped = {"num_samples"} if "duplicates" in values else set()
    return Spec.from_dict({name: value for name, value in defaults.items() if name not in dropped} | values)


def measures_from_flags(args: argparse.Namespace) -> list[str]:
    """The measures of ``--measures``, else those of ``--spec FILE``, else the default ones.

    ``ValueError`` for a file that cannot be read, or whose measures are not names.
    """
    if args.measures is not None:
        return args.measures
    named = {} if args.spec is None else _read_fields(args.spec)
    measures = named.get("measures", list(DEFAULT))
    if not isinstance(measures, list) or not all(isinstance(name, str) for name in measures):
        raise ValueError(f"{args.spec}: measures must be a list of names, got {measures!r}.")
    return measures


def _add_fields(
    parser: argparse.ArgumentParser, leave_out: Collection[str], defaults: Mapping[str, Any] | None
) -> dict[str, Any]:
    parser.add_argument(
        "--spec",
        metavar="FILE",
        type=pathlib.Path,
        help="TOML or JSON file with fields of the spec, named as the options below; options override it",
    )
    parser.add_argument(
        "--color",
        choices=("rgb", "gray"),
        help="channels of the images of a folder (default: those of most images; others are converted and named)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip files of a folder that cannot be read or differ in size"
    )
    parser.epilog = f"An axis takes {AXIS}."
    return add_fields(parser, Spec, leave_out=leave_out, defaults=defaults)


def _read_fields(path: pathlib.Path) -> dict[str, Any]:
    from sims.store.files import parse_json, read_small

    content = read_small(path)
    if path.suffix == ".toml":
        try:
            fields = tomllib.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}.") from error
    else:
        fields = parse_json(content, str(path))
    # The record of a finished sweep or training run can be given as it is.
    for name in ("spec", "single"):
        if isinstance(fields.get(name), dict):
            return fields[name]
    return fields
