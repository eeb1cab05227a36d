r"""The population: exact risk of a network over a Gaussian mixture, and the generalization gap to it.

For ``x ~ Σ_k ρ_k N(μ_k, Σ_k)`` and ``y = x + σε``, the preactivations ``u = W₁ᵀy`` of mode k are Gaussian with
covariance ``W₁ᵀ(Σ_k + σ²I)W₁``, and jointly Gaussian with x. By Stein's lemma ``E[(x − μ) h_j] = Σ_k w_j P(u_j > 0)``,
so the population risk has a closed form like the empirical one (derived here), with one term per mode instead of one
per sample.

Networks fitted to n samples approach the population's minimizer :cite:`zhang26`, Corollary 3.3; :func:`learning_curve`
measures how fast, and :func:`fit_rate` fits the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dae_theory.bivariate_normal import normal_cdf
from dae_theory.checks import check_data, check_integer, check_level, is_concrete
from dae_theory.jackknife import jackknife_error, jackknife_reach
from dae_theory.minimizers import block_minimizer, generalizing_minimizer
from dae_theory.mixture import GaussianMixture, check_mixture, covariance_roots
from dae_theory.model import Dae, decode, preactivations
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import relu_covariance, relu_mean, standardize
from dae_theory.risk import exact_risk
from dae_theory.spectra import Ranks
from dae_theory.types import PRNGKey, Scalar

__all__ = ["LearningCurve", "Rate", "fit_rate", "learning_curve", "population_objective", "population_risk"]


class LearningCurve(NamedTuple):
    """Exact risks of the block minimizers of R independent training sets at each of S sizes; a pytree."""

    sizes: Int[np.ndarray, " S"]
    """Training-set sizes n."""
    train_risk: Float[Array, "R S"]
    """Risk on the training rows, averaged over the noise."""
    population_risk: Float[Array, "R S"]
    """Risk of the same networks over the mixture."""
    best_risk: Float[Array, ""]
    """Population risk of the population's minimizer, the limit n → ∞."""
    map_distance: Float[Array, "R S"]
    """``‖W₂W₁ᵀ − (W₂W₁ᵀ)_∞‖_F``, the distance to that minimizer."""

    @property
    def gap(self) -> Float[Array, "R S"]:
        """Generalization gap, population minus training risk: its mean is of order 1/n, its spread ``n^{-1/2}``."""
        return self.population_risk - self.train_risk

    @property
    def excess(self) -> Float[Array, "R S"]:
        """Population risk in excess of that of the population's minimizer; of order 1/n near a smooth minimum."""
        return self.population_risk - self.best_risk


class Rate(NamedTuple):
    """A fitted power law ``C n^slope``, with the uncertainty of its exponent."""

    slope: float
    """The exponent."""
    standard_error: float
    """Standard error of ``slope`` over repetitions, by the jackknife."""
    interval: tuple[float, float]
    """95 % interval of ``slope``, with Student's t of R - 1 degrees of freedom."""
    intercept: float
    """``log C``."""
    chi_sq: float
    """Squared deviations from the best law in units of the points' standard errors: about S − 2 if the law holds."""


@full_precision
def population_risk(dae: Dae, mixture: GaussianMixture, sigma: Scalar) -> Float[Array, ""]:
    r"""Risk over noise and data, ``E‖f(x + σε) − x‖²``, in closed form (derived here).

    .. math:: \sum_k \rho_k \Big[ \|W_2 E h + b_2 - \mu_k\|^2 + \mathrm{tr}(W_2^\top W_2\, \mathrm{Cov}\, h)
       - 2 \sum_j \Phi(a_j)\, w_{2j}^\top \Sigma_k w_{1j} + \mathrm{tr}\, \Sigma_k \Big]

    with moments of ``h`` in mode k. Jittable and differentiable; the cost is K evaluations of p² pairs. Raises
    ``ValueError`` for a negative ``sigma``, an invalid mixture, or dimensions that disagree.
    """
    check_level("sigma", sigma)
    check_mixture(mixture)
    if dae.w1.shape[0] != mixture.means.shape[1] or dae.w1.shape != dae.w2.shape:
        raise ValueError(
            f"weights of shape {dae.w1.shape} and {dae.w2.shape} do not fit a mixture in dimension "
            f"{mixture.means.shape[1]}."
        )
    sigma = jnp.asarray(sigma, dae.w1.dtype)
    identity = jnp.eye(dae.w1.shape[0], dtype=dae.w1.dtype)

    def risk_in_mode(mode):
        mu, mode_covariance = mode
        mean, cov = preactivations(dae, mu), dae.w1.T @ (mode_covariance + sigma * sigma * identity) @ dae.w1
        var = jnp.maximum(jnp.diagonal(cov), 0.0)
        std = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1.0)), 0.0)
        covariance = jax.vmap(jax.vmap(relu_covariance, (None, 0, None, 0, 0)), (0, None, 0, None, 0))(
            mean, mean, std, std, cov
        )
        bias = decode(dae, relu_mean(mean, std)) - mu
        cross = normal_cdf(standardize(mean, std)) * jnp.sum(dae.w2 * (mode_covariance @ dae.w1), axis=0)
        variance = jnp.sum((dae.w2.T @ dae.w2) * covariance) - 2.0 * jnp.sum(cross) + jnp.trace(mode_covariance)
        return bias @ bias + variance

    return mixture.weights @ jax.lax.map(risk_in_mode, (mixture.means, mixture.covariances))


