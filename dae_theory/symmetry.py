r"""Changes of the weights that leave the network's function unchanged, and comparison modulo them; derived here.

A unit contributes ``‖w₁‖ w₂ [ŵ₁ᵀ y]₊``, which depends on the direction ŵ₁ and the coefficient ``‖w₁‖ w₂`` alone. Three
symmetries remain: permutation of the units; rescaling, ``(c w₁, w₂/c)``, which changes only the penalty; and splitting,
since the two units ``(c₁ w₁, c₁ w₂), (c₂ w₁, c₂ w₂)`` with ``c₁² + c₂² = 1`` have the same function and penalty as one.
Optimizers make use of all three: count and compare units only after :func:`canonicalize`. Weights have shape (d, p),
one column per unit; batch with ``jax.vmap``.

With biases a unit is ``‖w₁‖ w₂ [ŵ₁ᵀ y + t]₊``, where ``t = b₁/‖w₁‖`` is the offset of its gate, and the symmetries act
on b₁ as on w₁. Units are parallel if their gates are the same hyperplane: then t must agree too, which is measured in
the largest \|t\| of the network. A unit with w₁ = 0 adds a constant, as b₂ does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_data, is_concrete
from dae_theory.model import (
    AffineDae,
    D,
    Dae,
    ReluDae,
    augmented,
    by_unit,
    live_columns,
    preactivations,
    with_biases,
)
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
    "rotation_pairs",
    "symmetry_tangents",
    "unit_columns",
    "weight_distance_sq",
]


# Jitted, because an eager scan compiles on every call.
@jax.jit
@full_precision
def parallel_groups(dae: Dae, *, tolerance: Scalar = 1e-3) -> Int[Array, " p"]:
    r"""Group units whose encoder directions agree up to ``tolerance``: for each unit, the index of its group's first.

    Unit j joins the group of the first representative r < j with

    .. math:: 1 - \cos(w_{1j}, w_{1r}) = \tfrac12 \|\hat w_{1j} - \hat w_{1r}\|^2 \le \text{tolerance};

    a representative is a unit that joined no earlier one. The right side is computed from the difference, so tolerances
    down to the square of the rounding unit are meaningful. Units with ``w₁ = 0`` respond to nothing and form one group.
    With biases the difference of the gates' offsets, squared and halved, is added.
    """
    return _groups(_gates(dae), tolerance)


def _gates(dae: Dae) -> Float[Array, "D p"]:
    """One column per unit, the direction and (with biases) the relative offset of its gate; zero where w₁ is."""
    units = unit_columns(dae.w1)
    if not isinstance(dae, AffineDae):
        return units
    norms = column_norms(dae.w1)
    offsets = jnp.where(norms > 0, dae.b1 / jnp.where(norms > 0, norms, 1.0), 0.0)
    largest = jnp.max(jnp.abs(offsets), initial=0.0)
    return jnp.concatenate([units, offsets[None, :] / jnp.where(largest > 0, largest, 1.0)])


def _groups(units: Float[Array, "D p"], tolerance: Scalar) -> Int[Array, " p"]:
    is_zero = jnp.all(units == 0, axis=0)

    def join(is_representative, j):
        gap = 0.5 * jnp.sum(jnp.square(units - units[:, j][:, None]), axis=0)
        candidates = is_representative & (gap <= tolerance) & (is_zero == is_zero[j])
        joins = jnp.any(candidates)
        return is_representative.at[j].set(~joins), jnp.where(joins, jnp.argmax(candidates), j)

    _, groups = jax.lax.scan(join, jnp.zeros(is_zero.size, bool), jnp.arange(is_zero.size))
    return groups


@full_precision
def merge_parallel_columns(dae: Dae, *, tolerance: Scalar = 1e-3) -> Dae:
    r"""Merge each group of :func:`parallel_groups` into one balanced unit; the other members become zero columns.

    .. math:: w_1 = \sqrt{\|v\|}\, \hat u, \quad w_2 = v/\sqrt{\|v\|}, \quad
              v = \sum_{j \in G} \|w_{1j}\| w_{2j}, \quad u = \sum_{j \in G} \|w_{2j}\| w_{1j}

    With biases, u has the coordinate b₁ too, and units with w₁ = 0 are added to b₂. The merged unit takes the place of
    the group's first member. The function is unchanged if the group is exactly
    parallel, and the penalty does not increase.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.array([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> merge_parallel_columns(dae).w1.tolist()  # the first two units share a direction: 2 · 1 + 1 · 2 = 2²
        [[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    groups, d = parallel_groups(dae, tolerance=tolerance), dae.w1.shape[0]
    v = _sum_columns(dae.w2 * column_norms(dae.w1)[None, :], groups)
    # A mean weighted by what each member contributes: the first member's direction would ignore the others.
    total = _sum_columns(augmented(dae)[0] * column_norms(dae.w2)[None, :], groups)
    norms, size = column_norms(total[:d]), column_norms(v)
    u = total / jnp.where(norms > 0, norms, 1.0)[None, :]
    root = jnp.where(size > 0, jnp.sqrt(jnp.where(size > 0, size, 1.0)), 0.0)
    encoder, w2 = u * root[None, :], unit_columns(v) * root[None, :]
    if not isinstance(dae, AffineDae):
        return ReluDae(encoder, w2)
    constant = jnp.where(jnp.all(dae.w1 == 0, axis=0), jax.nn.relu(dae.b1), 0.0)
    return AffineDae(encoder[:d], encoder[d], w2, dae.b2 + dae.w2 @ constant)


@full_precision
def canonicalize(dae: Dae, *, tolerance: Scalar = 1e-3) -> Dae:
    """A canonical form, the same for all networks that differ by order, scale or splitting of their units.

    Parallel units are merged and balanced (:func:`merge_parallel_columns`), units that are dead by :func:`live_columns`
    are set to zero, and columns are sorted by descending norm; those of equal norm (to the square root of the rounding
    unit) are sorted by ``Σ_i cos(i) w₁ᵢ``. Cosines of distinct integers are linearly independent over the algebraic
    numbers (Lindemann-Weierstrass), so two different columns of floating-point numbers never tie.

    ``tolerance`` is passed to both helpers. It should exceed the gaps between units that are meant to be merged, and no
    other gaps: then the result is the same up to rounding for every network of the class, and idempotent. Two networks
    with the same function have the same form, except for coincidences in which units satisfy a linear relation: three
    encoder columns that sum to zero, with a common decoder, compute the same function as their negatives.
    :func:`dae_theory.function_space.function_distance_sq` is zero in that case too.
    """
    merged = merge_parallel_columns(dae, tolerance=tolerance)
    live = live_columns(merged, tolerance=tolerance)
    kept = by_unit(merged, lambda w: jnp.where(live if w.ndim == 1 else live[None, :], w, 0.0))
    order = _canonical_order(kept)
    return by_unit(kept, lambda w: w[..., order])


@jax.jit
@full_precision
def match_columns(dae_a: Dae, dae_b: Dae) -> Int[Array, " p"]:
    r"""The permutation of b's columns that is closest to a's; both networks have the same shape.

    .. math:: \arg\min_\pi \sum_j \|w_{1j}^a - w_{1\pi(j)}^b\|^2 + \|w_{2j}^a - w_{2\pi(j)}^b\|^2

    and the squared differences of b₁ where both have biases. Exact, by the Hungarian algorithm in O(p³). Raises
    ``ValueError`` if the shapes differ.
    """
    if dae_a.w1.shape != dae_b.w1.shape:
        raise ValueError(f"networks must have the same shape to be matched, got {dae_a.w1.shape} and {dae_b.w1.shape}.")
    # The squared norms are the same for every assignment and are left out.
    cost = -(dae_b.w1.T @ dae_a.w1 + dae_b.w2.T @ dae_a.w2)
    if isinstance(dae_a, AffineDae) and isinstance(dae_b, AffineDae):
        cost -= dae_b.b1[:, None] * dae_a.b1[None, :]
    # An assignment has no derivative, nor its loops a reverse mode; optax creates arrays of the default dtype.
    unit_of_b, unit_of_a = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost).astype(float))
    return unit_of_b[jnp.argsort(unit_of_a)]


@full_precision
def weight_distance_sq(dae_a: Dae, dae_b: Dae, *, tolerance: Scalar = 1e-3) -> Float[Array, ""]:
    r"""Squared distance of the weights modulo order, scale and splitting of units.

    .. math:: \min_\pi \|\bar W_1^a - \bar W_1^b \pi\|_F^2 + \|\bar W_2^a - \bar W_2^b \pi\|_F^2

    over permutations, where bars denote :func:`canonicalize` at ``tolerance`` and the narrower network is padded with
    zero columns. If one of them has biases, they count, and those of the other are zero. The square root of the result
    is a metric on canonical forms; it is discontinuous where two units cross the tolerance. Raises ``ValueError`` if
    the dimensions d differ.
    """
    width = max(dae_a.w1.shape[1], dae_b.w1.shape[1])
    if isinstance(dae_a, AffineDae) or isinstance(dae_b, AffineDae):
        dae_a, dae_b = with_biases(dae_a), with_biases(dae_b)
    a, b = (canonicalize(pad_columns(dae, width), tolerance=tolerance) for dae in (dae_a, dae_b))
    order = match_columns(a, b)
    weights = jnp.sum(jnp.square(a.w1 - b.w1[:, order])) + jnp.sum(jnp.square(a.w2 - b.w2[:, order]))
    if isinstance(a, AffineDae) and isinstance(b, AffineDae):
        weights += jnp.sum(jnp.square(a.b1 - b.b1[order])) + jnp.sum(jnp.square(a.b2 - b.b2))
    return weights


@full_precision
def group_sums(dae: Dae, data: Float[Array, "n d"], *, tolerance: Scalar = 1e-3) -> Float[Array, " n"]:
    r"""Total squared length of the units aligned with each row :cite:`zhang26`, Corollary 3.2.

    .. math:: Q_i = \sum_{j \,\parallel\, x_i} \|w_{1j}\| \|w_{2j}\|

    over units whose encoder and decoder both have ``1 − cos(w, xᵢ) <= tolerance``. At the memorizing minimizer
    ``Q_i = q_i = (‖xᵢ‖² − nλ)₊/(‖xᵢ‖² + σ²)``, which is :func:`dae_theory.minimizers.shrinkage` of ``‖xᵢ‖²`` and 1/n
    (m/n for a row repeated m times), no matter how units are split and scaled. Raises ``ValueError`` for bad data.

    With biases a unit belongs to the rows for which it is on and its decoder is aligned with ``xᵢ − b₂``; at the
    memorizing minimizer ``Q_i`` is the gain of :func:`dae_theory.convexity.memorizing_gain`.
    """
    check_data(data)
    if isinstance(dae, AffineDae):
        towards = unit_columns((data - dae.b2[None, :]).T)
        on = jax.vmap(lambda x: preactivations(dae, x))(data) > 0
        owned = on & (1.0 - towards.T @ unit_columns(dae.w2) <= tolerance)
        return jnp.sum(jnp.where(owned, _sizes(dae)[None, :], 0.0), axis=1)
    rows = unit_columns(data.T)
    aligned = jnp.ones((data.shape[0], dae.w1.shape[1]), bool)
    for w in (dae.w1, dae.w2):
        aligned &= 1.0 - rows.T @ unit_columns(w) <= tolerance
    return jnp.sum(jnp.where(aligned, _sizes(dae)[None, :], 0.0), axis=1)


def symmetry_tangents(
    dae: Dae,
    *,
    families: Sequence[str] = ("rescaling", "splitting"),
    data: Float[Array, "m d"] | None = None,
    tolerance: Scalar = 1e-3,
) -> Float[Array, "k 2 d p"] | Float[Array, "k coordinates"]:
    r"""Orthonormal basis of the directions in the space of weights that leave the objective stationary by symmetry.

    Entry [i, 0] moves W₁ and [i, 1] moves W₂; rows are orthonormal over all 2dp coordinates, and k >= 0 is the
    dimension of the span. With biases the result is a matrix of 2dp + p + d columns, in the order of
    ``ravel_pytree``. Each family acts from the right, ``(W₁ B, b₁ B, W₂ B')``:

    * ``"rescaling"``, one per live unit: ``B = −B' = E_jj``. The function is unchanged; the penalty is unchanged to
      first order if the unit is balanced, with curvature 4λ.
    * ``"splitting"``, one for each unit after the first in a group that is parallel in encoder and decoder, with
      ``α² = ‖w₁‖ ‖w₂‖``: ``B = B' = (α_j/α_r) E_rr − (α_r/α_j) E_jj``. The function is unchanged and, if the units are
      balanced, the penalty. (A dead unit can grow out of a live one but not shrink below zero: those splittings form a
      cone without a tangent space.)
    * ``"rotation"``, one for each pair of units with the same gates on all rows of ``data``, not all off:
      ``B = B' = E_ij − E_ji``. The block's linear map ``W₂ W₁ᵀ`` and the penalty are unchanged, hence the main term of
      the risk; the gates move, so the objective is flat only up to exponentially small terms. Rotations of a block span
      the splittings of its units.
    * ``"offset"``, with biases, one for each live unit that is on for all rows of ``data``: b₁ of the unit grows and b₂
      gives way, by w₂. The output is unchanged wherever the unit is on, so the objective is flat up to the noise that
      switches it off.

    Live units and parallel groups are those of :func:`live_columns` and :func:`parallel_groups`. Not jittable, because
    k is a shape. Raises ``ValueError`` for traced weights, an unknown family, and rotations without data.
    """
    if not is_concrete(dae, data):
        raise ValueError(
            "weights and data must be concrete, because the number of tangents is a shape; call it outside jit."
        )
    known = {*_FAMILIES, "offset"}
    unknown = sorted(set(families) - known)
    if unknown:
        raise ValueError(f"unknown families {unknown}; choose among {sorted(known)}.")
    shape = (2, *dae.w1.shape) if isinstance(dae, ReluDae) else (sum(part.size for part in dae),)
    actions = [action for name in families if name != "offset" for action in _FAMILIES[name](dae, data, tolerance)]
    found = [_moved(dae, b1, b2) for b1, b2 in actions]
    if "offset" in families and isinstance(dae, AffineDae):
        found += list(_offsets(dae, data, tolerance))
    if not found:
        return jnp.zeros((0, *shape), dae.w1.dtype)
    moves = np.stack(found)
    moves /= np.linalg.norm(moves, axis=1, keepdims=True)
    _, singular_values, basis = np.linalg.svd(moves, full_matrices=False)
    in_span = singular_values > np.finfo(moves.dtype).eps * max(moves.shape) * singular_values[0]
    return jnp.asarray(basis[in_span].reshape(-1, *shape), dae.w1.dtype)


def _moved(dae: Dae, encoder_action: np.ndarray, decoder_action: np.ndarray) -> Float[np.ndarray, " m"]:
    """The parts of the network times an action each, in the order of ``ravel_pytree``; b₂ does not move."""
    actions = {"w1": encoder_action, "b1": encoder_action, "w2": decoder_action}
    parts = {name: np.asarray(part, np.float64) for name, part in dae._asdict().items()}
    moves = [part @ actions[name] if name in actions else np.zeros_like(part) for name, part in parts.items()]
    return np.concatenate([move.ravel() for move in moves])


def _offsets(dae: AffineDae, data: Array | None, tolerance: Scalar) -> Iterator[Float[np.ndarray, " m"]]:
    """Moves of b₁ and b₂ in the order of ``ravel_pytree``, for units that are on everywhere."""
    if data is None:
        raise ValueError('the family "offset" needs data, on all rows of which units must be on.')
    always = np.all(_gates_on(dae, data), axis=0)
    for j in np.flatnonzero(always & np.asarray(live_columns(dae, tolerance=tolerance))):
        moves = {name: np.zeros(part.shape) for name, part in dae._asdict().items()}
        moves["b1"][j] = 1.0
        moves["b2"] = -np.asarray(dae.w2[:, j], np.float64)
        yield np.concatenate([move.ravel() for move in moves.values()])


def rotation_pairs(dae: Dae, data: Float[Array, "m d"], *, tolerance: Scalar = 1e-3) -> list[tuple[int, int]]:
    """Pairs of live units with the same gates on all rows of ``data``, not all off: the planes of the rotations."""
    check_data(data)
    gates = _gates_on(dae, data)
    _, patterns = np.unique(gates, axis=1, return_inverse=True)
    eligible = np.asarray(live_columns(dae, tolerance=tolerance)) & gates.any(axis=0)
    groups = _alike(patterns, eligible)
    return [(int(i), int(j)) for members in groups for i, j in itertools.combinations(members, 2)]


def _gates_on(dae: Dae, data: Float[Array, "m d"]) -> Bool[np.ndarray, "m p"]:
    linear = np.asarray(data) @ np.asarray(dae.w1)
    return (linear + np.asarray(dae.b1) if isinstance(dae, AffineDae) else linear) > 0


def column_norms(w: Float[Array, "d p"]) -> Float[Array, " p"]:
    """Euclidean norms of columns; the gradient at a zero column is zero, not NaN."""
    square = jnp.sum(jnp.square(w), axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def unit_columns(w: Float[Array, "d p"]) -> Float[Array, "d p"]:
    """Columns divided by their norms; zero columns stay zero, with a finite gradient."""
    norms = column_norms(w)
    return w / jnp.where(norms > 0, norms, 1.0)[None, :]


def pad_columns(dae: D, width: int) -> D:
    """Append zero columns up to ``width``."""
    return by_unit(dae, lambda w: jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, width - w.shape[-1])]))


