"""Named experiments."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["ASK", "CERTIFY", "DEMO"]

DEMO = MappingProxyType(
    {
        "dataset": "digits",
        "num_samples": (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        "sigma": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
        "width": (64,),
        "penalty": (1e-3,),
        "optimizer": "adam",
        "learning_rate": (3e-3,),
        "schedule": "cosine",
        "batch_size": 128,
        "steps": 2000,
        "seeds": 4,
    }
)
"""``python -m sims demo``: the phase diagram of the embedded digits."""

ASK = MappingProxyType({"sigma": (0.1, 0.5), "penalty": (1e-4,)})
"""``python -m sims ask``: all training rows, a unit for each."""

CERTIFY = MappingProxyType({"num_samples": (8,), "sigma": (0.1,)})
"""``python -m sims certify``: few rows, little noise, where the theorems apply."""
