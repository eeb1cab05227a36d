"""Multistep methods in σ, which go on with the clean samples of earlier steps: LMS, DPM-Solver++ and UniPC."""

from __future__ import annotations

import math

import numpy as np

from scaling.diffusion.grids import sigma_grid
from scaling.diffusion.schedules import Schedule
from scaling.diffusion.tables import Solver, clean, levels, solver_of, start_scale

__all__ = ["dpm_solver", "lms", "unipc"]

LMS_ORDER = 4


def lms(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""Linear multistep: the polynomial through the last four derivatives in σ, integrated exactly.

    .. math:: x' = x + \sum_{j < 4} d_{s-j} \int_\sigma^{\sigma'} \prod_{k \ne j}
              \frac{\tau - \sigma_{s-k}}{\sigma_{s-j} - \sigma_{s-k}} \, d\tau, \qquad
              d = \frac{x - \hat x_0}{\sigma}

    The order is that of as many derivatives as are known, up to four.
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    alpha, sigma = levels(sigmas[:-1])
    of_state, of_output = clean(schedule, alpha, sigma, scale=alpha)
    points, weights = np.polynomial.legendre.leggauss(LMS_ORDER)
    history = np.zeros((num_steps, min(LMS_ORDER, num_steps)))
    for s in range(num_steps):
        nodes = sigmas[s::-1][:LMS_ORDER]
        half = (sigmas[s + 1] - sigmas[s]) / 2
        tau = sigmas[s] + half * (1 + points)
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            history[s, j] = half * weights @ np.prod((tau[:, None] - others) / (node - others), axis=1)
    return solver_of(
        schedule,
        t,
        scale=alpha,
        # The derivative, in place of the clean sample.
        stored=((1 - of_state) / sigmas[:-1], -of_output / sigmas[:-1]),
        states=np.ones(num_steps),
        history=history,
        start=start_scale(schedule, sigmas[0]),
    )


def dpm_solver(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""DPM-Solver++ :cite:`lu22` of one to three known clean samples, with :math:`h = -\log r`.

    .. math:: x' = \frac{\tilde\sigma'}{\tilde\sigma} x + \alpha' \left((1 - r) D_0 + \phi_1 D_1 + \phi_2 D_2\right)
              \qquad \phi_1 = 1 - \frac{1 - r}{h}, \qquad \phi_2 = \frac12 - \frac{r - 1 + h}{h^2}

    D₀ is the present :math:`\hat x_0`; D₁ and D₂ are h and h² times the first and half the second derivative of the
    polynomial through the known ones. Two, (2M) of Algorithm 2, give second order; :math:`\phi_1` is then (1 − r)/2 for
    the solver type ``midpoint``, and as above for ``heun``. Third order would take :math:`2 \phi_2`; this is
    diffusers' weight, with which a third sample makes errors smaller, but not of higher order.

    The stochastic ``sde-dpmsolver++`` multiplies x by r, adds
    :math:`\tilde\sigma' \sqrt{1 - r^2} \, \epsilon`, and has r² and 2h in place of r and h in the brackets.

    The order is lower where fewer are known, in the last step, and in the last two of few steps, depending on the
    configuration.
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    alpha, sigma = levels(sigmas)
    ratio = sigmas[1:] / sigmas[:-1]
    stochastic = schedule.algorithm_type == "sde-dpmsolver++"
    order = np.minimum(schedule.solver_order, 1 + np.arange(num_steps))
    if stochastic and schedule.solver_order > 2:
        raise ValueError(
            "dpmsolver++: in diffusers, the third-order step of sde-dpmsolver++ weighs the second derivative with the "
            "wrong sign of one half, so that it is of first order; take solver_order 2."
        )
    few = schedule.lower_order_final and num_steps < 15
    order[-2:] = np.minimum(order[-2:], 2 if few else 3)
    if few or schedule.euler_at_final or schedule.final_sigmas_type == "zero":
        order[-1] = 1
    history = np.zeros((num_steps, order.max()))
    for s in range(num_steps):
        r = ratio[s] ** (2 if stochastic else 1)
        weights = np.array([1 - r, 0.0, 0.0])
        with np.errstate(divide="ignore"):
            h = -np.log(ratio[max(s - 2, 0) : s + 1][::-1])
            inner = -np.log(r)
        if order[s] > 1:
            midpoint = order[s] == 2 and schedule.solver_type == "midpoint"
            weights[1] = (1 - r) / 2 if midpoint else 1 - (1 - r) / inner
        if order[s] > 2:
            weights[2] = 0.5 - (r - 1 + inner) / inner**2
        history[s, : order[s]] = alpha[s + 1] * weights[: order[s]] @ _differences(h, int(order[s]))
    return solver_of(
        schedule,
        t,
        stored=clean(schedule, alpha[:-1], sigma[:-1]),
        states=sigma[1:] / sigma[:-1] * (ratio if stochastic else 1.0),
        history=history,
        noise=sigma[1:] * np.sqrt(1 - ratio**2) if stochastic else 0.0,
    )


