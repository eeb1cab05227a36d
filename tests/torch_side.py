"""What parity tests share: a PyTorch model beside ours with the same random weights, and comparisons of the two."""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from cases import parameter

from scaling.models.config import to_jax
from scaling.models.taps import Edit, Tap

# Several test processes share the cores.
torch.set_num_threads(1)

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
"""Allowed difference as a fraction of the largest value. In float64 a wrong epsilon or constant stands out."""


class Pair(NamedTuple):
    """One network twice. ``theirs(module, x)`` and ``ours(params, tap, x)`` give the same tensor.

    Our name of a module is PyTorch's after ``prefix``; ``rename`` maps keys of a checkpoint to our parameters.
    """

    module: torch.nn.Module
    specs: dict
    params: dict
    x: np.ndarray
    theirs: Callable[..., torch.Tensor]
    ours: Callable[..., Any]
    prefix: str = ""
    rename: Callable[[str], str | None] = lambda key: key


def randomize(module, dtype="float64"):
    """Give every parameter the random values of its name, as the golden files have them."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.from_numpy(parameter(name, tuple(tensor.shape))))
    return module.eval().to(getattr(torch, dtype))


def to_params(state, specs, rename):
    """PyTorch's named tensors as our parameters; their names and shapes must be exactly ``specs``."""
    renamed = {rename(key): value.detach().numpy() for key, value in state.items()}
    renamed.pop(None, None)
    assert {name: value.shape for name, value in renamed.items()} == {name: spec.shape for name, spec in specs.items()}
    return {name: jnp.asarray(to_jax(specs[name].kind, value)) for name, value in renamed.items()}


def pair(module, specs, x, theirs, ours, *, prefix="", rename=lambda key: key):
    """The pair of ``module``, which :func:`randomize` made, and ours with its weights."""
    return Pair(module, specs, to_params(module.state_dict(), specs, rename), x, theirs, ours, prefix, rename)


def difference(ours, theirs):
    """Largest difference as a fraction of the largest value; infinite where shapes differ or ours is not finite."""
    ours, theirs = (np.asarray(a.detach() if isinstance(a, torch.Tensor) else a, np.float64) for a in (ours, theirs))
    if ours.shape != theirs.shape or not np.all(np.isfinite(ours)):
        return np.inf
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def check_output(pair, tolerance):
    """Equal outputs, in the dtype of the parameters."""
    with torch.no_grad():
        theirs = pair.theirs(pair.module, torch.from_numpy(pair.x))
    ours = jax.jit(lambda params, x: pair.ours(params, Tap(), x))(pair.params, jnp.asarray(pair.x))
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
    assert difference(ours, theirs) <= tolerance


def hook_outputs(pair):
    """What a forward hook on each module sees last, by our name; of several outputs the first."""
    seen = {}

    def record(name):
        def hook(_module, _args, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                seen[f"{pair.prefix}{name}"] = output.detach().clone()

        return hook

    handles = [child.register_forward_hook(record(name)) for name, child in pair.module.named_modules() if name]
    with torch.no_grad():
        pair.theirs(pair.module, torch.from_numpy(pair.x))
    for handle in handles:
        handle.remove()
    return seen


def check_taps(pair, tolerance, *, untapped=()):
    """Every tap shows what the hook of that module saw; every module whose hook saw a tensor has a tap.

    ``untapped`` are the ends of names for which the latter need not hold.
    """
    seen, x = hook_outputs(pair), jnp.asarray(pair.x)
    names = Tap()
    jax.eval_shape(lambda: pair.ours(pair.params, names, x))

    def captured():
        tap = Tap(capture=tuple(names.shapes))
        pair.ours(pair.params, tap, x)
        return tap.taps

    for name, value in jax.jit(captured)().items():
        assert name in seen, f"no module is called {name}"
        assert difference(value, seen[name]) <= tolerance, name
    missing = [name for name in seen if name not in names.shapes and not name.endswith(tuple(untapped))]
    assert not missing, f"modules without a tap: {missing}"


def check_edit(pair, name, tolerance):
    """Adding to a module's output: in PyTorch by a hook that returns the sum, in ours by an edit."""
    seen, x = hook_outputs(pair)[f"{pair.prefix}{name}"], torch.from_numpy(pair.x)
    image = seen.ndim == 4
    vector = np.random.RandomState(1).standard_normal(seen.shape[1 if image else -1])
    added = 0.5 * torch.from_numpy(vector).to(seen).reshape((-1, 1, 1) if image else (-1,))

    def hook(_module, _args, output):
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    with torch.no_grad():
        before = pair.theirs(pair.module, x)
        handle = pair.module.get_submodule(name).register_forward_hook(hook)
        theirs = pair.theirs(pair.module, x)
        handle.remove()

    def edited(params, x):
        return pair.ours(params, Tap(edits={f"{pair.prefix}{name}": Edit("add", jnp.asarray(vector), 0.5)}), x)

    assert difference(jax.jit(edited)(pair.params, jnp.asarray(pair.x)), theirs) <= tolerance
    assert difference(before, theirs) > 1e-3


def check_derivatives(pair, tolerance):
    """Directional derivative and gradient, both in all parameters and in a real ``x`` at once."""

    class Caller(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pair.module

        def forward(self, x):
            return pair.theirs(self.inner, x)

    caller, real = Caller(), np.issubdtype(pair.x.dtype, np.floating)
    x = torch.from_numpy(pair.x)

    def theirs(state, offset):
        state = {f"inner.{key}": value for key, value in state.items()}
        return torch.func.functional_call(caller, state, (x + offset if real else x,))

    def ours(params, offset):
        return pair.ours(params, Tap(), jnp.asarray(pair.x) + offset if real else jnp.asarray(pair.x))

    def noise(seed, like):
        return torch.from_numpy(np.asarray(np.random.RandomState(seed).standard_normal(like.shape))).to(like)

    state = {key: parameter.detach() for key, parameter in pair.module.named_parameters()}
    offset = torch.zeros(pair.x.shape if real else (), dtype=next(iter(state.values())).dtype)
    direction = {key: noise(zlib.crc32(key.encode()) + 1, value) for key, value in state.items()}, noise(2, offset)
    # Some kernels of PyTorch lack the forward mode: transpose twice. Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        output, transposed = torch.func.vjp(theirs, state, offset)
        weight = noise(3, output)
        gradient = transposed(weight)
        tangent = torch.func.vjp(transposed, weight)[1](direction)[0]

    point = (pair.params, jnp.asarray(offset.numpy()))
    directed = to_params(direction[0], pair.specs, pair.rename), jnp.asarray(direction[1].numpy())
    assert difference(jax.jit(lambda *args: jax.jvp(ours, *args)[1])(point, directed), tangent) <= tolerance

    def loss(params, offset):
        return jnp.sum(ours(params, offset) * weight.numpy())

    slopes, slope_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(*point)
    for name, slope in to_params(gradient[0], pair.specs, pair.rename).items():
        scale = max(np.max(np.abs(slope)), 1e-3)
        assert np.max(np.abs(slopes[name] - slope)) <= tolerance * scale, name
    if real:
        assert difference(slope_x, gradient[1]) <= tolerance
