r"""The orthogonal factor of a block that keeps gates away from samples, and whether the leakage holds it; derived here.

The closed forms :cite:`zhang26`, Theorem 3.1, leave the factor O of a block free. The noise that crosses gates
(:mod:`dae_theory.leakage`) selects one, or none: the objective has a local minimum exponentially near the closed form
where the smallest margin is largest and attained at samples that repel the gates (:func:`best_factors`), and none where
every gate is nearest to a sample that attracts it (:func:`margin_ratios`). The factor of
:func:`dae_theory.minimizers.orthogonal_factor` looks at a block's own samples only.

Weights have shape (d, p); samples are rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from scipy import linalg, optimize

from dae_theory.checks import check_data, check_integer, check_level, is_concrete
from dae_theory.minimizers import cluster_units, orthogonal_factor
from dae_theory.model import ReluDae
from dae_theory.precision import full_precision
from dae_theory.spectra import Labels, Ranks, check_ranks, partition, principal_axes
from dae_theory.types import Scalar

__all__ = ["BestFactor", "best_factors", "margin_ratios", "nearest_factors", "turned_minimizer"]


class BestFactor(NamedTuple):
    """The orthogonal factor of one block whose smallest margin is largest."""

    factor: Float[np.ndarray, "p p"]
    """O, one row per unit."""
    own: float
    """Smallest distance of a sample of the block's own cluster from a gate, negative on the wrong side."""
    other: float
    """Smallest distance of a sample of another cluster, negative on the wrong side; infinite if there is none."""
    error: float
    """Smallest crossing error ``wᵀ(f(y*) − x)`` of the pairs of unit and sample at the smallest margin; infinite for a
    block without turns, of at most one unit. It is that of :func:`dae_theory.leakage.gate_leakage` unless y* lies
    beyond the gate of another block."""

    @property
    def margin(self) -> float:
        """The smaller of ``own`` and ``other``."""
        return min(self.own, self.other)

    @property
    def holds_turns(self) -> bool:
        """Whether every gate is certain and repelled from the samples nearest to it, so that for small σ the objective
        has a minimum among the turns of the block near this one; if not, it falls along a turn from here."""
        return self.margin > 0 and self.error > 0


@full_precision
def turned_minimizer(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    factors: Sequence[ArrayLike],
) -> ReluDae:
    r"""The closed form of :func:`dae_theory.minimizers.block_minimizer` with any orthogonal factor in each block.

    .. math:: W_{X_k} = U \, \mathrm{diag}(\pm \sqrt{q}) \, O_k^\top

    Raises ``ValueError`` for what that function rejects, and factors of a wrong number or shape.

    Args:
        data, labels, sigma, penalty, ranks: As in :func:`dae_theory.minimizers.block_minimizer`.
        factors: One O_k of shape (p_k, p_k) per cluster in order of label; orthogonal, which is not checked.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.3], [2.0, -0.3]])
        >>> dae = turned_minimizer(data, [0, 0], 0.1, 0.01, 2, [jnp.array([[0.6, 0.8], [0.8, -0.6]])])
        >>> bool(jnp.all(data @ dae.w1 > 0))
        True
    """
    frames = _frames(data, labels, sigma, penalty, ranks)
    if len(factors) != len(frames):
        raise ValueError(f"factors must be one per cluster: got {len(factors)} for {len(frames)} clusters.")
    columns = []
    for k, (frame, given) in enumerate(zip(frames, factors, strict=True)):
        factor, p = jnp.asarray(given, data.dtype), frame.shape[1]
        if factor.shape != (p, p):
            raise ValueError(f"factors[{k}] must have shape ({p}, {p}), got {factor.shape}.")
        columns.append(frame @ factor.T)
    w = jnp.concatenate(columns, axis=1)
    return ReluDae(w, w)


@full_precision
def nearest_factors(
    dae: ReluDae, data: Float[Array, "n d"], labels: Labels, sigma: Scalar, penalty: Scalar, ranks: Ranks
) -> list[Float[Array, "p_k p_k"]]:
    r"""The factors whose :func:`turned_minimizer` lies nearest to ``dae``, a solution of Procrustes' problem.

    The polar factor of ``(W₁ + W₂)ᵀ U diag(√q)`` in each block. Theorem 3.1 leaves O free, so its remainder is the
    distance to that network. Columns of ``dae`` must be in the order of the closed form's.

    Args:
        dae: Weights whose columns are those of the blocks, in order of label.
        data, labels, sigma, penalty, ranks: As in :func:`turned_minimizer`.
    """
    frames = _frames(data, labels, sigma, penalty, ranks)
    ends = np.cumsum([frame.shape[1] for frame in frames])
    if dae.w1.shape != (data.shape[1], ends[-1]):
        raise ValueError(f"w1 must have shape ({data.shape[1]}, {ends[-1]}), that of the blocks; got {dae.w1.shape}.")
    factors = []
    for frame, end in zip(frames, ends, strict=True):
        block = slice(end - frame.shape[1], end)
        left, _, right = jnp.linalg.svd((dae.w1[:, block] + dae.w2[:, block]).T @ frame, full_matrices=False)
        factors.append(left @ right)
    return factors


