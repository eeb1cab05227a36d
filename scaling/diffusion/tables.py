r"""Every sampler as a table: a linear multistep method with one row of coefficients per call of the model.

With x_s the state before call s, o_s the model's output and q_s the quantity that the method stores for later calls,

.. math:: o_s = \mathrm{model}(\text{scale}_s x_s, t_s), \qquad
          q_s = \mathrm{bound}\left(k_{s0} x_s + k_{s1} o_s\right), \qquad
          x_{s+1} = \sum_j A_{sj} x_{s-j} + \sum_j B_{sj} q_{s-j} + g_s o_s + c_s \epsilon_s

and x_0 = ``start`` ε. As in diffusers, states of Euler, Heun and LMS are variance exploding, and those of the others
variance preserving; q is the clean sample x̂₀ (PNDM: the output, LMS: the derivative). Coefficients are
computed in float64 on the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from flax import struct

from scaling.diffusion.denoisers import clean_weights
from scaling.diffusion.schedules import Schedule

__all__ = ["Bound", "Calls", "Solver", "Table", "clean", "levels", "solver_of", "start_scale"]

Table: TypeAlias = Any
"""A NumPy array when a solver is made, and a JAX array when it is traced."""


class Calls(NamedTuple):
    """The rows of a solver's table, one per call of the model; ``stored`` is k above, ``states`` A, ``history`` B.

    ``output`` is g, and ``noise`` c. J and K are as small as the method allows. ``step`` in [0, num_steps) is the step
    that a call belongs to: Heun calls the model twice per step; PNDM twice in its first step, or four times in each of
    its first three.
    """

    t: Table  # (calls,), integers if all timesteps are
    step: Table  # (calls,)
    scale: Table  # (calls,)
    stored: Table  # (calls, 2)
    states: Table  # (calls, J)
    history: Table  # (calls, K)
    output: Table  # (calls,)
    noise: Table  # (calls,)


class Bound(NamedTuple):
    """How x̂₀ is bounded: it is clipped to ±``limit``.

    With a ``quantile`` it is clipped to ±s and divided by s, where s is that quantile of its magnitude, per example,
    clipped to [1, ``limit``] :cite:`saharia22`, section 2.3.
    """

    limit: float
    quantile: float | None


@struct.dataclass
class Solver:
    """A reverse process of ``num_steps`` steps; arrays are traced, so that solvers with equal shapes compile once."""

    calls: Calls
    start: Table  # ()
    num_steps: int = struct.field(pytree_node=False)
    bound: Bound | None = struct.field(pytree_node=False)
    stochastic: bool = struct.field(pytree_node=False)


def levels(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Variance-preserving weights :math:`\alpha, \tilde\sigma` of image and noise where their ratio is σ."""
    alpha = 1 / np.hypot(sigmas, 1.0)
    return alpha, sigmas * alpha


def clean(
    schedule: Schedule, alpha: np.ndarray, sigma: np.ndarray, *, scale: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of state and output in the clean sample, where states are those of the network divided by ``scale``.

    ``ValueError`` where it does not follow from a predicted noise.
    """
    if schedule.prediction_type == "epsilon" and np.any(alpha == 0):
        raise ValueError(
            f"{schedule.method}: no clean sample follows from a predicted noise where the signal power is 0 "
            "(rescale_betas_zero_snr with prediction_type epsilon); start below it, or predict v or the sample."
        )
    of_state, of_output = clean_weights(schedule.prediction_type, alpha, sigma)
    return scale * of_state, of_output


def start_scale(schedule: Schedule, sigma: float) -> float:
    """Scale of the initial noise of a variance-exploding method that starts at ``sigma``."""
    # In diffusers, the scale of the initial noise depends on the spacing.
    return math.hypot(sigma, 1.0) if schedule.timestep_spacing == "leading" else float(sigma)


def solver_of(
    schedule: Schedule,
    t: np.ndarray,
    *,
    stored: tuple[np.ndarray | float, np.ndarray | float],
    states: np.ndarray,
    history: np.ndarray,
    step: np.ndarray | None = None,
    scale: np.ndarray | float = 1.0,
    output: np.ndarray | float = 0.0,
    noise: np.ndarray | float = 0.0,
    start: float = 1.0,
) -> Solver:
    """The solver of a table, given by columns; a number stands for a whole column."""
    step = np.arange(len(t)) if step is None else step
    calls = Calls(
        t=t.astype(np.int32 if np.all(t == np.rint(t)) else np.float64),
        step=step.astype(np.int32),
        scale=_column(scale, t),
        stored=np.stack([_column(weight, t) for weight in stored], axis=1),
        states=states.reshape(len(t), -1),
        history=history.reshape(len(t), -1),
        output=_column(output, t),
        noise=_column(noise, t),
    )
    if schedule.thresholding:
        bound = Bound(schedule.sample_max_value, schedule.dynamic_thresholding_ratio)
    else:
        bound = Bound(schedule.clip_sample_range, None) if schedule.clip_sample else None
    return Solver(calls, np.float64(start), int(step[-1]) + 1, bound, bool(np.any(noise)))


def _column(values: np.ndarray | float, t: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.asarray(values, np.float64), t.shape)
