"""Rows of Stable Diffusion 1.4's UNet: loading, compiling, its attention, the forward pass, and reading one layer."""

from __future__ import annotations

import functools
import itertools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.bench.setting import Bench, has_torch, random_inputs, torch_module
from scaling.bridge.export import save_pretrained
from scaling.bridge.loading import load_model
from scaling.bridge.weights import read_header
from scaling.models.layers import QUERY_CHUNK, attention
from scaling.models.model import initialize, parse_config
from sims.bench.timing import Row, apart, compare, peak_memory, row, seconds, temporaries

__all__ = ["DETECTOR_TAP", "attention_memory", "compilation", "extract", "forward", "hooked", "load", "write_network"]

DETECTOR_TAP = "up_blocks.0.resnets.2.nonlinearity"
COMPILATION = "/jax/core/compile/backend_compile_duration"
TOKENS, HEADS, HEAD_CHANNELS = 4096, 8, 40


def write_network(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Save a network of ``config`` with random weights."""
    save_pretrained(initialize(jax.random.key(0), config), folder)


def load(bench: Bench) -> Row:
    """The row ``load``: loading the folder, with its file in the page cache."""
    path = bench.folder / "diffusion_pytorch_model.safetensors"
    notes = {"file_bytes": path.stat().st_size, "rival": "one read, one transpose a tensor"}
    if has_torch():
        notes["diffusers_s"] = min(seconds(lambda: torch_module(bench.folder)) for _ in range(2))
    return compare(
        "load", lambda: load_model(bench.folder).params, lambda: _read_and_transpose(path), bench.repeats, notes=notes
    )


def compilation(bench: Bench) -> Row:
    """The row ``compile``: from the Python function to the program, without a cache."""
    times = [apart(_compile_seconds, bench.config) for _ in range(bench.repeats)]
    trace_s, compile_s = (float(np.median(part)) for part in zip(*times, strict=True))
    return row("compile", [sum(each) for each in times], None, notes={"trace_s": trace_s, "compile_s": compile_s})


def forward(bench: Bench) -> Row:
    """The row ``sd14_forward``: the forward pass on new inputs; also peaks of loading, compiling and one pass."""
    model, module = bench.model, bench.module
    weights = sum(param.nbytes for param in model.params.values())
    notes = {"weight_bytes": weights, "peak_bytes": apart(_peak, bench.folder, bench.config)}
    notes["peak_per_weight"] = notes["peak_bytes"] / weights

    def ours(seed: int = 0) -> jax.Array:
        return model.apply(model.params, *map(jnp.asarray, bench.inputs(seed)))[0]

    if module is not None:
        notes |= {"rival": "diffusers", "rival_peak_bytes": apart(_torch_peak, bench.folder, bench.config)}
        notes["difference"] = _difference(ours(), _torch_pass(module, *bench.inputs(0)).numpy())
    jax.block_until_ready(ours())
    compiled, seeds = _count_compilations(), itertools.count(1)
    rival = None if module is None else lambda: _torch_pass(module, *bench.inputs(0))
    measured = compare("sd14_forward", lambda: ours(next(seeds)), rival, bench.repeats, notes=notes)
    return measured._replace(notes={**notes, "recompilations": len(compiled)})


def extract(bench: Bench) -> Row:
    """The row ``sd14_extract``: a pass that ends at the detector's layer, beside the full pass that a hook needs."""
    model, module = bench.model, bench.module
    inputs = bench.inputs(0)

    @jax.jit
    def ours(params: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
        return model.apply(params, *inputs, capture=(DETECTOR_TAP,))[1][DETECTOR_TAP]

    def theirs() -> Any:
        return hooked(module, DETECTOR_TAP, *inputs)

    notes: dict[str, Any] = {"tap": DETECTOR_TAP}
    if module is not None:
        activation = ours(model.params, *map(jnp.asarray, inputs))
        notes |= {"rival": "diffusers", "difference": _difference(activation, theirs().numpy())}
    return compare(
        "sd14_extract",
        lambda: ours(model.params, *map(jnp.asarray, inputs)),
        None if module is None else theirs,
        bench.repeats,
        notes=notes,
    )


def hooked(module: Any, tap: str, *inputs: np.ndarray) -> Any:
    """The last output of a layer of the PyTorch module, from a full pass with a hook."""
    outputs = []
    hook = module.get_submodule(tap).register_forward_hook(lambda _module, _args, out: outputs.append(out))
    _torch_pass(module, *inputs)
    hook.remove()
    return outputs[-1]


def attention_memory(bench: Bench) -> Row:
    """The row ``attention_memory``: time and temporaries of attention in chunks and with the whole matrix."""
    channels = HEADS * HEAD_CHANNELS
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, TOKENS, channels), np.float32)

    @jax.jit
    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        split = [x.reshape(1, TOKENS, HEADS, HEAD_CHANNELS) for x in (q, k, v)]
        return jax.nn.dot_product_attention(*split).reshape(q.shape)

    ours, rival = (
        jax.jit(function).lower(q, k, v).compile() for function in (functools.partial(attention, heads=HEADS), whole)
    )
    notes = {
        "temporary_bytes": temporaries(ours),
        "rival_temporary_bytes": temporaries(rival),
        "chunk_bytes": QUERY_CHUNK * TOKENS * 4,
        "operand_bytes": TOKENS * channels * 4,
        "matrix_bytes": HEADS * TOKENS**2 * 4,
        "rival": "jax.nn.dot_product_attention",
    }
    return compare("attention_memory", lambda: ours(q, k, v), lambda: rival(q, k, v), bench.repeats, notes=notes)


def _count_compilations() -> list[str]:
    """A list that grows by one with every program that is compiled from now on."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == COMPILATION:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def _difference(ours: Any, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def _compile_seconds(config: dict[str, Any]) -> tuple[float, float]:
    jax.config.update("jax_enable_compilation_cache", False)
    apply = parse_config(config)
    params = apply.parameter_shapes(np.float32)
    inputs, more = apply.inputs(np.float32)
    start = time.perf_counter()
    lowered = jax.jit(apply).lower(params, *inputs, **more)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def _peak(folder: pathlib.Path, config: dict[str, Any]) -> int:
    model = load_model(folder)
    jax.block_until_ready(model.apply(model.params, *map(jnp.asarray, random_inputs(config, 0))))
    return peak_memory()


def _torch_peak(folder: pathlib.Path, config: dict[str, Any]) -> int:
    _torch_pass(torch_module(folder), *random_inputs(config, 0))
    return peak_memory()


def _read_and_transpose(path: pathlib.Path) -> list[np.ndarray]:
    orders = {4: (2, 3, 1, 0), 2: (1, 0)}
    arrays = []
    with path.open("rb") as file:
        for tensor in sorted(read_header(path).values(), key=lambda tensor: tensor.start):
            file.seek(tensor.start)
            values = np.fromfile(file, np.float32, (tensor.stop - tensor.start) // 4).reshape(tensor.shape)
            arrays.append(np.ascontiguousarray(values.transpose(orders.get(values.ndim))))
    return arrays


def _torch_pass(module: Any, x: np.ndarray, t: np.ndarray, context: np.ndarray) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return module(torch.from_numpy(x), torch.tensor(float(t)), torch.from_numpy(context)).sample
