r"""Closed-form minimizers of the two-layer DAE with biases, ``f(y) = W₂ [W₁ᵀ y + b₁]₊ + b₂``; derived here.

Where the gates are certain, f is affine on each cluster k. The free biases center it: a kept direction u_j of the
cluster's covariance, with energy s_j, has the gain :math:`q_j = (s_j - l_k)_+/(s_j + \sigma^2)`,
:math:`l_k = n\lambda/n_k`, as in :cite:`zhang26`, eq. (8), with the covariance in place of the second moment. The mean
itself is carried by one gate, at a distance κ_k along its unit normal v_k,

.. math:: f(y) = b_2 + \alpha_k \hat z_k \left[\kappa_k + v_k^\top (y - \bar x_k)\right]
          + \sum_j q_j u_j u_j^\top (y - \bar x_k), \qquad z_k = \bar x_k - b_2, \quad
          \alpha_k = \frac{(\kappa_k \|z_k\| - l_k)_+}{\kappa_k^2 + \sigma^2}

for v_k and z_k orthogonal to the kept u_j. A single sample has no u_j: it is memorized, by the one unit
:math:`\|w_1\|^2 = \|w_2\|^2 = \alpha`, at a gate that cuts it off from the hull of the others
(:mod:`dae_theory.convexity`). Where b₁ = b₂ = 0, κ = ‖x‖ these are the paper's Corollary 3.2.

One cluster of all samples needs no gate for its mean, since b₂ is the mean: its units are on everywhere, and the
network is affine (:func:`affine_generalizing_minimizer`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dae_theory.affine_gates import Memorized, memorize
from dae_theory.checks import check_data, check_integer, check_level
from dae_theory.convexity import memorizing_cost, memorizing_gain
from dae_theory.minimizers import orthogonal_factor
from dae_theory.model import AffineDae, Dae, preactivations
from dae_theory.spectra import Labels, Ranks, check_ranks, partition
from dae_theory.symmetry import pad_columns
from dae_theory.types import Scalar

__all__ = [
    "Cells",
    "affine_block_cost",
    "affine_block_minimizer",
    "affine_cells",
    "affine_generalizing_cost",
    "affine_generalizing_minimizer",
    "affine_memorizing_minimizer",
    "linear_cost",
    "memorizing_parts",
]

TINY = 1e-300
"""In place of a denominator of 0, over which the numerator is 0 too."""
BEYOND = 10.0
"""How far beyond all samples the gates of units that are always on lie, in the samples' largest distance and in σ."""


def affine_memorizing_minimizer(
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    width: int | None = None,
    memorized: Memorized | None = None,
) -> AffineDae:
    r"""The network that memorizes every sample it can, one unit each, then zero columns.

    .. math:: w_{2i} = \sqrt{\alpha_i}\, \hat z_i, \quad w_{1i} = \sqrt{\alpha_i}\, v_i, \quad
              b_{1i} = \sqrt{\alpha_i}\,(\kappa_i - v_i^\top x_i)

    with gates, gains and b₂ of :func:`dae_theory.affine_gates.memorize`, which may be passed. The column of a sample
    inside the hull of the others is zero. Where its gates are certain, f returns the training rows themselves up to a
    share of order λ and σ² of them, not multiples: at x_i the code is one-hot, with the value
    :math:`\sqrt{\alpha_i} \kappa_i`.

    ``ValueError`` for what :func:`dae_theory.affine_gates.memorize` refuses, traced data, and a ``width`` below n.
    """
    check_data(data)
    rows = np.asarray(data)
    found = memorize(rows.astype(np.float64), sigma, penalty) if memorized is None else memorized
    width = len(rows) if width is None else check_integer("width", width, minimum=len(rows))
    return pad_columns(AffineDae(*(jnp.asarray(part, data.dtype) for part in memorizing_parts(rows, found))), width)


def memorizing_parts(
    rows: Float[np.ndarray, "n d"], memorized: Memorized
) -> tuple[Float[np.ndarray, "d n"], Float[np.ndarray, " n"], Float[np.ndarray, "d n"], Float[np.ndarray, " d"]]:
    """W₁, b₁, W₂ and b₂ of :func:`affine_memorizing_minimizer`, in NumPy alone."""
    root = np.sqrt(memorized.gains)
    units = (rows - memorized.offset) / np.where(memorized.lengths > 0, memorized.lengths, 1.0)[:, None]
    b1 = root * (memorized.gates - np.sum(memorized.normals * rows, axis=1))
    return (root[:, None] * memorized.normals).T, b1, (root[:, None] * units).T, memorized.offset


