"""The row ``jacobian_900``: the whole Jacobian of a denoiser of 30x30 pixels, and its top singular triplets.

The denoiser is a stack of convolutions and rectifiers that predicts the noise, without biases, with random weights of
the scale that keeps activations alive. The rival is given as functions, so that this module runs without it.

The limit is the time in which the machine could do the operations that XLA counts, at the rate at which it convolves
one chunk of directions alone in the same run.
"""

from __future__ import annotations

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
from scaling.compilation import compiler_options
from scaling.jacobian import CHUNK, full_jacobian, top_singular
from sims.benchmarks import Row, compare, seconds, temporaries

__all__ = ["Rival", "Sizes", "Twin", "denoise", "draw_weights", "jacobian_900"]

RANK = 16


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
    # Weights are arguments: constants would be folded into the program, and products with them done by the compiler.
    whole = _compiled(lambda w, y: full_jacobian(functools.partial(denoise, w), y, 1.0), weights, y)
    top = _compiled(
        lambda w, y: top_singular(jax.random.key(0), functools.partial(denoise, w), y, 1.0, RANK), weights, y
    )
    chunk = -(-dim // -(-dim // CHUNK))
    batch = jnp.zeros((chunk, sizes.side, sizes.side, sizes.channels), jnp.float32) + 0.5
    convolution = _compiled(_convolve, batch, weights[1])
    twin = rival(kernels, y)

    convolve = min(seconds(lambda: convolution(batch, weights[1])) for _ in range(20))
    rate = _operations(_convolve, batch, weights[1]) / convolve
    operations = -(-dim // chunk) * _operations(_push, weights, y, jnp.zeros((chunk, dim), jnp.float32))
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
        "jacobian_900",
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


def _push(weights: Sequence[Array], y: Float[Array, " d"], directions: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return jax.vmap(jax.linearize(lambda y: denoise(weights, y, 1.0), y)[1])(directions)


def _compiled(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(function, compiler_options=compiler_options()).lower(*args).compile()


def _operations(function: Callable[..., Any], *args: Any) -> float:
    """What XLA counts before it rewrites the program; it counts the body of a loop once, so there must be none."""
    counted: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(counted["flops"])
