r"""The spectrum that sets the training times of a random-feature score :cite:`bonnaire25`.

For d, n and p large together, ψ_n = n/d and ψ_p = p/d, the matrix U of :mod:`dae_theory.random_features` has d
eigenvalues of order ψ_p, which belong to the population, n - d in a bulk that belongs to the training points, and the
rest near s². An eigenvalue λ is learned at the scaled time :math:`\tau = \psi_p/(\Delta\lambda)`: the population at
about 1/Δ, training points from :func:`memorization_time` on, which grows like n. The counts at finite n are derived
here.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from dae_theory.checks import check_positive
from dae_theory.random_features import Activation, variance_of_noise
from dae_theory.types import Scalar

__all__ = [
    "FIGURE_5",
    "SpectralConstants",
    "bulk_edges",
    "memorization_time",
    "spectral_constants",
    "stieltjes",
]

FIGURE_5: MappingProxyType[str, Any] = MappingProxyType(
    {"time": 0.1, "dim": 100, "features_per_dim": 64.0, "samples_per_dim": (4.0, 8.0, 16.0, 32.0)}
)
"""The settings of :cite:`bonnaire25`, Fig. 5, whose loss curves collapse against τ over the memorization time."""

NODES = 200
"""Of Gauss and Hermite's rule, for constants of activations."""

CONTINUED = 60
"""Steps by which the Stieltjes transform is followed from far away, where it is -1/z."""

NEWTON = 50
"""Largest number of Newton steps at each of them."""


class SpectralConstants(NamedTuple):
    """What the spectrum of U depends on, for an activation at a time t and a variance σ_x²."""

    linear: float
    """a: response to the data."""
    noisy: float
    """b: response to the noise."""
    sample_sq: float
    """v²: what is specific to a training point."""
    rest_sq: float
    """s²: what is left."""


