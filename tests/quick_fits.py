"""Fits by few draws, for tests of examinations whose subject is not how well autoencoders fit."""

import functools

import jax
import pytest

from scaling.measures.local_fits import local_fits
from scaling.study import examination


@functools.cache
def quick_fits():
    few = functools.partial(local_fits, num_draws=32, max_iterations=3)
    return jax.jit(few, static_argnames=("source", "target", "widths"))


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    """With the usual 512 draws and all iterations, fits take most of an examination's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "_fitted", quick_fits)
        yield
