r"""Jacobians of denoisers: the whole matrix, in chunks; its top singular triplets without it; summaries of spectra.

At the optimum the Jacobian in the image is the posterior covariance over the noise (Tweedie) :cite:`efron11`,

.. math:: J(y) = \partial_y D(y, \sigma) = \mathrm{Cov}(x \mid y)/\sigma^2,

symmetric, with eigenvalues that tell which directions the noise leaves uncertain: near a stored sample of a memorizing
denoiser J is 0; where the denoiser generalizes, J keeps as many directions as the data have locally
:cite:`kadkhodaie24`.

Functions take one example ``y`` of any shape. The Jacobian (m, d) is that of the flattened output with respect to the
flattened input; m = d for a denoiser, and other outputs, such as codes, work too. Everything is pure and jittable;
batch with ``jax.vmap``, or with ``jax.lax.map``, which bounds the memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dae_theory.checks import check_integer, check_positive
from dae_theory.precision import full_precision
from dae_theory.types import PRNGKey, Scalar
from scaling.backend import cpu_aware
from scaling.measures.options import CHUNK

__all__ = ["CHUNK", "Map", "Mode", "Singular", "Spectrum", "full_jacobian", "spectrum_summary", "top_singular"]

Map: TypeAlias = Callable[[Array, Scalar], Array]
"""A :class:`dae_theory.types.Denoiser`, or any differentiable ``(y, sigma) -> output`` of one example."""

Mode: TypeAlias = Literal["auto", "forward", "reverse"]
"""Products with J, with its transpose, or whichever are fewer."""


class Singular(NamedTuple):
    """The top r singular triplets of a Jacobian J (m, d), with bounds of their errors; a pytree."""

    u: Float[Array, "m r"]
    """Left vectors: directions in the output."""
    s: Float[Array, " r"]
    """Singular values, descending; none exceeds that of J."""
    v: Float[Array, "d r"]
    """Right vectors: directions in the input; the largest entry of each is positive."""
    residuals: Float[Array, " r"]
    """``‖J v − s u‖``, while ``Jᵀu = s v``: some singular value of J lies within ``residuals``/√2 of each s."""
    error: Float[Array, ""]
    """A bound of ``‖J − QQᵀJ‖₂``, Q the sketch: the singular values of J are at most √(s² + error²). It fails with
    probability 10^-num_probes."""
    energy: Float[Array, ""]
    """``‖J‖_F²``, the sum of all squared singular values: exact within the sketch, plus an unbiased estimate of the
    rest."""
    energy_error: Float[Array, ""]
    """Standard error of the energy over the probes."""


class Spectrum(NamedTuple):
    """Summary of the singular values of a square Jacobian J, and its symmetry; a pytree. All 0 for J = 0."""

    singular_values: Float[Array, " d"]
    """All of them, descending."""
    energy: Float[Array, ""]
    """``‖J‖_F² = Σ s²``."""
    top_energy: Float[Array, ""]
    """Share of the energy in the top r."""
    participation_ratio: Float[Array, ""]
    """``(Σ s²)²/Σ s⁴``, from 1 (one direction) to d (all equal)."""
    stable_rank: Float[Array, ""]
    """``Σ s²/s₁²``."""
    numerical_rank: Int[Array, ""]
    """Number of singular values above ``threshold`` s₁."""
    kept: Int[Array, ""]
    """Number of singular values above 1/2: for a Wiener filter, directions in which the signal exceeds the noise."""
    trace: Float[Array, ""]
    """``tr J``; σ² tr J is the posterior's variance at the optimum."""
    asymmetry: Float[Array, ""]
    """``‖J − Jᵀ‖_F/(2 ‖J‖_F)``, from 0 (symmetric, as at the optimum) to 1 (antisymmetric)."""


