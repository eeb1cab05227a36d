"""The timesteps and noise levels that a sampler visits: ``timestep_spacing``, ``steps_offset``, Karras' noise levels.

They are float64 NumPy arrays, computed on the host and rounded where diffusers rounds them.
"""

from __future__ import annotations

import numpy as np

from scaling.diffusion.schedules import Schedule

MULTISTEP = ("dpmsolver++", "unipc")
"""Methods that round their timesteps."""

__all__ = ["consistency_grid", "sigma_grid", "timestep_grid"]


def timestep_grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Decreasing integer timesteps (num_steps,) of the methods that step in t: DDIM, DDPM and PNDM.

    ``leading`` takes multiples of ⌊T/num_steps⌋ up from ``steps_offset``, ``trailing`` multiples of T/num_steps down
    from T − 1, and ``linspace`` divides [0, T − 1] evenly. ``ValueError`` if the offset leads past T − 1.
    """
    return _spaced(schedule, num_steps, last=schedule.num_train_timesteps).round().astype(np.int64)


def sigma_grid(schedule: Schedule, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Timesteps (num_steps,) and decreasing noise levels (num_steps + 1,) of the methods that step in σ.

    Noise levels are interpolated linearly in t between the schedule's. Or they are spaced evenly in
    :math:`\sigma^{1/7}` (``use_karras_sigmas``) :cite:`karras22`, eq. (5), or in :math:`\log \sigma`
    (``use_exponential_sigmas``), and timesteps are interpolated linearly in :math:`\log \sigma`. DPM-Solver++ and UniPC
    round their timesteps. The last noise level is 0, or σ_0 if ``final_sigmas_type`` is ``sigma_min``.
    ``ValueError`` if two steps fall on one timestep, and for settings under which diffusers' timesteps depend on
    rounding errors.
    """
    table = schedule.sigmas
    grid, log_table = np.arange(table.size), np.log(table)
    multistep = schedule.method in MULTISTEP
    cosine = schedule.beta_schedule == "squaredcos_cap_v2"
    cuts = schedule.method == "dpmsolver++" and schedule.use_karras_sigmas and cosine
    if cuts or (multistep and schedule.use_exponential_sigmas):
        raise ValueError(
            f"{schedule.method} with {'use_karras_sigmas on squaredcos_cap_v2' if cuts else 'use_exponential_sigmas'} "
            "cuts timesteps like 998.9999 to integers in diffusers, so that rounding errors decide them; choose other "
            "noise levels."
        )
    # λ = −log σ: clipping removes the noisiest timesteps.
    last = int(np.sum(-log_table >= schedule.lambda_min_clipped))
    if last < table.size and schedule.timestep_spacing == "trailing":
        raise ValueError(
            "lambda_min_clipped with timestep_spacing trailing gives fewer steps than num_steps; drop one of them."
        )
    t = _spaced(schedule, num_steps, last=last, dropped=int(multistep))
    t = t.round() if multistep else t
    sigmas = np.interp(t, grid, table)
    if schedule.use_karras_sigmas or schedule.use_exponential_sigmas:
        ends = (table[-1], table[0]) if multistep else (sigmas[0], sigmas[-1])
        high, low = schedule.sigma_max or ends[0], schedule.sigma_min or ends[1]
        ramp = np.linspace(0.0, 1.0, num_steps)
        if schedule.use_karras_sigmas:
            sigmas = (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7
        else:
            sigmas = high ** (1 - ramp) * low**ramp
        t = np.interp(np.log(sigmas), log_table, grid)
        t = t.round() if multistep else t
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        t = np.log(sigmas) / 4
    if np.any(np.diff(sigmas) >= 0):
        raise ValueError(f"{schedule.method}: {num_steps} steps are too many, two fall on one timestep; take fewer.")
    return t, np.append(sigmas, table[0] if schedule.final_sigmas_type == "sigma_min" else 0.0)


def consistency_grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Decreasing timesteps (num_steps,) of latent consistency models, from those at which they were distilled.

    These are kT/K − 1 for k = 1, ..., K with K = ``original_inference_steps``; every (K/num_steps)-th is taken, from
    the noisiest on. ``ValueError`` for more steps than K.
    """
    total, count = schedule.num_train_timesteps, schedule.original_inference_steps
    if not num_steps <= count <= total:
        raise ValueError(
            f"lcm: {num_steps} steps are more than the original_inference_steps, {count}, or these are more than the "
            f"timesteps, {total}; take at most {min(count, total)} steps."
        )
    distilled = np.arange(count, 0, -1) * (total // count) - 1
    return distilled[np.floor(np.linspace(0, count, num_steps, endpoint=False)).astype(int)]


def _spaced(schedule: Schedule, num_steps: int, *, last: int, dropped: int = 0) -> np.ndarray:
    total, count = schedule.num_train_timesteps, num_steps + dropped
    match schedule.timestep_spacing:
        case "linspace":
            t = np.linspace(0, last - 1, count)[::-1]
        case "leading":
            t = np.arange(count)[::-1] * (last // count) + schedule.steps_offset
        case _:
            # Rounding can give arange one entry too many.
            t = np.arange(last, 0, -total / num_steps)[:num_steps].round() - 1
    t = t[:num_steps]
    if t[0] > total - 1:
        raise ValueError(
            f"steps_offset {schedule.steps_offset} leads to timestep {t[0]}, past the last one, {total - 1}; "
            f"take fewer than {num_steps} steps."
        )
    return t
