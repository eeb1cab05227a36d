"""Specs: validation that names the field, a round trip through JSON, and duplicates."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from sims.sweeps.spec import Spec


@hypothesis.given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True),
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4, unique=True),
    st.integers(1, 50),
    st.booleans(),
)
def test_round_trip_through_json(sizes, sigmas, seeds, tied):
    spec = Spec(num_samples=tuple(sizes), sigma=tuple(sigmas), seeds=seeds, tied=tied)
    again = Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert spec.num_cells == len(sizes) * len(sigmas) * seeds


def test_axes_accept_single_values_and_lists():
    spec = Spec(num_samples=4, sigma=[0.1, 0.2], steps=10)
    assert spec.num_samples == (4,)
    assert spec.sigma == (0.1, 0.2)
    assert spec.record_steps == (10,)
    assert list(spec.shape) == [
        "num_samples",
        "width",
        "seed",
        "penalty",
        "learning_rate",
        "init_scale",
        "sigma",
        "step",
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_samples", 0, "num_samples must be at least 1, got 0"),
        ("num_samples", 2.0, "num_samples must be an integer"),
        ("num_samples", (), "axis num_samples is empty"),
        ("num_samples", (2, 2), "repeats a value"),
        ("width", 0, "width must be at least 1"),
        ("sigma", 0.0, "sigma must be positive, got 0.0"),
        ("sigma", -0.5, "sigma must be positive"),
        ("sigma", float("nan"), "sigma must be a finite number"),
        ("penalty", -1e-3, "penalty must be zero or more"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("steps", 0, "steps must be at least 1"),
        ("seeds", 0, "seeds must be at least 1"),
        ("batch_size", -1, "batch_size must be at least 0"),
        ("optimizer", "lion", "optimizer must be one of sgd.*'lion'"),
        ("schedule", "linear", "schedule must be one of"),
        ("dtype", "float16", "dtype must be one of"),
        ("weight_decay", 0.1, "decoupled decay of adamw"),
        ("record_steps", (5000,), "record_steps must be at most 2000"),
        ("record_steps", (5, 3), "record_steps must increase"),
        ("optimizer", ("adam", "adam"), "repeats a value"),
        ("tied", (0,), "tied must be true or false"),
        ("dataset", (), "axis dataset is empty"),
        ("separation", (2.0,), "separation is an axis of mixture"),
        ("duplicates", "20", "KxM"),
        ("duplicates", "0x3", "KxM"),
        ("singles", 5, "needs duplicates"),
        ("held_out", 0.0, "held_out must be positive"),
        ("held_out", 3.5, "a fraction below 1 or a whole number of rows"),
        ("center", "false", "center must be true or false, got 'false'"),
        ("seed", 2**32, "seed must be at most 4294967295"),
        ("split_seed", 10**20, "split_seed must be at most 4294967295"),
        ("steps", 2**31, "steps must be at most 2147483647"),
        ("width", 10**9, "width must be at most 100000000"),
        ("seeds", 10**9, r"5,000,000,000 training sets .*seed 1,000,000,000.*at most 1,000,000 training sets"),
        ("sigma", 10**400, "sigma = 1000.* outside the range of float32"),
        ("penalty", 1e-300, "penalty = 1e-300 is outside the range of float32"),
        ("duplicates", 3, "duplicates must be KxM"),
        ("sigma", ({"a": 1},), "axis sigma takes a value or a list of values"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Spec(**{field: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Spec)])
def test_wrong_types_are_refused(field):
    accepted = []
    wrong = (
        None,
        "x",
        "",
        [],
        {},
        [[1]],
        [None],
        [{}],
        {"a": 1},
        float("nan"),
        float("inf"),
        -1,
        "false",
        b"x",
        10**400,
    )
    for value in wrong:
        try:
            Spec.from_dict({field: value})
        except ValueError:
            continue
        accepted.append(value)
    allowed = {
        "dataset": ["x", "false"],
        "num_samples": [None],
        "duplicates": [""],
        "record_steps": [[]],
        "separation": [[]],
    }
    assert accepted == allowed.get(field, [])


def test_axes_and_numbers_of_numpy_are_taken_as_pythons():
    spec = Spec(
        sigma=np.linspace(0.25, 1, 4),
        num_samples=np.arange(2, 4),
        width=jnp.asarray([4, 8]),
        seeds=np.int64(3),
        held_out=np.float64(0.5),
        tied=np.asarray([False, True]),
        penalty=[np.float64(0.5)],
        optimizer=np.asarray(["adam", "sgd"]),
    )
    assert spec.sigma == (0.25, 0.5, 0.75, 1.0)
    assert (spec.num_samples, spec.width, spec.seeds, spec.tied) == ((2, 3), (4, 8), 3, (False, True))
    assert spec == Spec.from_dict(json.loads(json.dumps(spec.to_dict())))


def test_newer_formats_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"format 99.*Update"):
        Spec.from_dict({"format": 99})
    with pytest.raises(ValueError, match="unknown field 'sigmas'.*Did you mean sigma"):
        Spec.from_dict({"sigmas": [0.1]})


def test_duplicates_fix_the_training_set():
    spec = Spec(duplicates="2x3", singles=2)
    assert spec.num_samples == (8,)
    assert spec.identity(8) == (0, 0, 0, 1, 1, 1, 2, 3)
    assert Spec().identity(3) == (0, 1, 2)
    assert Spec(duplicates=("", "2x3"), num_samples=8).identity(8, "2x3") == (0, 0, 0, 1, 1, 1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"duplicates": ("", "4x3"), "num_samples": (16, 8)}, "num_samples = 8 contradicts duplicates = 4x3: 12 rows"),
        ({"duplicates": "4x3", "singles": 2, "num_samples": 15}, "12 rows and singles = 2 make 14"),
        ({"duplicates": ("", "4x3")}, "several duplicates need num_samples"),
        ({"duplicates": ("2x2", "4x3"), "singles": 2}, "needs duplicates, one value"),
        ({"dataset": "mixture:modes=2,separation=1", "separation": 2.0}, "that do not give it themselves"),
        ({"optimizer": ("adam", "adamw"), "weight_decay": 0.1}, "decoupled decay of adamw"),
        ({"center": True, "num_samples": (1, 4)}, r"of one distinct row \(num_samples = 1\) nothing is left"),
        ({"center": True, "duplicates": "1x5"}, "of one distinct row"),
    ],
)
def test_contradictory_axes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Spec(**fields)


def test_axes_of_one_value_are_no_dimension_but_those_of_numbers():
    spec = Spec(num_samples=8, sigma=0.1, optimizer=("adam", "sgd"), tied=(False, True), duplicates=("", "2x2", "3x2"))
    assert list(spec.shape.items())[:3] == [("duplicates", 3), ("optimizer", 2), ("tied", 2)]
    assert spec.num_cells == 12 * spec.seeds


def test_a_spec_of_format_one_is_read():
    old = {"format": 1, "dataset": "digits", "optimizer": "sgd", "tied": True, "batch_size": 4, "num_samples": [3]}
    assert Spec.from_dict(old) == Spec(optimizer="sgd", tied=True, batch_size=4, num_samples=3)


def test_specs_are_frozen_and_hashable():
    spec = Spec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.steps = 3
    assert hash(spec) == hash(Spec())
