"""Costs of a step: XLA's count against the products by hand, and the roofline at both of its sides."""

import pytest

from sims.bench.cost import Cost, bound, step_cost
from sims.sweeps.spec import Spec


@pytest.mark.parametrize("n", [32, 128])
def test_operations_are_those_of_five_products_and_little_else(n):
    """Two products forward, three back, 2 n d p operations each; the rest is less than half as much again."""
    spec = Spec(num_samples=n, width=48, sigma=(0.1, 0.2, 0.4), seeds=1)
    products = 5 * 2 * n * 64 * 48
    cost = step_cost(spec)
    assert products <= cost.flops < 1.5 * products
    # Weights, gradients and moments are read or written at least once.
    assert cost.bytes > 4 * 2 * 64 * 48 * 4


def test_the_bound_is_the_slower_of_cores_and_memory():
    cost = Cost(flops=1e6, bytes=1e3)
    assert bound(cost, flops_per_s=1e9, bytes_per_s=1e12) == pytest.approx(1e3)
    assert bound(cost, flops_per_s=1e15, bytes_per_s=1e6) == pytest.approx(1e3)
