r"""Noise schedules, as described by a scheduler_config.json.

A model of T timesteps sees variance-preserving noise,

.. math:: x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon, \qquad
          \bar\alpha_t = \prod_{u \le t} (1 - \beta_u)

Division by :math:`\sqrt{\bar\alpha_t}` gives variance-exploding noise, :math:`y = x_0 + \sigma_t \epsilon`, the
convention of ``dae_theory``, with :math:`\sigma_t = \sqrt{(1 - \bar\alpha_t)/\bar\alpha_t}`. Tables are float64 NumPy
arrays of shape (T,), computed once on the host; computations with them under ``jit`` have the dtype of the data.

The β are evenly spaced :cite:`ho20`, or their square roots are (Stable Diffusion), or :math:`\bar\alpha` is a squared
cosine :cite:`nichol21`; zero-SNR rescaling shifts :math:`\sqrt{\bar\alpha}` so that it ends at 0 :cite:`lin24`,
Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float64

from dae_theory.checks import is_concrete
from dae_theory.types import Scalar
from scaling.diffusion.choices import METHODS, OTHER_CLASSES, Method, Prediction
from scaling.diffusion.scheduler_fields import (
    CLASSES,
    DEFAULTS,
    INERT_IF_NULL,
    KNOWN,
    NOISE_OF_CLASS,
    STEPS,
    field_value,
    solver_types,
)
from scaling.models.config import Fields

__all__ = [
    "CLASSES",
    "METHODS",
    "Method",
    "Prediction",
    "Schedule",
    "add_noise",
    "from_config",
    "read",
    "sigma_to_timestep",
    "target",
    "timestep_to_sigma",
    "with_method",
]

# diffusers' substitute for ᾱ = 0, where σ would be infinite.
TINY_ALPHA_BAR = 2.0**-24


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A parsed scheduler_config.json: a noise schedule, and the settings of a sampling method.

    Static and hashable, a pytree without leaves. Fields have the names of the file; a field that the method does not
    use has the default below, which has no effect. ``source`` is the file's content, unused fields included.
    """

    method: Method | None
    """None if the file's class or settings ask for steps that are not supported; see ``refusal``."""
    source: str
    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    trained_betas: tuple[float, ...] | None
    rescale_betas_zero_snr: bool
    prediction_type: Prediction
    timestep_spacing: str
    steps_offset: int
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    set_alpha_to_one: bool = True
    variance_type: str | None = None
    skip_prk_steps: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    timestep_type: str = "discrete"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 1
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    refusal: str = ""
    """Why it cannot be sampled without another method."""

    @property
    def config(self) -> dict[str, Any]:
        """The file's content, as given to :func:`from_config`."""
        return json.loads(self.source)

    @functools.cached_property
    def alpha_bar(self) -> Float64[np.ndarray, " T"]:
        r"""Signal power :math:`\bar\alpha_t`, strictly decreasing in (0, 1); 0 at the end of zero-SNR ones."""
        return _alpha_bar(self)

    @functools.cached_property
    def sigmas(self) -> Float64[np.ndarray, " T"]:
        r"""Noise-to-signal ratio :math:`\sigma_t`, strictly increasing; 4096 where it would be infinite."""
        alpha_bar = self.alpha_bar.copy()
        if self.rescale_betas_zero_snr:
            alpha_bar[-1] = TINY_ALPHA_BAR
        return _read_only(np.sqrt((1 - alpha_bar) / alpha_bar))


