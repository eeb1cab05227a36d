"""Rows of ``theory``: what exact formulas save beside the rival way to the same number.

* ``exact_risk_generalizing``, ``exact_risk_truncated``, ``exact_risk_memorizing``: the exact risk of one sample in
  dimension 1024 with 100 units, against Monte Carlo to a relative standard error of 1e-4. The rival's time is that of
  many draws, scaled to the number that their variance requires. It draws noise on the sample, as training code does;
  ``ratio_to_gram_form`` compares with our own sampler among the preactivations.
* ``memorizing_minimizer``: from five separable rows in dimension 1024 to the memorizing minimizer with 100 units,
  against training to its objective, to one part in 1,000, by the paper's loop in PyTorch (RMSprop 1e-3, full batch,
  coupled decay), where PyTorch is installed. ``certified_s`` adds a certificate by Newton's method.
* ``affine_objective``: exact objective and gradient with biases, of 200 digits and 64 units, against those without.
* ``exact_training``: 200 digits, 32 units, sigma 0.3, from an iterate of Adam to a gradient norm of 1e-10, with the
  gradient norm over time for both. Adam, continued for as long, does not reach it: the row has no rival time, and
  ``floor_of_adam`` is the gradient norm at which it stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dae_theory import GaussianMixture, ReluDae, generalizing_minimizer, memorizing_minimizer
from dae_theory.certificate import certify
from dae_theory.exact_training import minimize_exact_objective
from dae_theory.model import init, with_biases
from dae_theory.risk import exact_objective, exact_risk, monte_carlo_estimate
from sims.bench.rivals import paper_loop, separable_rows
from sims.bench.timing import Row, row, seconds
from sims.data import datasets
from sims.sweeps.train import Recipe, advance, start

__all__ = [
    "ROWS",
    "affine_objective",
    "exact_risk_generalizing",
    "exact_risk_memorizing",
    "exact_risk_truncated",
    "exact_training",
    "minimizer_in_closed_form",
]

PRECISION = 1e-4
"""Relative standard error required of the Monte Carlo rival."""


def exact_risk_generalizing(repeats: int, quick: bool) -> Row:
    """A block with a unit for every direction of the data: its error is noise, which Monte Carlo averages slowly."""
    return _of_one_cluster("exact_risk_generalizing", 0, repeats, quick)


def exact_risk_truncated(repeats: int, quick: bool) -> Row:
    """Data of ten times as many directions as units: most of the error is the dropped part, equal in every draw."""
    return _of_one_cluster("exact_risk_truncated", 9, repeats, quick)


def _of_one_cluster(name: str, dropped: int, repeats: int, quick: bool) -> Row:
    """One cluster with a mean of norm 17, as of 32 x 32 images in [-1, 1], inside the gates of all units; its variances
    are 3/j, in the p directions that the block keeps and in ``dropped`` times as many others."""
    d, p = (64, 6) if quick else (1024, 100)
    key = jax.random.key(0)
    axes = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, 0), (d, d)))[0][:, : (1 + dropped) * p]
    root = axes * jnp.sqrt(3.0 / jnp.arange(1.0, axes.shape[1] + 1.0))[None, :]
    mean = 17.0 * axes[:, 0]
    mixture = GaussianMixture(jnp.ones(1), mean[None], (root @ root.T)[None])
    x = mean + root @ jax.random.normal(jax.random.fold_in(key, 1), (root.shape[1],))
    return _risk_row(name, generalizing_minimizer(mixture, 0.2, 1e-3, p), x, 0.2, repeats, quick)


def exact_risk_memorizing(repeats: int, quick: bool) -> Row:
    """p stored samples of norm about 17, as of 32 x 32 images in [-1, 1]; the sample is one of them."""
    d, p = (16, 6) if quick else (1024, 100)
    data = 0.53 * jax.random.normal(jax.random.key(0), (p, d))
    dae = memorizing_minimizer(data, 0.2, 1e-3, p)
    return _risk_row("exact_risk_memorizing", dae, data[0], 0.2, repeats, quick)


def _risk_row(name: str, dae: ReluDae, x: Float[Array, " d"], sigma: float, repeats: int, quick: bool) -> Row:
    draws = 200 if quick else 20_000
    key = jax.random.key(1)

    def estimate(gram: bool) -> Any:
        return monte_carlo_estimate(key, dae, x[None], sigma, num_draws=draws, gram=gram)

    exact = jax.jit(lambda x: exact_risk(dae, x[None], sigma))
    ways = (lambda: exact(x), lambda: estimate(False), lambda: estimate(True))
    times = [[seconds(way) for way in ways] for _ in range(1 + repeats)][1:]
    sampled = estimate(False)
    needed = (float(sampled.standard_error) / PRECISION / float(sampled.mean)) ** 2 * draws
    scale = needed / draws
    notes = {
        "draws_needed": round(needed),
        "draws_timed": draws,
        "difference_in_standard_errors": abs(float(exact(x)) - float(sampled.mean)) / float(sampled.standard_error),
        "ratio_to_gram_form": statistics.median(scale * gram / ours for ours, _, gram in times),
    }
    return row(name, [ours for ours, _, _ in times], [scale * direct for _, direct, _ in times], notes=notes)


def minimizer_in_closed_form(repeats: int, quick: bool) -> Row:
    """The memorizing minimizer from its formula, against the paper's training loop to its objective."""
    n, d, p = (3, 16, 6) if quick else (5, 1024, 100)
    sigma, decay = 0.2, 1e-2
    # Two free matrices under a loss that averages over pixels too: lambda = d wd / 2.
    penalty = d * decay / 2
    rows = separable_rows(n, d)
    data = jnp.asarray(rows)
    minimizer = jax.jit(lambda data: memorizing_minimizer(data, sigma, penalty, p))
    closed = minimizer(data)
    goal = 1.001 * float(exact_objective(closed, data, sigma, penalty))
    notes = {
        "goal": goal,
        "certified_s": min(seconds(lambda: certify(minimizer(data), data, sigma, penalty)) for _ in range(2)),
    }
    ours = [seconds(lambda: minimizer(data)) for _ in range(1 + repeats)][1:]
    rival = paper_loop(rows, sigma, decay, penalty, p, goal, 500 if quick else 50_000)
    if rival is None:
        return row("memorizing_minimizer", ours, None, notes=notes)
    spent, steps, reached = rival
    notes |= {"rival": "RMSprop in PyTorch", "steps": steps, "reached": reached}
    return row("memorizing_minimizer", ours, [spent] * len(ours), notes=notes)


