"""What tests of networks share: a network of a configuration with the golden files' random weights, and common
checks."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import parameter

from scaling.models.config import to_jax
from scaling.models.model import Model, from_config, parse_config


def network(config, dtype="float32") -> Model:
    """The model of a configuration; its weights depend on their names alone."""
    specs = parse_config(config).parameters()
    return from_config(
        config,
        {name: jnp.asarray(to_jax(spec.kind, parameter(name, spec.shape)), dtype) for name, spec in specs.items()},
    )


def difference(ours, reference):
    """Largest difference as a fraction of the largest value; infinite where shapes differ or ours is not finite."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape or not np.all(np.isfinite(ours)):
        return np.inf
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


def check_derivative(function, x, *, step=1e-4):
    """Directional derivative of a float64 function by jvp, by the gradient, and by a symmetric difference."""
    u = jnp.asarray(np.random.RandomState(0).standard_normal(x.shape))
    w = jnp.asarray(np.random.RandomState(1).standard_normal(jax.eval_shape(function, x).shape))

    @jax.jit
    def derivatives(x):
        # Values and both derivatives in one program.
        out, along = jax.jvp(function, (x,), (u,))
        return out, along, jnp.vdot(jax.grad(lambda x: jnp.vdot(function(x), w))(x), u)

    (ahead, _, _), (behind, _, _), (_, along, by_gradient) = map(derivatives, (x + step * u, x - step * u, x))
    np.testing.assert_allclose(by_gradient, jnp.vdot(along, w), rtol=1e-9)
    by_difference = (ahead - behind) / (2 * step)
    # The truncation is O(step²) times the third derivative, the rounding 1e-16/step.
    assert difference(by_difference, along) < 1e-5


def check_half_precision(config, run):
    """``run(model)`` in bfloat16 and float16 is the float32 result up to their rounding, and of their dtype.

    A result of hundreds of roundings of relative size ε, in random directions, is some 10 to 20 ε away.
    """
    exact = run(network(config))
    for dtype in ("bfloat16", "float16"):
        out = run(network(config, dtype))
        assert out.dtype == dtype
        assert difference(out, exact) < 30 * float(jnp.finfo(dtype).eps)


def check_lowering(model):
    """It compiles for accelerators, taps and all, from shapes alone."""
    inputs, more = model.apply.inputs("float32")
    params = jax.eval_shape(lambda: model.params)
    traced = jax.jit(lambda params, *args, **more: model.apply(params, *args, **more)[0]).trace(params, *inputs, **more)
    traced.lower(lowering_platforms=("tpu", "cuda"))
