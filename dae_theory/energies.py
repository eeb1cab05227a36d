r"""Closed-form losses of block structures: the main term of the objective, from spectra alone; derived here.

If no noise crosses a gate, block k acts as the matrix ``Q_k = W_k W_kᵀ`` on its own cluster, and the objective
:cite:`zhang26`, eq. (6), is its *main term*

.. math:: \frac1n \sum_k \Big[\sum_j (1 - q_j)^2 \Lambda_j + n_k \sigma^2 \sum_j q_j^2\Big] + 2 \lambda \sum_j q_j

(q = 0 for directions that are not kept), which differs from the exact objective by terms exponentially small in
(margin/σ)². With moments ``s = Λ/n_k`` and weights ``ρ = n_k/n`` it is a sum over directions, so for a fixed partition
it is best to keep the p directions with the largest gains. Energies of different partitions are comparable only if
their margins are positive, see :func:`dae_theory.conditions.check_conditions`.

Everything is jittable over data, spectra, σ, λ and widths, differentiable, and batches with ``jax.vmap``; labels are
static.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_level, is_concrete
from dae_theory.minimizers import shrinkage, threshold
from dae_theory.mixture import GaussianMixture
from dae_theory.model import AffineDae, Dae
from dae_theory.precision import full_precision
from dae_theory.spectra import Labels, Ranks, Spectra, check_ranks, empirical_spectra, partition, population_spectra
from dae_theory.types import Scalar

__all__ = [
    "Energy",
    "allocate_ranks",
    "best_energy",
    "block_energy",
    "direction_energy",
    "direction_gain",
    "main_term",
    "memorizing_energy",
    "population_energy",
    "spectral_energy",
]


class Energy(NamedTuple):
    """A loss in two parts; a pytree."""

    risk: Float[Array, "*s"]
    """Mean squared denoising error."""
    decay: Float[Array, "*s"]
    """λ(‖W₁‖² + ‖W₂‖²)."""

    @property
    def objective(self) -> Float[Array, "*s"]:
        """The training objective, the sum of both."""
        return self.risk + self.decay


def direction_energy(
    moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, sigma: Scalar, penalty: Scalar
) -> Energy:
    r"""Energy of each direction if it is kept, at its optimal gain q.

    .. math:: \rho [(1 - q)^2 s + \sigma^2 q^2] = \rho \, \frac{s \sigma^2 + \min(\ell, s)^2}{s + \sigma^2}, \qquad
              2 \lambda q, \qquad \ell = \lambda/\rho

    A direction that is not kept contributes ρs. Shapes broadcast as in :func:`dae_theory.minimizers.shrinkage`.
    """
    weights = jnp.asarray(weights, moments.dtype)
    total = moments + sigma * sigma
    cost = threshold(moments, weights, penalty)
    risk = (moments * (sigma * sigma) + jnp.square(cost)) / jnp.where(total > 0, total, 1.0)
    return Energy(weights * risk, 2 * penalty * shrinkage(moments, weights, sigma, penalty))


def direction_gain(
    moments: Float[Array, "*s"], weights: Float[Array, "*w"] | float, sigma: Scalar, penalty: Scalar
) -> Float[Array, "*s"]:
    r"""The amount by which keeping a direction lowers the objective.

    .. math:: \frac{(\rho s - \lambda)_+^2}{\rho (s + \sigma^2)} = \rho q^2 (s + \sigma^2)

    It increases with s, so within a block the top eigenvalues gain most.
    """
    weights = jnp.asarray(weights, moments.dtype)
    q = shrinkage(moments, weights, sigma, penalty)
    return weights * jnp.square(q) * (moments + sigma * sigma)


def spectral_energy(spectra: Spectra, sigma: Scalar, penalty: Scalar, ranks: Ranks | Int[Array, " K"]) -> Energy:
    r"""Main term of blocks that keep their top ``ranks`` p_k directions; the ranks may be traced.

    .. math:: \sum_k \Big[\sum_{j \le p_k} \rho_k \frac{s_j \sigma^2 + \min(\ell_k, s_j)^2}{s_j + \sigma^2}
              + \sum_{j > p_k} \rho_k s_j\Big], \qquad 2 \lambda \sum_k \sum_{j \le p_k} q_j
    """
    moments, weights = spectra.moments, spectra.weights[:, None]
    if is_concrete(ranks):
        ranks = jnp.asarray(check_ranks(ranks, [moments.shape[1]] * moments.shape[0]))
    is_kept = jnp.arange(moments.shape[1])[None, :] < jnp.asarray(ranks)[:, None]
    return _total(moments, weights, sigma, penalty, is_kept)


def block_energy(data: Float[Array, "n d"], labels: Labels, sigma: Scalar, penalty: Scalar, ranks: Ranks) -> Energy:
    """Main term at :func:`dae_theory.minimizers.block_minimizer`, with the same arguments and errors."""
    _check(sigma, penalty)
    spectra = empirical_spectra(data, labels)
    blocks = partition(labels, data.shape[0])
    ranks = check_ranks(ranks, [min(int(count), data.shape[1]) for count in blocks.counts])
    return spectral_energy(spectra, sigma, penalty, ranks)


@full_precision
def memorizing_energy(data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, width: int | None = None) -> Energy:
    r"""Main term at :func:`dae_theory.minimizers.memorizing_minimizer` :cite:`zhang26`, Corollary 3.2.

    .. math:: \frac1n \sum_i \frac{\|x_i\|^2 \sigma^2 + (n \lambda)^2}{\|x_i\|^2 + \sigma^2}, \qquad
              2 \lambda \sum_i \frac{\|x_i\|^2 - n \lambda}{\|x_i\|^2 + \sigma^2}

    with nλ replaced by ‖xᵢ‖² where it is larger. A ``width`` p < n stores the p longest samples, which gain most, and
    each of the others contributes ‖xᵢ‖²/n. Raises ``ValueError`` for σ or λ below 0 and a width below 1.
    """
    check_data(data)
    _check(sigma, penalty)
    n = data.shape[0]
    norm_sq = -jnp.sort(-jnp.sum(jnp.square(data), axis=-1))
    stored = n if width is None else min(n, check_integer("width", width, minimum=1))
    return _total(norm_sq, jnp.full(n, 1.0 / n, data.dtype), sigma, penalty, jnp.arange(n) < stored)


def population_energy(mixture: GaussianMixture, sigma: Scalar, penalty: Scalar, ranks: Ranks) -> Energy:
    r"""Population loss of :func:`dae_theory.minimizers.generalizing_minimizer` :cite:`zhang26`, Corollary 3.3.

    .. math:: \sum_k \rho_k \Big[\sum_{\text{kept}} \frac{e_j \sigma^2 + \ell_k^2}{e_j + \sigma^2}
              + \sum_{\text{dropped or clipped}} e_j\Big], \quad e = \mathrm{eig}(\mu_k \mu_k^\top + \Sigma_k)

    up to the Gaussian tails that cross gates. Derived here; the bound in print drops the variance term.
    """
    _check(sigma, penalty)
    return spectral_energy(population_spectra(mixture), sigma, penalty, ranks)


def allocate_ranks(spectra: Spectra, sigma: Scalar, penalty: Scalar, width: ArrayLike) -> Int[Array, " K"]:
    """Units of each block if ``width`` p units go to the p largest gains, which is optimal for a fixed partition.

    Directions of zero gain get no unit, so the ranks can sum to less than p. ``width`` may be traced; raises
    ``ValueError`` if it is concrete and below 1.
    """
    _check(sigma, penalty)
    if is_concrete(width):
        check_integer("width", width, minimum=1)
    gains = direction_gain(spectra.moments, spectra.weights[:, None], sigma, penalty)
    order = jnp.argsort(jnp.argsort(-gains, axis=None, stable=True)).reshape(gains.shape)
    return jnp.sum((order < jnp.asarray(width).astype(order.dtype)) & (gains > 0), axis=1)


def best_energy(spectra: Spectra, sigma: Scalar, penalty: Scalar, width: ArrayLike) -> Energy:
    """Main term with the ranks of :func:`allocate_ranks`: the lowest for this partition and ``width`` units."""
    return spectral_energy(spectra, sigma, penalty, allocate_ranks(spectra, sigma, penalty, width))


@full_precision
def main_term(dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> Energy:
    r"""The objective of any autoencoder with its gates frozen at those of the clean samples.

    .. math:: \frac1n \sum_i \|f(x_i) - x_i\|^2 + \sigma^2 \|Q_i\|_F^2, \quad
              Q_i = W_2 \, \mathrm{diag}(1[W_1^\top x_i + b_1 > 0]) \, W_1^\top

    plus ``λ(‖W₁‖² + ‖W₂‖²)``. It differs from the exact objective by the noise that crosses gates.
    """
    check_data(data)
    _check(sigma, penalty)
    gram = (dae.w1.T @ dae.w1) * (dae.w2.T @ dae.w2)
    pre = data @ dae.w1
    if isinstance(dae, AffineDae):
        pre = pre + dae.b1[None, :]
    open_gates = (pre > 0).astype(data.dtype)
    residual = (open_gates * pre) @ dae.w2.T - data
    if isinstance(dae, AffineDae):
        residual = residual + dae.b2[None, :]
    spread = jnp.sum((open_gates @ gram) * open_gates, axis=-1)
    risk = jnp.mean(jnp.sum(jnp.square(residual), axis=-1) + sigma * sigma * spread)
    return Energy(risk, penalty * (jnp.sum(jnp.square(dae.w1)) + jnp.sum(jnp.square(dae.w2))))


def _total(
    moments: Float[Array, "*s"], weights: Float[Array, "*w"], sigma: Scalar, penalty: Scalar, is_kept: Bool[Array, "*s"]
) -> Energy:
    # Summed term by term: total variance minus gains would lose a small σ² to cancellation.
    energy = direction_energy(moments, weights, sigma, penalty)
    return Energy(
        jnp.sum(jnp.where(is_kept, energy.risk, weights * moments)), jnp.sum(jnp.where(is_kept, energy.decay, 0.0))
    )


def _check(sigma: Scalar, penalty: Scalar) -> None:
    check_level("sigma", sigma)
    check_level("penalty", penalty)
