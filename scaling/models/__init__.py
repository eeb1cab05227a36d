"""Architectures as pure functions over one flat dict of parameters, named as in PyTorch.

The module of an architecture (``unet2d``, ``unet2d_condition``, ``dit``, ``autoencoder_kl``, ``vq_model``,
``clip_text``, ``clip_vision``, ``clip``) has these names, which :class:`scaling.models.model.Apply` looks up:

``parse(config) -> Config``
    the config.json as a frozen dataclass; unsupported fields are refused by name and value;
``parameters(config) -> dict[str, ParamSpec]``
    every key of the checkpoint, with its PyTorch shape and layout;
``apply(config, params, tap, x, ...) -> out``
    the forward pass; images are NCHW in inputs and outputs, and NHWC inside;
``inputs(config, dtype) -> (args, kwargs)``
    shapes of ``apply``'s arguments after ``tap`` for one example, as ``jax.ShapeDtypeStruct``;
``rename(key) -> key | None`` (optional)
    the parameter's name for a checkpoint's key; None for a stored constant that is not a parameter.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
