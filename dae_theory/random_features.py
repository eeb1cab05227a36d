r"""Training time in closed form: a score model of random features, trained by gradient flow at one noise level.

The model of :cite:`bonnaire25`: at the time t of the Ornstein-Uhlenbeck process,
:math:`x_t = e^{-t} x + \sqrt\Delta\, \xi` with :math:`\Delta = 1 - e^{-2t}`, the score is estimated by

.. math:: s(x) = B\, \varphi(W x/\sqrt d), \qquad W \in \mathbb R^{p \times d} \text{ standard normal and frozen},

so the denoising loss is quadratic in B and everything along training follows from one eigendecomposition of
:math:`U = \mathrm{mean}_i\, E\,\varphi\varphi^\top`, with :math:`V = \mathrm{mean}_i\, E\,\varphi\,\xi^\top`:

.. math:: L(B) = 1 + \frac{\Delta}{d} \mathrm{tr}(B U B^\top) + \frac{2\sqrt\Delta}{d} \mathrm{tr}(B V), \qquad
          B(\tau) = -\frac{1}{\sqrt\Delta} V^\top U^{-1} \left(1 - e^{-\kappa U \tau}\right), \quad
          \kappa = \frac{2 \Delta d}{p}

with τ = steps × learning rate/d². Large eigenvalues of U, whose number is d, are learned first and belong to the
population; the n next ones belong to the training points, and are learned at a time proportional to n. In between
the model generalizes (:mod:`dae_theory.feature_spectra`).

Training moments U, V are exact for given noise (:func:`sampled_moments`) or over all noise
(:func:`relu_moments`); those of the population, for Gaussian data, are :func:`gaussian_moments`. The derivation is
:cite:`bonnaire25`'s; the discrete steps, the moments without sampling and the finite-size counts are derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.bivariate_normal import normal_cdf
from dae_theory.checks import check_data, check_nonnegative, check_positive
from dae_theory.function_space import arc_cosine_kernel
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_cross_moment
from dae_theory.types import Denoiser, Scalar

__all__ = [
    "FeatureMoments",
    "Modes",
    "coefficients",
    "descend",
    "feature_denoiser",
    "gaussian_moments",
    "loss",
    "modes",
    "relu_moments",
    "sampled_moments",
    "test_loss",
    "train_loss",
    "variance_of_noise",
]

Activation = Callable[[Array], Array]


class FeatureMoments(NamedTuple):
    """What the loss of a random-feature score depends on; a pytree."""

    second: Float[Array, "p p"]
    """U, the mean of φφᵀ."""
    cross: Float[Array, "p d"]
    """V, the mean of φξᵀ."""
    noise: Float[Array, ""]
    """Mean of ‖ξ‖²/d: 1, or that of the given noise."""


class Modes(NamedTuple):
    """The eigendecomposition U = QΛQᵀ, in which training decouples; a pytree."""

    eigenvalues: Float[Array, " p"]
    """λ_j, ascending."""
    vectors: Float[Array, "p p"]
    """Q, eigenvectors as columns."""
    pull: Float[Array, "p d"]
    """G = QᵀV."""
    noise: Float[Array, ""]
    """As in :class:`FeatureMoments`."""


def variance_of_noise(time: Scalar) -> Float[Array, ""]:
    r""":math:`\Delta = 1 - e^{-2t}`, accurate for small t > 0."""
    check_positive("time", time)
    return -jnp.expm1(-2.0 * jnp.asarray(time, float))


@full_precision
def sampled_moments(
    w: Float[Array, "p d"],
    data: Float[Array, "n d"],
    noise: Float[Array, "m n d"],
    time: Scalar,
    activation: Activation,
) -> FeatureMoments:
    """U and V of a training set and a given set of noises, m for each point, over which training averages.

    Args:
        w: frozen weights.
        data: training points as rows.
        noise: ξ.
        time: t > 0.
        activation: φ, elementwise.
    """
    check_data(data)
    delta = variance_of_noise(time).astype(data.dtype)
    d = data.shape[1]
    shrink = jnp.exp(-jnp.asarray(time, data.dtype))

    def add(total, xi):
        features = activation((shrink * data + jnp.sqrt(delta) * xi) @ w.T / jnp.sqrt(float(d)))
        second, cross = total
        return (second + features.T @ features, cross + features.T @ xi), None

    start = jnp.zeros((len(w), len(w)), data.dtype), jnp.zeros(w.shape, data.dtype)
    (second, cross), _ = jax.lax.scan(add, start, noise)
    count = noise.shape[0] * noise.shape[1]
    return FeatureMoments(second / count, cross / count, jnp.mean(jnp.square(noise)))


@full_precision
def relu_moments(w: Float[Array, "p d"], data: Float[Array, "n d"], time: Scalar) -> FeatureMoments:
    r"""U and V of a training set averaged over all noise, for ReLU features: no sampling (derived here).

    Preactivations are Gaussian with mean :math:`e^{-t} W x/\sqrt d` and covariance :math:`\Delta W W^\top/d`; V follows
    by Stein's lemma, :math:`V = \sqrt\Delta\, \mathrm{diag}(\mathrm{mean}\, P(u > 0))\, W/\sqrt d`.
    """
    check_data(data)
    d = data.shape[1]
    delta = variance_of_noise(time).astype(data.dtype)
    root = jnp.sqrt(jnp.asarray(float(d), data.dtype))
    cov = delta * (w @ w.T) / d
    std = jnp.sqrt(jnp.diagonal(cov))
    means = jnp.exp(-jnp.asarray(time, data.dtype)) * (data @ w.T) / root
    shape = cov.shape
    stds = jnp.broadcast_to(std[:, None], shape), jnp.broadcast_to(std[None, :], shape)

    def of_point(mean):
        pairs = jnp.broadcast_to(mean[:, None], shape), jnp.broadcast_to(mean[None, :], shape)
        return relu_cross_moment(*pairs, *stds, cov)

    second = jnp.mean(jax.lax.map(of_point, means), axis=0)
    on = jnp.mean(normal_cdf(means / std[None, :]), axis=0)
    return FeatureMoments(second, jnp.sqrt(delta) * on[:, None] * w / root, jnp.ones((), data.dtype))


@full_precision
def gaussian_moments(
    w: Float[Array, "p d"], covariance: Float[Array, "d d"], time: Scalar, activation: str
) -> FeatureMoments:
    r"""U and V of the population ``x ~ N(0, Σ)``, for ``"erf"`` or ``"relu"``: arcsine and arc-cosine kernels.

    .. math:: K = W \Sigma_t W^\top/d, \quad \Sigma_t = e^{-2t} \Sigma + \Delta I; \qquad
              E\,\mathrm{erf}\,\mathrm{erf} = \tfrac2\pi \arcsin \frac{2 K_{ij}}{\sqrt{(1 + 2K_{ii})(1 + 2K_{jj})}}

    :cite:`cho09` for ReLU. ``ValueError`` for another activation.
    """
    if activation not in ("erf", "relu"):
        raise ValueError(f"activation must be 'erf' or 'relu', which have closed forms; got {activation!r}.")
    d = w.shape[1]
    delta = variance_of_noise(time).astype(w.dtype)
    noisy = (1.0 - delta) * covariance + delta * jnp.eye(d, dtype=w.dtype)
    kernel = w @ noisy @ w.T / d
    own = jnp.diagonal(kernel)
    root = jnp.sqrt(jnp.asarray(float(d), w.dtype))
    if activation == "erf":
        scale = jnp.sqrt(1.0 + 2.0 * own)
        second = 2.0 / jnp.pi * jnp.arcsin(2.0 * kernel / (scale[:, None] * scale[None, :]))
        slope = 2.0 / jnp.sqrt(jnp.pi) / scale
    else:
        size = jnp.sqrt(own[:, None] * own[None, :])
        second = size * arc_cosine_kernel(kernel / size)
        slope = jnp.full(len(w), 0.5, w.dtype)
    return FeatureMoments(second, jnp.sqrt(delta) * slope[:, None] * w / root, jnp.ones((), w.dtype))


@full_precision
def modes(moments: FeatureMoments) -> Modes:
    """The eigendecomposition of U, from which every curve below follows."""
    eigenvalues, vectors = jnp.linalg.eigh(moments.second)
    return Modes(eigenvalues, vectors, vectors.T @ moments.cross, moments.noise)


@full_precision
def loss(b: Float[Array, "d p"], moments: FeatureMoments, time: Scalar) -> Float[Array, ""]:
    r"""The denoising loss :math:`\frac1d E\|\sqrt\Delta\, s(x_t) + \xi\|^2` of given coefficients: 1 for none.

    For data of covariance I it is :math:`1 - \Delta + \Delta \cdot \frac1d E\|s - s^*\|^2` over the population; of the
    denoiser (:func:`feature_denoiser`) it is the risk over :math:`\sigma^2 d`.
    """
    delta = variance_of_noise(time).astype(b.dtype)
    square = jnp.sum((b @ moments.second) * b)
    cross = jnp.sum(b.T * moments.cross)
    return moments.noise + (delta * square + 2.0 * jnp.sqrt(delta) * cross) / len(b)


def train_loss(found: Modes, training_time: Float[Array, " k"], time: Scalar) -> Float[Array, " k"]:
    r"""The training loss along gradient flow from B = 0, at scaled times τ.

    .. math:: L(\tau) = 1 - \sum_j \frac{g_j}{\lambda_j} \left(1 - e^{-2\kappa\lambda_j\tau}\right), \quad
              g_j = \|G_j\|^2/d

    It falls monotonically, from a slope of :math:`-4\Delta \|V\|_F^2/p` at 0.
    """
    check_nonnegative("training_time", training_time)
    learned = -jnp.expm1(-2.0 * _rates(found, time)[None, :] * training_time[:, None])
    return found.noise - _gained(found) @ learned.T


@full_precision
def test_loss(
    found: Modes, population: FeatureMoments, training_time: Float[Array, " k"], time: Scalar
) -> Float[Array, " k"]:
    """The loss over the population at the coefficients of :func:`coefficients`, at scaled times τ."""
    return jax.lax.map(lambda tau: loss(coefficients(found, tau, time), population, time), training_time)


test_loss.__test__ = False  # type: ignore[attr-defined]


@full_precision
def coefficients(found: Modes, training_time: Scalar, time: Scalar) -> Float[Array, "d p"]:
    """B(τ) of gradient flow from 0."""
    learned = -jnp.expm1(-_rates(found, time) * training_time)
    return _combined(found, learned, time)


@full_precision
def descend(found: Modes, num_steps: int, learning_rate: Scalar, time: Scalar) -> Float[Array, "d p"]:
    r"""B after gradient descent from 0 in closed form: :math:`(1 - h\lambda)^k` in place of the exponential.

    :math:`h = 2\Delta\eta/(d p)` for the coefficients :math:`A = \sqrt p\, B`; stable while
    :math:`h \lambda_{\max} < 2`.
    """
    p, d = found.pull.shape
    h = 2.0 * variance_of_noise(time).astype(found.pull.dtype) * learning_rate / (d * p)
    return _combined(found, 1.0 - (1.0 - h * found.eigenvalues) ** num_steps, time)


def feature_denoiser(w: Float[Array, "p d"], b: Float[Array, "d p"], activation: Activation) -> Denoiser:
    r"""The model as a denoiser of ``y = x + σε``, for the time at which σ is the noise: ``t = ½ ln(1 + σ²)``.

    .. math:: D(y) = y + \frac{\sigma^2}{\sqrt{1 + \sigma^2}}\, B\, \varphi(W y/\sqrt{d (1 + \sigma^2)})
    """
    d = w.shape[1]

    @full_precision
    def denoiser(y: Float[Array, " d"], sigma: Scalar, /) -> Float[Array, " d"]:
        scale = jnp.sqrt(1.0 + jnp.square(jnp.asarray(sigma, y.dtype)))
        return y + sigma * sigma / scale * (b @ activation(w @ y / (jnp.sqrt(float(d)) * scale)))

    return denoiser


def _rates(found: Modes, time: Scalar) -> Float[Array, " p"]:
    p, d = found.pull.shape
    return 2.0 * variance_of_noise(time).astype(found.pull.dtype) * d / p * found.eigenvalues


def _gained(found: Modes) -> Float[Array, " p"]:
    """``g_j/λ_j``, what each direction lowers the loss by in the end; 0 for an eigenvalue of rounding."""
    energy = jnp.sum(jnp.square(found.pull), axis=1) / found.pull.shape[1]
    return _over_eigenvalues(found, energy)


def _over_eigenvalues(found: Modes, values: Float[Array, " p"]) -> Float[Array, " p"]:
    eps = float(jnp.finfo(found.eigenvalues.dtype).eps)
    kept = found.eigenvalues > eps * len(found.eigenvalues) * found.eigenvalues[-1]
    return jnp.where(kept, values / jnp.where(kept, found.eigenvalues, 1.0), 0.0)


def _combined(found: Modes, learned: Float[Array, " p"], time: Scalar) -> Float[Array, "d p"]:
    share = _over_eigenvalues(found, learned)
    delta = variance_of_noise(time).astype(found.pull.dtype)
    return -(found.pull.T * share[None, :]) @ found.vectors.T / jnp.sqrt(delta)