def _sum_columns(w: Float[Array, "d p"], groups: Int[Array, " p"]) -> Float[Array, "d p"]:
    return jax.ops.segment_sum(w.T, groups, num_segments=groups.size).T


def _canonical_order(dae: Dae) -> Int[Array, " p"]:
    norms = column_norms(dae.w1)
    falling = jnp.argsort(-norms)
    # Norms that are equal in theory differ by rounding: a new rank starts only at a gap that exceeds it.
    gaps = -jnp.diff(norms[falling]) > jnp.sqrt(jnp.finfo(norms.dtype).eps) * jnp.max(norms, initial=0.0)
    ranks = jnp.cumsum(jnp.pad(gaps, (1, 0)).astype(int))
    rank = jnp.zeros_like(ranks).at[falling].set(ranks)
    encoder = augmented(dae)[0]
    probe = jnp.cos(jnp.arange(1, encoder.shape[0] + 1, dtype=encoder.dtype)) @ encoder
    return jnp.lexsort((-probe, rank))


def _sizes(dae: Dae) -> Float[Array, " p"]:
    return column_norms(dae.w1) * column_norms(dae.w2)


_Actions: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray]]


def _rescalings(dae: Dae, data: Array | None, tolerance: Scalar) -> _Actions:
    del data
    for j in np.flatnonzero(live_columns(dae, tolerance=tolerance)):
        stretch = _elementary(dae, (j, j, 1.0))
        yield stretch, -stretch


