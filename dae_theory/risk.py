r"""Denoising risk of the ReLU autoencoder, averaged over the noise exactly or by Monte Carlo.

The risk of a sample ``x`` is ``E‖f(x + σε) − x‖²`` with ``ε ~ N(0, I)``; training minimizes :cite:`zhang26`, eq. (6),

.. math:: L = \frac1n \sum_i E \|f(x_i + \sigma\varepsilon) - x_i\|^2 + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2).

Given ``x``, the preactivations ``W₁ᵀ(x + σε) + b₁`` are jointly Gaussian, so the average is a finite sum over pairs of
units (derived here). Biases move the mean of the preactivations by b₁ and replace the target x by x − b₂, and nothing
else: every function takes networks without and with them. Exact and Monte Carlo functions share one signature; neither
silently falls back on the other.

Samples are rows. ``chunk_size`` bounds the memory of values and gradients: at most this many samples (exact) or noisy
samples (Monte Carlo) are processed at a time, and the result changes by rounding only. Data and weights must share one
floating dtype, which the result has too. Everything is differentiable with respect to the weights, the data, ``sigma``
and ``penalty``; ``jax.jvp`` of ``jax.grad`` is a Hessian-vector product.

The objective has a kink at a zero unit: to leading order it is homogeneous of degree two in the unit's two columns but
not quadratic, so it has no Hessian there. Where W₁ has a zero column, exact gradients are the mean of the one-sided
derivatives (the gate counts one half, as in :mod:`dae_theory.relu_gaussian`); Monte Carlo gradients treat that gate as
off, as ``jax.nn.relu`` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.checks import check_data, check_finite, check_integer, check_level
from dae_theory.chunks import sum_over
from dae_theory.model import AffineDae, Dae, denoise, preactivations, target
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

# Entries of the largest array in a default chunk: pairs of units (fit a CPU's cache), and noise for Monte Carlo.
PAIRS_PER_CHUNK = 2**14
NOISE_PER_CHUNK = 2**20

Loss: TypeAlias = Callable[[PRNGKey], Float[Array, ""]]
"""The loss of one sample, as a function of the key that draws its noise."""


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
    """A Monte Carlo mean and its standard error."""

    mean: Float[Array, ""]
    standard_error: Float[Array, ""]
    """Estimated standard deviation of ``mean`` over the noise, with the data fixed."""


class Noise(NamedTuple):
    """Law of the Gaussian noise on the preactivations, the same for all samples."""

    std: Float[Array, " p"]
    cov: Float[Array, " pairs"]
    """Covariances of the pairs j <= k, in the order of ``np.triu_indices(p)``."""


@full_precision
def code_moments(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> CodeMoments:
    r"""Mean and covariance of the code over the noise, in closed form (derived here); one example.

    .. math:: h = [u]_+, \quad u \sim N(W_1^\top x + b_1,\; \sigma^2 W_1^\top W_1)

    ``sigma >= 0``. Raises ``ValueError`` for a negative ``sigma``, a non-finite ``x`` or dimensions that disagree.
    """
    sigma = _checked(dae, x[None], sigma)
    mean, covariance = _pair_moments(_noise(dae.w1, sigma), preactivations(dae, x))
    j, k = np.triu_indices(mean.size)
    pair_of = np.zeros((mean.size, mean.size), int)
    pair_of[j, k] = pair_of[k, j] = np.arange(j.size)
    return CodeMoments(mean, covariance[pair_of])


@full_precision
def exact_risk_at(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, ""]:
    r"""Exact risk of one example: squared bias plus variance (derived here).

    .. math:: E\|f(x + \sigma\varepsilon) - x\|^2 = \|W_2 E[h] + b_2 - x\|^2
              + \mathrm{tr}(W_2^\top W_2\, \mathrm{Cov}(h))

    ``sigma >= 0``. Raises ``ValueError`` for a negative ``sigma``, a non-finite ``x`` or dimensions that disagree.
    """
    sigma = _checked(dae, x[None], sigma)
    return _risk_at(dae, _noise(dae.w1, sigma), _pair_weights(dae.w2), x)


@full_precision
def exact_risk(
    dae: Dae, data: Float[Array, "n d"], sigma: Scalar, *, chunk_size: int | None = None
) -> Float[Array, ""]:
    """Mean of :func:`exact_risk_at` over the rows of ``data``.

    The default ``chunk_size`` fits a CPU's cache; accelerators run faster with a larger one. Raises ``ValueError`` for
    a negative ``sigma``, non-finite data, ranks or dimensions that disagree, or ``chunk_size < 1``.

    Example:
        >>> import jax.numpy as jnp
        >>> from dae_theory import ReluDae
        >>> dae, data = ReluDae(jnp.eye(2), jnp.eye(2)), jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> round(float(exact_risk(dae, data, sigma=0.1)), 4)  # σ² from the sample's own unit, σ²/2 from the other
        0.015
    """
    sigma = _checked(dae, data, sigma)
    pairs = np.triu_indices(dae.w1.shape[1])[0].size
    return _exact_risk(dae, data, sigma, _chunk(chunk_size, PAIRS_PER_CHUNK // pairs))


def exact_objective(
    dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar, *, chunk_size: int | None = None
) -> Float[Array, ""]:
    """The training objective :cite:`zhang26`, eq. (6), averaged over the noise exactly; ``penalty`` is λ >= 0.

    Raises what :func:`exact_risk` raises, and ``ValueError`` for a negative ``penalty``.

    Example:
        >>> import jax.numpy as jnp
        >>> from dae_theory import ReluDae
        >>> dae, data = ReluDae(jnp.eye(2), jnp.eye(2)), jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> round(float(exact_objective(dae, data, sigma=0.1, penalty=0.01)), 4)  # 0.015 + 0.01 · (2 + 2)
        0.055
    """
    return exact_risk(dae, data, sigma, chunk_size=chunk_size) + _weight_term(dae, penalty)


def monte_carlo_risk(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The risk estimated from ``num_draws`` noise draws per sample; the estimate and its gradient are unbiased.

    Draw t of sample i uses the key ``fold_in(fold_in(key, i), t)``, so adding samples or draws leaves the earlier ones
    unchanged. Raises what :func:`exact_risk` raises, and ``ValueError`` for ``num_draws < 1``.

    Args:
        key: One typed PRNG key.
        dae: Weights, two arrays of shape (d, p), and biases if it has any.
        data: Clean samples as rows, shape (n, d).
        sigma: Noise level σ >= 0, in the units of the data.
        num_draws: Noise draws per sample, at least 1.
        chunk_size: Noisy samples processed at a time, at least 1; by default as many as keep the memory moderate.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from dae_theory import ReluDae
        >>> dae, data = ReluDae(jnp.eye(2), jnp.eye(2)), jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> bool(abs(monte_carlo_risk(jax.random.key(0), dae, data, sigma=0.1, num_draws=1000) - 0.015) < 0.002)
        True
    """
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=False).mean


