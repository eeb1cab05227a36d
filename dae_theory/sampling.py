r"""The reverse process: from noise to samples, with any denoiser.

The noise is variance exploding, ``y = x + σ ε``. The probability-flow ODE transports the distribution of y from one
noise level to the next :cite:`karras22`, eq. (1) and (3), with the score from Tweedie's formula,

.. math:: \frac{dy}{d\sigma} = -\sigma \, \nabla \log p_\sigma(y) = \frac{y - D(y, \sigma)}{\sigma}

and so does, with fresh noise, a family of stochastic processes with the same marginals. Functions take one example of
shape (d,) and decreasing noise levels of shape (m,), and integrate with one ``lax.scan``; batch with ``jax.vmap``, or
draw a batch with :func:`sample`. Computation is in the dtype of ``y``.

The module ends with denoisers made of one network per noise level, closed-form or trained: the reverse process of the
paper's Fig. 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dae_theory.checks import check_data, check_integer, check_level, check_nonnegative, check_positive, is_concrete
from dae_theory.model import Dae, denoise
from dae_theory.precision import full_precision
from dae_theory.types import Denoiser, PRNGKey, Scalar

__all__ = [
    "Step",
    "closed_form_denoiser",
    "euler",
    "gaussian_flow",
    "geometric_schedule",
    "heun",
    "karras_schedule",
    "nearest_level_denoiser",
    "probability_flow",
    "sample",
    "stochastic_flow",
]

Step: TypeAlias = Callable[[Denoiser, Array, Scalar, Scalar], Array]
"""One step of the probability flow, ``(denoiser, y, sigma, next_sigma) -> y``; ``next_sigma`` can be 0."""


def karras_schedule(
    sigma_max: Scalar,
    sigma_min: Scalar,
    num_steps: int,
    *,
    rho: Scalar = 7.0,
    to_zero: bool = True,
    dtype: DTypeLike | None = None,
) -> Float[Array, " m"]:
    r"""Noise levels evenly spaced in ``σ^{1/ρ}`` :cite:`karras22`, eq. (5).

    .. math:: \sigma_i = \left(\sigma_{\max}^{1/\rho} + \tfrac{i}{N-1}
              \left(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\right)\right)^\rho, \quad i = 0, \ldots, N-1

    ``num_steps`` steps need m = ``num_steps`` + 1 levels. With ``to_zero`` these are N = ``num_steps`` levels and a
    final 0, so that the last step returns ``D(y, σ_min)``; without it N = ``num_steps`` + 1.

    Args:
        sigma_max: First and largest noise level, in the units of the data.
        sigma_min: Last positive noise level, 0 < σ_min < σ_max.
        num_steps: Number of steps, large enough for N >= 2.
        rho: ρ > 0; 1 is even spacing, and ρ → ∞ gives :func:`geometric_schedule`.
        to_zero: Whether to append the noise level 0.
        dtype: Dtype of the levels, by default the default floating dtype.
    """
    check_positive("rho", rho)
    high, low, ramp = _ends(sigma_max, sigma_min, num_steps, to_zero, dtype)
    root = high ** (1.0 / rho) * (1.0 - ramp) + low ** (1.0 / rho) * ramp
    return _closed(root**rho, high, low, to_zero)


def geometric_schedule(
    sigma_max: Scalar, sigma_min: Scalar, num_steps: int, *, to_zero: bool = True, dtype: DTypeLike | None = None
) -> Float[Array, " m"]:
    r"""Noise levels evenly spaced in ``log σ``: the limit ρ → ∞ of :func:`karras_schedule`, with the same arguments.

    .. math:: \sigma_i = \sigma_{\max} \left(\sigma_{\min}/\sigma_{\max}\right)^{i/(N-1)}
    """
    high, low, ramp = _ends(sigma_max, sigma_min, num_steps, to_zero, dtype)
    return _closed(high ** (1.0 - ramp) * low**ramp, high, low, to_zero)


def euler(denoiser: Denoiser, y: Float[Array, " d"], sigma: Scalar, next_sigma: Scalar) -> Float[Array, " d"]:
    r"""First-order step; in this parameterization also the step of DDIM :cite:`song21ddim`, eq. (12) without noise.

    .. math:: y' = D(y, \sigma) + \frac{\sigma'}{\sigma} \left(y - D(y, \sigma)\right)

    Exact if ``D`` is constant along the step, so it is also the exponential integrator in ``log σ``. At σ' = 0 it
    returns ``D(y, σ)``.
    """
    estimate = denoiser(y, sigma)
    return estimate + (next_sigma / sigma) * (y - estimate)


def heun(denoiser: Denoiser, y: Float[Array, " d"], sigma: Scalar, next_sigma: Scalar) -> Float[Array, " d"]:
    r"""Second-order step, two evaluations :cite:`karras22`, Algorithm 1.

    .. math:: y' = \tilde y + \frac{\sigma' - \sigma}{2} \left(\frac{\tilde y - D(\tilde y, \sigma')}{\sigma'}
              - \frac{y - D(y, \sigma)}{\sigma}\right)

    where ỹ is the step of :func:`euler`, without correction at σ' = 0.
    """
    estimate = denoiser(y, sigma)
    predicted = estimate + (next_sigma / sigma) * (y - estimate)
    # Denoisers are undefined at level 0: there the correction is computed at σ and discarded.
    level = jnp.where(next_sigma > 0, next_sigma, sigma)
    slope_change = (predicted - denoiser(predicted, level)) / level - (y - estimate) / sigma
    return jnp.where(next_sigma > 0, predicted + 0.5 * (next_sigma - sigma) * slope_change, predicted)


def probability_flow(
    denoiser: Denoiser,
    y: Float[Array, " d"],
    sigmas: Float[Array, " m"],
    *,
    step: Step = heun,
    trajectory: bool = False,
) -> Float[Array, "*m d"]:
    """Integrate the probability-flow ODE from ``y`` at noise level ``sigmas[0]`` to ``sigmas[-1]``.

    Returns the last point, shape (d,), or with ``trajectory`` the points at all levels, shape (m, d), ``y`` first.
    Increasing levels run the flow backward, from a sample to its noise. Raises ``ValueError`` unless ``sigmas`` are
    strictly monotone and positive, except that the last can be 0.
    """
    levels = _levels(sigmas, y)

    def advance(y, levels):
        return step(denoiser, y, *levels)

    return _integrate(advance, y, (levels[:-1], levels[1:]), trajectory)


def stochastic_flow(
    key: PRNGKey,
    denoiser: Denoiser,
    y: Float[Array, " d"],
    sigmas: Float[Array, " m"],
    *,
    step: Step = heun,
    churn: Scalar | Float[Array, " m-1"] = 0.0,
    eta: Scalar | Float[Array, " m-1"] = 0.0,
    trajectory: bool = False,
) -> Float[Array, "*m d"]:
    r"""The reverse process with fresh noise, added before a step of the flow (churn), after it (ancestral), or both.

    .. math:: \hat y &= y + \sqrt{\hat\sigma^2 - \sigma^2} \, \epsilon_1, \quad \hat\sigma = (1 + \gamma) \sigma \\
              y' &= \mathrm{step}(\hat y; \hat\sigma \to \sigma_\downarrow) + \sigma_\uparrow \epsilon_2, \quad
              \sigma_\uparrow = \eta \, \sigma' \sqrt{1 - \sigma'^2/\hat\sigma^2}, \quad
              \sigma_\downarrow^2 = \sigma'^2 - \sigma_\uparrow^2

    Noise before the step is Algorithm 2 of :cite:`karras22` (there ``γ = min(S_churn/N, √2 − 1)`` inside a window of
    levels, 0 outside). Noise after it gives, with :func:`euler`, DDIM :cite:`song21ddim`, eq. (16), for η = 0 and
    ancestral sampling :cite:`song21sde`, appendix F, for η = 1. If the step is exact, the marginal distribution at
    every level is correct for all γ and η. With both 0 this is :func:`probability_flow`, and no noise is drawn.

    Raises ``ValueError`` for arguments outside the ranges below.

    Args:
        key: One typed PRNG key; step i uses ``fold_in(key, i)``.
        denoiser: Any :class:`dae_theory.types.Denoiser`.
        y: Start at noise level ``sigmas[0]``, shape (d,).
        sigmas: Strictly decreasing noise levels, shape (m,), all positive, except that the last can be 0.
        step: Step of the flow, for example :func:`heun` or :func:`euler`.
        churn: γ >= 0, one number or one per step.
        eta: η in [0, 1], one number or one per step.
        trajectory: Whether to return the points at all levels instead of the last.
    """
    levels = _levels(sigmas, y, decreasing=True)
    check_nonnegative("churn", churn)
    check_nonnegative("eta", eta)
    if is_concrete(eta) and np.any(np.asarray(eta) > 1):
        raise ValueError(f"eta must lie in [0, 1], got {eta}; use churn for more noise.")
    steps = levels[1:].shape
    gammas = jnp.broadcast_to(jnp.asarray(churn, y.dtype), steps)
    etas = jnp.broadcast_to(jnp.asarray(eta, y.dtype), steps)
    churns, ascends = _is_added(churn), _is_added(eta)

    def advance(y, settings):
        i, sigma, next_sigma, gamma, eta = settings
        key_before, key_after = jax.random.split(jax.random.fold_in(key, i))
        if churns:
            y = y + sigma * jnp.sqrt(gamma * (2.0 + gamma)) * jax.random.normal(key_before, y.shape, y.dtype)
            sigma = (1.0 + gamma) * sigma
        if not ascends:
            return step(denoiser, y, sigma, next_sigma)
        drop = 1.0 - jnp.square(next_sigma / sigma)
        y = step(denoiser, y, sigma, next_sigma * jnp.sqrt(1.0 - jnp.square(eta) * drop))
        return y + eta * next_sigma * jnp.sqrt(drop) * jax.random.normal(key_after, y.shape, y.dtype)

    return _integrate(advance, y, (jnp.arange(steps[0]), levels[:-1], levels[1:], gammas, etas), trajectory)


def sample(
    key: PRNGKey,
    denoiser: Denoiser,
    sigmas: Float[Array, " m"],
    num_samples: int,
    dim: int,
    *,
    step: Step = heun,
    churn: Scalar | Float[Array, " m-1"] = 0.0,
    eta: Scalar | Float[Array, " m-1"] = 0.0,
    batch_size: int | None = None,
) -> Float[Array, "num_samples dim"]:
    """Draw samples as rows by :func:`stochastic_flow` from pure noise ``N(0, σ_0² I)``, in the dtype of ``sigmas``.

    Starting from pure noise ignores the mean and covariance of the data, a bias of relative order 1/σ_0. Raises what
    :func:`stochastic_flow` raises, and ``ValueError`` for sizes below 1.

    Args:
        key: One typed PRNG key; row i uses ``fold_in(key, i)``, so more samples extend fewer.
        denoiser: Any :class:`dae_theory.types.Denoiser`.
        sigmas: Strictly decreasing noise levels, shape (m,), all positive, except that the last can be 0.
        num_samples: Number of rows, at least 1.
        dim: Dimension d of a sample, at least 1.
        step: Step of the flow, for example :func:`heun` or :func:`euler`.
        churn: γ >= 0, one number or one per step.
        eta: η in [0, 1], one number or one per step.
        batch_size: Rows computed at a time, to bound memory; by default all of them.
    """
    check_integer("num_samples", num_samples, minimum=1)
    check_integer("dim", dim, minimum=1)

    def draw(i):
        start_key, flow_key = jax.random.split(jax.random.fold_in(key, i))
        start = sigmas[0] * jax.random.normal(start_key, (dim,), sigmas.dtype)
        return stochastic_flow(flow_key, denoiser, start, sigmas, step=step, churn=churn, eta=eta)

    rows = jnp.arange(num_samples)
    if batch_size is None:
        return jax.vmap(draw)(rows)
    return jax.lax.map(draw, rows, batch_size=check_integer("batch_size", batch_size, minimum=1))


@full_precision
def gaussian_flow(
    y: Float[Array, " d"],
    sigma: Scalar,
    next_sigma: Scalar,
    mean: Float[Array, " d"],
    covariance: Float[Array, "d d"],
) -> Float[Array, " d"]:
    r"""Exact probability flow from level σ > 0 to σ' >= 0 for ``x ~ N(μ, Σ)``, ``Σ u_j = s_j u_j``; derived here.

    .. math:: u_j^\top (y' - \mu) = \sqrt{\frac{s_j + \sigma'^2}{s_j + \sigma^2}} \; u_j^\top (y - \mu)

    since ``d(log u_jᵀ(y − μ))/dσ = σ/(s_j + σ²)``. A reference to test solvers against.
    """
    check_level("sigma", sigma, zero=False)
    check_nonnegative("next_sigma", next_sigma)
    s, vectors = jnp.linalg.eigh(covariance)
    deviation = jnp.sqrt(jnp.maximum(s, 0.0))
    scale = jnp.hypot(deviation, next_sigma) / jnp.hypot(deviation, sigma)
    return mean + vectors @ (scale * ((y - mean) @ vectors))


def closed_form_denoiser(minimizer: Callable[[Scalar], Dae]) -> Denoiser:
    r"""The denoiser ``D(y, σ) = f_σ(y)`` with its own network ``minimizer(σ)`` at every noise level.

    ``minimizer`` is, for example, ``functools.partial(generalizing_minimizer, mixture, penalty=..., ranks=...)``.

    What it samples (derived here): a network without biases is positively homogeneous in y, and so is the flow, which
    therefore cannot determine a scale. As long as the units of one block are on and all others off, directions
    decouple; with u_j, s_j the eigenpairs of the block's second moment and ℓ = λ/ρ,

    .. math:: u_j^\top y(\sigma) \propto \varphi_j(\sigma) = \sigma^{\ell/s_j} (s_j + \sigma^2)^{(1 - \ell/s_j)/2},
              \qquad y_\perp(\sigma) \propto \sigma

    At λ = 0 this is :func:`gaussian_flow` for ``N(0, S)``, ``S = μμᵀ + Σ``. A generalizing block transports noisy
    samples of its mode to samples with the correct second moment S, and mean ``S^{1/2}(S + σ_0² I)^{-1/2} μ``. A
    memorizing block returns ``x_i (x_iᵀ y(σ_0)/‖x_i‖²) (1 + σ_0²/‖x_i‖²)^{-1/2}``, a multiple of its training row. With
    λ > 0 every direction keeps shrinking like ``σ^{ℓ/s_j}`` as σ → 0.
    """
    return functools.partial(_denoise_by_minimizer, minimizer)


def _denoise_by_minimizer(
    minimizer: Callable[[Scalar], Dae], y: Float[Array, " d"], sigma: Scalar, /
) -> Float[Array, " d"]:
    return denoise(minimizer(sigma), y)


def nearest_level_denoiser(daes: Dae, levels: Float[Array, " L"]) -> Denoiser:
    r"""The denoiser that applies, out of one network per noise level, the one whose level is nearest in ``log σ``.

    ``daes`` holds weights of shape (L, d, p), ``levels`` > 0 their noise levels in any order. Sampling at exactly these
    levels is the procedure of the paper's Fig. 2. Raises ``ValueError`` unless there is one positive level per network.
    """
    shapes = jnp.shape(daes.w1), jnp.shape(daes.w2)
    if any(len(shape) != 3 or shape[0] != levels.size for shape in shapes) or levels.ndim != 1:
        raise ValueError(
            "daes must stack one network per level, weights of shape (L, d, p) for levels of shape (L,); "
            f"got {shapes[0]} and {shapes[1]} for {levels.shape}."
        )
    check_positive("levels", levels)
    return functools.partial(_denoise_by_nearest, daes, levels)


def _denoise_by_nearest(
    daes: Dae, levels: Float[Array, " L"], y: Float[Array, " d"], sigma: Scalar, /
) -> Float[Array, " d"]:
    nearest = jnp.argmin(jnp.abs(jnp.log(levels / sigma)))
    return denoise(jax.tree.map(lambda part: part[nearest], daes), y)


def _ends(
    sigma_max: Scalar, sigma_min: Scalar, num_steps: int, to_zero: bool, dtype: DTypeLike | None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " N"]]:
    check_positive("sigma_max", sigma_max)
    check_positive("sigma_min", sigma_min)
    if is_concrete(sigma_max, sigma_min) and not sigma_max > sigma_min:
        raise ValueError(f"sigma_max must exceed sigma_min, got {sigma_max} and {sigma_min}.")
    num_levels = check_integer("num_steps", num_steps, minimum=2 if to_zero else 1) + (not to_zero)
    ramp = jnp.linspace(0.0, 1.0, num_levels, dtype=dtype)
    return jnp.asarray(sigma_max, ramp.dtype), jnp.asarray(sigma_min, ramp.dtype), ramp


def _closed(
    sigmas: Float[Array, " N"], high: Float[Array, ""], low: Float[Array, ""], to_zero: bool
) -> Float[Array, " m"]:
    # Set exactly: powers round, and networks trained at the ends would miss them by one unit in the last place.
    sigmas = sigmas.at[0].set(high).at[-1].set(low)
    return jnp.pad(sigmas, (0, int(to_zero)))


def _levels(sigmas: Float[Array, " m"], y: Float[Array, " d"], *, decreasing: bool = False) -> Float[Array, " m"]:
    check_data(y[None, :], name="y")
    if sigmas.ndim != 1 or sigmas.size < 2:
        raise ValueError(f"sigmas must be a vector of at least two noise levels, got shape {sigmas.shape}.")
    check_nonnegative("sigmas", sigmas)
    if is_concrete(sigmas):
        slopes = np.diff(np.asarray(sigmas))
        if not (np.all(slopes < 0) or (np.all(slopes > 0) and not decreasing)):
            raise ValueError(f"sigmas must be strictly {'decreasing' if decreasing else 'monotone'}.")
        if not np.all(np.asarray(sigmas)[:-1] > 0):
            raise ValueError("sigmas must be positive except for the last: no step can start at noise level 0.")
    return sigmas.astype(y.dtype)


def _is_added(amount: object) -> bool:
    return not (isinstance(amount, float | int) and amount == 0)


def _integrate(
    advance: Callable[[Array, tuple[Array, ...]], Array],
    y: Float[Array, " d"],
    steps: tuple[Array, ...],
    trajectory: bool,
) -> Float[Array, "*m d"]:
    def body(y, settings):
        y = advance(y, settings)
        return y, y if trajectory else None

    last, path = jax.lax.scan(body, y, steps)
    return last if path is None else jnp.concatenate([y[None, :], path])
