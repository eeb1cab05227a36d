r"""Moments of rectified Gaussians: what a ReLU layer makes of Gaussian noise, in closed form.

A preactivation ``u ~ N(m, s²)`` is given by its mean ``m`` and standard deviation ``s >= 0``; a pair by both and the
covariance ``c``. With ``a = m/s``, ``Z`` standard normal and ``ω(a) = E[a + Z]_+ = a Φ(a) + φ(a)``,

.. math:: E[u]_+ = s\,\omega(a), \qquad \mathrm{Var}[u]_+ = s^2 (\Phi(a) - \omega(a)\,\omega(-a)).

Covariances, not raw second moments, are the primitive: they saturate (to ``c``, or 0) where raw moments grow and
cancel. Derivatives are closed forms too: each derivative of a covariance in a mean or in the covariance differentiates
the rectifiers instead (Bonnet, :cite:`price58`), relu to gate to density, so no quadrature is ever differentiated.

Everything is elementwise: arguments have one shape, batch freely. Values and first derivatives are finite everywhere.
A unit with ``m = s = 0`` (a zero column) is a kink: homogeneous of degree one in the column, so without a second
derivative; first derivatives there are the mean of the two one-sided ones (the gate counts one half), and second
derivatives are finite numbers without meaning.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.bivariate_normal import SATURATION, gate_covariance, normal_cdf, normal_pdf, vertex

__all__ = ["relu_covariance", "relu_cross_moment", "relu_mean", "relu_second_moment", "relu_variance", "standardize"]


def standardize(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``a = mean/std`` within ±40, beyond which a gate is certain; 0 where both are 0."""
    certain = jnp.abs(mean) > SATURATION * std
    regular = (std > 0) & ~certain
    return jnp.where(certain, SATURATION * jnp.sign(mean), mean / jnp.where(regular, std, 1.0))


