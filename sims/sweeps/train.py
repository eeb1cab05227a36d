r"""Training of the autoencoder on the paper's objective :cite:`zhang26`, eq. (6), with fresh noise at every step.

.. math:: L = \frac1n \sum_i E_\epsilon \|f(x_i + \sigma\epsilon) - x_i\|^2 + \lambda (\|W_1\|_F^2 + \|W_2\|_F^2)

A step takes one noise draw for each row. All randomness of step t comes from ``fold_in(key, t)``, and the noise of the
step's i-th row from ``fold_in(..., i)``: two runs with the same key have the same noise on the same rows, whatever σ or
λ (common random numbers), and a resumed run equals an uninterrupted one. With full batches this also holds for
different n; the rows of a mini-batch are drawn among n, so there the i-th noise falls on another row when n changes.
Numbers (σ, λ, learning rate) are traced; names and sizes are static.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dae_theory import AffineDae, ReluDae
from dae_theory import model as dae_model
from dae_theory.checks import check_data, check_integer, check_nonnegative, check_positive
from dae_theory.model import Dae, with_biases
from dae_theory.types import PRNGKey, Scalar
from sims.sweeps.spec import OPTIMIZERS, SCHEDULES

__all__ = [
    "Parameters",
    "Recipe",
    "Tied",
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
    """The static part of a training run; hashable, as ``jit`` requires."""

    width: int
    optimizer: str = "adam"
    schedule: str = "constant"
    steps: int = 2000
    """Length of the learning-rate schedule."""
    batch_size: int = 0
    """Rows of a step, drawn with replacement; 0, or at least n, is the full batch."""
    tied: bool = False
    biases: bool = False
    weight_decay: float = 0.0
    """Decoupled weight decay, for adamw only; of biases too."""


class Tied(NamedTuple):
    """The parameters of a tied network with biases, W₁ = W₂; a pytree."""

    w: Float[Array, "d p"]
    b1: Float[Array, " p"]
    b2: Float[Array, " d"]


Parameters: TypeAlias = ReluDae | AffineDae | Tied | Float[Array, "d p"]
"""What is trained: a network, or one matrix, and biases, if W₁ = W₂."""


class TrainState(NamedTuple):
    """The state of a training run between steps; a pytree."""

    params: Parameters
    """The weights and biases; one matrix if tied without biases."""
    opt_state: Any
    step: Int[Array, ""]

    @property
    def dae(self) -> Dae:
        """The network, tied or not."""
        return as_dae(self.params)


def as_dae(params: Parameters) -> Dae:
    """The network of free or tied parameters."""
    if isinstance(params, Tied):
        return AffineDae(params.w, params.b1, params.w, params.b2)
    return params if isinstance(params, (ReluDae, AffineDae)) else ReluDae(params, params)


def penalty_from_weight_decay(weight_decay: Scalar, dim: int, *, parameters: str = "free") -> Scalar:
    r"""The λ of the objective that corresponds to a training script's coupled ``weight_decay`` (derived here).

    Such scripts also average the squared error over the d pixels, and the optimizer adds ``weight_decay · W`` to the
    gradient: ∇(d · loss) = ∇ squared error + d · weight_decay · W. In the objective's gradient the last term is 2λ W
    for each free matrix and 4λ W for a tied one:

    .. math:: \lambda = d\,w/2 \text{ (free)}, \qquad \lambda = d\,w/4 \text{ (tied)}

    ``parameters="shared"`` (two registered parameters that share memory, each with its own decay) is d w/2 again.
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
    """State before the first step: columns of norm about ``init_scale``, W₁ = W₂, biases of zero.

    Args:
        key: of the weights.
        dim: data dimension d.
        recipe: the static part.
        learning_rate: step size of the optimizer.
        init_scale: about the norm of a column.
        dtype: of the weights.

    ``ValueError`` for an unknown optimizer or schedule and for a learning rate or scale that is not positive.
    """
    check_positive("learning_rate", learning_rate)
    check_positive("init_scale", init_scale)
    dae = dae_model.init(key, dim, recipe.width, scale=init_scale, dtype=dtype)
    # Two buffers: donating a state with one buffer twice is an error.
    params: Parameters = dae.w1 if recipe.tied else ReluDae(dae.w1, jnp.copy(dae.w2))
    if recipe.biases:
        _, b1, _, b2 = with_biases(dae)
        params = Tied(dae.w1, b1, b2) if recipe.tied else AffineDae(dae.w1, b1, jnp.copy(dae.w2), b2)
    # Python scalars inside optax mix types, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer(recipe, learning_rate).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def noisy_objective(
    params: Parameters,
    batch: Float[Array, "b d"],
    eps: Float[Array, "b d"],
    sigma: Scalar,
    penalty: Scalar,
) -> Float[Array, ""]:
    r"""One-draw estimate of the objective :cite:`zhang26`, eq. (6), on given rows and noise; unbiased over ``eps``.

    Training steps follow its gradient. Matrix products use the backend's default precision, as in common training
    code.
    """
    dae = as_dae(params)
    preactivations = (batch + sigma * eps) @ dae.w1
    if isinstance(dae, AffineDae):
        residual = jax.nn.relu(preactivations + dae.b1[None, :]) @ dae.w2.T - (batch - dae.b2[None, :])
    else:
        residual = jax.nn.relu(preactivations) @ dae.w2.T - batch
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
    """The state after ``num_steps`` more steps.

    Args:
        state: the present state.
        key: of all steps: step t uses ``fold_in(key, t)``.
        data: training rows.
        num_steps: traced or static.
        recipe: the static part.
        sigma: noise level.
        penalty: λ of the objective.
        learning_rate: step size of the optimizer.

    ``ValueError`` for data that :func:`dae_theory.checks.check_data` refuses, σ <= 0 or λ < 0. A run that diverges
    returns nonfinite weights and raises nothing.
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
        # The draw does not depend on the cell: under vmap it is computed once for all cells.
        batch, eps = _draw(jax.random.fold_in(key, state.step), data, recipe.batch_size)
        params, opt_state = update(state.params, state.opt_state, batch, eps, sigma, penalty, learning_rate)
        return TrainState(params, opt_state, state.step + 1)

    return jax.lax.fori_loop(0, num_steps, step, state)


def in_turn(batch: int, dim: int, width: int, backend: str) -> bool:
    """Whether mapped cells take a step one after the other instead of side by side (``vmap``).

    On a CPU the activations of one large cell fill the cache, so those of many cells side by side do not fit. Small
    cells, and all cells on accelerators, gain from one large operation. Measured with 20 cells of d = p = 64 on 2
    cores: in turn takes 1.4 times as long at 8 rows a step, 1.3 at 64, 0.9 at 512 and 0.6 at 1,024.
    """
    return backend == "cpu" and batch * (dim + width) >= 1 << 16


def _draw(key: PRNGKey, data: Float[Array, "n d"], batch_size: int) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """The rows of one step and their noise."""
    rows_key, noise_key = jax.random.split(key)
    num_rows, dim = data.shape
    small = 0 < batch_size < num_rows
    batch = data[jax.random.randint(rows_key, (batch_size,), 0, num_rows)] if small else data
    keys = jax.vmap(lambda i: jax.random.fold_in(noise_key, i))(jnp.arange(batch.shape[0]))
    return batch, jax.vmap(lambda k: jax.random.normal(k, (dim,), data.dtype))(keys)
