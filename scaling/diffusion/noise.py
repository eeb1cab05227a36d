"""The noise of an item: a function of the key, the item's number and the call, whatever the batch it is drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from dae_theory.types import PRNGKey

__all__ = ["noise_at"]


def noise_at(key: PRNGKey, item: ArrayLike, call: ArrayLike, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """Item ``item``'s unit noise at the start (``call`` 0) or after the s-th call of the model (``call`` s + 1)."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, item), call), tuple(shape), dtype)
