"""The ``train`` command: its flags, and a run from them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

from scaling.diffusion.schedules import Prediction
from scaling.training.architectures import ARCHS
from scaling.training.run import TrainSpec, train
from scaling.training.steps import OPTIMIZERS
from sims.flags import parse_ints
from sims.terminal import Bar

__all__ = [
    "SUMMARY",
    "add_flags",
    "add_network_flags",
    "add_source_flags",
    "add_training_flags",
    "run",
    "spec_from_flags",
]

SUMMARY = "train a small diffusion model on images, some of them repeated; resumable"

DEFAULTS: dict[str, dict[str, Any]] = {
    "unet2d": {},
    "unet2d_condition": {"steps": 4000},
    "dit": {"channels": (64,), "layers": 4, "heads": 4, "steps": 4000},
}
"""What the network decides, beside the defaults of :class:`scaling.training.run.TrainSpec`."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of the spec and for how the run is kept; those left out take the defaults."""
    add = add_source_flags(parser)
    add("--duplicates", metavar="KxM", help="K images M times each; none for plain data (20x60)")
    add("--singles", type=int, metavar="N", help="so many images once, beside the repeated ones >= 0 (1200)")
    add("--variants", metavar="TxV", help="of the K images the last T come in V variants, each M/V times (none)")
    add("--num-samples", type=int, metavar="N", help="instead of repeats: N >= 1 images once")
    add(
        "--held-out",
        type=int,
        metavar="N",
        help="the last so many rows >= 0 are held out (all that are not trained on)",
    )
    add(
        "--offset", type=int, metavar="N", help="leave out the first N >= 0 rows, for training sets that share none (0)"
    )
    add("--split-seed", type=int, metavar="S", help="of the order of the rows >= 0 (0)")
    add(
        "--captions",
        metavar="FILE",
        help="for text: labels; .txt, a line an image; .json, a list; .jsonl with file_name and text (labels)",
    )
    add = add_network_flags(parser, ARCHS)
    add("--text-channels", type=int, metavar="C", help="of the text encoder >= 1 (32)")
    add("--text-layers", type=int, metavar="N", help="of the text encoder >= 1 (2)")
    add("--tokenizer", metavar="DIR", help="a CLIP tokenizer to take (merges are learned from the prompts)")
    add = add_training_flags(parser)
    add(
        "--steps",
        type=int,
        metavar="N",
        help="of training >= 1; more of them continue a finished run (2000; with text or classes 4000)",
    )
    add(
        "--prompt-dropout",
        type=float,
        metavar="P",
        help="share of prompts or classes left out, from 0 to below 1 (0.1)",
    )
    add("--seed", type=int, metavar="S", help="root of all randomness of the training >= 0 (0)")
    add = parser.add_argument_group("the run").add_argument
    add("--devices", type=int, metavar="N", help="split the batch over so many >= 1 (all that divide it)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints >= 1 (500)")
    add("--out", metavar="DIR", required=True, help="the model; the same command again resumes")
    add("--quiet", action="store_true", help="no progress bar and no summary")


def add_source_flags(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Flags that say which images; returns what adds another one to the group."""
    add = parser.add_argument_group("the data").add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="digits, fashion-mnist, a folder of images, a .npz file, or idx:, cifar10:, npz:, images:, patches:PATH "
        "with options as in patches:PATH?size=16 (digits)",
    )
    add("--resolution", type=int, metavar="N", help="crop and resample images to N x N pixels >= 1 (their own)")
    add("--gray", action="store_true", default=None, help="read a folder's images in one channel")
    add("--skip-bad", action="store_true", default=None, help="leave out a folder's files that cannot be used")
    return add


def add_network_flags(parser: argparse.ArgumentParser, archs: Sequence[str]) -> Callable[..., Any]:
    """Flags of the network, one of ``archs``; returns as :func:`add_source_flags`."""
    add = parser.add_argument_group("the network").add_argument
    add("--arch", choices=archs, help="unet2d; unet2d_condition, which reads a text; dit, which has classes (unet2d)")
    add("--channels", type=parse_ints, metavar="C,...", help="of a UNet's levels (32,64); one width of a DiT (64)")
    add("--layers", type=int, metavar="N", help="residual blocks a level >= 1 (1); blocks of a DiT (4)")
    add("--heads", type=int, metavar="N", help="of attention to text >= 1 (8) and of a DiT (4)")
    add("--patch-size", type=int, metavar="N", help="of a DiT >= 1 (2)")
    return add


def add_training_flags(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Flags of how to train; returns as :func:`add_source_flags`."""
    add = parser.add_argument_group("the training").add_argument
    add("--batch-size", type=int, metavar="B", help="images a step >= 1 (64)")
    add("--learning-rate", type=float, metavar="R", help="step size, positive (0.001)")
    add("--optimizer", choices=OPTIMIZERS, help="(adam)")
    add("--weight-decay", type=float, metavar="W", help="of adamw >= 0 (0)")
    add("--warmup", type=int, metavar="N", help="steps in which the learning rate rises >= 0 (0)")
    add("--clip", type=float, metavar="G", help="largest norm of a gradient >= 0; 0: none (0)")
    add(
        "--ema",
        type=float,
        metavar="D",
        help="decay of the average of the weights, which is what is kept, from 0 to below 1; 0: none (.995)",
    )
    add("--prediction", choices=get_args(Prediction), help="what the network returns (epsilon)")
    add("--timesteps", type=int, metavar="T", help="of the noise schedule >= 1 (1000)")
    add("--beta-schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2"), help="of the noise (linear)")
    return add


def spec_from_flags(args: argparse.Namespace) -> TrainSpec:
    """The spec of the command line; ``ValueError`` for what :class:`scaling.training.run.TrainSpec` refuses."""
    names = [field.name for field in dataclasses.fields(TrainSpec)]
    given: dict[str, Any] = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if given.get("duplicates") == "none" or "num_samples" in given:
        # Without repeats none are single.
        given = {"singles": 0, **given, "duplicates": given.get("duplicates", "none").replace("none", "")}
    return TrainSpec(**{**DEFAULTS[given.get("arch", TrainSpec.arch)], **given})


def run(args: argparse.Namespace) -> str:
    """Train; returns what to tell."""
    spec = spec_from_flags(args)
    with Bar(args.quiet, "steps") as bar:
        train(spec, args.out, save_every=args.save_every, devices=args.devices, on_steps=bar.move)
    return f"Written: {args.out}/model_index.json, {args.out}/membership.json, {args.out}/training.json"
