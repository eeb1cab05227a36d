"""Small diffusion models trained here, some of whose images repeat; resumable, in diffusers' format."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
