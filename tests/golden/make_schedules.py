"""Write schedules_*.safetensors: states of the reference's schedulers, for tests without PyTorch.

Run with the ``parity`` extra, from the folder ``tests``: ``python -m golden.make_schedules``.
"""

import json
import pathlib

import diffusers
import numpy as np
import scheduler_side
import torch
from safetensors.numpy import save

HERE = pathlib.Path(__file__).parent


def main():
    """One file per method: the noise, and per case the states in float64 and in the reference's own float32."""
    noise = np.random.RandomState(0).standard_normal((24, *scheduler_side.SHAPE))
    for method in scheduler_side.CLASSES:
        tensors, listed = {"noise": noise}, []
        for config, eta, steps in scheduler_side.cases(method):
            for dtype in ("float64", "float32"):
                states, timesteps = scheduler_side.reference(method, config, steps, noise, dtype=dtype, eta=eta)
                tensors[f"{len(listed)}.{dtype}"] = states
            tensors[f"{len(listed)}.timesteps"] = timesteps
            listed.append({"config": config, "eta": eta, "steps": steps})
        versions = {"diffusers": diffusers.__version__, "torch": torch.__version__, "numpy": np.__version__}
        metadata = {"cases": json.dumps(listed), "versions": json.dumps(versions)}
        (HERE / f"schedules_{method.rstrip(chr(43))}.safetensors").write_bytes(save(tensors, metadata))


if __name__ == "__main__":
    main()
