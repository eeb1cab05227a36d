"""Strict reading of config.json: each field is used, known to have no effect, or refused by name and value.

Also the layouts of parameters: PyTorch's on disk, JAX's in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

__all__ = ["NO_EFFECT", "Fields", "Layout", "ParamSpec", "jax_shape", "per_block", "to_jax", "to_torch"]

T = TypeVar("T")

Layout: TypeAlias = Literal["conv", "linear", "embedding", "vector"]


class ParamSpec(NamedTuple):
    """A parameter's shape in PyTorch, and its layout.

    ``conv`` is (out, in, height, width) on disk and (height, width, in, out) in memory, ``linear`` (out, in) on disk
    and (in, out) in memory; ``embedding`` and ``vector`` are the same in both.
    """

    shape: tuple[int, ...]
    kind: Layout


_TO_JAX: dict[Layout, tuple[int, ...]] = {"conv": (2, 3, 1, 0), "linear": (1, 0)}
_TO_TORCH: dict[Layout, tuple[int, ...]] = {"conv": (3, 2, 0, 1), "linear": (1, 0)}
_BLOCK = 64


def jax_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The parameter's shape in memory."""
    return tuple(spec.shape[i] for i in _TO_JAX[spec.kind]) if spec.kind in _TO_JAX else spec.shape


