"""The noise of an item depends on the key, the item's number and the call, not on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from dae_theory.types import PRNGKey

__all__ = ["noise_at"]


def noise_at(key: PRNGKey, item: ArrayLike, call: ArrayLike, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Unit noise of item ``item``, at the start (``call`` 0) or after call s of the model (``call`` s + 1)."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, item), call), tuple(shape), dtype)
