r"""Changes of the weights that leave the network's function alone, and networks compared modulo them; derived here.

A unit contributes ``‖w₁‖ w₂ [ŵ₁ᵀ y]₊``: a direction ŵ₁ and a coefficient ``‖w₁‖ w₂`` say all of it. Three freedoms are
left: its place among the columns; its scale, ``(c w₁, w₂/c)``, which changes the penalty alone; and its number, since
``(c₁ w₁, c₁ w₂), (c₂ w₁, c₂ w₂)`` with ``c₁² + c₂² = 1`` compute the same at the same penalty. Optimizers use them all:
count and compare units only after :func:`canonicalize`. Weights have shape (d, p), one unit a column; batch with
``jax.vmap``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, is_concrete
from dae_theory.model import ReluDae, live_columns
from dae_theory.precision import full_precision
from dae_theory.types import Scalar

__all__ = [
    "canonicalize",
    "column_norms",
    "group_sums",
    "match_columns",
    "merge_parallel_columns",
    "pad_columns",
    "parallel_groups",
    "symmetry_tangents",
    "unit_columns",
    "weight_distance_sq",
]


# Jitted here, for eager callers: each call would compile its scan anew.
@jax.jit
@full_precision
def parallel_groups(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> Int[Array, " p"]:
    r"""For each unit the index of its group's first member: groups share a direction of w₁ up to ``tolerance``.

    Unit j joins the group of the first representative r < j with

    .. math:: 1 - \cos(w_{1j}, w_{1r}) = \tfrac12 \|\hat w_{1j} - \hat w_{1r}\|^2 \le \text{tolerance};

    a representative is a unit that joined no earlier one. The difference is computed as such, so tolerances down to the
    square of the rounding unit mean what they say. Units with ``w₁ = 0`` compute nothing and form one group.
    """
    units = unit_columns(dae.w1)
    silent = jnp.all(units == 0, axis=0)

    def join(leads: Bool[Array, " p"], j: Int[Array, ""]) -> tuple[Bool[Array, " p"], Int[Array, ""]]:
        gap = 0.5 * jnp.sum(jnp.square(units - units[:, j][:, None]), axis=0)
        candidate = leads & (gap <= tolerance) & (silent == silent[j])
        found = jnp.any(candidate)
        return leads.at[j].set(~found), jnp.where(found, jnp.argmax(candidate), j)

    _, groups = jax.lax.scan(join, jnp.zeros(silent.size, bool), jnp.arange(silent.size))
    return groups


@full_precision
def merge_parallel_columns(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> ReluDae:
    r"""One balanced unit for each group of :func:`parallel_groups`; absorbed units become zero columns.

    .. math:: w_1 = \sqrt{\|v\|}\, \hat u, \quad w_2 = v/\sqrt{\|v\|}, \quad
              v = \sum_{j \in G} \|w_{1j}\| w_{2j}, \quad u = \sum_{j \in G} \|w_{2j}\| w_{1j}

    The unit stands at the place of the group's first member. The function is unchanged where the group is exactly
    parallel, and the penalty cannot grow.
    """
    groups = parallel_groups(dae, tolerance=tolerance)
    v = _sum_columns(dae.w2 * column_norms(dae.w1)[None, :], groups)
    # Weighted by what each member contributes: the representative's own direction would forget the others.
    u = unit_columns(_sum_columns(dae.w1 * column_norms(dae.w2)[None, :], groups))
    size = column_norms(v)
    root = jnp.where(size > 0, jnp.sqrt(jnp.where(size > 0, size, 1.0)), 0.0)
    return ReluDae(u * root[None, :], unit_columns(v) * root[None, :])


@full_precision
def canonicalize(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> ReluDae:
    """One network for all that differ by the order, the scale or the number of parallel units.

    Parallel units are merged and balanced (:func:`merge_parallel_columns`), those that :func:`live_columns` calls dead
    are set to zero, and columns are sorted by falling norm, those of equal norm (to the square root of the rounding
    unit) by ``Σ_i cos(i) w₁ᵢ``. Cosines of distinct integers are linearly independent over the algebraic numbers
    (Lindemann-Weierstrass), so two different columns of floating-point numbers never tie.

    ``tolerance`` is that of both helpers. It should exceed what separates units that are meant to be one, and nothing
    else: then the result is the same, to rounding, for every network of the class, and applying it twice changes
    nothing. Two networks of one function have one form but for coincidences, in which units satisfy a linear relation:
    three encoder columns that sum to zero, with a common decoder, compute the same as their negatives.
    :func:`dae_theory.function_space.function_distance_sq` sees through these too.
    """
    merged = merge_parallel_columns(dae, tolerance=tolerance)
    live = live_columns(merged, tolerance=tolerance)
    w1, w2 = (jnp.where(live[None, :], w, 0.0) for w in merged)
    order = _canonical_order(w1)
    return ReluDae(w1[:, order], w2[:, order])


@jax.jit
@full_precision
def match_columns(dae_a: ReluDae, dae_b: ReluDae) -> Int[Array, " p"]:
    r"""The order of b's columns that fits a's best; both networks of one shape.

    .. math:: \arg\min_\pi \sum_j \|w_{1j}^a - w_{1\pi(j)}^b\|^2 + \|w_{2j}^a - w_{2\pi(j)}^b\|^2

    Exact, by the Hungarian algorithm in O(p³). ``ValueError`` if the shapes differ.
    """
    if dae_a.w1.shape != dae_b.w1.shape:
        raise ValueError(f"networks must have one shape to match units, got {dae_a.w1.shape} and {dae_b.w1.shape}.")
    # Squares of the norms are the same for every assignment.
    cost = -(dae_b.w1.T @ dae_a.w1 + dae_b.w2.T @ dae_a.w2)
    # An assignment has no derivative, and its loops no reverse mode; optax's arrays are of the default dtype.
    unit_of_b, unit_of_a = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost).astype(float))
    return unit_of_b[jnp.argsort(unit_of_a)]


@full_precision
def weight_distance_sq(dae_a: ReluDae, dae_b: ReluDae, *, tolerance: Scalar = 1e-3) -> Float[Array, ""]:
    r"""Squared distance of the weights modulo order, scale and number of units.

    .. math:: \min_\pi \|\bar W_1^a - \bar W_1^b \pi\|_F^2 + \|\bar W_2^a - \bar W_2^b \pi\|_F^2

    over permutations, where the bars are :func:`canonicalize` at ``tolerance`` and the narrower network is padded with
    zero columns. Its root is a metric on canonical forms; it jumps where two units cross the tolerance. ``ValueError``
    if the dimensions d differ.
    """
    width = max(dae_a.w1.shape[1], dae_b.w1.shape[1])
    a, b = (canonicalize(pad_columns(dae, width), tolerance=tolerance) for dae in (dae_a, dae_b))
    order = match_columns(a, b)
    return jnp.sum(jnp.square(a.w1 - b.w1[:, order])) + jnp.sum(jnp.square(a.w2 - b.w2[:, order]))


@full_precision
def group_sums(dae: ReluDae, data: Float[Array, "n d"], *, tolerance: Scalar = 1e-3) -> Float[Array, " n"]:
    r"""Squared length that the units aligned with each row share :cite:`zhang26`, Corollary 3.2.

    .. math:: Q_i = \sum_{j \,\parallel\, x_i} \|w_{1j}\| \|w_{2j}\|

    over units whose encoder and decoder both have ``1 − cos(w, xᵢ) <= tolerance``. However a network has split and
    scaled its units, at the memorizing minimizer ``Q_i = q_i = (‖xᵢ‖² − nλ)₊/(‖xᵢ‖² + σ²)``, which is
    :func:`dae_theory.minimizers.shrinkage` of ``‖xᵢ‖²`` and 1/n (m/n for a row repeated m times). ``ValueError`` for
    bad data.
    """
    check_data(data)
    rows = unit_columns(data.T)
    aligned = jnp.ones((data.shape[0], dae.w1.shape[1]), bool)
    for w in dae:
        aligned &= 1.0 - rows.T @ unit_columns(w) <= tolerance
    return jnp.sum(jnp.where(aligned, _sizes(dae)[None, :], 0.0), axis=1)


def symmetry_tangents(
    dae: ReluDae,
    *,
    families: Sequence[str] = ("rescaling", "splitting"),
    data: Float[Array, "m d"] | None = None,
    tolerance: Scalar = 1e-3,
) -> Float[Array, "k 2 d p"]:
    r"""Orthonormal basis of the directions in which the weights can move for nothing.

    Entry [i, 0] moves W₁ and [i, 1] moves W₂; rows are orthonormal over all 2dp coordinates, and k >= 0 is the
    dimension of the span. Each family acts from the right, ``(W₁ B, W₂ B')``:

    * ``"rescaling"``, one a live unit: ``B = −B' = E_jj``. The function stands; the penalty does only to first order at
      balance, where its curvature is 4λ.
    * ``"splitting"``, one for each unit beyond the first in a group that is parallel in encoder and decoder, with
      ``α² = ‖w₁‖ ‖w₂‖``: ``B = B' = (α_j/α_r) E_rr − (α_r/α_j) E_jj``. Function and, at balance, penalty stand. (A dead
      unit can only grow out of a live one, not shrink below zero: a cone without a tangent space.)
    * ``"rotation"``, one for each two units with the same gates on all rows of ``data``, not all off:
      ``B = B' = E_ij − E_ji``. The block's linear map ``W₂ W₁ᵀ`` and the penalty stand, hence the main term of the
      risk; the gates move, so it is flat up to exponentially small terms only. It spans the splittings of its units.

    A unit is live and a group parallel as in :func:`live_columns` and :func:`parallel_groups`. Not jittable: k is a
    shape. ``ValueError`` for traced weights, an unknown family, and rotations without data.
    """
    if not is_concrete(dae, data):
        raise ValueError("weights and data must be concrete: the number of tangents is a shape; call it outside jit.")
    unknown = sorted(set(families) - set(_FAMILIES))
    if unknown:
        raise ValueError(f"unknown families {unknown}; choose among {sorted(_FAMILIES)}.")
    d, p = dae.w1.shape
    actions = [action for family in families for action in _FAMILIES[family](dae, data, tolerance)]
    if not actions:
        return jnp.zeros((0, 2, d, p), dae.w1.dtype)
    w1, w2 = (np.asarray(w, np.float64) for w in dae)
    moves = np.stack([np.stack([w1 @ b1, w2 @ b2]) for b1, b2 in actions]).reshape(len(actions), -1)
    moves /= np.linalg.norm(moves, axis=1, keepdims=True)
    _, strength, basis = np.linalg.svd(moves, full_matrices=False)
    kept = strength > np.finfo(moves.dtype).eps * max(moves.shape) * strength[0]
    return jnp.asarray(basis[kept].reshape(-1, 2, d, p), dae.w1.dtype)


def column_norms(w: Float[Array, "d p"]) -> Float[Array, " p"]:
    """Euclidean norms of columns; the gradient at a zero column is zero, not NaN."""
    square = jnp.sum(jnp.square(w), axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def unit_columns(w: Float[Array, "d p"]) -> Float[Array, "d p"]:
    """Columns divided by their norms; zero columns stay zero, with a finite gradient."""
    norms = column_norms(w)
    return w / jnp.where(norms > 0, norms, 1.0)[None, :]


def pad_columns(dae: ReluDae, width: int) -> ReluDae:
    """Zero columns appended up to ``width``."""
    return ReluDae(*(jnp.pad(w, ((0, 0), (0, width - w.shape[1]))) for w in dae))


def _sum_columns(w: Float[Array, "d p"], groups: Int[Array, " p"]) -> Float[Array, "d p"]:
    return jax.ops.segment_sum(w.T, groups, num_segments=groups.size).T


def _canonical_order(w1: Float[Array, "d p"]) -> Int[Array, " p"]:
    norms = column_norms(w1)
    falling = jnp.argsort(-norms)
    # Norms that are equal in theory differ by rounding: a new rank begins at a gap, not at a difference.
    gaps = -jnp.diff(norms[falling]) > jnp.sqrt(jnp.finfo(norms.dtype).eps) * jnp.max(norms, initial=0.0)
    ranks = jnp.cumsum(jnp.pad(gaps, (1, 0)).astype(int))
    rank = jnp.zeros_like(ranks).at[falling].set(ranks)
    probe = jnp.cos(jnp.arange(1, w1.shape[0] + 1, dtype=w1.dtype)) @ w1
    return jnp.lexsort((-probe, rank))


def _sizes(dae: ReluDae) -> Float[Array, " p"]:
    return column_norms(dae.w1) * column_norms(dae.w2)


_Actions: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray]]


def _rescalings(dae: ReluDae, data: Array | None, tolerance: Scalar) -> _Actions:
    del data
    for j in np.flatnonzero(live_columns(dae, tolerance=tolerance)):
        stretch = _elementary(dae, (j, j, 1.0))
        yield stretch, -stretch


def _splittings(dae: ReluDae, data: Array | None, tolerance: Scalar) -> _Actions:
    del data
    stacked = jnp.concatenate([unit_columns(w) for w in dae])
    groups = np.asarray(parallel_groups(ReluDae(stacked, stacked), tolerance=tolerance))
    alpha = np.sqrt(np.asarray(_sizes(dae)))
    for members in _alike(groups, np.asarray(live_columns(dae, tolerance=tolerance))):
        r = members[0]
        for j in members[1:]:
            ratio = float(alpha[j] / alpha[r])
            share = _elementary(dae, (r, r, ratio), (j, j, -1.0 / ratio))
            yield share, share


def _rotations(dae: ReluDae, data: Array | None, tolerance: Scalar) -> _Actions:
    if data is None:
        raise ValueError('the family "rotation" needs data: the rows on which units must have the same gates.')
    check_data(data)
    gates = np.asarray(data) @ np.asarray(dae.w1) > 0
    _, patterns = np.unique(gates, axis=1, return_inverse=True)
    for members in _alike(patterns, np.asarray(live_columns(dae, tolerance=tolerance)) & gates.any(axis=0)):
        for i, j in itertools.combinations(members, 2):
            turn = _elementary(dae, (i, j, 1.0), (j, i, -1.0))
            yield turn, turn


def _alike(labels: np.ndarray, eligible: np.ndarray) -> Iterator[np.ndarray]:
    for label in np.unique(labels[eligible]):
        yield np.flatnonzero(eligible & (labels == label))


def _elementary(dae: ReluDae, *entries: tuple[np.intp, np.intp, float]) -> np.ndarray:
    action = np.zeros((dae.w1.shape[1],) * 2)
    for i, j, value in entries:
        action[i, j] = value
    return action


_FAMILIES: Mapping[str, Callable[[ReluDae, Array | None, Scalar], _Actions]] = MappingProxyType(
    {"rescaling": _rescalings, "splitting": _splittings, "rotation": _rotations}
)
