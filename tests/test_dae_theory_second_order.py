"""The closed-form Hessian against automatic differentiation, its corners, and the Newton step it gives."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dae_theory import ReluDae, exact_objective, second_order
from dae_theory.certificate import hessian
from dae_theory.model import init
from dae_theory.second_order import factorize, forward_root, inverse_root, objective_hessian, to_matrix


def problem(key, n, d, p, scale=1.0):
    start = init(jax.random.fold_in(key, 0), d, p)
    data = scale * jax.random.normal(jax.random.fold_in(key, 1), (n, d))
    return ReluDae(start.w1, init(jax.random.fold_in(key, 2), d, p).w2), data


@pytest.mark.slow
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.sampled_from([(1, 1, 1), (4, 1, 3), (2, 3, 2), (6, 4, 5)]),
    st.integers(-3, 3),
    st.sampled_from([0.05, 0.5, 2.0]),
    st.integers(0, 99),
)
def test_products_with_all_basis_vectors_give_the_same_matrix(shape, exponent, relative_sigma, seed):
    """Shapes, scales of the data from 1e-3 to 1e3, and noise from well inside the gates to across all of them."""
    scale = 10.0**exponent
    dae, data = problem(jax.random.key(seed), *shape, scale)
    got = to_matrix(objective_hessian(dae, data, relative_sigma * scale, 0.01))
    want = hessian(dae, data, relative_sigma * scale, 0.01)
    # Either road rounds relative to its largest term.
    np.testing.assert_allclose(got, want, atol=1e-11 * float(jnp.max(jnp.abs(want))))


def test_chunks_do_not_matter(key, monkeypatch):
    dae, data = problem(key, 6, 4, 5)
    want = to_matrix(objective_hessian(dae, data, 0.4, 0.1))
    monkeypatch.setattr(second_order, "PAIRS_PER_CHUNK", 20)
    # Ten pairs, three at a time.
    assert second_order._pair_batches(6, 5)[3] == 4
    # Jitted anew, or the program compiled above would run again.
    anew = jax.jit(lambda *args: second_order._objective_hessian.__wrapped__(*args))
    chunked = to_matrix(anew(dae, data, jnp.asarray(0.4), jnp.asarray(0.1)))
    np.testing.assert_allclose(chunked, want, atol=1e-12 * float(jnp.max(jnp.abs(want))))


@pytest.mark.parametrize("factor", [2.0, -2.0])
@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 1e-2])
def test_nearly_parallel_columns(key, factor, angle):
    """The joint density at zero grows without bound, what it multiplies vanishes; against differences of gradients."""
    dae, data = problem(key, 6, 3, 3)
    w = dae.w1[:, 0]
    dae = ReluDae(dae.w1.at[:, 1].set(factor * (w + angle * jnp.roll(w, 1))), dae.w2)
    got = to_matrix(objective_hessian(dae, data, 0.5, 0.01))
    assert bool(jnp.all(jnp.isfinite(got)))
    # A direction that keeps the angle: there the gradient is smooth.
    move = jax.tree.map(jnp.zeros_like, dae)
    move = ReluDae(move.w1.at[:, 0].set(dae.w1[:, 0]).at[:, 1].set(dae.w1[:, 1]), move.w2.at[0, 2].set(1.0))
    v, unravel = ravel_pytree(move)
    x = ravel_pytree(dae)[0]
    gradient = jax.grad(lambda x: exact_objective(unravel(x), data, 0.5, 0.01))
    step = 1e-5
    want = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    # Central differences: the third derivative's part is about step², rounding about eps/step.
    np.testing.assert_allclose(got @ v, want, atol=1e-8 * float(jnp.max(jnp.abs(want))) + 1e-9)


def test_a_zero_column_has_no_hessian(key):
    """Its blocks say so; those of other units are those of the network without it."""
    dae, data = problem(key, 6, 3, 3)
    dead = ReluDae(dae.w1.at[:, 1].set(0.0), dae.w2.at[:, 1].set(0.0))
    got = objective_hessian(dead, data, 0.4, 0.1)
    assert bool(jnp.all(jnp.isnan(got.inner[1, :, 1, :])))
    kept = jnp.array([0, 2])
    alone = objective_hessian(ReluDae(dead.w1[:, kept], dead.w2[:, kept]), data, 0.4, 0.1)
    np.testing.assert_allclose(got.inner[kept][:, :, kept], alone.inner, atol=1e-14)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_root_of_the_inverse_is_one(key, shift):
    dae, data = problem(key, 6, 3, 3)
    h = objective_hessian(dae, data, 0.4, 20.0)
    matrix = to_matrix(h)
    unravel = ravel_pytree(dae)[1]
    factors, identity = factorize(h, shift), jnp.eye(len(matrix))
    root = jax.vmap(lambda z: ravel_pytree(inverse_root(factors, unravel(z)))[0], out_axes=1)(identity)
    forth = jax.vmap(lambda z: ravel_pytree(forward_root(factors, unravel(z)))[0], out_axes=1)(identity)
    np.testing.assert_allclose(root.T @ (matrix + shift * identity) @ root, identity, atol=1e-12)
    np.testing.assert_allclose(root.T @ forth, identity, atol=1e-12)


def test_an_indefinite_matrix_has_no_factors_until_the_shift_outweighs_it(key):
    dae, data = problem(key, 6, 3, 3)
    h = objective_hessian(dae, data, 0.4, 0.0)
    lowest = float(jnp.linalg.eigvalsh(to_matrix(h))[0])
    assert lowest < 0
    assert bool(jnp.any(jnp.isnan(factorize(h, -0.99 * lowest).inner)))
    assert all(bool(jnp.all(jnp.isfinite(f))) for f in factorize(h, -1.01 * lowest))


def test_lowers_for_accelerators_and_refuses_bad_input(key):
    dae, data = problem(key, 4, 3, 2)
    lower = functools.partial(jax.jit(objective_hessian).trace(dae, data, 0.4, 0.1).lower)
    lower(lowering_platforms=("tpu", "cuda"))
    with pytest.raises(ValueError, match="sigma"):
        objective_hessian(dae, data, 0.0, 0.1)
    with pytest.raises(ValueError, match="penalty"):
        objective_hessian(dae, data, 1.0, -0.1)
    with pytest.raises(ValueError, match="do not fit"):
        objective_hessian(dae, data[:, :2], 1.0, 0.1)
    with pytest.raises(ValueError, match="finite"):
        objective_hessian(dae, data.at[0, 0].set(jnp.inf), 1.0, 0.1)
