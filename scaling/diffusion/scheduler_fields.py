"""The fields of a scheduler_config.json: diffusers' classes, their defaults, and what each field may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scaling.diffusion.choices import BETA_SCHEDULES, PREDICTIONS, Method
from scaling.models.config import Fields

__all__ = [
    "CHOICES",
    "CLASSES",
    "DEFAULTS",
    "INERT_IF_NULL",
    "KNOWN",
    "NOISE",
    "NOISE_OF_CLASS",
    "STEPS",
    "field_value",
    "solver_types",
]

CLASSES: dict[str, Method] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
"""Methods by diffusers' scheduler class, for those whose steps are reproduced."""

MAX_TIMESTEPS = 1_000_000

NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_ENDS = {"sigma_min": None, "sigma_max": None}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}

# diffusers' defaults for the fields of each method's class.
DEFAULTS: dict[Method, dict[str, Any]] = {
    "ddim": NOISE | _LEADING | _CLIP | _THRESHOLD | {"set_alpha_to_one": True},
    "ddpm": NOISE | _LEADING | _CLIP | _THRESHOLD | {"variance_type": "fixed_small"},
    "pndm": NOISE | _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
    "euler": NOISE
    | _LINSPACE
    | _SIGMAS
    | _ENDS
    | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "heun": NOISE | _LINSPACE | _SIGMAS | _ENDS | {"clip_sample": False, "clip_sample_range": 1.0},
    "euler_ancestral": NOISE | _LINSPACE,
    "lms": NOISE | _LINSPACE | _SIGMAS,
    "lcm": NOISE
    | _LEADING
    | _THRESHOLD
    | {
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
    "unipc": NOISE
    | _LINSPACE
    | _SIGMAS
    | _ENDS
    | _THRESHOLD
    | {
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
    },
    "dpmsolver++": NOISE
    | _LINSPACE
    | _SIGMAS
    | _ENDS
    | _THRESHOLD
    | {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
    },
}
# Betas belong to the model, not to the sampling method, so their defaults depend on the file's class.
_BETAS_OF_KARRAS = {"beta_start": 0.00085, "beta_end": 0.012}
NOISE_OF_CLASS = {
    "DPMSolverSDEScheduler": _BETAS_OF_KARRAS,
    "HeunDiscreteScheduler": _BETAS_OF_KARRAS,
    "KDPM2AncestralDiscreteScheduler": _BETAS_OF_KARRAS,
    "KDPM2DiscreteScheduler": _BETAS_OF_KARRAS,
    "LCMScheduler": _BETAS_OF_KARRAS | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _BETAS_OF_KARRAS | {"beta_schedule": "scaled_linear"},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTIONS,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "predict_x0": (True,),
    "solver_p": (None,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}
# Fields of old files and of OTHER_CLASSES that no method uses.
_IGNORED = frozenset({"flow_shift", "shift_terminal", "tensor_format", "time_shift_type"})
# Fields of the steps, whatever their values; use_flow_sigmas and use_dynamic_shifting would change the noise itself.
_OF_OTHER_STEPS = {
    "corrector_order",
    "noise_sampler_seed",
    "predictor_order",
    "tau_func",
    "timestep_values",
}
STEPS = (frozenset().union(*DEFAULTS.values()) | _IGNORED | _OF_OTHER_STEPS) - {
    *NOISE,
    "use_flow_sigmas",
    "use_dynamic_shifting",
}
# Of files of 2022: timesteps in place of those of the method.
INERT_IF_NULL = frozenset({"timestep_values"})
KNOWN = frozenset().union(*DEFAULTS.values()) | _IGNORED | (_OF_OTHER_STEPS - INERT_IF_NULL)


def solver_types(method: Method, values: Mapping[str, Any]) -> dict[str, str]:
    """What each class takes the solver and algorithm types of other classes for."""
    types = ("bh1", "bh2") if method == "unipc" else ("midpoint", "heun")
    default = {"solver_type": "bh2" if method == "unipc" else "midpoint", "algorithm_type": "dpmsolver++"}
    return {
        name: default[name]
        for name, known in (("solver_type", types), ("algorithm_type", ("dpmsolver++", "sde-dpmsolver++")))
        if name in values and values[name] not in known
    }


def field_value(fields: Fields, name: str, default: Any) -> Any:
    """A field's value, checked; ``ValueError`` names the field and what it may be."""
    value = fields.raw(name, default)
    if name in CHOICES:
        return fields.choice(name, default, CHOICES[name])
    if name == "lambda_min_clipped":
        return _number(fields, name, value, maximum=math.inf)
    if name == "trained_betas":
        return None if value is None else _betas(fields, value)
    if name == "disable_corrector":
        return _steps(fields, value)
    if isinstance(default, bool):
        # diffusers reads null as false, whatever the default.
        return fields.boolean(name, default) if value is not None else False
    if isinstance(default, int):
        return fields.integer(name, default, minimum=int(name != "steps_offset"), maximum=MAX_TIMESTEPS)
    if default is None:
        return None if value is None else fields.number(name, 1.0)
    return fields.number(name, default)


def _number(fields: Fields, name: str, value: object, *, maximum: float) -> float:
    # An integer of hundreds of digits is below infinity, but is no float.
    huge = isinstance(value, int) and abs(value) >= 1 << 63
    if huge or isinstance(value, bool) or not isinstance(value, int | float) or not value < maximum:
        raise fields.refusal(name, value, f"it must be a number below {maximum}")
    return float(value)


def _steps(fields: Fields, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(type(step) is not int or step < 0 for step in value):
        raise fields.refusal("disable_corrector", value, "it must be a list of steps, counted from 0")
    return tuple(value)


def _betas(fields: Fields, value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_TIMESTEPS:
        raise fields.refusal("trained_betas", value, "it must be a list of numbers")
    return tuple(_number(fields, "trained_betas", beta, maximum=1.0) for beta in value)
