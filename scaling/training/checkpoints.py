"""The whole state of a training run in one safetensors file, replaced atomically.

Leaves are named by their paths in the state. The file also holds the losses so far and a digest of the run's identity,
so that a checkpoint cannot be mistaken for that of another run, and a checksum of all values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.bridge.weights import read_header, write_tensors
from scaling.training.steps import TrainState
from sims.store import checksum

__all__ = ["digest", "restore", "save"]

LOSSES, IDENTITY, CHECKSUM = "losses", "identity", "checksum"


def save(path: Path, state: TrainState, losses: np.ndarray, identity: Mapping[str, Any]) -> None:
    """Write the state, the loss of each step and the run's identity to ``path``."""
    arrays = {name: np.asarray(leaf) for name, leaf in _named(jax.device_get(state)).items()}
    arrays |= {LOSSES: losses, IDENTITY: np.frombuffer(bytes.fromhex(digest(identity)), np.uint8)}
    arrays[CHECKSUM] = _checksum(arrays)
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    write_tensors(path, shapes, arrays.values())


def restore(path: Path, like: TrainState, identity: Mapping[str, Any]) -> tuple[TrainState, np.ndarray]:
    """The saved state, with the structure of ``like``, and the losses, bit for bit.

    ``ValueError`` for a file that is damaged, of another run, or does not fit the structure.
    """
    stored = {name: np.array(tensor.read()) for name, tensor in read_header(path).items()}
    # Checkpoints of earlier versions have none; the next one that is written does.
    if (found := stored.pop(CHECKSUM, None)) is not None and found.tobytes() != _checksum(stored).tobytes():
        raise ValueError(f"{path} is damaged: its values do not match its checksum; delete it to train from the start.")
    losses, origin = stored.pop(LOSSES, None), stored.pop(IDENTITY, None)
    if origin is None or origin.tobytes().hex() != digest(identity):
        raise ValueError(f"{path} is the checkpoint of another training run: choose another folder.")
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(like).items()}
    shapes = {name: (array.shape, array.dtype) for name, array in stored.items()}
    if losses is None or shapes != wanted or len(losses) != int(stored[".step"]):
        raise ValueError(f"{path} does not fit the state of this version: choose another folder.")
    leaves = [jnp.asarray(stored[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), losses


def digest(value: Any) -> str:
    """A digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _named(state: TrainState) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A digest of names, shapes and values, as bytes."""
    parts = sorted((name, checksum(array)) for name, array in arrays.items())
    return np.frombuffer(bytes.fromhex(digest(parts)), np.uint8)
