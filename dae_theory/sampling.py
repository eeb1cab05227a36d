r"""The reverse process: from noise to samples, with any denoiser.

Noise is variance exploding, ``y = x + σ ε``. The law of y at each level is carried by the probability-flow ODE
:cite:`karras22`, eq. (1) and (3), with Tweedie's score,

.. math:: \frac{dy}{d\sigma} = -\sigma \, \nabla \log p_\sigma(y) = \frac{y - D(y, \sigma)}{\sigma}

and, with fresh noise, by a family of stochastic processes of the same marginals. Functions take one example of shape
(d,) and a decreasing row of noise levels of shape (m,), and integrate by one ``lax.scan``; batch with ``jax.vmap``, or
draw a batch with :func:`sample`. The work is done in the dtype of ``y``.

Denoisers of one network a level, closed forms or trained, close the module: the reverse process of the paper's Fig. 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive, is_concrete
from dae_theory.model import ReluDae, denoise
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
"""One step of the probability flow, ``(denoiser, y, sigma, next_sigma) -> y``; ``next_sigma`` may be 0."""


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

    ``num_steps`` steps need m = ``num_steps`` + 1 levels: with ``to_zero`` N = ``num_steps`` levels and then 0, so that
    the last step returns ``D(y, σ_min)``; without, N = ``num_steps`` + 1. ρ > 0: 1 is even spacing, a large ρ nears
    :func:`geometric_schedule`. ``ValueError`` unless σ_max > σ_min > 0 and ``num_steps`` is enough for N >= 2.
    """
    check_positive("rho", rho)
    high, low, ramp = _ends(sigma_max, sigma_min, num_steps, to_zero, dtype)
    root = high ** (1.0 / rho) * (1.0 - ramp) + low ** (1.0 / rho) * ramp
    return _closed(root**rho, high, low, to_zero)


def geometric_schedule(
    sigma_max: Scalar, sigma_min: Scalar, num_steps: int, *, to_zero: bool = True, dtype: DTypeLike | None = None
) -> Float[Array, " m"]:
    r"""Noise levels evenly spaced in ``log σ``: the limit ρ → ∞ of :func:`karras_schedule`, whose arguments it shares.

    .. math:: \sigma_i = \sigma_{\max} \left(\sigma_{\min}/\sigma_{\max}\right)^{i/(N-1)}
    """
    high, low, ramp = _ends(sigma_max, sigma_min, num_steps, to_zero, dtype)
    return _closed(high ** (1.0 - ramp) * low**ramp, high, low, to_zero)


def euler(denoiser: Denoiser, y: Float[Array, " d"], sigma: Scalar, next_sigma: Scalar) -> Float[Array, " d"]:
    r"""First-order step; in this parametrization it is also DDIM's :cite:`song21ddim`, eq. (12) without noise.

    .. math:: y' = D(y, \sigma) + \frac{\sigma'}{\sigma} \left(y - D(y, \sigma)\right)

    Exact while ``D`` is constant along the step: it is the exponential integrator in ``log σ`` too. At σ' = 0 it
    returns ``D(y, σ)``.
    """
    estimate = denoiser(y, sigma)
    return estimate + (next_sigma / sigma) * (y - estimate)


def heun(denoiser: Denoiser, y: Float[Array, " d"], sigma: Scalar, next_sigma: Scalar) -> Float[Array, " d"]:
    r"""Second-order step, two evaluations :cite:`karras22`, Algorithm 1.

    .. math:: y' = \tilde y + \frac{\sigma' - \sigma}{2} \left(\frac{\tilde y - D(\tilde y, \sigma')}{\sigma'}
              - \frac{y - D(y, \sigma)}{\sigma}\right)

    with ỹ the step of :func:`euler`, which stands uncorrected at σ' = 0.
    """
    estimate = denoiser(y, sigma)
    ahead = estimate + (next_sigma / sigma) * (y - estimate)
    # No denoiser has a level 0: there the correction is computed at σ and discarded.
    level = jnp.where(next_sigma > 0, next_sigma, sigma)
    bend = (ahead - denoiser(ahead, level)) / level - (y - estimate) / sigma
    return jnp.where(next_sigma > 0, ahead + 0.5 * (next_sigma - sigma) * bend, ahead)