def from_config(config: Mapping[str, Any], method: str | None = None) -> Schedule:
    """Read a scheduler_config.json.

    ``method`` (one of :data:`METHODS`) overrides the method of the file's ``_class_name``, like
    ``OtherScheduler.from_config(scheduler.config)`` in diffusers: fields that the file lacks take the defaults of the
    new method's class. Unlike in diffusers, the betas' defaults are still those of the file's class, and zero-SNR
    rescaling is never dropped, because both belong to the model.

    ``ValueError`` names an unsupported class, field or value, and lists the supported ones.
    """
    fields = Fields("scheduler", config)
    name = fields.raw("_class_name")
    # diffusers' Flax classes had the same configurations and steps.
    name = name.removeprefix("Flax") if isinstance(name, str) else name
    method = _method(name, method)
    try:
        source = json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.owner} config: it must hold plain JSON values; {error}.") from error
    for field, value in config.items():
        if value is None and field in INERT_IF_NULL:
            continue
        if not (field in KNOWN or field.startswith("_")):
            raise fields.refusal(field, value, f"this field is not supported; supported are {', '.join(sorted(KNOWN))}")
    owner = name or next(known for known, walked in CLASSES.items() if walked == method)
    defaults = DEFAULTS[method] | NOISE_OF_CLASS.get(owner, {})
    values = {field: field_value(fields, field, default) for field, default in defaults.items()}
    if values.get("use_karras_sigmas") and values.get("use_exponential_sigmas"):
        raise fields.refusal("use_exponential_sigmas", True, "use_karras_sigmas is set too; choose one")
    values |= solver_types(method, values)
    known = {field.name for field in dataclasses.fields(Schedule)}
    schedule = Schedule(method, source, **{field: value for field, value in values.items() if field in known})
    _check_alpha_bar(fields, schedule)
    return schedule


def read(config: Mapping[str, Any], method: str | None = None) -> Schedule:
    """Like :func:`from_config`, but steps that are not supported are refused only when it comes to sampling.

    Adding noise, reading activations and denoising need the noise schedule alone; it is read as strictly.
    """
    name = str(config.get("_class_name")).removeprefix("Flax")
    for field in ("use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(field) and not (name in CLASSES and field not in DEFAULTS[CLASSES[name]]):
            raise Fields("scheduler", config).refusal(field, config[field], "noise of flow matching is not supported")
    try:
        return from_config(config, method)
    except ValueError as error:
        if method is not None:
            raise
        refusal = str(error)
    schedule = from_config({field: value for field, value in config.items() if field not in STEPS}, "ddim")
    return dataclasses.replace(schedule, method=None, source=json.dumps(dict(config)), refusal=refusal)


def with_method(schedule: Schedule, method: str | None) -> Schedule:
    """The same noise schedule with another sampling method; None keeps the method."""
    return schedule if method is None or method == schedule.method else from_config(schedule.config, method)


def add_noise(
    schedule: Schedule, x: Float[Array, "n ..."], noise: Float[Array, "n ..."], t: ArrayLike
) -> Float[Array, "n ..."]:
    r"""The noisy batch :math:`\sqrt{\bar\alpha_t} \, x + \sqrt{1 - \bar\alpha_t} \, \epsilon`.

    ``t`` is one integer timestep or one per example. If it is outside of [0, T), a concrete value raises
    ``ValueError``, and a traced one is clipped.
    """
    alpha, sigma = _levels(schedule, x, t)
    return alpha * x + sigma * noise


def target(
    schedule: Schedule, x: Float[Array, "n ..."], noise: Float[Array, "n ..."], t: ArrayLike
) -> Float[Array, "n ..."]:
    r"""The network's target for the batch of :func:`add_noise`: ε, x or :math:`v = \alpha \epsilon - \sigma x`."""
    alpha, sigma = _levels(schedule, x, t)
    return {"epsilon": noise, "sample": x, "v_prediction": alpha * noise - sigma * x}[schedule.prediction_type]


def sigma_to_timestep(schedule: Schedule, sigma: Scalar) -> Float[Array, ""]:
    """The fractional timestep of a noise level, interpolated linearly in log σ and clipped to [0, T − 1]."""
    sigma = jnp.asarray(sigma, jnp.result_type(float, sigma))
    log_sigmas = jnp.asarray(np.log(schedule.sigmas), sigma.dtype)
    return jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(log_sigmas.size, dtype=sigma.dtype))


