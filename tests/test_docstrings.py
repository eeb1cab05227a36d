"""Every exported name has an example in its docstring, and the example runs."""

import ast
import doctest
import importlib
import inspect
import pathlib
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("dae_theory", "sims", "scaling")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def exports(package):
    """Public names of a package but for its rooms and modules: what its stub imports from them."""
    body = ast.parse((ROOT / package / "__init__.pyi").read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module is not None]
    return sorted(alias.asname for node in imports for alias in node.names)


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in PACKAGES for name in exports(package)])
def test_the_example_of_every_export_runs(package, name):
    # Unwrapped: jit, the type checker of the tests and other decorators wrap it.
    exported = inspect.unwrap(getattr(importlib.import_module(package), name))
    # As in `python -m doctest`, an example sees the names of the module that defines the object.
    module = exported if inspect.ismodule(exported) else sys.modules[exported.__module__]
    docstring = inspect.getdoc(exported) or ""
    example = doctest.DocTestParser().get_doctest(docstring, vars(module).copy(), name, module.__file__, 0)
    assert example.examples, f"{package}.{name} has no example in its docstring"
    report = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    # Readers run with JAX's defaults, not with this suite's strict ones.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        failed = runner.run(example, out=report.append).failed
    assert not failed, "".join(report)


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_found(package):
    assert len(exports(package)) >= 4
