r"""Scores of single images and prompts, as pure functions of one example; batch them with ``jax.vmap``.

The field orients every score so that higher means memorized; here each function returns the quantity that its source
defines, and says where it must be negated. Two kinds of functions are scored:

* a denoiser ``D(y, σ)`` (:class:`dae_theory.types.Denoiser`, :func:`scaling.diffusion.denoisers.as_denoiser`), for
  images: :func:`denoising_error`, :func:`intrinsic_dimension`;
* a pair of noise predictions ``x -> ε`` at one timestep, with the prompt and without, for prompts:
  :func:`guidance_difference`, :func:`sharpness`, :func:`anisotropy`.

All work on closed forms (:mod:`dae_theory.denoisers`) as on networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
from jaxtyping import Array, Float

from dae_theory.checks import check_integer, check_positive
from dae_theory.types import Denoiser, PRNGKey, Scalar
from scaling.measures.jacobian import full_jacobian

__all__ = [
    "Anisotropy",
    "NoisePrediction",
    "anisotropy",
    "denoising_error",
    "guidance_difference",
    "intrinsic_dimension",
    "intrinsic_dimension_estimate",
    "largest_clique",
    "neuron_activity",
    "sharpness",
    "structural_similarity",
    "tile_distance",
]

NoisePrediction: TypeAlias = Callable[[Array], Array]
"""Predicted noise ``x -> ε`` at one timestep and for one prompt."""


WINDOW, WINDOW_SCALES = 11, 3
"""Pixels of a window of :func:`structural_similarity`, and the most scales."""


class Anisotropy(NamedTuple):
    """The two terms of :func:`anisotropy`."""

    cosine: Float[Array, ""]
    """At the low noise level, from -1 to 1."""
    norm: Float[Array, ""]
    """At the high noise level."""


def denoising_error(
    key: PRNGKey, denoiser: Denoiser, x: Float[Array, " ..."], sigma: Scalar, *, num_draws: int = 1
) -> Float[Array, ""]:
    r"""Mean squared error of a denoised image, over draws of the noise; memorized images have low ones: negate.

    .. math:: \frac{1}{K} \sum_{k=1}^K \|D(x + \sigma \epsilon_k, \sigma) - x\|^2

    Draw k uses ``fold_in(key, k)``. The sum is over all entries of ``x``.
    """
    check_integer("num_draws", num_draws, minimum=1)

    def error(k: Array) -> Array:
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        return jnp.sum(jnp.square(denoiser(x + sigma * noise, sigma) - x))

    return jnp.mean(jax.lax.map(error, jnp.arange(num_draws)))


def intrinsic_dimension(denoiser: Denoiser, x: Float[Array, " ..."], sigma: Scalar) -> Float[Array, ""]:
    r"""Local intrinsic dimension of what a model has learned around an image, FLIPD :cite:`kamkari24`.

    .. math:: \mathrm{tr}\, \nabla D(x, \sigma) + \frac{\|D(x, \sigma) - x\|^2}{\sigma^2}
              = d + \sigma^2 \left(\mathrm{tr}\, \nabla s(x) + \|s(x)\|^2\right)

    with the score s of Tweedie's formula, evaluated at the image itself, without noise. As σ falls it tends to the
    dimension of the data manifold, to 0 at an isolated, memorized point, and diverges off the manifold. Memorized
    images have low values: negate. Exact: two passes and d derivatives, in chunks (:func:`full_jacobian`).
    """
    check_positive("sigma", sigma)
    offset = (denoiser(x, sigma) - x) / sigma
    return jnp.trace(full_jacobian(denoiser, x, sigma)) + jnp.sum(jnp.square(offset))


def intrinsic_dimension_estimate(
    key: PRNGKey, denoiser: Denoiser, x: Float[Array, " ..."], sigma: Scalar, *, num_probes: int = 8
) -> Float[Array, ""]:
    r"""As :func:`intrinsic_dimension`, with the trace estimated from random signs :cite:`kamkari24`.

    .. math:: \mathrm{tr}\, J \approx \frac{1}{K} \sum_k v_k^\top J v_k, \qquad
              \mathrm{Var} = \frac{2}{K} \Big(\|J_{\mathrm{sym}}\|_F^2 - \sum_i J_{ii}^2\Big)

    Unbiased. Probe k uses ``fold_in(key, k)``. Costs one pass and ``num_probes`` derivatives.
    """
    check_positive("sigma", sigma)
    check_integer("num_probes", num_probes, minimum=1)
    clean, push = jax.linearize(lambda y: denoiser(y, sigma), x)

    def probe(k: Array) -> Array:
        v = jax.random.rademacher(jax.random.fold_in(key, k), x.shape, x.dtype)
        return jnp.vdot(v, push(v))

    return jnp.mean(jax.lax.map(probe, jnp.arange(num_probes))) + jnp.sum(jnp.square((clean - x) / sigma))


def guidance_difference(
    conditional: NoisePrediction, unconditional: NoisePrediction, x: Float[Array, " ..."]
) -> Float[Array, ""]:
    r"""How far a prompt moves the noise prediction :cite:`wen24`; high for memorized prompts.

    .. math:: \|\epsilon(x_t, c) - \epsilon(x_t, \varnothing)\|_2

    Not divided by the noise level. Averaged by the caller over steps of a trajectory, or taken at its start.
    """
    return jnp.linalg.norm(conditional(x) - unconditional(x))


def sharpness(
    conditional: NoisePrediction, unconditional: NoisePrediction, x: Float[Array, " ..."], noise: Scalar
) -> Float[Array, ""]:
    r"""Curvature of a prompt's log density along its own pull :cite:`jeon25`; high for memorized prompts.

    .. math:: \|H^\Delta s^\Delta\|_2, \qquad s^\Delta(x) = s(x, c) - s(x) =
              -\frac{\epsilon(x, c) - \epsilon(x, \varnothing)}{\tilde\sigma}, \qquad H^\Delta = \nabla s^\Delta

    ``noise`` is the standard deviation :math:`\tilde\sigma` of the noise in ``x = α x₀ + σ̃ ε``. The norm is not
    squared, as in the authors' code; their text squares it. Costs one derivative of both predictions.
    """
    check_positive("noise", noise)

    def difference(y: Array) -> Array:
        return (unconditional(y) - conditional(y)) / noise

    pull, push = jax.linearize(difference, x)
    return jnp.linalg.norm(push(pull))


def anisotropy(
    low: tuple[NoisePrediction, NoisePrediction],
    high: tuple[NoisePrediction, NoisePrediction],
    x: Float[Array, "c h w"],
) -> Anisotropy:
    r"""Alignment of a prompt's pull with the unconditional prediction, and its size :cite:`asthana26`.

    .. math:: \frac{1}{hw} \sum_{ij} \cos\big(\Delta_{:ij}, \epsilon(x, \varnothing)_{:ij}\big), \qquad
              \|\Delta\|_2, \qquad \Delta = \epsilon(x, c) - \epsilon(x, \varnothing)

    The cosine at low noise, the norm at high noise, both at the same pure noise ``x``, as in the authors' code, where
    cosines run over the channels of each pixel. ``low`` and ``high`` are the predictions (with the prompt, without) at
    the two timesteps. The score of a prompt is a weighted sum of the two; the authors use 2 and 1 for Stable
    Diffusion 1.
    """
    conditional, unconditional = (prediction(x) for prediction in low)
    difference = conditional - unconditional
    lengths = jnp.linalg.norm(difference, axis=0) * jnp.linalg.norm(unconditional, axis=0)
    # A prompt that changes nothing at a pixel points nowhere there.
    cosine = jnp.sum(difference * unconditional, axis=0) / jnp.where(lengths > 0, lengths, 1)
    return Anisotropy(jnp.mean(cosine), guidance_difference(*high, x))


def tile_distance(first: Float[Array, "c h w"], second: Float[Array, "c h w"], *, tiles: int = 4) -> Float[Array, ""]:
    r"""Largest distance of corresponding tiles of two images :cite:`carlini23`; low among copies of one image: negate.

    .. math:: \max_{T} \sqrt{\frac{1}{|T|} \sum_{i \in T} (a_i - b_i)^2}

    over ``tiles`` x ``tiles`` tiles, so that a common background does not make images alike. The source's thresholds
    are for pixels in [0, 1]. ``ValueError`` if the tiles do not divide the image.
    """
    c, h, w = first.shape
    check_integer("tiles", tiles, minimum=1)
    if h % tiles or w % tiles:
        raise ValueError(f"tiles = {tiles} must divide the image's {h} x {w} pixels.")
    squares = jnp.square(first - second).reshape(c, tiles, h // tiles, tiles, w // tiles)
    return jnp.sqrt(jnp.max(jnp.mean(squares, axis=(0, 2, 4))))


def structural_similarity(first: Float[Array, "c h w"], second: Float[Array, "c h w"]) -> Float[Array, ""]:
    r"""Similarity of two images in [0, 1] over M scales :cite:`wang03`, at most 1, which equal images have.

    .. math:: \Big(\prod_{j=1}^{M} \mathrm{mean}\, s_j\Big)^{1/M}, \qquad
              s_j = \frac{2 \sigma_{ab} + C_2}{\sigma_a^2 + \sigma_b^2 + C_2}, \qquad
              s_M \to s_M\, \frac{2 \mu_a \mu_b + C_1}{\mu_a^2 + \mu_b^2 + C_1}

    Means, variances and the covariance are of Gaussian windows of 11 pixels (standard deviation 1.5) inside the image;
    each scale averages pairs of pixels of the one before; :math:`C_1 = 0.01^2, C_2 = 0.03^2`. M is the largest number
    up to 3 that leaves 11 pixels. With M = 1 it is the plain index :cite:`wang04`, whose window shrinks to smaller
    images; with more scales, negative means count as 0.
    """
    side = min(first.shape[1:])
    count = max(1, min(WINDOW_SCALES, 1 + int(np.log2(max(side / WINDOW, 1)))))
    size = WINDOW if side >= WINDOW else side - (side + 1) % 2
    values = []
    for scale in range(count):
        contrast, both = _similarities(first, second, size)
        values.append(jnp.mean(both if scale == count - 1 else contrast))
        if scale < count - 1:
            first, second = (_halved(image) for image in (first, second))
    if count == 1:
        return values[0]
    return jnp.prod(jnp.maximum(jnp.stack(values), 0)) ** (1 / count)


def neuron_activity(values: Float[Array, "tokens channels"]) -> Float[Array, " channels"]:
    r"""Mean absolute value over tokens of a layer that sees the prompt alone :cite:`hintersdorf24`, eq. (2).

    Its distance from the mean over ordinary prompts, in their standard deviations, is the score of a neuron.
    """
    return jnp.mean(jnp.abs(values), axis=0)


def largest_clique(distances: Float[np.ndarray, "k k"], threshold: float) -> float:
    r"""Size of the largest set of samples that are all closer than ``threshold`` to one another :cite:`carlini23`.

    Less the mean distance inside that set, the smallest among sets of that size, by which the source ranks prompts of
    equal size: :math:`|Q| - \bar d_Q`, so ``threshold`` must be at most 1. A single sample has 1. ``distances`` are
    symmetric. Exact; exponential in k at worst.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be positive and at most 1, got {threshold}.")
    close = np.triu(distances < threshold, 1)
    graph = nx.from_edgelist(np.argwhere(close).tolist())
    found = [1.0]
    for clique in nx.find_cliques(graph):
        pairs = distances[np.ix_(clique, clique)][np.triu_indices(len(clique), 1)]
        found.append(len(clique) - float(pairs.mean()))
    return max(found)


def _similarities(
    first: Float[Array, "c h w"], second: Float[Array, "c h w"], size: int
) -> tuple[Float[Array, "c i j"], Float[Array, "c i j"]]:
    """Contrast and structure at every window, and the same times luminance."""
    offsets = np.arange(size) - (size - 1) / 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = jnp.asarray(np.outer(line, line) / line.sum() ** 2, first.dtype)

    def mean(x: Float[Array, "c h w"]) -> Float[Array, "c i j"]:
        return jax.vmap(lambda channel: jax.scipy.signal.convolve2d(channel, window, mode="valid"))(x)

    a, b = mean(first), mean(second)
    variances = mean(first * first) - a * a + mean(second * second) - b * b
    contrast = (2 * (mean(first * second) - a * b) + 0.03**2) / (variances + 0.03**2)
    return contrast, contrast * (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)


def _halved(x: Float[Array, "c h w"]) -> Float[Array, "c i j"]:
    c, h, w = x.shape
    return jnp.mean(x[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2), axis=(2, 4))
