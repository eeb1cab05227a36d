"""The price of memory: both sides against the paper's energies and exact training, and where memorizing ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import affine_generalizing_minimizer, affine_memorizing_minimizer
from dae_theory.energies import best_energy, memorizing_energy
from dae_theory.exact_training import minimize_exact_objective
from dae_theory.price import nested_prices, pays_up_to, price_of_memory
from dae_theory.spectra import empirical_spectra


def circle(n, radius=3.0):
    turns = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def sphere(n, dim, radius=3.0):
    rows = np.random.default_rng(0).normal(size=(n, dim))
    return radius * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_without_biases_both_sides_are_the_energies_of_the_paper():
    data = np.random.default_rng(0).normal(size=(9, 4))
    for width in (3, 9):
        price = price_of_memory(data, 0.3, 0.01, width=width)
        stored = memorizing_energy(jnp.asarray(data), 0.3, 0.01, width)
        block = best_energy(empirical_spectra(jnp.asarray(data), np.zeros(9, int)), 0.3, 0.01, width)
        np.testing.assert_allclose(price.plain_memorizing, sum(stored), rtol=1e-12)
        np.testing.assert_allclose(price.plain_generalizing, sum(block), rtol=1e-12)


@pytest.mark.parametrize(("dim", "expected"), [(2, 4), (8, None)])
def test_memorizing_ends_where_gates_are_nearer_than_the_root_of_the_rank(dim, expected):
    """Without penalty a sample costs about σ²L²/(κ² + σ²), against rσ²: on a circle up to four points."""
    sizes = (2, 3, 4, 5, 6, 8, 16, 64, 256)
    prices = nested_prices(sphere(256, dim), 0.02, 0.0, sizes) if dim > 2 else [
        price_of_memory(circle(n), 0.02, 0.0) for n in sizes
    ]  # fmt: skip
    for price in prices:
        # Far from the crossing, where leakage does not decide.
        ratio = price.length / max(price.gate, 1e-9) / np.sqrt(min(dim, price.num_samples - 1))
        if not 0.7 < ratio < 1.3:
            assert (price.memorizing < price.generalizing) == (ratio < 1)
    end = pays_up_to(prices)
    assert end == expected if dim == 2 else end >= 16
    assert pays_up_to(prices, biases=False) in (None, 2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_exact_training_ends_memorizing_where_predicted(n):
    """Started at both closed forms, the lower of the two minima found is the one predicted, and both are within 8 % of
    their predictions."""
    data, sigma, penalty = jnp.asarray(circle(n)), 0.1, 1e-4
    price = price_of_memory(circle(n), sigma, penalty)
    found = [
        minimize_exact_objective(start, data, sigma, penalty, method="products", tolerance=1e-9)
        for start in (
            affine_memorizing_minimizer(data, sigma, penalty),
            affine_generalizing_minimizer(data, sigma, penalty, 2, width=n),
        )
    ]
    assert all(trained.converged for trained in found)
    memorizing, generalizing = (float(trained.objective) for trained in found)
    assert memorizing == pytest.approx(price.memorizing, rel=0.08)
    assert generalizing == pytest.approx(price.generalizing, rel=1e-6)
    assert (memorizing < generalizing) == (price.memorizing < price.generalizing) == (n <= 4)


def test_units_that_are_too_few_go_to_what_they_save_most():
    price = price_of_memory(sphere(12, 6), 0.1, 1e-4, width=5)
    whole = price_of_memory(sphere(12, 6), 0.1, 1e-4)
    assert price.memorizing > whole.memorizing
    # Each of the seven others, nearest to the offset, costs its squared distance from it.
    kept = np.sort(memorize(sphere(12, 6), 0.1, 1e-4).lengths)[:7]
    assert price.memorizing == pytest.approx(np.sum(kept**2) / 12, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: price_of_memory(np.zeros((1, 2)), 0.1, 0.0), "two samples or more"),
        (lambda: price_of_memory(circle(3), 0.1, 0.0, width=0), "width"),
        (lambda: nested_prices(circle(3), 0.1, 0.0, [4]), "size"),
        (lambda: nested_prices(circle(3), 0.1, 0.0, [1]), "size"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
