"""``python -m sims.bench``: what the exact theory saves, beside the rival way to the same number, in one run.

Rows of ``theory``:

* ``exact_risk_generalizing``, ``exact_risk_truncated``, ``exact_risk_memorizing``: the exact risk of one sample in
  dimension 1024 with 100 units, against Monte Carlo to a relative standard error of 1e-4, its cost the measured time
  of many draws scaled to the number that the measured variance asks for. The rival draws noise on the sample, as
  training code does; ``ratio_to_gram_form`` is against our own sampler among the preactivations.
* ``memorizing_minimizer``: from five separable rows in dimension 1024 to the memorizing minimizer with 100 units,
  against training to its objective, to one part in 1,000, by the paper's loop in PyTorch (RMSprop 1e-3, full batch,
  coupled decay), where PyTorch is installed. ``certified_s`` adds a certificate by Newton's method.
* ``exact_training``: 200 digits, 32 units, sigma 0.3, from an iterate of Adam to a gradient norm of 1e-10, with the
  course of the gradient norm over time for both. Adam, run on for as long, never gets there: the rival's time is none,
  and its floor is told.

Rows of ``sweeps`` (:mod:`sims.bench.sweeps`), rivals in PyTorch where it is installed, times of a cell and step:

* ``small_cells_n8``, ``small_cells_n64``, ``small_cells_n512``, ``small_cells_grid``: digits with 64 units, Adam, full
  batch, 20 noise levels mapped, against one network at a time.
* ``paper_step``: dimension 1024, 100 units, batches of 256; ``products_s`` and ``noise_s`` are the machine's limit.
* ``time_to_objective``: exact training in the span of five rows, against the paper's loop to the same objective.
* ``devices_2``: two CPU devices with half of the cells each, against one that may use both cores.
* ``linear_cells``: seconds per cell of a sweep of 10,000 cells against one of 10, and the memory of each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from absl.flags import argparse_flags
from jaxtyping import Array, Float

from dae_theory import GaussianMixture, ReluDae, generalizing_minimizer, memorizing_minimizer
from dae_theory.certificate import certify
from dae_theory.exact_training import minimize_exact_objective
from dae_theory.risk import exact_objective, exact_risk, monte_carlo_estimate
from sims.bench import sweeps as bench_sweeps
from sims.bench.timing import Row, row, seconds, table, write_json
from sims.data import datasets
from sims.sweeps.train import Recipe, advance, start
from sims.terminal import guarded

__all__ = ["GROUPS", "main"]

PRECISION = 1e-4
"""Relative standard error asked of the Monte Carlo rival."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    app.run(lambda args: args.run(args), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(prog="python -m sims.bench", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    names = [*GROUPS, *(name for group in GROUPS.values() for name in group)]
    add("--only", metavar="NAME,...", type=lambda text: text.split(","), default=list(GROUPS), help=", ".join(names))
    add("--repeats", type=int, default=5, help="paired runs of the short rows, >= 1 (5)")
    add("--quick", action="store_true", help="tiny sizes: shows that the benchmark works, not how fast anything is")
    add("--json", metavar="FILE", type=pathlib.Path, help="write the rows there too")
    parser.set_defaults(run=guarded(_run))
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    with contextlib.suppress(RuntimeError):
        # Where JAX has started already its devices stay as they are.
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    every = {name: function for group in GROUPS.values() for name, function in group.items()}
    wanted = [name for asked in args.only for name in GROUPS.get(asked, [asked])]
    unknown = [name for name in wanted if name not in every]
    if unknown:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; choose among {', '.join([*GROUPS, *every])}.")
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}.")
    rows = []
    for name in dict.fromkeys(wanted):
        rows.append(every[name](args.repeats, args.quick))
        sys.stdout.write(table(rows[-1:]) + "\n")
        sys.stdout.flush()
        if args.json:
            write_json(args.json, rows)


def _exact_risk_generalizing(repeats: int, quick: bool) -> Row:
    """Data that the block has units for: all that is wrong is noise, which Monte Carlo averages slowly."""
    return _of_one_cluster("exact_risk_generalizing", 0, repeats, quick)