def probability_flow(
    denoiser: Denoiser,
    y: Float[Array, " d"],
    sigmas: Float[Array, " m"],
    *,
    step: Step = heun,
    trajectory: bool = False,
) -> Float[Array, "*m d"]:
    """Carry ``y`` of noise level ``sigmas[0]`` to ``sigmas[-1]`` along the probability-flow ODE.

    Returns the last point, shape (d,), or with ``trajectory`` the point at every level, shape (m, d), ``y`` first.
    Rising levels run the flow backwards, from a sample to its noise. ``ValueError`` unless ``sigmas`` are strictly
    monotone, nonnegative, and positive but for the last.
    """
    levels = _levels(sigmas, y)

    def advance(y: Float[Array, " d"], now: tuple[Array, ...]) -> Float[Array, " d"]:
        return step(denoiser, y, *now)

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
    r"""The reverse process with fresh noise: both known ways of adding it, around any step of the flow.

    .. math:: \hat y &= y + \sqrt{\hat\sigma^2 - \sigma^2} \, \epsilon_1, \quad \hat\sigma = (1 + \gamma) \sigma \\
              y' &= \mathrm{step}(\hat y; \hat\sigma \to \sigma_\downarrow) + \sigma_\uparrow \epsilon_2, \quad
              \sigma_\uparrow = \eta \, \sigma' \sqrt{1 - \sigma'^2/\hat\sigma^2}, \quad
              \sigma_\downarrow^2 = \sigma'^2 - \sigma_\uparrow^2

    ``churn`` γ >= 0 adds noise before the step :cite:`karras22`, Algorithm 2 (there ``γ = min(S_churn/N, √2 − 1)``
    inside a window of levels, 0 outside), ``eta`` in [0, 1] after it: with :func:`euler`, 0 is DDIM
    :cite:`song21ddim`, eq. (16), and 1 ancestral sampling :cite:`song21sde`, appendix F. Each is one number or one a
    step. An exact step keeps the marginal law at every level, whatever γ and η; with both 0 this is
    :func:`probability_flow`, and no noise is drawn.

    Step i draws from ``fold_in(key, i)``. ``ValueError`` unless ``sigmas`` decrease strictly and only the last may be
    0, and for γ < 0 or η outside [0, 1].
    """
    levels = _levels(sigmas, y, falling=True)
    check_nonnegative("churn", churn)
    check_nonnegative("eta", eta)
    if is_concrete(eta) and np.any(np.asarray(eta) > 1):
        raise ValueError(f"eta must lie in [0, 1], got {eta}; use churn for more noise.")
    steps = levels[1:].shape
    gammas = jnp.broadcast_to(jnp.asarray(churn, y.dtype), steps)
    etas = jnp.broadcast_to(jnp.asarray(eta, y.dtype), steps)
    churns, ascends = _is_added(churn), _is_added(eta)

    def advance(y: Float[Array, " d"], now: tuple[Array, ...]) -> Float[Array, " d"]:
        i, sigma, next_sigma, gamma, eta = now
        key_before, key_after = jax.random.split(jax.random.fold_in(key, i))
        if churns:
            y = y + sigma * jnp.sqrt(gamma * (2.0 + gamma)) * jax.random.normal(key_before, y.shape, y.dtype)
            sigma = (1.0 + gamma) * sigma
        if not ascends:
            return step(denoiser, y, sigma, next_sigma)
        kept = 1.0 - jnp.square(next_sigma / sigma)
        y = step(denoiser, y, sigma, next_sigma * jnp.sqrt(1.0 - jnp.square(eta) * kept))
        return y + eta * next_sigma * jnp.sqrt(kept) * jax.random.normal(key_after, y.shape, y.dtype)

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
    """Draw ``num_samples`` rows of dimension ``dim`` by :func:`stochastic_flow` from pure noise ``N(0, σ_0² I)``.

    The start forgets the data's mean and covariance, a bias of relative order 1/σ_0. Row i draws from
    ``fold_in(key, i)``, so that a larger number extends a smaller one. Rows run together, or ``batch_size`` at a time
    to bound memory. In the dtype of ``sigmas``. ``ValueError`` as in :func:`stochastic_flow`, and for numbers below 1.
    """
    check_integer("num_samples", num_samples, minimum=1)
    check_integer("dim", dim, minimum=1)

    def draw(i: Int[Array, ""]) -> Float[Array, " dim"]:
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
    r"""Exact probability flow from level σ > 0 to σ' >= 0 where ``x ~ N(μ, Σ)``, ``Σ u_j = s_j u_j``; derived here.

    .. math:: u_j^\top (y' - \mu) = \sqrt{\frac{s_j + \sigma'^2}{s_j + \sigma^2}} \; u_j^\top (y - \mu)

    since ``d(log u_jᵀ(y − μ))/dσ = σ/(s_j + σ²)``. The yardstick of every solver.
    """
    check_positive("sigma", sigma)
    check_nonnegative("next_sigma", next_sigma)
    s, vectors = jnp.linalg.eigh(covariance)
    deviation = jnp.sqrt(jnp.maximum(s, 0.0))
    scale = jnp.hypot(deviation, next_sigma) / jnp.hypot(deviation, sigma)
    return mean + vectors @ (scale * ((y - mean) @ vectors))


