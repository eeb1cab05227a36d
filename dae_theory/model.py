r"""The two-layer ReLU denoising autoencoder, ``f(y) = W₂ [W₁ᵀ y]₊`` :cite:`zhang26`, eq. (5).

Weights have shape (d, p), as in the paper; there are no biases. Functions take one example ``y`` of shape (d,); batch
with ``jax.vmap``. The code ``h(y) = [W₁ᵀ y]₊`` of shape (p,) is the representation whose spikiness tells memorized from
novel samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_integer
from dae_theory.precision import full_precision
from dae_theory.types import PRNGKey, Scalar

__all__ = [
    "ReluDae",
    "denoise",
    "encode",
    "init",
    "jacobian",
    "live_columns",
    "merge_parallel_columns",
    "parallel_groups",
]


class ReluDae(NamedTuple):
    """Weights of the autoencoder; a pytree. ``ReluDae(w, w)`` is the tied network."""

    w1: Float[Array, "d p"]
    """Encoder W₁, one unit a column."""
    w2: Float[Array, "d p"]
    """Decoder W₂, one unit a column."""


def init(key: PRNGKey, dim: int, width: int, *, scale: Scalar = 1.0, dtype: DTypeLike | None = None) -> ReluDae:
    """Random tied start: columns of W₁ = W₂ are ``scale`` × N(0, I/d), so of norm about ``scale``.

    ``dim`` d and ``width`` p are at least 1, else ``ValueError``. Column j draws from ``fold_in(key, j)``: a wider
    network extends a narrower one.
    """
    check_integer("dim", dim, minimum=1)
    check_integer("width", width, minimum=1)
    keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(width))
    columns = jax.vmap(lambda k: jax.random.normal(k, (dim,), dtype))(keys)
    w = columns.T * scale / dim**0.5
    return ReluDae(w, w)


@full_precision
def encode(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, " p"]:
    r"""The code :cite:`zhang26`, eq. (5).

    .. math:: h(y) = [W_1^\top y]_+
    """
    return jax.nn.relu(y @ dae.w1)


@full_precision
def denoise(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, " d"]:
    r"""The denoised sample :cite:`zhang26`, eq. (5).

    .. math:: f(y) = W_2 [W_1^\top y]_+
    """
    return dae.w2 @ encode(dae, y)


@full_precision
def jacobian(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, "d d"]:
    r"""Derivative of :func:`denoise` in the input: linear between the gates.

    .. math:: J(y) = W_2 \, \mathrm{diag}(1[W_1^\top y > 0]) \, W_1^\top

    At a gate (preactivation exactly 0) the unit counts as off, as in ``jax.nn.relu``.
    """
    active = (y @ dae.w1 > 0).astype(y.dtype)
    return (dae.w2 * active[None, :]) @ dae.w1.T


def live_columns(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> Bool[Array, " p"]:
    """Which units do something: ``‖w₁ⱼ‖ ‖w₂ⱼ‖`` above ``tolerance`` times the largest such product."""
    size = jnp.linalg.norm(dae.w1, axis=0) * jnp.linalg.norm(dae.w2, axis=0)
    return size > tolerance * jnp.max(size, initial=0.0)


@full_precision
def parallel_groups(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> Int[Array, " p"]:
    """For each unit the index of its group's first member: groups share a direction of w₁ up to ``tolerance``.

    Unit j joins the group of the first representative r < j with ``1 − cos(w₁ⱼ, w₁ᵣ) <= tolerance``; a representative
    is a unit that joined no earlier one. Units with ``w₁ = 0`` compute nothing and form one group.
    """
    norms = jnp.linalg.norm(dae.w1, axis=0)
    units = dae.w1 / jnp.where(norms > 0, norms, 1.0)[None, :]
    both_zero = (norms == 0)[:, None] & (norms == 0)[None, :]
    near = (1.0 - units.T @ units <= tolerance) | both_zero | jnp.eye(norms.size, dtype=bool)

    def join(leader: Bool[Array, " p"], j: Int[Array, ""]) -> tuple[Bool[Array, " p"], Int[Array, ""]]:
        candidate = near[j] & leader
        found = jnp.any(candidate)
        first = jnp.where(found, jnp.argmax(candidate), j)
        return leader.at[j].set(~found), first

    _, groups = jax.lax.scan(join, jnp.zeros(norms.size, bool), jnp.arange(norms.size))
    return groups


@full_precision
def merge_parallel_columns(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> ReluDae:
    r"""One balanced unit for each group of parallel units; absorbed units become zero columns, so the shape stays.

    .. math:: w_1 = \sqrt{\|v\|}\, \hat w, \quad w_2 = v/\sqrt{\|v\|}, \quad v = \sum_{j \in G} \|w_{1j}\| w_{2j}

    for a group G of direction ŵ. The function is unchanged where the group is exactly parallel, and the penalty cannot
    grow. A trained network splits a unit into several, (c₁w₁, c₁w₂), (c₂w₁, c₂w₂) with c₁² + c₂² = 1, at no cost: count
    units only after merging.
    """
    groups = parallel_groups(dae, tolerance=tolerance)
    width = groups.size
    norms = jnp.linalg.norm(dae.w1, axis=0)
    v = jax.ops.segment_sum((dae.w2 * norms[None, :]).T, groups, num_segments=width).T
    # The representative's own direction would forget members that differ within the tolerance.
    direction = jax.ops.segment_sum((dae.w1 * norms[None, :]).T, groups, num_segments=width).T
    length = jnp.linalg.norm(direction, axis=0)
    direction = direction / jnp.where(length > 0, length, 1.0)[None, :]
    root = jnp.sqrt(jnp.where(length > 0, jnp.linalg.norm(v, axis=0), 0.0))
    inverse_root = jnp.where(root > 0, 1.0 / jnp.where(root > 0, root, 1.0), 0.0)
    return ReluDae(direction * root[None, :], v * inverse_root[None, :])
