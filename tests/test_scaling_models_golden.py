"""Our networks against PyTorch's results on reduced real configurations, without PyTorch."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import CASES, parameter

from scaling.models.config import to_jax
from scaling.models.model import parse_config

# Float32 rounding through some hundred layers, as a fraction of the largest value.
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_taps_are_those_of_pytorch(name):
    case = CASES[name]
    golden = load_file(case.path(name))
    apply = parse_config(case.config)
    params = {
        key: jnp.asarray(to_jax(spec.kind, parameter(key, spec.shape))) for key, spec in apply.parameters().items()
    }
    out, taps = apply(params, **jax.tree.map(jnp.asarray, case.inputs), capture=case.taps)
    ours = {f"out.{i}": value for i, value in enumerate(jax.tree.leaves(out))}
    ours |= {f"tap.{key}": value for key, value in taps.items()}
    assert ours.keys() == golden.keys()
    for key, theirs in golden.items():
        assert ours[key].shape == theirs.shape
        assert ours[key].dtype == np.float32
        worst = np.max(np.abs(ours[key] - theirs)) / np.max(np.abs(theirs))
        assert worst <= TOLERANCE, f"{key}: {worst:.1e}"