def affine_objective(repeats: int, quick: bool) -> Row:
    """What biases cost: value and gradient of the exact objective with them, and (the rival) without."""
    n, p = (12, 3) if quick else (200, 64)
    rows = jnp.asarray(datasets.load("digits", num_samples=n).train)
    plain = init(jax.random.key(0), rows.shape[1], p, scale=0.5, dtype=rows.dtype)
    both = jax.jit(lambda dae: jax.value_and_grad(exact_objective)(dae, rows, 0.3, 1e-3))
    ways = (lambda: both(with_biases(plain)), lambda: both(plain))
    times = [[seconds(way) for way in ways] for _ in range(1 + repeats)][1:]
    return row("affine_objective", [ours for ours, _ in times], [rival for _, rival in times])


def exact_training(repeats: int, quick: bool) -> Row:
    """Newton's method on the exact objective from an iterate of Adam, beside Adam continued for the same time."""
    del repeats
    n, p, steps = (12, 3, 200) if quick else (200, 32, 20_000)
    sigma, penalty = 0.3, 0.1
    data = jnp.asarray(datasets.load("digits", num_samples=n, dtype=np.float64).train)
    norm = jax.jit(lambda dae: optax.global_norm(jax.grad(exact_objective)(dae, data, sigma, penalty)))
    recipe, key = Recipe(p), jax.random.key(0)
    rates = {"sigma": sigma, "penalty": penalty, "learning_rate": 1e-3}
    walk = jax.jit(lambda state, count: advance(state, key, data, count, recipe, **rates))
    state = start(jax.random.key(1), data.shape[1], recipe, learning_rate=1e-3, init_scale=0.5, dtype=data.dtype)
    state = walk(state, steps)
    iterate = state.dae
    compile_s = seconds(lambda: minimize_exact_objective(iterate, data, sigma, penalty))
    begin = time.perf_counter()
    optimum = jax.block_until_ready(minimize_exact_objective(iterate, data, sigma, penalty))
    ours = time.perf_counter() - begin
    course = np.asarray(optimum.course)[: int(optimum.iterations[1])]
    # Adam continues for as long; its gradient norm is computed off the clock.
    theirs, spent = [(0.0, float(norm(iterate)))], 0.0
    while spent < ours:
        begin = time.perf_counter()
        state = jax.block_until_ready(walk(state, max(100, steps // 20)))
        spent += time.perf_counter() - begin
        theirs.append((spent, float(norm(state.dae))))
    late = [size for at, size in theirs if at >= spent / 2]
    notes = {
        "gradient_norm": float(optimum.gradient_norm),
        "converged": bool(optimum.converged),
        "first_call_s": compile_s,
        "rounds": int(optimum.iterations[1]),
        "objective": float(optimum.objective),
        "objective_of_adam": float(exact_objective(state.dae, data, sigma, penalty)),
        "floor_of_adam": float(np.median(late)),
        "course": [[ours * (i + 1) / len(course), float(size)] for i, size in enumerate(course)],
        "course_of_adam": theirs,
    }
    return row("exact_training", [ours], None, notes=notes)


ROWS: dict[str, Callable[[int, bool], Row]] = {
    "exact_risk_generalizing": exact_risk_generalizing,
    "exact_risk_truncated": exact_risk_truncated,
    "exact_risk_memorizing": exact_risk_memorizing,
    "memorizing_minimizer": minimizer_in_closed_form,
    "affine_objective": affine_objective,
    "exact_training": exact_training,
}
"""Functions of the number of repeats and of ``quick``, by name."""
