"""Sums over rows in equal chunks, which bound the memory of values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["sum_over"]


def sum_over(function: Callable[[Any], Array], rows: Any, chunk_size: int) -> Array:
    """``Σ function(row)`` in equal chunks of at most ``chunk_size`` rows; rows of weight 0 pad the last chunk."""
    count = len(jax.tree.leaves(rows)[0])
    steps = -(-count // chunk_size)
    size = -(-count // steps)
    if steps == 1:
        return jnp.sum(jax.vmap(function)(rows), axis=0)
    index = np.minimum(np.arange(steps * size), count - 1).reshape(steps, size)
    chunks = rows if steps * size == count else jax.tree.map(lambda a: a[index.ravel()], rows)
    chunks = jax.tree.map(lambda a: a.reshape(steps, size, *a.shape[1:]), chunks)
    is_real = jnp.arange(steps * size).reshape(steps, size) < count

    # Rematerialized in the backward pass, or the gradient would store the intermediates of every chunk.
    add = jax.checkpoint(functools.partial(_add_chunk, function), prevent_cse=False)
    value = jax.eval_shape(function, jax.tree.map(lambda a: a[0], rows))
    return jax.lax.scan(add, jnp.zeros(value.shape, value.dtype), (chunks, is_real))[0]


def _add_chunk(function: Callable[[Any], Array], total: Array, chunk: tuple[Any, Array]) -> tuple[Array, None]:
    rows, is_real = chunk
    values = jax.vmap(function)(rows)
    return total + jnp.tensordot(is_real.astype(values.dtype), values, axes=1), None
