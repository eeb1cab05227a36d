r"""The two-layer ReLU denoising autoencoder, ``f(y) = W₂ [W₁ᵀ y]₊`` :cite:`zhang26`, eq. (5).

Weights have shape (d, p), as in the paper. Functions take one example ``y`` of shape (d,) and raise ``ValueError`` for
another rank; batch with ``jax.vmap``. The code ``h(y) = [W₁ᵀ y]₊`` of shape (p,) is the representation whose spikiness
distinguishes memorized from novel samples.

The paper's network is :class:`ReluDae`. :class:`AffineDae` adds biases, ``f(y) = W₂ [W₁ᵀ y + b₁]₊ + b₂``, which the
paper mentions and this library works out (:mod:`dae_theory.convexity`). A function whose argument is a :data:`Dae`
takes both; for the bias-free network its formula is the one with biases of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dae_theory.checks import check_example, check_integer
from dae_theory.precision import full_precision
from dae_theory.types import PRNGKey, Scalar

__all__ = [
    "AffineDae",
    "Dae",
    "ReluDae",
    "augmented",
    "by_unit",
    "decode",
    "denoise",
    "encode",
    "from_augmented",
    "init",
    "jacobian",
    "live_columns",
    "preactivations",
    "target",
    "with_biases",
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


class AffineDae(NamedTuple):
    """Weights and biases of the autoencoder ``f(y) = W₂ [W₁ᵀ y + b₁]₊ + b₂``; a pytree. The penalty is on W₁ and W₂.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = AffineDae(jnp.eye(2), jnp.array([0.0, -1.0]), jnp.eye(2), jnp.array([0.5, 0.5]))
        >>> denoise(dae, jnp.array([2.0, 2.0])).tolist()
        [2.5, 1.5]
    """

    w1: Float[Array, "d p"]
    """Encoder W₁, one column per unit."""
    b1: Float[Array, " p"]
    """Encoder bias: unit j is on where ``w₁ⱼᵀ y > −b₁ⱼ``."""
    w2: Float[Array, "d p"]
    """Decoder W₂, one column per unit."""
    b2: Float[Array, " d"]
    """Decoder bias, the output where all units are off."""


Dae: TypeAlias = ReluDae | AffineDae
"""A two-layer autoencoder, without or with biases."""

D = TypeVar("D", bound=Dae)


def with_biases(dae: Dae) -> AffineDae:
    """The same network as an :class:`AffineDae`: biases of zero where ``dae`` has none.

    Example:
        >>> import jax.numpy as jnp
        >>> with_biases(ReluDae(jnp.eye(2), jnp.eye(2))).b1.tolist()
        [0.0, 0.0]
    """
    if isinstance(dae, AffineDae):
        return dae
    d, p = dae.w1.shape
    return AffineDae(dae.w1, jnp.zeros(p, dae.w1.dtype), dae.w2, jnp.zeros(d, dae.w2.dtype))


def augmented(dae: Dae) -> tuple[Float[Array, "D p"], Float[Array, "d P"]]:
    """Encoder and decoder columns, with b₁ as one more coordinate of the former and b₂ as one more of the latter.

    With biases D = d + 1, for an input (y, 1), and P = p + 1, for a code (h, 1); without them D = d and P = p.
    """
    if not isinstance(dae, AffineDae):
        return dae.w1, dae.w2
    return jnp.concatenate([dae.w1, dae.b1[None, :]]), jnp.concatenate([dae.w2, dae.b2[:, None]], axis=1)


def from_augmented(encoder: Float[Array, "D p"], decoder: Float[Array, "d P"]) -> Dae:
    """The network of :func:`augmented`, which has biases if P = p + 1."""
    if encoder.shape[1] == decoder.shape[1]:
        return ReluDae(encoder, decoder)
    return AffineDae(encoder[:-1], encoder[-1], decoder[:, :-1], decoder[:, -1])


def by_unit(dae: D, function: Callable[[Array], Array]) -> D:
    """The network with ``function`` applied to each part that has a last axis of units: W₁, b₁ and W₂, but not b₂.

    Example:
        >>> import jax.numpy as jnp
        >>> by_unit(ReluDae(jnp.eye(3), jnp.eye(3)), lambda w: w[..., :2]).w1.shape
        (3, 2)
    """
    return type(dae)(**{name: w if name == "b2" else function(w) for name, w in dae._asdict().items()})


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
def preactivations(dae: Dae, y: Float[Array, " d"]) -> Float[Array, " p"]:
    r"""What the rectifiers of the units are applied to, :math:`W_1^\top y + b_1`."""
    check_example("y", y)
    linear = y @ dae.w1
    return linear + dae.b1 if isinstance(dae, AffineDae) else linear


@full_precision
def encode(dae: Dae, y: Float[Array, " d"]) -> Float[Array, " p"]:
    r"""The code :cite:`zhang26`, eq. (5).

    .. math:: h(y) = [W_1^\top y + b_1]_+

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), jnp.eye(2))
        >>> encode(dae, jnp.array([1.5, -2.0])).tolist()
        [1.5, 0.0]
    """
    return jax.nn.relu(preactivations(dae, y))


@full_precision
def decode(dae: Dae, code: Float[Array, " p"]) -> Float[Array, " d"]:
    r"""The sample that a code stands for, :math:`W_2 h + b_2`."""
    check_example("code", code)
    linear = dae.w2 @ code
    return linear + dae.b2 if isinstance(dae, AffineDae) else linear


def target(dae: Dae, x: Float[Array, " d"]) -> Float[Array, " d"]:
    r"""What the units have to add up to at a clean sample, :math:`x - b_2`."""
    return x - dae.b2 if isinstance(dae, AffineDae) else x


@full_precision
def denoise(dae: Dae, y: Float[Array, " d"]) -> Float[Array, " d"]:
    r"""The denoised sample :cite:`zhang26`, eq. (5).

    .. math:: f(y) = W_2 [W_1^\top y + b_1]_+ + b_2

    Example:
        >>> import jax, jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), 0.5 * jnp.eye(2))
        >>> jax.vmap(denoise, in_axes=(None, 0))(dae, jnp.array([[1.0, -2.0], [3.0, 4.0]])).tolist()
        [[0.5, 0.0], [1.5, 2.0]]
    """
    return decode(dae, encode(dae, y))


@full_precision
def jacobian(dae: Dae, y: Float[Array, " d"]) -> Float[Array, "d d"]:
    r"""Derivative of :func:`denoise` with respect to the input; constant as long as no gate switches.

    .. math:: J(y) = W_2 \, \mathrm{diag}(1[W_1^\top y + b_1 > 0]) \, W_1^\top

    A unit whose preactivation is exactly 0 counts as off, as in ``jax.nn.relu``.

    Example:
        >>> import jax.numpy as jnp
        >>> dae = ReluDae(jnp.eye(2), jnp.eye(2))
        >>> jacobian(dae, jnp.array([1.0, -2.0])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    active = (preactivations(dae, y) > 0).astype(y.dtype)
    return (dae.w2 * active[None, :]) @ dae.w1.T


def live_columns(dae: Dae, *, tolerance: Scalar = 1e-3) -> Bool[Array, " p"]:
    """Which units respond to the input: ``‖w₁ⱼ‖ ‖w₂ⱼ‖`` above ``tolerance`` times the largest such product.

    A unit with ``w₁ⱼ = 0`` and a positive bias adds a constant, which belongs to b₂: it does not count.
    """
    size = jnp.linalg.norm(dae.w1, axis=0) * jnp.linalg.norm(dae.w2, axis=0)
    return size > tolerance * jnp.max(size, initial=0.0)
