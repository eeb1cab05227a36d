"""Damaged and hostile files: whatever they hold, a ``ValueError`` with a message, and no large allocation before it."""

import copy
import functools
import json
import pathlib
import sys
import tempfile
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import network

sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))
from cases import CASES

from scaling import load_model, save_pretrained
from scaling.bridge import weights
from scaling.diffusion import schedules
from scaling.models.config import ParamSpec
from scaling.models.model import parse_config
from sims.store import files

UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
CONFIGS = {name: case.config for name, case in CASES.items()} | {"tiny": UNET}
many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Anything that JSON can say, and values near what the fields hold.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([2**31, 2**63, 2**70, -(2**63), 10**40])
    | st.floats()
    | st.sampled_from(["", "silu", "DownBlock2D", "conv", "\u0000", "../x", "F32", "a" * 300])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@functools.cache
def saved():
    """The bytes of a small model's files."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(network(UNET), folder)
        return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


WEIGHTS = "diffusion_pytorch_model.safetensors"


def written(folder, files):
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def refuses_or_loads(function):
    """Nothing but a ``ValueError`` with a message may come out."""
    try:
        return function()
    except ValueError as error:
        message = str(error)
    assert len(message) > 10
    return None


def refuses_at_once(function):
    """The same, with less than 64 MB allocated on the way."""
    tracemalloc.start()
    result = refuses_or_loads(function)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result is None
    assert peak < 64e6


def header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(fields, body):
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + body


@many
@given(data=st.data())
def test_bytes_changed_anywhere(tmp_path, data):
    changed = bytearray(saved()[WEIGHTS])
    head = 8 + int.from_bytes(changed[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed)))]
    written(tmp_path, saved() | {WEIGHTS: bytes(changed)})
    model = refuses_or_loads(lambda: load_model(tmp_path))
    # A byte of a number or of metadata can change without harm to the file; then every parameter is there.
    assert model is None or model.params.keys() == parse_config(UNET).parameters().keys()


@many
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 300))
def test_arbitrary_bytes(tmp_path, body, length):
    written(tmp_path, saved() | {WEIGHTS: length.to_bytes(8, "little") + body})
    assert refuses_or_loads(lambda: load_model(tmp_path)) is None


@many
@given(data=st.data())
def test_headers_that_say_anything(tmp_path, data):
    fields, body = header(saved()[WEIGHTS])
    name = data.draw(st.sampled_from(sorted(fields)))
    match data.draw(st.sampled_from(["value", "field", "name", "drop", "metadata"])):
        case "value":
            fields[name] = data.draw(JSON)
        case "field":
            part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "format"]))
            fields[name] = dict(fields[name]) | {part: data.draw(JSON)}
        case "name":
            fields[data.draw(st.text(max_size=20))] = fields.pop(name)
        case "drop":
            del fields[name]
        case "metadata":
            fields["__metadata__"] = data.draw(JSON)
    written(tmp_path, saved() | {WEIGHTS: with_header(fields, body)})
    refuses_or_loads(lambda: load_model(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40, 2**40], "data_offsets": [0, 2**82]}, "bytes|ended|end at"),
        ({"data_offsets": [0, 2**62]}, "do not hold"),
        ({"shape": [-1, -4]}, "integers from 0"),
        ({"shape": [True, 4]}, "integers from 0"),
        ({"shape": [1] * 9 + [4]}, "integers from 0"),
        ({"dtype": "F8_E5M2"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": "I32"}, "not floating point"),
        ({"extra": 1}, "nothing else"),
    ],
)
def test_headers_that_lie(tmp_path, change, message):
    fields, body = header(saved()[WEIGHTS])
    name = next(name for name in fields if name != "__metadata__")
    fields[name] = fields[name] | change
    written(tmp_path, saved() | {WEIGHTS: with_header(fields, body)})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_header_of_repeated_names_overlaps_and_nests_too_deep(tmp_path):
    fields, body = header(saved()[WEIGHTS])
    # The repeated entry is good in itself, and the same.
    text = json.dumps(fields)[:-1] + f', "conv_in.bias": {json.dumps(fields["conv_in.bias"])}}}'
    doubled = len(text).to_bytes(8, "little") + text.encode() + body
    with pytest.raises(ValueError, match="a key appears twice"):
        load_model(written(tmp_path, saved() | {WEIGHTS: doubled}))
    first, second = [name for name in fields if name != "__metadata__"][:2]
    aliased = with_header(fields | {first: fields[second]}, body)
    deep = b"[" * 100_000
    nested = len(deep).to_bytes(8, "little") + deep
    for damaged in (doubled, aliased, nested, with_header(fields, body + b"\0"), with_header(fields, body[:-1]), b""):
        written(tmp_path, saved() | {WEIGHTS: damaged})
        refuses_at_once(lambda: load_model(tmp_path))


@many
@given(data=st.data())
def test_configurations_that_say_anything(data):
    config = copy.deepcopy(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(config)) | st.text(max_size=12))
        value = config.get(name)
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(JSON)
        else:
            config[name] = data.draw(JSON)

    def shapes():
        apply = parse_config(config)
        inputs, more = apply.inputs(jnp.float32)
        specs = apply.parameters()
        assert all(isinstance(spec, ParamSpec) and all(n > 0 for n in spec.shape) for spec in specs.values())
        return inputs, more

    refuses_or_loads(shapes)


@many
@given(data=st.data())
def test_schedules_that_say_anything(data):
    config = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 100}
    known = sorted({*config, "beta_schedule", "prediction_type", "timestep_spacing", "trained_betas", "steps_offset"})
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from(known) | st.text(max_size=12))] = data.draw(JSON)
    refuses_or_loads(lambda: schedules.from_config(config))


@many
@given(JSON, st.binary(max_size=60))
def test_json_files_that_hold_anything(tmp_path, value, noise):
    path = tmp_path / "model.safetensors.index.json"
    for data in (json.dumps(value).encode(), noise, json.dumps({"weight_map": value}).encode()):
        path.write_bytes(data)
        refuses_or_loads(lambda: files.read_json(path))
        refuses_or_loads(lambda: weights.read_index(path))


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/a.safetensors", "b/a.safetensors", "a.bin", "", 3, None])
def test_an_index_names_files_beside_it_alone(tmp_path, shard):
    written(tmp_path, {"config.json": saved()["config.json"]})
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(ValueError, match="beside their index"):
        load_model(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    folder.mkdir()
    outside.write_bytes(saved()[WEIGHTS])
    written(folder, {"config.json": saved()["config.json"]})
    (folder / WEIGHTS).symlink_to(outside)
    with pytest.raises(ValueError, match="outside the model's folder"):
        load_model(folder)


def test_a_configuration_of_absurd_size_is_refused_before_anything_is_allocated(tmp_path):
    huge = UNET | {"block_out_channels": [65536] * 4, "layers_per_block": 200, "norm_num_groups": 1}
    huge |= {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    for config in (huge, UNET | {"block_out_channels": [2**40]}):
        written(tmp_path, saved() | {"config.json": json.dumps(config).encode()})
        refuses_at_once(lambda: load_model(tmp_path))


def test_undamaged_files_load(tmp_path):
    model = load_model(written(tmp_path, saved()))
    for name, param in network(UNET).params.items():
        np.testing.assert_array_equal(model.params[name], param)
