r"""Training of the autoencoder on the paper's objective :cite:`zhang26`, eq. (6), with fresh noise at every step.

.. math:: L = \frac1n \sum_i E_\epsilon \|f(x_i + \sigma\epsilon) - x_i\|^2 + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2)

A step takes one noise draw for each row. Everything random at step t comes from ``fold_in(key, t)``, and row i's noise
from ``fold_in(..., i)``: two runs with the same key see the same noise on the same rows, whatever σ, λ or n (common
random numbers), and a resumed run equals an undisturbed one. Numbers (σ, λ, learning rate) are traced; names and sizes
are static.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dae_theory import ReluDae
from dae_theory import model as dae_model
from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive
from dae_theory.types import PRNGKey, Scalar
from sims.sweeps.spec import OPTIMIZERS, SCHEDULES

__all__ = [
    "Recipe",
    "TrainState",
    "advance",
    "as_dae",
    "in_turn",
    "noisy_objective",
    "optimizer",
    "penalty_from_weight_decay",
    "start",
]


class Recipe(NamedTuple):
    """The static part of a training run; hashable, so ``jit`` can key on it."""

    width: int
    optimizer: str = "adam"
    schedule: str = "constant"
    steps: int = 2000
    """Length of the learning-rate schedule."""
    batch_size: int = 0
    """Rows a step, drawn with replacement; 0, or at least n, is the full batch."""
    tied: bool = False
    weight_decay: float = 0.0
    """Decoupled; adamw only."""


class TrainState(NamedTuple):
    """What a run carries from step to step; a pytree."""

    params: ReluDae | Float[Array, "d p"]
    """The weights; one matrix if tied."""
    opt_state: Any
    step: Int[Array, ""]

    @property
    def dae(self) -> ReluDae:
        """The network, tied or not."""
        return as_dae(self.params)


def as_dae(params: ReluDae | Float[Array, "d p"]) -> ReluDae:
    """The network of free or tied parameters."""
    return params if isinstance(params, ReluDae) else ReluDae(params, params)


def penalty_from_weight_decay(weight_decay: Scalar, dim: int, *, parameters: str = "free") -> Scalar:
    r"""The objective's λ that a training script's coupled ``weight_decay`` stands for (derived here).

    Such scripts average the squared error over the d pixels too, and the optimizer adds ``weight_decay · W`` to the
    gradient: ∇(d · loss) = ∇ squared error + d · weight_decay · W, to be compared with 2λ W for each free matrix, 4λ W
    for a tied one:

    .. math:: \lambda = d\,w/2 \text{ (free)}, \qquad \lambda = d\,w/4 \text{ (tied)}

    ``parameters="shared"``, two registered parameters over one memory, each with its own decay, is again d w/2.
    Decoupled decay (AdamW) has no equivalent.
    """
    check_nonnegative("weight_decay", weight_decay)
    check_integer("dim", dim, minimum=1)
    factors = {"free": 0.5, "shared": 0.5, "tied": 0.25}
    if parameters not in factors:
        raise ValueError(f"parameters must be one of {', '.join(factors)}; got {parameters!r}.")
    return factors[parameters] * dim * weight_decay


def optimizer(recipe: Recipe, learning_rate: Scalar) -> optax.GradientTransformation:
    """The optimizer by name, with PyTorch's constants: momentum 0.9; rmsprop 0.99; adam 0.9, 0.999; ε = 1e-8."""
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {recipe.optimizer!r}.")
    if recipe.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {recipe.schedule!r}.")
    rule = {
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(decay=0.9),
        "rmsprop": lambda: optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
        "adam": optax.scale_by_adam,
        "adamw": lambda: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay)),
    }[recipe.optimizer]()
    if recipe.schedule == "constant":
        return optax.chain(rule, optax.scale(-learning_rate))
    decay = optax.cosine_decay_schedule(1.0, recipe.steps)
    return optax.chain(rule, optax.scale_by_schedule(lambda count: -learning_rate * decay(count)))


