"""Networks as values: a configuration, the parameters, and the function that applies them.

Inputs are batched, and images are (B, C, H, W). :meth:`Apply.__call__` is compiled once per set of input shapes and tap
names; other prompts, timesteps, and values and strengths of edits do not recompile it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dae_theory.types import PRNGKey
from scaling.models.config import ParamSpec, jax_shape
from scaling.models.taps import Edits, Tap

__all__ = [
    "ARCHITECTURES",
    "DENOISERS",
    "Apply",
    "Condition",
    "Model",
    "encode_text",
    "from_config",
    "initialize",
    "parse_config",
    "vae_decode",
    "vae_encode",
]

ARCHITECTURES = {
    "UNet2DModel": "unet2d",
    "UNet2DConditionModel": "unet2d_condition",
    "DiTTransformer2DModel": "dit",
    "Transformer2DModel": "dit",
    "AutoencoderKL": "autoencoder_kl",
    "VQModel": "vq_model",
    "CLIPTextModel": "clip_text",
    "CLIPTextModelWithProjection": "clip_text",
    "CLIPVisionModel": "clip_vision",
    "CLIPVisionModelWithProjection": "clip_vision",
    "CLIPModel": "clip",
}
"""Modules of :mod:`scaling.models` by the class that a config.json names."""

DENOISERS = ("unet2d", "unet2d_condition", "dit")
"""Architectures that remove noise."""


class Condition(NamedTuple):
    """What a model is conditioned on; fields are arguments of ``apply``, with a batch axis first, or None.

    >>> import jax.numpy as jnp, scaling
    >>> classes = scaling.Condition(class_labels=jnp.array([3, 7]))
    >>> classes.class_labels.shape, classes.context is None
    ((2,), True)
    """

    context: Any = None
    class_labels: Any = None
    added: Any = None


@dataclasses.dataclass(frozen=True)
class Apply:
    """A function of an architecture, together with a configuration; compares by value, so that equal ones compile once.

    ``function`` is its name in the architecture's module. ``"apply"`` is the forward pass. Its inputs, by position or
    by name, are ``(x, t, context, class_labels, added)`` for denoising networks, of which each takes some,
    ``(images,)`` for autoencoders and image encoders, and ``(ids,)`` for text encoders.
    """

    architecture: str
    config: Hashable
    function: str = "apply"

    def __call__(
        self,
        params: Mapping[str, Array],
        *inputs: Any,
        capture: Sequence[str] = (),
        edits: Edits | None = None,
        **more: Any,
    ) -> tuple[Any, dict[str, Array]]:
        """The output, and the activations of the taps named in ``capture``, after ``edits``.

        Arguments that are None count as left out. Raises ``ValueError`` for an unknown tap name. On accelerators,
        float32 products have the precision of ``jax.default_matmul_precision``.
        """
        named = {name: value for name, value in more.items() if value is not None}
        return _run(self, Tap(capture, edits).capture, params, edits, inputs, named)

    def shapes(self, params: Mapping[str, Any], *inputs: Any, **more: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every tap in order of computation, from arrays or shapes; computes nothing."""
        tap = Tap()
        jax.eval_shape(functools.partial(self._trace, tap), params, *inputs, **more)
        return tap.shapes

    def taps(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """:meth:`shapes` for parameters of ``dtype`` and one example of the configured size."""
        inputs, more = self.inputs(dtype)
        return self.shapes(self.parameter_shapes(dtype), *inputs, **more)

    def parameter_shapes(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of every parameter in JAX's layout, by name."""
        return {name: jax.ShapeDtypeStruct(jax_shape(spec), dtype) for name, spec in self.parameters().items()}

    def inputs(self, dtype: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes of the inputs, positional and named, for one example of the configured size."""
        return self.module.inputs(self.config, dtype)

    def parameters(self) -> dict[str, ParamSpec]:
        """Every parameter by name, with its shape and layout in PyTorch."""
        return self.module.parameters(self.config)

    def of(self, function: str) -> Apply:
        """Another function of the same network, for example an autoencoder's ``"encode"``."""
        return dataclasses.replace(self, function=function)

    @property
    def module(self) -> ModuleType:
        """The architecture's module in :mod:`scaling.models`."""
        return importlib.import_module(f"scaling.models.{self.architecture}")

    def _trace(self, tap: Tap, params: Mapping[str, Array], *inputs: Any, **more: Any) -> Any:
        return getattr(self.module, self.function)(self.config, params, tap, *inputs, **more)


@struct.dataclass
class Model:
    """A network: a pytree whose leaves are its parameters, to differentiate, map, shard or update as one.

    ``params`` are named as in PyTorch, in JAX's layout. ``apply(params, x, t, ...)`` returns ``(out, taps)``, see
    :class:`Apply`. ``source`` is the text of the config.json that it was made from.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> out, taps = model.apply(model.params, jnp.zeros((2, 3, 4, 4)), 50, capture=("mid_block",))
    >>> out.shape, taps["mid_block"].shape, model.params["conv_in.weight"].shape
    ((2, 3, 4, 4), (2, 8, 4, 4), (3, 3, 3, 8))
    """

    config: Any = struct.field(pytree_node=False)
    params: dict[str, Array]
    apply: Apply = struct.field(pytree_node=False)
    source: str = struct.field(pytree_node=False, default="")


def from_config(config: Mapping[str, Any], params: Mapping[str, Array]) -> Model:
    """The model of a config.json's fields with given parameters, which are neither checked nor copied."""
    apply = parse_config(config)
    return Model(apply.config, dict(params), apply, json.dumps(dict(config)))


def initialize(key: PRNGKey, config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    r"""A model of a config.json's fields with random parameters, to train.

    Weights are drawn from :math:`\mathcal N(0, 1/\mathrm{fan\ in})` and embeddings from :math:`\mathcal N(0, 0.02^2)`;
    biases are 0 and weights of norms 1.

    >>> import jax, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> len(model.params), sum(param.size for param in model.params.values())
    (64, 10579)
    """
    specs = parse_config(config).parameters()
    keys = jax.random.split(key, len(specs))
    return from_config(config, {name: _drawn(k, name, specs[name], dtype) for k, name in zip(keys, specs, strict=True)})


def parse_config(config: Mapping[str, Any]) -> Apply:
    """The network that a config.json's fields describe; ``ValueError`` names an unsupported class or field."""
    listed = config.get("architectures")
    named = config.get("_class_name") or (listed[0] if isinstance(listed, list) and len(listed) == 1 else None)
    # diffusers' Flax classes had the same configurations.
    plain = named.removeprefix("Flax") if isinstance(named, str) else None
    if plain not in ARCHITECTURES:
        raise ValueError(
            f"config: class {named!r} (_class_name or architectures) is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    apply = Apply(ARCHITECTURES[plain], None)
    return dataclasses.replace(apply, config=apply.module.parse(config))


def vae_encode(
    vae: Model, images: Float[Array, "b c h w"]
) -> tuple[Float[Array, "b z h2 w2"], Float[Array, "b z h2 w2"]]:
    """Mean and log variance of the unscaled latents of images in [-1, 1]; :func:`scaling.bridge.to_latents` scales.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4}
    >>> vae = scaling.initialize(jax.random.key(0), config | {"mid_block_add_attention": False})
    >>> mean, logvar = scaling.vae_encode(vae, jnp.zeros((2, 3, 4, 4)))
    >>> mean.shape, logvar.shape
    ((2, 4, 4, 4), (2, 4, 4, 4))
    """
    return vae.apply.of("encode")(vae.params, images)[0]


def vae_decode(vae: Model, latents: Float[Array, "b z h2 w2"]) -> Float[Array, "b c h w"]:
    """Images, roughly in [-1, 1], of unscaled latents.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4}
    >>> vae = scaling.initialize(jax.random.key(0), config | {"mid_block_add_attention": False})
    >>> scaling.vae_decode(vae, jnp.zeros((2, 4, 4, 4))).shape
    (2, 3, 4, 4)
    """
    return vae.apply.of("decode")(vae.params, latents)[0]


def encode_text(
    text: Model, ids: Int[Array, "b t"], *, penultimate: bool = False
) -> tuple[Float[Array, "b t c"], Float[Array, "b p"]]:
    """States of all tokens, and the pooled vector; ``penultimate`` returns the states before the last layer (SDXL).

    Raises ``ValueError`` for ids outside of the vocabulary.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"architectures": ["CLIPTextModel"], "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    >>> config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 49}
    >>> text_encoder = scaling.initialize(jax.random.key(0), config)
    >>> hidden, pooled = scaling.encode_text(text_encoder, jnp.array([[48, 3, 7, 49]]))
    >>> hidden.shape, pooled.shape
    ((1, 4, 16), (1, 16))
    """
    # Here, because the forward pass is compiled and cannot refuse values.
    text.apply.module.check_ids(text.config, ids)
    out = text.apply(text.params, ids)[0]
    return (out.penultimate if penultimate else out.hidden), out.pooled


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    apply: Apply,
    capture: tuple[str, ...],
    params: Mapping[str, Array],
    edits: Edits | None,
    inputs: tuple[Any, ...],
    more: dict[str, Any],
) -> tuple[Any, dict[str, Array]]:
    tap = Tap(capture, edits)
    out = apply._trace(tap, params, *inputs, **more)
    tap.check()
    return out, tap.taps


def _drawn(key: PRNGKey, name: str, spec: ParamSpec, dtype: Any) -> Array:
    if spec.kind == "vector":
        return jnp.full(spec.shape, 1.0 if name.endswith("weight") else 0.0, dtype)
    scale = 0.02 if spec.kind == "embedding" else math.prod(spec.shape[1:]) ** -0.5
    return scale * jax.random.normal(key, jax_shape(spec), dtype)
