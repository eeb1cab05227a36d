r"""Gaussian mixtures ``x ~ Σ_k ρ_k N(μ_k, Σ_k)``: the population behind Corollary 3.3 :cite:`zhang26`.

A mixture is a pytree of weights (K,), means (K, d) and covariances (K, d, d). Samples are rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_data, check_finite, check_integer, check_nonnegative, is_concrete
from dae_theory.precision import full_precision
from dae_theory.types import PRNGKey, Scalar

__all__ = [
    "GaussianMixture",
    "check_mixture",
    "covariance_roots",
    "fit",
    "mean_and_covariance",
    "sample",
    "second_moments",
]


class GaussianMixture(NamedTuple):
    """``K`` Gaussian modes in dimension ``d``; a pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> mixture = GaussianMixture(jnp.full(2, 0.5), jnp.array([[2.0, 0.0], [-2.0, 0.0]]), jnp.zeros((2, 2, 2)))
        >>> [round(float(x), 3) for x in mixture.weights @ mixture.means]
        [0.0, 0.0]
    """

    weights: Float[Array, " K"]
    """Probabilities ρ_k, which sum to 1."""
    means: Float[Array, "K d"]
    """Means μ_k."""
    covariances: Float[Array, "K d d"]
    """Covariances Σ_k, symmetric and positive semidefinite."""


def check_mixture(mixture: GaussianMixture) -> None:
    """Raise ``ValueError`` unless shapes agree and, if concrete, weights sum to 1 and covariances are PSD."""
    weights, means, covariances = mixture
    check_data(means, name="mixture.means")
    modes, dim = means.shape
    if weights.shape != (modes,) or covariances.shape != (modes, dim, dim):
        raise ValueError(
            f"mixture shapes disagree: weights {weights.shape}, means {means.shape}, covariances {covariances.shape}; "
            "they must be (K,), (K, d) and (K, d, d)."
        )
    check_nonnegative("mixture.weights", weights)
    check_finite("mixture.covariances", covariances)
    if not is_concrete(mixture):
        return
    rounding = float(jnp.finfo(covariances.dtype).eps)
    total = float(np.sum(np.asarray(weights, np.float64)))
    if abs(total - 1.0) > 10 * modes * rounding:
        raise ValueError(f"mixture.weights must sum to 1, got {total}; divide them by their sum.")
    covs = np.asarray(covariances, np.float64)
    size = np.max(np.abs(covs), initial=0.0)
    if np.max(np.abs(covs - covs.transpose(0, 2, 1))) > 100 * rounding * size:
        raise ValueError("mixture.covariances must be symmetric; average them with their transposes.")
    lowest = float(np.min(np.linalg.eigvalsh(covs)))
    if lowest < -100 * dim * rounding * size:
        raise ValueError(f"mixture.covariances must be positive semidefinite; the smallest eigenvalue is {lowest}.")


@full_precision
def sample(key: PRNGKey, mixture: GaussianMixture, num_samples: int) -> tuple[Float[Array, "n d"], Int[Array, " n"]]:
    """Draw ``num_samples`` rows and their mode labels; row i uses the key ``fold_in(key, i)``.

    Singular covariances are allowed. Raises ``ValueError`` if ``num_samples`` < 1 or the mixture is invalid.
    """
    check_integer("num_samples", num_samples, minimum=1)
    check_mixture(mixture)
    roots = covariance_roots(mixture)

    def draw(i):
        label_key, normal_key = jax.random.split(jax.random.fold_in(key, i))
        label = jax.random.categorical(label_key, jnp.log(mixture.weights))
        eps = jax.random.normal(normal_key, mixture.means.shape[1:], mixture.means.dtype)
        return mixture.means[label] + roots[label] @ eps, label

    return jax.vmap(draw)(jnp.arange(num_samples))


@full_precision
def covariance_roots(mixture: GaussianMixture) -> Float[Array, "K d d"]:
    """Square roots ``R_k R_kᵀ = Σ_k``, which map standard normal noise to the noise of a mode."""
    eigenvalues, vectors = jnp.linalg.eigh(mixture.covariances)
    # Not Cholesky, which fails for rank-deficient covariances: their zero eigenvalues may round to below zero.
    return vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0.0))[:, None, :]


def second_moments(mixture: GaussianMixture) -> Float[Array, "K d d"]:
    r"""Uncentered second moments of the modes :cite:`zhang26`, Corollary 3.3.

    .. math:: S_k = \mu_k \mu_k^\top + \Sigma_k
    """
    return mixture.means[:, :, None] * mixture.means[:, None, :] + mixture.covariances


@full_precision
def mean_and_covariance(mixture: GaussianMixture) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    r"""Mean and covariance of the whole mixture.

    .. math:: \bar\mu = \sum_k \rho_k \mu_k, \quad \sum_k \rho_k (\mu_k \mu_k^\top + \Sigma_k) - \bar\mu \bar\mu^\top
    """
    mean = mixture.weights @ mixture.means
    centered = mixture.means - mean[None, :]
    between = (centered * mixture.weights[:, None]).T @ centered
    return mean, between + jnp.einsum("k,kij->ij", mixture.weights, mixture.covariances)


@full_precision
def fit(data: Float[Array, "n d"], labels: Int[Array, " n"] | np.ndarray, *, ridge: Scalar = 0.0) -> GaussianMixture:
    r"""Maximum-likelihood mixture of labeled rows, with one mode per distinct label, in order of label.

    .. math:: \rho_k = n_k/n, \quad \mu_k = \bar x_k, \quad
              \Sigma_k = \frac{1}{n_k} \sum_{i \in k} (x_i - \mu_k)(x_i - \mu_k)^\top + \text{ridge} \cdot I

    ``labels`` must be concrete, because they determine the number of modes. ``ridge`` > 0 makes rank-deficient
    covariances invertible. Raises ``ValueError`` for labels of the wrong length, and for data that
    :func:`dae_theory.checks.check_data` rejects.
    """
    check_data(data)
    check_nonnegative("ridge", ridge)
    if not is_concrete(labels):
        raise ValueError("labels must be concrete, because they determine the number of modes, which is a shape.")
    names = np.asarray(labels)
    if names.shape != (data.shape[0],):
        raise ValueError(f"labels must have shape ({data.shape[0]},), one per row of data; got {names.shape}.")
    _, membership = np.unique(names, return_inverse=True)
    counts = np.bincount(membership)
    one_hot = jax.nn.one_hot(jnp.asarray(membership), counts.size, dtype=data.dtype)
    sizes = jnp.asarray(counts, data.dtype)
    means = one_hot.T @ data / sizes[:, None]

    def covariance(mode):
        is_member, mean, size = mode
        centered = (data - mean[None, :]) * is_member[:, None]
        return centered.T @ centered / size + ridge * jnp.eye(mean.size, dtype=data.dtype)

    covariances = jax.lax.map(covariance, (one_hot.T, means, sizes))
    return GaussianMixture(sizes / data.shape[0], means, covariances)
