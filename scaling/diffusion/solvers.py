r"""Every sampler as a table: a linear multistep method with one row of coefficients per call of the model.

With x_s the state before call s, o_s the model's output and q_s the quantity that the method stores for later calls,

.. math:: o_s = \mathrm{model}(\text{scale}_s x_s, t_s), \qquad
          q_s = \mathrm{bound}\left(k_{s0} x_s + k_{s1} o_s\right), \qquad
          x_{s+1} = \sum_j A_{sj} x_{s-j} + \sum_j B_{sj} q_{s-j} + g_s o_s + c_s \epsilon_s

and x_0 = ``start`` ε. As in diffusers, states of DDIM, DDPM, PNDM and DPM-Solver++ are variance preserving, and those
of Euler and Heun variance exploding; q is the clean sample x̂₀ (PNDM: the output). Coefficients are computed in float64
on the host. Below, ``r = σ'/σ`` is the ratio of the next noise level to the present one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from flax import struct

from dae_theory.checks import check_integer, check_nonnegative
from scaling.diffusion.denoisers import clean_weights, noise_weights
from scaling.diffusion.grids import sigma_grid, timestep_grid
from scaling.diffusion.schedules import Method, Schedule

__all__ = ["Bound", "Calls", "Solver", "make_solver"]

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


def make_solver(schedule: Schedule, num_steps: int, *, eta: float = 0.0) -> Solver:
    r"""The solver of ``schedule.method`` with ``num_steps`` steps, from 1 to T.

    ``eta`` in [0, 1] is DDIM's amount of fresh noise: 0 is none, 1 that of DDPM; for other methods it must be 0.
    Raises ``ValueError`` where the schedule does not allow the method: no clean sample follows from a predicted ε, and
    PNDM cannot start, at a signal power of 0; a ``steps_offset`` can lead past the last timestep; PNDM's Runge-Kutta
    start needs four steps.
    """
    if schedule.method is None:
        raise ValueError(schedule.refusal)
    check_integer("num_steps", num_steps, minimum=1, maximum=schedule.num_train_timesteps)
    check_nonnegative("eta", eta)
    if eta > 1 or (eta != 0 and schedule.method != "ddim"):
        raise ValueError(
            f"eta must lie in [0, 1], and be 0 for every method but ddim; got {eta} for {schedule.method}."
        )
    return _SOLVERS[schedule.method](schedule, num_steps, eta)


def _ddim(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""DDIM :cite:`song21ddim`, eqs. (12) and (16); ε̂ is not recomputed from a bounded x̂₀.

    .. math:: x' = \sqrt{\bar\alpha'} \hat x_0 + \sqrt{1 - \bar\alpha' - c^2} \, \hat\epsilon + c \epsilon, \qquad
              c^2 = \eta^2 \frac{1 - \bar\alpha'}{1 - \bar\alpha} \left(1 - \frac{\bar\alpha}{\bar\alpha'}\right)
    """
    t = timestep_grid(schedule, num_steps)
    now, to = schedule.alpha_bar[t], _alpha_bar_at(schedule, t - schedule.num_train_timesteps // num_steps)
    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    variance = (1 - to) / (1 - now) * (1 - now / to)
    along = np.sqrt(np.maximum(1 - to - eta**2 * variance, 0.0))
    of_state, of_output = noise_weights(schedule.prediction_type, alpha, sigma)
    return _solver(
        schedule,
        t,
        stored=_clean(schedule, alpha, sigma),
        states=along * of_state,
        history=np.sqrt(to),
        output=along * of_output,
        noise=eta * np.sqrt(variance),
    )


def _ddpm(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Ancestral sampling :cite:`ho20`, eq. (7), with the variance of the posterior, or β' for ``fixed_large``.

    .. math:: x' = \frac{\sqrt{\bar\alpha'} \beta'}{1 - \bar\alpha} \hat x_0
              + \frac{\sqrt{\bar\alpha/\bar\alpha'} (1 - \bar\alpha')}{1 - \bar\alpha} x + c \epsilon, \qquad
              \beta' = 1 - \frac{\bar\alpha}{\bar\alpha'}
    """
    del eta
    t = timestep_grid(schedule, num_steps)
    now = schedule.alpha_bar[t]
    to = np.append(now[1:], 1.0)
    beta = 1 - now / to
    # The lower limit of the variance is diffusers' own.
    variance = beta if schedule.variance_type == "fixed_large" else np.maximum((1 - to) / (1 - now) * beta, 1e-20)
    return _solver(
        schedule,
        t,
        stored=_clean(schedule, np.sqrt(now), np.sqrt(1 - now)),
        states=np.sqrt(now / to) * (1 - to) / (1 - now),
        history=np.sqrt(to) * beta / (1 - now),
        noise=np.where(t > 0, np.sqrt(variance), 0.0),
    )


def _pndm(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""PNDM :cite:`liu22`: the transfer of eq. (11) with a weighted output :math:`\hat o = \sum_j w_j o_{s-j}`.

    .. math:: x' = \sqrt{\frac{\bar\alpha'}{\bar\alpha}} x - \frac{(\bar\alpha' - \bar\alpha) \, \hat\epsilon}{
              \bar\alpha \sqrt{1 - \bar\alpha'} + \sqrt{\bar\alpha (1 - \bar\alpha) \bar\alpha'}}

    The weights are those of Adams-Bashforth as soon as four outputs are known. Before, they are those of lower orders
    (``skip_prk_steps``, as in Stable Diffusion), or of Runge-Kutta steps with four calls each.
    """
    del eta
    if schedule.prediction_type == "sample":
        raise ValueError("pndm takes the prediction types epsilon and v_prediction, not sample; choose another method.")
    ts = timestep_grid(schedule, num_steps).tolist()
    stride = schedule.num_train_timesteps // num_steps
    moves = (_multistep if schedule.skip_prk_steps else _runge_kutta)(ts, stride)
    now, to = (_alpha_bar_at(schedule, np.asarray([getattr(move, end) for move in moves])) for end in ("now", "to"))
    if np.any(now == 0):
        raise ValueError(
            "pndm cannot start where the signal power is 0 (rescale_betas_zero_snr); choose another method."
        )
    along = -(to - now) / (now * np.sqrt(1 - to) + np.sqrt(now * (1 - now) * to))
    of_state, of_output = noise_weights(schedule.prediction_type, np.sqrt(now), np.sqrt(1 - now))
    states = np.zeros((len(moves), 1 + max(move.base for move in moves)))
    history = np.zeros((len(moves), 1 + max(lag for move in moves for lag in move.weights)))
    for s, move in enumerate(moves):
        states[s, move.base] = np.sqrt(to[s] / now[s]) + along[s] * of_state[s]
        for lag, weight in move.weights.items():
            history[s, lag] = along[s] * of_output[s] * weight
    t, step = (np.asarray([getattr(move, name) for move in moves]) for name in ("t", "step"))
    return _solver(schedule, t, step=step, stored=(0.0, 1.0), states=states, history=history)


