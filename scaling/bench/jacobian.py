"""Rows ``jacobian_900`` and ``jacobian_unet``: the whole Jacobian of a denoiser, and its top singular triplets.

The former, on 30x30 pixels, is a stack of convolutions and rectifiers without biases that predicts the noise, with
random weights whose scale keeps the variance of activations. The latter is the zoo's network of digits, at a digit that
it was trained on. PyTorch is the rival, with the same weights.

The limit is the time for the operations that XLA counts, at the rate at which the machine convolves one chunk of
directions in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dae_theory.types import Scalar
from scaling import zoo
from scaling.backend import compiler_options
from scaling.bench.setting import Bench, has_torch
from scaling.diffusion.denoisers import as_denoiser
from scaling.diffusion.schedules import sigma_to_timestep
from scaling.measures.jacobian import CHUNK, full_jacobian, top_singular
from scaling.training.corpus import load
from sims.bench.timing import Row, compare, seconds, temporaries

__all__ = ["Sizes", "denoise", "draw_weights", "jacobian_900", "jacobian_unet"]

RANK = 16
MODEL, SIGMA = "digits", 0.25
"""The network of the zoo, and the noise level of its Jacobian."""

CONVOLUTION = "up_blocks.1.resnets.0.conv2"
"""The layer of that network whose rate is taken as the machine's."""


class Sizes(NamedTuple):
    """Sizes of the denoiser: pixels of a side, convolutions, and channels between them."""

    side: int = 30
    layers: int = 20
    channels: int = 64


class _Twin(NamedTuple):
    """The same denoiser in PyTorch."""

    jacobian: Callable[[int | None], np.ndarray]
    """The whole Jacobian, this many rows at a time; None: all at once."""
    row_by_row: Callable[[], object]
    """The whole Jacobian, by one backward pass per row."""
    convolve: Callable[[int], object]
    """One inner convolution of a batch of this many images."""


class _Case(NamedTuple):
    """A denoiser ``(weights, y, sigma)``, the image to take its Jacobian at, and one of its convolutions."""

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
    """The image minus the noise that the network predicts; the network does not take the noise level."""
    del sigma
    side = math.isqrt(y.size)
    x = y.reshape(1, side, side, 1)
    for kernel in weights[:-1]:
        x = jax.nn.relu(_convolve(x, kernel))
    return y - _convolve(x, weights[-1]).reshape(-1)


def jacobian_900(bench: Bench) -> Row:
    """The whole Jacobian of a stack of convolutions, beside PyTorch's in chunks of the same size."""
    sizes = Sizes(8, 4, 8) if bench.quick else Sizes()
    kernels, dim = draw_weights(sizes), sizes.side**2
    weights = [jnp.asarray(kernel) for kernel in kernels]
    y = np.random.default_rng(1).standard_normal(dim).astype(np.float32)
    twin = _torch_stack(kernels, y) if has_torch() else None
    return _measured("jacobian_900", _Case(denoise, weights, y, 1.0, weights[1], sizes.side), twin, bench.repeats)


def jacobian_unet(bench: Bench) -> Row:
    """The whole Jacobian of a network of the zoo, which is small: ``bench.quick`` changes nothing."""
    pipeline, images = zoo.load(MODEL), load("digits", held_out=0)
    row = zoo.membership(MODEL)["duplicated"][0]
    image = images.images[np.flatnonzero(images.rows == row)[0]]
    y = image + SIGMA * np.random.default_rng(1).standard_normal(image.shape).astype(np.float32)
    network = pipeline.network

    def denoiser(weights: Any, y: Array, sigma: Scalar) -> Array:
        return as_denoiser(dataclasses.replace(network, params=weights), pipeline.schedule)(y, sigma)

    timestep = float(sigma_to_timestep(pipeline.schedule, jnp.float32(SIGMA)))
    twin = _torch_unet(str(zoo.folder(MODEL)), y, timestep, SIGMA) if has_torch() else None
    kernel = network.params[f"{CONVOLUTION}.weight"]
    case = _Case(denoiser, network.params, y.reshape(-1), SIGMA, kernel, image.shape[1])
    return _measured("jacobian_unet", case, twin, bench.repeats)


def _measured(name: str, case: _Case, twin: _Twin | None, repeats: int) -> Row:
    denoiser, weights, y, sigma, kernel, side = case
    # Weights are arguments: the compiler would fold constants into the program, and multiply with them itself.
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
        theirs = twin.jacobian(chunk)
        rival_convolve = min(seconds(functools.partial(twin.convolve, chunk)) for _ in range(20))
        notes |= {
            "rival": "torch.func.jacrev in chunks",
            "difference": float(np.max(np.abs(np.asarray(whole(weights, y)) - theirs)) / np.max(np.abs(theirs))),
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
    """The operations that XLA counts before it optimizes; it counts bodies of loops once, so there must be no loop."""
    counted: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(counted["flops"])


def _torch_stack(kernels: Sequence[np.ndarray], y: np.ndarray) -> _Twin:
    """:func:`denoise` in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    weights = [torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))) for kernel in kernels]
    point, side = torch.from_numpy(y), math.isqrt(y.size)

    def denoise(y: Any) -> Any:
        x = y.reshape(1, 1, side, side)
        for kernel in weights[:-1]:
            x = torch.relu(torch.nn.functional.conv2d(x, kernel, padding=1))
        return y - torch.nn.functional.conv2d(x, weights[-1], padding=1).reshape(-1)

    return _torch_derivatives(denoise, point, weights[1], side)


def _torch_unet(folder: str, y: np.ndarray, timestep: float, sigma: float) -> _Twin:
    """A network of the zoo in PyTorch, as a denoiser like :func:`scaling.as_denoiser`'s."""
    import diffusers
    import torch  # pyright: ignore[reportMissingImports]

    network = diffusers.UNet2DModel  # pyright: ignore[reportPrivateImportUsage]
    module = network.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    alpha = (1 + sigma**2) ** -0.5

    def denoise(y: Any) -> Any:
        return y - sigma * module(alpha * y.reshape(1, *shape), torch.tensor(timestep)).sample.reshape(-1)

    shape = y.shape
    kernel = module.get_submodule(CONVOLUTION).weight
    return _torch_derivatives(denoise, torch.from_numpy(y.reshape(-1)), kernel, shape[-1])


def _torch_derivatives(denoise: Callable[[Any], Any], point: Any, kernel: Any, side: int) -> _Twin:
    import torch  # pyright: ignore[reportMissingImports]

    def row_by_row() -> Any:
        leaf = point.clone().requires_grad_()
        out = denoise(leaf)
        return torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in out])

    def convolve(batch: int) -> Any:
        with torch.no_grad():
            return torch.nn.functional.conv2d(torch.ones(batch, kernel.shape[1], side, side), kernel, padding=1)

    return _Twin(lambda chunk: torch.func.jacrev(denoise, chunk_size=chunk)(point).numpy(), row_by_row, convolve)
