r"""The Hessian of the exact objective, in closed form, block by block.

The objective :cite:`zhang26`, eq. (6), averaged over the noise exactly, is a sum over pairs of units. Each term is a
weight that depends on W₂ times a moment that depends on W₁ through five scalars (derived here),

.. math:: L = \frac1n \sum_i \Big[ \|x_i\|^2 - 2 \sum_j (w_{2j} \cdot x_i)\, E[u_{ij}]_+
          + \sum_{jk} (w_{2j} \cdot w_{2k})\, E[u_{ij}]_+ [u_{ik}]_+ \Big] + \lambda (\|W_1\|^2 + \|W_2\|^2)

with ``u ~ N(W₁ᵀx, σ² W₁ᵀW₁)``. By Price's theorem :cite:`price58` a derivative with respect to a variance is half a
second derivative with respect to the mean, and one with respect to a covariance is a mixed derivative with respect to
two means. So the Hessian needs only derivatives with respect to the means up to fourth order, which are closed forms
that share one evaluation of the bivariate distribution. It costs about as much as the objective, whereas products with
2dp basis vectors would cost 2dp gradients.

In W₂ the objective is quadratic with a (p, p) matrix: :func:`factorize` uses it to eliminate W₂, and factors a (dp, dp)
matrix for the rest.

Biases fit in (derived here). The encoder's are one more coordinate, of an input (x, 1) that carries no noise; the
decoder's are the column of one more unit whose code is always 1. So with biases encoder columns have D = d + 1
coordinates and there are P = p + 1 decoder columns, without penalty on those of the biases; without biases D = d and
P = p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from dae_theory.bivariate_normal import gate_covariance, normal_cdf, normal_pdf, wedge
from dae_theory.checks import check_data, check_level
from dae_theory.model import AffineDae, Dae, augmented, from_augmented
from dae_theory.precision import full_precision
from dae_theory.relu_gaussian import angle, relu_mean, relu_second_moment, standardize
from dae_theory.types import Scalar

__all__ = [
    "Factors",
    "ObjectiveHessian",
    "factorize",
    "forward_root",
    "inverse_root",
    "objective_hessian",
    "to_matrix",
]

# Samples times pairs of units processed at a time, each with some thirty numbers.
PAIRS_PER_CHUNK = 2**14


class ObjectiveHessian(NamedTuple):
    """Blocks of the Hessian of the exact objective, indexed by unit and coordinate (j, a), (k, b); a pytree.

    D = d and P = p; with biases D = d + 1, the last coordinate being b₁, and P = p + 1, the last unit being b₂.
    """

    inner: Float[Array, "p D p D"]
    """Second derivatives with respect to W₁ and b₁."""
    cross: Float[Array, "p D P d"]
    """Mixed derivatives: the first index pair is of W₁ and b₁, the second of W₂ and b₂."""
    outer: Float[Array, "P P"]
    """Second derivatives with respect to W₂ and b₂: this matrix for each coordinate, zero between different ones."""


class _Jet(NamedTuple):
    """Value, gradient and Hessian of ``Σ_i E[u_j]₊[u_k]₊`` in the two columns of W₁."""

    value: Float[Array, ""]
    gradient: Float[Array, "2 D"]
    hessian: Float[Array, "2 D 2 D"]


def objective_hessian(dae: Dae, data: Float[Array, "n d"], sigma: Scalar, penalty: Scalar) -> ObjectiveHessian:
    r"""Blocks of the Hessian of :func:`dae_theory.risk.exact_objective` in weights and biases, for ``sigma > 0``.

    With :math:`K_{jk} = \sum_i E[u_{ij}]_+[u_{ik}]_+` and :math:`\nabla_1` its gradient in the first column,

    .. math:: \partial_{w_{2j}} \partial_{w_{2k}} L = \tfrac2n (K_{jk} + n \lambda \delta_{jk}) I, \qquad
       \partial_{w_{1j}} \partial_{w_{2k}} L = \tfrac2n \Big[ \nabla_1 K_{jk} \otimes w_{2j}
       + \delta_{jk} \sum_l \nabla_1 K_{jl} \otimes w_{2l} - \delta_{jk} \sum_i \nabla E[u_{ij}]_+ \otimes x_i \Big]

    The blocks of a zero column of W₁ are NaN, because the objective has a kink there and no Hessian. Needs memory for
    ``2 (DP)²`` numbers. Raises ``ValueError`` for ``sigma <= 0``, a negative ``penalty``, shapes that disagree and
    non-finite data.
    """
    check_data(data)
    check_level("sigma", sigma, zero=False)
    check_level("penalty", penalty)
    if dae.w1.shape != dae.w2.shape or dae.w1.shape[0] != data.shape[1]:
        raise ValueError(f"weights of shape {dae.w1.shape} and {dae.w2.shape} do not fit data of shape {data.shape}.")
    return _objective_hessian(dae, data, jnp.asarray(sigma, data.dtype), jnp.asarray(penalty, data.dtype))


@jax.jit
@full_precision
def _objective_hessian(
    dae: Dae, data: Float[Array, "n d"], sigma: Float[Array, ""], penalty: Float[Array, ""]
) -> ObjectiveHessian:
    (n, d), p = data.shape, dae.w1.shape[1]
    dead = jnp.sum(jnp.square(dae.w1), axis=0) == 0
    # Zero columns are replaced by ones, to avoid NaN in between, and their results discarded.
    dae = dae._replace(w1=jnp.where(dead[None, :], 1.0, dae.w1))
    encoder, decoder = (w.T for w in augmented(dae))
    coordinates, units = encoder.shape[1], jnp.arange(p)
    biased = isinstance(dae, AffineDae)
    inputs = jnp.concatenate([data, jnp.ones((n, 1), data.dtype)], axis=1) if biased else data
    # Coordinates of the encoder that noise enters by, and that are penalized; decoder columns that are penalized.
    noisy, decaying = np.arange(coordinates) < d, np.arange(len(decoder)) < p
    w1, w2 = jnp.where(noisy[None, :], encoder, 0.0) if biased else encoder, decoder[:p]
    plane = jnp.diag(jnp.asarray(noisy, data.dtype))
    weights = w2 @ w2.T
    means = inputs @ encoder.T
    # With biases the units add up to x − b₂.
    targets = jnp.concatenate([w2, -(w2 @ decoder[p])[:, None]], axis=1) if biased else w2
    singles, means_gradient, totals = jax.lax.map(
        lambda unit: _single(unit[0], unit[1], unit[2], unit[3], inputs, sigma, plane),
        (w1, targets, means.T, jnp.diagonal(weights)),
        batch_size=8,
    )

    inner = jnp.zeros((p, coordinates, p, coordinates), data.dtype).at[units, :, units, :].set(singles.hessian)
    # ∇₁ of K_jj is half of the gradient of the second moment of one unit.
    slopes = jnp.zeros((p, p, coordinates), data.dtype).at[units, units].set(0.5 * singles.gradient)
    moments = jnp.diag(singles.value)

    j, k, is_real, batch = _pair_batches(n, p)

    def add(carry, pairs):
        inner, slopes, moments = carry
        j, k, real = pairs
        jets = jax.vmap(lambda j, k: _pair(w1[j], w1[k], means[:, j], means[:, k], inputs, sigma, plane))(j, k)
        # The moments of a zero unit with other units are zero.
        real = real & ~dead[j] & ~dead[k]
        jets = jax.tree.map(lambda a: jnp.where(real.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0), jets)
        curved = 2.0 * weights[j, k][:, None, None, None, None] * jets.hessian
        inner = inner.at[j, :, j, :].add(curved[:, 0, :, 0]).at[k, :, k, :].add(curved[:, 1, :, 1])
        inner = inner.at[j, :, k, :].add(curved[:, 0, :, 1]).at[k, :, j, :].add(curved[:, 1, :, 0])
        slopes = slopes.at[j, k].add(jets.gradient[:, 0]).at[k, j].add(jets.gradient[:, 1])
        moments = moments.at[j, k].add(jets.value).at[k, j].add(jets.value)
        return (inner, slopes, moments), None

    if batch:
        (inner, slopes, moments), _ = jax.lax.scan(add, (inner, slopes, moments), (j, k, is_real))
    moments = jnp.where(dead[:, None] | dead[None, :], 0.0, moments)
    if biased:
        # The code of the last unit is 1: its moments are sums of means.
        slopes = jnp.concatenate([slopes, means_gradient[:, None, :, d]], axis=1)
        totals = jnp.where(dead, 0.0, totals)
        moments = jnp.block([[moments, totals[:, None]], [totals[None, :], jnp.full((1, 1), n, data.dtype)]])
    decay = 2.0 * penalty
    inner_decay, outer_decay = (decay * jnp.asarray(kept, data.dtype) for kept in (noisy, decaying))
    diagonal = jnp.arange(p)[:, None], jnp.arange(coordinates)[None, :]
    inner = (inner / n).at[diagonal[0], diagonal[1], diagonal[0], diagonal[1]].add(inner_decay[None, :])
    same_unit = jnp.einsum("jla,lb->jab", slopes, decoder) - means_gradient[:, :, :d]
    cross = jnp.einsum("jka,jb->jakb", slopes, w2).at[units, :, units, :].add(same_unit) * (2.0 / n)
    outer = moments * (2.0 / n) + jnp.diag(outer_decay)
    undefined = dead[:, None, None, None] | dead[None, None, :, None]
    cross_undefined = jnp.pad(undefined, ((0, 0), (0, 0), (0, len(decoder) - p), (0, 0))) | dead[:, None, None, None]
    return ObjectiveHessian(jnp.where(undefined, jnp.nan, inner), jnp.where(cross_undefined, jnp.nan, cross), outer)


def to_matrix(hessian: ObjectiveHessian) -> Float[Array, "m m"]:
    """The full matrix, m = 2dp or 2dp + p + d, in the order of ``ravel_pytree`` of the network."""
    (p, coordinates), (units, d) = hessian.inner.shape[:2], hessian.cross.shape[2:]
    outer = hessian.outer[:, None, :, None] * jnp.eye(d, dtype=hessian.outer.dtype)[None, :, None, :]
    inner = jnp.transpose(hessian.inner, (1, 0, 3, 2)).reshape(p * coordinates, p * coordinates)
    cross = jnp.transpose(hessian.cross, (1, 0, 3, 2)).reshape(p * coordinates, units * d)
    outer = jnp.transpose(outer, (1, 0, 3, 2)).reshape(units * d, units * d)
    if units > p:
        number = np.arange(units * d).reshape(d, units)
        order = np.concatenate([number[:, :p].ravel(), number[:, p]])
        cross, outer = cross[:, order], outer[order][:, order]
    return jnp.block([[inner, cross], [cross.T, outer]])


class Factors(NamedTuple):
    r"""Triangular factors of a shifted Hessian, :math:`H + \mu I = M M^\top`; NaN where it is not positive definite.

    .. math:: M = \begin{pmatrix} F & G \\ 0 & L \otimes I \end{pmatrix}, \quad L L^\top = B + \mu I, \quad
       G = C L^{-\top}, \quad F F^\top = A + \mu I - G G^\top

    for inner, cross and outer blocks A, C, B: W₂ is eliminated first, with its small matrix.
    """

    inner: Float[Array, "pD pD"]
    """F."""
    cross: Float[Array, "pD Pd"]
    """G."""
    outer: Float[Array, "P P"]
    """L."""


@full_precision
def factorize(hessian: ObjectiveHessian, shift: Scalar) -> Factors:
    """Factors of ``H + μI``, with μ = ``shift``."""
    (p, coordinates), (units, d) = hessian.inner.shape[:2], hessian.cross.shape[2:]
    size, dtype = p * coordinates, hessian.inner.dtype
    shift = jnp.asarray(shift, dtype)
    root = jnp.linalg.cholesky(hessian.outer + shift * jnp.eye(units, dtype=dtype))
    cross = solve_triangular(root, jnp.moveaxis(hessian.cross, 2, 0).reshape(units, -1), lower=True)
    cross = jnp.transpose(cross.reshape(units, size, d), (1, 0, 2)).reshape(size, units * d)
    reduced = hessian.inner.reshape(size, size) - cross @ cross.T + shift * jnp.eye(size, dtype=dtype)
    return Factors(jnp.linalg.cholesky(reduced, symmetrize_input=False), cross, root)


@full_precision
def inverse_root(factors: Factors, z: Dae) -> Dae:
    r"""``M^{-\top} z``, a root of the inverse: with its transpose, :math:`M^{-\top} M^{-1} = (H + \mu I)^{-1}`.

    .. math:: s_1 = F^{-\top} z_1, \qquad s_2 = L^{-\top} (z_2 - G^\top s_1)
    """
    z1, z2 = (part.T for part in augmented(z))
    s1 = solve_triangular(factors.inner, z1.reshape(-1), lower=True, trans="T")
    rest = z2 - (s1 @ factors.cross).reshape(z2.shape)
    s2 = solve_triangular(factors.outer, rest, lower=True, trans="T")
    return from_augmented(s1.reshape(z1.shape).T, s2.T)


@full_precision
def forward_root(factors: Factors, z: Dae) -> Dae:
    """``M z``, the inverse transpose of :func:`inverse_root`: maps a gradient in z to the gradient in the weights."""
    z1, z2 = (part.T for part in augmented(z))
    s1 = factors.inner @ z1.reshape(-1) + factors.cross @ z2.reshape(-1)
    return from_augmented(s1.reshape(z1.shape).T, (factors.outer @ z2).T)


def _pair_batches(n: int, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Pairs j < k in equal batches with the last one padded, which of them are real, and the number of batches."""
    j, k = np.triu_indices(p, 1)
    size = max(1, min(j.size, PAIRS_PER_CHUNK // n))
    batches = -(-j.size // size)
    if not batches:
        return j, k, j > k, 0
    index = np.minimum(np.arange(batches * size), j.size - 1).reshape(batches, size)
    real = (np.arange(batches * size) < j.size).reshape(batches, size)
    return j[index], k[index], real, batches


def _single(
    w1: Float[Array, " D"],
    w2: Float[Array, " D"],
    mean: Float[Array, " n"],
    weight: Float[Array, ""],
    inputs: Float[Array, "n D"],
    sigma: Float[Array, ""],
    plane: Float[Array, "D D"],
) -> tuple[_Jet, Float[Array, "D D"], Float[Array, ""]]:
    """The terms of one unit, summed over samples.

    Args:
        w1: Encoder column, without its bias.
        w2: Decoder column; its product with an input is that with the target of the units.
        mean: Mean preactivation of each sample.
        weight: ``‖w₂‖²``.
        inputs: Clean samples as rows; with biases, and a last coordinate of 1.
        sigma: Noise level σ > 0.
        plane: The identity, without the coordinate of the bias.

    Returns:
        Value and gradient of ``Σ E[u]₊²``, with the Hessian of all terms of the objective that contain no other unit;
        ``Σ ∇E[u]₊ ⊗ x``; and ``Σ E[u]₊``.
    """
    var = sigma * sigma
    std = sigma * jnp.linalg.norm(w1)
    a = standardize(mean, jnp.broadcast_to(std, mean.shape))
    gate, density = normal_cdf(a), normal_pdf(a) / std
    # Derivatives of E[u]₊ and of E[u]₊² with respect to the mean, of orders 1 to 4.
    first = (gate, density, -a * density / std, (a * a - 1.0) * density / std / std)
    second = (2.0 * relu_mean(mean, jnp.broadcast_to(std, mean.shape)), *(2.0 * term for term in first[:3]))
    pull = inputs @ w2
    curve = [weight * s - 2.0 * pull * f for s, f in zip(second[1:], first[1:], strict=True)]
    shape = 2.0 * w1
    mixed = jnp.outer(0.5 * var * (curve[1] @ inputs), shape)
    hessian = (inputs * curve[0][:, None]).T @ inputs + mixed + mixed.T
    hessian = hessian + 0.25 * var * var * jnp.sum(curve[2]) * jnp.outer(shape, shape)
    hessian = hessian + var * jnp.sum(curve[0]) * plane

    value = jnp.sum(relu_second_moment(mean, jnp.broadcast_to(std, mean.shape)))
    gradient = second[0] @ inputs + 0.5 * var * jnp.sum(second[1]) * shape
    means_gradient = (inputs * first[0][:, None]).T @ inputs + 0.5 * var * jnp.outer(shape, first[1] @ inputs)
    return _Jet(value, gradient, hessian), means_gradient, 0.5 * jnp.sum(second[0])


def _pair(
    w_j: Float[Array, " D"],
    w_k: Float[Array, " D"],
    mean_j: Float[Array, " n"],
    mean_k: Float[Array, " n"],
    inputs: Float[Array, "n D"],
    sigma: Float[Array, ""],
    plane: Float[Array, "D D"],
) -> _Jet:
    """The jet of a pair of units.

    Args:
        w_j, w_k: Encoder columns, without their biases.
        mean_j, mean_k: Mean preactivations of each sample.
        inputs, sigma, plane: As for :func:`_single`.
    """
    var = sigma * sigma
    std_j, std_k, cov = sigma * jnp.linalg.norm(w_j), sigma * jnp.linalg.norm(w_k), var * (w_j @ w_k)
    r, q = angle(std_j, std_k, cov)
    a = standardize(mean_j, jnp.broadcast_to(std_j, mean_j.shape))
    b = standardize(mean_k, jnp.broadcast_to(std_k, mean_k.shape))
    w = wedge(a, b, jnp.broadcast_to(r, a.shape), jnp.broadcast_to(q, a.shape))
    both = gate_covariance(w) + w.cdf_a * w.cdf_b
    ratio = std_k / std_j
    # The joint density at 0 diverges for parallel columns, but what it multiplies below vanishes like q².
    small = jnp.maximum(w.q, jnp.sqrt(jnp.finfo(a.dtype).eps))
    joint = jnp.where(w.q > 0, w.density / (std_j * std_k * small), 0.0)

    # Derivatives of κ = E[u_j]₊[u_k]₊, named by their orders in (mean_j, mean_k).
    phi_j, phi_k = normal_pdf(a), normal_pdf(b)
    k11 = both
    k20 = ratio * (w.q * w.density + phi_j * (b - r * a) * w.cdf_tb)
    k02 = (w.q * w.density + phi_k * (a - r * b) * w.cdf_ta) / ratio
    k10 = mean_k * both + std_k * (phi_k * w.cdf_ta + r * phi_j * w.cdf_tb)
    k01 = mean_j * both + std_j * (phi_j * w.cdf_tb + r * phi_k * w.cdf_ta)
    k21, k12, k22 = phi_j * w.cdf_tb / std_j, phi_k * w.cdf_ta / std_k, joint
    k30, k03 = -a / std_j * k20 - ratio * r * k21, -b / std_k * k02 - r / ratio * k12
    k31, k13 = -a / std_j * k21 - ratio * r * k22, -b / std_k * k12 - r / ratio * k22
    k40 = -k20 / std_j / std_j - a / std_j * k30 - ratio * r * k31
    k04 = -k02 / std_k / std_k - b / std_k * k03 - r / ratio * k13
    edges = mean_j * std_k * phi_k * w.cdf_ta + mean_k * std_j * phi_j * w.cdf_tb + std_j * std_k * w.q * w.density
    value = jnp.sum((mean_j * mean_k + cov) * both + edges)

    # The five arguments: both means, ‖w_j‖², ‖w_k‖², w_j·w_k. The last three are the same for all samples.
    h_means = jnp.stack([jnp.stack([k20, k11]), jnp.stack([k11, k02])])
    h_mixed = var * jnp.stack([jnp.stack([0.5 * k30, 0.5 * k12, k21]), jnp.stack([0.5 * k21, 0.5 * k03, k12])])
    h_shared = jnp.stack(
        [
            jnp.stack([0.25 * k40, 0.25 * k22, 0.5 * k31]),
            jnp.stack([0.25 * k22, 0.25 * k04, 0.5 * k13]),
            jnp.stack([0.5 * k31, 0.5 * k13, k22]),
        ]
    )
    h_shared = var * var * jnp.sum(h_shared, axis=-1)
    g_shared = var * jnp.sum(jnp.stack([0.5 * k20, 0.5 * k02, k11]), axis=-1)
    zero = jnp.zeros_like(w_j)
    by_column = jnp.stack([jnp.stack([2.0 * w_j, zero]), jnp.stack([zero, 2.0 * w_k]), jnp.stack([w_k, w_j])])

    gradient = jnp.stack([k10, k01]) @ inputs + jnp.einsum("g,gad->ad", g_shared, by_column)
    mixed = jnp.einsum("agd,gbe->adbe", h_mixed @ inputs, by_column)
    hessian = jnp.einsum("abn,nd,ne->adbe", h_means, inputs, inputs) + mixed + jnp.transpose(mixed, (2, 3, 0, 1))
    hessian = hessian + jnp.einsum("gh,gad,hbe->adbe", h_shared, by_column, by_column)
    bend = jnp.stack([jnp.stack([2.0 * g_shared[0], g_shared[2]]), jnp.stack([g_shared[2], 2.0 * g_shared[1]])])
    hessian = hessian + bend[:, None, :, None] * plane[None, :, None, :]
    return _Jet(value, gradient, hessian)
