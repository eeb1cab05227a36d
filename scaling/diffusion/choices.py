"""Names that configurations and command lines choose from; a module of its own, for ``--help`` imports no JAX."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

__all__ = ["BETA_SCHEDULES", "METHODS", "OTHER_CLASSES", "PREDICTIONS", "Method", "Prediction"]

Method: TypeAlias = Literal[
    "ddim", "ddpm", "pndm", "euler", "euler_ancestral", "heun", "lms", "dpmsolver++", "unipc", "lcm"
]
METHODS: tuple[Method, ...] = get_args(Method)
"""Samplers."""

Prediction: TypeAlias = Literal["epsilon", "sample", "v_prediction"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
"""What a network predicts: the noise, the clean image, or a mixture of both."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""How the betas of a noise schedule run from the first timestep to the last."""

OTHER_CLASSES = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
)
"""Classes with the same noise schedules but other steps; any method of :data:`METHODS` samples their models."""