def _exact_risk_truncated(repeats: int, quick: bool) -> Row:
    """Data of ten times as many directions: what is wrong is mostly what the block drops, the same at each draw."""
    return _of_one_cluster("exact_risk_truncated", 9, repeats, quick)


def _of_one_cluster(name: str, dropped: int, repeats: int, quick: bool) -> Row:
    """A cluster of mean norm 17, as of 32 x 32 images in [-1, 1], and variances 3/j about it, which its units all see:
    j <= p in the directions that the block keeps, and ``dropped`` times as many others."""
    d, p = (64, 6) if quick else (1024, 100)
    key = jax.random.key(0)
    axes = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, 0), (d, d)))[0][:, : (1 + dropped) * p]
    root = axes * jnp.sqrt(3.0 / jnp.arange(1.0, axes.shape[1] + 1.0))[None, :]
    mean = 17.0 * axes[:, 0]
    mixture = GaussianMixture(jnp.ones(1), mean[None], (root @ root.T)[None])
    x = mean + root @ jax.random.normal(jax.random.fold_in(key, 1), (root.shape[1],))
    return _risk_row(name, generalizing_minimizer(mixture, 0.2, 1e-3, p), x, 0.2, repeats, quick)


def _exact_risk_memorizing(repeats: int, quick: bool) -> Row:
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
    found = estimate(False)
    needed = (float(found.standard_error) / PRECISION / float(found.mean)) ** 2 * draws
    scale = needed / draws
    notes = {
        "draws_needed": round(needed),
        "draws_timed": draws,
        "difference_in_standard_errors": abs(float(exact(x)) - float(found.mean)) / float(found.standard_error),
        "ratio_to_gram_form": statistics.median(scale * gram / ours for ours, _, gram in times),
    }
    return row(name, [ours for ours, _, _ in times], [scale * direct for _, direct, _ in times], notes=notes)


def _memorizing_minimizer(repeats: int, quick: bool) -> Row:
    n, d, p = (3, 16, 6) if quick else (5, 1024, 100)
    sigma, decay = 0.2, 1e-2
    # Two free matrices under a loss that averages over pixels too: lambda = d wd / 2.
    penalty = d * decay / 2
    rows = bench_sweeps.separable_rows(n, d)
    data = jnp.asarray(rows)
    minimizer = jax.jit(lambda data: memorizing_minimizer(data, sigma, penalty, p))
    closed = minimizer(data)
    goal = 1.001 * float(exact_objective(closed, data, sigma, penalty))
    notes = {
        "goal": goal,
        "certified_s": min(seconds(lambda: certify(minimizer(data), data, sigma, penalty)) for _ in range(2)),
    }
    ours = [seconds(lambda: minimizer(data)) for _ in range(1 + repeats)][1:]
    rival = _paper_loop(rows, sigma, decay, penalty, p, goal, 500 if quick else 50_000)
    if rival is None:
        return row("memorizing_minimizer", ours, None, notes=notes)
    spent, steps, reached = rival
    notes |= {"rival": "RMSprop in PyTorch", "steps": steps, "reached": reached}
    return row("memorizing_minimizer", ours, [spent] * len(ours), notes=notes)


