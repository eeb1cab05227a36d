"""Options of measures, and their defaults; a module of its own, for ``--help`` imports no JAX."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

__all__ = ["CHUNK", "LATENTS", "POOLS", "Latent", "Pool"]

Pool: TypeAlias = Literal["max", "mean", "none"]
"""How to pool an activation over its positions: their largest value, their mean, or not at all."""
POOLS: tuple[Pool, ...] = get_args(Pool)

Latent: TypeAlias = Literal["mean", "sample"]
"""Which latents to take from the Gaussian that an autoencoder returns for an image: its mean, or a draw."""
LATENTS: tuple[Latent, ...] = get_args(Latent)

CHUNK = 64
"""Directions that a Jacobian pushes through the network at a time."""
