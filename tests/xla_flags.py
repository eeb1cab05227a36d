"""Flags of XLA that make compilations on CPUs faster; needed before JAX is imported."""

import importlib.util
import mmap
import os
import pathlib

OPTIMIZED = os.environ.get("FULL_OPTIMIZATION") == "1"
"""Whether to compile as users do."""

FAST_COMPILATION = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
"""On CPUs these halve the time of a compilation; what they compile runs slower."""


def wanted():
    """The flags of the environment, and those of FAST_COMPILATION if compilations should be fast."""
    given = os.environ.get("XLA_FLAGS", "")
    return given if OPTIMIZED else " ".join([given, *_known(FAST_COMPILATION)]).strip()


def _known(flags):
    """Those of the flags that this jaxlib has: it aborts on others."""
    package = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
    for library in sorted(package.glob("*.so")):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = [flag for flag in flags if content.find(flag.strip("-").split("=")[0].encode()) >= 0]
        if found:
            return found
    return []
