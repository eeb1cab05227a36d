r"""The row ``train_step``: one step of training a small UNet on 8x8 images, beside PyTorch's from the same weights.

A step is drawing rows, timesteps and noise, adding the noise, the loss of ε and its gradient, Adam, and the running
average. Ours takes many steps in one program, whose memory is allocated once (:func:`scaling.training.advance`): at one
call a step a fifth of the time goes to the pages of 140 MB. PyTorch is eager, on its default number of threads, with
diffusers' model and scheduler, ``torch.optim.Adam`` and one fused call for the average.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

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

__all__ = ["NETWORK", "RECIPE", "SCHEDULER", "Rival", "Twin", "training_step"]

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


class Twin(NamedTuple):
    """The same elsewhere."""

    run: Callable[[], object]
    """So many steps in a row."""
    loss: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    """Of given images, timesteps and noise."""


Rival: TypeAlias = Callable[[pathlib.Path, np.ndarray, int], Twin | None]
"""From the folder of the network, the images and the number of steps to the twin, if there is one."""


def training_step(rival: Rival, repeats: int, quick: bool) -> Row:
    """Seconds a step, each the mean over ``STEPS`` in a row; ``difference`` is that of the losses of one batch."""
    steps = QUICK_STEPS if quick else STEPS
    model = initial_weights(initialize(jax.random.key(0), NETWORK))
    networks = Networks(model.apply, None, from_config(SCHEDULER))
    images = np.random.default_rng(0).uniform(-1, 1, (IMAGES, *model.apply.inputs(np.float32)[0][0].shape[1:]))
    examples = Examples(jnp.asarray(images, jnp.float32), jnp.arange(IMAGES, dtype=jnp.int32))
    ours = _Ours(model, examples, networks, steps)
    notes: dict[str, Any] = {"steps": steps, "batch": RECIPE.batch_size}
    notes["parameters"] = sum(param.size for param in model.params.values())
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        twin = rival(pathlib.Path(folder), np.asarray(examples.images), steps)
    if twin is not None:
        batch = _batch(examples)
        expected = twin.loss(*map(np.asarray, batch[:3]))
        found = float(jax.jit(denoising_loss, static_argnums=1)({"network": model.params}, networks, batch))
        notes |= {"rival": "diffusers", "difference": abs(found - expected) / expected}
    found = compare("train_step", ours, None if twin is None else twin.run, repeats, notes=notes)
    return per_unit(found, steps, steps)


class _Ours:
    """Steps in a row; every call goes on where the last ended."""

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
