"""Settings for JAX on CPUs, where the defaults of the compiler and of LAPACK are slow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import threadpoolctl

__all__ = ["compiler_options", "cpu_aware", "limit_blas_threads"]

# With XLA's own fusions for CPUs a convolution runs on one core (jaxlib 0.10); without them, on all.
PARALLEL_CONVOLUTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def cpu_aware() -> bool:
    """Whether JAX computes on a CPU by default, and the routines written for CPUs should be used."""
    device = getattr(jax.config, "jax_default_device", None)
    return (getattr(device, "platform", device) or jax.default_backend()) == "cpu"


def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit(function, compiler_options=...)`` that make convolutions use every core of a CPU.

    Empty on other devices, and if the installed compiler does not know the option.
    """
    return dict(_known()) if cpu_aware() else {}


def limit_blas_threads() -> None:
    """Limit LAPACK on CPUs to one thread, in the whole process; call it from entry points only.

    OpenBLAS's other threads spin for some 40 ms while they wait for its next call, and take a core from XLA meanwhile:
    between convolutions, a factorization of 1 ms costs 40 ms. In your own programs, setting
    ``OPENBLAS_THREAD_TIMEOUT=4`` before Python starts has the same effect.
    """
    # JAX calls this library on CPUs; the limit applies only to libraries that are already loaded.
    import scipy.linalg.cython_lapack  # noqa: F401

    threadpoolctl.threadpool_limits(limits=1, user_api="blas")


@functools.cache
def _known() -> dict[str, str]:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=PARALLEL_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return PARALLEL_CONVOLUTIONS
