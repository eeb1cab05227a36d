r"""Training of a denoising network, and of the text encoder that conditions it, on noised images :cite:`ho20`.

.. math:: L = E_{i, t, \epsilon} \| f(\sqrt{\bar\alpha_t}\, x_i + \sqrt{1 - \bar\alpha_t}\, \epsilon,\; t,\; c_i)
          - \mathrm{target} \|^2 / d

The target is ε, x or v, as the schedule says (:func:`scaling.diffusion.schedules.target`); i is a row of the training
set, in which an image may be repeated; t is uniform on the schedule's timesteps; with probability ``dropout`` the
condition c is the empty prompt or the null class :cite:`ho22`. All random numbers of example j at step s derive from
``fold_in(fold_in(key, s), j)``: a resumed run equals an uninterrupted one, and so do runs on any number of devices, to
rounding. Many steps run inside one compiled program (:func:`advance`); the batch may be sharded, and every device holds
the whole state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dae_theory.types import PRNGKey
from scaling.diffusion.schedules import Schedule, add_noise, target
from scaling.models.model import Apply, Model
from scaling.training.spec import Recipe

__all__ = [
    "Batch",
    "Examples",
    "Networks",
    "Recipe",
    "TrainState",
    "advance",
    "denoising_loss",
    "draw",
    "initial_weights",
    "optimizer",
    "start",
    "train_step",
]

Params: TypeAlias = dict[str, dict[str, Array]]
"""Parameters by name of each network, under ``"network"`` and, for text, ``"text_encoder"``."""

# PyTorch draws weights uniformly, with a third of the variance 1/fan-in of scaling.initialize.
WEIGHT_SCALE = 3**-0.5


class Networks(NamedTuple):
    """The networks that are trained, without their parameters; hashable."""

    network: Apply
    text_encoder: Apply | None
    schedule: Schedule


class Examples(NamedTuple):
    """The training set; a pytree."""

    images: Float[Array, "u c h w"]
    """The distinct images."""
    rows: Int[Array, " n"]
    """For each row of the training set the index of its image; repeated images have several rows."""
    condition: Int[Array, "u ..."] | None = None
    """For each image the token ids of its prompt, or its class."""
    null: Int[Array, " ..."] | None = None
    """The condition that replaces a dropped one."""


class Batch(NamedTuple):
    """The examples of one step."""

    images: Float[Array, "b c h w"]
    t: Int[Array, " b"]
    noise: Float[Array, "b c h w"]
    condition: Int[Array, "b ..."] | None


class TrainState(NamedTuple):
    """The state of a training; a pytree."""

    params: Params
    ema: Params
    """The moving average of the parameters; equal to them if the recipe has no average."""
    opt_state: Any
    step: Int[Array, ""]
    """Steps done."""


def initial_weights(model: Model) -> Model:
    """The model of :func:`scaling.initialize` with the variances that PyTorch's layers start from, 1/(3 fan in).

    In a DiT the modulation and output layers start at zero, so that every block is the identity :cite:`peebles23`.
    """
    specs, dit = model.apply.parameters(), model.apply.architecture == "dit"

    def scaled(name: str, value: Array) -> Array:
        if dit and name.removesuffix(".weight").endswith(("norm1.linear", "proj_out_1", "proj_out_2")):
            return jnp.zeros_like(value)
        return value * WEIGHT_SCALE if specs[name].kind in ("conv", "linear") else value

    return dataclasses.replace(model, params={name: scaled(name, value) for name, value in model.params.items()})


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam or AdamW with PyTorch's constants 0.9, 0.999 and ε = 1e-8, behind clipping and before warm-up."""
    rate: Any = recipe.learning_rate
    if recipe.warmup:
        # The count of the first step is 0, and its rate must not be.
        rate = lambda count: recipe.learning_rate * jnp.minimum(1.0, (count + 1) / recipe.warmup)  # noqa: E731
    parts = [
        optax.clip_by_global_norm(recipe.clip) if recipe.clip else None,
        optax.scale_by_adam(),
        optax.add_decayed_weights(recipe.weight_decay) if recipe.weight_decay else None,
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*[part for part in parts if part is not None])


