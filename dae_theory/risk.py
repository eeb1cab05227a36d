r"""Denoising risk of the ReLU autoencoder, averaged over the noise exactly or by Monte Carlo.

The risk of a sample ``x`` is ``E‖f(x + σε) − x‖²`` with ``ε ~ N(0, I)``, and the objective of training is
:cite:`zhang26`, eq. (6),

.. math:: L = \frac1n \sum_i E \|f(x_i + \sigma\varepsilon) - x_i\|^2 + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2).

Given ``x``, the preactivations ``W₁ᵀ(x + σε)`` are Gaussian, so the average is a finite sum over pairs of units
(derived here). The exact and the Monte Carlo functions share one signature; neither stands in for the other silently.

Samples are rows. Functions differentiate in the weights, the data, ``sigma`` and ``penalty``; Hessian-vector products
are ``jax.jvp`` of ``jax.grad``. A zero column of W₁ is a kink (see :mod:`dae_theory.relu_gaussian`): the gradient there
is the mean of the one-sided ones, and there is no Hessian. ``chunk_size`` bounds the memory of values and gradients: so
many samples (exact) or noisy samples (Monte Carlo) are in work at once; results do not depend on it beyond rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_data, check_finite, check_integer, check_nonnegative
from dae_theory.model import ReluDae, denoise
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_covariance, relu_mean
from dae_theory.types import PRNGKey, Scalar

__all__ = [
    "CodeMoments",
    "Estimate",
    "code_moments",
    "exact_objective",
    "exact_risk",
    "exact_risk_at",
    "gram_monte_carlo_risk",
    "monte_carlo_estimate",
    "monte_carlo_objective",
    "monte_carlo_risk",
]

# Work in flight by default: pairs of units that fit a CPU's cache, and numbers of one batch of noise.
PAIRS_IN_FLIGHT = 2**14
NOISE_IN_FLIGHT = 2**20


class CodeMoments(NamedTuple):
    """First two moments of the code ``h(x + σε)`` over the noise."""

    mean: Float[Array, " p"]
    """``E[h]``."""
    covariance: Float[Array, "p p"]
    """``E[h hᵀ] − E[h] E[h]ᵀ``."""

    @property
    def second(self) -> Float[Array, "p p"]:
        """``E[h hᵀ]``."""
        return self.covariance + self.mean[:, None] * self.mean[None, :]


class Estimate(NamedTuple):
    """A Monte Carlo mean and what to expect of it."""

    mean: Float[Array, ""]
    standard_error: Float[Array, ""]
    """Standard deviation of ``mean`` over the noise, the data held fixed."""


class Noise(NamedTuple):
    """Gaussian noise of the preactivations, the same for every sample; pairs ``j <= k`` in the order of ``_pairs``."""

    std: Float[Array, " p"]
    cov: Float[Array, " pairs"]


@full_precision
def code_moments(dae: ReluDae, x: Float[Array, " d"], sigma: Scalar) -> CodeMoments:
    r"""Mean and covariance of the code over the noise, in closed form (derived here); one example.

    .. math:: h = [u]_+, \quad u \sim N(W_1^\top x, \; \sigma^2 W_1^\top W_1)

    ``ValueError`` for a negative ``sigma`` or a dimension that does not fit.
    """
    sigma = _checked(dae, x[None, :], sigma)
    mean, covariance = _pair_moments(_noise(dae.w1, sigma), dae.w1, x)
    j, k = _pairs(mean.size)
    position = np.zeros((mean.size, mean.size), int)
    position[j, k] = position[k, j] = np.arange(j.size)
    return CodeMoments(mean, covariance[position])


@full_precision
def exact_risk_at(dae: ReluDae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, ""]:
    r"""Exact risk of one example: squared bias plus variance (derived here).

    .. math:: E\|f(x + \sigma\varepsilon) - x\|^2 = \|W_2 E[h] - x\|^2 + \mathrm{tr}(W_2^\top W_2 \, \mathrm{Cov}(h))

    ``ValueError`` for a negative ``sigma`` or a dimension that does not fit.
    """
    sigma = _checked(dae, x[None, :], sigma)
    return _risk_at(dae, _noise(dae.w1, sigma), _pair_weights(dae.w2), x)


@full_precision
def exact_risk(
    dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar, *, chunk_size: int | None = None
) -> Float[Array, ""]:
    """Mean of :func:`exact_risk_at` over the rows of ``data``; no sampling.

    The default ``chunk_size`` suits a CPU's cache; an accelerator runs faster with a larger one. ``ValueError`` for a
    negative ``sigma``, non-finite data, a dimension that does not fit or ``chunk_size < 1``.
    """
    sigma = _checked(dae, data, sigma)
    pairs = _pairs(dae.w1.shape[1])[0].size
    return _exact_risk(dae, data, sigma, _chunk(chunk_size, PAIRS_IN_FLIGHT // pairs))


def exact_objective(
    dae: ReluDae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, *, chunk_size: int | None = None
) -> Float[Array, ""]:
    r"""The training objective :cite:`zhang26`, eq. (6), with the noise averaged exactly; ``penalty`` is λ >= 0.

    Errors as :func:`exact_risk`, and for a negative ``penalty``.
    """
    check_nonnegative("penalty", penalty)
    return exact_risk(dae, data, sigma, chunk_size=chunk_size) + penalty * _sq_norm(dae)


def monte_carlo_risk(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The risk from ``num_draws`` noises a sample, unbiased, as is its gradient.

    Draw t of sample i comes from ``fold_in(fold_in(key, i), t)``, so more draws or samples extend fewer. Errors as
    :func:`exact_risk`, and for ``num_draws < 1``.
    """
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=False).mean


