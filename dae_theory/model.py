r"""The two-layer ReLU denoising autoencoder, ``f(y) = W₂ [W₁ᵀ y]₊`` :cite:`zhang26`, eq. (5).

Weights have shape (d, p), as in the paper; there are no biases. Functions take one example ``y`` of shape (d,) and
raise ``ValueError`` for another rank; batch with ``jax.vmap``. The code ``h(y) = [W₁ᵀ y]₊`` of shape (p,) is the
representation whose spikiness distinguishes memorized from novel samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dae_theory.checks import check_example, check_integer
from dae_theory.precision import full_precision
from dae_theory.types import PRNGKey, Scalar

__all__ = [
    "ReluDae",
    "denoise",
    "encode",
    "init",
    "jacobian",
    "live_columns",
]


class ReluDae(NamedTuple):
    """Weights of the autoencoder; a pytree. ``ReluDae(w, w)`` is the tied network.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.ones((3, 5))
        >>> dae = ReluDae(w, w)
        >>> denoise(dae, jnp.ones(3)).shape
        (3,)
    """

    w1: Float[Array, "d p"]
    """Encoder W₁, one column per unit."""
    w2: Float[Array, "d p"]
    """Decoder W₂, one column per unit."""


def init(key: PRNGKey, dim: int, width: int, *, scale: Scalar = 1.0, dtype: DTypeLike | None = None) -> ReluDae:
    """Random tied initialization: columns of W₁ = W₂ are ``scale`` × N(0, I/d), so their norms are about ``scale``.

    Column j uses the key ``fold_in(key, j)``, so a wider network extends a narrower one. Raises ``ValueError`` unless
    ``dim`` d and ``width`` p are at least 1.
    """
    check_integer("dim", dim, minimum=1)
    check_integer("width", width, minimum=1)
    keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(width))
    columns = jax.vmap(lambda k: jax.random.normal(k, (dim,), dtype))(keys)
    w = columns.T * scale / dim**0.5
    return ReluDae(w, w)


@full_precision
def encode(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, " p"]:
    r"""The code :cite:`zhang26`, eq. (5).

    .. math:: h(y) = [W_1^\top y]_+

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), jnp.eye(2))
        >>> encode(dae, jnp.array([1.5, -2.0])).tolist()
        [1.5, 0.0]
    """
    check_example("y", y)
    return jax.nn.relu(y @ dae.w1)


@full_precision
def denoise(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, " d"]:
    r"""The denoised sample :cite:`zhang26`, eq. (5).

    .. math:: f(y) = W_2 [W_1^\top y]_+

    Example:
        >>> import jax, jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), 0.5 * jnp.eye(2))
        >>> jax.vmap(denoise, in_axes=(None, 0))(dae, jnp.array([[1.0, -2.0], [3.0, 4.0]])).tolist()
        [[0.5, 0.0], [1.5, 2.0]]
    """
    return dae.w2 @ encode(dae, y)


@full_precision
def jacobian(dae: ReluDae, y: Float[Array, " d"]) -> Float[Array, "d d"]:
    r"""Derivative of :func:`denoise` with respect to the input; constant as long as no gate switches.

    .. math:: J(y) = W_2 \, \mathrm{diag}(1[W_1^\top y > 0]) \, W_1^\top

    A unit whose preactivation is exactly 0 counts as off, as in ``jax.nn.relu``.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), jnp.eye(2))
        >>> jacobian(dae, jnp.array([1.0, -2.0])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    check_example("y", y)
    active = (y @ dae.w1 > 0).astype(y.dtype)
    return (dae.w2 * active[None, :]) @ dae.w1.T


def live_columns(dae: ReluDae, *, tolerance: Scalar = 1e-3) -> Bool[Array, " p"]:
    """Which units contribute: those with ``‖w₁ⱼ‖ ‖w₂ⱼ‖`` above ``tolerance`` times the largest such product."""
    size = jnp.linalg.norm(dae.w1, axis=0) * jnp.linalg.norm(dae.w2, axis=0)
    return size > tolerance * jnp.max(size, initial=0.0)
