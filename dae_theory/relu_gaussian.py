r"""Moments of rectified Gaussians: what a ReLU layer does to Gaussian noise, in closed form.

A preactivation ``u ~ N(m, s²)`` is given by its mean ``m`` and standard deviation ``s >= 0``, a pair of them also by
their covariance ``c``. With ``a = m/s``, ``Z`` standard normal and ``ω(a) = E[a + Z]₊ = a Φ(a) + φ(a)``,

.. math:: E[u]_+ = s\,\omega(a), \qquad \mathrm{Var}[u]_+ = s^2 (\Phi(a) - \omega(a)\,\omega(-a)).

The primitives are covariances, not raw second moments: covariances stay accurate where gates are saturated, while raw
moments grow and cancel. Derivatives are closed forms too, by Price's theorem :cite:`price58`: a derivative with respect
to the covariance or a mean differentiates the rectifiers, from relu to gate to density, so no quadrature is ever
differentiated.

Everything is elementwise: arguments have the same shape, which can be any. Values and first derivatives are finite
everywhere, including ``s = 0`` and correlations ±1. At ``m = s = 0`` (a zero column) the moments have a kink: they are
homogeneous of degree one in the column. First derivatives there are the mean of the one-sided ones (the gate counts one
half); second derivatives do not exist, and those of automatic differentiation are finite but meaningless.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dae_theory.bivariate_normal import SATURATION, Wedge, gate_covariance, normal_cdf, normal_pdf, wedge

__all__ = [
    "angle",
    "relu_covariance",
    "relu_cross_moment",
    "relu_mean",
    "relu_second_moment",
    "relu_variance",
    "standardize",
]


def standardize(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``a = mean/std``, clipped to ±40, where the gate is saturated; 0 where both are 0."""
    saturated = jnp.abs(mean) > SATURATION * std
    ratio = mean / jnp.where(saturated | (std == 0), 1.0, std)
    return jnp.where(saturated, SATURATION * jnp.sign(mean), ratio)


