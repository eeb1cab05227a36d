"""Our networks against PyTorch's results on reduced real configurations, without PyTorch."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import network
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import CASES

from scaling.models.model import parse_config

# Float32 rounding through some hundred layers, as a fraction of the largest value.
TOLERANCE = 2e-5
# One UNet of each kind, and one autoencoder, stay in the default suite.
LARGE = {"sdxl_unet", "sd14_unet", "ddpm_celebahq", "plain_vae"}


@functools.cache
def networks():
    """Names of cases by network: configurations that describe the same one share a program."""
    names = {}
    for name, case in CASES.items():
        names.setdefault(parse_config(case.config), []).append(name)
    return names


def check(names):
    cases = [CASES[name] for name in names]
    model, capture = network(cases[0].config), tuple(dict.fromkeys(tap for case in cases for tap in case.taps))
    run = jax.jit(lambda params, inputs: model.apply(params, **inputs, capture=capture))
    for name, case in zip(names, cases, strict=True):
        golden = load_file(case.path(name))
        out, taps = run(model.params, jax.tree.map(jnp.asarray, case.inputs))
        ours = {f"out.{i}": value for i, value in enumerate(jax.tree.leaves(out))}
        ours |= {f"tap.{key}": taps[key] for key in case.taps}
        assert ours.keys() == golden.keys()
        for key, theirs in golden.items():
            assert ours[key].shape == theirs.shape
            assert ours[key].dtype == np.float32
            worst = np.max(np.abs(ours[key] - theirs)) / np.max(np.abs(theirs))
            assert worst <= TOLERANCE, f"{name} {key}: {worst:.1e}"


@pytest.mark.parametrize("names", [n for n in networks().values() if not LARGE & {*n}], ids="+".join)
def test_outputs_and_taps_are_those_of_pytorch(names):
    check(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", networks().values(), ids="+".join)
def test_optimized_code_gives_the_same(names):
    check(names)
