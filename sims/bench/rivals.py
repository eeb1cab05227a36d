"""What the rows compare with: training loops in PyTorch, as papers write them; None where it is not installed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dae_theory import ReluDae
from dae_theory.risk import exact_objective
from sims.bench.timing import fastest_threads

__all__ = ["RATE", "adam_loop", "paper_loop", "separable_rows"]

RATE = 3e-3
"""Step size of Adam, ours and the rival's."""


def separable_rows(n: int, d: int) -> np.ndarray:
    """Centered random rows of one norm, sqrt(0.3 d): their cosines are negative where n is small."""
    rows = np.random.default_rng(0).standard_normal((n, d))
    rows -= rows.mean(axis=0)
    rows *= np.sqrt(0.3 * d) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def paper_loop(
    rows: np.ndarray, sigma: float, decay: float, penalty: float, width: int, goal: float, max_steps: int
) -> tuple[float, int, bool] | None:
    """Seconds and steps of RMSprop until the exact objective is at most ``goal``, and whether it got there.

    The objective is computed every 250 steps, off the clock. None without PyTorch.
    """
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

    def walk(count: int) -> None:
        for _ in range(count):
            y = x + sigma * torch.randn_like(x)
            loss = torch.mean(torch.square(torch.relu(y @ w1) @ w2.T - x))
            rule.zero_grad()
            loss.backward()
            rule.step()

    before = copy.deepcopy((w1.data, w2.data, rule.state_dict()))
    fastest_threads(lambda: walk(50))
    w1.data, w2.data = before[:2]
    rule.load_state_dict(before[2])
    while steps < max_steps and not reached:
        begin = time.perf_counter()
        walk(250)
        spent, steps = spent + time.perf_counter() - begin, steps + 250
        dae = ReluDae(*(jnp.asarray(w.detach().numpy().astype(np.float64)) for w in (w1, w2)))
        reached = float(objective(dae, jnp.asarray(rows), sigma, penalty)) <= goal
    return spent, steps, reached


def adam_loop(
    rows: np.ndarray, width: int, sigma: float, penalty: float, batch_size: int, steps: int
) -> Callable[[], object] | None:
    """A function that trains one network for ``steps`` steps of Adam in float32; None without PyTorch.

    ``batch_size`` rows are drawn with replacement at each step; 0 takes all rows.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    torch.manual_seed(0)
    data = torch.tensor(rows, dtype=torch.float32)
    w1, w2 = _torch_weights(torch, rows.shape[1], width)
    rule = torch.optim.Adam([w1, w2], lr=RATE)

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
    """Two free matrices that start equal, their columns of norm about 0.1."""
    first = 0.1 * torch.randn(dim, width) / dim**0.5
    return first.clone().requires_grad_(), first.clone().requires_grad_()
