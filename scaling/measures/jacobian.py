r"""Jacobians of denoisers: whole, in chunks; their top singular triplets, without the matrix; what a spectrum says.

At the optimum the Jacobian in the image is the posterior covariance over the noise (Tweedie) :cite:`efron11`,

.. math:: J(y) = \partial_y D(y, \sigma) = \mathrm{Cov}(x \mid y)/\sigma^2,

symmetric, with eigenvalues that say which directions the noise leaves open: near a stored sample of a memorizing
denoiser J is 0, where it generalizes J keeps as many directions as the data have there :cite:`kadkhodaie24`.

Functions take one example ``y`` of any shape; the Jacobian is of the flattened output in the flattened input, (m, d),
m = d for a denoiser; another output, for example a code, is as good. All is pure and jittable; batch with
``jax.vmap``, or with ``jax.lax.map``, which bounds the memory.
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

__all__ = ["CHUNK", "Map", "Mode", "Singular", "Spectrum", "full_jacobian", "spectrum_summary", "top_singular"]

Map: TypeAlias = Callable[[Array, Scalar], Array]
"""A :class:`dae_theory.types.Denoiser`, or any differentiable ``(y, sigma) -> output`` of one example."""

Mode: TypeAlias = Literal["auto", "forward", "reverse"]
"""Along directions of the input, or against those of the output."""

CHUNK = 64
"""Directions that are pushed through the network at once."""


class Singular(NamedTuple):
    """The top r singular triplets of a Jacobian J (m, d), and how far they can be off; a pytree."""

    u: Float[Array, "m r"]
    """Left vectors: directions in the output."""
    s: Float[Array, " r"]
    """Singular values, falling; none is above J's own."""
    v: Float[Array, "d r"]
    """Right vectors: directions in the input; the largest entry of each is positive."""
    residuals: Float[Array, " r"]
    """``‖J v − s u‖``, while ``Jᵀu = s v``: some singular value of J lies within ``residuals``/√2 of each s."""
    error: Float[Array, ""]
    """A bound of ``‖J − QQᵀJ‖₂``, Q the sketch: J's own values are at most √(s² + error²). It fails with probability
    10^-num_probes."""
    energy: Float[Array, ""]
    """``‖J‖_F²``, the sum of all squared singular values: that of the sketch and an unbiased estimate of the rest."""
    energy_error: Float[Array, ""]
    """Standard error of the energy over the probes."""


class Spectrum(NamedTuple):
    """What the singular values of a square Jacobian J say, and its symmetry; a pytree. All 0 for J = 0."""

    singular_values: Float[Array, " d"]
    """All of them, falling."""
    energy: Float[Array, ""]
    """``‖J‖_F² = Σ s²``."""
    top_energy: Float[Array, ""]
    """Share of the energy in the top r."""
    participation_ratio: Float[Array, ""]
    """``(Σ s²)²/Σ s⁴``, from 1 (one direction) to d (all alike)."""
    stable_rank: Float[Array, ""]
    """``Σ s²/s₁²``."""
    numerical_rank: Int[Array, ""]
    """How many s are above ``threshold`` s₁."""
    kept: Int[Array, ""]
    """How many s are above 1/2: directions in which the signal outweighs the noise, where J is a Wiener filter."""
    trace: Float[Array, ""]
    """``tr J``; σ² tr J is the posterior's variance at the optimum."""
    asymmetry: Float[Array, ""]
    """``‖J − Jᵀ‖_F/(2 ‖J‖_F)``, from 0 (symmetric, as at the optimum) to 1 (antisymmetric)."""


def full_jacobian(
    denoiser: Map, y: Float[Array, " ..."], sigma: Scalar, *, chunk_size: int = CHUNK, mode: str = "auto"
) -> Float[Array, "m d"]:
    """The whole Jacobian, at most ``chunk_size`` directions at a time.

    The network's own pass is done once. Of memory it takes the result, what one pass leaves behind, and what so many
    directions need in one layer. "forward" pushes the d directions of the input through, "reverse" pulls the m of the
    output back, "auto" takes the fewer of them and forward if they are equal. ``ValueError`` for a chunk below 1 and
    another mode.
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

    found = chunk(places[0]) if count == 1 else jax.lax.map(chunk, places)
    found = found.reshape(count * width, -1)[:size]
    return found.T if forward else found


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
    r"""The top ``rank`` r singular triplets by products with J and Jᵀ alone :cite:`halko11`, :cite:`musco15`.

    .. math:: Q = \mathrm{orth}\left[J \Omega, \; (J J^\top) J \Omega, \; \dots, \; (J J^\top)^q J \Omega\right],
              \qquad Q^\top J = \hat U S V^\top, \qquad U = Q \hat U

    with Ω of ``rank + oversample`` normal columns and q ``iterations``. Orthonormal after every product, as in
    Algorithm 4.4 of the first, and keeping every block, as in Algorithm 2 of the second: for as many products the error
    is less, most of all where the spectrum is flat. The bound of the error, eq. (4.3) of the first, and the energy
    outside of Q are from ``num_probes`` further columns ω:

    .. math:: \|J - QQ^\top J\|_2 \le 10 \sqrt{2/\pi} \, \max_i \|(I - QQ^\top) J \omega_i\|, \qquad
              \|J\|_F^2 \approx \|Q^\top J\|_F^2 + \mathrm{mean}_i \|(I - QQ^\top) J \omega_i\|^2

    In all ``(rank + oversample)(2q + 2) + rank + num_probes`` products, at most ``chunk_size`` at once. Column j draws
    from its own key, so that more of them extend fewer. ``ValueError`` for a rank outside 1..min(m, d), a negative
    ``oversample`` or ``iterations``, and fewer than 2 probes. A sketch wider than J is cut: to so many columns, and to
    the last blocks. On CPUs :func:`scaling.backend.limit_blas_threads` saves a fifth of the time.
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
        # Beside the blocks before it, so that it is orthogonal to them, also where it has nothing new.
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

    ``rank`` r counts what is "top", at most d; ``threshold`` is relative to the largest singular value. ``ValueError``
    for a matrix that is not square, a rank below 1 and a threshold that is not positive.
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
    """Products of flat vectors with J and Jᵀ, which share the one pass of the network, and the shape of J."""

    def function(flat: Float[Array, " d"]) -> Float[Array, " m"]:
        return denoiser(flat.reshape(y.shape), sigma).reshape(-1).astype(y.dtype)

    flat = y.reshape(-1)
    out, push = jax.linearize(function, flat)
    transposed = jax.linear_transpose(push, flat)
    return push, lambda cotangent: transposed(cotangent)[0], (out.size, flat.size)


def _products(product: Callable[[Array], Array], chunk_size: int, columns: Float[Array, "k c"]) -> Float[Array, "l c"]:
    """The product of every column, at most ``chunk_size`` of them at once."""
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
    """Triplets of Q Qᵀ J from ``inside`` Jᵀ Q, each with a sign that rounding does not choose."""
    v, s, inner = jnp.linalg.svd(inside, full_matrices=False)
    u, v, s = (q @ inner.T)[:, :rank], v[:, :rank], s[:rank]
    largest = jnp.take_along_axis(v, jnp.argmax(jnp.abs(v), axis=0)[None, :], axis=0)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(v.dtype)
    return u * sign, s, v * sign


@full_precision
def _without(q: Float[Array, "m k"], columns: Float[Array, "m c"]) -> Float[Array, "m c"]:
    # Twice: once leaves rounding relative to what it takes away.
    for _ in range(2):
        columns = columns - q @ (q.T @ columns)
    return columns
