"""The description of an experiment: frozen, validated, serializable, and all that decides its numbers.

A :class:`Spec` names a data set, the axes of a sweep (every tuple field is an axis), how each network is trained and
how it is evaluated. Two equal specs give equal results; where and how fast they are computed (output folder, memory
budget, devices) is not part of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dae_theory.checks import check_integer, check_seed
from sims.data.duplicates import parse_duplicates
from sims.flags import documented, flag, parse_bools, parse_floats, parse_ints, parse_names

if TYPE_CHECKING:
    Integers = tuple[int, ...]
    Numbers = tuple[float, ...]
    Names = tuple[str, ...]
    Switches = tuple[bool, ...]
    Integer, Number, Name, Switch = int, float | int, str, bool
else:
    # A single value or a list becomes a tuple at construction, so what __init__ takes is checked there.
    Integers = Numbers = Names = Switches = Integer = Number = Name = Switch = Any

__all__ = ["FORMAT", "LOOP_AXES", "OPTIMIZERS", "OPTIONAL_AXES", "SCHEDULES", "VALUE_AXES", "Spec"]

FORMAT = 3
"""Version of the serialized form; a newer one is refused. Version 1 had fewer axes, one value for each other field;
before version 3, measures of fewer rows than ``eval_samples`` took ``eval_draws`` draws of each row."""

LATER = ("biases",)
"""Fields that came after version 3, left out where they have their defaults."""

OPTIONAL_AXES = ("dataset", "separation", "duplicates", "optimizer", "batch_size", "tied", "biases")
"""Axes that are dimensions of the results only where they have more than one value."""

LOOP_AXES = (*OPTIONAL_AXES, "num_samples", "width")
"""Axes that change the data, the shapes or the program: they loop, and cells that share a program compile once."""

VALUE_AXES = ("penalty", "learning_rate", "init_scale", "sigma")
"""Axes of numbers: all combinations are mapped inside one compiled program."""

MAX_UNITS = 1_000_000
"""Training sets of a sweep; each has files of its own."""

MAX_CELLS = 1_000_000_000
"""Numbers of one measure in a sweep."""

MAX_ROWS = 100_000_000
"""Rows of a training set, and hidden units."""

LARGEST = 2**31 - 1
"""Sizes and counts: what 32-bit integers hold."""

OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam", "adamw")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "float64")


DATA_FLAGS, TRAINING_FLAGS = "the data and the objective", "training and evaluation"
"""Groups of options."""


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One experiment. Axes take a value or a sequence of values; everything is checked at construction.

    ``ValueError`` names the field that is out of range.

    >>> spec = Spec(num_samples=(4, 16), sigma=0.5, seeds=2)
    >>> spec.sigma, spec.num_cells
    ((0.5,), 4)
    >>> spec.shape["num_samples"], spec.shape["seed"]
    (2, 2)
    >>> Spec.from_dict(spec.to_dict()) == spec
    True
    """

    dataset: Names = flag(
        ("digits",),
        "data sets, an axis: digits; mixture:modes=4,dim=32,separation=3; idx:, cifar10:, npz:, images:, patches:PATH; "
        "or a path, whose kind is recognized (repeat the option for several)",
        group=DATA_FLAGS,
        action="append",
        metavar="NAME",
    )
    separation: Numbers = flag(
        (),
        "norm >= 0 of the modes of mixture: data sets that do not name it, an axis",
        group=DATA_FLAGS,
        type=parse_floats,
        metavar="S,...",
    )
    center: Switch = flag(False, "subtract the mean of the training rows, from held-out rows too", group=DATA_FLAGS)
    separable: Integer = flag(
        0,
        "keep a greedy subset of this many rows with pairwise negative cosines; 0: all rows",
        group=DATA_FLAGS,
        metavar="M",
    )
    duplicates: Names = flag(
        ("",),
        "KxM repeats the first K distinct rows M times each, and the others appear once; none: no repeats; an axis",
        group=DATA_FLAGS,
        type=parse_names,
        metavar="KxM,...",
    )
    singles: Integer = flag(
        0, "number >= 0 of rows that appear once, with one KxM: n = K M + singles", group=DATA_FLAGS, metavar="N"
    )
    held_out: Number = flag(
        0.2,
        "rows never trained on: a fraction of the data set below 1, or a count from 1",
        group=DATA_FLAGS,
        metavar="F",
    )
    split_seed: Integer = flag(
        0, "seed >= 0 of the split into training pool and held-out rows", group=DATA_FLAGS, metavar="SEED"
    )
    num_samples: Integers = flag(
        None,
        "training-set sizes n >= 1, an axis; repeated rows count as often as they occur; sets are nested in n at each "
        "seed; if left out 2,8,32,128,512, or K M + singles with duplicates",
        group=DATA_FLAGS,
        type=parse_ints,
        metavar="N,...",
    )
    width: Integers = flag((64,), "hidden units p >= 1, an axis", group=DATA_FLAGS, type=parse_ints, metavar="P,...")
    penalty: Numbers = flag(
        (1e-3,), "lambda >= 0 of the paper's objective, an axis", group=DATA_FLAGS, type=parse_floats, metavar="L,..."
    )
    learning_rate: Numbers = flag(
        (3e-3,), "step sizes > 0 of the optimizer, an axis", group=TRAINING_FLAGS, type=parse_floats, metavar="R,..."
    )
    init_scale: Numbers = flag(
        (0.1,),
        "norms > 0 of the columns at the start, an axis",
        group=TRAINING_FLAGS,
        type=parse_floats,
        metavar="C,...",
    )
    sigma: Numbers = flag(
        (0.1, 0.2, 0.5, 1.0),
        "noise levels > 0, in the units of the data, an axis",
        group=DATA_FLAGS,
        type=parse_floats,
        metavar="S,...",
    )
    seeds: Integer = flag(
        3, "repetitions >= 1, each with its own training rows, start and noise", group=TRAINING_FLAGS, metavar="K"
    )
    optimizer: Names = flag(
        ("adam",),
        f"update rules with PyTorch's constants, an axis: {', '.join(OPTIMIZERS)}",
        group=TRAINING_FLAGS,
        type=parse_names,
        metavar="NAME,...",
    )
    schedule: Name = flag(
        "constant", "learning rate over the run: constant, or cosine to zero", group=TRAINING_FLAGS, choices=SCHEDULES
    )
    batch_size: Integers = flag(
        (0,),
        "rows of a step, drawn with replacement, an axis; 0, or at least n: all rows",
        group=TRAINING_FLAGS,
        type=parse_ints,
        metavar="B,...",
    )
    steps: Integer = flag(2000, "optimizer steps >= 1", group=TRAINING_FLAGS, metavar="T")
    record_steps: Integers = flag(
        (),
        "numbers of steps in [0, steps], increasing, after which to measure; if left out at the end",
        group=TRAINING_FLAGS,
        type=parse_ints,
        metavar="T,...",
    )
    tied: Switches = flag(
        (False,),
        "whether W1 and W2 are one parameter, an axis; the option alone means true",
        group=TRAINING_FLAGS,
        type=parse_bools,
        nargs="?",
        const=(True,),
        metavar="false,true",
    )
    biases: Switches = flag(
        (False,),
        "whether networks have biases, which are not penalized, an axis; the option alone means true",
        group=DATA_FLAGS, type=parse_bools, nargs="?", const=(True,), metavar="false,true",
    )  # fmt: skip
    weight_decay: Number = flag(
        0.0,
        "decoupled weight decay >= 0 of adamw, which does not minimize the paper's objective; coupled decay is penalty",
        group=TRAINING_FLAGS,
        metavar="W",
    )
    eval_samples: Integer = flag(
        256,
        "training rows, and held-out rows, that measures use at most, >= 1",
        group=TRAINING_FLAGS,
        metavar="N",
    )
    eval_draws: Integer = flag(
        4,
        "noise draws for each of these rows, >= 1; more where there are fewer rows",
        group=TRAINING_FLAGS,
        metavar="N",
    )
    dtype: Name = flag("float32", "precision of training", group=TRAINING_FLAGS, choices=DTYPES)
    seed: Integer = flag(0, "root >= 0 of all randomness", group=TRAINING_FLAGS, metavar="SEED")

    def __post_init__(self) -> None:
        for name in (*OPTIONAL_AXES, "width", *VALUE_AXES, "record_steps"):
            object.__setattr__(self, name, _as_axis(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            if field.name != "num_samples":
                object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if not isinstance(self.center, bool):
            raise ValueError(f"center must be true or false, got {self.center!r}.")
        self._check_data()
        for name in ("num_samples", "width"):
            for value in getattr(self, name):
                check_integer(name, value, minimum=1, maximum=MAX_ROWS)
        for name in ("sigma", "learning_rate", "init_scale"):
            for value in getattr(self, name):
                _check_number(name, value, positive=True)
        for name in ("penalty", "separation"):
            for value in getattr(self, name):
                _check_number(name, value, positive=False)
        _check_number("held_out", self.held_out, positive=True)
        if self.held_out > 1 and self.held_out != int(self.held_out):
            raise ValueError(f"held_out must be a fraction below 1 or a whole number of rows, got {self.held_out}.")
        _check_number("weight_decay", self.weight_decay, positive=False)
        for name in ("seeds", "steps", "eval_samples", "eval_draws"):
            check_integer(name, getattr(self, name), minimum=1, maximum=LARGEST)
        check_integer("separable", self.separable, minimum=0, maximum=LARGEST)
        for name in ("split_seed", "seed"):
            check_seed(name, getattr(self, name))
        for value in self.batch_size:
            check_integer("batch_size", value, minimum=0, maximum=LARGEST)
        for name in ("tied", "biases"):
            for value in getattr(self, name):
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, got {value!r}.")
        for value in self.optimizer:
            _check_choice("optimizer", value, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("dtype", self.dtype, DTYPES)
        if self.weight_decay and self.optimizer != ("adamw",):
            raise ValueError(
                f"weight_decay = {self.weight_decay} means the decoupled decay of adamw; with optimizer "
                f"{', '.join(self.optimizer)} use penalty (sims.sweeps.train.penalty_from_weight_decay converts)."
            )
        for step in self.record_steps:
            check_integer("record_steps", step, minimum=0, maximum=self.steps)
        if list(self.record_steps) != sorted(set(self.record_steps)):
            raise ValueError(f"record_steps must increase, got {self.record_steps}.")
        if not self.record_steps:
            object.__setattr__(self, "record_steps", (self.steps,))
        lengths = ", ".join(f"{name} {size:,}" for name, size in self.shape.items() if size > 1)
        if self.num_cells // self.cells_per_unit > MAX_UNITS or math.prod(self.shape.values()) > MAX_CELLS:
            raise ValueError(
                f"the axes make {self.num_cells:,} cells in {self.num_cells // self.cells_per_unit:,} training sets "
                f"({lengths}); a sweep has at most {MAX_UNITS:,} training sets and {MAX_CELLS:,} recorded cells. Make "
                "several sweeps."
            )

    def _check_data(self) -> None:
        """Find ``num_samples`` where it is left out, and refuse axes that contradict one another."""
        check_integer("singles", self.singles, minimum=0, maximum=LARGEST)
        if self.singles and (len(self.duplicates) > 1 or "" in self.duplicates):
            raise ValueError(
                f"singles = {self.singles} needs duplicates, one value such as 20x60; else give num_samples, and rows "
                "that are not duplicates appear once."
            )
        for name in self.dataset:
            if not isinstance(name, str) or not name:
                raise ValueError(f"dataset must be a name, such as digits or mixture:modes=4; got {name!r}.")
            if self.separation and (not name.startswith("mixture:") or "separation" in name):
                raise ValueError(
                    f"separation is an axis of mixture: data sets that do not give it themselves, not of {name!r}."
                )
        for name in self.duplicates:
            if not isinstance(name, str):
                raise ValueError(f"duplicates must be KxM, such as 20x60, or empty; got {name!r}.")
        repeated = {name: math.prod(parse_duplicates(name)) if name else 0 for name in self.duplicates}
        if self.num_samples is None:
            if len(repeated) > 1:
                raise ValueError("several duplicates need num_samples: the rows of a training set, repeated ones too.")
            (rows,) = repeated.values()
            object.__setattr__(self, "num_samples", (rows + self.singles,) if rows else (2, 8, 32, 128, 512))
        object.__setattr__(self, "num_samples", _as_axis("num_samples", self.num_samples))
        for name, rows in repeated.items():
            for n in self.num_samples:
                check_integer("num_samples", n, minimum=1, maximum=MAX_ROWS)
                distinct = n - rows + (parse_duplicates(name)[0] if name else 0)
                if self.center and not self.separable and distinct == 1:
                    raise ValueError(
                        f"center subtracts the mean of the training rows: of one distinct row (num_samples = {n}) "
                        "nothing is left. Take more, or leave out center."
                    )
                if n < rows or (self.singles and n != rows + self.singles):
                    single = f" and singles = {self.singles} make {rows + self.singles}" if self.singles else " alone"
                    raise ValueError(
                        f"num_samples = {n} contradicts duplicates = {name}: {rows} rows{single}. Leave out one, or "
                        "change it."
                    )

    @property
    def shape(self) -> dict[str, int]:
        """Length of each dimension of the results, in their order."""
        dims = [name for name in OPTIONAL_AXES if len(getattr(self, name)) > 1]
        loops = {name: len(getattr(self, name)) for name in (*dims, "num_samples", "width")}
        values = {name: len(getattr(self, name)) for name in VALUE_AXES}
        return {**loops, "seed": self.seeds, **values, "step": len(self.record_steps)}

    @property
    def cells_per_unit(self) -> int:
        """Combinations of the value axes: networks that share a training set, a start and noise."""
        return math.prod(len(getattr(self, name)) for name in VALUE_AXES)

    @property
    def num_cells(self) -> int:
        """Networks trained."""
        return math.prod(self.shape.values()) // len(self.record_steps)

    @property
    def held_out_size(self) -> float | int:
        """``held_out`` as :func:`sims.data.datasets.load` takes it, for which a whole number is a count."""
        return int(self.held_out) if self.held_out >= 1 else self.held_out

    def identity(self, num_samples: int, duplicates: str | None = None) -> tuple[int, ...]:
        """For each row of a training set of ``num_samples`` the index of the distinct row that it is.

        0, 1, 2, ... without duplicates; with ``"KxM"`` (default: the first of the axis) the first K indices stand M
        times each, and others once.
        """
        name = self.duplicates[0] if duplicates is None else duplicates
        if not name:
            return tuple(range(num_samples))
        count, times = parse_duplicates(name)
        repeated = [i for i in range(count) for _ in range(times)]
        return (*repeated, *range(count, count + num_samples - len(repeated)))

    def source(self, dataset: str, separation: float | None = None) -> str:
        """The name of a data set with its separation, as :func:`sims.data.datasets.load` takes it."""
        if separation is None:
            return dataset
        return f"{dataset}{'' if dataset.endswith(':') else ','}separation={separation!r}"

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-able values, with its format number."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if not self.is_left_out(k)}
        return {"format": FORMAT, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}

    def is_left_out(self, name: str) -> bool:
        """Whether a field came after version 3 and has its default: records are then as they were before it."""
        return name in LATER and getattr(self, name) == getattr(type(self), name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """Inverse of :meth:`to_dict`; missing fields take their defaults.

        ``ValueError`` for a newer format and for fields that do not exist (the nearest names are suggested).
        """
        values = dict(values)
        version = values.pop("format", FORMAT)
        if version not in range(1, FORMAT + 1):
            raise ValueError(
                f"this spec has format {version}; this version reads formats 1 to {FORMAT}. Update dae-theory."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else f" Known fields: {', '.join(known)}."
                raise ValueError(f"unknown field {name!r} in the spec.{hint}")
        return cls(**values)


def _plain(value: Any) -> Any:
    """Python's own numbers and lists in place of NumPy's and JAX's."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.tolist() if hasattr(value, "tolist") else value


def _as_axis(name: str, value: Any) -> tuple[Any, ...]:
    value = _plain(value)
    axis = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    axis = tuple(_plain(item) for item in axis)
    for item in axis:
        if not isinstance(item, (str, bool, int, float)):
            raise ValueError(f"axis {name} takes a value or a list of values, got {item!r} in it.")
    if not axis and name not in ("record_steps", "separation"):
        raise ValueError(f"axis {name} is empty; give it at least one value.")
    if len(set(axis)) < len(axis):
        raise ValueError(f"axis {name} repeats a value: {axis}; list each once (repetitions are seeds).")
    return axis


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'zero or more'}, got {value}.")
    if value and not 1e-37 < value < 1e37:
        raise ValueError(f"{name} = {value!r} is outside the range of float32, 1e-37 to 1e37; rescale the data.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