def timestep_to_sigma(schedule: Schedule, t: Scalar) -> Float[Array, ""]:
    """The noise level of a fractional timestep, the inverse of :func:`sigma_to_timestep` on [0, T − 1]."""
    t = jnp.asarray(t, jnp.result_type(float, t))
    log_sigmas = jnp.asarray(np.log(schedule.sigmas), t.dtype)
    return jnp.exp(jnp.interp(t, jnp.arange(log_sigmas.size, dtype=t.dtype), log_sigmas))


def _method(name: object, method: str | None) -> Method:
    if method is not None and method not in METHODS:
        raise ValueError(f"method {method!r} is not known; choose from {', '.join(METHODS)}.")
    if isinstance(name, str) and name in CLASSES:
        return method or CLASSES[name]
    if name is None or (isinstance(name, str) and name in OTHER_CLASSES):
        if method is not None:
            return method
        problem = "the config has no _class_name" if name is None else f"the steps of {name} are not supported"
        raise ValueError(
            f"{problem}; choose how to sample its noise schedule: method= one of {', '.join(METHODS)} (--sampler)."
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            "FlowMatchEulerDiscreteScheduler is the schedule of a rectified flow, and no network that is loaded here "
            "is one; scaling.diffusion.flow reads it for networks of your own."
        )
    raise ValueError(f"scheduler {name!r} is not supported; supported are {', '.join((*CLASSES, *OTHER_CLASSES))}.")


def _alpha_bar(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    start, end, num = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    # Betas outside (0, 1) give NaN or an increasing table, which from_config refuses.
    with np.errstate(all="ignore"):
        if schedule.trained_betas is not None:
            betas = np.asarray(schedule.trained_betas, np.float64)
        elif schedule.beta_schedule == "linear":
            betas = np.linspace(start, end, num)
        elif schedule.beta_schedule == "scaled_linear":
            betas = np.square(np.linspace(math.sqrt(start), math.sqrt(end), num))
        else:
            power = np.square(np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * math.pi / 2))
            betas = np.minimum(1 - power[1:] / power[:-1], 0.999)
        alpha_bar = np.cumprod(1 - betas)
        if schedule.rescale_betas_zero_snr:
            root = np.sqrt(alpha_bar)
            alpha_bar = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    return _read_only(alpha_bar)


def _check_alpha_bar(fields: Fields, schedule: Schedule) -> None:
    alpha_bar = schedule.alpha_bar
    if alpha_bar.size != schedule.num_train_timesteps:
        reason = f"num_train_timesteps is {schedule.num_train_timesteps}, trained_betas has {alpha_bar.size}"
        raise fields.refusal("num_train_timesteps", schedule.num_train_timesteps, reason)
    ends = alpha_bar[-1] == 0 if schedule.rescale_betas_zero_snr else alpha_bar[-1] > 0
    if not (alpha_bar[0] < 1 and np.all(np.diff(alpha_bar) < 0) and ends):
        raise fields.refusal(
            "beta_schedule",
            schedule.beta_schedule,
            "its signal power must decrease strictly, start below 1 and stay above 0; every beta must lie in (0, 1)",
        )


def _read_only(table: Float64[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
    table.flags.writeable = False
    return table


def _levels(schedule: Schedule, x: Float[Array, "n ..."], t: ArrayLike) -> tuple[Array, Array]:
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer) or t.shape not in ((), x.shape[:1]):
        raise ValueError(f"t must be one integer timestep or one per example, got {t.dtype} of shape {t.shape}.")
    if is_concrete(t) and not np.all((np.asarray(t) >= 0) & (np.asarray(t) < schedule.num_train_timesteps)):
        raise ValueError(f"t must lie in [0, {schedule.num_train_timesteps}), got {t}.")
    powers = (schedule.alpha_bar, 1 - schedule.alpha_bar)
    per_example = t.shape + (1,) * (x.ndim - 1) if t.ndim else ()
    alpha, sigma = (jnp.asarray(np.sqrt(power), x.dtype)[t].reshape(per_example) for power in powers)
    return alpha, sigma
