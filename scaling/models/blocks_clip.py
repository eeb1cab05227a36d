r"""The transformer that both halves of CLIP :cite:`radford21` share, and the names of its parameters.

A layer is :math:`x \leftarrow x + \mathrm{attention}(\mathrm{norm}_1 x)`, then
:math:`x \leftarrow x + \mathrm{mlp}(\mathrm{norm}_2 x)`. Tokens are (B, T, C).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from scaling.models.config import MAX_LAYERS, Fields
from scaling.models.layers import Params, Specs, activation, attention, layer_norm, linear, linear_specs, norm_specs
from scaling.models.taps import Tap

__all__ = ["ClipStyle", "clip_encoder", "clip_encoder_specs", "clip_key", "clip_style"]


class ClipStyle(NamedTuple):
    """The hyperparameters that all layers of an encoder share."""

    channels: int
    hidden: int
    layers: int
    heads: int
    act_fn: str
    eps: float


def clip_style(fields: Fields, *, channels: int, hidden: int, heads: int) -> ClipStyle:
    """Read the encoder's fields; the arguments are the defaults, which differ between texts and images."""
    fields.only("pruned_heads", {}, None)
    style = ClipStyle(
        channels=fields.integer("hidden_size", channels),
        hidden=fields.integer("intermediate_size", hidden),
        layers=fields.integer("num_hidden_layers", 12, maximum=MAX_LAYERS),
        heads=fields.integer("num_attention_heads", heads),
        act_fn=fields.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        eps=fields.number("layer_norm_eps", 1e-5),
    )
    if style.channels % style.heads:
        raise fields.refusal("num_attention_heads", style.heads, f"it must divide hidden_size = {style.channels}")
    return style


def clip_encoder_specs(name: str, style: ClipStyle) -> Specs:
    """Parameters of :func:`clip_encoder`."""
    specs: Specs = {}
    for i in range(style.layers):
        layer = f"{name}.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            specs |= linear_specs(f"{layer}.self_attn.{part}", style.channels, style.channels)
        specs |= norm_specs(f"{layer}.layer_norm1", style.channels) | norm_specs(f"{layer}.layer_norm2", style.channels)
        specs |= linear_specs(f"{layer}.mlp.fc1", style.channels, style.hidden)
        specs |= linear_specs(f"{layer}.mlp.fc2", style.hidden, style.channels)
    return specs


def clip_encoder(
    params: Params, tap: Tap, name: str, x: Float[Array, "b t c"], *, style: ClipStyle, causal: bool
) -> tuple[Float[Array, "b t c"], ...]:
    """The input and the output of every layer, in order: PyTorch's ``hidden_states``, before any final norm."""
    states = [x]
    for i in range(style.layers):
        layer = f"{name}.layers.{i}"
        h = layer_norm(params, tap, f"{layer}.layer_norm1", x, eps=style.eps)
        q, k, v = (linear(params, tap, f"{layer}.self_attn.{part}", h) for part in ("q_proj", "k_proj", "v_proj"))
        mixed = attention(q, k, v, heads=style.heads, causal=causal)
        x = x + tap(f"{layer}.self_attn", linear(params, tap, f"{layer}.self_attn.out_proj", mixed))
        h = layer_norm(params, tap, f"{layer}.layer_norm2", x, eps=style.eps)
        h = activation(tap, f"{layer}.mlp.activation_fn", style.act_fn, linear(params, tap, f"{layer}.mlp.fc1", h))
        x = tap(layer, x + tap(f"{layer}.mlp", linear(params, tap, f"{layer}.mlp.fc2", h)))
        states.append(x)
    return tuple(states)


def clip_key(key: str, prefix: str, heads: tuple[str, ...]) -> str | None:
    """A checkpoint's key with ``prefix``, as in published checkpoints; checkpoints of transformers 5 may lack it.

    ``heads`` are the modules outside of the prefix. Returns None for ``position_ids``, a constant that older
    checkpoints store: the integers from 0.
    """
    name = key if key.startswith((f"{prefix}.", *(f"{head}." for head in heads))) else f"{prefix}.{key}"
    return None if name == f"{prefix}.embeddings.position_ids" else name
