r"""The best two-layer autoencoder of a function near one input.

In a Gaussian cloud ``y = x + τε`` about an input x, a function F of a network (its denoiser, or one block of it) is
approximated by the autoencoder of :mod:`dae_theory.model`,

.. math:: \min_{W_1, W_2} \; E \|W_2 [W_1^\top y]_+ - F(y)\|^2,

whose code can then be compared with the network's own (:func:`code_spikiness`). Functions take one example; clouds are
drawn item by item, item i from ``fold_in(key, i)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from dae_theory.checks import check_integer, check_nonnegative, check_positive
from dae_theory.model import ReluDae, encode, init
from dae_theory.newton import lbfgs
from dae_theory.precision import full_precision
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey, Scalar

__all__ = ["LocalFit", "Mean", "code_spikiness", "fit_relu_dae"]

Function: TypeAlias = Callable[[Float[Array, " d"]], Float[Array, " m"]]


class Mean(NamedTuple):
    """An average over draws and its standard error."""

    mean: Float[Array, ""]
    standard_error: Float[Array, ""]


class LocalFit(NamedTuple):
    """The best autoencoder of several starts, and its errors on noise that it was not fitted to; a pytree."""

    dae: ReluDae
    """W₁ (d, p) and W₂ (m, p), every unit with two columns of one norm."""
    error: Mean
    """``E‖f − F‖²/E‖F‖²`` on fresh noise."""
    unexplained: Mean
    """``E‖f − F‖²/E‖F − E F‖²`` on fresh noise: 1 is no better than a constant."""
    linear_unexplained: Mean
    """The same of the best linear map of rank p, ``f(y) = M y``: the gates are worth the difference to it."""
    open: Float[Array, ""]
    """Share of the units, not counting those without effect, whose gate is open at every fresh point. At 1 the
    autoencoder is linear there, and its code is determined up to a rotation that leaves the gates open."""
    start: Int[Array, ""]
    """The start of the best fit: 0 one unit per direction, 1 two units per direction, 2 and above random."""
    converged: Bool[Array, ""]
    """Whether the gradient norm of the best fit reached the tolerance."""


def fit_relu_dae(
    key: PRNGKey,
    function: Function,
    x: Float[Array, " d"],
    spread: Scalar,
    width: int,
    *,
    num_draws: int = 512,
    num_fresh: int = 512,
    penalty: Scalar = 0.0,
    source: Function | None = None,
    num_random: int = 2,
    max_iterations: int = 300,
    tolerance: Scalar = 1e-6,
    chunk_size: int = 64,
) -> LocalFit:
    r"""The two-layer ReLU autoencoder with ``width`` p units nearest to ``function`` F on the cloud x + ``spread`` ε.

    The objective, divided by ``E‖F‖²`` and with ``penalty`` (‖W₁‖² + ‖W₂‖²) as in :cite:`zhang26`, eq. (6), is
    minimized by L-BFGS from several starts: the best linear map of rank p as one-sided units (exact where no gate is
    crossed), the best of rank p/2 as pairs of units ±v (exact where F is linear), and random ones. The fit with the
    least objective is returned, its units balanced, ``‖w₁‖ = ‖w₂‖``, which leaves f as it is and fixes the scale of the
    code. Jittable with the integers static.

    Args:
        key: of the cloud and the random starts.
        function: F, of one example.
        x: center of the cloud.
        spread: standard deviation τ of the cloud.
        width: units p.
        num_draws: points of the fit; F is evaluated once at each.
        num_fresh: other points, for the errors.
        penalty: λ of the objective.
        source: G, if the autoencoder takes G(y) in place of y: for a block, its input as a function of the image.
        num_random: random starts.
        max_iterations: of L-BFGS, per start.
        tolerance: gradient norm at which L-BFGS stops.
        chunk_size: points at which F is evaluated at a time.

    ``ValueError`` for integers below their minimum and spreads not above 0.
    """
    check_positive("spread", spread)
    check_nonnegative("penalty", penalty)
    width = check_integer("width", width, minimum=1)
    check_integer("num_random", num_random, minimum=0)
    check_integer("max_iterations", max_iterations, minimum=0)
    size = check_integer("chunk_size", chunk_size, minimum=1)
    fit_key, fresh_key, start_key = jax.random.split(key, 3)
    draws = check_integer("num_draws", num_draws, minimum=2)
    fresh = check_integer("num_fresh", num_fresh, minimum=2)
    center = x if source is None else source(x)
    y, goal = _cloud(fit_key, function, x, spread, draws, size, source)
    scale = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(goal), axis=1)))
    scale = jnp.where(scale > 0, scale, 1.0)

    linear = _linear_map(y, goal / scale, width)
    keys = [jax.random.fold_in(start_key, i) for i in range(num_random)]
    starts = [_one_sided(linear, center), _pairs(linear, width), *(_random(k, linear) for k in keys)]
    points, unravel = jnp.stack([ravel_pytree(dae)[0] for dae in starts]), ravel_pytree(starts[0])[1]
    penalty = jnp.asarray(penalty, y.dtype)

    def objective(flat: Float[Array, " q"]) -> Float[Array, ""]:
        dae = unravel(flat)
        return _mean_error(dae, y, goal / scale) + penalty * jnp.sum(jnp.square(flat))

    ends = jax.lax.map(
        lambda start: lbfgs(objective, start, tolerance=tolerance, max_iterations=max_iterations), points
    )
    best = jnp.argmin(ends.value)
    dae = unravel(ends.x[best])
    dae = _balanced(ReluDae(dae.w1, dae.w2 * scale))

    y, goal = _cloud(fresh_key, function, x, spread, fresh, size, source)
    of_linear = ReluDae(linear.w1, linear.w2 * scale)
    square = jnp.sum(jnp.square(goal), axis=1)
    variance = jnp.sum(jnp.square(goal - jnp.mean(goal, axis=0, keepdims=True)), axis=1) * (fresh / (fresh - 1))
    wrong = _errors(dae, y, goal)
    wrong_linear = jnp.sum(jnp.square(_apply_linear(of_linear, y) - goal), axis=1)
    return LocalFit(
        dae,
        _ratio(wrong, square),
        _ratio(wrong, variance),
        _ratio(wrong_linear, variance),
        _open_share(dae, y),
        best,
        ends.converged[best],
    )


def code_spikiness(
    key: PRNGKey, encoder: Function, x: Float[Array, " d"], spread: Scalar, *, num_draws: int = 64, chunk_size: int = 64
) -> dict[str, Mean]:
    """Every measure of :data:`dae_theory.spikiness.MEASURES` of the codes ``encoder(x + spread ε)``, averaged over ε.

    The encoder may be the network's, such as a pooled tap, or ``partial(dae_theory.encode, dae)``: with one key both
    see the same cloud. ``ValueError`` for fewer than 2 draws.
    """
    check_positive("spread", spread)
    count = check_integer("num_draws", num_draws, minimum=2)
    _, codes = _cloud(key, encoder, x, spread, count, check_integer("chunk_size", chunk_size, minimum=1))
    return {name: _average(jax.vmap(measure)(codes)) for name, measure in MEASURES.items()}


def _cloud(
    key: PRNGKey,
    function: Function,
    x: Float[Array, " d"],
    spread: Scalar,
    count: int,
    chunk_size: int,
    source: Function | None = None,
) -> tuple[Float[Array, "N k"], Float[Array, "N m"]]:
    """Points y = x + spread ε, the i-th from ``fold_in(key, i)``, or ``source(y)``; and the function at each y."""

    def at(i: Int[Array, ""]) -> tuple[Array, Array]:
        y = x + spread * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return y if source is None else source(y), function(y)

    return jax.lax.map(at, jnp.arange(count), batch_size=min(chunk_size, count))


@full_precision
def _linear_map(y: Float[Array, "N d"], goal: Float[Array, "N m"], rank: int) -> ReluDae:
    """The best linear map of rank at most ``rank``, ``M = W₂ W₁ᵀ``, by falling share; columns balanced.

    Reduced-rank regression: least squares, cut to the principal directions of what it predicts. With fewer points than
    dimensions it is the least-norm one.
    """
    axes, strength, across = jnp.linalg.svd(y, full_matrices=False)
    floor = jnp.finfo(y.dtype).eps * max(y.shape) * strength[0]
    inverse = jnp.where(strength > floor, 1.0 / jnp.where(strength > floor, strength, 1.0), 0.0)
    explained = (axes.T @ goal) * (strength > floor).astype(y.dtype)[:, None]
    _, _, directions = jnp.linalg.svd(explained, full_matrices=False)
    w2 = directions[:rank].T
    w1 = across.T @ (inverse[:, None] * (explained @ w2))
    spare = rank - w2.shape[1]
    return _balanced(ReluDae(*(jnp.pad(w, ((0, 0), (0, spare))) for w in (w1, w2))))


def _one_sided(linear: ReluDae, x: Float[Array, " d"]) -> ReluDae:
    """One unit per direction, its gate open at x."""
    sign = jnp.where(x @ linear.w1 < 0, -1.0, 1.0).astype(x.dtype)[None, :]
    return ReluDae(linear.w1 * sign, linear.w2 * sign)


def _pairs(linear: ReluDae, width: int) -> ReluDae:
    """Units ±v for the first half of the directions, together linear; an odd width has one unit more."""
    half = max(width // 2, 1)
    w1, w2 = linear.w1[:, :half], linear.w2[:, :half]
    both = [jnp.concatenate([w, -w], axis=1)[:, :width] for w in (w1, w2)]
    spare = width - both[0].shape[1]
    return ReluDae(*(jnp.concatenate([w, 0.1 * w[:, :spare]], axis=1) for w in both))


def _random(key: PRNGKey, like: ReluDae) -> ReluDae:
    pairs = zip(jax.random.split(key), like, strict=True)
    return ReluDae(*(init(k, *w.shape, dtype=w.dtype).w1 for k, w in pairs))


def _balanced(dae: ReluDae) -> ReluDae:
    """The same function with ``‖w₁ⱼ‖ = ‖w₂ⱼ‖``, as a small penalty would make it; units without effect become 0."""
    first, second = (jnp.linalg.norm(w, axis=0, keepdims=True) for w in dae)
    alive = (first > 0) & (second > 0)
    ratio = jnp.sqrt(jnp.where(alive, second, 0.0) / jnp.where(alive, first, 1.0))
    back = jnp.where(alive, 1.0 / jnp.where(alive, ratio, 1.0), 0.0)
    return ReluDae(dae.w1 * ratio, dae.w2 * back)


@full_precision
def _apply_linear(linear: ReluDae, y: Float[Array, "N d"]) -> Float[Array, "N m"]:
    return (y @ linear.w1) @ linear.w2.T


def _open_share(dae: ReluDae, y: Float[Array, "N d"]) -> Float[Array, ""]:
    norm = jnp.linalg.norm(dae.w1, axis=0)
    # If fewer units fit exactly, the others are rounding errors.
    alive = norm > math.sqrt(jnp.finfo(y.dtype).eps) * jnp.max(norm)
    ever_closed = jnp.any(y @ dae.w1 <= 0, axis=0)
    count = jnp.sum(alive)
    return jnp.where(count > 0, jnp.sum(alive & ~ever_closed) / jnp.maximum(count, 1), 1.0).astype(y.dtype)


@full_precision
def _errors(dae: ReluDae, y: Float[Array, "N d"], goal: Float[Array, "N m"]) -> Float[Array, " N"]:
    codes = jax.vmap(functools.partial(encode, dae))(y)
    return jnp.sum(jnp.square(codes @ dae.w2.T - goal), axis=1)


def _mean_error(dae: ReluDae, y: Float[Array, "N d"], goal: Float[Array, "N m"]) -> Float[Array, ""]:
    return jnp.mean(_errors(dae, y, goal))


def _average(values: Float[Array, " N"]) -> Mean:
    return Mean(jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(values.size))


def _ratio(above: Float[Array, " N"], below: Float[Array, " N"]) -> Mean:
    """Ratio of two means over the same draws, its standard error to first order; 0/0 is 0."""
    bottom = jnp.mean(below)
    some = bottom > 0
    ratio = jnp.where(some, jnp.mean(above) / jnp.where(some, bottom, 1.0), jnp.where(jnp.any(above > 0), jnp.inf, 0.0))
    spread = jnp.std(above - jnp.where(some, ratio, 0.0) * below, ddof=1) / math.sqrt(above.size)
    return Mean(ratio, jnp.where(some, spread / jnp.where(some, bottom, 1.0), 0.0))