def _splittings(dae: Dae, data: Array | None, tolerance: Scalar) -> _Actions:
    del data
    stacked = jnp.concatenate([_gates(dae), unit_columns(dae.w2)])
    groups = np.asarray(jax.jit(_groups)(stacked / math.sqrt(2.0), tolerance))
    alpha = np.sqrt(np.asarray(_sizes(dae)))
    for members in _alike(groups, np.asarray(live_columns(dae, tolerance=tolerance))):
        r = members[0]
        for j in members[1:]:
            ratio = float(alpha[j] / alpha[r])
            share = _elementary(dae, (r, r, ratio), (j, j, -1.0 / ratio))
            yield share, share


def _rotations(dae: Dae, data: Array | None, tolerance: Scalar) -> _Actions:
    if data is None:
        raise ValueError('the family "rotation" needs data, on whose rows units must have the same gates.')
    for i, j in rotation_pairs(dae, data, tolerance=tolerance):
        turn = _elementary(dae, (i, j, 1.0), (j, i, -1.0))
        yield turn, turn


def _alike(labels: np.ndarray, eligible: np.ndarray) -> Iterator[np.ndarray]:
    for label in np.unique(labels[eligible]):
        yield np.flatnonzero(eligible & (labels == label))


def _elementary(dae: Dae, *entries: tuple[int | np.intp, int | np.intp, float]) -> np.ndarray:
    action = np.zeros((dae.w1.shape[1],) * 2)
    for i, j, value in entries:
        action[i, j] = value
    return action


_FAMILIES: Mapping[str, Callable[[Dae, Array | None, Scalar], _Actions]] = MappingProxyType(
    {"rescaling": _rescalings, "splitting": _splittings, "rotation": _rotations}
)
