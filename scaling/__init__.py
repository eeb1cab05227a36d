"""The same questions asked of deep models: pretrained weights, activations by name, edits, detection, steering."""

import lazy_loader

from dae_theory import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
