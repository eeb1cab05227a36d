"""Options of the compiler, and of the linear algebra that it calls, where their defaults are slow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import threadpoolctl

__all__ = ["compiler_options", "cpu_aware", "limit_blas_threads"]

# XLA's own fusions for CPUs run a convolution on one core (jaxlib 0.10); without them it takes all.
PARALLEL_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def cpu_aware() -> bool:
    """Whether to take the CPU's own routines: true if JAX computes on a CPU by default, else the plain ones serve."""
    device = getattr(jax.config, "jax_default_device", None)
    return (getattr(device, "platform", device) or jax.default_backend()) == "cpu"


def compiler_options() -> dict[str, str]:
    """For ``jax.jit(function, compiler_options=...)``: what makes convolutions use every core of a CPU.

    Empty on other devices, and where the installed compiler knows no such option.
    """
    return dict(_known()) if cpu_aware() else {}


def limit_blas_threads() -> None:
    """For entry points, as it is of the whole process: LAPACK on CPUs takes one thread.

    OpenBLAS's other threads wait for its next call by spinning, some 40 ms, in which XLA has one core less: between
    convolutions a factorization that takes 1 ms costs 40. In a program of your own, setting
    ``OPENBLAS_THREAD_TIMEOUT=4`` before Python starts does the same.
    """
    # What JAX calls on CPUs; only what is loaded can be told.
    import scipy.linalg.cython_lapack  # noqa: F401

    threadpoolctl.threadpool_limits(limits=1, user_api="blas")


@functools.cache
def _known() -> dict[str, str]:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=PARALLEL_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return PARALLEL_CONVOLUTIONS
