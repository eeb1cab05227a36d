"""The autoencoder with a codebook against diffusers: both halves, the codebook, taps, edits, derivatives."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from pipelines import DDIM, ONE_BLOCK, PIXEL, SMALL_VQ, save  # noqa: E402
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

from scaling import load_pipeline  # noqa: E402
from scaling.bridge.export import save_pipeline  # noqa: E402
from scaling.bridge.latents import from_latents, to_latents  # noqa: E402
from scaling.models import vq_model  # noqa: E402
from scaling.models.taps import Tap  # noqa: E402

TINY = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "num_vq_embeddings": 40,
}
# The published one of unconditional latent diffusion (CompVis/ldm-celebahq-256), of reduced width.
CELEBAHQ = TINY | {"block_out_channels": [8, 16, 32], "num_vq_embeddings": 8192, "layers_per_block": 2}
CELEBAHQ |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
VARIANTS = {
    "default": TINY,
    "other_width": TINY | {"vq_embed_dim": 5, "latent_channels": 4, "scaling_factor": 0.5, "act_fn": "mish"},
    "no_attention": TINY | {"mid_block_add_attention": False, "in_channels": 1, "out_channels": 2},
    "CompVis/ldm-celebahq-256": CELEBAHQ,
}


def build(variant, dtype="float64", half="both"):
    fields = VARIANTS[variant]
    module = diffusers.VQModel.from_config(fields)
    config = vq_model.parse(dict(module.config))
    assert config == vq_model.parse(fields)
    module = randomize(module, dtype)
    channels = config.codebook_channels if half == "decode" else config.halves.in_channels
    size = (5, 6) if half == "decode" else (22, 17)
    x = np.random.RandomState(0).standard_normal((2, channels, *size)).astype(dtype)

    def theirs(module, x):
        return (
            module.encode(x).latents
            if half == "encode"
            else (module.decode(x) if half == "decode" else module(x)).sample
        )

    def ours(params, tap, x):
        run = {"encode": vq_model.encode, "decode": vq_model.decode, "both": vq_model.apply}[half]
        out = run(config, params, tap, x)
        return out if half == "decode" else out[0]

    return config, pair(module, vq_model.parameters(config), x, theirs, ours)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal(variant, half, dtype):
    check_output(build(variant, dtype, half)[1], TOLERANCE[dtype])


def test_taps_show_what_hooks_see():
    # The codebook's own module sees a flat list of positions.
    untapped = ["group_norm", "dropout", "to_out.1", "quantize.embedding"]
    check_taps(build("default")[1], TOLERANCE["float64"], untapped=untapped)


def test_an_edit_does_what_a_hook_does():
    both = build("default")[1]
    for name in ("encoder.down_blocks.0", "quantize", "post_quant_conv"):
        check_edit(both, name, TOLERANCE["float64"])


def test_derivatives_pass_the_codebook_as_the_identity():
    # In PyTorch's backward pass, too; the codebook itself has no gradient.
    check_derivatives(build("default", half="decode")[1], TOLERANCE["float64"])


def test_every_position_takes_the_nearest_vector():
    config, both = build("default", half="decode")
    codebook = both.params["quantize.embedding.weight"]
    tap = Tap(capture=("quantize",))
    vq_model.decode(config, both.params, tap, jnp.asarray(both.x))
    seen = np.moveaxis(np.asarray(tap.taps["quantize"]), 1, -1)
    distances = np.linalg.norm(np.moveaxis(both.x, 1, -1)[..., None, :] - np.asarray(codebook), axis=-1)
    assert len(set(np.argmin(distances, -1).ravel())) > 5
    np.testing.assert_allclose(seen, np.asarray(codebook)[np.argmin(distances, -1)], atol=1e-12)


def test_a_pipeline_with_one_is_read_used_and_written(tmp_path):
    unet = PIXEL | ONE_BLOCK | {"in_channels": 3, "out_channels": 3}
    folder = save(tmp_path / "saved", {"unet": unet, "vqvae": SMALL_VQ}, DDIM)
    ours = load_pipeline(folder)
    assert ours.vae is not None
    assert ours.vae.apply.architecture == "vq_model"
    theirs = diffusers.VQModel.from_pretrained(folder / "vqvae")
    images = np.random.RandomState(0).uniform(-1, 1, (2, 3, 16, 16)).astype("float32")
    factor = theirs.config.scaling_factor
    with torch.no_grad():
        z = theirs.encode(torch.from_numpy(images)).latents * factor
        back = theirs.decode(z / factor).sample.clamp(-1, 1)
    latents = to_latents(ours.vae, jnp.asarray(images))
    assert difference(latents, z) <= TOLERANCE["float32"]
    # Noise is for encoders that draw.
    np.testing.assert_array_equal(to_latents(ours.vae, jnp.asarray(images), jnp.ones_like(latents)), latents)
    assert difference(from_latents(ours.vae, jnp.asarray(z.numpy())), back) <= TOLERANCE["float32"]
    again = load_pipeline(save_pipeline(ours, tmp_path / "again"))
    assert again.vae is not None
    np.testing.assert_array_equal(from_latents(again.vae, latents), from_latents(ours.vae, latents))
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
