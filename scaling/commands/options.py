"""Options that several commands share, and what they load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.study.settings import ExaminationSetting
from scaling.training.spec import TrainSpec
from sims.data.folders import with_options
from sims.flags import given, parse_ints, parse_names, parse_out

if TYPE_CHECKING:
    from scaling.bridge.loading import Pipeline
    from scaling.study.items import Items

__all__ = [
    "KINDS",
    "add_color",
    "add_condition",
    "add_model",
    "add_output",
    "add_pipeline_run",
    "add_places",
    "add_series_run",
    "add_skip_bad",
    "add_sources",
    "check_finite",
    "examination_of",
    "items_of",
    "load",
    "membership_of",
    "places_of",
    "record_of",
    "training_of",
]


KINDS = "folder of images, .npz or .npy file, or a data set as for `extract`"
"""Of sources, for help."""

PROMPTS = {
    "--prompts": "--images",
    "--known-member-prompts": "--known-members",
    "--known-other-prompts": "--known-others",
}
"""Flags of files of prompts, and of the images that they belong to."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and its revision."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a diffusers pipeline or of one network, a name of the zoo, or a name on the hub",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub (default: its main branch)")


def add_condition(parser: argparse.ArgumentParser) -> None:
    """Add the prompt and the class."""
    add = parser.add_argument_group("the condition").add_argument
    add("--prompt", metavar="TEXT", help="prompt, for models conditioned on text (default: the empty prompt)")
    add(
        "--class-label",
        type=int,
        metavar="K",
        help="class, an integer from 0, for models conditioned on classes (default: the null class of a DiT)",
    )


def add_color(add: Any) -> None:
    """Add ``--color`` by ``add``, the ``add_argument`` of a parser or group."""
    add(
        "--color",
        choices=("rgb", "gray"),
        help="channels of the images of a folder (default: the model's where there is one, else those of most images; "
        "others are converted and named)",
    )


def add_skip_bad(add: Any) -> None:
    """Add ``--skip-bad`` likewise."""
    add("--skip-bad", action="store_true", help="skip files of a folder that cannot be read or differ in size")


def add_sources(parser: argparse.ArgumentParser, *, prompts: bool = True, num: int = 100) -> None:
    """Add the images, ``num`` of each group by default, with what is known of them, and with ``prompts`` prompts."""
    add = parser.add_argument_group("what to score").add_argument
    add(
        "--train",
        metavar="SOURCE",
        help="the data set that the model was trained on: repeated, single and held-out images by the model's "
        "membership.json are scored, and the nearest training image of every image is found; without a "
        "membership.json all of it counts as training data",
    )
    add("--num", type=int, default=num, metavar="N", help=f"images >= 1 of each of these groups (default: {num})")
    add("--images", metavar="SOURCE", help=f"images of which nothing is known: {KINDS}")
    add("--known-members", metavar="SOURCE", help="images that are known to be memorized")
    add("--known-others", metavar="SOURCE", help="images that are known not to be")
    for name, whose in PROMPTS.items() if prompts else ():
        add(
            name,
            metavar="FILE",
            help=f"a prompt for each of {whose}, or without it prompts alone: .txt, .jsonl, .csv, .json",
        )
    add_color(add)
    add_skip_bad(add)


def add_places(add: Any) -> None:
    """Add layers, timesteps and poolings by ``add``, the ``add_argument`` of a parser or group."""
    add(
        "--layers",
        default="all",
        metavar="NAME,...",
        help="modules whose activations to read, as `inspect` lists them (default: all that have positions or tokens)",
    )
    add(
        "--timesteps",
        type=parse_ints,
        default=(10, 50, 200),
        metavar="T,...",
        help="timesteps of the noise, from 0 to T - 1 (default: 10,50,200)",
    )
    add(
        "--pools",
        type=parse_names,
        default=("max", "mean"),
        metavar="NAME,...",
        help="how to pool over positions: max, mean (default: both)",
    )


def places_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of :func:`add_places` name, as for :func:`scaling.study.maps.score_maps`."""
    taps = () if args.layers == "all" else args.layers.split(",")
    return {"taps": taps, "timesteps": args.timesteps, "pools": args.pools}


def add_pipeline_run(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add what a run of a loaded pipeline takes: scheduler, precision, seed, batch size, folder."""
    add = parser.add_argument_group("the run").add_argument
    add("--scheduler", metavar="PATH", help="scheduler_config.json, or its folder, to use instead of the pipeline's")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="convert the weights to this type (default: as stored)",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed >= 0 of all random numbers (default: 0)")
    add(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="B",
        help=f"images processed at a time, >= 1 (default: {batch_size})",
    )
    add_output(add)


