"""Array aliases and the interface of denoisers.

Shapes use the letters of the paper: ``n`` samples, ``d`` data dimension, ``p`` hidden units, ``K`` modes.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, Key

__all__ = ["Denoiser", "PRNGKey", "Scalar"]

Scalar: TypeAlias = Float[Array, ""] | float | int
"""A real number: a Python number or a zero-dimensional floating array."""

PRNGKey: TypeAlias = Key[Array, ""]
"""One typed key, as made by ``jax.random.key``."""


@runtime_checkable
class Denoiser(Protocol):
    r"""An estimate of the clean sample, ``D(y, σ) ≈ E[x | y]`` for ``y = x + σ ε``, ``ε ~ N(0, I)``.

    Takes and returns one example of shape (d,); batch it with ``jax.vmap``. Its score is ``(D(y, σ) − y)/σ²``
    (Tweedie).

    Example:
        >>> import functools, jax.numpy as jnp
        >>> from dae_theory import empirical_denoiser
        >>> isinstance(functools.partial(empirical_denoiser, data=jnp.eye(2)), Denoiser)
        True
    """

    def __call__(self, y: Float[Array, " d"], sigma: Scalar, /) -> Float[Array, " d"]:
        """Denoise one example ``y`` of noise level ``sigma``."""
        ...