def population_objective(dae: Dae, mixture: GaussianMixture, sigma: Scalar, penalty: Scalar) -> Float[Array, ""]:
    """:func:`population_risk` plus ``λ(‖W₁‖² + ‖W₂‖²)``: the training objective for infinitely many samples."""
    check_level("penalty", penalty)
    return population_risk(dae, mixture, sigma) + penalty * (jnp.sum(jnp.square(dae.w1)) + jnp.sum(jnp.square(dae.w2)))


def learning_curve(
    key: PRNGKey,
    mixture: GaussianMixture,
    sizes: Sequence[int] | Int[np.ndarray, " S"],
    sigma: Scalar,
    penalty: Scalar,
    ranks: Ranks,
    *,
    num_repeats: int = 32,
) -> LearningCurve:
    """Compare block minimizers of growing training sets with the population's minimizer, all of the same ranks.

    Training sets are stratified: mode k has ``ρ_k n`` rows, rounded so that they sum to n. Training sets of different
    sizes are independent, as :func:`fit_rate` requires: row i of mode k in repetition r uses the key folded with n, r,
    k, i. Raises ``ValueError`` for sizes that leave a mode with fewer rows than units, and for what the minimizers
    reject.

    Args:
        key: One typed PRNG key.
        mixture: The population, with concrete weights.
        sizes: Training-set sizes n >= 1; each compiles its own program.
        sigma: Noise level σ >= 0, in the units of the data.
        penalty: λ >= 0.
        ranks: Units p_k <= d of each mode, or one number for all.
        num_repeats: Number R >= 2 of training sets per size.
    """
    check_integer("num_repeats", num_repeats, minimum=2)
    check_mixture(mixture)
    if not is_concrete(mixture.weights):
        raise ValueError("mixture.weights must be concrete, because the number of rows of each mode is a shape.")
    counts = [_stratified(np.asarray(mixture.weights), check_integer("sizes", n, minimum=1)) for n in np.asarray(sizes)]
    best = generalizing_minimizer(mixture, sigma, penalty, ranks)
    roots = covariance_roots(mixture)

    def rows(key, mode, count):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, mode), i))(jnp.arange(count))
        dim = mixture.means.shape[1]
        eps = jax.vmap(lambda k: jax.random.normal(k, (dim,), mixture.means.dtype))(keys)
        return mixture.means[mode][None, :] + eps @ roots[mode].T

    def at_size(count):
        labels = np.repeat(np.arange(count.size), count)

        def repetition(r):
            repeat = jax.random.fold_in(jax.random.fold_in(key, int(count.sum())), r)
            data = jnp.concatenate([rows(repeat, k, int(m)) for k, m in enumerate(count) if m])
            dae = block_minimizer(data, labels, sigma, penalty, ranks)
            distance = jnp.linalg.norm(dae.w2 @ dae.w1.T - best.w2 @ best.w1.T)
            return exact_risk(dae, data, sigma), population_risk(dae, mixture, sigma), distance

        return jax.jit(lambda r: jax.lax.map(repetition, r))(jnp.arange(num_repeats))

    train, population, distance = (jnp.stack(column, axis=1) for column in zip(*map(at_size, counts), strict=True))
    return LearningCurve(np.asarray(sizes, int), train, population, population_risk(best, mixture, sigma), distance)


def fit_rate(sizes: Int[np.ndarray, " S"] | Sequence[int], values: Float[Array, "R S"]) -> Rate:
    r"""Exponent of ``√(E v²) ∝ n^slope`` from R repetitions at S sizes.

    The least-squares line of ``½ log mean(v²)`` on ``log n``, in which every size weighs alike: weights from the spread
    over few repetitions would be noisy themselves. Its uncertainty is the jackknife's :cite:`tukey58`, from the lines
    without one repetition each, and covers what differs between repetitions. The columns must be independent of one
    another. Raises ``ValueError`` for fewer than two sizes or repetitions, for values that do not vary, and for
    non-finite ones.
    """
    check_data(jnp.asarray(values))
    squares = np.square(np.asarray(values, np.float64))
    repeats, count = squares.shape
    n = np.asarray(sizes, np.float64)
    if n.shape != (count,) or count < 2 or repeats < 2:
        raise ValueError(
            f"values must have shape (R, S) and sizes (S,) with R, S >= 2; got {squares.shape} and {n.shape}."
        )
    mean = squares.mean(axis=0)
    error = squares.std(axis=0, ddof=1) / (2 * math.sqrt(repeats) * mean)
    if not np.all(error > 0):
        raise ValueError("values do not vary over repetitions; the interval needs their spread.")
    design = np.stack([np.log(n), np.ones_like(n)], axis=1)
    target = 0.5 * np.log(mean)
    line = np.linalg.pinv(design)
    slope, intercept = line @ target
    without = 0.5 * np.log((squares.sum(axis=0)[None, :] - squares) / (repeats - 1)) @ line[0]
    reach = jackknife_reach(without, 0.95)
    # The best law in units of the standard errors of the points.
    weighted, scaled = design / error[:, None], target / error
    chi_sq = float(np.linalg.lstsq(weighted, scaled)[1].sum())
    return Rate(
        float(slope), jackknife_error(without), (float(slope) - reach, float(slope) + reach), float(intercept), chi_sq
    )


def _stratified(weights: np.ndarray, n: int) -> np.ndarray:
    """Whole numbers near ``ρ_k n`` that sum to n, by rounding up the largest remainders."""
    shares = weights / weights.sum() * n
    counts = np.floor(shares).astype(int)
    up = np.argsort(-(shares - counts), kind="stable")[: n - counts.sum()]
    counts[up] += 1
    return counts
