r"""Read and edit a network's activations by name, without hooks or state.

A forward pass calls ``x = tap(name, x)`` after each module; ``name`` is the module's path in PyTorch, for example
``"mid_block.resnets.0"``. A :class:`Tap` edits the activation, then captures it. Captured activations are outputs of
the pass, so nothing else is computed if only they are used: reading an early layer under ``jit`` stops at that layer.

Activations have PyTorch's layout: images are (B, C, H, W), although the networks compute in (B, H, W, C), tokens
(B, T, C) and vectors (B, C). For a module that is called several times, the last call counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, ArrayLike

__all__ = ["Edit", "Edits", "Kind", "Tap", "check_names", "check_order", "each_edit", "names"]

Kind: TypeAlias = Literal["add", "scale", "replace", "project_out"]


@struct.dataclass
class Edit:
    r"""One change of an activation x, of strength s: nothing at s = 0, the whole change at s = 1.

    .. math:: x \leftarrow x + s\, \delta(x), \qquad \delta(x) = \begin{cases}
        v & \text{add} \\ x \odot v - x & \text{scale} \\ v - x & \text{replace} \\
        -\langle x, v \rangle v / \|v\|^2 & \text{project\_out} \end{cases}

    ``value`` v is a vector (C,), the same at every position, or an array that broadcasts against the activation; a
    direction to project out is always a vector. ``strength`` is a number, one number per example (B,), or an array of
    the activation's rank, for example a mask (1, 1, H, W). ``kind`` is static; value and strength are traced, so that
    other ones do not recompile.

    >>> import jax, jax.numpy as jnp, scaling
    >>> config = {"_class_name": "UNet2DModel", "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    >>> config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    >>> model = scaling.initialize(jax.random.key(0), config)
    >>> x, edits = jnp.zeros((2, 3, 4, 4)), {"mid_block": scaling.Edit("scale", jnp.zeros(8))}
    >>> _, taps = model.apply(model.params, x, 50, capture=("mid_block",), edits=edits)
    >>> bool(jnp.all(taps["mid_block"] == 0))
    True
    """

    kind: Kind = struct.field(pytree_node=False)
    value: ArrayLike
    strength: ArrayLike = 1.0


Edits: TypeAlias = Mapping[str, Edit | Sequence[Edit]]
"""Edits by tap name; several at one tap act in order."""


class Tap:
    """The function that a forward pass calls after every module, to edit and capture; use a new one for each trace.

    ``taps`` holds the captured activations, and ``shapes`` the shape of every activation.
    """

    def __init__(self, capture: Sequence[str] = (), edits: Edits | None = None) -> None:
        if isinstance(capture, str):
            raise ValueError(f"capture must be a sequence of names, got the string {capture!r}; write ({capture!r},).")
        self.capture = tuple(capture)
        self.edits = {name: each_edit(name, several) for name, several in (edits or {}).items()}
        self.taps: dict[str, Array] = {}
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def __call__(self, name: str, x: Array) -> Array:
        """Return ``x``, edited if there is an edit of this name, and capture it if asked to."""
        self.shapes[name] = jax.ShapeDtypeStruct(_shown_shape(x), x.dtype)
        if name in self.edits:
            shown = _shown(x)
            for edit in self.edits[name]:
                shown = _edited(name, shown, edit)
            x = _computed(shown)
        if name in self.capture:
            self.taps[name] = _shown(x)
        return x

    def check(self) -> None:
        """Raise ``ValueError`` for a captured or edited name that the network lacks; suggests the nearest names."""
        check_names(self.shapes, *self.capture, *self.edits)


def each_edit(name: str, edits: Any) -> tuple[Edit, ...]:
    """One edit or a sequence of edits as a tuple; ``ValueError`` for anything else, such as a bare vector."""
    several = (edits,) if isinstance(edits, Edit) else tuple(edits) if isinstance(edits, list | tuple) else None
    if several is None or not all(isinstance(edit, Edit) for edit in several):
        raise ValueError(
            f"edit of {name!r}: it must be an Edit or a sequence of them, got {type(edits).__name__}; "
            f"write for example Edit('add', vector, 0.5)."
        )
    return several


def names(model: Any, *inputs: Any, **more: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every tap of ``model`` in order of computation; computes nothing.

    Shapes are for the given inputs (arrays or ``jax.ShapeDtypeStruct``), by default one example of the configured size.
    """
    if not inputs:
        inputs, more = model.apply.inputs(jax.tree.leaves(model.params)[0].dtype)
    return model.apply.shapes(model.params, *inputs, **more)


def check_names(listed: Mapping[str, object], *taps: str) -> None:
    """Raise ``ValueError`` for a name that is not in ``listed``, a model's taps; suggests the nearest."""
    for name in taps:
        if name not in listed:
            raise ValueError(f"the model has no tap named {name!r}; {_suggestion(name, listed)}")


def check_order(listed: Mapping[str, object], source: str, target: str) -> None:
    """Raise ``ValueError`` unless both are taps and ``target`` is computed after ``source``."""
    check_names(listed, source, target)
    order = list(listed)
    if order.index(source) >= order.index(target):
        raise ValueError(f"the target {target!r} is computed before the source {source!r}; swap them.")


def _shown_shape(x: Array) -> tuple[int, ...]:
    return (x.shape[0], x.shape[3], *x.shape[1:3]) if x.ndim == 4 else x.shape


def _shown(x: Array) -> Array:
    return jnp.moveaxis(x, -1, 1) if x.ndim == 4 else x


def _computed(x: Array) -> Array:
    return jnp.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _edited(name: str, x: Array, edit: Edit) -> Array:
    axis = 1 if x.ndim == 4 else x.ndim - 1
    v = _aligned(name, "value", edit.value, x, axis)
    s = _aligned(name, "strength", edit.strength, x, 0)
    match edit.kind:
        case "add":
            delta = v
        case "scale":
            delta = x * v - x
        case "replace":
            delta = v - x
        case "project_out":
            if jnp.ndim(edit.value) != 1:
                raise ValueError(
                    f"edit of {name!r}: project_out needs a vector ({x.shape[axis]},), got {jnp.shape(edit.value)}."
                )
            # Divided twice by the norm, not once by its square, which under- or overflows in half precision.
            wide = v.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else v
            unit = v / jnp.linalg.norm(wide).astype(x.dtype)
            delta = -jnp.sum(x * unit, axis=axis, keepdims=True) * unit
        case _:
            raise ValueError(f"edit of {name!r}: unknown kind {edit.kind!r}; choose from {', '.join(get_args(Kind))}.")
    return x + s * delta


def _aligned(name: str, role: str, value: ArrayLike, x: Array, axis: int) -> Array:
    aligned = jnp.asarray(value).astype(x.dtype)
    if aligned.ndim == 1:
        aligned = jnp.expand_dims(aligned, [i for i in range(x.ndim) if i != axis])
    if aligned.ndim not in (0, x.ndim) or any(v not in (1, n) for v, n in zip(aligned.shape, x.shape, strict=False)):
        raise ValueError(
            f"edit of {name!r}: {role} of shape {jnp.shape(value)} does not fit the activation {x.shape}; give a "
            f"scalar, a vector ({x.shape[axis]},) or a shape that broadcasts against {x.shape}."
        )
    return aligned


def _suggestion(name: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    shown = f"the nearest are {', '.join(map(repr, nearest))}" if nearest else "none is similar"
    return f"{shown}. scaling.models.taps.names(model) lists all {len(known)}."
