"""The real size: Stable Diffusion 1.4's UNet with random weights is saved, loaded and run within bounded memory."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from scaling.bench import setting as bench
from scaling.models import model as api

HERE = pathlib.Path(__file__).parent
PUBLISHED = json.loads((HERE / "published_configs.json").read_text())["CompVis/stable-diffusion-v1-4"]["unet"]
WRITE = """
import sys, jax
from scaling import initialize, save_pretrained
from scaling.bench.setting import SD14
save_pretrained(initialize(jax.random.key(0), SD14), sys.argv[1])
"""


def run(*arguments):
    """Python in a process of its own, with JAX as a user has it, not as this suite sets it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = plain | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def inputs(count):
    """Images, timesteps and prompts of ``count`` calls, one example each."""
    random = np.random.default_rng(0)
    shapes = {"x": (count, 1, 4, 64, 64), "context": (count, 1, 77, 768)}
    drawn = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return drawn | {"t": np.array([981, 50, 3, 500][:count])}


def measured(folder, calls, scratch):
    """What ``full_size.py`` finds."""
    np.savez(scratch / "inputs.npz", **calls)
    run(HERE / "full_size.py", folder, scratch / "inputs.npz", scratch / "results.npz")
    with np.load(scratch / "results.npz") as results:
        return dict(results)


def check_measures(results):
    """Memory within half a copy of the weights beyond them; values without meaning to the program do not recompile."""
    assert results["weights"] == 4 * 859_520_964
    assert results["peak_loaded"] <= 1.5 * results["weights"]
    assert results["peak"] <= 1.5 * results["weights"]
    assert results["compilations"] == 0
    assert np.all(np.isfinite(results["out"]))


@pytest.fixture
def room(tmp_path):
    """A folder; the test is skipped where the network does not fit."""
    try:
        bench.check_room(bench.SD14)
    except ValueError as error:
        pytest.skip(str(error))
    return tmp_path


def test_the_benchmark_s_network_is_the_published_one():
    assert api.parse_config(bench.SD14) == api.parse_config(PUBLISHED)


@pytest.mark.slow
def test_loads_and_runs_within_bounded_memory_and_compiles_once(room):
    run("-c", WRITE, room / "unet")
    results = measured(room / "unet", inputs(2), room)
    check_measures(results)
    # Not a constant, and different for other inputs.
    assert np.min(np.std(results["out"], axis=(1, 2, 3, 4))) > 0.01
    assert np.max(np.abs(results["out"][1] - results["out"][0])) > 0.1
