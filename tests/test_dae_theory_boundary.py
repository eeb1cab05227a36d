"""The predicted boundary: its energies at every size, its crossing against a closed form, monotonicity, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from dae_theory import boundary, conditions, energies, spectra

pytestmark = pytest.mark.optimized

TRIANGLE = 2.0 * np.array([[1.0, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]])
SIZES = (3, 6, 12, 24, 48)


def stream(key, n=48, *, spread=0.2):
    """Samples of three clusters in turn, in any prefix about as many of each."""
    labels = np.arange(n) % 3
    return jnp.asarray(TRIANGLE[labels]) + spread * jax.random.normal(key, (n, 3)), labels


@pytest.mark.slow
def test_objectives_are_the_energies_of_each_prefix(key):
    data, labels = stream(key)
    found = boundary.predicted_boundary(data, labels, SIZES, 0.3, 2e-3, 7)

    @functools.partial(jax.jit, static_argnums=1)
    def prefix(data, n):
        memorizing = energies.memorizing_energy(data, 0.3, 2e-3, 7).objective
        generalizing = energies.best_energy(spectra.empirical_spectra(data, labels[:n]), 0.3, 2e-3, 7).objective
        clusters = conditions.separability(data, labels[:n])
        samples = conditions.separability(data, np.arange(n))
        return memorizing, generalizing, samples.beta, clusters.beta, clusters.alpha

    fields = ("memorizing", "generalizing", "sample_beta", "cluster_beta", "cluster_alpha")
    for i, n in enumerate(SIZES):
        for name, expected in zip(fields, prefix(data[:n], n), strict=True):
            np.testing.assert_allclose(getattr(found, name)[i], expected, rtol=1e-11, err_msg=f"{name} at {n}")
    np.testing.assert_array_equal(found.num_samples, SIZES)
    np.testing.assert_array_equal(found.hybrid, found.generalizing)
    # Three separable samples are still their own clusters; afterwards two of one cluster meet.
    np.testing.assert_array_equal(found.separable, [True, False, False, False, False])


def test_crossing_against_the_closed_form():
    """Points ±v off three means: with units to spare, σ² a sample more against λ/σ-large penalties."""
    offset, n, sigma, penalty, width = 0.3, 600, 0.2, 2e-4, 600
    labels = np.arange(n) % 3
    data = TRIANGLE[labels] + offset * np.array([0.0, 0.0, 1.0]) * np.where(np.arange(n) // 3 % 2, 1, -1)[:, None]
    # Distinct but equally long: a hair's breadth along the mean, far below what matters here.
    data *= (1 + 1e-9 * np.arange(n))[:, None]
    sizes = np.arange(6, n + 1, 6)
    found = boundary.predicted_boundary(jnp.asarray(data), labels, sizes, sigma, penalty, width)
    size = 4 + offset**2

    def memorizing(n):
        return (size * sigma**2 + (n * penalty) ** 2 + 2 * penalty * n * (size - n * penalty)) / (size + sigma**2)

    def generalizing(n):
        parts = [(4.0, 3 * penalty), (offset**2, 3 * penalty)]
        return sum((s * sigma**2 + c**2 + 2 * c * (s - c)) / (s + sigma**2) if s > c else s for s, c in parts)

    expected = scipy.optimize.brentq(lambda n: memorizing(n) - generalizing(n), 6, n)
    # Both energies are smooth over one step of six: the chord misses by its curvature, far under one sample.
    np.testing.assert_allclose(found.crossing, expected, atol=0.05)
    assert float(found.lower) < float(found.crossing) <= float(found.upper) == float(found.lower) + 6


def test_the_boundary_moves_as_the_theory_says(key):
    """Fewer units, a heavier penalty or less noise to pay for: memorizing ends earlier; all from one compilation."""
    data, labels = stream(key)
    sizes = np.arange(3, 49)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def crossing(sigmas, penalties, widths):
        found = functools.partial(boundary.predicted_boundary, data, labels, sizes)
        return jax.vmap(lambda s, r, p: found(s, r, p).crossing)(sigmas, penalties, widths)

    same = jnp.ones(4)
    by_width = np.asarray(crossing(0.3 * same, 1e-4 * same, jnp.array([4, 8, 16, 32])))
    assert np.all(np.diff(by_width) > 0)
    # Where units run out, not the penalty, memorizing ends within a few samples of the width.
    assert np.all(np.abs(by_width - np.array([4, 8, 16, 32])) < np.array([4, 8, 16, 32]) / 2 + 1)
    by_penalty = crossing(0.3 * same, jnp.array([1e-4, 2e-3, 5e-3, 1e-2]), jnp.array([32] * 4))
    assert np.all(np.diff(by_penalty) < 0)
    by_noise = crossing(jnp.array([0.1, 0.2, 0.4, 0.8]), 2e-3 * same, jnp.array([48] * 4))
    assert np.all(np.diff(by_noise) > 0)


def test_without_a_crossing_the_bounds_say_so(key):
    data, labels = stream(key)
    always = boundary.predicted_boundary(data, labels, SIZES, 0.5, 0.0, 48)
    assert float(always.lower) == 48.0
    assert np.isinf(always.upper)
    assert np.isinf(always.crossing)
    never = boundary.predicted_boundary(data, labels, SIZES[1:], 0.1, 0.01, 3)
    assert (float(never.lower), float(never.upper), float(never.crossing)) == (0.0, 6.0, 0.0)


def test_copies_enter_as_copies(key):
    """By multiplicity or as repeated rows."""
    data, labels = stream(key, 12)
    times = np.array([1, 6, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1])
    repeated = np.repeat(np.arange(12), times)
    ends = np.cumsum(times)[[5, 11]]
    counted = boundary.predicted_boundary(data, labels, (6, 12), 0.3, 5e-3, 8, multiplicity=times)
    written = boundary.predicted_boundary(data[repeated], labels[repeated], ends, 0.3, 5e-3, 8)
    np.testing.assert_array_equal(counted.num_samples, ends)
    for one, other in zip(counted, written, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11)
    assert np.all(counted.hybrid != counted.generalizing)


DATA, NAMES = jnp.asarray(TRIANGLE), np.arange(3)
predict = functools.partial(boundary.predicted_boundary, DATA, NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict((1, 3), -0.1, 0.0, 3), "sigma must not be negative"),
        (lambda: predict((1, 3), 0.1, -1.0, 3), "penalty must not be negative"),
        (lambda: predict((1, 3), 0.1, 0.0, 0), "width must be at least 1"),
        (lambda: predict((1, 4), 0.1, 0.0, 3), "sizes must be at most 3, got 4"),
        (lambda: predict((0, 3), 0.1, 0.0, 3), "sizes must be at least 1, got 0"),
        (lambda: predict((2, 2), 0.1, 0.0, 3), "sizes must increase"),
        (lambda: predict((), 0.1, 0.0, 3), "sizes must increase"),
        (lambda: boundary.predicted_boundary(DATA, [0], (1, 3), 0.1, 0.0, 3), "-2 labels"),
        (lambda: boundary.predicted_boundary(DATA * jnp.inf, NAMES, (1, 3), 0.1, 0.0, 3), "non-finite"),
        (lambda: boundary.predicted_boundary(DATA * 0.0, NAMES, (1, 3), 0.1, 0.0, 3), "2 rows equal"),
        (lambda: jax.jit(lambda x: boundary.predicted_boundary(x, NAMES, (3,), 0.1, 0.0, 3))(DATA), "concrete"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lowers_for_accelerators():
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    data = DATA.astype(jnp.float32)
    jitted = jax.jit(lambda s, r, p: boundary.predicted_boundary(data, NAMES, (2, 3), s, r, p))
    jitted.trace(scalar, scalar, jax.ShapeDtypeStruct((), jnp.int32)).lower(lowering_platforms=("tpu", "cuda"))
