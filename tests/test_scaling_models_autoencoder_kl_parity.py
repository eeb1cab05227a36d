"""The autoencoder against diffusers: both halves, taps, edits, derivatives, latents' scale."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from torch_side import (  # noqa: E402
    TOLERANCE,
    check_derivatives,
    check_edit,
    check_output,
    check_taps,
    difference,
    pair,
    randomize,
)

from scaling.models import autoencoder_kl  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published_configs.json").read_text())
TINY = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
VARIANTS = {
    "default": TINY,
    "no_quant_no_attention": TINY
    | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False, "latent_channels": 3},
    "gelu": TINY | {"act_fn": "gelu", "in_channels": 1, "out_channels": 2, "sample_size": [16, 24]},
    "mish": TINY | {"act_fn": "mish", "shift_factor": 0.1159, "scaling_factor": 0.3611},
    "relu": TINY | {"act_fn": "relu", "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
}
for repository, parts in PUBLISHED.items():
    if "vae" in parts:
        widths = [n // 16 for n in parts["vae"]["block_out_channels"]]
        VARIANTS[repository] = parts["vae"] | {"block_out_channels": widths, "norm_num_groups": 4}


def build(variant, dtype="float64", half="both"):
    fields = VARIANTS[variant]
    module = diffusers.AutoencoderKL.from_config(fields)
    config = autoencoder_kl.parse(dict(module.config))
    assert config == autoencoder_kl.parse(fields)
    channels = config.latent_channels if half == "decode" else config.in_channels
    # Odd on the way down: the encoder's convolutions round up.
    size = (5, 6) if half == "decode" else (22, 17)
    x = np.random.RandomState(0).standard_normal((2, channels, *size)).astype(dtype)
    run = {"encode": autoencoder_kl.encode, "decode": autoencoder_kl.decode, "both": autoencoder_kl.apply}[half]

    def theirs(module, x):
        if half == "decode":
            return module.decode(x).sample
        posterior = module.encode(x).latent_dist
        return posterior.mean if half == "encode" else module.decode(posterior.mode()).sample

    def ours(params, tap, x):
        out = run(config, params, tap, x)
        return out if half == "decode" else out[0]

    return config, pair(randomize(module, dtype), autoencoder_kl.parameters(config), x, theirs, ours)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, half, dtype):
    check_output(build(variant, dtype, half)[1], TOLERANCE[dtype])


def test_the_distribution_equals():
    config, both = build("default")
    # So large that some log variances are clipped at both ends.
    both.params["quant_conv.weight"] *= 60.0
    with torch.no_grad():
        both.module.quant_conv.weight *= 60.0
        theirs = both.module.encode(torch.from_numpy(both.x)).latent_dist
    mean, logvar = autoencoder_kl.encode(config, both.params, Tap(), jnp.asarray(both.x))
    assert difference(mean, theirs.mean) <= TOLERANCE["float64"]
    assert difference(logvar, theirs.logvar) <= TOLERANCE["float64"]
    assert logvar.min() == -30
    assert logvar.max() == 20


@pytest.mark.parametrize("variant", ["default", "no_quant_no_attention"])
def test_taps_show_what_hooks_see(variant):
    # Inside an attention PyTorch's norm sees (B, C, T); dropout does nothing.
    check_taps(build(variant)[1], TOLERANCE["float64"], untapped=["group_norm", "dropout", "to_out.1"])


def test_an_edit_does_what_a_hook_does():
    both = build("default")[1]
    for name in ("encoder.down_blocks.0", "decoder.mid_block.attentions.0", "decoder.up_blocks.1.resnets.0.conv1"):
        check_edit(both, name, TOLERANCE["float64"])


def test_derivatives_equal():
    check_derivatives(build("default")[1], TOLERANCE["float64"])


def test_keys_of_2022_are_renamed_as_the_library_does(tmp_path):
    from safetensors.numpy import load_file, save_file

    _, both = build("default", "float32")
    both.module.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    new = load_file(path)
    parts = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in new.items():
        for present, past in parts.items():
            key = key.replace(f".{present}.", f".{past}.")
        old[key] = value
    assert sum(key not in new for key in old) == 2 * 4 * 2
    assert {autoencoder_kl.rename(key) for key in old} == set(new)
    save_file(old, path, metadata={"format": "pt"})
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), new[name])
