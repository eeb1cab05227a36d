r"""Sampling methods as tables of coefficients, see :mod:`scaling.diffusion.tables`; here those of one step at a time.

Below, primes mark the next noise level, and ``r = σ'/σ`` is its ratio to the present one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dae_theory.checks import check_integer, check_nonnegative
from scaling.diffusion.denoisers import noise_weights
from scaling.diffusion.grids import consistency_grid, sigma_grid, timestep_grid
from scaling.diffusion.multistep import dpm_solver, lms, unipc
from scaling.diffusion.schedules import Method, Schedule
from scaling.diffusion.tables import Solver, clean, levels, solver_of, start_scale

__all__ = ["make_solver"]


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
    return solver_of(
        schedule,
        t,
        stored=clean(schedule, alpha, sigma),
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
    return solver_of(
        schedule,
        t,
        stored=clean(schedule, np.sqrt(now), np.sqrt(1 - now)),
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
    return solver_of(schedule, t, step=step, stored=(0.0, 1.0), states=states, history=history)


def _euler(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Euler steps of the probability flow in σ :cite:`karras22`.

    .. math:: x' = r x + (1 - r) \hat x_0
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    ratio = sigmas[1:] / sigmas[:-1]
    alpha, sigma = levels(sigmas[:-1])
    return solver_of(
        schedule,
        t,
        scale=alpha,
        stored=clean(schedule, alpha, sigma, scale=alpha),
        states=ratio,
        history=1 - ratio,
        start=start_scale(schedule, sigmas[0]),
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
    alpha, sigma = levels(sigmas[step + corrects])
    return solver_of(
        schedule,
        t[step + corrects],
        step=step,
        scale=alpha,
        stored=clean(schedule, alpha, sigma, scale=alpha),
        states=np.where(second, corrected, euler),
        history=np.where(second, from_kept, euler_kept),
        start=start_scale(schedule, sigmas[0]),
    )


def _euler_ancestral(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Euler steps to a lower σ than σ', then fresh noise up to it: ancestral sampling :cite:`song21sde` in σ.

    .. math:: x' = \frac{\sigma_\downarrow}{\sigma} x + \left(1 - \frac{\sigma_\downarrow}{\sigma}\right) \hat x_0
              + \sigma_\uparrow \epsilon, \qquad \sigma_\uparrow = \sigma' \sqrt{1 - r^2}, \qquad
              \sigma_\downarrow = r \sigma'
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    ratio = sigmas[1:] / sigmas[:-1]
    alpha, sigma = levels(sigmas[:-1])
    return solver_of(
        schedule,
        t,
        scale=alpha,
        stored=clean(schedule, alpha, sigma, scale=alpha),
        states=ratio**2,
        history=1 - ratio**2,
        noise=sigmas[1:] * np.sqrt(1 - ratio**2),
        start=start_scale(schedule, sigmas[0]),
    )


def _lcm(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Multistep consistency sampling :cite:`luo23`, Algorithm 3: to a clean sample, then back to the next noise level.

    .. math:: x' = \sqrt{\bar\alpha'} \left(c_\text{skip} x + c_\text{out} \hat x_0\right)
              + \sqrt{1 - \bar\alpha'} \, \epsilon, \qquad c_\text{skip} = \frac{1/4}{(m t)^2 + 1/4}, \qquad
              c_\text{out} = \frac{m t}{\sqrt{(m t)^2 + 1/4}}

    with m = ``timestep_scaling``; the last step ends at the clean sample.
    """
    del eta
    t = consistency_grid(schedule, num_steps)
    now = schedule.alpha_bar[t]
    to = np.append(now[1:], 1.0)
    scaled, data = schedule.timestep_scaling * t, 0.5
    return solver_of(
        schedule,
        t,
        stored=clean(schedule, np.sqrt(now), np.sqrt(1 - now)),
        states=np.sqrt(to) * data**2 / (scaled**2 + data**2),
        history=np.sqrt(to) * scaled / np.hypot(scaled, data),
        noise=np.sqrt(1 - to),
    )


_SOLVERS: dict[Method, Callable[[Schedule, int, float], Solver]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "pndm": _pndm,
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "heun": _heun,
    "lms": lms,
    "dpmsolver++": dpm_solver,
    "unipc": unipc,
    "lcm": _lcm,
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
