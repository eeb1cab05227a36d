"""The specification of a training: its data, network and optimizer, with every default.

Each field of :class:`TrainSpec` is a flag of ``python -m scaling train``. The module imports no JAX, so that ``--help``
is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling.diffusion.choices import BETA_SCHEDULES, PREDICTIONS
from sims.flags import documented, flag, parse_ints

__all__ = ["ARCHS", "DEFAULTS", "OPTIMIZERS", "Recipe", "TrainSpec", "spec_of"]

ARCHS = ("unet2d", "unet2d_condition", "dit")
OPTIMIZERS = ("adam", "adamw")

DEFAULTS: dict[str, dict[str, Any]] = {
    "unet2d": {},
    "unet2d_condition": {"steps": 4000},
    "dit": {"channels": (64,), "layers": 4, "heads": 4, "steps": 4000},
}
"""Defaults of the command line that depend on the architecture, and replace those of :class:`TrainSpec`."""

DATA, NETWORK, TRAINING = "the data", "the network", "the training"


@documented
@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """A training: its data, network and optimizer. Two runs with equal specs are the same run, up to ``steps``.

    The defaults train a network of 0.70 million parameters that copies repeated images and generalizes otherwise.
    ``ValueError`` for values out of range.

    >>> TrainSpec(steps=100).recipe().learning_rate
    0.001
    """

    arch: str = flag(
        "unet2d",
        "unet2d; unet2d_condition, which is conditioned on text; dit, which is conditioned on classes",
        group=NETWORK,
        choices=ARCHS,
    )
    dataset: str = flag(
        "digits",
        "digits, fashion-mnist, a folder of images, a .npz file, or idx:, cifar10:, npz:, images:, patches:PATH with "
        "options as in patches:PATH?size=16",
        group=DATA,
        metavar="NAME",
    )
    num_samples: int | None = flag(
        None, "train on N >= 1 images, none of them repeated", group=DATA, type=int, metavar="N"
    )
    duplicates: str = flag(
        "20x60",
        "repeat K images M times each; none: no image repeats",
        group=DATA,
        type=lambda text: "" if text == "none" else text,
        metavar="KxM",
    )
    singles: int = flag(
        1200, "train on N >= 0 more images, once each, beside the repeated ones", group=DATA, metavar="N"
    )
    variants: str = flag(
        "",
        "the last T of the K repeated images come in V variants, each repeated M/V times (default: none)",
        group=DATA,
        metavar="TxV",
    )
    held_out: int | None = flag(
        None,
        "hold out the last N >= 0 rows of the shuffled data set (default: all rows not trained on)",
        group=DATA,
        type=int,
        metavar="N",
    )
    offset: int = flag(
        0,
        "skip the first N >= 0 rows of the shuffled data set, so that two training sets can be disjoint",
        group=DATA,
        metavar="N",
    )
    split_seed: int = flag(0, "seed >= 0 of the shuffle", group=DATA, metavar="S")
    resolution: int | None = flag(
        None,
        "crop and resample images to N x N pixels, N >= 1 (default: leave their size)",
        group=DATA,
        type=int,
        metavar="N",
    )
    gray: bool = flag(False, "convert the images of a folder to gray", group=DATA)
    skip_bad: bool = flag(False, "skip files of a folder that cannot be read or differ in size", group=DATA)
    captions: str = flag(
        "labels",
        "prompts for text conditioning: labels, from the class names; or a file: .txt, one line per image (of a folder "
        "2.png before 10.png); .json, a list; .jsonl, objects with file_name and text",
        group=DATA,
        metavar="FILE",
    )
    channels: tuple[int, ...] = flag(
        (32, 64), "channels of a UNet's levels; the one width of a DiT", group=NETWORK, type=parse_ints, metavar="C,..."
    )
    layers: int = flag(1, "residual blocks per level of a UNet, or blocks of a DiT, >= 1", group=NETWORK, metavar="N")
    heads: int = flag(8, "heads >= 1 of attention to text, or of a DiT", group=NETWORK, metavar="N")
    patch_size: int = flag(2, "side >= 1 of a DiT's patches, in pixels", group=NETWORK, metavar="N")
    text_channels: int = flag(32, "channels >= 1 of the text encoder", group=NETWORK, metavar="C")
    text_layers: int = flag(2, "layers >= 1 of the text encoder", group=NETWORK, metavar="N")
    tokenizer: str = flag(
        "", "folder of a CLIP tokenizer (default: learn one from the prompts)", group=NETWORK, metavar="DIR"
    )
    prediction: str = flag("epsilon", "what the network predicts", group=TRAINING, choices=PREDICTIONS)
    timesteps: int = flag(1000, "timesteps >= 1 of the noise schedule", group=TRAINING, metavar="T")
    beta_schedule: str = flag("linear", "betas of the noise schedule", group=TRAINING, choices=BETA_SCHEDULES)
    steps: int = flag(
        2000, "training steps >= 1; a larger number continues a finished run", group=TRAINING, metavar="N"
    )
    batch_size: int = flag(64, "images per step >= 1", group=TRAINING, metavar="B")
    learning_rate: float = flag(1e-3, "step size, positive", group=TRAINING, metavar="R")
    optimizer: str = flag("adam", "with PyTorch's constants", group=TRAINING, choices=OPTIMIZERS)
    weight_decay: float = flag(0.0, "decoupled weight decay >= 0 of adamw", group=TRAINING, metavar="W")
    warmup: int = flag(
        0, "steps >= 0 over which the learning rate rises linearly to its value", group=TRAINING, metavar="N"
    )
    clip: float = flag(
        0.0, "clip the gradient to a global norm of at most G >= 0; 0: never", group=TRAINING, metavar="G"
    )
    ema: float = flag(
        0.995,
        "decay of the moving average of the weights, which is saved as the model, from 0 to below 1; 0: save the last "
        "weights",
        group=TRAINING,
        metavar="D",
    )
    prompt_dropout: float = flag(
        0.1,
        "probability, from 0 to below 1, of training without the prompt or class, in a network that takes one",
        group=TRAINING,
        metavar="P",
    )
    seed: int = flag(0, "seed >= 0 of initial weights, batches and noise", group=TRAINING, metavar="S")

    def __post_init__(self) -> None:
        # Here, and not at the top: the checks import JAX.
        from dae_theory.checks import check_integer, check_seed

        check_integer("steps", self.steps, minimum=1)
        check_seed("seed", self.seed)
        if self.arch not in ARCHS:
            raise ValueError(f"arch must be one of {', '.join(ARCHS)}; got {self.arch!r}.")
        self.recipe()

    def recipe(self) -> Recipe:
        """The part that a training step depends on."""
        names = [field.name for field in dataclasses.fields(Recipe) if field.name != "dropout"]
        dropout = 0.0 if self.arch == "unet2d" else self.prompt_dropout
        return Recipe(**{name: getattr(self, name) for name in names}, dropout=dropout)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train, from :meth:`TrainSpec.recipe`; hashable, so that ``jit`` can take it as static.

    ``ValueError`` for values out of range.
    """

    batch_size: int
    learning_rate: float
    optimizer: str
    weight_decay: float
    """Decoupled; of adamw only."""
    warmup: int
    """Steps over which the learning rate rises linearly to its value."""
    clip: float
    """Largest global norm of the gradient; 0: do not clip."""
    ema: float
    """Decay of the moving average of the weights; 0: no average."""
    dropout: float
    """Probability of replacing the condition of an example by the empty prompt or the null class."""

    def __post_init__(self) -> None:
        from dae_theory.checks import check_integer, check_nonnegative, check_positive

        check_integer("batch_size", self.batch_size, minimum=1)
        check_positive("learning_rate", self.learning_rate)
        check_integer("warmup", self.warmup, minimum=0)
        check_nonnegative("weight_decay", self.weight_decay)
        check_nonnegative("clip", self.clip)
        for name in ("ema", "dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}.")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay = {self.weight_decay} needs the optimizer adamw, got {self.optimizer!r}.")


def spec_of(values: Mapping[str, Any]) -> TrainSpec:
    """The spec with the given fields; the others take the defaults of their architecture (:data:`DEFAULTS`).

    With ``num_samples``, or with empty ``duplicates``, nothing repeats, and ``singles`` is 0 unless given.
    """
    if "num_samples" in values or values.get("duplicates") == "":
        values = {"singles": 0, "duplicates": "", **values}
    return TrainSpec(**{**DEFAULTS.get(values.get("arch", TrainSpec.arch), {}), **values})