def start(
    key: PRNGKey, dim: int, recipe: Recipe, *, learning_rate: Scalar, init_scale: Scalar, dtype: Any = jnp.float32
) -> TrainState:
    """State before the first step: columns of norm about ``init_scale``, W₁ = W₂.

    ``ValueError`` for an unknown optimizer or schedule and for a learning rate or scale that is not positive.
    """
    check_positive("learning_rate", learning_rate)
    check_positive("init_scale", init_scale)
    dae = dae_model.init(key, dim, recipe.width, scale=init_scale, dtype=dtype)
    # Two buffers, or donating the state would donate one twice.
    params = dae.w1 if recipe.tied else ReluDae(dae.w1, jnp.copy(dae.w2))
    # Optax moments start as zeros of the parameters' type; python scalars inside it mix types on purpose.
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer(recipe, learning_rate).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def noisy_objective(
    params: ReluDae | Float[Array, "d p"],
    batch: Float[Array, "b d"],
    eps: Float[Array, "b d"],
    sigma: Scalar,
    penalty: Scalar,
) -> Float[Array, ""]:
    r"""One-draw estimate of the objective :cite:`zhang26`, eq. (6), on given rows and noise; unbiased in ``eps``.

    Its gradient is what a step follows. Matrix products run at the backend's default precision, as in common training
    code.
    """
    dae = as_dae(params)
    residual = jax.nn.relu((batch + sigma * eps) @ dae.w1) @ dae.w2.T - batch
    decay = jnp.sum(jnp.square(dae.w1)) + jnp.sum(jnp.square(dae.w2))
    return jnp.mean(jnp.sum(jnp.square(residual), axis=-1)) + penalty * decay


def advance(
    state: TrainState,
    key: PRNGKey,
    data: Float[Array, "n d"],
    num_steps: Int[Array, ""] | int,
    recipe: Recipe,
    *,
    sigma: Scalar,
    penalty: Scalar,
    learning_rate: Scalar,
) -> TrainState:
    """The state ``num_steps`` (traced or not) later; ``recipe`` is static.

    ``ValueError`` for data that :func:`dae_theory.checks.check_data` refuses, σ <= 0 or λ < 0. A run that diverges
    returns non-finite weights: an outcome, not an error.
    """
    check_data(data)
    check_positive("sigma", sigma)
    check_nonnegative("penalty", penalty)

    def update(
        params: Any, opt_state: Any, batch: Array, eps: Array, sigma: Scalar, penalty: Scalar, learning_rate: Scalar
    ) -> tuple[Any, Any]:
        gradient = jax.grad(noisy_objective)(params, batch, eps, sigma, penalty)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer(recipe, learning_rate).update(gradient, opt_state, params)
            return jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), opt_state

    rows, dim = data.shape
    if in_turn(min(recipe.batch_size or rows, rows), dim, recipe.width, jax.default_backend()):
        update = jax.custom_batching.sequential_vmap(update)

    def step(_: Int[Array, ""], state: TrainState) -> TrainState:
        # Nothing of the draw is a cell's own: mapped over cells, it is made once for all of them.
        batch, eps = _draw(jax.random.fold_in(key, state.step), data, recipe.batch_size)
        params, opt_state = update(state.params, state.opt_state, batch, eps, sigma, penalty, learning_rate)
        return TrainState(params, opt_state, state.step + 1)

    return jax.lax.fori_loop(0, num_steps, step, state)


def in_turn(batch: int, dim: int, width: int, backend: str) -> bool:
    """Whether cells that are mapped together take each step one after the other, and not side by side.

    On a CPU the activations of one large cell fill the cache, and those of many do not fit; small cells, and
    accelerators, gain from one large operation instead. Measured once with 20 cells of d = p = 64 on 2 cores: in turn
    takes 1.4 times as long at 8 and 1.3 times at 64 rows a step, 0.9 at 512 and 0.6 at 1,024.
    """
    return backend == "cpu" and batch * (dim + width) >= 1 << 16


def _draw(key: PRNGKey, data: Float[Array, "n d"], batch_size: int) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Rows of one step and their noise."""
    rows_key, noise_key = jax.random.split(key)
    num_rows, dim = data.shape
    small = 0 < batch_size < num_rows
    batch = data[jax.random.randint(rows_key, (batch_size,), 0, num_rows)] if small else data
    keys = jax.vmap(lambda i: jax.random.fold_in(noise_key, i))(jnp.arange(batch.shape[0]))
    return batch, jax.vmap(lambda k: jax.random.normal(k, (dim,), data.dtype))(keys)