def affine_generalizing_minimizer(
    data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, rank: int, *, width: int | None = None
) -> AffineDae:
    r"""The affine network that shrinks towards the mean along ``rank`` principal directions; its units are always on.

    .. math:: f(y) = \bar x + \sum_{j \le r} q_j u_j u_j^\top (y - \bar x), \qquad
              q_j = \frac{(s_j - \lambda)_+}{s_j + \sigma^2}

    with the eigenpairs s_j, u_j of the covariance (with 1/n). Biases are free, so gates lie ``BEYOND`` all samples and
    their noise. Its objective, which is exact up to rounding, is :func:`affine_generalizing_cost`.

    Args:
        data: samples as rows.
        sigma: noise level >= 0.
        penalty: λ >= 0.
        rank: number of units r, from 0 to d.
        width: number of columns after padding with zero columns; ``rank`` by default.
    """
    rows = _checked(data, sigma, penalty)
    rank = _rank(rank, rows.shape[1])
    width = rank if width is None else check_integer("width", width, minimum=max(rank, 1))
    mean = rows.mean(axis=0)
    w = _kept_directions(rows - mean, float(sigma), float(penalty), rank)
    reach = BEYOND * (np.linalg.norm(rows - mean, axis=1).max() + float(sigma))
    b1 = np.linalg.norm(w, axis=0) * reach - mean @ w
    b2 = mean - w @ (mean @ w + b1)
    return pad_columns(AffineDae(*(jnp.asarray(part, data.dtype) for part in (w, b1, w, b2))), width)


def affine_generalizing_cost(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, rank: int) -> float:
    r"""The objective of :func:`affine_generalizing_minimizer`: variance less what each direction gains.

    .. math:: \mathrm{tr}\, \Sigma - \sum_{j \le r} \frac{(s_j - \lambda)_+^2}{s_j + \sigma^2}
    """
    rows = _checked(data, sigma, penalty)
    return linear_cost(rows - rows.mean(axis=0), float(sigma), float(penalty), _rank(rank, rows.shape[1]))


def linear_cost(rows: Float[np.ndarray, "n d"], sigma: float, penalty: float, rank: int) -> float:
    """The objective of the best linear map of ``rank`` directions, whose units are always on: rows are not centered."""
    moments = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    kept = moments[:rank]
    return float(moments.sum() - np.sum(np.maximum(kept - penalty, 0.0) ** 2 / np.maximum(kept + sigma**2, TINY)))


def affine_block_minimizer(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    gates: Float[np.ndarray, " K"],
    normals: Float[np.ndarray, "K d"],
    offset: Float[np.ndarray, " d"],
) -> AffineDae:
    r"""One block of units per cluster, with given gates: the form at the top of this module.

    The units of block k share the gate as they share the leading direction in
    :func:`dae_theory.minimizers.block_minimizer`: unit i has the encoder
    :math:`O_{i0} \sqrt{\alpha}\, v + \sum_j O_{ij} \sqrt{q_j}\, u_j`, the decoder with ẑ in place of v, and the bias
    that puts κ and the cluster's mean in place. It is exact where v_k and z_k are orthogonal to the kept u_j, and units
    on for their own cluster only (:func:`affine_cells` tells).

    Args:
        data: samples as rows.
        labels: one integer per row; rows with the same label form a cluster.
        sigma: noise level >= 0.
        penalty: λ >= 0.
        ranks: units of each cluster, in order of label, at least 1: one for the mean, one for each kept direction.
        gates: κ_k > 0, distance from the cluster's mean to the gate.
        normals: v_k, unit vectors.
        offset: b₂.
    """
    rows = _checked(data, sigma, penalty)
    blocks = partition(labels, len(rows))
    units = check_ranks(ranks, np.minimum(blocks.counts, rows.shape[1]) + 1)
    if min(units) < 1:
        raise ValueError("ranks must be at least 1: each cluster needs a unit for its mean.")
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for k, rank in enumerate(units):
        points = rows[blocks.members == k]
        mean, decay = points.mean(axis=0), len(rows) / len(points) * float(penalty)
        inside = _kept_directions(points - mean, float(sigma), decay, rank - 1)
        z = mean - offset
        length = float(np.linalg.norm(z))
        gain = memorizing_gain(length, float(gates[k]), sigma, decay)
        factor = orthogonal_factor(rank)
        left = np.column_stack([np.sqrt(gain) * normals[k], inside])
        out = np.column_stack([np.sqrt(gain) * z / length, inside])
        constant = np.append(np.sqrt(gain) * gates[k], np.zeros(rank - 1)) - mean @ left
        columns.append((left @ factor.T, constant @ factor.T, out @ factor.T))
    w1, b1, w2 = (np.concatenate(parts, axis=-1) for parts in zip(*columns, strict=True))
    return AffineDae(*(jnp.asarray(part, data.dtype) for part in (w1, b1, w2, np.asarray(offset))))


