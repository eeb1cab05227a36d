"""Specs: validation that names the field, a round trip through JSON, and duplicates."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
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
    ],
)
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Spec(**{field: value})


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
