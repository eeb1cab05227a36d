r"""Bayes-optimal denoisers, the references that a trained network is compared with.

All take one noisy example ``y = x + σ ε`` of shape (d,) and the noise level σ > 0, and return ``E[x | y]`` for some
distribution of x; ``functools.partial`` over the last arguments gives a :class:`dae_theory.types.Denoiser`. Batch with
``jax.vmap``. Arguments of another rank raise ``ValueError``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.checks import check_example, check_level
from dae_theory.mixture import GaussianMixture
from dae_theory.precision import full_precision
from dae_theory.types import Denoiser, Scalar

__all__ = ["empirical_denoiser", "gaussian_denoiser", "mixture_denoiser", "mixture_responsibilities", "score"]


@full_precision
def empirical_denoiser(y: Float[Array, " d"], sigma: Scalar, data: Float[Array, "n d"]) -> Float[Array, " d"]:
    r"""Posterior mean when ``x`` is uniform on the training set :cite:`zhang26`, eq. (3).

    .. math:: D(y) = \sum_i w_i x_i, \quad w = \mathrm{softmax}_i\left(-\|y - x_i\|^2 / 2\sigma^2\right)

    The memorizing limit: as σ → 0 it returns the nearest training point.

    Example:
        >>> import jax.numpy as jnp
        >>> x = empirical_denoiser(jnp.array([0.9, 0.1]), sigma=0.5, data=jnp.eye(2))
        >>> [round(float(value), 3) for value in x]  # softmax weights 1/(1 + exp(∓3.2))
        [0.961, 0.039]
    """
    _check_example(y, sigma)
    shape = getattr(data, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] != y.shape[0]:
        raise ValueError(
            f"data must be an array of shape (n, {y.shape[0]}), samples as rows and as long as y; got "
            f"{type(data).__name__ if shape is None else f'shape {tuple(shape)}'}. The order is (y, sigma, data)."
        )
    sq_dist = jnp.sum(jnp.square(y[None, :] - data), axis=-1)
    # Subtract before dividing, and divide twice: σ² underflows to 0 in float32.
    excess = sq_dist - jnp.min(sq_dist)
    return jax.nn.softmax(-0.5 * excess / sigma / sigma) @ data


@full_precision
def gaussian_denoiser(
    y: Float[Array, " d"], sigma: Scalar, mean: Float[Array, " d"], covariance: Float[Array, "d d"]
) -> Float[Array, " d"]:
    r"""Posterior mean when ``x ~ N(μ, Σ)``: the Wiener filter.

    .. math:: D(y) = \mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (y - \mu)

    Σ must be symmetric positive semidefinite; it may be singular.

    Example:
        >>> import jax.numpy as jnp
        >>> covariance = jnp.array([[3.0, 0.0], [0.0, 0.0]])
        >>> x = gaussian_denoiser(jnp.array([2.0, 2.0]), 1.0, jnp.zeros(2), covariance)
        >>> [round(float(value), 3) for value in x]
        [1.5, 0.0]
    """
    _check_example(y, sigma)
    eigenvalues, vectors = _axes(covariance)
    return mean + vectors @ (_gain(eigenvalues, sigma) * ((y - mean) @ vectors))


@full_precision
def mixture_responsibilities(y: Float[Array, " d"], sigma: Scalar, mixture: GaussianMixture) -> Float[Array, " K"]:
    r"""Posterior probabilities of the modes given ``y``.

    .. math:: w_k(y) \propto \rho_k \, \mathcal N(y; \mu_k, \Sigma_k + \sigma^2 I)
    """
    _check_example(y, sigma)
    eigenvalues, vectors = _axes(mixture.covariances)
    return _responsibilities(y, sigma, mixture, eigenvalues, vectors)


@full_precision
def mixture_denoiser(y: Float[Array, " d"], sigma: Scalar, mixture: GaussianMixture) -> Float[Array, " d"]:
    r"""Posterior mean under a Gaussian mixture: responsibility-weighted Wiener filters.

    .. math:: D(y) = \sum_k w_k(y) \left[\mu_k + \Sigma_k (\Sigma_k + \sigma^2 I)^{-1} (y - \mu_k)\right]

    The generalizing limit: it depends on the population, not on the samples.

    Example:
        >>> import jax.numpy as jnp
        >>> mixture = GaussianMixture(jnp.full(2, 0.5), jnp.array([[2.0], [-2.0]]), jnp.full((2, 1, 1), 3.0))
        >>> round(float(mixture_denoiser(jnp.zeros(1), 1.0, mixture)[0]), 3)  # halfway between two equal modes
        0.0
    """
    _check_example(y, sigma)
    eigenvalues, vectors = _axes(mixture.covariances)
    coordinates = jnp.einsum("ki,kij->kj", y[None, :] - mixture.means, vectors)
    filtered = mixture.means + jnp.einsum("kij,kj->ki", vectors, _gain(eigenvalues, sigma) * coordinates)
    return _responsibilities(y, sigma, mixture, eigenvalues, vectors) @ filtered


def score(denoiser: Denoiser, y: Float[Array, " d"], sigma: Scalar) -> Float[Array, " d"]:
    r"""Score of the noisy density, from its denoiser (Tweedie) :cite:`efron11`.

    .. math:: \nabla \log p_\sigma(y) = (D(y, \sigma) - y)/\sigma^2

    Example:
        >>> import functools, jax.numpy as jnp
        >>> wiener = functools.partial(gaussian_denoiser, mean=jnp.zeros(1), covariance=jnp.eye(1))
        >>> round(float(score(wiener, jnp.array([3.0]), sigma=0.5)[0]), 3)  # −y/(1 + σ²)
        -2.4
    """
    _check_example(y, sigma)
    # Divide twice: σ² underflows to 0 in float32.
    return (denoiser(y, sigma) - y) / sigma / sigma


def _check_example(y: Float[Array, " d"], sigma: Scalar) -> None:
    check_example("y", y)
    check_level("sigma", sigma, zero=False)


def _axes(covariances: Float[Array, "*K d d"]) -> tuple[Float[Array, "*K d"], Float[Array, "*K d d"]]:
    """Eigenvalues and eigenvectors; eigenvalues within the rounding of the largest are 0.

    A singular covariance has eigenvalues of rounding, which are no spread: where they exceed σ² the denoiser would
    return noise in their directions.
    """
    eigenvalues, vectors = jnp.linalg.eigh(covariances)
    floor = jnp.finfo(eigenvalues.dtype).eps * eigenvalues.shape[-1] * eigenvalues[..., -1:]
    return jnp.where(eigenvalues > floor, eigenvalues, 0.0), vectors


def _gain(eigenvalues: Float[Array, "*K d"], sigma: Scalar) -> Float[Array, "*K d"]:
    s = jnp.maximum(eigenvalues, 0.0)
    # s/(s + σ²) as s/σ/(s/σ + σ): no square of σ to underflow, and 0 where s = 0.
    return (s / sigma) / (s / sigma + sigma)


def _responsibilities(
    y: Float[Array, " d"],
    sigma: Scalar,
    mixture: GaussianMixture,
    eigenvalues: Float[Array, "K d"],
    vectors: Float[Array, "K d d"],
) -> Float[Array, " K"]:
    coordinates = jnp.einsum("ki,kij->kj", y[None, :] - mixture.means, vectors)
    deviation = jnp.hypot(jnp.sqrt(jnp.maximum(eigenvalues, 0.0)), jnp.asarray(sigma, eigenvalues.dtype))
    log_density = -0.5 * jnp.sum(jnp.square(coordinates / deviation), axis=-1) - jnp.sum(jnp.log(deviation), axis=-1)
    return jax.nn.softmax(jnp.log(mixture.weights) + log_density)
