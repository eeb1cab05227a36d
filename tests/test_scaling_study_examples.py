"""The examples in docstrings of what `scaling` exports from its upper rooms run."""

import doctest
import inspect
import sys

import jax
import pytest

import scaling

NAMES = (
    "TrainSpec",
    "auroc",
    "codes",
    "copy_share",
    "extract",
    "find_copies",
    "full_jacobian",
    "generate",
    "read_images",
    "top_singular",
    "write_pictures",
    "zoo.load",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    exported = scaling
    for part in name.split("."):
        exported = getattr(exported, part)
    exported = inspect.unwrap(exported)
    # An example sees the names of the module that defines the object.
    module = sys.modules[exported.__module__]
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(exported), vars(module).copy(), name, module.__file__, 0
    )
    assert example.examples
    report = []
    # Readers run with JAX's defaults, not with this suite's strict ones.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        failed = doctest.DocTestRunner(verbose=False).run(example, out=report.append).failed
    assert not failed, "".join(report)
