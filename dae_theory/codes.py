r"""The representation under noise: distribution of the code ``h(x + σε)`` and of the Jacobian, in closed form.

Given ``x``, the preactivations ``u = W₁ᵀ(x + σε) + b₁`` are Gaussian with mean ``m = W₁ᵀx + b₁`` and covariance
``σ² W₁ᵀW₁``; ``a_j = m_j/(σ‖w_j‖)``. Gate probabilities and moments of the code and of the Jacobian are averages over
one or two of them. Mean and covariance of the code are :func:`dae_theory.risk.code_moments`. At a memorized sample
about one gate is on, at a generalized one those of its block :cite:`zhang26`; the functions here compute with what
probability.

Functions take one example; batch with ``jax.vmap``. ``σ > 0``; weights and data share one floating dtype, which the
result has too. The gate of a zero column is on with probability one half, and contributes nothing to code and Jacobian.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dae_theory.bivariate_normal import bivariate_normal_cdf, normal_cdf, normal_pdf
from dae_theory.checks import check_data, check_level
from dae_theory.model import Dae, preactivations
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import angle, standardize
from dae_theory.risk import code_moments
from dae_theory.symmetry import column_norms
from dae_theory.types import Scalar

__all__ = [
    "ActiveSet",
    "LocalLinear",
    "SpikinessMoments",
    "active_set",
    "gate_probabilities",
    "jacobian_energy",
    "joint_gate_probabilities",
    "local_linear",
    "mean_jacobian",
    "spikiness_moments",
]


class ActiveSet(NamedTuple):
    """Bounds on the probability that exactly a given set of gates is on; a pytree."""

    lower: Float[Array, ""]
    upper: Float[Array, ""]


class SpikinessMoments(NamedTuple):
    """Expected powers of the norms of the code that measures of spikiness are made of; a pytree."""

    l1: Float[Array, ""]
    """``E Σ h_j``."""
    l2_sq: Float[Array, ""]
    """``E Σ h_j²``."""
    l4_fourth: Float[Array, ""]
    """``E Σ h_j⁴``."""
    variance: Float[Array, ""]
    """``E std(h)²``, the squared std over the p entries (ddof = 0) of :func:`dae_theory.spikiness.std`."""


class LocalLinear(NamedTuple):
    """The linear map of the network wherever the gates are those at a given point; a pytree.

    ``f(z) = Σ_j s_j (v_j · z) u_j`` for all z with the same gates, plus a constant if the network has biases.
    """

    gates: Bool[Array, " p"]
    """Which gates are on."""
    left: Float[Array, "d r"]
    """Output directions u_j as columns, r = min(d, p)."""
    singular_values: Float[Array, " r"]
    """Singular values s_j of the Jacobian, descending."""
    right: Float[Array, "d r"]
    """Input directions v_j as columns."""

    def rank(self, tolerance: float | None = None) -> Int[Array, ""]:
        """Number of singular values above ``tolerance`` times the largest (default: rounding)."""
        s = self.singular_values
        cutoff = len(self.left) * float(jnp.finfo(s.dtype).eps) if tolerance is None else tolerance
        return jnp.sum(s > cutoff * s[0])

    def effective_rank(self) -> Float[Array, ""]:
        r"""Participation ratio of the energies, :math:`(\sum s_j^2)^2 / \sum s_j^4`; 0 if the Jacobian is 0."""
        energy = jnp.square(self.singular_values)
        total = jnp.sum(jnp.square(energy))
        return jnp.where(total > 0, jnp.square(jnp.sum(energy)) / jnp.where(total > 0, total, 1.0), 0.0)


@full_precision
def gate_probabilities(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, " p"]:
    r"""Probability that each gate is on (derived here).

    .. math:: P(u_j > 0) = \Phi(a_j)

    Raises ``ValueError`` for ``sigma <= 0`` and non-finite ``x``.
    """
    mean, std, _ = _preactivations(dae, x, sigma)
    return normal_cdf(standardize(mean, std))


@full_precision
def joint_gate_probabilities(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, "p p"]:
    r"""Probability that two gates are on together (derived here).

    .. math:: P(u_j > 0, u_k > 0) = \Phi_2(a_j, a_k; r_{jk}), \quad r_{jk} = \cos(w_j, w_k)

    The diagonal is :func:`gate_probabilities`, which raises the same errors.
    """
    mean, std, cov = _preactivations(dae, x, sigma)
    a = standardize(mean, std)
    shape = cov.shape
    r, _ = angle(jnp.broadcast_to(std[:, None], shape), jnp.broadcast_to(std[None, :], shape), cov)
    # The correlation of a unit with itself is 1 whatever it rounds to, also for a zero column, where it is set to 0.
    r = jnp.where(jnp.eye(len(a), dtype=bool), 1.0, r)
    return bivariate_normal_cdf(jnp.broadcast_to(a[:, None], shape), jnp.broadcast_to(a[None, :], shape), r)


@full_precision
def active_set(dae: Dae, x: Float[Array, " d"], sigma: Scalar, gates: Bool[Array, " p"]) -> ActiveSet:
    r"""Bounds on the probability that exactly the gates in ``gates`` are on (derived here).

    An orthant probability has no closed form beyond p = 2, but with ``F_j`` the event that gate j fails,
    ``P_j = P(F_j)``, ``P_jk = P(F_j ∩ F_k)``,

    .. math:: 1 - \sum_j P_j + \max_k \sum_{j \ne k} P_{jk} \;\le\; P \;\le\; 1 - \max_{j \ne k} P(F_j \cup F_k)

    from the star with the best center below and the worst pair above. Both are exact for p <= 2, and they coincide up
    to exponentially small terms as σ → 0, where all gates saturate. Raises what :func:`gate_probabilities` raises.
    """
    on, both = gate_probabilities(dae, x, sigma), joint_gate_probabilities(dae, x, sigma)
    fails = jnp.where(gates, 1.0 - on, on)
    # P(F_j ∩ F_k), from P(both on) by inclusion and exclusion.
    only_j = on[:, None] - both
    neither = 1.0 - on[:, None] - on[None, :] + both
    j_should_be_on = jnp.where(gates[None, :], neither, only_j.T)
    j_should_be_off = jnp.where(gates[None, :], only_j, both)
    pairs = jnp.maximum(jnp.where(gates[:, None], j_should_be_on, j_should_be_off), 0.0)
    diagonal = jnp.eye(len(on), dtype=bool)
    star = jnp.max(jnp.sum(jnp.where(diagonal, 0.0, pairs), axis=1))
    union = jnp.where(diagonal, fails[:, None], fails[:, None] + fails[None, :] - pairs)
    upper = jnp.clip(1.0 - jnp.max(union), 0.0, 1.0)
    return ActiveSet(jnp.clip(1.0 - jnp.sum(fails) + star, 0.0, upper), upper)


@full_precision
def spikiness_moments(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> SpikinessMoments:
    r"""Expected powers of the norms of the code, in closed form (derived here).

    .. math:: E[u]_+^4 = s^4 \left[(a^4 + 6a^2 + 3)\,\Phi(a) + (a^3 + 5a)\,\phi(a)\right], \qquad
       E\,\mathrm{std}(h)^2 = \tfrac1p \sum_j E h_j^2 - \tfrac1{p^2} \sum_{jk} E h_j h_k

    The means of ratios of norms (l4/l2, participation, Hoyer) have no closed form, but these give the ratios of means.
    Raises what :func:`gate_probabilities` raises.
    """
    mean, std, _ = _preactivations(dae, x, sigma)
    moments = code_moments(dae, x, sigma)
    l2_sq = jnp.sum(jnp.diagonal(moments.covariance) + jnp.square(moments.mean))
    # Means and covariances separately, so that a component common to all entries does not cancel.
    spread = jnp.mean(jnp.square(moments.mean - jnp.mean(moments.mean)))
    noise = jnp.mean(jnp.diagonal(moments.covariance)) - jnp.mean(moments.covariance)
    return SpikinessMoments(jnp.sum(moments.mean), l2_sq, jnp.sum(_fourth_moment(mean, std)), spread + noise)


@full_precision
def mean_jacobian(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, "d d"]:
    r"""Jacobian of the network, averaged over the noise (derived here); ``Cov(f(y), y)/σ²`` by Stein's lemma.

    .. math:: E\,J = W_2\, \mathrm{diag}(\Phi(a))\, W_1^\top

    Raises what :func:`gate_probabilities` raises.
    """
    return (dae.w2 * gate_probabilities(dae, x, sigma)[None, :]) @ dae.w1.T


@full_precision
def jacobian_energy(dae: Dae, x: Float[Array, " d"], sigma: Scalar) -> Float[Array, ""]:
    r"""Mean squared Frobenius norm of the Jacobian over the noise (derived here).

    .. math:: E\|J\|_F^2 = \sum_{jk} (w_{1j} \cdot w_{1k}) (w_{2j} \cdot w_{2k})\, P(u_j > 0, u_k > 0)

    For a tied block with saturated gates it is ``Σ q_j²``: at most 1 at a memorized sample, up to p_k at a generalized
    one. Raises what :func:`gate_probabilities` raises.
    """
    return jnp.sum((dae.w1.T @ dae.w1) * (dae.w2.T @ dae.w2) * joint_gate_probabilities(dae, x, sigma))


@full_precision
def local_linear(dae: Dae, y: Float[Array, " d"]) -> LocalLinear:
    r"""Singular value decomposition of the Jacobian at ``y``, from the (p, p) product of two triangular factors.

    .. math:: J(y) = W_2\, \mathrm{diag}(1[W_1^\top y > 0])\, W_1^\top = U \,\mathrm{diag}(s)\, V^\top

    Without biases ``f(y) = J(y) y``: the linear map is the denoiser itself near ``y``. At a block of
    the closed forms the nonzero ``s`` are the gains q_j: one of them at a memorized sample, p_k at a generalized one
    :cite:`zhang26`. Raises ``ValueError`` for non-finite ``y``.
    """
    check_data(y[None])
    gates = preactivations(dae, y) > 0
    q1, r1 = jnp.linalg.qr(dae.w1 * gates[None, :].astype(y.dtype))
    q2, r2 = jnp.linalg.qr(dae.w2)
    left, s, right = jnp.linalg.svd(r2 @ r1.T, full_matrices=False)
    return LocalLinear(gates, q2 @ left, s, q1 @ right.T)


def _preactivations(
    dae: Dae, x: Float[Array, " d"], sigma: Scalar
) -> tuple[Float[Array, " p"], Float[Array, " p"], Float[Array, "p p"]]:
    """Mean, standard deviation and covariance of ``W₁ᵀ(x + σε) + b₁``."""
    check_data(x[None])
    check_level("sigma", sigma, zero=False)
    sigma = jnp.asarray(sigma, x.dtype)
    gram = dae.w1.T @ dae.w1
    return preactivations(dae, x), sigma * column_norms(dae.w1), sigma * sigma * gram


def _fourth_moment(mean: Float[Array, " p"], std: Float[Array, " p"]) -> Float[Array, " p"]:
    # In m and s, not a: where the gate saturates a is clipped, while E u⁴ = m⁴ + 6 m² s² + 3 s⁴.
    a = standardize(mean, std)
    m_sq, s_sq = mean * mean, std * std
    body = (m_sq * m_sq + 6.0 * m_sq * s_sq + 3.0 * s_sq * s_sq) * normal_cdf(a)
    return body + mean * std * (m_sq + 5.0 * s_sq) * normal_pdf(a)
