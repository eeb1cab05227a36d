"""Models as Flax NNX modules: the same parameters, names and ``apply``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array

from scaling.models.model import Model
from scaling.models.taps import Edits

__all__ = ["Network", "from_nnx", "to_nnx"]


class Network(nnx.Module):
    """A model as a module: its parameters are ``nnx.Param`` at ``params[name]``, ``name`` as in PyTorch.

    Call it like :meth:`scaling.models.model.Apply.__call__`, without the parameters. Layouts are JAX's, as in the
    model.
    """

    def __init__(self, model: Model) -> None:
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in model.params.items()})
        self.config, self.apply, self.source = model.config, model.apply, model.source

    def __call__(
        self, *inputs: Any, capture: Sequence[str] = (), edits: Edits | None = None, **more: Any
    ) -> tuple[Any, dict[str, Array]]:
        """The output and the captured activations."""
        return self.apply(from_nnx(self).params, *inputs, capture=capture, edits=edits, **more)


def to_nnx(model: Model) -> Network:
    """The model as a module; training the module does not change ``model``.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> network = scaling.to_nnx(model)
    >>> network(jnp.zeros((2, 3, 4, 4)), 50)[0].shape, network.params["conv_in.bias"].shape
    ((2, 3, 4, 4), (8,))
    """
    return Network(model)


def from_nnx(network: Network) -> Model:
    """The model with the module's present parameters: the inverse of :func:`to_nnx`.

    >>> import jax, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> network = scaling.to_nnx(model)
    >>> network.params["conv_in.bias"][...] += 1
    >>> changed = scaling.from_nnx(network)
    >>> bool((changed.params["conv_in.bias"] == model.params["conv_in.bias"] + 1).all())
    True
    """
    params = {name: parameter[...] for name, parameter in network.params.items()}
    return Model(network.config, params, network.apply, network.source)
