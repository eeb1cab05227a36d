"""Stable Diffusion 1.4's UNet at full size in a process of its own: loaded from a folder, run, and measured.

``python full_size.py FOLDER INPUTS.npz RESULTS.npz``: ``INPUTS`` holds ``x``, ``t`` and ``context``, a call a row;
``RESULTS`` then holds ``out`` and ``tap`` of each call, ``weights``, ``peak_loaded`` and ``peak`` in bytes, and the
``compilations`` after the first call. Between calls the seed, the timestep, the prompt, and an edit's value and
strength change.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from scaling import Edit, load_model
from scaling.bench.unet import COMPILATION, DETECTOR_TAP
from sims.bench.timing import peak_memory


def main(folder, inputs, results):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event == COMPILATION else None
    )
    model = jax.block_until_ready(load_model(folder))
    measures = {"peak_loaded": peak_memory(), "weights": sum(param.nbytes for param in model.params.values())}
    outs, taps, counts = [], [], []
    with np.load(inputs) as calls:
        for i, (x, t, context) in enumerate(zip(calls["x"], calls["t"], calls["context"], strict=True)):
            # The first call has strength 0: it is not edited.
            direction = np.random.default_rng(i).standard_normal(1280, np.float32)
            edits = {"mid_block": Edit("add", jnp.asarray(direction), jnp.asarray(0.5 * i, jnp.float32))}
            arrays = [jnp.asarray(array, jnp.float32) for array in (x, t, context)]
            out, tap = model.apply(model.params, *arrays, capture=(DETECTOR_TAP,), edits=edits)
            outs.append(np.asarray(out))
            taps.append(np.asarray(tap[DETECTOR_TAP]))
            counts.append(len(compiled))
    measures |= {"out": np.stack(outs), "tap": np.stack(taps), "compilations": counts[-1] - counts[0]}
    np.savez(results, **measures, peak=peak_memory())


if __name__ == "__main__":
    main(*sys.argv[1:])