def add_series_run(parser: argparse.ArgumentParser) -> None:
    """Add what a series of trainings takes: seeds, processes, folder."""
    add = parser.add_argument_group("the run").add_argument
    add(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="trainings >= 1 of each kind, with other rows, initial weights and noise (default: 3)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes >= 1 that train in parallel (default: 1)")
    add_output(add)


def add_output(add: Any) -> None:
    """Add the folder of a run and ``--quiet`` by ``add``, the ``add_argument`` of a parser or group."""
    add(
        "--out",
        metavar="DIR",
        type=parse_out,
        required=True,
        help="folder of the results; the same command resumes an unfinished run",
    )
    add("--quiet", action="store_true", help="print neither progress nor summary")


def examination_of(args: argparse.Namespace) -> ExaminationSetting:
    """The setting that the command line gives."""
    return ExaminationSetting(**given(args, ExaminationSetting))


def training_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`scaling.training.spec.TrainSpec` that the command line sets, with ``--color``."""
    values = given(args, TrainSpec)
    if args.color:
        values["dataset"] = with_options(values.get("dataset", TrainSpec.dataset), color=args.color)
    return values


def check_finite(out: str, dim: str) -> None:
    """``UselessResultError`` if values of the finished run in ``out`` are NaN or infinite, naming the items."""
    from sims import store
    from sims.terminal import UselessResultError

    bad, total = store.not_finite(out, dim), store.template_of(out).sizes[dim]
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise UselessResultError(
            f"{len(bad)} of {total} {dim}s are not finite (numbers {shown}): the weights are so large that activations "
            "overflow, or the precision is too low; look at them with `python -m scaling inspect`, or give --dtype "
            "float32 and another folder."
        )


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the command line names."""
    from scaling.bridge.loading import load_pipeline
    from scaling.bridge.sources import is_zoo

    # The zoo's weights are stored in half precision to be small, not to be computed with.
    dtype = args.dtype or ("float32" if is_zoo(args.model) else None)
    return load_pipeline(args.model, dtype, args.revision, scheduler=args.scheduler)


def items_of(args: argparse.Namespace, pipeline: Pipeline, *, prompts: bool = True) -> tuple[list[Items], Items | None]:
    """What the flags of :func:`add_sources` name, and the training images, if they are given."""
    from scaling.study import items

    reads_text = prompts and bool(pipeline.text_encoders)
    parts, train = [], None
    if args.train:
        record = record_of(args.model)
        if record is None:
            train = items.of_images(args.train, pipeline, "train")
        else:
            membership, recorded = record
            part, train = items.from_record(
                args.train, pipeline, membership, recorded if reads_text else (), num=args.num
            )
            parts.append(part)
    for group, source, file in (
        (items.UNKNOWN, args.images, "prompts"),
        ("members", args.known_members, "known_member_prompts"),
        ("others", args.known_others, "known_other_prompts"),
    ):
        file = getattr(args, file) if prompts else None
        if file and not reads_text:
            raise ValueError(f"{args.model} reads no text: omit the prompts in {file}.")
        texts = items.read_prompts(file) if file else ()
        if source:
            how = {"color": args.color or "", "skip_bad": args.skip_bad}
            parts.append(items.of_images(source, pipeline, group, texts, **how))
        elif texts:
            parts.append(items.of_prompts(texts, group))
    return parts, train


def membership_of(model: str) -> dict[str, list[int]] | None:
    """Rows by group from the model's ``membership.json``; None if there is no such file."""
    from scaling.training.corpus import GROUPS
    from sims.store.files import read_json

    path = _folder(model) / "membership.json"
    if not path.exists():
        return None
    content = read_json(path)
    for name in GROUPS:
        rows = content.get(name, [])
        if not isinstance(rows, list) or any(isinstance(row, bool) or not isinstance(row, int) for row in rows):
            raise ValueError(f"{path}: {name} must be a list of row numbers.")
    return {name: content.get(name, []) for name in GROUPS}


def record_of(model: str) -> tuple[dict[str, list[int]], list[dict[str, Any]]] | None:
    """:func:`membership_of` and the entries of the model's ``prompts.json``, if it has one; None without membership."""
    import json

    from sims.store.files import read_small

    membership, path = membership_of(model), _folder(model) / "prompts.json"
    if membership is None:
        return None
    prompts = []
    if path.exists():
        try:
            prompts = json.loads(read_small(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}.") from error
        valid = isinstance(prompts, list) and all(
            isinstance(each, dict)
            and isinstance(each.get("prompt"), str)
            and isinstance(each.get("kind"), str)
            and isinstance(each.get("rows"), list)
            for each in prompts
        )
        if not valid:
            raise ValueError(f"{path}: must be a list of objects with prompt, kind and rows.")
    return membership, prompts


def _folder(model: str) -> Path:
    """The folder of a model; names of the zoo are theirs, those of the hub have none with a record."""
    from scaling.bridge.sources import ZOO, is_zoo

    return ZOO / model if is_zoo(model) else Path(model)