def full_jacobian(
    denoiser: Map, y: Float[Array, " ..."], sigma: Scalar, *, chunk_size: int = CHUNK, mode: str = "auto"
) -> Float[Array, "m d"]:
    """The whole Jacobian, at most ``chunk_size`` directions at a time.

    The forward pass of the network runs once. Memory holds the result, the residuals of one pass, and the activations
    of ``chunk_size`` directions in one layer. ``mode`` "forward" multiplies J by the d directions of the input,
    "reverse" its transpose by the m of the output; "auto" takes whichever are fewer, forward if they are equal.
    ``ValueError`` for a chunk below 1 and an unknown mode.

    >>> import jax.numpy as jnp
    >>> full_jacobian(lambda y, sigma: y / (1 + sigma**2), jnp.zeros(2), 1.0).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}.")
    push, pull, (m, d) = _linearized(denoiser, y, sigma)
    forward = mode == "forward" or (mode == "auto" and d <= m)
    size = d if forward else m
    # Chunks of one size: a smaller last one would compile once more.
    count = -(-size // min(check_integer("chunk_size", chunk_size, minimum=1), size))
    width = -(-size // count)
    places = jnp.arange(count * width).reshape(count, width)

    def chunk(places: Int[Array, " b"]) -> Float[Array, "b k"]:
        # Places past the end are rows of zeros.
        rows = jax.nn.one_hot(places, size, dtype=y.dtype)
        return jax.vmap(push if forward else pull)(rows)

    products = chunk(places[0]) if count == 1 else jax.lax.map(chunk, places)
    products = products.reshape(count * width, -1)[:size]
    return products.T if forward else products


def top_singular(
    key: PRNGKey,
    denoiser: Map,
    y: Float[Array, " ..."],
    sigma: Scalar,
    rank: int,
    *,
    oversample: int = 2,
    iterations: int = 2,
    num_probes: int = 4,
    chunk_size: int = CHUNK,
) -> Singular:
    r"""The top ``rank`` r singular triplets, from products with J and Jᵀ alone :cite:`halko11`, :cite:`musco15`.

    .. math:: Q = \mathrm{orth}\left[J \Omega, \; (J J^\top) J \Omega, \; \dots, \; (J J^\top)^q J \Omega\right],
              \qquad Q^\top J = \hat U S V^\top, \qquad U = Q \hat U

    with ``rank + oversample`` normal columns Ω and q ``iterations``. Columns are orthonormalized after every product,
    as in Algorithm 4.4 of the first, and every block is kept, as in Algorithm 2 of the second: for equally many
    products the error is smaller, above all where the spectrum is flat. ``num_probes`` further columns ω give the bound
    of the error, eq. (4.3) of the first, and the energy outside of Q:

    .. math:: \|J - QQ^\top J\|_2 \le 10 \sqrt{2/\pi} \, \max_i \|(I - QQ^\top) J \omega_i\|, \qquad
              \|J\|_F^2 \approx \|Q^\top J\|_F^2 + \mathrm{mean}_i \|(I - QQ^\top) J \omega_i\|^2

    In total these are ``(rank + oversample)(2q + 2) + rank + num_probes`` products. A sketch wider than J is cut to the
    width of J and to its last blocks. On CPUs :func:`scaling.backend.limit_blas_threads` saves a fifth of the time.

    Args:
        key: column j draws from its own key, so that a larger rank extends the columns of a smaller one.
        denoiser: the function.
        y: where to take the Jacobian.
        sigma: noise level.
        rank: triplets r.
        oversample: further columns of the sketch.
        iterations: power iterations q; more are more accurate.
        num_probes: columns for the error bound and the energy.
        chunk_size: products computed at a time.

    ``ValueError`` for a rank outside 1..min(m, d), negative ``oversample`` or ``iterations``, and fewer than 2 probes.

    >>> import jax.numpy as jnp
    >>> gains = jnp.array([0.9, 0.5, 0.1])
    >>> top = top_singular(jax.random.key(0), lambda y, sigma: gains * y, jnp.ones(3), 1.0, 2)
    >>> [round(float(s), 4) for s in top.s]
    [0.9, 0.5]
    """
    push, pull, (m, d) = _linearized(denoiser, y, sigma)
    rank = check_integer("rank", rank, minimum=1, maximum=min(m, d))
    width = min(rank + check_integer("oversample", oversample, minimum=0), m, d)
    check_integer("iterations", iterations, minimum=0)
    check_integer("num_probes", num_probes, minimum=2)
    check_integer("chunk_size", chunk_size, minimum=1)

    along, across = (functools.partial(_products, product, chunk_size) for product in (push, pull))
    blocks = min(iterations + 1, min(m, d) // width)

    def iterate(i: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, inside, last = carry
        place = width * jnp.maximum(0, i - (iterations + 1 - blocks))
        image = along(_orthonormal(last))
        # Together with the earlier blocks, so that it is orthogonal to them even where it adds no direction.
        whole = jax.lax.dynamic_update_slice_in_dim(basis, image, place, axis=1)
        block = jax.lax.dynamic_slice_in_dim(_orthonormal(whole), place, width, axis=1)
        last = across(block)
        set_block = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=1)
        return set_block(basis, block), set_block(inside, last), last

    sketch_key, probe_key = jax.random.split(key)
    none = (jnp.zeros((size, width * blocks), y.dtype) for size in (m, d))
    start = (*none, _columns(sketch_key, d, width, y.dtype))
    q, inside, _ = jax.lax.fori_loop(0, iterations + 1, iterate, start, unroll=cpu_aware())
    u, s, v = _factors(q, inside, rank)
    images = along(jnp.concatenate([v, _columns(probe_key, d, num_probes, y.dtype)], axis=1))
    residuals = jnp.linalg.norm(images[:, :rank] - u * s[None, :], axis=0)
    outside = jnp.sum(jnp.square(_without(q, images[:, rank:])), axis=0)
    return Singular(
        u,
        s,
        v,
        residuals,
        10 * math.sqrt(2 / math.pi) * jnp.sqrt(jnp.max(outside)),
        jnp.sum(jnp.square(inside)) + jnp.mean(outside),
        jnp.std(outside, ddof=1) / math.sqrt(num_probes),
    )


@full_precision
def spectrum_summary(jacobian: Float[Array, "m d"], *, rank: int = 16, threshold: Scalar = 1e-2) -> Spectrum:
    """Effective ranks, energy and symmetry of a square Jacobian, see :class:`Spectrum`.

    ``rank`` r is that of ``top_energy``; ``threshold``, of the numerical rank, is relative to the largest singular
    value. ``ValueError`` for a matrix that is not square, a rank below 1 and a threshold that is not positive.
    """
    if jacobian.shape[0] != jacobian.shape[1]:
        raise ValueError(f"the Jacobian of a denoiser is square, got shape {jacobian.shape}.")
    rank = check_integer("rank", rank, minimum=1)
    check_positive("threshold", threshold)
    s = jnp.linalg.svd(jacobian, compute_uv=False)
    some = s[0] > 0
    # Relative to the largest, so that fourth powers neither overflow nor vanish.
    scaled = jnp.square(s / jnp.where(some, s[0], 1.0))
    total = jnp.where(some, jnp.sum(scaled), 1.0)
    size = jnp.sqrt(total) * jnp.where(some, s[0], 1.0)
    return Spectrum(
        s,
        jnp.sum(jnp.square(s)),
        jnp.sum(scaled[:rank]) / total,
        jnp.where(some, total**2 / jnp.where(some, jnp.sum(jnp.square(scaled)), 1.0), 0.0),
        jnp.where(some, total, 0.0),
        jnp.sum(s > threshold * s[0]),
        jnp.sum(s > 0.5),
        jnp.trace(jacobian),
        jnp.linalg.norm(jacobian - jacobian.T) / (2 * size),
    )


def _linearized(
    denoiser: Map, y: Float[Array, " ..."], sigma: Scalar
) -> tuple[Callable[[Array], Array], Callable[[Array], Array], tuple[int, int]]:
    """Products of flat vectors with J and Jᵀ, which share one forward pass, and the shape of J."""

    def function(flat: Float[Array, " d"]) -> Float[Array, " m"]:
        return denoiser(flat.reshape(y.shape), sigma).reshape(-1).astype(y.dtype)

    flat = y.reshape(-1)
    out, push = jax.linearize(function, flat)
    transposed = jax.linear_transpose(push, flat)
    return push, lambda cotangent: transposed(cotangent)[0], (out.size, flat.size)


def _products(product: Callable[[Array], Array], chunk_size: int, columns: Float[Array, "k c"]) -> Float[Array, "l c"]:
    """The product of every column, ``chunk_size`` of them at a time."""
    count = columns.shape[1]
    # XLA brings the convolutions of a transposed network into the form that its fast routines for CPUs take outside of
    # loops alone: inside they take five times as long (jaxlib 0.10). So there are no loops on CPUs.
    if cpu_aware() or count <= chunk_size:
        parts = [columns[:, i : i + chunk_size].T for i in range(0, count, chunk_size)]
        return jnp.concatenate([jax.vmap(product)(part) for part in parts]).T
    return jax.lax.map(product, columns.T, batch_size=chunk_size).T


def _columns(key: PRNGKey, size: int, count: int, dtype: jnp.dtype) -> Float[Array, "size count"]:
    keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(count))
    return jax.vmap(lambda k: jax.random.normal(k, (size,), dtype))(keys).T


@full_precision
def _orthonormal(columns: Float[Array, "m k"]) -> Float[Array, "m k"]:
    return jnp.linalg.qr(columns)[0]


@full_precision
def _factors(
    q: Float[Array, "m k"], inside: Float[Array, "d k"], rank: int
) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "d r"]]:
    """Triplets of Q Qᵀ J from ``inside`` Jᵀ Q, with signs that do not depend on rounding."""
    v, s, inner = jnp.linalg.svd(inside, full_matrices=False)
    u, v, s = (q @ inner.T)[:, :rank], v[:, :rank], s[:rank]
    largest = jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), axis=0)[None, :], axis=0)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(v.dtype)
    return u * sign, s, v * sign


@full_precision
def _without(q: Float[Array, "m k"], columns: Float[Array, "m c"]) -> Float[Array, "m c"]:
    # Twice: once leaves errors relative to the part that is removed.
    for _ in range(2):
        columns = columns - q @ (q.T @ columns)
    return columns
