"""Options of the compiler where its defaults are slow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from scaling.models.layers import cpu_aware

__all__ = ["compiler_options"]

# XLA's own fusions for CPUs run a convolution on one core (jaxlib 0.10); without them it takes all.
PARALLEL_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiler_options() -> dict[str, str]:
    """For ``jax.jit(function, compiler_options=...)``: what makes convolutions use every core of a CPU.

    Empty on other devices, and where the installed compiler knows no such option.
    """
    return dict(_known()) if cpu_aware() else {}


@functools.cache
def _known() -> dict[str, str]:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=PARALLEL_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return PARALLEL_CONVOLUTIONS
