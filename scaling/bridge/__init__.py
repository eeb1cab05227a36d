"""Weights from diffusers' folders or the hub to JAX and back: loading, conditions, latents, export, Flax NNX."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