def best_factors(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    num_starts: int = 8,
    seed: int = 0,
) -> list[BestFactor]:
    r"""The factor O of each block whose smallest margin is largest, and whether the leakage holds the block there.

    .. math:: \max_{O_k} \min_{j, i} \pm \frac{w_j^\top x_i}{\|w_j\|}

    over the units j of the block and all samples i, positive on the correct side. As σ → 0 the leakage is dominated by
    the smallest margin. If its pairs of unit and sample repel (positive ``error``), it has a local minimum near this
    O, and the objective one exponentially near the closed form there. If one of them attracts, the objective falls
    along a turn towards that gate (generically: where gradients of margins satisfy no relation but the maximum's own),
    and a minimum may lie where an attracting and a repelling pair tie, or nowhere: see :func:`margin_ratios`.

    The search is sequential quadratic programming over so(p_k), from ``num_starts`` factors, the first of which is
    that of :func:`dae_theory.minimizers.orthogonal_factor`; a better one may be missed. Not jittable. Raises
    ``ValueError`` for traced values and what :func:`turned_minimizer` rejects.

    Args:
        data, labels, sigma, penalty, ranks: As in :func:`turned_minimizer`.
        num_starts: Factors to start from, at least 1.
        seed: Of the random ones.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.3], [2.0, -0.3]])
        >>> best = best_factors(data, [0, 0], 0.1, 0.01, 2)[0]
        >>> round(best.margin, 3), best.holds_turns  # a single cluster attracts all of its gates
        (1.289, False)
    """
    check_integer("num_starts", num_starts, minimum=1)
    if not is_concrete(data, sigma, penalty):
        raise ValueError("best_factors needs concrete values, because it searches; call it outside jit.")
    frames = [np.asarray(frame, np.float64) for frame in _frames(data, labels, sigma, penalty, ranks)]
    rows = np.asarray(data, np.float64)
    members = partition(labels, len(rows)).members
    sides = [np.where(members == k, 1.0, -1.0)[:, None] * rows for k in range(len(frames))]
    rng = np.random.default_rng(seed)
    factors = [_widest(frame, signed, num_starts, rng) for frame, signed in zip(frames, sides, strict=True)]
    blocks = [frame @ factor.T for frame, factor in zip(frames, factors, strict=True)]
    network, found = np.concatenate(blocks, axis=1), []
    for k, (w, signed) in enumerate(zip(blocks, sides, strict=True)):
        margins = _margins(w, signed)
        own, other = (float(np.min(margins[:, which], initial=np.inf)) for which in (members == k, members != k))
        error = math.inf
        if w.shape[1] > 1:
            smallest = margins.min()
            pairs = np.argwhere(margins <= smallest + 1e-6 * (1 + abs(smallest)))
            error = min(_crossing_error(network, w[:, j], rows[i]) for j, i in pairs)
        found.append(BestFactor(factors[k], own, other, error))
    return found


def margin_ratios(
    data: Float[Array, "n d"], labels: Labels, ranks: Ranks, *, margin: Scalar = 0.0
) -> Float[np.ndarray, " K"]:
    r"""How much farther a gate can be from its own cluster than from the others, for each block: an upper bound.

    .. math:: \max_w \frac{\min_{i \in k} w^\top x_i}{\min_{i \notin k} -w^\top x_i}

    over the directions w of the block's span, its top p_k axes, whose gates are at least ``margin`` from all samples on
    the correct sides; exact for ``margin`` 0, an upper bound for others. Below 1, the sample nearest to such a gate is
    always one of the unit's own cluster, which attracts it if its crossing error is negative: for small σ no factor O
    with these margins has a local minimum near its closed form. Infinite for blocks of at most one unit, which have no
    turns; 0 for a single cluster; at most 0, or ``-inf``, where no direction has all samples on the correct sides.

    One linear program for each sample of the other clusters. Not jittable. Raises ``ValueError`` for traced data, a
    negative ``margin`` and what :func:`best_factors` rejects.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.3], [2.0, -0.3], [-3.0, 0.3], [-3.0, -0.3]])
        >>> margin_ratios(data, [0, 0, 1, 1], 2, margin=0.5).round(3).tolist()  # 2/3 along the mean
        [0.667, 1.8]
    """
    check_data(data)
    check_level("margin", margin)
    if not is_concrete(data, margin):
        raise ValueError("margin_ratios needs concrete values, because it searches; call it outside jit.")
    blocks = partition(labels, len(data))
    rows = np.asarray(data, np.float64)
    ratios = np.full(blocks.counts.size, np.inf)
    for k, rank in enumerate(check_ranks(ranks, np.minimum(blocks.counts, rows.shape[1]))):
        if rank > 1:
            is_own = blocks.members == k
            coordinates = rows @ np.asarray(principal_axes(data[np.flatnonzero(is_own)], rank)[1], np.float64)
            ratios[k] = _largest_ratio(coordinates[is_own], coordinates[~is_own], float(margin))
    return ratios


