r"""The best two-layer autoencoder near images, of a denoiser as a whole and of a block inside it.

Around an image x, over its noisy versions ``y = x + σε`` at one timestep, the ReLU autoencoder of the theory is fitted
(:func:`scaling.measures.relu_fits.fit_relu_dae`) to the denoiser, from y to D(y, σ), and to a block, from the
activation at one tap to that at another. By the theory one unit suffices where an image is memorized; where the network
generalizes, as many are needed as the data have local directions :cite:`zhang26`, Corollaries 3.2 and 3.3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Num

from dae_theory import encode
from dae_theory.spikiness import MEASURES
from dae_theory.types import PRNGKey
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.ranges import check_range, scaled
from scaling.diffusion.schedules import Schedule, timestep_to_sigma
from scaling.measures.relu_fits import code_spikiness, fit_relu_dae
from scaling.models.model import Condition, Model
from scaling.models.taps import check_order, names

__all__ = ["FITTED", "SCORES", "local_fits"]

FITTED = ("denoiser", "block")
"""What the autoencoders are fitted to."""

SCORES = ("fit_error", "fit_unexplained", "fit_linear_unexplained", "fit_open", *(f"fit_{name}" for name in MEASURES))
"""The scores of each fit."""


def local_fits(
    key: PRNGKey,
    network: Model,
    schedule: Schedule,
    images: Num[Array, "m c h w"],
    timestep: ArrayLike,
    source: str,
    target: str,
    widths: Sequence[int],
    *,
    condition: Condition | None = None,
    num_draws: int = 512,
    num_random: int = 0,
    max_iterations: int = 100,
) -> dict[str, Float[Array, "2 W m"]]:
    """:data:`SCORES` for each of :data:`FITTED`, number of units and image; jittable with names and integers static.

    ``fit_error`` is the error, on noise that the autoencoder was not fitted to, relative to the squared norm of the
    output; ``fit_unexplained`` is relative to the output's variance over the noise, and ``fit_linear_unexplained`` the
    same for the best linear map of that rank. ``fit_open`` is the share of units whose gate is open for every noise
    draw. ``fit_std`` and so on are measures of spikiness of the code, averaged over noise; units are balanced,
    ``‖w₁‖ = ‖w₂‖``.

    Args:
        key: image i draws from ``fold_in(key, i)``.
        network: the denoising network.
        schedule: its noise schedule.
        images: centers of the clouds, in [-1, 1], or bytes from 0 to 255.
        timestep: the noise level.
        source: tap at which the block begins.
        target: tap at which the block ends.
        widths: numbers of units.
        condition: of the network, with batch axes of size 1.
        num_draws: noise draws of each fit, and as many for its errors.
        num_random: random starts of each fit.
        max_iterations: iterations per start.

    ``ValueError`` for names that are no taps, and unless ``target`` comes after ``source``.
    """
    check_range("images", images, images.shape[1])
    images = scaled(images)
    given = (condition or Condition())._asdict()
    check_order(names(network), source, target)
    shape, dtype = (1, *images.shape[1:]), images.dtype
    sigma = timestep_to_sigma(schedule, jnp.asarray(timestep, dtype))
    alpha = jax.lax.rsqrt(1 + sigma * sigma)
    denoiser = as_denoiser(network, schedule, **jax.tree.map(lambda part: part[0], given))

    def activation(name: str, y: Float[Array, " d"]) -> Float[Array, " k"]:
        taps = network.apply(network.params, alpha * y.reshape(shape), timestep, **given, capture=(name,))[1]
        return taps[name].reshape(-1).astype(dtype)

    functions = {
        "denoiser": (None, lambda y: denoiser(y, sigma)),
        "block": (functools.partial(activation, source), functools.partial(activation, target)),
    }

    def fitted(key: PRNGKey, x: Float[Array, " d"], name: str, width: int) -> dict[str, Float[Array, ""]]:
        fit_key, code_key = jax.random.split(key)
        entering, function = functions[name]
        fit = fit_relu_dae(
            fit_key,
            function,
            x,
            sigma,
            width,
            num_draws=num_draws,
            num_fresh=num_draws,
            source=entering,
            num_random=num_random,
            max_iterations=max_iterations,
        )
        spikiness = code_spikiness(
            code_key, lambda y: encode(fit.dae, y if entering is None else entering(y)), x, sigma
        )
        of_fit = fit.error.mean, fit.unexplained.mean, fit.linear_unexplained.mean, fit.open
        return dict(zip(SCORES, (*of_fit, *(spikiness[measure].mean for measure in MEASURES)), strict=True))

    def at_image(item: tuple[Int[Array, ""], Float[Array, " d"]]) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, item[0]), (len(FITTED), len(widths)))
        fits = [[fitted(keys[i, j], item[1], name, p) for j, p in enumerate(widths)] for i, name in enumerate(FITTED)]
        return {score: jnp.stack([jnp.stack([one[score] for one in row]) for row in fits]) for score in SCORES}

    values = jax.lax.map(at_image, (jnp.arange(len(images)), images.reshape(len(images), -1)))
    return {score: jnp.moveaxis(value, 0, -1) for score, value in values.items()}
