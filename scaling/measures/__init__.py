"""Measures of a network at images: codes, copies, Jacobians, and fits by the two-layer autoencoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
