r"""Sampling: one ``lax.scan`` over a solver's table, with guidance, and edits that change from step to step.

:func:`reverse` runs any function ``(x, t, step) -> output``, :func:`sample` a loaded model. Item i of a batch draws all
its noise from ``fold_in(key, i)``: a larger batch extends a smaller one, and batches may be split anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from dae_theory.checks import check_integer
from dae_theory.types import PRNGKey
from scaling.diffusion.noise import noise_at
from scaling.diffusion.schedules import Schedule, with_method
from scaling.diffusion.solvers import make_solver
from scaling.diffusion.tables import Bound, Calls, Solver, Table
from scaling.models.layers import sinusoidal_embedding
from scaling.models.model import Condition, Model
from scaling.models.taps import Edit, Edits, each_edit

__all__ = ["ModelFn", "Samples", "guidance_channels", "guidance_embedding", "guided", "reverse", "sample"]

ModelFn: TypeAlias = Callable[[Array, Array, Array], Any]
"""``(x, t, step) -> output`` for a batch x at timestep t; ``step`` in [0, num_steps) indexes what varies by step."""


class Samples(NamedTuple):
    """Samples, and what was recorded on the way.

    ``states`` and ``taps`` have one entry per call of the model (``solver.calls.step`` has the step of each call);
    unless asked for, ``states`` is None and ``taps`` is empty.
    """

    x: Float[Array, "n ..."]
    states: Float[Array, "calls n ..."] | None
    taps: Any


def reverse(
    key: PRNGKey,
    model_fn: ModelFn,
    solver: Solver,
    shape: Sequence[int],
    *,
    guidance: ArrayLike | None = None,
    init: Float[Array, "n ..."] | None = None,
    first: ArrayLike = 0,
    trajectory: bool = False,
    has_aux: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Samples:
    r"""Run the reverse process of ``solver`` from noise to samples; wrap it in ``jax.jit``.

    Under differentiation, calls of the model are recomputed in the backward pass, so memory grows by one state per
    call.

    Args:
        key: item i draws its noise from ``noise_at(key, first + i, call)``, ``call`` 0 being the start.
        model_fn: takes the variance-preserving x, whatever the solver's convention, and returns an output of x's shape.
        solver: from :func:`scaling.diffusion.solvers.make_solver`.
        shape: of the samples, (n, ...).
        guidance: a number or one per step; ``model_fn`` is then called on 2n examples, the unconditional half first,
            see :func:`guided`.
        init: unit noise of ``shape`` that replaces the draw at the start.
        first: number of the first item.
        trajectory: whether to return the state after every call.
        has_aux: whether ``model_fn`` also returns a pytree, which is stacked over calls as ``taps``.
        dtype: of the states and the noise.
    """
    shape = tuple(shape)
    solver = jax.tree.map(lambda table: _cast(table, dtype), solver)
    first = jnp.asarray(first)
    items = first + jnp.arange(shape[0], dtype=first.dtype)
    draw = functools.partial(_draw, key, items, shape=shape[1:], dtype=dtype)
    if init is not None and init.shape != shape:
        raise ValueError(f"init must have the shape of the samples, {shape}, got {init.shape}.")
    start = jnp.asarray(solver.start) * (draw(0) if init is None else init.astype(dtype))
    model = model_fn
    if guidance is not None:
        model = guided(model_fn, _per_step("guidance", guidance, solver.num_steps), has_aux=has_aux)

    def call(carry: tuple[Any, Any], row: tuple[Array, Calls]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        number, now = row
        states, history = carry
        result = model(now.scale * states[0], now.t, now.step)
        out, aux = result if has_aux else (result, {})
        if out.shape != shape:
            raise ValueError(f"the model must return outputs of its input's shape, {shape}, got {out.shape}.")
        out = out.astype(dtype)
        stored = _bounded(now.stored[0] * states[0] + now.stored[1] * out, solver.bound)
        history = (stored, *history)
        x = _weighted(now.states, states) + _weighted(now.history, history) + now.output * out
        if solver.stochastic:
            x = x + now.noise * draw(number)
        return ((x, *states[:-1]), history[:-1]), (x if trajectory else None, aux)

    blank = jnp.zeros(shape, dtype)
    past_states, past_stored = (table.shape[1] - 1 for table in (solver.calls.states, solver.calls.history))
    carry = ((start, *[blank] * past_states), (blank,) * past_stored)
    numbers = 1 + jnp.arange(solver.calls.t.size)
    ((x, *_), _), (states, taps) = jax.lax.scan(jax.checkpoint(call, prevent_cse=False), carry, (numbers, solver.calls))
    return Samples(x, states, taps)


def guided(model_fn: ModelFn, guidance: Array, *, has_aux: bool = False) -> ModelFn:
    r"""Classifier-free guidance :cite:`ho22`, by one call on both halves, ``[unconditional; conditional]``.

    .. math:: o = o_\text{uncond} + g \, (o_\text{cond} - o_\text{uncond})

    ``guidance`` g has shape () or (steps,); 0 is unconditional, 1 conditional. ``model_fn`` is called on 2n examples,
    each x twice; the pytree that it also returns (``has_aux``) covers both halves.
    """

    def model(x: Array, t: Array, step: Array) -> Any:
        result = model_fn(jnp.concatenate([x, x]), t, step)
        out, aux = result if has_aux else (result, None)
        # In half precision, the difference of the halves would lose the digits that guidance amplifies.
        unconditional, conditional = jnp.split(out.astype(x.dtype), 2)
        g = (guidance if guidance.ndim == 0 else guidance[step]).astype(x.dtype)
        combined = unconditional + g * (conditional - unconditional)
        return (combined, aux) if has_aux else combined

    return model


def sample(
    key: PRNGKey,
    model: Model,
    schedule: Schedule,
    num: int,
    num_steps: int,
    *,
    method: str | None = None,
    eta: float = 0.0,
    condition: Condition | None = None,
    unconditional: Condition | None = None,
    guidance: ArrayLike | None = None,
    edits: Edits | None = None,
    capture: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    init: Float[Array, "n c h w"] | None = None,
    first: ArrayLike = 0,
    trajectory: bool = False,
) -> Samples:
    """Samples (num, C, H, W) of a model, in float32; latents if it is a latent model.

    Compiles once per model architecture, shapes, number of calls and set of taps; other keys, schedules, conditions,
    guidance, and values and strengths of edits do not recompile. Raises ``ValueError`` if only one of ``guidance`` and
    ``unconditional`` is given, and for a strength whose length is not ``num_steps``.

    A network that takes the guidance scale as an embedding (``time_cond_proj_dim``, as latent consistency models do)
    is called on the condition alone, with :func:`guidance_embedding` of ``guidance``, and ``unconditional`` is not
    used; ``ValueError`` if neither ``guidance`` nor ``condition.added["timestep_cond"]`` is given.

    Args:
        key: item i draws its noise from ``fold_in(key, first + i)``.
        model: a denoising network.
        schedule: its noise schedule, with the method's settings.
        num: number of samples.
        num_steps: number of steps of the solver.
        method: see :func:`scaling.diffusion.schedules.with_method`; by default the schedule's own.
        eta: see :func:`scaling.diffusion.solvers.make_solver`.
        condition: what the samples are conditioned on, of batch size ``num`` or 1.
        unconditional: the other half of guidance, of batch size ``num`` or 1.
        guidance: scale of classifier-free guidance, a number or one per step.
        edits: act at the model's taps. A strength is a number or has the steps as its first axis, (steps,) or
            (steps, ...) followed by what ``Edit`` takes, so that windows and ramps in time are strengths. With
            ``guidance`` the unconditional half of the batch comes first: a strength (steps, 2 num) addresses each half.
        capture: taps whose activations are returned for every call, after edits, and for both halves.
        size: height and width of the images; by default the model's own.
        init: unit noise (num, C, H, W) that replaces the draw at the start.
        first: number of the first item.
        trajectory: whether to return the state after every call.

    >>> import jax, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> schedule = scaling.diffusion.schedules.from_config({"_class_name": "DDIMScheduler"})
    >>> scaling.sample(jax.random.key(1), model, schedule, num=2, num_steps=3).x.shape
    (2, 3, 4, 4)
    """
    solver = make_solver(with_method(schedule, method), num_steps, eta=eta)
    check_integer("num", num, minimum=1)
    embeds = guidance_channels(model)
    if (guidance is None) != (unconditional is None) and not embeds:
        raise ValueError("guidance and unconditional go together: give both, or neither.")
    condition = condition or Condition()
    if embeds:
        condition = _with_guidance(condition, guidance, embeds)
        guidance = unconditional = None
    halves = (condition,) if unconditional is None else (unconditional, condition)
    shape = (num, *_image_shape(model, size))
    strengths = {name: _strengths(name, edit, num_steps) for name, edit in (edits or {}).items()}
    if guidance is not None:
        guidance = _cast(_per_step("guidance", guidance, num_steps), jnp.float32)
    joined = _joined(halves, num)
    return _sample(key, model, solver, joined, guidance, strengths, init, first, shape, tuple(capture), trajectory)


@functools.partial(jax.jit, static_argnames=("shape", "capture", "trajectory"))
def _sample(
    key: PRNGKey,
    model: Model,
    solver: Solver,
    condition: Condition,
    guidance: Array | None,
    edits: Mapping[str, tuple[Edit, ...]],
    init: Array | None,
    first: ArrayLike,
    shape: tuple[int, ...],
    capture: tuple[str, ...],
    trajectory: bool,
) -> Samples:
    def model_fn(x: Array, t: Array, step: Array) -> tuple[Array, dict[str, Array]]:
        now = {name: tuple(_at(edit, step) for edit in several) for name, several in edits.items()}
        out, taps = model.apply(model.params, x, t, **condition._asdict(), capture=capture, edits=now)
        # Models that also return a variance have it in their last channels.
        return out[:, : shape[1]], taps

    return reverse(
        key, model_fn, solver, shape, guidance=guidance, init=init, first=first, trajectory=trajectory, has_aux=True
    )


def guidance_channels(model: Model) -> int | None:
    """Channels of the embedding in which a network takes the guidance scale; None if it takes none."""
    return getattr(model.config, "time_condition", None)


def guidance_embedding(guidance: ArrayLike, channels: int) -> Float[Array, "1 c"]:
    r"""The embedding of a guidance scale g for networks that were distilled with one :cite:`meng23`.

    .. math:: (\sin \omega_j w, \cos \omega_j w), \qquad w = 1000 (g - 1), \qquad \omega_j = 10^{-4 j / (c/2 - 1)}
    """
    w = 1000 * (jnp.asarray(guidance, jnp.float32)[None] - 1)
    return sinusoidal_embedding(w, channels, flip_sin_to_cos=False, freq_shift=1)


def _with_guidance(condition: Condition, guidance: ArrayLike | None, channels: int) -> Condition:
    added = dict(condition.added or {})
    if "timestep_cond" in added:
        return condition
    if guidance is None or jnp.ndim(guidance):
        raise ValueError(
            "the network takes the guidance scale as an embedding (time_cond_proj_dim, as in latent consistency "
            "models), so guidance must be one number; give guidance=, or added['timestep_cond'] of the Condition."
        )
    return condition._replace(added=added | {"timestep_cond": guidance_embedding(guidance, channels)})


def _cast(table: ArrayLike, dtype: DTypeLike) -> Array:
    table = jnp.asarray(table)
    return table if jnp.issubdtype(table.dtype, jnp.integer) else table.astype(dtype)


def _draw(key: PRNGKey, items: Array, call: ArrayLike, *, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.vmap(lambda item: noise_at(key, item, call, shape, dtype))(items)


def _per_step(name: str, values: ArrayLike, num_steps: int) -> Array:
    values = jnp.asarray(values)
    if values.shape not in ((), (num_steps,)):
        raise ValueError(f"{name} must be a number or one per step, shape ({num_steps},), got {values.shape}.")
    return values


def _bounded(x: Array, bound: Bound | None) -> Array:
    if bound is None:
        return x
    if bound.quantile is None:
        return jnp.clip(x, -bound.limit, bound.limit)
    magnitude = jnp.abs(x).reshape(x.shape[0], -1)
    s = jnp.clip(jnp.quantile(magnitude, bound.quantile, axis=1), 1.0, bound.limit)
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.clip(x, -s, s) / s


def _weighted(weights: Table, terms: tuple[Array, ...]) -> Array:
    return functools.reduce(jnp.add, [weights[j] * term for j, term in enumerate(terms)])


def _image_shape(model: Model, size: tuple[int, int] | None) -> tuple[int, int, int]:
    (x, *_), _ = model.apply.inputs(jnp.float32)
    _, channels, height, width = x.shape
    return (channels, *size) if size is not None else (channels, height, width)


def _joined(halves: tuple[Condition, ...], num: int) -> Condition:
    if len({jax.tree.structure(half) for half in halves}) > 1:
        raise ValueError(
            "condition and unconditional must give the same inputs; one of them lacks an input of the other."
        )

    def join(*values: ArrayLike) -> Array:
        arrays = [jnp.asarray(value) for value in values]
        if any(array.ndim == 0 or array.shape[0] not in (1, num) for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(f"conditions need a batch axis of size {num} or 1 first, got shapes {shapes}.")
        return jnp.concatenate([jnp.broadcast_to(array, (num, *array.shape[1:])) for array in arrays])

    return jax.tree.map(join, *halves)


def _strengths(name: str, edits: Edit | Sequence[Edit], num_steps: int) -> tuple[Edit, ...]:
    return tuple(_each_step(name, edit, num_steps) for edit in each_edit(name, edits))


def _each_step(name: str, edit: Edit, num_steps: int) -> Edit:
    # Always one dtype: otherwise a Python number and an array would compile separately.
    strength = jnp.asarray(edit.strength).astype(jnp.float32)
    if strength.ndim and strength.shape[0] != num_steps:
        raise ValueError(
            f"edit of {name!r}: in sampling a strength is a number or has the steps first, ({num_steps}, ...); "
            f"got shape {strength.shape}."
        )
    value = jnp.asarray(edit.value).astype(jnp.float32)
    return Edit(edit.kind, value, strength if strength.ndim else jnp.broadcast_to(strength, (num_steps,)))


def _at(edit: Edit, step: Array) -> Edit:
    return Edit(edit.kind, edit.value, jnp.asarray(edit.strength)[step])
