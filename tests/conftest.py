"""Settings of the whole suite: float64, strict promotions, no key used twice, one key per test."""

import os
import pathlib

import xla_flags

# Before jax is imported: the library itself never sets global state.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_DEBUG_KEY_REUSE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = xla_flags.wanted()
# One device, whichever test of a worker is the first to run a command in its process.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import gc
import zlib

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("repo", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repo")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A key fixed by the test's name: adding a test, or moving its file, never changes another's draws."""
    return jax.random.key(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True, scope="module")
def _compilation(request: pytest.FixtureRequest):
    """Compile fast, without most of LLVM's optimizations: most of the suite's time is compilation.

    Modules marked `optimized`, which compute long, keep these optimizations. ``FULL_OPTIMIZATION=1`` in the
    environment, which the long tests run with, compiles as users do all but modules marked `tiny`.
    """
    tiny = request.node.get_closest_marker("tiny")
    if request.node.get_closest_marker("optimized") or (xla_flags.OPTIMIZED and not tiny):
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        # Processes that a test starts compile as it does: their results are compared bit for bit.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


MAPS = 20_000
"""Mapped regions of a process, of which Linux allows 65,530, above which compiled programs are given up."""


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Every compiled program maps some memory: a worker that keeps those of all modules ends by a segmentation fault.

    Programs are compiled again, or read from the cache of compilations, where another module needs them.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()
