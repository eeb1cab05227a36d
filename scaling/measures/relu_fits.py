r"""A deep network near one input, held against the theory: as a two-layer autoencoder, and as a denoiser.

In a Gaussian cloud ``y = x + τε`` about an input x, a function F of a network (its denoiser, or one block of it, see
:func:`between`) is approximated by the autoencoder of :mod:`dae_theory.model`,

.. math:: \min_{W_1, W_2} \; E \|W_2 [W_1^\top y]_+ - F(y)\|^2,

whose code can then be compared with the network's own (:func:`code_spikiness`). The denoiser as a whole is compared
with two optima at every noise level (:func:`denoiser_distances`): the empirical one, which memorizes, and one of the
population. Functions take one example; clouds are drawn item by item, item i from ``fold_in(key, i)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive
from dae_theory.denoisers import empirical_denoiser, gaussian_denoiser, mixture_denoiser
from dae_theory.mixture import fit
from dae_theory.model import ReluDae, encode, init
from dae_theory.newton import lbfgs
from dae_theory.precision import full_precision
from dae_theory.spectra import Labels
from dae_theory.spikiness import MEASURES
from dae_theory.types import Denoiser, PRNGKey, Scalar
from scaling.models.model import Condition, Model
from scaling.models.taps import Edit, check_order, names

__all__ = [
    "Distance",
    "LocalFit",
    "Mean",
    "between",
    "code_spikiness",
    "denoiser_distances",
    "fit_relu_dae",
    "reference_denoisers",
]

Function: TypeAlias = Callable[[Float[Array, " d"]], Float[Array, " m"]]


class Mean(NamedTuple):
    """An average over draws and its standard error."""

    mean: Float[Array, ""]
    standard_error: Float[Array, ""]


class LocalFit(NamedTuple):
    """The best autoencoder found, and how well it does on noise that it was not fitted to; a pytree."""

    dae: ReluDae
    """W₁ (d, p) and W₂ (m, p), every unit with two columns of one norm."""
    error: Mean
    """``E‖f − F‖²/E‖F‖²`` on fresh noise."""
    unexplained: Mean
    """``E‖f − F‖²/E‖F − E F‖²`` on fresh noise: 1 is as good as a constant, more is worse."""
    linear_unexplained: Mean
    """The same of the best linear map of rank p, ``f(y) = M y``: what the gates add is what is below it."""
    open: Float[Array, ""]
    """Share of the units, those without effect left out, whose gate is open at every fresh point. At 1 the autoencoder
    is linear there, and its code is known up to a rotation that leaves the gates open."""
    start: Int[Array, ""]
    """Which start won: 0 one unit a direction, 1 two units a direction, from 2 on random ones."""
    converged: Bool[Array, ""]
    """Whether the gradient norm of the winner reached the tolerance."""


class Distance(NamedTuple):
    r"""Mean squared distance of two denoisers, ``‖D − D'‖²/d``, at S noise levels; a pytree."""

    mean: Float[Array, " S"]
    standard_error: Float[Array, " S"]
    """Over images, each the mean of its draws: for other images. NaN for one image."""
    draw_error: Float[Array, " S"]
    """Over noise draws, the images held fixed."""
    per_image: Float[Array, "S n"]
    """Means over the draws."""