def _frames(
    data: Float[Array, "n d"], labels: Labels, sigma: Scalar, penalty: Scalar, ranks: Ranks
) -> list[Float[Array, "d p_k"]]:
    """``U diag(±√q)`` of each block: the closed form with O = I."""
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    n, d = data.shape
    blocks = partition(labels, n)
    frames = []
    for k, rank in enumerate(check_ranks(ranks, np.minimum(blocks.counts, d))):
        points, count = data[np.flatnonzero(blocks.members == k)], int(blocks.counts[k])
        frame = cluster_units(points, count, n=n, sigma=sigma, penalty=penalty, rank=rank, factor=np.eye(rank))
        frames.append(frame.T)
    return frames


def _widest(
    frame: Float[np.ndarray, "d p"], signed: Float[np.ndarray, "n d"], num_starts: int, rng: np.random.Generator
) -> Float[np.ndarray, "p p"]:
    """The factor of the largest smallest margin; ``signed`` rows are to be on the positive side of every unit."""
    p = frame.shape[1]
    if p <= 1:
        return np.eye(p)
    above = np.triu_indices(p, 1)

    def turned(angles, start):
        skew = np.zeros((p, p))
        skew[above] = angles
        return start @ linalg.expm(skew - skew.T)

    best, widest = orthogonal_factor(p), -math.inf
    for number in range(num_starts):
        start = orthogonal_factor(p) if number == 0 else np.linalg.qr(rng.normal(size=(p, p)))[0]
        # A unit is on where the leading axis points.
        start = start * np.where(start[:, :1] < 0, -1.0, 1.0)

        def slacks(v, start=start):
            return _margins(frame @ turned(v[:-1], start).T, signed).ravel() - v[-1]

        origin = np.zeros(len(above[0]) + 1)
        origin[-1] = slacks(origin).min()
        solved: Any = optimize.minimize(
            lambda v: -v[-1],
            origin,
            jac=lambda v: -np.eye(len(v))[-1],
            constraints={"type": "ineq", "fun": slacks},
            method="SLSQP",
            options={"maxiter": 200, "ftol": 1e-13},
        )
        for angles in (origin[:-1], solved.x[:-1]):
            factor = turned(angles, start)
            width = _margins(frame @ factor.T, signed).min()
            # A start is kept unless another is better by more than the search is accurate.
            if width > widest + 1e-9:
                best, widest = factor, width
    return best


def _largest_ratio(own: Float[np.ndarray, "m p"], other: Float[np.ndarray, "l p"], margin: float) -> float:
    if not len(other):
        return 0.0
    # Scaled so that the nearest sample of another cluster is at -1: a linear program in (w, ratio) for each choice. Its
    # gate is 1/‖w‖ away, so a margin bounds the norm, hence all coordinates.
    p = own.shape[1]
    limit = 1 / margin if margin > 0 else None
    sides = np.block([[-own, np.ones((len(own), 1))], [other, np.zeros((len(other), 1))]])
    limits = np.append(np.zeros(len(own)), -np.ones(len(other)))
    largest = -math.inf
    for nearest in other:
        solved: Any = optimize.linprog(
            -np.eye(p + 1)[-1],
            A_ub=sides,
            b_ub=limits,
            A_eq=np.append(nearest, 0.0)[None, :],
            b_eq=[-1.0],
            bounds=[(None if limit is None else -limit, limit)] * p + [(None, None)],
        )
        # 2: this sample is never the nearest; 3: unbounded.
        if solved.status == 3:
            return math.inf
        if solved.status == 0:
            largest = max(largest, float(solved.x[-1]))
    return largest


def _margins(w: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """Distances (p, n) of signed rows (n, d) from the gates of units (d, p)."""
    norms = np.linalg.norm(w, axis=0)
    is_live = norms > 0
    distances = (signed @ (w / np.where(is_live, norms, 1.0))).T
    return np.where(is_live[:, None], distances, np.inf)


def _crossing_error(network: np.ndarray, w: np.ndarray, x: np.ndarray) -> float:
    """``wᵀ(f(y*) − x)`` of a unit w (d,) of a tied network (d, p) at a sample x (d,); 0 for a zero unit."""
    norm_sq = w @ w
    nearest = x - w * (w @ x / norm_sq if norm_sq > 0 else 0.0)
    return float(w @ (network @ np.maximum(nearest @ network, 0.0) - x))
