"""Rows ``jacobian_900`` and ``jacobian_unet``: the whole Jacobian of a denoiser, and its top singular triplets.

The former, of 30x30 pixels, is a stack of convolutions and rectifiers that predicts the noise, without biases, with
random weights of the scale that keeps activations alive. The latter is the zoo's network of digits at a digit that it
was trained on. The rival is given as functions, so that this module runs without it.

The limit is the time in which the machine could do the operations that XLA counts, at the rate at which it convolves
one chunk of directions alone in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.types import Scalar
from scaling import zoo
from scaling.backend import compiler_options
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.schedules import sigma_to_timestep
from scaling.measures.jacobian import CHUNK, full_jacobian, top_singular
from scaling.training.corpus import load
from sims.bench.timing import Row, compare, seconds, temporaries

__all__ = [
    "CONVOLUTION",
    "Rival",
    "Sizes",
    "Twin",
    "UNetRival",
    "denoise",
    "draw_weights",
    "jacobian_900",
    "jacobian_unet",
]

RANK = 16
MODEL, SIGMA = "digits", 0.25
"""Of the zoo, and the noise level that it is looked at."""

CONVOLUTION = "up_blocks.1.resnets.0.conv2"
"""Of that network, whose rate is the machine's."""


class Sizes(NamedTuple):
    """Of the denoiser: pixels of a side, convolutions, and channels between them."""

    side: int = 30
    layers: int = 20
    channels: int = 64


class Twin(NamedTuple):
    """The same denoiser elsewhere."""

    jacobian: Callable[[int | None], np.ndarray]
    """The whole Jacobian by so many rows at a time; None: all at once."""
    row_by_row: Callable[[], object]
    """The whole Jacobian by one backward pass a row."""
    convolve: Callable[[int], object]
    """One inner convolution of a batch of so many images."""


Rival: TypeAlias = Callable[[Sequence[np.ndarray], np.ndarray], Twin | None]
"""From kernels (3, 3, in, out) and an image (d,) to the twin, if there is one."""

UNetRival: TypeAlias = Callable[[str, np.ndarray, float, float], Twin | None]
"""From the model's folder, an image (c, h, w), the timestep and σ to the twin."""


class _Case(NamedTuple):
    """A denoiser ``(weights, y, sigma)`` at one image, and a convolution like its own."""

    denoiser: Callable[[Any, Array, Scalar], Array]
    weights: Any
    y: Float[np.ndarray, " d"]
    sigma: float
    kernel: Float[Array, "3 3 i o"]
    side: int


def draw_weights(sizes: Sizes) -> list[np.ndarray]:
    """Kernels (3, 3, in, out) of variance 2 / (9 in)."""
    random = np.random.default_rng(0)
    ends = [1, *[sizes.channels] * (sizes.layers - 1), 1]
    return [
        (math.sqrt(2 / (9 * c_in)) * random.standard_normal((3, 3, c_in, c_out))).astype(np.float32)
        for c_in, c_out in itertools.pairwise(ends)
    ]


def denoise(weights: Sequence[Array], y: Float[Array, " d"], sigma: Scalar) -> Float[Array, " d"]:
    """The image less the noise that the network sees; it is not told the noise level."""
    del sigma
    side = math.isqrt(y.size)
    x = y.reshape(1, side, side, 1)
    for kernel in weights[:-1]:
        x = jax.nn.relu(_convolve(x, kernel))
    return y - _convolve(x, weights[-1]).reshape(-1)


def jacobian_900(rival: Rival, repeats: int, quick: bool) -> Row:
    """The whole Jacobian beside the rival's in chunks of the same size."""
    sizes = Sizes(8, 4, 8) if quick else Sizes()
    kernels, dim = draw_weights(sizes), sizes.side**2
    weights = [jnp.asarray(kernel) for kernel in kernels]
    y = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    return _measured(
        "jacobian_900", _Case(denoise, weights, y, 1.0, weights[1], sizes.side), rival(kernels, y), repeats
    )