def between(
    model: Model,
    x: Float[Array, "c h w"],
    timestep: ArrayLike,
    source: str,
    target: str,
    condition: Condition | None = None,
) -> tuple[Function, Float[Array, " d"]]:
    """The function from the activation at tap ``source`` to that at tap ``target``, and its input at ``x``; both flat.

    All else that reaches the target, such as skip connections and the embedding of the timestep, stays as it is at x.
    ``condition`` has batch axes of size 1. ``ValueError`` for a name that is no tap, and unless the target comes after
    the source.
    """
    given = (condition or Condition())._asdict()
    check_order(names(model), source, target)
    _, taps = model.apply(model.params, x[None], timestep, **given, capture=(source,))
    shape = taps[source].shape

    def function(flat: Float[Array, " d"]) -> Float[Array, " m"]:
        edits = {source: Edit("replace", flat.reshape(shape))}
        _, found = model.apply(model.params, x[None], timestep, **given, capture=(target,), edits=edits)
        return found[target].reshape(-1).astype(flat.dtype)

    return function, taps[source].reshape(-1)


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

    With ``source`` G, the autoencoder reads G(y) in place of y: from what enters a block to what leaves it, over the
    noisy images that the network sees.

    The average is over ``num_draws`` points, and F is computed once at each. The objective, divided by ``E‖F‖²`` and
    with ``penalty`` (‖W₁‖² + ‖W₂‖²) as in :cite:`zhang26`, eq. (6), is minimized by L-BFGS from the best linear map of
    rank p as one-sided units (exact where no gate is crossed), from the best of rank p/2 as pairs of units ±v (exact
    where F is linear), and from ``num_random`` random starts; the least objective wins. Then units are balanced,
    ``‖w₁‖ = ‖w₂‖``, which leaves f and fixes the scale of the code. Errors are on ``num_fresh`` other points. Jittable
    with the integers static. ``ValueError`` for integers below their minimum and spreads not above 0.
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

    found = jax.lax.map(
        lambda start: lbfgs(objective, start, tolerance=tolerance, max_iterations=max_iterations), points
    )
    best = jnp.argmin(found.value)
    dae = unravel(found.x[best])
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
        found.converged[best],
    )


def code_spikiness(
    key: PRNGKey, encoder: Function, x: Float[Array, " d"], spread: Scalar, *, num_draws: int = 64, chunk_size: int = 64
) -> dict[str, Mean]:
    """Every measure of :data:`dae_theory.spikiness.MEASURES` of the codes ``encoder(x + spread ε)``, averaged over ε.

    The encoder is the network's, for example a pooled tap of :func:`between`, or ``partial(dae_theory.encode, dae)``;
    one key gives both the same cloud. ``ValueError`` for fewer than 2 draws.
    """
    check_positive("spread", spread)
    count = check_integer("num_draws", num_draws, minimum=2)
    _, codes = _cloud(key, encoder, x, spread, count, check_integer("chunk_size", chunk_size, minimum=1))
    return {name: _average(jax.vmap(measure)(codes)) for name, measure in MEASURES.items()}


def reference_denoisers(
    train: Float[Array, "n d"],
    held_out: Float[Array, "m d"] | None = None,
    held_out_labels: Labels | None = None,
) -> dict[str, Denoiser]:
    """Optima to compare with: ``empirical``, that of the training rows, which memorizes; and those of the population.

    The latter are fitted to rows that were never trained on, nor compared at: ``held_out``, the empirical denoiser of
    them; ``gaussian``, the Wiener filter of their mean and covariance; and with labels ``mixture``, one mode a class.
    Without such rows ``gaussian`` is of the training rows. ``ValueError`` for rows that are no data, and labels that
    do not fit.
    """
    check_data(train, name="train")
    found: dict[str, Denoiser] = {"empirical": functools.partial(empirical_denoiser, data=train)}
    rows = train
    if held_out is not None:
        check_data(held_out, name="held_out")
        found["held_out"] = functools.partial(empirical_denoiser, data=held_out)
        rows = held_out
    one = fit(rows, np.zeros(len(rows), int))
    found["gaussian"] = functools.partial(gaussian_denoiser, mean=one.means[0], covariance=one.covariances[0])
    if held_out_labels is not None:
        found["mixture"] = functools.partial(mixture_denoiser, mixture=fit(rows, np.asarray(held_out_labels)))
    return found


