"""What the tests of samplers share: the cases, one analytic network in either library, the reference's walk."""

import contextlib
import importlib
import zlib

import jax.numpy as jnp
import numpy as np

from scaling.models import model as api
from scaling.models.config import to_jax

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
SHAPE = (2, 3, 2, 2)
DDPM = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
STABLE = DDPM | {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200, "timestep_spacing": "trailing"}
TRAINED = {"trained_betas": np.geomspace(1e-3, 0.1, 80).tolist(), "num_train_timesteps": 80}
ZERO_SNR = STABLE | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}


def cases(method):
    """Triples of a configuration, eta and a number of steps: every branch that the method has."""
    spacings = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
    configs = [STABLE | spacing for spacing in spacings] + [STABLE | V, TRAINED, DDPM]
    # Ancestral steps from a predicted image are not written in the reference.
    if method not in ("pndm", "euler_ancestral"):
        configs += [STABLE | X0, COSINE | X0]
    match method:
        case "ddim":
            configs += [COSINE, DDPM | {"clip_sample_range": 0.7}, DDPM | THRESHOLD, ZERO_SNR | V, ZERO_SNR | X0]
            return [(config, eta, 12) for config in configs for eta in (0.0, 0.6)] + [(STABLE, 1.0, 12)]
        case "ddpm":
            kinds = [{"variance_type": kind} for kind in ("fixed_large", "fixed_small_log")]
            configs += [DDPM | kind for kind in kinds] + [COSINE | THRESHOLD, ZERO_SNR | V]
            configs += [DDPM | kinds[0] | spacing for spacing in spacings]
        case "pndm":
            configs += [COSINE, COSINE | V, STABLE | {"skip_prk_steps": False} | V, STABLE | {"set_alpha_to_one": True}]
        case "euler_ancestral":
            configs += [COSINE | V, ZERO_SNR | V]
        case "lcm":
            configs += [STABLE | {"timestep_scaling": 0.01}, STABLE | {"original_inference_steps": 100}]
            configs += [DDPM | THRESHOLD, DDPM | {"clip_sample": True, "clip_sample_range": 0.7}, ZERO_SNR | V]
        case "lms":
            configs += [STABLE | level for level in (KARRAS, EXPONENTIAL)] + [COSINE | V]
        case "unipc":
            orders = [{"solver_order": 1}, {"solver_order": 3}, {"solver_type": "bh1"}, {"disable_corrector": [0, 3]}]
            last = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
            # The reference's bh1 gives NaN in a last step to 0.
            configs += [STABLE | order for order in orders if "solver_type" not in order]
            configs += [STABLE | last | order for order in orders]
            configs += [STABLE | KARRAS, COSINE | V, DDPM | THRESHOLD, ZERO_SNR | V]
        case "euler" | "heun":
            levels = [KARRAS, EXPONENTIAL, KARRAS | {"sigma_min": 0.1, "sigma_max": 10.0}]
            configs += [STABLE | level for level in levels] + [STABLE | V | KARRAS, COSINE | V]
            if method == "euler":
                continuous = {"timestep_type": "continuous"}
                configs += [STABLE | continuous | V, ZERO_SNR | V, DDPM | {"final_sigmas_type": "sigma_min"}]
            else:
                configs += [STABLE | {"clip_sample": True, "clip_sample_range": 0.7}]
        case "dpmsolver++":
            last = [{"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}]
            orders = [{"solver_order": 1}, {"solver_type": "heun"}, {"lower_order_final": False}, *last]
            configs += [STABLE | order for order in orders] + [last[1] | {"euler_at_final": True}]
            third, drawn = {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}
            configs += [STABLE | third, STABLE | third | last[1], STABLE | third | {"lower_order_final": False}]
            configs += [STABLE | drawn | order for order in ({}, *orders)]
            configs += [STABLE | KARRAS, STABLE | V | KARRAS, DDPM | THRESHOLD, ZERO_SNR | V]
            configs += [COSINE | {"lambda_min_clipped": -1.0, "timestep_spacing": "linspace"}]
    # DPM-Solver++ ends otherwise from 15 steps on.
    steps = {"dpmsolver++": (14, 15), "lcm": (1, 4, 12)}.get(method, (12,))
    return [(config, 0.0, number) for config in configs for number in steps]


def network(library, x, t):
    """A smooth model output of either library, different at every timestep."""
    return 0.9 * library.tanh(1.3 * x + 0.3 * library.sin(t / 60.0))


UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def tiny_model(config=UNET):
    """A network with fixed random weights."""
    params = {}
    for name, spec in api.parse_config(config).parameters().items():
        weights = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(spec.shape)
        scale = np.prod(spec.shape[1:]) ** -0.5 if len(spec.shape) > 1 else 0.2
        params[name] = jnp.asarray(to_jax(spec.kind, scale * weights), jnp.float32)
    return api.from_config(config, params)


def reference(method, config, num_steps, noise, *, dtype, eta=0.0):
    """States after every call, (calls, ...), and timesteps, of the reference's scheduler on :func:`network`.

    ``noise[0]`` is the start, ``noise[s + 1]`` that of call s. In float64 the reference's own tables are float64 too.
    """
    import diffusers
    import torch

    module = importlib.import_module(getattr(diffusers, CLASSES[method]).__module__)
    with _doubled(module) if dtype == "float64" else contextlib.nullcontext():
        scheduler = getattr(module, CLASSES[method]).from_config(config)
        scheduler.set_timesteps(num_steps)
        noise = torch.from_numpy(np.array(noise, dtype))
        x = noise[0] * scheduler.init_noise_sigma
        states = []
        for s, t in enumerate(scheduler.timesteps):
            out = network(torch, scheduler.scale_model_input(x, t), t.to(x.dtype))
            extra = {"eta": eta, "variance_noise": noise[s + 1] if eta else None} if method == "ddim" else {}
            with _replaced(module, randn_tensor=lambda *_, drawn=noise[s + 1], **__: drawn):
                x = scheduler.step(out, t, x, **extra).prev_sample
            states.append(x.numpy())
    return np.stack(states), scheduler.timesteps.numpy()


class _Double:
    def __init__(self, library):
        self.library = library

    def __getattr__(self, name):
        return getattr(self.library, "float64" if name == "float32" else name)


@contextlib.contextmanager
def _doubled(module):
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _replaced(module, torch=_Double(torch), np=_Double(np)):
            yield
    finally:
        torch.set_default_dtype(default)


@contextlib.contextmanager
def _replaced(module, **names):
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, names[name])
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
