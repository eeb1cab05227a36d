r"""The row ``train_step``: one step of training a small UNet on 8x8 images, beside PyTorch's from the same weights.

A step draws rows, timesteps and noise, adds the noise, computes the loss of ε and its gradient, and updates Adam and
the running average. Ours takes many steps in one program (:func:`scaling.training.steps.advance`), which allocates its
memory once: with one call per step, a fifth of the time goes to page faults on 140 MB. PyTorch is eager, with
diffusers' model and scheduler, ``torch.optim.Adam`` and one fused call for the average.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.bench.setting import Bench, has_torch
from scaling.bridge.export import save_pretrained
from scaling.diffusion.schedules import from_config
from scaling.models.model import Model, initialize
from scaling.training.spec import TrainSpec
from scaling.training.steps import (
    Batch,
    Examples,
    Networks,
    TrainState,
    advance,
    denoising_loss,
    initial_weights,
    start,
)
from sims.bench.timing import Row, compare, per_unit

__all__ = ["NETWORK", "RECIPE", "SCHEDULER", "train_step"]

NETWORK: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "in_channels": 1,
    "layers_per_block": 1,
    "out_channels": 1,
    "sample_size": 8,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
"""0.70 million parameters, attention at 4x4."""

SCHEDULER: dict[str, Any] = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
RECIPE = TrainSpec().recipe()
IMAGES, STEPS, QUICK_STEPS = 1024, 20, 2


class _Twin(NamedTuple):
    """The same training in PyTorch."""

    run: Callable[[], object]
    """Take as many steps as ours."""
    loss: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    """The loss of given images, timesteps and noise."""


def train_step(bench: Bench) -> Row:
    """Seconds per step, each the mean over ``STEPS`` in a row; ``difference`` is that of the losses of one batch."""
    steps = QUICK_STEPS if bench.quick else STEPS
    model = initial_weights(initialize(jax.random.key(0), NETWORK))
    networks = Networks(model.apply, None, from_config(SCHEDULER))
    images = np.random.default_rng(0).uniform(-1, 1, (IMAGES, *model.apply.inputs(np.float32)[0][0].shape[1:]))
    examples = Examples(jnp.asarray(images, jnp.float32), jnp.arange(IMAGES, dtype=jnp.int32))
    ours = _Ours(model, examples, networks, steps)
    notes: dict[str, Any] = {"steps": steps, "batch": RECIPE.batch_size}
    notes["parameters"] = sum(param.size for param in model.params.values())
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        twin = _torch_twin(pathlib.Path(folder), np.asarray(examples.images), steps) if has_torch() else None
    if twin is not None:
        batch = _batch(examples)
        expected = twin.loss(*map(np.asarray, batch[:3]))
        loss = float(jax.jit(denoising_loss, static_argnums=1)({"network": model.params}, networks, batch))
        notes |= {"rival": "diffusers", "difference": abs(loss - expected) / expected}
    measured = compare("train_step", ours, None if twin is None else twin.run, bench.repeats, notes=notes)
    return per_unit(measured, steps, steps)


class _Ours:
    """Training steps; every call continues where the last one ended."""

    def __init__(self, model: Model, examples: Examples, networks: Networks, steps: int) -> None:
        self.state = start({"network": model}, RECIPE)
        run = jax.jit(advance, static_argnames=("networks", "recipe", "max_steps"), donate_argnames=("state",))
        self.run: Callable[[TrainState], tuple[TrainState, jax.Array]] = functools.partial(
            run,
            key=jax.random.key(1),
            examples=examples,
            num_steps=steps,
            networks=networks,
            recipe=RECIPE,
            max_steps=steps,
        )

    def __call__(self) -> jax.Array:
        self.state, losses = self.run(self.state)
        return losses


def _batch(examples: Examples) -> Batch:
    random = np.random.default_rng(1)
    images = examples.images[: RECIPE.batch_size]
    times = random.integers(0, SCHEDULER["num_train_timesteps"], RECIPE.batch_size, np.int32)
    noise = random.standard_normal(images.shape, np.float32)
    return Batch(images, jnp.asarray(times), jnp.asarray(noise), None)


def _torch_twin(folder: pathlib.Path, images: np.ndarray, steps: int) -> _Twin:
    import diffusers
    import torch  # pyright: ignore[reportMissingImports]

    network, noising = (getattr(diffusers, config["_class_name"]) for config in (NETWORK, SCHEDULER))
    module = network.from_pretrained(folder, low_cpu_mem_usage=False).train()
    scheduler, data = noising.from_config(SCHEDULER), torch.from_numpy(images.copy())
    params = list(module.parameters())
    average = [param.detach().clone() for param in params]
    optimizer = torch.optim.Adam(params, lr=RECIPE.learning_rate)

    def loss(images: Any, times: Any, noise: Any) -> Any:
        out = module(scheduler.add_noise(images, noise, times), times).sample
        return torch.nn.functional.mse_loss(out, noise)

    def run() -> float:
        value = torch.tensor(0.0)
        for _ in range(steps):
            rows = torch.randint(len(data), (RECIPE.batch_size,))
            times = torch.randint(SCHEDULER["num_train_timesteps"], (RECIPE.batch_size,))
            batch = data[rows]
            value = loss(batch, times, torch.randn_like(batch))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - RECIPE.ema)
        return float(value.detach())

    def of_arrays(images: np.ndarray, times: np.ndarray, noise: np.ndarray) -> float:
        with torch.no_grad():
            tensors = [torch.from_numpy(np.array(part)) for part in (images, times.astype(np.int64), noise)]
            return float(loss(*tensors))

    return _Twin(run, of_arrays)