def denoiser_distances(
    key: PRNGKey,
    denoiser: Denoiser,
    references: Mapping[str, Denoiser],
    images: Float[Array, "n d"],
    sigmas: Float[Array, " S"] | Float[np.ndarray, " S"],
    *,
    num_draws: int = 8,
    chunk_size: int = 64,
) -> dict[str, Distance]:
    r"""How far the denoiser is from each of ``references`` at every level, over images and noise.

    .. math:: \delta(\sigma) = \frac1{n d} \sum_i E \|D(x_i + \sigma\epsilon, \sigma) - D'(x_i + \sigma\epsilon,
              \sigma)\|^2

    The reference "clean" is added, the images themselves: the denoiser's own error. Draw k of image i is the same at
    every level and for every reference. At most ``chunk_size`` noisy images are in work at once. ``ValueError`` for
    levels not above 0, a reference called "clean", and fewer than 2 draws.
    """
    check_data(images, name="images")
    check_positive("sigmas", sigmas)
    draws = check_integer("num_draws", num_draws, minimum=2)
    size = check_integer("chunk_size", chunk_size, minimum=1)
    if "clean" in references:
        raise ValueError('a reference is called "clean", which names the images themselves; choose another name.')
    count, dim = images.shape
    items = jnp.arange(count * draws)

    def distances(item: Int[Array, ""], sigma: Float[Array, ""]) -> Float[Array, " k"]:
        image, draw = item // draws, item % draws
        draw_key = jax.random.fold_in(jax.random.fold_in(key, image), draw)
        x = images[image]
        y = x + sigma * jax.random.normal(draw_key, (dim,), images.dtype)
        found = denoiser(y, sigma)
        others = [x, *(reference(y, sigma) for reference in references.values())]
        return jnp.stack([jnp.mean(jnp.square(found - other)) for other in others])

    def at_level(sigma: Float[Array, ""]) -> Float[Array, "items k"]:
        return jax.lax.map(lambda item: distances(item, sigma), items, batch_size=min(size, items.size))

    values = jax.lax.map(at_level, jnp.asarray(sigmas, images.dtype)).reshape(-1, count, draws, 1 + len(references))
    return {name: _distance(values[..., k]) for k, name in enumerate(("clean", *references))}


def _distance(values: Float[Array, "S n k"]) -> Distance:
    _, count, draws = values.shape
    per_image = jnp.mean(values, axis=2)
    over_images = jnp.std(per_image, axis=1, ddof=1) / math.sqrt(count)
    over_draws = jnp.sqrt(jnp.mean(jnp.var(values, axis=2, ddof=1), axis=1) / (count * draws))
    return Distance(jnp.mean(per_image, axis=1), over_images, over_draws, per_image)


def _cloud(
    key: PRNGKey,
    function: Function,
    x: Float[Array, " d"],
    spread: Scalar,
    count: int,
    chunk_size: int,
    source: Function | None = None,
) -> tuple[Float[Array, "N k"], Float[Array, "N m"]]:
    """Points x + spread ε, the i-th from ``fold_in(key, i)``, or what ``source`` makes of them; and the function."""

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
    kept = directions[:rank].T
    w1 = across.T @ (inverse[:, None] * (explained @ kept))
    spare = rank - kept.shape[1]
    return _balanced(ReluDae(*(jnp.pad(w, ((0, 0), (0, spare))) for w in (w1, kept))))


def _one_sided(linear: ReluDae, x: Float[Array, " d"]) -> ReluDae:
    """A unit a direction, the gate open at x."""
    sign = jnp.where(x @ linear.w1 < 0, -1.0, 1.0).astype(x.dtype)[None, :]
    return ReluDae(linear.w1 * sign, linear.w2 * sign)


def _pairs(linear: ReluDae, width: int) -> ReluDae:
    """Units ±v for the first half of the directions, which together are linear; of odd widths one is left over."""
    half = max(width // 2, 1)
    w1, w2 = linear.w1[:, :half], linear.w2[:, :half]
    both = [jnp.concatenate([w, -w], axis=1)[:, :width] for w in (w1, w2)]
    spare = width - both[0].shape[1]
    return ReluDae(*(jnp.concatenate([w, 0.1 * w[:, :spare]], axis=1) for w in both))


def _random(key: PRNGKey, like: ReluDae) -> ReluDae:
    pairs = zip(jax.random.split(key), like, strict=True)
    return ReluDae(*(init(k, *w.shape, dtype=w.dtype).w1 for k, w in pairs))


def _balanced(dae: ReluDae) -> ReluDae:
    """The same function with ``‖w₁ⱼ‖ = ‖w₂ⱼ‖``, which a small penalty would give; units of no effect become 0."""
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
    # Of an exact fit by fewer units the others are rounding.
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