def monte_carlo_objective(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    penalty: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The training objective :cite:`zhang26`, eq. (6), averaged over the noise as in :func:`monte_carlo_risk`.

    Raises what that function raises, and ``ValueError`` for a negative ``penalty``.

    Args:
        key, dae, data, sigma, num_draws, chunk_size: As in :func:`monte_carlo_risk`.
        penalty: λ >= 0, the weight of ``‖W₁‖² + ‖W₂‖²``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from dae_theory import ReluDae
        >>> dae, data = ReluDae(jnp.eye(2), jnp.eye(2)), jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> bool(abs(monte_carlo_objective(jax.random.key(0), dae, data, 0.1, 0.01, num_draws=1000) - 0.055) < 0.002)
        True
    """
    risk = monte_carlo_risk(key, dae, data, sigma, num_draws=num_draws, chunk_size=chunk_size)
    return risk + _weight_term(dae, penalty)


def gram_monte_carlo_risk(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    r"""An estimate with the distribution of :func:`monte_carlo_risk` that samples the noise of the preactivations.

    Cheaper when there are many draws per sample (derived here). The loss depends on the noise through ``W₁ᵀε`` alone,
    so it is enough to draw its component in the span of the columns of W₁. With ``Q`` an orthonormal basis of that
    span, and ``h₀``, ``e₀`` the code and the error at zero noise,

    .. math:: h = [W_1^\top x + \sigma\, W_1^\top Q\, \xi]_+, \quad \xi \sim N(0, I), \qquad
       \|W_2 h - x\|^2 = \|e_0\|^2 + 2 (h - h_0)^\top W_2^\top e_0 + (h - h_0)^\top W_2^\top W_2 (h - h_0)

    so a draw costs ``p² + p min(d, p)`` multiplications instead of ``2dp``. Zero and parallel columns need no special
    treatment: QR gives a ``Q`` for them too. ``Q`` is treated as a constant by differentiation; the gradient is still
    unbiased, and varies less than the direct form's. Raises what :func:`monte_carlo_risk` raises.

    Args:
        key, dae, data, sigma, num_draws, chunk_size: As in :func:`monte_carlo_risk`.
    """
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=True).mean


def monte_carlo_estimate(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    *,
    num_draws: int,
    gram: bool = False,
    chunk_size: int | None = None,
) -> Estimate:
    """:func:`monte_carlo_risk`, or with ``gram`` :func:`gram_monte_carlo_risk`, together with its standard error.

    Args:
        key, dae, data, sigma, chunk_size: As in :func:`monte_carlo_risk`, which raises the same errors.
        num_draws: Noise draws per sample, at least 2: one draw has no sample variance.
        gram: Whether to sample the noise of the preactivations instead of that of the input.
    """
    check_integer("num_draws", num_draws, minimum=2)
    return _estimate(key, dae, data, sigma, num_draws, chunk_size, gram=gram)


def _checked(dae: Dae, data: Array, sigma: Scalar) -> Float[Array, ""]:
    check_data(data)
    check_level("sigma", sigma)
    shape, dtype = jnp.shape(dae.w1), jnp.result_type(dae.w1)
    if len(shape) != 2 or jnp.shape(dae.w2) != shape:
        raise ValueError(f"w1 and w2 must have the same shape (d, p), got {shape} and {jnp.shape(dae.w2)}.")
    if shape[0] != data.shape[1]:
        raise ValueError(f"data has {data.shape[1]} columns but the weights have {shape[0]} rows; both must be d.")
    if isinstance(dae, AffineDae) and (jnp.shape(dae.b1), jnp.shape(dae.b2)) != (shape[1:], shape[:1]):
        raise ValueError(
            f"b1 and b2 must have shapes {shape[1:]} and {shape[:1]}, as w1 has {shape}; got {jnp.shape(dae.b1)} and "
            f"{jnp.shape(dae.b2)}."
        )
    if any(jnp.result_type(part) != data.dtype for part in dae):
        raise ValueError(f"data is {data.dtype} but the weights are {dtype}, {jnp.result_type(dae.w2)}; cast one.")
    for name, part in zip(dae._fields, dae, strict=True):
        check_finite(name, part)
    return jnp.asarray(sigma, dtype)


def _chunk(chunk_size: int | None, default: int) -> int:
    return max(1, default) if chunk_size is None else check_integer("chunk_size", chunk_size, minimum=1)


def _noise(w1: Float[Array, "d p"], sigma: Float[Array, ""]) -> Noise:
    gram = w1.T @ w1
    sq_norm = jnp.diagonal(gram)
    norm = jnp.where(sq_norm > 0, jnp.sqrt(jnp.where(sq_norm > 0, sq_norm, 1.0)), 0.0)
    return Noise(sigma * norm, sigma * sigma * gram[np.triu_indices(sq_norm.size)])


def _pair_moments(noise: Noise, mean: Float[Array, " p"]) -> tuple[Float[Array, " p"], Float[Array, " pairs"]]:
    j, k = np.triu_indices(mean.size)
    covariance = relu_covariance(mean[j], mean[k], noise.std[j], noise.std[k], noise.cov)
    return relu_mean(mean, noise.std), covariance


def _pair_weights(w2: Float[Array, "d p"]) -> Float[Array, " pairs"]:
    """Entries of ``W₂ᵀW₂``, doubled off the diagonal: their dot product with the pairs of C is ``tr(W₂ᵀW₂ C)``."""
    j, k = np.triu_indices(w2.shape[1])
    return (w2.T @ w2)[j, k] * np.where(j == k, 1.0, 2.0).astype(w2.dtype)


def _risk_at(dae: Dae, noise: Noise, weights: Float[Array, " pairs"], x: Float[Array, " d"]) -> Float[Array, ""]:
    mean, covariance = _pair_moments(noise, preactivations(dae, x))
    return jnp.sum(jnp.square(dae.w2 @ mean - target(dae, x))) + weights @ covariance


# Jitted here: an eager call would dispatch about a hundred elementwise operations one by one.
@functools.partial(jax.jit, static_argnames="chunk_size")
def _exact_risk(dae: Dae, data: Float[Array, "n d"], sigma: Float[Array, ""], chunk_size: int) -> Float[Array, ""]:
    noise, weights = _noise(dae.w1, sigma), _pair_weights(dae.w2)
    return sum_over(lambda x: _risk_at(dae, noise, weights, x), data, chunk_size) / len(data)


def _weight_term(dae: Dae, penalty: Scalar) -> Float[Array, ""]:
    check_level("penalty", penalty)
    return jnp.asarray(penalty, dae.w1.dtype) * (jnp.sum(jnp.square(dae.w1)) + jnp.sum(jnp.square(dae.w2)))


@full_precision
def _estimate(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Scalar,
    num_draws: int,
    chunk_size: int | None,
    gram: bool,
) -> Estimate:
    """Check the arguments and estimate. Args: as in :func:`monte_carlo_estimate`, but one draw is allowed."""
    sigma = _checked(dae, data, sigma)
    num_draws = check_integer("num_draws", num_draws, minimum=1)
    chunk_size = _chunk(chunk_size, NOISE_PER_CHUNK // max(dae.w1.shape))
    return _sampled(key, dae, data, sigma, num_draws, chunk_size, gram)


@functools.partial(jax.jit, static_argnames=("num_draws", "chunk_size", "gram"))
def _sampled(
    key: PRNGKey,
    dae: Dae,
    data: Float[Array, "n d"],
    sigma: Float[Array, ""],
    num_draws: int,
    chunk_size: int,
    gram: bool,
) -> Estimate:
    """The estimate. Args: as in :func:`monte_carlo_estimate`, all checked and ``chunk_size`` given."""
    losses = _gram_losses(dae, sigma) if gram else _direct_losses(dae, sigma)

    def mean_and_variance(row):
        i, x = row
        loss = losses(x)

        def powers(t):
            value = loss(jax.random.fold_in(jax.random.fold_in(key, i), t))
            return jnp.stack([value, value * value])

        mean, mean_sq = sum_over(powers, jnp.arange(num_draws), chunk_size) / num_draws
        return jnp.stack([mean, (mean_sq - mean * mean) / max(1, num_draws - 1)])

    rows = (jnp.arange(len(data)), data)
    mean, variance = sum_over(mean_and_variance, rows, max(1, chunk_size // num_draws)) / len(data)
    # Without noise the variance is 0 up to rounding, which may be negative.
    return Estimate(mean, jnp.sqrt(jnp.maximum(variance, 0.0) / len(data)))


def _direct_losses(dae: Dae, sigma: Float[Array, ""]) -> Callable[[Float[Array, " d"]], Loss]:
    def losses(x):
        def loss(key):
            epsilon = jax.random.normal(key, x.shape, x.dtype)
            return jnp.sum(jnp.square(denoise(dae, x + sigma * epsilon) - x))

        return loss

    return losses


def _gram_losses(dae: Dae, sigma: Float[Array, ""]) -> Callable[[Float[Array, " d"]], Loss]:
    q = jax.lax.stop_gradient(jnp.linalg.qr(dae.w1)[0])
    w1_q, w2_w2 = dae.w1.T @ q, dae.w2.T @ dae.w2

    def losses(x):
        m = preactivations(dae, x)
        h0 = jax.nn.relu(m)
        e0 = dae.w2 @ h0 - target(dae, x)
        constant, slope = e0 @ e0, e0 @ dae.w2

        def loss(key):
            xi = jax.random.normal(key, (q.shape[1],), x.dtype)
            change = jax.nn.relu(m + sigma * (w1_q @ xi)) - h0
            return constant + 2.0 * (change @ slope) + change @ (w2_w2 @ change)

        return loss

    return losses