def spectral_constants(activation: Activation, time: Scalar, variance: Scalar = 1.0) -> SpectralConstants:
    r"""Constants of the spectrum :cite:`bonnaire25`, by Gauss and Hermite's rule.

    .. math:: a = \mu_1/\Gamma, \quad b = \sqrt\Delta\, \mu_1/\Gamma, \quad
              v^2 = E_u\!\left[\left(E_z \varphi(e^{-t}\sigma_x u + \sqrt\Delta z)\right)^2\right]
              - a^2 e^{-2t}\sigma_x^2, \quad s^2 = E \varphi(\Gamma z)^2 - a^2 e^{-2t}\sigma_x^2 - v^2 - b^2

    with :math:`\Gamma^2 = e^{-2t}\sigma_x^2 + \Delta` and :math:`\mu_1 = E\, z\varphi(\Gamma z)`; ``variance`` is σ_x².
    """
    check_positive("variance", variance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    delta = float(variance_of_noise(time))
    data = np.exp(-float(time)) * float(variance) ** 0.5
    gamma = (data * data + delta) ** 0.5

    def phi(values):
        return np.asarray(activation(jnp.asarray(values)), np.float64)

    mean_one = float(weights @ (nodes * phi(gamma * nodes)))
    linear = mean_one / gamma
    inner = phi(data * nodes[:, None] + delta**0.5 * nodes[None, :]) @ weights
    explained = (linear * data) ** 2
    sample = float(weights @ inner**2) - explained
    noisy = delta**0.5 * linear
    rest = float(weights @ phi(gamma * nodes) ** 2) - explained - sample - noisy**2
    return SpectralConstants(float(linear), float(noisy), float(sample), float(rest))


def bulk_edges(constants: SpectralConstants, samples_per_dim: Scalar, features_per_dim: Scalar) -> tuple[float, float]:
    r"""Edges of the eigenvalues of U that belong to training points :cite:`bonnaire25`.

    .. math:: s^2 + v^2 \left(1 \pm \sqrt{\psi_p/\psi_n}\right)^2, \qquad \psi_p = p/d > \psi_n = n/d

    n - d eigenvalues lie there, d far above them, and the rest at s² (counts derived here).
    """
    check_positive("samples_per_dim", samples_per_dim)
    check_positive("features_per_dim", features_per_dim)
    if features_per_dim <= samples_per_dim:
        raise ValueError(
            f"features_per_dim = {features_per_dim} must exceed samples_per_dim = {samples_per_dim}: with fewer "
            "features than samples nothing is memorized."
        )
    ratio = float(features_per_dim / samples_per_dim) ** 0.5
    low, high = (constants.rest_sq + constants.sample_sq * (1 + sign * ratio) ** 2 for sign in (-1, 1))
    return low, high


def memorization_time(
    constants: SpectralConstants, samples_per_dim: Scalar, features_per_dim: Scalar, time: Scalar
) -> float:
    r"""The scaled time τ at which training points are fitted: :math:`\psi_p/(\Delta \lambda_{\min})` with the lower of
    :func:`bulk_edges`; proportional to n for many features :cite:`bonnaire25`. The population is learned at about 1/Δ.
    """
    low, _ = bulk_edges(constants, samples_per_dim, features_per_dim)
    return float(features_per_dim) / (float(variance_of_noise(time)) * low)


def stieltjes(
    z: complex | float,
    constants: SpectralConstants,
    samples_per_dim: Scalar,
    features_per_dim: Scalar,
    time: Scalar,
    *,
    variances: Float[np.ndarray, " k"] | None = None,
) -> complex:
    r"""The transform :math:`q(z) = \lim \frac1p \mathrm{tr}(U - z)^{-1}` of the spectrum :cite:`bonnaire25`.

    With :math:`Z = 1 + \frac{\psi_p}{\psi_n}(a^2 e^{-2t} r + v^2 q)`, :math:`\hat s = b^2\psi_p + 1/q`,
    :math:`\hat r = \psi_p a^2 e^{-2t}/Z` and averages over eigenvalues λ of Σ,

    .. math:: r = \left\langle \frac{\lambda}{\hat s + \lambda \hat r} \right\rangle, \qquad
              \psi_p (s^2 - z) + \frac{\psi_p v^2}{Z} + \frac{1 - \psi_p}{q}
              - \frac{1}{q^2} \left\langle \frac{1}{\hat s + \lambda \hat r} \right\rangle = 0

    by Newton's method in (q, r), followed from far away. The density of eigenvalues is Im q/π just above the real
    axis. ``variances`` are the λ, with equal weights; 1 by default.

    ``ValueError`` where the method does not converge: on the real axis inside the spectrum, where q is not defined.
    """
    a2 = constants.linear**2 * float(np.exp(-2.0 * float(time)))
    b2, v2, s2 = constants.noisy**2, constants.sample_sq, constants.rest_sq
    eigenvalues = np.ones(1) if variances is None else np.asarray(variances, np.float64)
    features_per_dim = float(features_per_dim)
    ratio = features_per_dim / float(samples_per_dim)

    def equations(q: complex, r: complex, z: complex) -> Complex[np.ndarray, " 2"]:
        big = 1.0 + ratio * (a2 * r + v2 * q)
        below = b2 * features_per_dim + 1.0 / q + eigenvalues * (features_per_dim * a2 / big)
        first = r - np.mean(eigenvalues / below)
        second = features_per_dim * (s2 - z) + features_per_dim * v2 / big + (1.0 - features_per_dim) / q
        return np.asarray([first, second - np.mean(1.0 / below) / q**2])

    target, far = complex(z), 1e3 * (1.0 + abs(z))
    # From the direction of z, or straight up where z is real and positive, so as not to cross the spectrum.
    away = 1j * far if target.imag or target.real > 0 else -far
    q, r = -1.0 / (target + away), -1.0 / (target + away) * float(np.mean(eigenvalues))
    for share in np.append(np.geomspace(1.0, 1e-6, CONTINUED), 0.0):
        here = target + share * away
        for _ in range(NEWTON):
            value = equations(q, r, here)
            step = 1e-7
            by_q = (equations(q * (1 + step), r, here) - value) / (q * step)
            by_r = (equations(q, r * (1 + step), here) - value) / (r * step)
            change = np.linalg.solve(np.stack([by_q, by_r], axis=1), value)
            q, r = q - change[0], r - change[1]
            if abs(change[0]) <= 1e-13 * abs(q) and abs(change[1]) <= 1e-13 * abs(r):
                break
        else:
            if abs(change[0]) > 1e-6 * abs(q):
                raise ValueError(f"the transform does not converge at z = {here}; is z real and inside the spectrum?")
    return complex(q)
