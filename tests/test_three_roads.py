"""Three roads to one network: closed form, Monte Carlo, and training from the data with fresh noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dae_theory import exact_risk, memorizing_minimizer, merge_parallel_columns
from dae_theory.energies import memorizing_energy
from dae_theory.model import live_columns
from dae_theory.risk import monte_carlo_estimate
from dae_theory.symmetry import group_sums
from sims.sweeps.train import Recipe, advance, start

# A simplex in R³, where Corollary 3.2 applies: ‖x‖² = 6.75, cosines −1/3.
DATA = jnp.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1.5
SIGMA, PENALTY, SEEDS = 0.2, 0.05, 16


@pytest.fixture(scope="module")
def trained():
    """Networks from independent random starts and noises; eight units for four samples."""
    recipe = Recipe(width=8, optimizer="adam", schedule="cosine", steps=20_000)

    def one(seed):
        init_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(5), seed))
        state = start(init_key, 3, recipe, learning_rate=3e-3, init_scale=0.3, dtype=DATA.dtype)
        rates = {"sigma": SIGMA, "penalty": PENALTY, "learning_rate": 3e-3}
        return advance(state, step_key, DATA, recipe.steps, recipe, **rates).dae

    return jax.jit(jax.vmap(one))(jnp.arange(SEEDS))


def test_closed_form_and_monte_carlo_meet(key):
    closed = memorizing_minimizer(DATA, SIGMA, PENALTY, 4)
    estimate = monte_carlo_estimate(key, closed, DATA, SIGMA, num_draws=20_000)
    risk = float(memorizing_energy(DATA, SIGMA, PENALTY).risk)
    assert abs(float(estimate.mean) - risk) < 5 * float(estimate.standard_error)
    # Noise opens one of three foreign gates, at distance ‖x‖/3, with this probability; the output then gains about σ
    # along that sample: σ² + 2 σ |x_i·x_j|/‖x‖ of squared error at most. (Columns are shorter than 1.)
    leak = 3 * scipy.stats.norm.cdf(-np.sqrt(6.75) / 3 / SIGMA) * (SIGMA**2 + 2 * SIGMA * np.sqrt(6.75) / 3)
    assert abs(float(exact_risk(closed, DATA, SIGMA)) - risk) < leak < 1e-3 * risk


def test_training_meets_the_closed_form(trained):
    """Squared column norms by sample, and the exact risk, within five standard errors over seeds.

    The closed form is a local minimum, not the only one: some starts leave two samples to share a unit. Such runs are
    told by their number of units, not by the values compared.
    """
    merged = jax.vmap(lambda dae: merge_parallel_columns(dae, tolerance=0.01))(trained)
    units = np.asarray(jax.vmap(lambda dae: jnp.sum(live_columns(dae, tolerance=0.03)))(merged))
    memorizes = units == 4
    assert np.count_nonzero(memorizes) > SEEDS / 2
    count = np.count_nonzero(memorizes)
    sums = np.asarray(jax.vmap(lambda dae: group_sums(dae, DATA, tolerance=0.01))(merged))[memorizes]
    risks = np.asarray(jax.vmap(lambda dae: exact_risk(dae, DATA, SIGMA))(trained))[memorizes]
    q = (6.75 - 4 * PENALTY) / (6.75 + SIGMA**2)
    risk = float(memorizing_energy(DATA, SIGMA, PENALTY).risk)
    for found, expected in ((sums, q), (risks, risk)):
        error = found.std(0, ddof=1) / np.sqrt(count)
        assert np.all(np.abs(found.mean(0) - expected) < 5 * error)
        # The runs agree closely enough for that to mean something.
        assert np.all(error < 5e-3 * expected)