def _paper_loop(
    rows: np.ndarray, sigma: float, decay: float, penalty: float, width: int, goal: float, max_steps: int
) -> tuple[float, int, bool] | None:
    """Seconds and steps until the exact objective is at most ``goal``, looked at every 250 steps off the clock."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    torch.manual_seed(0)
    x = torch.tensor(rows, dtype=torch.float32)
    w1, w2 = _torch_weights(torch, rows.shape[1], width)
    rule = torch.optim.RMSprop([w1, w2], lr=1e-3, weight_decay=decay)
    objective = jax.jit(exact_objective)
    spent, steps, reached = 0.0, 0, False
    while steps < max_steps and not reached:
        begin = time.perf_counter()
        for _ in range(250):
            y = x + sigma * torch.randn_like(x)
            loss = torch.mean(torch.square(torch.relu(y @ w1) @ w2.T - x))
            rule.zero_grad()
            loss.backward()
            rule.step()
        spent, steps = spent + time.perf_counter() - begin, steps + 250
        dae = ReluDae(*(jnp.asarray(w.detach().numpy().astype(np.float64)) for w in (w1, w2)))
        reached = float(objective(dae, jnp.asarray(rows), sigma, penalty)) <= goal
    return spent, steps, reached


def _adam_loop(
    rows: np.ndarray, width: int, sigma: float, penalty: float, batch_size: int, steps: int
) -> Callable[[], object] | None:
    """A call that trains one network on so many steps of the objective, in float32."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    torch.manual_seed(0)
    data = torch.tensor(rows, dtype=torch.float32)
    w1, w2 = _torch_weights(torch, rows.shape[1], width)
    rule = torch.optim.Adam([w1, w2], lr=bench_sweeps.RATE)

    def train() -> None:
        for _ in range(steps):
            x = data[torch.randint(len(data), (batch_size,))] if batch_size else data
            y = x + sigma * torch.randn_like(x)
            error = torch.square(torch.relu(y @ w1) @ w2.T - x).sum(-1).mean()
            loss = error + penalty * (torch.square(w1).sum() + torch.square(w2).sum())
            rule.zero_grad()
            loss.backward()
            rule.step()

    return train


def _torch_weights(torch: Any, dim: int, width: int) -> tuple[Any, Any]:
    """Two free matrices that start equal, with columns of norm about 0.1."""
    first = 0.1 * torch.randn(dim, width) / dim**0.5
    return first.clone().requires_grad_(), first.clone().requires_grad_()


def _exact_training(repeats: int, quick: bool) -> Row:
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
    found = jax.block_until_ready(minimize_exact_objective(iterate, data, sigma, penalty))
    ours = time.perf_counter() - begin
    course = np.asarray(found.course)[: int(found.iterations[1])]
    # Adam goes on for as long, its gradient looked at off the clock.
    theirs, spent = [(0.0, float(norm(iterate)))], 0.0
    while spent < ours:
        begin = time.perf_counter()
        state = jax.block_until_ready(walk(state, max(100, steps // 20)))
        spent += time.perf_counter() - begin
        theirs.append((spent, float(norm(state.dae))))
    late = [size for at, size in theirs if at >= spent / 2]
    notes = {
        "gradient_norm": float(found.gradient_norm),
        "converged": bool(found.converged),
        "first_call_s": compile_s,
        "rounds": int(found.iterations[1]),
        "objective": float(found.objective),
        "objective_of_adam": float(exact_objective(state.dae, data, sigma, penalty)),
        "floor_of_adam": float(np.median(late)),
        "course": [[ours * (i + 1) / len(course), float(size)] for i, size in enumerate(course)],
        "course_of_adam": theirs,
    }
    return row("exact_training", [ours], None, notes=notes)


GROUPS: dict[str, dict[str, Callable[[int, bool], Row]]] = {
    "theory": {
        "exact_risk_generalizing": _exact_risk_generalizing,
        "exact_risk_truncated": _exact_risk_truncated,
        "exact_risk_memorizing": _exact_risk_memorizing,
        "memorizing_minimizer": _memorizing_minimizer,
        "exact_training": _exact_training,
    },
    "sweeps": {
        **{f"small_cells_n{n}": functools.partial(bench_sweeps.small_cells, n, _adam_loop) for n in (8, 64, 512)},
        "small_cells_grid": functools.partial(bench_sweeps.small_cells_grid, _adam_loop),
        "paper_step": functools.partial(bench_sweeps.paper_step, _adam_loop),
        "time_to_objective": functools.partial(bench_sweeps.time_to_objective, _paper_loop),
        "devices_2": bench_sweeps.devices_2,
        "linear_cells": bench_sweeps.linear_cells,
    },
}
"""Benchmarks by group and name: functions of the number of repeats and of ``quick``."""

if __name__ == "__main__":
    main()
