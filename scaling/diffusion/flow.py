r"""Rectified flows :cite:`liu23`, as ``FlowMatchEulerDiscreteScheduler`` of diffusers describes them.

Noise and image are mixed along a straight line, and the network predicts its direction,

.. math:: x_t = (1 - s) \, x_0 + s \, \epsilon, \qquad v = \epsilon - x_0, \qquad s = t/T \in [0, 1]

Sampling is Euler's method from s = 1 to 0 with the levels moved by a ``shift`` m towards noise :cite:`esser24`,
section 5.3.2,

.. math:: s \mapsto \frac{m s}{1 + (m - 1) s}

No network that is loaded here is such a flow: a :class:`FlowSchedule` serves networks of one's own, by
:func:`scaling.diffusion.samplers.reverse`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float64

from dae_theory.checks import check_integer, is_concrete
from scaling.diffusion.tables import Calls, Solver
from scaling.models.config import Fields

__all__ = ["FlowSchedule", "add_noise", "from_config", "levels", "make_solver", "target"]

# Fields that other settings use, and those that are supported at one value only.
_INERT = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "time_shift_type")
_ONLY = (
    "invert_sigmas",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """T = ``num_train_timesteps`` and the ``shift`` m of a flow; static and hashable."""

    num_train_timesteps: int = 1000
    shift: float = 1.0


def from_config(config: Mapping[str, Any]) -> FlowSchedule:
    """Read a scheduler_config.json of ``FlowMatchEulerDiscreteScheduler``.

    ``ValueError`` names an unsupported class, field or value: a shift that depends on the size of the image, Karras',
    exponential or beta levels, stochastic steps.

    >>> from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    FlowSchedule(num_train_timesteps=1000, shift=3.0)
    """
    fields = Fields("scheduler", config)
    fields.only("_class_name", "FlowMatchEulerDiscreteScheduler")
    for name in _ONLY:
        fields.only(name, False, None)
    fields.only("shift_terminal", None)
    result = FlowSchedule(fields.integer("num_train_timesteps", 1000, maximum=1_000_000), fields.number("shift", 1.0))
    for name, value in config.items():
        if not (name in fields.read or name in _INERT or name.startswith("_")):
            raise fields.refusal(name, value, "this field is not supported")
    return result


def levels(schedule: FlowSchedule, num_steps: int) -> Float64[np.ndarray, " levels"]:
    """The levels s of a sampler's steps, (num_steps + 1,), from 1 to 0.

    As in diffusers the range is shifted first, and then the evenly spaced levels in it.
    """
    check_integer("num_steps", num_steps, minimum=1, maximum=schedule.num_train_timesteps)
    ends = _shifted(schedule, np.array([1.0, 1.0 / schedule.num_train_timesteps]))
    return np.append(_shifted(schedule, np.linspace(ends[0], ends[1], num_steps)), 0.0)


def make_solver(schedule: FlowSchedule, num_steps: int) -> Solver:
    """Euler's method with ``num_steps`` steps, for :func:`scaling.diffusion.samplers.reverse`.

    The network is called as ``(x_t, t, step)`` and returns v.
    """
    s = levels(schedule, num_steps)
    ones, zeros = np.ones(num_steps), np.zeros(num_steps)
    calls = Calls(
        t=s[:-1] * schedule.num_train_timesteps,
        step=np.arange(num_steps, dtype=np.int32),
        scale=ones,
        # The clean sample that v leads to; nothing is made of it.
        stored=np.stack([ones, -s[:-1]], axis=1),
        states=ones[:, None],
        history=zeros[:, None],
        output=np.diff(s),
        noise=zeros,
    )
    return Solver(calls, np.float64(1.0), num_steps, None, False)


def add_noise(
    schedule: FlowSchedule, x: Float[Array, "n ..."], noise: Float[Array, "n ..."], t: ArrayLike
) -> Float[Array, "n ..."]:
    """The batch between images x and ``noise`` at t in [0, T], a number or one per example; ``ValueError`` outside."""
    t = jnp.asarray(t, x.dtype)
    if t.shape not in ((), x.shape[:1]):
        raise ValueError(f"t must be one number or one per example, got shape {t.shape}.")
    if is_concrete(t) and not bool(jnp.all((t >= 0) & (t <= schedule.num_train_timesteps))):
        raise ValueError(f"t must lie in [0, {schedule.num_train_timesteps}], got {t}.")
    s = (t / schedule.num_train_timesteps).reshape(t.shape + (1,) * (x.ndim - 1) if t.ndim else ())
    return (1 - s) * x + s * noise


def target(x: Float[Array, "n ..."], noise: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """The network's target, v = ε − x₀, the same at every t."""
    return noise - x


def _shifted(schedule: FlowSchedule, s: np.ndarray) -> np.ndarray:
    return schedule.shift * s / (1 + (schedule.shift - 1) * s)
