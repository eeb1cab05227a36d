"""Read safetensors files that may be damaged or hostile, and write them.

The whole header is checked before any tensor is touched: every tensor's byte range must agree with its shape and dtype,
and together the ranges must cover the file exactly. Tensors are then memory-mapped, so that loading copies each value
once, into JAX's layout. Format: https://huggingface.co/docs/safetensors.

The safetensors package has a reader, ``safe_open(framework="numpy")``, which does not replace this one (version 0.8):
it copies a tensor before it returns it, so that a converted tensor is in memory twice; of a name that occurs twice in
the header it silently takes the last, and it ignores unknown fields; and releases before 0.8 have no bfloat16 in NumPy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sims.store.files import parse_json, read_json, replace_file

__all__ = ["FLOATS", "Tensor", "read_header", "read_index", "write_tensors"]

MAX_HEADER = 1 << 24
MAX_RANK = 8

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = {name: _DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
"""Dtypes that a parameter may have, by their names in a header."""


class Tensor(NamedTuple):
    """A tensor in a file, not yet read: its values are the bytes [start, stop)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """A read-only view of the memory-mapped file; copy it to keep the values."""
        if self.start == self.stop:
            return np.zeros(self.shape, _DTYPES[self.dtype])
        mapped = np.memmap(self.path, np.uint8, mode="r", offset=self.start, shape=(self.stop - self.start,))
        return mapped.view(np.ndarray).view(_DTYPES[self.dtype]).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file by name; ``ValueError`` if the file is not exactly what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated, or not a safetensors file: {size} bytes, with a header of {length}.")
        if length > MAX_HEADER:
            raise ValueError(f"{path}: a header of {length} bytes exceeds the limit of {MAX_HEADER}.")
        header = parse_json(file.read(length), f"{path} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__ must be an object, got {type(metadata).__name__}.")
    tensors = {name: _tensor(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {tensor.start}, not where the last one ended, {end}."
            )
        end = tensor.stop
    if end != size:
        raise ValueError(f"{path}: the tensors end at byte {end}, but the file at {size}; it is truncated or damaged.")
    return tensors


def read_index(path: Path) -> dict[str, list[str]]:
    """The files that a shard index names, with the tensors in each; ``ValueError`` for a name with a folder in it."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must be an object that maps tensors to files.")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise ValueError(
                f"{path}: tensor {name!r} is in {file!r}; shards are .safetensors files beside their index."
            )
        files.setdefault(file, []).append(name)
    return files


def write_tensors(path: Path, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Write a safetensors file, one tensor at a time.

    ``shapes`` has dtype and shape by name, and ``arrays`` yields the values in the same order. The file appears under
    its name only when it is complete. ``ValueError`` that names it if it cannot be written.
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        stop = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": names[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    replace_file(path, write)


def _tensor(path: Path, name: str, value: Any, data: int) -> Tensor:
    origin = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{origin}: must have dtype, shape and data_offsets and nothing else.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{origin}: unknown dtype {dtype!r}; supported are {', '.join(_DTYPES)}.")
    if not _naturals(shape) or not _naturals(offsets) or len(shape) > MAX_RANK or len(offsets) != 2:
        raise ValueError(f"{origin}: shape and data_offsets must be lists of integers from 0, data_offsets of two.")
    start, stop = offsets
    if stop - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"{origin}: {stop - start} bytes do not hold {dtype} of shape {shape}.")
    return Tensor(path, dtype, tuple(shape), data + start, data + stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