def _euler(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Euler steps of the probability flow in σ :cite:`karras22`.

    .. math:: x' = r x + (1 - r) \hat x_0
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    ratio = sigmas[1:] / sigmas[:-1]
    alpha, sigma = _levels(sigmas[:-1])
    return _solver(
        schedule,
        t,
        scale=alpha,
        stored=_clean(schedule, alpha, sigma, scale=alpha),
        states=ratio,
        history=1 - ratio,
        start=_start(schedule, sigmas[0]),
    )


def _heun(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Heun steps :cite:`karras22`, Algorithm 1: an Euler step to x̃ at σ', then a correction with a call at x̃.

    .. math:: x' = x + \frac{\sigma' - \sigma}{2} \left(\frac{x - \hat x_0(x)}{\sigma}
              + \frac{\tilde x - \hat x_0(\tilde x)}{\sigma'}\right)

    The last step, to σ' = 0, is an Euler step.
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    step, corrects = np.divmod(np.arange(2 * num_steps - 1), 2)
    now, to = sigmas[step], sigmas[step + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ahead, behind = (to - now) / 2 / to, (to - now) / 2 / now
    pairs = (ahead, 1 + behind), (-ahead, -behind), (to / now, 0 * now), (1 - to / now, 0 * now)
    corrected, from_kept, euler, euler_kept = (np.stack(pair, axis=1) for pair in pairs)
    second = corrects[:, None] == 1
    alpha, sigma = _levels(sigmas[step + corrects])
    return _solver(
        schedule,
        t[step + corrects],
        step=step,
        scale=alpha,
        stored=_clean(schedule, alpha, sigma, scale=alpha),
        states=np.where(second, corrected, euler),
        history=np.where(second, from_kept, euler_kept),
        start=_start(schedule, sigmas[0]),
    )


def _dpm_solver(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""DPM-Solver++(2M) :cite:`lu22`, Algorithm 2, with ``h = −log r`` and h₀ the one before.

    .. math:: x' = \frac{\tilde\sigma'}{\tilde\sigma} x + \alpha' (1 - r) \hat x_0 + b \frac{h}{h_0}
              \left(\hat x_0 - \hat x_0^{\text{before}}\right), \qquad
              b = \frac{\alpha' (1 - r)}{2} \;\; \text{or} \;\; \alpha' \left(1 - \frac{1 - r}{h}\right)

    for the solver types ``midpoint`` and ``heun``. It is of first order (b = 0) in the first step, in the last step
    depending on the configuration, and everywhere if ``solver_order`` is 1.
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    alpha, sigma = _levels(sigmas)
    ratio = sigmas[1:] / sigmas[:-1]
    lower = np.zeros(num_steps, bool)
    lower[0] = True
    few = schedule.lower_order_final and num_steps < 15
    lower[-1] |= few or schedule.euler_at_final or schedule.final_sigmas_type == "zero"
    lower |= schedule.solver_order == 1
    with np.errstate(divide="ignore"):
        h = -np.log(ratio)
    before = np.roll(h, 1)
    mean = (1 - ratio) / 2 if schedule.solver_type == "midpoint" else 1 - (1 - ratio) / h
    bend = np.where(lower, 0.0, alpha[1:] * mean * np.where(lower, 1.0, h) / np.where(lower, 1.0, before))
    history = np.stack([alpha[1:] * (1 - ratio) + bend, -bend], axis=1)
    stored = _clean(schedule, alpha[:-1], sigma[:-1])
    return _solver(schedule, t, stored=stored, states=sigma[1:] / sigma[:-1], history=history)


_SOLVERS: dict[Method, Callable[[Schedule, int, float], Solver]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "pndm": _pndm,
    "euler": _euler,
    "heun": _heun,
    "dpmsolver++": _dpm_solver,
}


class _Move(NamedTuple):
    """One call of PNDM, at ``t``; it moves the state of ``base`` calls ago from timestep ``now`` to ``to``."""

    t: int
    step: int
    now: int
    to: int
    base: int
    weights: dict[int, float]


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _multistep(ts: list[int], stride: int) -> list[_Move]:
    moves = [_Move(ts[0], 0, ts[0], ts[0] - stride, 0, {0: 1.0})]
    if len(ts) > 1:
        moves.append(_Move(ts[1], 0, ts[1] + stride, ts[1], 1, {0: 1 / 2, 1: 1 / 2}))
    return moves + _adams_bashforth(ts, stride, 1, moves, [0])


def _runge_kutta(ts: list[int], stride: int) -> list[_Move]:
    if len(ts) < 4:
        raise ValueError(f"pndm with skip_prk_steps false starts with three steps and needs at least 4, got {len(ts)}.")
    half, moves = stride // 2, []
    for i in range(3):
        now, to = ts[i], ts[i + 1]
        stages = ((now, now - half), (to + half, to + half), (to + half, to), (to, to))
        for stage, (t, end) in enumerate(stages):
            weights = {0: 1.0} if stage < 3 else {0: 1 / 6, 1: 1 / 3, 2: 1 / 3, 3: 1 / 6}
            moves.append(_Move(t, i, now, end, stage, weights))
    return moves + _adams_bashforth(ts, stride, 3, moves, [0, 4, 8])


def _adams_bashforth(ts: list[int], stride: int, first: int, before: list[_Move], known: list[int]) -> list[_Move]:
    # `known` are the calls whose outputs the multistep formula uses, one per step.
    moves = []
    for step in range(first, len(ts)):
        call = len(before) + len(moves)
        known = [*known, call][-4:]
        weights = {call - past: w for past, w in zip(known[::-1], _ADAMS_BASHFORTH[len(known) - 1], strict=True)}
        moves.append(_Move(ts[step], step, ts[step], ts[step] - stride, 0, weights))
    return moves


def _alpha_bar_at(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    final = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bar[0]
    return np.where(t >= 0, schedule.alpha_bar[np.maximum(t, 0)], final)


def _levels(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha = 1 / np.hypot(sigmas, 1.0)
    return alpha, sigmas * alpha


def _clean(
    schedule: Schedule, alpha: np.ndarray, sigma: np.ndarray, *, scale: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    if schedule.prediction_type == "epsilon" and np.any(alpha == 0):
        raise ValueError(
            f"{schedule.method}: no clean sample follows from a predicted noise where the signal power is 0 "
            "(rescale_betas_zero_snr with prediction_type epsilon); start below it, or predict v or the sample."
        )
    of_state, of_output = clean_weights(schedule.prediction_type, alpha, sigma)
    return scale * of_state, of_output


def _start(schedule: Schedule, sigma: float) -> float:
    # In diffusers, the scale of the initial noise depends on the spacing.
    return math.hypot(sigma, 1.0) if schedule.timestep_spacing == "leading" else float(sigma)


def _solver(
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
