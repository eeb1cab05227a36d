"""Options that several commands share, and a :class:`sims.sweeps.spec.Spec` from them.

A TOML or JSON file (``--spec FILE``) may give any field of the spec; options win over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tomllib
from typing import Any

from sims.flags import AXIS, parse_bools, parse_bytes, parse_floats, parse_ints, parse_names
from sims.sweeps.measures import DEFAULT, MEASURES
from sims.sweeps.shards import parse_shard
from sims.sweeps.spec import OPTIMIZERS, SCHEDULES, Spec

__all__ = [
    "add_data_flags",
    "add_measures_flag",
    "add_run_flags",
    "add_spec_flags",
    "add_sweep_flags",
    "spec_from_flags",
]


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which rows, at which noise, with how many units and what penalty."""
    add = parser.add_argument_group("the data and the objective").add_argument
    add("--spec", metavar="FILE", type=pathlib.Path, help="TOML or JSON file with any of the fields below; flags win")
    add(
        "--dataset",
        action="append",
        help="digits; mixture:modes=4,dim=32,separation=3; idx:, cifar10:, npz:, images:, patches:PATH; or PATH. Once "
        "for each data set of an axis",
    )
    add("--separation", type=parse_floats, metavar="S,...", help=f"norm of the modes of mixture: data sets: {AXIS}")
    add("--num-samples", type=parse_ints, metavar="N,...", help=f"training-set sizes n >= 1: {AXIS}")
    add(
        "--duplicates",
        type=parse_names,
        metavar="KxM,...",
        help="of the n rows, K images M times each, the others once; a list, none for no repeats",
    )
    add("--singles", type=int, metavar="N", help="rows that appear once, beside one KxM: n = K M + N")
    add("--center", action=argparse.BooleanOptionalAction, default=None, help="subtract the mean of the training rows")
    add(
        "--separable",
        type=int,
        metavar="M",
        help="keep a greedy subset of M rows with pairwise negative cosines; 0: all",
    )
    add("--held-out", type=float, metavar="F", help="rows never trained on: a fraction below 1, or a count from 1")
    add("--split-seed", type=int, help="seed of the split into training pool and held-out rows, >= 0")
    add("--sigma", type=parse_floats, metavar="S,...", help=f"noise levels > 0, in the units of the data: {AXIS}")
    add("--width", type=parse_ints, metavar="P,...", help=f"hidden units p >= 1: {AXIS}")
    add("--penalty", type=parse_floats, metavar="L,...", help=f"lambda >= 0 of the paper's objective: {AXIS}")


def add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of :class:`sims.sweeps.spec.Spec`; a flag left out keeps the spec file's value or the
    default."""
    add_data_flags(parser)
    add = parser.add_argument_group("training and evaluation").add_argument
    add("--learning-rate", type=parse_floats, metavar="R,...", help=f"optimizer step size > 0: {AXIS}")
    add("--init-scale", type=parse_floats, metavar="C,...", help=f"norm of the columns at the start > 0: {AXIS}")
    add(
        "--optimizer",
        type=parse_names,
        metavar="NAME,...",
        help=f"update rules with PyTorch's constants, of {', '.join(OPTIMIZERS)}",
    )
    add("--schedule", choices=SCHEDULES, help="learning rate over the run: constant, or cosine to zero")
    add("--batch-size", type=parse_ints, metavar="B,...", help=f"rows a step, with replacement; 0: all of them: {AXIS}")
    add("--steps", type=int, help="optimizer steps >= 1")
    add("--record-steps", type=parse_ints, metavar="T,...", help=f"measure after these steps, in [0, steps]: {AXIS}")
    add(
        "--tied",
        nargs="?",
        type=parse_bools,
        const=(True,),
        metavar="false,true",
        help="one parameter for W1 and W2; as an axis both",
    )
    add("--no-tied", dest="tied", action="store_const", const=(False,), help="two parameters")
    add("--weight-decay", type=float, help="decoupled decay of adamw >= 0 (coupled decay is --penalty)")
    add("--seeds", type=int, metavar="K", help="repetitions >= 1, each with its own rows, start and noise")
    add("--seed", type=int, help="root of all randomness >= 0")
    add("--eval-samples", type=int, help="most training rows, and most held-out rows, that measures look at, >= 1")
    add("--eval-draws", type=int, help="noise draws for each of them, >= 1")
    add("--dtype", choices=("float32", "float64"), help="of the training")


def add_run_flags(parser: argparse.ArgumentParser, *, default_out: str | None = None) -> None:
    """Add the flags that change no number: where, how much memory, how loud."""
    add = parser.add_argument_group("the run").add_argument
    add(
        "--out",
        metavar="DIR",
        default=default_out,
        required=default_out is None,
        help="results; the same again resumes",
    )
    add("--memory", type=parse_bytes, default=2 << 30, metavar="SIZE", help="bound on a program's temporaries (2GiB)")
    add("--quiet", action="store_true", help="no progress bar and no summary")


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which machines compute a sweep, and how it is reported."""
    add = parser.add_argument_group("many machines").add_argument
    add("--devices", type=int, metavar="N", help="devices to make of a CPU's cores (one)")
    add("--group", type=int, metavar="CELLS", help="cells that run together, the same on any number of devices")
    add("--shard", type=parse_shard, metavar="I/N", help="every N-th unit of work from the I-th; merge joins them")
    add("--scheduler", metavar="ADDRESS", help="compute on the Dask cluster of this scheduler, as tcp://host:8786")
    add("--local-workers", type=int, default=0, metavar="N", help="compute on so many Dask workers started here")
    add("--distributed", action="store_true", help="join the processes of a cluster, found in the environment (SLURM)")
    add("--coordinator", metavar="HOST:PORT", help="join the processes that this one, the first, coordinates")
    add("--num-processes", type=int, metavar="N", help="of --coordinator")
    add("--process-id", type=int, metavar="I", help="of this process, from 0")
    add("--dry-run", action="store_true", help="print cells, programs, memory and time, and stop")
    add("--log", metavar="FILE", type=pathlib.Path, help="append a line for each unit of work to this file")


def add_measures_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--measures``."""
    parser.add_argument(
        "--measures",
        type=lambda text: text.split(","),
        default=list(DEFAULT),
        metavar="NAME,...",
        help=f"what to measure, of: {', '.join(MEASURES)}",
    )


def spec_from_flags(args: argparse.Namespace, **defaults: Any) -> Spec:
    """The spec of the command line: ``defaults``, then the fields of ``--spec FILE``, then the flags given.

    ``ValueError`` for a file that cannot be read and for all that :class:`Spec` refuses.
    """
    given = {} if args.spec is None else _read_fields(args.spec)
    for field in dataclasses.fields(Spec):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    # Duplicates say how many rows there are; a default must not contradict them.
    dropped = {"num_samples"} if "duplicates" in given else set()
    return Spec.from_dict({name: value for name, value in defaults.items() if name not in dropped} | given)


def _read_fields(path: pathlib.Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the spec file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object with fields of the spec, got a {type(fields).__name__}.")
    # A finished run's spec.json can be given as it is.
    fields = fields.get("spec", fields)
    return {name: value for name, value in fields.items() if name != "measures"}