@jax.custom_jvp
def relu_mean(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Mean of a rectified Gaussian.

    .. math:: E[u]_+ = m\,\Phi(a) + s\,\phi(a)
    """
    a = standardize(mean, std)
    return mean * normal_cdf(a) + std * normal_pdf(a)


@relu_mean.defjvp
def _(primals, tangents):
    (mean, std), (d_mean, d_std) = primals, tangents
    a = standardize(mean, std)
    return relu_mean(mean, std), normal_cdf(a) * d_mean + normal_pdf(a) * d_std


def relu_variance(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Variance of a rectified Gaussian (derived here from the second moment).

    .. math:: \mathrm{Var}[u]_+ = s^2 (\Phi(a) - \omega(a)\,\omega(-a))
    """
    a = standardize(mean, std)
    return std * std * (normal_cdf(a) - _omega(a) * _omega(-a))


def relu_second_moment(mean: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Second moment of a rectified Gaussian, as variance plus squared mean.

    .. math:: E[u]_+^2 = (m^2 + s^2)\,\Phi(a) + m s\,\phi(a)
    """
    return relu_variance(mean, std) + jnp.square(relu_mean(mean, std))


def relu_covariance(
    mean_j: Float[Array, "*shape"],
    mean_k: Float[Array, "*shape"],
    std_j: Float[Array, "*shape"],
    std_k: Float[Array, "*shape"],
    cov: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    r"""Covariance of two rectified Gaussians (derived here), with ``r = c/(s_j s_k)``.

    .. math:: \mathrm{Cov}([u_j]_+, [u_k]_+) = s_j s_k \left\{ a_j \eta + r\,\Phi_2(a_j, a_k; r)
       + \phi(a_j) \left( E[a_k + Z_k \mid a_j + Z_j = 0]_+ - \omega(a_k) \right) \right\}

    where ``η`` is the covariance of the gate of ``u_j`` with ``[a_k + Z_k]₊``. ``cov`` must satisfy
    ``|c| <= s_j s_k``; correlations within rounding of ±1 (parallel columns) count as ±1.
    """
    a, b = standardize(mean_j, std_j), standardize(mean_k, std_k)
    r, q = angle(std_j, std_k, cov)
    w = wedge(a, b, r, q)
    return _scaled_covariance(w, gate_covariance(w), std_j, std_k, cov)


def relu_cross_moment(
    mean_j: Float[Array, "*shape"],
    mean_k: Float[Array, "*shape"],
    std_j: Float[Array, "*shape"],
    std_k: Float[Array, "*shape"],
    cov: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    r"""The bivariate moment (derived here), as covariance plus product of means.

    .. math:: E[u_j]_+[u_k]_+ = (m_j m_k + c)\,\Phi_2(a_j, a_k; r) + m_j s_k \phi(a_k) \Phi(t_j)
       + m_k s_j \phi(a_j) \Phi(t_k) + s_j s_k\, q\, e^{-(a_j^2 + t_k^2)/2}/2\pi

    with ``r = c/(s_j s_k)``, ``q = √(1 − r²)``, ``t_j = (a_j − r a_k)/q``, ``t_k = (a_k − r a_j)/q``.
    """
    return relu_covariance(mean_j, mean_k, std_j, std_k, cov) + relu_mean(mean_j, std_j) * relu_mean(mean_k, std_k)


def angle(
    std_j: Float[Array, "*shape"], std_k: Float[Array, "*shape"], cov: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Cosine and sine of the angle between two units, which is a right angle if one of them is zero."""
    product = std_j * std_k
    r = jnp.where(product > 0, cov / jnp.where(product > 0, product, 1.0), 0.0)
    # An angle within rounding of 0 is noise, and the derivative of its cosine is useless.
    parallel = jnp.abs(r) >= 1.0 - 8.0 * float(jnp.finfo(r.dtype).eps)
    r = jnp.where(parallel, jnp.sign(r), r)
    q = jnp.sqrt(jnp.where(parallel, 1.0, (1.0 - r) * (1.0 + r)))
    return r, jnp.where(parallel, 0.0, q)


# Below, `gates` is gate_covariance(w), passed along so that its quadrature runs once; the rules ignore its tangent.
@jax.custom_jvp
def _scaled_covariance(
    w: Wedge,
    gates: Float[Array, "*shape"],
    std_j: Float[Array, "*shape"],
    std_k: Float[Array, "*shape"],
    cov: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    del cov
    return std_j * std_k * _relu_relu(w, gates)


@_scaled_covariance.defjvp
def _(primals, tangents):
    w, gates, std_j, std_k, cov = primals
    d, _, ds_j, ds_k, dc = tangents
    both = _both_on(w, gates)
    shift = std_j * std_k * (_gate_relu(w, gates) * d.a + _gate_relu(_swap(w), gates) * d.b)
    scale = (_relu_relu(w, gates) - w.r * both) * (std_k * ds_j + std_j * ds_k)
    # By dc, not dr: at a zero column the covariance has a derivative and the correlation has none.
    return _scaled_covariance(w, gates, std_j, std_k, cov), both * dc + shift + scale


@jax.custom_jvp
def _relu_relu(w: Wedge, gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``Cov([a + Z₁]₊, [b + Z₂]₊)``."""
    return w.a * _gate_relu(w, gates) + w.r * _both_on(w, gates) + _edge_shift(w)


@_relu_relu.defjvp
def _(primals, tangents):
    (w, gates), (d, _) = primals, tangents
    slope = _gate_relu(w, gates) * d.a + _gate_relu(_swap(w), gates) * d.b + _both_on(w, gates) * d.r
    return _relu_relu(w, gates), slope


@jax.custom_jvp
def _gate_relu(w: Wedge, gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``η = Cov(1[a + Z₁ > 0], [b + Z₂]₊)``."""
    return w.b * gates + normal_pdf(w.b) * (w.cdf_ta - w.cdf_a) + w.r * normal_pdf(w.a) * w.cdf_tb


@_gate_relu.defjvp
def _(primals, tangents):
    (w, gates), (d, _) = primals, tangents
    return _gate_relu(w, gates), _edge_shift(w) * d.a + gates * d.b + normal_pdf(w.a) * w.cdf_tb * d.r


def _both_on(w: Wedge, gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``Φ₂(a, b; r)``, the probability that both gates are on."""
    return gates + w.cdf_a * w.cdf_b


def _edge_shift(w: Wedge) -> Float[Array, "*shape"]:
    """``φ(a) (E[b + Z₂ | a + Z₁ = 0]₊ − E[b + Z₂]₊)``."""
    # Given a + Z₁ = 0, b + Z₂ has mean b − r a and standard deviation q.
    return w.q * w.density + normal_pdf(w.a) * ((w.b - w.r * w.a) * w.cdf_tb - _omega(w.b))


def _swap(w: Wedge) -> Wedge:
    return Wedge(w.b, w.a, w.r, w.q, w.t_b, w.t_a, w.cdf_b, w.cdf_a, w.cdf_tb, w.cdf_ta, w.density)


def _omega(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``ω(a) = E[a + Z]₊``."""
    return a * normal_cdf(a) + normal_pdf(a)