def start(models: Mapping[str, Model], recipe: Recipe) -> TrainState:
    """The state before the first step of training ``models``, ``"network"`` and perhaps ``"text_encoder"``."""
    # The state will be donated: it must share no buffer with the models, nor params with ema.
    params = jax.tree.map(jnp.copy, {name: dict(model.params) for name, model in models.items()})
    # optax mixes Python scalars with the parameters' dtype, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer(recipe).init(params)
    return TrainState(params, jax.tree.map(jnp.copy, params), opt_state, jnp.zeros((), jnp.int32))


def draw(
    key: PRNGKey,
    examples: Examples,
    schedule: Schedule,
    recipe: Recipe,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Batch:
    """The batch of the step with this ``key``: rows drawn with replacement, timesteps, noise, dropped conditions."""

    def one(item: Int[Array, ""]) -> Batch:
        row_key, time_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(key, item), 4)
        image = examples.rows[jax.random.randint(row_key, (), 0, examples.rows.shape[0])]
        x = examples.images[image]
        t = jax.random.randint(time_key, (), 0, schedule.num_train_timesteps, jnp.int32)
        condition = None if examples.condition is None else examples.condition[image]
        if condition is not None and examples.null is not None and recipe.dropout:
            condition = jnp.where(jax.random.bernoulli(drop_key, recipe.dropout), examples.null, condition)
        return Batch(x, t, jax.random.normal(noise_key, x.shape, x.dtype), condition)

    items = jnp.arange(recipe.batch_size, dtype=jnp.int32)
    if sharding is None:
        return jax.vmap(one)(items)
    batch = jax.vmap(one)(jax.lax.with_sharding_constraint(items, sharding))
    return jax.tree.map(lambda part: jax.lax.with_sharding_constraint(part, sharding), batch)


def denoising_loss(params: Params, networks: Networks, batch: Batch) -> Float[Array, ""]:
    """The training objective: squared error per pixel and channel, averaged over the batch."""
    schedule, more = networks.schedule, {}
    if networks.text_encoder is not None:
        more["context"] = networks.text_encoder(params["text_encoder"], batch.condition)[0].hidden
    elif batch.condition is not None:
        more["class_labels"] = batch.condition
    noisy = add_noise(schedule, batch.images, batch.noise, batch.t)
    out = networks.network(params["network"], noisy, batch.t, **more)[0]
    return jnp.mean(jnp.square(out - target(schedule, batch.images, batch.noise, batch.t)))


def train_step(
    state: TrainState,
    key: PRNGKey,
    examples: Examples,
    networks: Networks,
    recipe: Recipe,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """The state one step later, and the loss before it.

    ``networks``, ``recipe`` and ``sharding``, over which the batch is split, are static.
    """
    batch = draw(jax.random.fold_in(key, state.step), examples, networks.schedule, recipe, sharding)
    loss, gradient = jax.value_and_grad(denoising_loss)(state.params, networks, batch)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer(recipe).update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        # A shorter memory at first, as in diffusers, lest the average stay near the initial weights.
        decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step)) if recipe.ema else 0.0
        ema = jax.tree.map(lambda e, p: (p + decay * (e - p)).astype(p.dtype), state.ema, params)
    following = TrainState(params, ema, opt_state, state.step + 1)
    if sharding is not None:
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        following = jax.lax.with_sharding_constraint(following, whole)
    return following, loss


def advance(
    state: TrainState,
    key: PRNGKey,
    examples: Examples,
    num_steps: Int[Array, ""] | int,
    networks: Networks,
    recipe: Recipe,
    max_steps: int,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[TrainState, Float[Array, " max_steps"]]:
    """The state after ``num_steps`` more steps, at most ``max_steps``, and the loss before each (NaN after the last).

    ``num_steps`` may be traced, so that one program serves every number. The other arguments are those of
    :func:`train_step`. A run that diverges returns losses that are not finite: an outcome, not an error.
    """

    def step(i: Int[Array, ""], carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, loss = train_step(carry[0], key, examples, networks, recipe, sharding)
        return state, carry[1].at[i].set(loss)

    losses = jnp.full((max_steps,), math.nan, examples.images.dtype)
    return jax.lax.fori_loop(0, num_steps, step, (state, losses))
