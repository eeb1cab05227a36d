"""The identity of a pipeline as JSON, from its weights and its schedule, wherever their files are."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from scaling.bridge.loading import Pipeline
from scaling.models.model import Model
from sims.store import checksum

__all__ = ["identify", "identify_model"]


def identify(pipeline: Pipeline) -> dict[str, Any]:
    """Each network's architecture, dtype and digest by component, and the fields of the schedule; plain JSON values."""
    parts = {"network": pipeline.network} | ({"vae": pipeline.vae} if pipeline.vae is not None else {})
    parts |= {f"text_encoder_{i}": encoder for i, encoder in enumerate(pipeline.text_encoders, 1)}
    return {name: identify_model(model) for name, model in parts.items()} | {"scheduler": pipeline.schedule.config}


def identify_model(model: Model) -> dict[str, str]:
    """The architecture, dtype and digest of one network."""
    sums = {name: checksum(value) for name, value in sorted(model.params.items())}
    text = json.dumps([json.loads(model.source), sums], sort_keys=True)
    dtype = ", ".join(sorted({str(value.dtype) for value in model.params.values()}))
    return {
        "architecture": model.apply.architecture,
        "dtype": dtype,
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
