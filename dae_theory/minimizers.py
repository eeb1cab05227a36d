r"""Closed-form local minimizers of the ReLU autoencoder :cite:`zhang26`, Theorem 3.1 and Corollaries 3.2 to 3.4.

.. math:: W_1 = W_2 = (W_{X_1} \cdots W_{X_M}), \quad
          W_{X_k} = U (I + n_k \sigma^2 \Lambda^{-1})^{-1/2} (I - n \lambda \Lambda^{-1})^{1/2} O^\top

up to a remainder that is exponentially small in (margin/σ)². Each block acts as a shrunken projection on its own
cluster, ``W_{X_k} W_{X_k}ᵀ = Σ_j q_j u_j u_jᵀ``, and is off on the others. A block of one unit memorizes, a block of
several generalizes. The formulas are evaluated whether or not the theorem's conditions hold;
:func:`dae_theory.conditions.check_conditions` checks them.

Samples are rows, ``data`` is (n, d); ``penalty`` is the paper's λ. Every minimizer is jittable over data, σ and λ, and
batches with ``jax.vmap``; labels, ranks and widths are static.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dae_theory.checks import check_data, check_integer, check_level
from dae_theory.mixture import GaussianMixture
from dae_theory.model import ReluDae
from dae_theory.precision import full_precision
from dae_theory.spectra import (
    Labels,
    Ranks,
    block_points,
    blocks_alike,
    check_ranks,
    partition,
    population_axes,
    principal_axes,
)
from dae_theory.types import Scalar

__all__ = [
    "block_minimizer",
    "block_units",
    "cluster_units",
    "generalizing_minimizer",
    "memorizing_minimizer",
    "orthogonal_factor",
    "shrinkage",
    "threshold",
]


def threshold(moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, penalty: Scalar) -> Float[Array, "*s"]:
    r"""The part of a moment that the penalty removes: ``min(ℓ, s)`` with ``ℓ = λ/ρ``; all of it where ρ = 0."""
    weights = jnp.asarray(weights, moments.dtype)
    return jnp.minimum(jnp.where(weights > 0, penalty / jnp.where(weights > 0, weights, 1.0), jnp.inf), moments)


def shrinkage(
    moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, sigma: Scalar, penalty: Scalar
) -> Float[Array, "*s"]:
    r"""Gain q of a direction, its eigenvalue in ``W_k W_kᵀ`` :cite:`zhang26`, eq. (8).

    .. math:: q = \frac{(s - \ell)_+}{s + \sigma^2}, \quad \ell = \lambda/\rho

    ``moments`` s = Λ/n_k and ``weights`` ρ = n_k/n broadcast against each other; with them
    ``q = (Λ − nλ)/(Λ + n_k σ²)``. It lies in [0, 1], is clipped at 0 where the penalty exceeds the direction's energy
    ρs, and is 0 where s = 0.
    """
    total = moments + sigma * sigma
    excess = moments - threshold(moments, weights, penalty)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), 0.0)


@full_precision
def memorizing_minimizer(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, width: int) -> ReluDae:
    r"""One unit per sample, then zero columns :cite:`zhang26`, Corollary 3.2, eq. (9).

    .. math:: w_i = r_i x_i, \quad r_i^2 = \frac{(\|x_i\|^2 - n\lambda)_+}{\|x_i\|^4 + \sigma^2 \|x_i\|^2}, \quad
              i = 1..n

    (The norms are Euclidean; the L4 norm in print is a misprint.) A column vanishes if ‖xᵢ‖² <= nλ. Raises
    ``ValueError`` unless σ, λ >= 0 and ``width`` p >= n. If p > n the zero columns can be unstable, see
    :func:`dae_theory.conditions.check_conditions`. Repeated rows belong in one block of :func:`block_minimizer`.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = memorizing_minimizer(jnp.array([[2.0, 0.0], [-1.0, 0.0]]), sigma=0.5, penalty=0.1, width=3)
        >>> [round(float(w), 3) for w in dae.w1[0]]  # √(3.8/4.25), −√(0.8/1.25), 0
        [0.946, -0.8, 0.0]
    """
    _check(data, sigma, penalty)
    n = data.shape[0]
    check_integer("width", width, minimum=1)
    if width < n:
        raise ValueError(f"width = {width} is {n - width} less than n = {n}; every sample needs a unit.")
    norm_sq = jnp.sum(jnp.square(data), axis=-1)
    q = shrinkage(norm_sq, 1.0 / n, sigma, penalty)
    r = _sqrt(q / jnp.where(norm_sq > 0, norm_sq, 1.0))
    return _tied((data * r[:, None]).T, width)


@full_precision
def block_minimizer(
    data: Float[Array, "n d"],
    labels: Labels,
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    width: int | None = None,
) -> ReluDae:
    r"""One block of units per cluster :cite:`zhang26`, Theorem 3.1, eq. (7) and (8); Corollary 3.4 with repeated rows.

    .. math:: W_{X_k} = U \, \mathrm{diag}(\sqrt{q}) \, O^\top, \quad q_j = \frac{(\Lambda_j - n\lambda)_+}
              {\Lambda_j + n_k \sigma^2}, \quad X_k^\top X_k = U \Lambda U^\top, \quad j \le p_k

    Blocks are in order of label. A sample repeated m times is a cluster of rank one, with
    ``q = (‖x‖² − nλ/m)/(‖x‖² + σ²)``. The theorem allows any orthogonal O, but the gates do not: it is that of
    :func:`orthogonal_factor`, its columns multiplied by the signs of ``u_jᵀ x̄_k``. Differentiable in σ and λ, and in
    the data where the kept eigenvalues are positive and distinct; elsewhere gradients in the data are finite, those of
    :func:`dae_theory.spectra.principal_axes`. Raises ``ValueError`` for arguments outside the ranges below.

    Args:
        data: Samples as rows, shape (n, d).
        labels: One integer per row; rows with the same label form a cluster. Concrete.
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0.
        ranks: Units p_k <= min(n_k, d) of each cluster in order of label (0 leaves it out), or one number for all.
        width: Number of columns after padding with zero columns; by default the sum of the ranks.

    Example:
        >>> import jax.numpy as jnp
        >>> data = jnp.array([[2.0, 0.1], [2.0, -0.1], [-1.0, 0.0]])
        >>> dae = block_minimizer(data, [0, 0, 1], sigma=0.5, penalty=0.1, ranks=1)
        >>> [round(float(w), 3) for w in dae.w1[0]]  # √(7.7/8.5), −√(0.7/1.25)
        [0.952, -0.748]
    """
    _check(data, sigma, penalty)
    n, d = data.shape
    blocks = partition(labels, n)
    ranks = _check_any_unit(check_ranks(ranks, np.minimum(blocks.counts, d), width=width))
    columns, owners = [], []
    for numbers, rows in blocks_alike(blocks, ranks):
        rank = ranks[numbers[0]]
        if rank:
            counts = jnp.asarray(blocks.counts[numbers], data.dtype)
            block = functools.partial(cluster_units, n=n, sigma=sigma, penalty=penalty, rank=rank)
            columns.append(jax.vmap(block)(block_points(data, rows), counts).reshape(-1, d))
            owners.append(np.repeat(numbers, rank))
    order = np.argsort(np.concatenate(owners), kind="stable")
    return _tied(jnp.concatenate(columns)[order].T, width)


@full_precision
def generalizing_minimizer(
    mixture: GaussianMixture, sigma: Scalar, penalty: Scalar, ranks: Ranks, *, width: int | None = None
) -> ReluDae:
    r"""The limit of the block minimizer for infinitely many samples of a mixture :cite:`zhang26`, Corollary 3.3.

    .. math:: W_k W_k^\top = \left[(S_k - \ell_k I)_+ (S_k + \sigma^2 I)^{-1}\right]_{\text{top } p_k}, \quad
              S_k = \mu_k \mu_k^\top + \Sigma_k, \quad \ell_k = \lambda/\rho_k

    (The σ in print is a misprint for σ².) Blocks are in order of mode, with ``ranks`` p_k <= d units each (or one
    number for all), padded with zero columns to ``width``. Raises ``ValueError`` unless σ, λ >= 0.

    Example:
        >>> import jax.numpy as jnp
        >>> modes = GaussianMixture(jnp.full(2, 0.5), jnp.array([[2.0, 0.0], [-2.0, 0.0]]), 0.1 * jnp.ones((2, 2, 2)))
        >>> dae = generalizing_minimizer(modes, sigma=0.5, penalty=0.1, ranks=2)
        >>> dae.w1.shape, bool(jnp.all(modes.means[0] @ dae.w1[:, :2] > 0))  # the first block is on at its mean
        ((2, 4), True)
    """
    check_level("sigma", sigma)
    check_level("penalty", penalty)
    moments, axes = population_axes(mixture)
    ranks = _check_any_unit(check_ranks(ranks, [moments.shape[1]] * moments.shape[0], width=width))
    q = shrinkage(moments, mixture.weights[:, None], sigma, penalty)
    columns = [
        block_units(q[k, :p], axes[k, :, :p], mixture.means[k], orthogonal_factor(p)) for k, p in enumerate(ranks) if p
    ]
    return _tied(jnp.concatenate(columns, axis=1), width)


@full_precision
def block_units(
    q: Float[Array, " p"], axes: Float[Array, "d p"], mean: Float[Array, " d"], factor: ArrayLike
) -> Float[Array, "d p"]:
    r"""The units of one block, from the gains q_j and axes u_j (columns) and the mean or sum of the cluster.

    .. math:: W = U \, \mathrm{diag}(\pm \sqrt{q}) \, O^\top, \quad \pm = \mathrm{sign}(u_j^\top \bar x)

    ``factor`` is O, of shape (p, p), see :func:`orthogonal_factor`; ``W Wᵀ = Σ_j q_j u_j u_jᵀ`` for any O.
    """
    # The sign of an eigenvector is arbitrary. Fixing it by the mean makes the units rotate with the data.
    sign = jnp.where(mean @ axes >= 0, 1.0, -1.0).astype(q.dtype)
    return (axes * (sign * _sqrt(q))[None, :]) @ jnp.asarray(factor, q.dtype).T


def orthogonal_factor(rank: int) -> np.ndarray:
    r"""The factor O of a block of ``rank`` p units, shape (p, p), float64; derived here.

    Unit i is ``w_i = Σ_j O_ij √q_j u_j``. It must be on for the whole cluster, so all units share the leading
    direction, which contains most of the mean, equally: ``O_i1 = 1/√p``. If the cluster fills an ellipsoid with
    half-axes a_j around its mean, the smallest preactivation of unit i is
    ``√(q_1/p) |u_1ᵀ x̄| − (Σ_{j>1} O_ij² q_j a_j²)^{1/2}``. The average of these sums over the units is
    ``Σ_{j>1} q_j a_j²/p`` for any O, so the margin of the worst unit is largest if all ``|O_ij| = 1/√p``, as in a
    Hadamard matrix. Those exist for few p. With p = 2^a m, m odd, the product of Sylvester's Hadamard matrix of size
    2^a and the real Fourier matrix of size m comes close: the squares of a cosine column and the sine column next to it
    sum to 2/p in every row.
    """
    check_integer("rank", rank, minimum=1)
    power_of_two = rank & -rank
    odd = rank // power_of_two
    hadamard = np.ones((1, 1))
    while len(hadamard) < power_of_two:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    angle = 2 * math.pi * np.outer(np.arange(odd), np.arange(1, odd // 2 + 1)) / odd
    waves = math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    # Unit (i, r), column (frequency, s, cosine or sine).
    oscillating = np.einsum("ifc,rs->irfsc", waves, hadamard).reshape(rank, rank - power_of_two)
    return np.concatenate([np.tile(hadamard, (odd, 1)), oscillating], axis=1) / math.sqrt(rank)


def _check(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> None:
    check_data(data)
    check_level("sigma", sigma)
    check_level("penalty", penalty)


def cluster_units(
    points: Float[Array, "m d"],
    count: Float[Array, ""] | int,
    *,
    n: int,
    sigma: Scalar,
    penalty: Scalar,
    rank: int,
    factor: np.ndarray | None = None,
) -> Float[Array, "p_k d"]:
    """The units of one block, as rows.

    Args:
        points: Rows of the block, padded with zero rows.
        count: Number of rows n_k of the block.
        n: Number of rows of the data set.
        sigma: Noise level σ >= 0.
        penalty: λ >= 0.
        rank: Number of units p_k.
        factor: O, that of :func:`orthogonal_factor` by default.
    """
    lam, axes = principal_axes(points, rank)
    q = shrinkage(lam / count, count / n, sigma, penalty)
    return block_units(q, axes, jnp.sum(points, axis=0), orthogonal_factor(rank) if factor is None else factor).T


def _check_any_unit(ranks: tuple[int, ...]) -> tuple[int, ...]:
    if not any(ranks):
        raise ValueError("ranks sum to 0; at least one block needs a unit.")
    return ranks


def _tied(w: Float[Array, "d p"], width: int | None) -> ReluDae:
    w = jnp.pad(w, ((0, 0), (0, 0 if width is None else width - w.shape[1])))
    return ReluDae(w, w)


def _sqrt(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    # The slope of √ at 0 is infinite: a clipped direction would make every gradient NaN.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
