"""Write scaling/PARITY.md: per architecture and branch, the largest differences from PyTorch in float32.

Run where PyTorch is installed: ``python tests/parity_table.py``. Networks and inputs are those of the parity tests.
"""

import importlib
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
from torch_side import difference, hook_outputs

from scaling.models.taps import Tap

ARCHITECTURES = {
    "unet2d": "UNet2DModel",
    "unet2d_condition": "UNet2DConditionModel",
    "dit": "DiTTransformer2DModel",
    "autoencoder_kl": "AutoencoderKL",
    "vq_model": "VQModel",
    "clip_text": "CLIPTextModel, CLIPTextModelWithProjection",
    "clip_vision": "CLIPVisionModel, CLIPVisionModelWithProjection",
}
HEADER = """# Parity with PyTorch, as measured

Random weights, float32 on a CPU, JAX {jax} beside torch {torch}, diffusers {diffusers} and transformers {transformers}.
Differences are the largest, as a fraction of the largest value: of the output, and of the tap where it is worst, which
is compared with a forward hook on the module of the same name. The tests allow 2e-5 for outputs in float32, and 1e-9
for taps in float64. The only taps above 2e-5 are DiT's `time_proj`, sines of phases near 1000, where rounding one
frequency changes the sine by 6e-5. Branches are the configurations in `tests/test_scaling_models_*_parity.py`; those of
published models have reduced width. This file is written by `tests/parity_table.py`.
"""


def measure(built):
    """Difference of the output, the largest of a tap, and how many taps were compared."""
    pair = built if hasattr(built, "module") else built[-1]

    def run(params, x):
        tap = Tap()
        jax.eval_shape(lambda: pair.ours(params, tap, x))
        every = Tap(capture=tuple(tap.shapes))
        return pair.ours(params, every, x), every.taps

    out, taps = jax.jit(run)(pair.params, jnp.asarray(pair.x))
    seen = hook_outputs(pair)
    import torch

    with torch.no_grad():
        theirs = pair.theirs(pair.module, torch.from_numpy(pair.x))
    return difference(out, theirs), max(difference(taps[name], seen[name]) for name in taps), len(taps)


def main():
    packages = ("jax", "torch", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in packages}
    lines = [HEADER.format(**versions)]
    for name, title in ARCHITECTURES.items():
        tests = importlib.import_module(f"test_scaling_models_{name}_parity")
        lines += [f"## {title}", "", "| branch | output | worst tap | taps |", "|---|---|---|---|"]
        for variant in tests.VARIANTS:
            output, worst, count = measure(tests.build(variant, "float32"))
            lines.append(f"| {variant} | {output:.1e} | {worst:.1e} | {count} |")
            print(lines[-1], flush=True)
        lines.append("")
    (pathlib.Path(__file__).parents[1] / "scaling" / "PARITY.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
