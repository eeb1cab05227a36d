"""Architectures as pure functions over one flat dict of parameters, named as in PyTorch.

Each module is one architecture and has these names, through which :mod:`scaling.bridge` loads it:

``parse(config) -> Config``
    the config.json as a frozen dataclass; a field it does not understand is refused by name and value;
``parameters(config) -> dict[str, ParamSpec]``
    every key of the checkpoint, with its PyTorch shape and layout;
``apply(config, params, tap, x, ...) -> out``
    the forward pass; images are NCHW at the edges and NHWC inside;
``inputs(config, dtype) -> (args, kwargs)``
    shapes of ``apply``'s arguments after ``tap`` for one example, as ``jax.ShapeDtypeStruct``;
``rename(key) -> key | None`` (optional)
    the present name of a key of older checkpoints; None for a stored constant that is not a parameter.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
