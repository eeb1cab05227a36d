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
    """The model as a module; training the module does not change ``model``."""
    return Network(model)


def from_nnx(network: Network) -> Model:
    """The model with the module's present parameters: the inverse of :func:`to_nnx`."""
    params = {name: parameter[...] for name, parameter in network.params.items()}
    return Model(network.config, params, network.apply, network.source)