def jacobian_unet(rival: UNetRival, repeats: int, quick: bool) -> Row:
    """The same of a network of the zoo; ``quick`` changes nothing but is recorded."""
    del quick
    pipeline, images = zoo.load(MODEL), load("digits", held_out=0)
    row = zoo.membership(MODEL)["duplicated"][0]
    image = images.images[np.flatnonzero(images.rows == row)[0]]
    y = image + SIGMA * np.random.default_rng(1).standard_normal(image.shape).astype(np.float32)
    network = pipeline.network

    def denoiser(weights: Any, y: Array, sigma: Scalar) -> Array:
        return as_denoiser(dataclasses.replace(network, params=weights), pipeline.schedule)(y, sigma)

    timestep = float(sigma_to_timestep(pipeline.schedule, jnp.float32(SIGMA)))
    twin = rival(str(zoo.folder(MODEL)), y, timestep, SIGMA)
    kernel = network.params[f"{CONVOLUTION}.weight"]
    case = _Case(denoiser, network.params, y.reshape(-1), SIGMA, kernel, image.shape[1])
    return _measured("jacobian_unet", case, twin, repeats)


def _measured(name: str, case: _Case, twin: Twin | None, repeats: int) -> Row:
    denoiser, weights, y, sigma, kernel, side = case
    # Weights are arguments: constants would be folded into the program, and products with them done by the compiler.
    whole = _compiled(lambda w, y: full_jacobian(functools.partial(denoiser, w), y, sigma), weights, y)
    top = _compiled(
        lambda w, y: top_singular(jax.random.key(0), functools.partial(denoiser, w), y, sigma, RANK), weights, y
    )
    chunk = -(-y.size // -(-y.size // CHUNK))
    batch = jnp.zeros((chunk, side, side, kernel.shape[2]), jnp.float32) + 0.5
    convolution = _compiled(_convolve, batch, kernel)

    def push(weights: Any, y: Float[Array, " d"], directions: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return jax.vmap(jax.linearize(lambda y: denoiser(weights, y, sigma), y)[1])(directions)

    convolve = min(seconds(lambda: convolution(batch, kernel)) for _ in range(20))
    rate = _operations(_convolve, batch, kernel) / convolve
    operations = -(-y.size // chunk) * _operations(push, weights, y, jnp.zeros((chunk, y.size), jnp.float32))
    values = np.linalg.svd(np.asarray(whole(weights, y)), compute_uv=False)
    triplets = top(weights, y)
    notes: dict[str, Any] = {
        "chunk": chunk,
        "operations": operations,
        "convolution_rate": rate,
        "limit_s": operations / rate,
        "temporary_bytes": temporaries(whole),
        "chunk_bytes": batch.nbytes,
        "top_rank": RANK,
        "top_error": float(np.max(np.abs(np.asarray(triplets.s) - values[:RANK]) / values[:RANK])),
        "top_bound": float(np.max(np.asarray(triplets.residuals) / math.sqrt(2) / values[:RANK])),
    }
    if twin is not None:
        found = twin.jacobian(chunk)
        rival_convolve = min(seconds(functools.partial(twin.convolve, chunk)) for _ in range(20))
        notes |= {
            "rival": "torch.func.jacrev in chunks",
            "difference": float(np.max(np.abs(np.asarray(whole(weights, y)) - found)) / np.max(np.abs(found))),
            "rival_at_once_s": seconds(lambda: twin.jacobian(None)),
            "rival_row_by_row_s": seconds(twin.row_by_row),
            "rival_convolution_rate": rate * convolve / rival_convolve,
        }
    measured = compare(
        name,
        lambda: whole(weights, y),
        None if twin is None else lambda: twin.jacobian(chunk),
        repeats,
        notes=notes,
    )
    short = [seconds(lambda: top(weights, y)) for _ in range(max(repeats, 3))]
    notes |= {
        "time_over_limit": measured.ours_s / notes["limit_s"],
        "top_s": statistics.median(short),
        "top_speedup": measured.ours_s / statistics.median(short),
    }
    return measured._replace(notes=notes)


def _convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _compiled(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(function, compiler_options=compiler_options()).lower(*args).compile()


def _operations(function: Callable[..., Any], *args: Any) -> float:
    """What XLA counts before it rewrites the program; it counts the body of a loop once, so there must be none."""
    counted: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(counted["flops"])