def closed_form_denoiser(minimizer: Callable[[Scalar], ReluDae]) -> Denoiser:
    r"""A network for every noise level, ``D(y, σ) = f_σ(y)``, from ``minimizer(σ)``, for example
    ``functools.partial(generalizing_minimizer, mixture, penalty=..., ranks=...)``.

    What it samples (derived here). A network without biases is positively homogeneous in y, so the flow is too: it
    cannot fix a scale. While the units of one block are on and the others off, with u_j, s_j the eigenpairs of the
    block's second moment and ℓ = λ/ρ, directions decouple:

    .. math:: u_j^\top y(\sigma) \propto \varphi_j(\sigma) = \sigma^{\ell/s_j} (s_j + \sigma^2)^{(1 - \ell/s_j)/2},
              \qquad y_\perp(\sigma) \propto \sigma

    At λ = 0 this is :func:`gaussian_flow` for ``N(0, S)``, ``S = μμᵀ + Σ``. A generalizing block carries noisy samples
    of its mode to samples of the right second moment S, with mean ``S^{1/2}(S + σ_0² I)^{-1/2} μ``; a memorizing block
    returns ``x_i (x_iᵀ y(σ_0)/‖x_i‖²) (1 + σ_0²/‖x_i‖²)^{-1/2}``, a multiple of its training row. With λ > 0 every
    direction shrinks on, by ``σ^{ℓ/s_j}``, as σ → 0.
    """

    def denoiser(y: Float[Array, " d"], sigma: Scalar, /) -> Float[Array, " d"]:
        return denoise(minimizer(sigma), y)

    return denoiser


def nearest_level_denoiser(daes: ReluDae, levels: Float[Array, " L"]) -> Denoiser:
    r"""A stack of networks, one a noise level, each serving the levels nearest to its own in ``log σ``.

    ``daes`` holds weights of shape (L, d, p), ``levels`` > 0 their noise levels in any order. Sampled at exactly these
    levels it is the paper's Fig. 2. ``ValueError`` unless there is one positive level a network.
    """
    shapes = jnp.shape(daes.w1), jnp.shape(daes.w2)
    if any(len(shape) != 3 or shape[0] != levels.size for shape in shapes) or levels.ndim != 1:
        raise ValueError(
            "daes must stack one network a level, weights of shape (L, d, p) for levels of shape (L,); "
            f"got {shapes[0]} and {shapes[1]} for {levels.shape}."
        )
    check_positive("levels", levels)

    def denoiser(y: Float[Array, " d"], sigma: Scalar, /) -> Float[Array, " d"]:
        nearest = jnp.argmin(jnp.abs(jnp.log(levels / sigma)))
        return denoise(ReluDae(daes.w1[nearest], daes.w2[nearest]), y)

    return denoiser


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
    # Powers round: networks trained at the ends would otherwise miss them by one unit in the last place.
    sigmas = sigmas.at[0].set(high).at[-1].set(low)
    return jnp.pad(sigmas, (0, int(to_zero)))


def _levels(sigmas: Float[Array, " m"], y: Float[Array, " d"], *, falling: bool = False) -> Float[Array, " m"]:
    check_data(y[None, :], name="y")
    if sigmas.ndim != 1 or sigmas.size < 2:
        raise ValueError(f"sigmas must be a row of at least two noise levels, got shape {sigmas.shape}.")
    check_nonnegative("sigmas", sigmas)
    if is_concrete(sigmas):
        slopes = np.diff(np.asarray(sigmas))
        if not (np.all(slopes < 0) or (np.all(slopes > 0) and not falling)):
            raise ValueError(f"sigmas must {'decrease' if falling else 'be'} strictly{'' if falling else ' monotone'}.")
        if not np.all(np.asarray(sigmas)[:-1] > 0):
            raise ValueError("sigmas must be positive but for the last: no denoiser has a level 0 to start from.")
    return sigmas.astype(y.dtype)


def _is_added(amount: object) -> bool:
    return not (isinstance(amount, float | int) and amount == 0)


def _integrate(
    advance: Callable[[Array, tuple[Array, ...]], Array],
    y: Float[Array, " d"],
    steps: tuple[Array, ...],
    trajectory: bool,
) -> Float[Array, "*m d"]:
    def body(y: Float[Array, " d"], now: tuple[Array, ...]) -> tuple[Float[Array, " d"], Float[Array, " d"] | None]:
        y = advance(y, now)
        return y, y if trajectory else None

    last, path = jax.lax.scan(body, y, steps)
    return last if path is None else jnp.concatenate([y[None, :], path])
