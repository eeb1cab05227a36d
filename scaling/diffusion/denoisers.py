r"""Models as denoisers and denoisers as models: between variance-preserving and variance-exploding noise.

A network trained under a :class:`scaling.diffusion.schedules.Schedule` sees ``x = α x₀ + σ̃ ε`` with ``α² + σ̃² = 1``
and predicts ε, x₀ or v. A :class:`dae_theory.types.Denoiser` sees ``y = x/α = x₀ + σ ε`` with ``σ = σ̃/α`` and returns
``x̂₀``. Functions take one example of any shape; batch them with ``jax.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Num

from dae_theory.checks import check_positive
from dae_theory.types import Denoiser, Scalar
from scaling.diffusion.ranges import check_range
from scaling.diffusion.schedules import Prediction, Schedule, sigma_to_timestep, timestep_to_sigma
from scaling.models.model import Model

__all__ = [
    "Network",
    "Preconditioning",
    "as_denoiser",
    "clean_weights",
    "edm_denoiser",
    "edm_preconditioning",
    "from_denoiser",
    "noise_weights",
    "to_denoiser",
]

Network: TypeAlias = Callable[[Array, Array], Array]
"""A network of one example, ``(x, t) -> output``."""


def clean_weights(prediction: Prediction, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r"""Weights (a, b) with which ``x̂₀ = a x + b output``, for ``x = α x₀ + σ ε`` and ``α² + σ² = 1``.

    .. math:: \text{epsilon: } \frac{x - \sigma o}{\alpha}, \qquad \text{sample: } o, \qquad
              \text{v\_prediction: } \alpha x - \sigma o

    where :math:`v = \alpha \epsilon - \sigma x_0` :cite:`salimans22`. Takes numbers, NumPy arrays and JAX arrays.
    """
    match prediction:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0 * alpha, 1 + 0 * alpha
        case "v_prediction":
            return alpha, -sigma


def noise_weights(prediction: Prediction, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r"""Weights (a, b) with which ``ε̂ = a x + b output``, see :func:`clean_weights`.

    .. math:: \text{epsilon: } o, \qquad \text{sample: } \frac{x - \alpha o}{\sigma}, \qquad
              \text{v\_prediction: } \sigma x + \alpha o
    """
    match prediction:
        case "epsilon":
            return 0 * alpha, 1 + 0 * alpha
        case "sample":
            return 1 / sigma, -alpha / sigma
        case "v_prediction":
            return sigma, alpha


def to_denoiser(network: Network, schedule: Schedule) -> Denoiser:
    r"""The denoiser of a variance-preserving network, in ``dae_theory``'s convention.

    .. math:: D(y, \sigma) = \hat x_0\left(\alpha y, \; \mathrm{network}(\alpha y, t(\sigma))\right), \qquad
              \alpha = (1 + \sigma^2)^{-1/2}

    The timestep t(σ) is fractional between the schedule's noise levels, see :func:`sigma_to_timestep`. Below σ_0 and
    above σ_{T−1} it is the first or the last one, while α still follows σ. ``network(x, t)`` takes one example of any
    shape.
    """

    def denoiser(y: Float[Array, " ..."], sigma: Scalar, /) -> Float[Array, " ..."]:
        check_positive("sigma", sigma)
        sigma = jnp.asarray(sigma, y.dtype)
        alpha = jax.lax.rsqrt(1 + sigma * sigma)
        x = alpha * y
        a, b = clean_weights(schedule.prediction_type, alpha, sigma * alpha)
        return a * x + b * network(x, sigma_to_timestep(schedule, sigma)).astype(y.dtype)

    return denoiser


def from_denoiser(denoiser: Denoiser, schedule: Schedule) -> Network:
    """The network under ``schedule`` that corresponds to a denoiser: the inverse of :func:`to_denoiser`.

    Batched by ``jax.vmap``, it lets :func:`scaling.diffusion.samplers.reverse` sample from a closed form by any method.
    """

    def network(x: Float[Array, " ..."], t: ArrayLike) -> Float[Array, " ..."]:
        sigma = timestep_to_sigma(schedule, jnp.asarray(t).astype(x.dtype))
        alpha = jax.lax.rsqrt(1 + sigma * sigma)
        y = x / alpha
        clean = denoiser(y, sigma)
        noise = (y - clean) / sigma
        velocity = alpha * noise - sigma * alpha * clean
        return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[schedule.prediction_type]

    return network


def as_denoiser(
    model: Model,
    schedule: Schedule,
    context: Array | None = None,
    *,
    class_labels: ArrayLike | None = None,
    added: Any = None,
) -> Denoiser:
    """The denoiser ``D(y, σ)`` of a model, see :func:`to_denoiser`, for one example; batch it with ``jax.vmap``.

    ``y`` is an image (C, H, W), or, as in ``dae_theory``, the flat vector (d,) of an image of the model's own size. The
    conditions are those of one example, without a batch axis: ``context`` is (T, C) and ``class_labels`` a number. If
    the model also returns a variance, it is dropped. Clean images are in [-1, 1]: a concrete ``y`` far outside, for its
    σ, is a ``ValueError`` that says how to scale it, and so are integers.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> schedule = scaling.diffusion.schedules.from_config({"_class_name": "DDIMScheduler"})
    >>> scaling.as_denoiser(model, schedule)(jnp.zeros((3, 4, 4)), 0.5).shape
    (3, 4, 4)
    """
    (example, *_), _ = model.apply.inputs(jnp.float32)
    context, class_labels, added = jax.tree.map(lambda value: jnp.asarray(value)[None], (context, class_labels, added))

    def network(x: Array, t: Array) -> Array:
        image = x.reshape(example.shape if x.ndim == 1 else (1, *x.shape))
        out, _ = model.apply(model.params, image, t, context=context, class_labels=class_labels, added=added)
        if out.shape[1] not in (image.shape[1], 2 * image.shape[1]):
            raise ValueError(
                f"the network turns {image.shape[1]} channels into {out.shape[1]}, so it is no denoiser of its input; "
                "give a network with equally many, or twice as many if it predicts a variance."
            )
        return out[:, : image.shape[1]].reshape(x.shape)

    inner = to_denoiser(network, schedule)

    def denoiser(y: Num[Array, " ..."], sigma: Scalar, /) -> Float[Array, " ..."]:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(
                f"y must be a noisy image of floating-point values, got {y.dtype}: scale images from 0 to 255 first, "
                "as in images / 127.5 - 1, and add noise."
            )
        check_range("the noisy images", y, example.shape[1], sigma=sigma)
        return inner(y, sigma)

    return denoiser


class Preconditioning(NamedTuple):
    """Coefficients of a denoiser around a raw network F: ``D(y, σ) = c_skip y + c_out F(c_in y, c_noise)``."""

    c_skip: Float[Array, ""]
    c_out: Float[Array, ""]
    c_in: Float[Array, ""]
    c_noise: Float[Array, ""]


def edm_preconditioning(sigma: Scalar, sigma_data: Scalar = 0.5) -> Preconditioning:
    r"""Coefficients with which the network's input and target have unit variance at every σ :cite:`karras22`, table 1.

    .. math:: c_\text{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
              c_\text{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
              c_\text{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad c_\text{noise} = \tfrac14 \ln \sigma

    ``sigma_data``, σ_d, is the standard deviation of the data. Both arguments must be positive.
    """
    check_positive("sigma", sigma)
    check_positive("sigma_data", sigma_data)
    sigma = jnp.asarray(sigma, jnp.result_type(float, sigma))
    total = jnp.hypot(sigma, jnp.asarray(sigma_data, sigma.dtype))
    # Ratios before squares: σ² underflows to 0 in float32.
    return Preconditioning((sigma_data / total) ** 2, sigma * (sigma_data / total), 1 / total, jnp.log(sigma) / 4)


def edm_denoiser(network: Network, sigma_data: Scalar = 0.5) -> Denoiser:
    """The denoiser of a raw network ``F(x, c_noise)`` under :func:`edm_preconditioning`."""

    def denoiser(y: Float[Array, " ..."], sigma: Scalar, /) -> Float[Array, " ..."]:
        c = edm_preconditioning(jnp.asarray(sigma, y.dtype), sigma_data)
        return c.c_skip * y + c.c_out * network(c.c_in * y, c.c_noise).astype(y.dtype)

    return denoiser