@jax.custom_jvp
def relu_mean(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r""".. math:: E[u]_+ = m \Phi(a) + s \phi(a)."""
    a = standardize(mean, std)
    return mean * normal_cdf(a) + std * normal_pdf(a)


@relu_mean.defjvp
def _(primals, tangents):
    (mean, std), (d_mean, d_std) = primals, tangents
    a = standardize(mean, std)
    return relu_mean(mean, std), normal_cdf(a) * d_mean + normal_pdf(a) * d_std


def relu_variance(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r""".. math:: \mathrm{Var}[u]_+ = s^2 (\Phi(a) - \omega(a)\,\omega(-a))."""
    a = standardize(mean, std)
    return std * std * (normal_cdf(a) - _omega(a) * _omega(-a))


def relu_second_moment(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r""".. math:: E[u]_+^2 = (m^2 + s^2) \Phi(a) + m s \phi(a)."""
    return relu_variance(mean, std) + relu_mean(mean, std) ** 2


def relu_cross_moment(
    mean_j: Float[Array, "*shape"],
    mean_k: Float[Array, "*shape"],
    std_j: Float[Array, "*shape"],
    std_k: Float[Array, "*shape"],
    cov: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    r"""The bivariate moment, with ``r = c/(s_j s_k)``, ``q = √(1 − r²)``.

    .. math:: E[u_j]_+[u_k]_+ = (m_j m_k + c)\,\Phi_2(a_j, a_k; r) + m_j s_k \phi(a_k) \Phi(t_j)
        + m_k s_j \phi(a_j) \Phi(t_k) + s_j s_k q\, e^{-(a_j^2 + t_k^2)/2}/2\pi

    evaluated as covariance plus product of means.
    """
    return relu_covariance(mean_j, mean_k, std_j, std_k, cov) + relu_mean(mean_j, std_j) * relu_mean(mean_k, std_k)


def relu_covariance(
    mean_j: Float[Array, "*shape"],
    mean_k: Float[Array, "*shape"],
    std_j: Float[Array, "*shape"],
    std_k: Float[Array, "*shape"],
    cov: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    r"""Covariance of two rectified preactivations, :math:`\mathrm{Cov}([u_j]_+, [u_k]_+)`.

    Correlations within rounding of ±1 (parallel columns) count as ±1.
    """
    r, q = _correlation(std_j, std_k, cov)
    a, b = standardize(mean_j, std_j), standardize(mean_k, std_k)
    pair = Pair(a, b, r, q, gate_covariance(a, b, r, q))
    return _scaled_covariance(pair, std_j, std_k, cov)


class Pair(NamedTuple):
    """Two standardized preactivations ``a + Z₁``, ``b + Z₂``."""

    a: Float[Array, "*shape"]
    b: Float[Array, "*shape"]
    r: Float[Array, "*shape"]
    q: Float[Array, "*shape"]
    gates: Float[Array, "*shape"]
    """Cov(1[a + Z₁ > 0], 1[b + Z₂ > 0]), a function of the others: computed once, differentiated by its own rule."""


def _correlation(std_j, std_k, cov):
    """Cosine and sine of the angle between two units; a right angle where one is zero."""
    product = std_j * std_k
    r = cov / jnp.where(product > 0, product, 1.0)
    r = jnp.where(product > 0, r, 0.0)
    parallel = 1.0 - jnp.abs(r) <= 8 * jnp.finfo(r.dtype).eps
    r = jnp.where(parallel, jnp.sign(r), r)
    q = jnp.sqrt(jnp.where(parallel, 1.0, (1.0 - r) * (1.0 + r)))
    return r, jnp.where(parallel, 0.0, q)


@jax.custom_jvp
def _scaled_covariance(pair, std_j, std_k, cov):
    del cov
    return std_j * std_k * _relu_relu(pair)


@_scaled_covariance.defjvp
def _(primals, tangents):
    pair, std_j, std_k, cov = primals
    d, ds_j, ds_k, dc = tangents
    both = _both_on(pair)
    scale = (_relu_relu(pair) - pair.r * both) * (std_k * ds_j + std_j * ds_k)
    shift = std_j * std_k * (_gate_relu(pair) * d.a + _gate_relu(_swap(pair)) * d.b)
    # Through c, not r: the correlation of a zero column has no derivative, its covariance has.
    return _scaled_covariance(pair, std_j, std_k, cov), both * dc + scale + shift


@jax.custom_jvp
def _relu_relu(pair):
    """Cov([a + Z₁]₊, [b + Z₂]₊)."""
    return pair.a * _gate_relu(pair) + pair.r * _both_on(pair) + normal_pdf(pair.a) * _edge(pair)


@_relu_relu.defjvp
def _(primals, tangents):
    (pair,), (d,) = primals, tangents
    return _relu_relu(pair), _gate_relu(pair) * d.a + _gate_relu(_swap(pair)) * d.b + _both_on(pair) * d.r


@jax.custom_jvp
def _gate_relu(pair):
    """Cov(1[a + Z₁ > 0], [b + Z₂]₊)."""
    a, b, r, q, gates = pair
    t_a, t_b, _, _ = vertex(a, b, r, q)
    return b * gates + normal_pdf(b) * (normal_cdf(t_a) - normal_cdf(a)) + r * normal_pdf(a) * normal_cdf(t_b)


@_gate_relu.defjvp
def _(primals, tangents):
    (pair,), (d,) = primals, tangents
    a, b, r, q, gates = pair
    _, t_b, _, _ = vertex(a, b, r, q)
    return _gate_relu(pair), normal_pdf(a) * (_edge(pair) * d.a + normal_cdf(t_b) * d.r) + gates * d.b


def _both_on(pair):
    """P(a + Z₁ > 0, b + Z₂ > 0)."""
    return pair.gates + normal_cdf(pair.a) * normal_cdf(pair.b)


def _edge(pair):
    """E[[b + Z₂]₊ | a + Z₁ = 0] − E[b + Z₂]₊."""
    a, b, r, q, _ = pair
    _, t_b, tau_b, _ = vertex(a, b, r, q)
    return q * normal_pdf(t_b) + tau_b * normal_cdf(t_b) - _omega(b)


def _swap(pair):
    return Pair(pair.b, pair.a, pair.r, pair.q, pair.gates)


def _omega(a):
    return a * normal_cdf(a) + normal_pdf(a)