def monte_carlo_objective(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The training objective :cite:`zhang26`, eq. (6), with :func:`monte_carlo_risk` for its noise average."""
    check_nonnegative("penalty", penalty)
    risk = monte_carlo_risk(key, dae, data, sigma, num_draws=num_draws, chunk_size=chunk_size)
    return risk + penalty * _sq_norm(dae)


def gram_monte_carlo_risk(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    r"""The law of :func:`monte_carlo_risk` from noise of the preactivations alone (derived here): many draws, cheaply.

    With ``Q`` an orthonormal basis of a space that contains the columns of W₁, and ``h₀``, ``e₀`` the code and the error
    without noise,

    .. math:: h = [W_1^\top x + \sigma (W_1^\top Q)\xi]_+, \quad \xi \sim N(0, I), \quad
       \|W_2 h - x\|^2 = \|e_0\|^2 + 2 (h - h_0)^\top W_2^\top e_0 + (h - h_0)^\top W_2^\top W_2 (h - h_0).

    A draw costs ``min(d, p)²`` instead of ``d p``. Zero and parallel columns need no care, as nothing is factorized but
    W₁ itself. ``Q`` counts as constant under differentiation: the gradient is unbiased too, with less variance.
    """
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=True).mean


def monte_carlo_estimate(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    gram: bool = False,
    chunk_size: int | None = None,
) -> Estimate:
    """:func:`monte_carlo_risk` (:func:`gram_monte_carlo_risk` with ``gram``) and its standard error, same draws.

    Errors as there, and for ``num_draws < 2``, which leaves no degree of freedom for the error.
    """
    check_integer("num_draws", num_draws, minimum=2)
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=gram)


def _checked(dae: ReluDae, data: Array, sigma: Scalar) -> Float[Array, ""]:
    check_data(data)
    check_nonnegative("sigma", sigma)
    if jnp.ndim(dae.w1) != 2 or jnp.shape(dae.w1) != jnp.shape(dae.w2):
        raise ValueError(
            f"w1 and w2 must have one shape (d, p), got {jnp.shape(dae.w1)} and {jnp.shape(dae.w2)}."
        )
    if dae.w1.shape[0] != data.shape[1]:
        raise ValueError(f"data has d = {data.shape[1]} columns but the weights have d = {dae.w1.shape[0]} rows.")
    if not dae.w1.dtype == dae.w2.dtype == data.dtype:
        raise ValueError(
            f"data and weights must have one dtype, got {data.dtype}, {dae.w1.dtype} and {dae.w2.dtype}; cast them."
        )
    check_finite("w1", dae.w1)
    check_finite("w2", dae.w2)
    return jnp.asarray(sigma, data.dtype)


def _chunk(chunk_size: int | None, default: int) -> int:
    return max(1, default) if chunk_size is None else check_integer("chunk_size", chunk_size, minimum=1)


def _pairs(width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(width)


def _noise(w1: Float[Array, "d p"], sigma: Float[Array, ""]) -> Noise:
    gram = w1.T @ w1
    sq_norm = jnp.diagonal(gram)
    norm = jnp.where(sq_norm > 0, jnp.sqrt(jnp.where(sq_norm > 0, sq_norm, 1.0)), 0.0)
    return Noise(sigma * norm, sigma * sigma * gram[_pairs(sq_norm.size)])


def _pair_weights(w2: Float[Array, "d p"]) -> Float[Array, " pairs"]:
    """Entries of W₂ᵀW₂, those off the diagonal twice: a trace over all pairs as a sum over ``j <= k``."""
    j, k = _pairs(w2.shape[1])
    return (w2.T @ w2)[j, k] * np.where(j == k, 1.0, 2.0).astype(w2.dtype)


def _pair_moments(
    noise: Noise, w1: Float[Array, "d p"], x: Float[Array, " d"]
) -> tuple[Float[Array, " p"], Float[Array, " pairs"]]:
    mean, (j, k) = x @ w1, _pairs(w1.shape[1])
    covariance = relu_covariance(mean[j], mean[k], noise.std[j], noise.std[k], noise.cov)
    return relu_mean(mean, noise.std), covariance


def _risk_at(
    dae: ReluDae, noise: Noise, weights: Float[Array, " pairs"], x: Float[Array, " d"]
) -> Float[Array, ""]:
    mean, covariance = _pair_moments(noise, dae.w1, x)
    return jnp.sum(jnp.square(dae.w2 @ mean - x)) + jnp.sum(weights * covariance)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _exact_risk(
    dae: ReluDae, data: Float[Array, "n d"], sigma: Float[Array, ""], chunk_size: int
) -> Float[Array, ""]:
    noise, weights = _noise(dae.w1, sigma), _pair_weights(dae.w2)
    return _sum_over(lambda i: _risk_at(dae, noise, weights, data[i]), len(data), chunk_size) / len(data)


def _sum_over(function: Callable[[Int[Array, ""]], Array], count: int, chunk_size: int) -> Array:
    """``Σ function(i)`` over ``i < count``, evenly cut chunks of at most ``chunk_size`` at a time."""
    steps = -(-count // chunk_size)
    size = -(-count // steps)
    if steps == 1:
        return jnp.sum(jax.vmap(function)(jnp.arange(count)), axis=0)

    # Recomputed in the backward pass: otherwise the gradient would keep what every chunk computed.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total: Array, start: Int[Array, ""]) -> tuple[Array, None]:
        i = start + jnp.arange(size)
        values = jax.vmap(function)(jnp.minimum(i, count - 1))
        real = jnp.expand_dims(i < count, tuple(range(1, values.ndim)))
        return total + jnp.sum(jnp.where(real, values, 0.0), axis=0), None

    like = jax.eval_shape(function, jnp.arange(1)[0])
    return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), size * jnp.arange(steps))[0]


@full_precision
def _estimate(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    num_draws: int,
    chunk_size: int | None,
    *,
    gram: bool,
) -> Estimate:
    sigma = _checked(dae, data, sigma)
    num_draws = check_integer("num_draws", num_draws, minimum=1)
    chunk_size = _chunk(chunk_size, NOISE_IN_FLIGHT // (dae.w1.shape[1] if gram else dae.w1.shape[0]))
    return _sampled(key, dae, data, sigma, num_draws, chunk_size, gram)


@functools.partial(jax.jit, static_argnames=("num_draws", "chunk_size", "gram"))
def _sampled(
    key: PRNGKey,
    dae: ReluDae,
    data: Float[Array, "n d"],
    sigma: Float[Array, ""],
    num_draws: int,
    chunk_size: int,
    gram: bool,
) -> Estimate:
    losses = _gram_losses(dae, sigma) if gram else _direct_losses(dae, sigma)

    def moments(i: Int[Array, ""]) -> Float[Array, "2"]:
        loss = losses(data[i])

        def powers(t: Int[Array, ""]) -> Float[Array, "2"]:
            value = loss(jax.random.fold_in(jax.random.fold_in(key, i), t))
            return jnp.stack([value, value * value])

        mean, mean_sq = _sum_over(powers, num_draws, min(chunk_size, num_draws)) / num_draws
        return jnp.stack([mean, (mean_sq - mean * mean) / max(1, num_draws - 1)])

    mean, variance = _sum_over(moments, len(data), max(1, chunk_size // num_draws)) / len(data)
    # Rounding can leave a variance of 0 (no noise) slightly negative.
    return Estimate(mean, jnp.sqrt(jnp.maximum(variance, 0.0) / len(data)))


def _direct_losses(dae: ReluDae, sigma: Float[Array, ""]) -> Callable:
    def losses(x: Float[Array, " d"]) -> Callable:
        def loss(key: PRNGKey) -> Float[Array, ""]:
            epsilon = jax.random.normal(key, x.shape, x.dtype)
            return jnp.sum(jnp.square(denoise(dae, x + sigma * epsilon) - x))

        return loss

    return losses


def _gram_losses(dae: ReluDae, sigma: Float[Array, ""]) -> Callable:
    basis = jax.lax.stop_gradient(jnp.linalg.qr(dae.w1)[0])
    factor = dae.w1.T @ basis
    gram2 = dae.w2.T @ dae.w2

    def losses(x: Float[Array, " d"]) -> Callable:
        m = x @ dae.w1
        h0 = jax.nn.relu(m)
        e0 = dae.w2 @ h0 - x
        base, slope = jnp.sum(e0 * e0), e0 @ dae.w2

        def loss(key: PRNGKey) -> Float[Array, ""]:
            xi = jax.random.normal(key, (factor.shape[1],), x.dtype)
            change = jax.nn.relu(m + sigma * (factor @ xi)) - h0
            return base + 2.0 * (change @ slope) + change @ (gram2 @ change)

        return loss

    return losses


def _sq_norm(dae: ReluDae) -> Float[Array, ""]:
    return jnp.sum(jnp.square(dae.w1)) + jnp.sum(jnp.square(dae.w2))
