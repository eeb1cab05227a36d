"""Versions, commit, device and machine, recorded beside every result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

__all__ = ["differences", "environment"]

PACKAGES = ("dae-theory", "jax", "jaxlib", "optax", "numpy", "xarray", "zarr")


def environment() -> dict[str, Any]:
    """As JSON: ``versions``, git ``commit``, ``device``, ``platform`` and ``host``.

    The commit ends in ``-dirty`` if files differ from it, and is None outside a checkout. Accelerators have the
    ``precision`` of float32 products, which changes results there. Reading the device starts JAX's backend.
    """
    device = jax.devices()[0]
    precision = (
        {}
        if device.platform == "cpu"
        else {"precision": jax.config.values["jax_default_matmul_precision"] or "default"}
    )
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), **precision},
        "platform": platform.platform(),
        "host": platform.node(),
    }


def differences(sessions: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What differs between ``sessions`` that recorded :func:`environment`: each name with its values, in order."""
    seen: dict[str, list[str]] = {}
    for session in sessions:
        named = {"host": session.get("host"), "commit": session.get("commit"), **session.get("versions", {})}
        named |= {f"device {name}": value for name, value in session.get("device", {}).items()}
        for name, value in named.items():
            values = seen.setdefault(name, [])
            if str(value) not in values:
                values.append(str(value))
    return {name: values for name, values in seen.items() if len(values) > 1}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # An installed copy may lie inside the checkout of another project, whose commit is not ours.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