def _differences(h: np.ndarray, order: int) -> np.ndarray:
    """D₀, D₁ and D₂ of :func:`dpm_solver` as combinations (order, order) of the clean samples, the present one first;
    ``h`` are the steps in log σ, the next one first."""
    rows = np.eye(order)[:1]
    if order > 1:
        near = np.zeros(order)
        near[:2] = h[0] / h[1], -h[0] / h[1]
        rows = np.append(rows, near[None], axis=0)
    if order > 2:
        far = np.array([0.0, h[0] / h[2], -h[0] / h[2]])
        curve = (near - far) * h[0] / (h[1] + h[2])
        rows = np.stack([rows[0], near + curve * h[1] / h[0], curve])
    return rows


def unipc(schedule: Schedule, num_steps: int, eta: float) -> Solver:
    r"""UniPC :cite:`zhao23`, Algorithms 5 to 8, on clean samples: each state is predicted, and corrected by its own.

    With the corrected state :math:`x^c`, the prediction :math:`x_{s+1} = a_s x_s^c + \sum_j p_{sj} q_{s-j}` and the
    correction :math:`x_s^c = a_{s-1} x_{s-1}^c + \sum_j c_{sj} q_{s-j}`, corrected states are eliminated:

    .. math:: x_s^c = x_s + \sum_j c_{sj} q_{s-j} - \sum_j p_{s-1,j} q_{s-1-j}

    ``disable_corrector`` lists steps after which nothing is corrected.
    """
    del eta
    t, sigmas = sigma_grid(schedule, num_steps)
    if math.isclose(sigmas[-1], sigmas[-2]) or (
        sigmas[-1] == 0 and not schedule.lower_order_final and schedule.solver_order > 1
    ):
        raise ValueError(
            "unipc: the last step has no finite result (final_sigmas_type sigma_min with the same level twice, or zero "
            "with lower_order_final false); change one of these fields."
        )
    alpha, sigma = levels(sigmas)
    order = np.minimum(schedule.solver_order, 1 + np.arange(num_steps))
    if schedule.lower_order_final:
        order = np.minimum(order, np.arange(num_steps, 0, -1))
    keep = sigma[1:] / sigma[:-1]
    history = np.zeros((num_steps, order.max() + 1))
    predicted = np.zeros(history.shape[1])
    for s in range(num_steps):
        if s and s - 1 not in schedule.disable_corrector:
            weights = _unified_weights(schedule, sigmas[: s + 1], alpha[s], int(order[s - 1]), corrects=True)
            history[s, : weights.size] += keep[s] * weights
            history[s, 1:] -= keep[s] * predicted[:-1]
        weights = _unified_weights(schedule, sigmas[: s + 2], alpha[s + 1], int(order[s]), corrects=False)
        predicted = np.zeros(history.shape[1])
        predicted[: weights.size] = weights
        history[s] += predicted
    stored = clean(schedule, alpha[:-1], sigma[:-1])
    return solver_of(schedule, t, stored=stored, states=keep, history=history)


def _unified_weights(schedule: Schedule, sigmas: np.ndarray, alpha: float, order: int, *, corrects: bool) -> np.ndarray:
    """Weights of the clean samples in UniPC's step from ``sigmas[-2]`` to ``sigmas[-1]``, the latest sample first: that
    of the end if it ``corrects``, that of the start otherwise."""
    with np.errstate(divide="ignore"):
        h = np.log(sigmas[-2] / sigmas[-1])
    # Steps back in log σ from the start, as fractions of h: negative.
    back = np.log(sigmas[-2] / sigmas[-3 : -order - 2 : -1]) / h
    growth = np.expm1(-h)
    scale = -h if schedule.solver_type == "bh1" else growth
    nodes = np.append(back, 1.0)
    size = order if corrects else order - 1
    if order == (1 if corrects else 2):
        bends = np.full(size, 0.5)
    elif size:
        # Moments of e^{-hτ}: φ_k = (φ_{k−1} − 1/k!)/(−h), the right-hand sides k! φ_{k+1}/B.
        moments, phi = [], growth / -h - 1
        for k in range(1, size + 1):
            moments.append(phi * math.factorial(k) / scale)
            phi = phi / -h - 1 / math.factorial(k + 1)
        bends = np.linalg.solve(nodes[:size][None, :] ** np.arange(size)[:, None], np.asarray(moments))
    else:
        return np.array([-alpha * growth])
    # Over the start, the samples before it, and the end: Σ bend (q_i − q_0)/r_i.
    slopes = bends / nodes[:size]
    of_start = -alpha * (growth - scale * slopes.sum())
    others = -alpha * scale * slopes
    return np.concatenate([others[-1:], [of_start], others[:-1]] if corrects else [[of_start], others])
