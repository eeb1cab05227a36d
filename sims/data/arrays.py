"""Arrays in memory as sources, known by a digest of their values."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from dae_theory.checks import check_finite
from sims.data.readers import Source

__all__ = ["digest_of", "of_array"]


def of_array(values: Any) -> Source:
    """The source of an array of samples: (N, d), or images (N, H, W) or (N, H, W, C), without classes.

    Bytes are mapped from 0 and 255 to -1 and 1, and other values are used as they are. ``ValueError`` for other shapes,
    other types than numbers, and values that are not finite.

    >>> of_array(np.zeros((5, 4, 4), np.uint8)).image_shape
    (4, 4, 1)
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"data must be numbers of shape (N, d), (N, H, W) or (N, H, W, C), got {array.dtype} of shape "
            f"{array.shape}."
        )
    check_finite("data", array)
    shape = {3: (*array.shape[1:], 1), 4: array.shape[1:]}.get(array.ndim)
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    return Source(rows, np.full(len(rows), -1), shape, (0.0, 255.0) if array.dtype == np.uint8 else None)


def digest_of(source: Source) -> str:
    """16 hexadecimal digits from the values of a source, its classes and what they mean."""
    parts = (source.rows, source.labels)
    sha = hashlib.sha256(repr([(p.dtype.str, p.shape) for p in parts] + [source.image_shape, source.span]).encode())
    for part in parts:
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()[:16]
