"""The examples in the docstrings of what `sims` exports are run."""

import doctest
import inspect

import pytest

import sims

NAMES = ("Spec", "load", "sweep", "transition")


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    exported = getattr(sims, name)
    # Names are those of the module, as a reader of its documentation imports them.
    module = inspect.getmodule(exported)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(exported, name, module) if test.examples]
    assert tests
    for test in tests:
        result = doctest.DocTestRunner(verbose=False).run(test)
        assert result.failed == 0


def test_every_export_has_an_example():
    exports = {name for name in sims.__all__ if not inspect.ismodule(getattr(sims, name))}
    assert exports == set(NAMES)
