"""Input checks, shared by all packages.

Static properties (rank, shape, dtype) are always checked. Values are checked if they are concrete, as in an eager call;
under a trace (``jit``, ``vmap``, ``grad``) they are unknown and pass. Messages name the value and say what to do.

JAX and NumPy are imported when an array is checked: specifications of experiments are checked by command lines that
have not loaded them yet.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

__all__ = [
    "check_data",
    "check_example",
    "check_finite",
    "check_integer",
    "check_level",
    "check_nonnegative",
    "check_number",
    "check_positive",
    "check_seed",
    "is_concrete",
]


def is_concrete(*values: object) -> bool:
    """Whether no leaf of ``values`` is a tracer, so that its numbers can be inspected."""
    if all(isinstance(value, (int, float)) for value in values):
        return True
    import jax.core

    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def check_finite(name: str, value: Any) -> None:
    """Raise ``ValueError`` if a concrete ``value`` has a NaN or an infinity; the message counts them."""
    if not is_concrete(value):
        return
    if isinstance(value, (int, float)):
        bad = int(not math.isfinite(value))
    else:
        import numpy as np

        bad = int(np.sum(~np.isfinite(np.asarray(value))))
    if bad:
        raise ValueError(f"{name} has {bad} non-finite entries (NaN or infinity); remove or replace them first.")


def check_positive(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless every entry of a concrete ``value`` is finite and above zero."""
    check_finite(name, value)
    if is_concrete(value) and not _smallest(value) > 0:
        raise ValueError(f"{name} must be positive, got {_shown(value)}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless every entry of a concrete ``value`` is finite and at least zero."""
    check_finite(name, value)
    if is_concrete(value) and not _smallest(value) >= 0:
        raise ValueError(f"{name} must not be negative, got {_shown(value)}.")


def check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int, or raise ``ValueError`` unless it is an integer in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    value = int(value)
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}.")
    return value


def check_seed(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise ``ValueError`` unless it is an integer in [0, 2^32).

    With 32-bit types ``jax.random.key`` takes a seed modulo 2^32: larger ones would repeat smaller ones.
    """
    return check_integer(name, value, minimum=0, maximum=2**32 - 1)


def check_data(data: Any, *, name: str = "data") -> None:
    """Raise ``ValueError`` unless ``data`` is a floating (n, d) array with n, d >= 1 and, when concrete, finite."""
    shape = _shape(name, data)
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape (n, d), samples as rows; got shape {shape}.")
    if 0 in shape:
        raise ValueError(f"{name} is empty: shape {shape}; it needs at least one sample and one dimension.")
    import jax.numpy as jnp

    dtype = jnp.result_type(data)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {dtype}; convert it, for example with .astype(float).")
    check_finite(name, data)


def check_example(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one example, an array of shape (d,); the message says how to batch."""
    shape = _shape(name, value)
    if len(shape) != 1:
        raise ValueError(
            f"{name} must be one example, a vector; got shape {shape}"
            + (", which looks like a batch: apply the function with jax.vmap(...)." if len(shape) > 1 else ".")
        )


def check_number(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one number, of shape (); the message says how to batch."""
    shape = _shape(name, value)
    if shape:
        raise ValueError(f"{name} must be one number, got shape {shape}; for several, use jax.vmap(...) over {name}.")


def check_level(name: str, value: Any, *, zero: bool = True) -> None:
    """Raise ``ValueError`` unless ``value``, such as σ or λ, is one number >= 0, or > 0 if not ``zero``."""
    check_number(name, value)
    (check_nonnegative if zero else check_positive)(name, value)


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (int, float)):
        return ()
    shape = getattr(value, "shape", None)
    if shape is None:
        raise ValueError(f"{name} must be an array, got {type(value).__name__}; convert it with jax.numpy.asarray.")
    return tuple(shape)


def _smallest(value: Any) -> Any:
    """The smallest entry; infinity where there is none."""
    if isinstance(value, (int, float)):
        return value
    import numpy as np

    array = np.asarray(value)
    return array.min() if array.size else math.inf


def _shown(value: Any) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    import numpy as np

    array = np.asarray(value)
    return str(array) if array.size <= 6 else f"an array whose smallest entry is {array.min()}"
