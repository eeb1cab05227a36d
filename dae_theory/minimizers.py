r"""Closed-form local minimizers of the ReLU autoencoder :cite:`zhang26`, Theorem 3.1 and Corollaries 3.2 to 3.4.

.. math:: W_1 = W_2 = (W_{X_1} \cdots W_{X_M}), \quad
          W_{X_k} = U (I + n_k \sigma^2 \Lambda^{-1})^{-1/2} (I - n \lambda \Lambda^{-1})^{1/2} O^\top

up to a remainder that is exponentially small in (margin/σ)²: each block acts as a shrunken projection on its own
cluster, ``W_{X_k} W_{X_k}ᵀ = Σ_j q_j u_j u_jᵀ``, and is silent on the others. One unit a block memorizes, several
generalize. The formulas are evaluated whether or not the theorem's conditions hold:
:func:`dae_theory.conditions.check_conditions` reports them.

Samples are rows, ``data`` is (n, d); ``penalty`` is the paper's λ. Every minimizer jits over data, σ and λ, and batches
with ``jax.vmap``; labels, ranks and widths are static.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dae_theory.checks import check_data, check_integer, check_nonnegative
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
    "generalizing_minimizer",
    "memorizing_minimizer",
    "orthogonal_factor",
    "shrinkage",
    "threshold",
]


def threshold(moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, penalty: Scalar) -> Float[Array, "*s"]:
    r"""What the penalty takes from a moment: ``min(ℓ, s)``, ``ℓ = λ/ρ``; all of it where ρ = 0."""
    weights = jnp.asarray(weights, moments.dtype)
    return jnp.minimum(jnp.where(weights > 0, penalty / jnp.where(weights > 0, weights, 1.0), jnp.inf), moments)


def shrinkage(
    moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, sigma: Scalar, penalty: Scalar
) -> Float[Array, "*s"]:
    r"""Gain q of a direction, the squared length that its block gives it :cite:`zhang26`, eq. (8).

    .. math:: q = \frac{(s - \ell)_+}{s + \sigma^2}, \quad \ell = \lambda/\rho

    ``moments`` s = Λ/n_k and ``weights`` ρ = n_k/n broadcast against each other; with them
    ``q = (Λ − nλ)/(Λ + n_k σ²)``. It lies in [0, 1], is clipped at 0 where the penalty exceeds the direction's energy
    ρs, and is 0 where s = 0.
    """
    total = moments + sigma * sigma
    kept = moments - threshold(moments, weights, penalty)
    return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1.0), 0.0)


@full_precision
def memorizing_minimizer(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, width: int) -> ReluDae:
    r"""One unit a sample, then zero columns :cite:`zhang26`, Corollary 3.2, eq. (9).

    .. math:: w_i = r_i x_i, \quad r_i^2 = \frac{(\|x_i\|^2 - n\lambda)_+}{\|x_i\|^4 + \sigma^2 \|x_i\|^2}, \quad
              i = 1..n

    (The norms are Euclidean; the L4 norm in print is a misprint.) A column vanishes if ‖xᵢ‖² <= nλ. σ, λ >= 0, and
    ``width`` p >= n, else ``ValueError``. Where p > n the zero columns can be unstable, see
    :func:`dae_theory.conditions.check_conditions`. Rows that repeat belong in one block of :func:`block_minimizer`.
    """
    _check(data, sigma, penalty)
    n = data.shape[0]
    check_integer("width", width, minimum=1)
    if width < n:
        raise ValueError(f"width = {width} is {n - width} under the n = {n} samples, each of which needs a unit.")
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
    r"""One block of units a cluster :cite:`zhang26`, Theorem 3.1, eq. (7) and (8); Corollary 3.4 with repeated rows.

    .. math:: W_{X_k} = U \, \mathrm{diag}(\sqrt{q}) \, O^\top, \quad q_j = \frac{(\Lambda_j - n\lambda)_+}
              {\Lambda_j + n_k \sigma^2}, \quad X_k^\top X_k = U \Lambda U^\top, \quad j \le p_k

    Blocks follow one another in order of label, ``ranks`` p_k units each (0 leaves a cluster out), padded with zero
    columns to ``width``. A sample repeated m times is a rank-one cluster, with
    ``q = (‖x‖² − nλ/m)/(‖x‖² + σ²)``. The theorem leaves O free, the gates do not: see :func:`orthogonal_factor`, whose
    columns take the signs of ``u_jᵀ x̄_k`` here.

    ``labels`` (n,) are integers; p_k <= min(n_k, d); σ, λ >= 0; else ``ValueError``. Differentiable in σ and λ, and in
    the data where the kept eigenvalues are distinct.
    """
    _check(data, sigma, penalty)
    n, d = data.shape
    blocks = partition(labels, n)
    ranks = _some(check_ranks(ranks, np.minimum(blocks.counts, d), width=width))
    columns, owners = [], []
    for numbers, rows in blocks_alike(blocks, ranks):
        rank = ranks[numbers[0]]
        if rank:
            counts = jnp.asarray(blocks.counts[numbers], data.dtype)
            block = functools.partial(_block, n=n, sigma=sigma, penalty=penalty, rank=rank)
            columns.append(jax.vmap(block)(block_points(data, rows), counts).reshape(-1, d))
            owners.append(np.repeat(numbers, rank))
    order = np.argsort(np.concatenate(owners), kind="stable")
    return _tied(jnp.concatenate(columns)[order].T, width)


@full_precision
def generalizing_minimizer(
    mixture: GaussianMixture, sigma: Scalar, penalty: Scalar, ranks: Ranks, *, width: int | None = None
) -> ReluDae:
    r"""The block minimizer of infinitely many samples of a mixture :cite:`zhang26`, Corollary 3.3.

    .. math:: W_k W_k^\top = \left[(S_k - \ell_k I)_+ (S_k + \sigma^2 I)^{-1}\right]_{\text{top } p_k}, \quad
              S_k = \mu_k \mu_k^\top + \Sigma_k, \quad \ell_k = \lambda/\rho_k

    (σ² is meant where σ is printed.) Modes follow one another, ``ranks`` p_k <= d units each, padded with zero columns
    to ``width``. σ, λ >= 0; else ``ValueError``.
    """
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)
    moments, axes = population_axes(mixture)
    ranks = _some(check_ranks(ranks, [moments.shape[1]] * moments.shape[0], width=width))
    q = shrinkage(moments, mixture.weights[:, None], sigma, penalty)
    columns = [
        block_units(q[k, :p], axes[k, :, :p], mixture.means[k], orthogonal_factor(p)) for k, p in enumerate(ranks) if p
    ]
    return _tied(jnp.concatenate(columns, axis=1), width)


@full_precision
def block_units(
    q: Float[Array, " p"], axes: Float[Array, "d p"], mean: Float[Array, " d"], factor: ArrayLike
) -> Float[Array, "d p"]:
    r"""The units of one block from the gains q_j of its axes u_j, columns of ``axes``, and the cluster's mean or sum.

    .. math:: W = U \, \mathrm{diag}(\pm \sqrt{q}) \, O^\top, \quad \pm = \mathrm{sign}(u_j^\top \bar x)

    ``factor`` O of shape (p, p), see :func:`orthogonal_factor`; ``W Wᵀ = Σ_j q_j u_j u_jᵀ`` whichever it is.
    """
    # An eigenvector's sign is the solver's whim: the mean fixes it, which makes units rotate with the data.
    sign = jnp.where(mean @ axes >= 0, 1.0, -1.0).astype(q.dtype)
    return (axes * (sign * _sqrt(q))[None, :]) @ jnp.asarray(factor, q.dtype).T


def orthogonal_factor(rank: int) -> np.ndarray:
    r"""The factor O of a block of ``rank`` p units, shape (p, p), float64; derived here.

    Unit i is ``w_i = Σ_j O_ij √q_j u_j``. It must fire on the whole cluster, so the leading direction, which carries
    the mean, is shared equally: ``O_i1 = 1/√p``. If the cluster fills an ellipsoid of half-axes a_j about its mean, the
    worst preactivation of unit i is ``√(q_1/p) |u_1ᵀ x̄| − (Σ_{j>1} O_ij² q_j a_j²)^{1/2}``. The sums average to
    ``Σ_{j>1} q_j a_j²/p`` over the units whatever O is, so the worst unit is best off where all ``|O_ij| = 1/√p``: a
    Hadamard matrix. Such exist for few p. With p = 2^a m, m odd, the product of Sylvester's Hadamard matrix of size 2^a
    and the real Fourier matrix of size m comes near: its cosine and sine columns, kept side by side, have squares that
    sum to 2/p in every row.
    """
    check_integer("rank", rank, minimum=1)
    even = rank & -rank
    odd = rank // even
    hadamard = np.ones((1, 1))
    while len(hadamard) < even:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    angle = 2 * math.pi * np.outer(np.arange(odd), np.arange(1, odd // 2 + 1)) / odd
    waves = math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    # Unit (i, r), column (frequency, s, cosine or sine).
    oscillating = np.einsum("ifc,rs->irfsc", waves, hadamard).reshape(rank, rank - even)
    return np.concatenate([np.tile(hadamard, (odd, 1)), oscillating], axis=1) / math.sqrt(rank)


def _check(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> None:
    check_data(data)
    check_nonnegative("sigma", sigma)
    check_nonnegative("penalty", penalty)


def _block(
    points: Float[Array, "m d"], count: Float[Array, ""], *, n: int, sigma: Scalar, penalty: Scalar, rank: int
) -> Float[Array, "p_k d"]:
    lam, axes = principal_axes(points, rank)
    q = shrinkage(lam / count, count / n, sigma, penalty)
    return block_units(q, axes, jnp.sum(points, axis=0), orthogonal_factor(rank)).T


def _some(ranks: tuple[int, ...]) -> tuple[int, ...]:
    if not any(ranks):
        raise ValueError("ranks sum to 0; at least one block needs a unit.")
    return ranks


def _tied(w: Float[Array, "d p"], width: int | None) -> ReluDae:
    w = jnp.pad(w, ((0, 0), (0, 0 if width is None else width - w.shape[1])))
    return ReluDae(w, w)


def _sqrt(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    # The slope of √ at 0 is infinite: a clipped direction would make every gradient NaN.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