def affine_block_cost(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    gates: Float[np.ndarray, " K"],
    offset: Float[np.ndarray, " d"],
) -> float:
    r"""Main term of the objective of :func:`affine_block_minimizer`, up to the noise that crosses gates.

    .. math:: \sum_k \rho_k \Big[ \|z_k\|^2 - \frac{(\kappa_k \|z_k\| - l_k)_+^2}{\kappa_k^2 + \sigma^2}
              + \mathrm{tr}\, \Sigma_k - \sum_j \frac{(s_j - l_k)_+^2}{s_j + \sigma^2} \Big]
    """
    rows = np.asarray(data, np.float64)
    blocks = partition(labels, len(rows))
    total = 0.0
    for k, rank in enumerate(check_ranks(ranks, np.minimum(blocks.counts, rows.shape[1]) + 1)):
        points = rows[blocks.members == k]
        decay = len(rows) / len(points) * float(penalty)
        length = float(np.linalg.norm(points.mean(axis=0) - offset))
        inside = affine_generalizing_cost(jnp.asarray(points), sigma, decay, rank - 1)
        total += len(points) / len(rows) * (memorizing_cost(length, float(gates[k]), sigma, decay) + inside)
    return total


class Cells(NamedTuple):
    """Which samples each unit is on for, and by what margin; from :func:`affine_cells`."""

    on: Bool[np.ndarray, "n p"]
    """Whether unit j is on at sample i."""
    margins: Float[np.ndarray, " p"]
    """Distance of the nearest sample from each unit's gate, in the units of the data; infinite for zero columns."""
    alone: Bool[np.ndarray, " n"]
    """Whether exactly one unit is on at the sample, and that unit at no other sample: it is memorized."""

    @property
    def margin(self) -> float:
        """The smallest of the margins, which must be well above σ for the closed forms."""
        return float(np.min(self.margins, initial=np.inf))


def affine_cells(dae: Dae, data: Float[Array, "n d"]) -> Cells:
    """The cells of a network among the samples: conditions by hyperplanes, of which β < 0 is a special case.

    Zero columns, and with biases columns of W₁ that are zero, count as on nowhere.
    """
    check_data(data)
    size = np.linalg.norm(np.asarray(dae.w1), axis=0)
    live = (size > 0) & (np.linalg.norm(np.asarray(dae.w2), axis=0) > 0)
    values = np.asarray(jax.vmap(lambda x: preactivations(dae, x))(data))
    on = (values > 0) & live[None, :]
    distances = np.abs(values) / np.where(live, size, 1.0)[None, :]
    margins = np.where(live, distances.min(axis=0), np.inf)
    alone = (on.sum(axis=1) == 1) & np.any(on & (on.sum(axis=0) == 1)[None, :], axis=1)
    return Cells(on, margins, alone)


def _checked(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Float[np.ndarray, "n d"]:
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    return np.asarray(data, np.float64)


def _kept_directions(
    centered: Float[np.ndarray, "n d"], sigma: float, decay: float, rank: int
) -> Float[np.ndarray, "d r"]:
    """Columns ``√q_j u_j`` of the ``rank`` leading directions of centered rows, in NumPy: float64 whatever JAX's."""
    _, singular, right = np.linalg.svd(centered, full_matrices=True)
    moments = np.zeros(centered.shape[1])
    moments[: len(singular)] = singular**2 / len(centered)
    kept = moments[:rank]
    q = np.maximum(kept - decay, 0.0) / np.maximum(kept + sigma**2, TINY)
    return right[:rank].T * np.sqrt(q)


def _rank(rank: int, dim: int) -> int:
    rank = check_integer("rank", rank, minimum=0)
    if rank > dim:
        raise ValueError(f"rank = {rank} is more than the {dim} dimensions of the data.")
    return rank