def to_jax(kind: Layout, array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A copy of a parameter in JAX's layout, optionally converted to ``dtype``; on a CPU, JAX can use its memory."""
    out = _aligned(jax_shape(ParamSpec(array.shape, kind)), np.dtype(dtype or array.dtype))
    if kind not in _TO_JAX:
        out[...] = array
    else:
        # In blocks of the outer axis, which becomes the inner one, so that both reads and writes stay in the cache.
        for i in range(0, array.shape[0], _BLOCK):
            out[..., i : i + _BLOCK] = array[i : i + _BLOCK].transpose(_TO_JAX[kind])
    return out


def to_torch(kind: Layout, array: np.ndarray) -> np.ndarray:
    """A copy of a parameter in PyTorch's layout: the inverse of :func:`to_jax`."""
    if kind not in _TO_TORCH:
        return array.copy()
    out = np.empty([array.shape[i] for i in _TO_TORCH[kind]], array.dtype)
    for i in range(0, out.shape[0], _BLOCK):
        out[i : i + _BLOCK] = array[..., i : i + _BLOCK].transpose(_TO_TORCH[kind])
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # JAX can use NumPy's memory without a copy only if it is aligned to 64 bytes.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# Fields that, for the supported variants, cannot change the forward pass at inference, whatever their value.
_TRANSFORMERS = """
add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
typical_p use_bfloat16
"""
# What diffusers' EMAModel adds to the configuration of averaged weights.
_AVERAGE = frozenset(
    {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
)
NO_EFFECT: dict[str, frozenset[str]] = {
    "UNet2DModel": _AVERAGE | frozenset({"dropout", "num_train_timesteps"}),
    "UNet2DConditionModel": _AVERAGE
    | frozenset(
        {
            "dropout",
            # Softmax is always computed in float32 here.
            "upcast_attention",
            # These affect only block and embedding types that are refused.
            "addition_embed_type_num_heads",
            "cross_attention_norm",
            "mid_block_only_cross_attention",
            "resnet_out_scale_factor",
            "resnet_skip_time_act",
        }
    ),
    "DiTTransformer2DModel": _AVERAGE | frozenset({"dropout", "norm_num_groups", "upcast_attention"}),
    # The caller scales latents; sample_size affects tiling only.
    "AutoencoderKL": _AVERAGE | frozenset({"force_upcast", "sample_size"}),
    # Indices of the codebook in place of latents are not taken.
    "VQModel": _AVERAGE | frozenset({"force_upcast", "lookup_from_codebook", "sample_size"}),
    "CLIPModel": frozenset({*_TRANSFORMERS.split(), "logit_scale_init_value"}),
    "CLIPTextModel": frozenset(_TRANSFORMERS.split()),
    "CLIPVisionModel": frozenset(_TRANSFORMERS.split()),
}
"""Fields without effect on the output, by class; those that begin with ``_`` have none in any class."""

MAX_CHANNELS = 1 << 16
MAX_LAYERS = 256
MAX_BLOCKS = 16


class Fields:
    """Reads the fields of one config.json; each getter checks type and range, and records that the field was read.

    A field that is absent, or null where that means the same, takes the default. After the last getter call
    :meth:`finish`, which refuses fields that were never read.
    """

    def __init__(self, owner: str, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise ValueError(f"{owner}: the config must be a JSON object of fields, got {type(config).__name__}.")
        self.owner = owner
        self.config = config
        self.read: set[str] = set()

    def raw(self, name: str, default: Any = None) -> Any:
        """The field's value, unchecked."""
        self.read.add(name)
        return self.config.get(name, default)

    def integer(self, name: str, default: int, *, minimum: int = 1, maximum: int = MAX_CHANNELS) -> int:
        """An integer in [minimum, maximum]."""
        return self._integer(name, self.raw(name, default), minimum, maximum)

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int = MAX_CHANNELS) -> int | None:
        """An integer in [minimum, maximum], or None if null or absent."""
        value = self.raw(name)
        return None if value is None else self._integer(name, value, minimum, maximum)

    def integers(self, name: str, default: Sequence[int], *, maximum: int = MAX_CHANNELS) -> tuple[int, ...]:
        """A list of one to MAX_BLOCKS positive integers."""
        return tuple(self._integer(name, item, 1, maximum) for item in self._list(name, self.raw(name, default)))

    def number(self, name: str, default: float) -> float:
        """A positive number in the range of float32."""
        value = self.raw(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-37 < value < 1e37:
            raise self.refusal(name, value, "it must be a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; null means the default."""
        value = self.raw(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(name, value, "it must be true or false")
        return value

    def choice(self, name: str, default: T, choices: Sequence[T]) -> T:
        """One of ``choices``, which may hold None."""
        return self._choice(name, self.raw(name, default), choices)

    def choices(self, name: str, default: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
        """A list of one to MAX_BLOCKS of ``choices``."""
        return tuple(self._choice(name, item, choices) for item in self._list(name, self.raw(name, default)))

    def block_types(self, name: str, default: Sequence[str], choices: Sequence[str], count: int) -> tuple[str, ...]:
        """The types of ``count`` blocks, without the prefix ``UNetRes`` that configurations of 2022 have."""
        items = self._list(name, self.raw(name, default))
        if len(items) != count:
            raise self.refusal(name, list(items), f"it must have {count} entries, as block_out_channels has")
        plain = [item.removeprefix("UNetRes") if isinstance(item, str) else item for item in items]
        return tuple(self._choice(name, item, choices) for item in plain)

    def only(self, name: str, *values: Any) -> None:
        """A field that is supported at these values only; the first is the default."""
        self.choice(name, values[0], values)

    def sample_size(self, default: int) -> tuple[int, int]:
        """Height and width of the model's images, from one integer or two; null means ``default``."""
        value = self.raw("sample_size")
        value = default if value is None else value
        pair = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(pair) != 2:
            raise self.refusal("sample_size", value, "it must be one integer or two")
        height, width = (self._integer("sample_size", item, 1, MAX_CHANNELS) for item in pair)
        return height, width

    def finish(self) -> None:
        """Refuse fields that were not read and are not known to have no effect."""
        for name, value in self.config.items():
            if not (name in self.read or name in NO_EFFECT[self.owner] or name.startswith("_")):
                raise self.refusal(name, value, "this field is not supported, so the result could be wrong")

    def refusal(self, name: str, value: object, reason: str) -> ValueError:
        """The error for a field with this value, to be raised by the caller."""
        shown = repr(value)
        return ValueError(
            f"{self.owner} config: {name} = {shown if len(shown) < 200 else shown[:200] + '...'}: {reason}."
        )

    def _integer(self, name: str, value: object, minimum: int, maximum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refusal(name, value, f"it must be an integer from {minimum} to {maximum}")
        return value

    def _choice(self, name: str, value: Any, choices: Sequence[T]) -> T:
        # Types are compared too: in Python 1 == True.
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise self.refusal(name, value, f"supported are {', '.join(map(repr, choices))}")

    def _list(self, name: str, value: object) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_BLOCKS:
            raise self.refusal(name, value, f"it must be a list of 1 to {MAX_BLOCKS} entries")
        return value


def per_block(fields: Fields, name: str, default: int, blocks: int, *, maximum: int = MAX_LAYERS) -> tuple[int, ...]:
    """A field that is one positive integer for all blocks or a list with one per block, as a tuple."""
    value = fields.raw(name, default)
    items = list(value) if isinstance(value, list | tuple) else [value] * blocks
    if len(items) != blocks:
        raise fields.refusal(name, value, f"it must be an integer or a list of {blocks}, one per block")
    return tuple(fields._integer(name, item, 1, maximum) for item in items)
