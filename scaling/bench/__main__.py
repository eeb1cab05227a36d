r"""``python -m scaling.bench``: speed and memory of the bridge on the UNet of Stable Diffusion 1.4 with random weights.

Each row has a rival in the same run, in turn with ours; the ratio is rival / ours, so more is better. PyTorch is the
rival where it is installed, eager, in float32, on as many threads as this process may use.

=================== ============================================== ================================================
row                 ours                                           rival
=================== ============================================== ================================================
``load``            :func:`scaling.load_model` of the folder       one read of its file and one transpose a tensor
``compile``         tracing and compiling the forward pass         none
``attention_memory`` attention of 4096 tokens, 8 heads             the same with the whole matrix in memory
``sd14_forward``    the forward pass, batch 1, 64x64 latents       diffusers' in PyTorch
``sd14_extract``    one pass up to ``DETECTOR_TAP``                diffusers' full pass with a hook there
``train_step``      one step of training a small UNet               diffusers' with torch.optim.Adam
``jacobian_900``    a whole Jacobian, 900x900, of 20 convolutions  ``torch.func.jacrev`` in chunks
``jacobian_unet``   the same of the zoo's UNet of digits, 64x64    the same of diffusers'
=================== ============================================== ================================================

The notes of a row hold what else was measured: peaks of memory, each in a process of its own, and bytes of temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, logging
from absl.flags import argparse_flags

from scaling.backend import limit_blas_threads
from scaling.bench import jacobian as bench_jacobian
from scaling.bench import training as bench_training
from scaling.bench import unet as bench_unet
from scaling.bench.unet import QUICK, SD14, check_room, has_torch
from scaling.bridge import load_model, save_pretrained
from scaling.bridge.weights import read_header
from scaling.models.model import Model, initialize, parse_config
from sims.bench.timing import Row, apart, compare, peak_memory, row, seconds, table, write_json

__all__ = ["DETECTOR_TAP", "ROWS", "SD14", "check_room", "main"]

DETECTOR_TAP = "up_blocks.0.resnets.2.nonlinearity"
COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the rows share: the model's folder, and both libraries' copies of it, loaded when first needed."""

    folder: pathlib.Path
    config: dict[str, Any]
    repeats: int

    @functools.cached_property
    def model(self) -> Model:
        """Ours."""
        return load_model(self.folder)

    @functools.cached_property
    def module(self) -> Any:
        """PyTorch's; None if it is not installed."""
        return _torch_module(self.folder) if has_torch() else None

    def inputs(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, timestep and prompt: others for every seed."""
        return _inputs(self.config, seed)


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input or too small a machine."""
    logging.set_verbosity(logging.WARNING)
    limit_blas_threads()
    app.run(_run, flags_parser=_parse)


def load(bench: Bench) -> Row:
    """Loading the folder, with its file in the page cache."""
    path = bench.folder / "diffusion_pytorch_model.safetensors"
    notes = {"file_bytes": path.stat().st_size, "rival": "one read, one transpose a tensor"}
    if has_torch():
        notes["diffusers_s"] = min(seconds(lambda: _torch_module(bench.folder)) for _ in range(2))
    return compare(
        "load", lambda: load_model(bench.folder).params, lambda: _read_and_transpose(path), bench.repeats, notes=notes
    )


def compilation(bench: Bench) -> Row:
    """From the Python function to the program, with no cache."""
    times = [apart(_compile_seconds, bench.config) for _ in range(bench.repeats)]
    trace_s, compile_s = (float(np.median(part)) for part in zip(*times, strict=True))
    return row("compile", [sum(each) for each in times], None, notes={"trace_s": trace_s, "compile_s": compile_s})


def forward(bench: Bench) -> Row:
    """The forward pass, each time on other inputs; the peak of loading, compiling and one pass."""
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
    """Up to the detector's layer, which is all that is computed, beside the full pass that a hook needs."""
    model, module = bench.model, bench.module
    inputs = bench.inputs(0)

    @jax.jit
    def ours(params: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
        return model.apply(params, *inputs, capture=(DETECTOR_TAP,))[1][DETECTOR_TAP]

    def theirs() -> Any:
        seen = []
        hook = module.get_submodule(DETECTOR_TAP).register_forward_hook(lambda _module, _args, out: seen.append(out))
        _torch_pass(module, *inputs)
        hook.remove()
        return seen[-1]

    notes: dict[str, Any] = {"tap": DETECTOR_TAP}
    if module is not None:
        expected = theirs().numpy()
        found = ours(model.params, *map(jnp.asarray, inputs))
        notes |= {"rival": "diffusers", "difference": _difference(found, expected)}
    return compare(
        "sd14_extract",
        lambda: ours(model.params, *map(jnp.asarray, inputs)),
        None if module is None else theirs,
        bench.repeats,
        notes=notes,
    )


def train_step(bench: Bench) -> Row:
    """A small UNet of its own, see :mod:`scaling.bench.training`."""
    return bench_training.training_step(_torch_steps, bench.repeats, bench.config is QUICK)


def jacobian(bench: Bench) -> Row:
    """A denoiser of 900 pixels of its own, see :mod:`scaling.bench.jacobian`."""
    return bench_jacobian.jacobian_900(_torch_twin, bench.repeats, bench.config is QUICK)


def jacobian_of_unet(bench: Bench) -> Row:
    """A network of the zoo, see :mod:`scaling.bench.jacobian`."""
    return bench_jacobian.jacobian_unet(_torch_unet, bench.repeats, bench.config is QUICK)


ROWS: dict[str, Callable[[Bench], Row]] = {
    "load": load,
    "compile": compilation,
    "attention_memory": lambda bench: bench_unet.attention_memory(bench.repeats),
    "sd14_forward": forward,
    "sd14_extract": extract,
    "train_step": train_step,
    "jacobian_900": jacobian,
    "jacobian_unet": jacobian_of_unet,
}
"""The comparisons by name, in the order in which they run."""

SMALL = {"train_step", "jacobian_900", "jacobian_unet"}
"""Those of small networks of their own."""
WITHOUT_WEIGHTS = {"compile", "attention_memory"} | SMALL
"""Those that need no folder of the UNet."""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(prog="python -m scaling.bench", description=main.__doc__, allow_abbrev=False)
    parser.description = "Speed and memory of the bridge on the UNet of Stable Diffusion 1.4, beside PyTorch's."
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs >= 1 (5)")
    parser.add_argument("--quick", action="store_true", help="a network ten times narrower, to try the command")
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> int:
    try:
        rows = _measured(args)
        if args.json:
            write_json(args.json, rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(args: argparse.Namespace) -> list[Row]:
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}.")
    config, rows = QUICK if args.quick else SD14, []
    if set(args.only) - SMALL:
        check_room(config)
    with tempfile.TemporaryDirectory() as folder:
        if set(args.only) - WITHOUT_WEIGHTS:
            apart(_write, pathlib.Path(folder), config)
        bench = Bench(pathlib.Path(folder), config, args.repeats)
        for name in [name for name in ROWS if name in args.only]:
            found = ROWS[name](bench)
            rows.append(found._replace(notes={**found.notes, "quick": True}) if args.quick else found)
            print(f"{name} done", file=sys.stderr)
    threads = f"{_threads()} threads, load average {os.getloadavg()[0]:.1f}"
    print(f"{table(rows)}\n\n{threads}, PyTorch {'beside it' if has_torch() else 'not installed'}")
    return rows


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(folder: pathlib.Path, config: dict[str, Any]) -> None:
    save_pretrained(initialize(jax.random.key(0), config), folder)


def _inputs(config: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (x, _), more = parse_config(config).inputs(np.float32)
    random = np.random.default_rng(seed)
    image, context = (random.standard_normal(shape, np.float32) for shape in (x.shape, more["context"].shape))
    return image, np.asarray(random.integers(1000), np.float32), context


def _count_compilations() -> list[str]:
    """A list that grows with every program compiled from now on."""
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
    jax.block_until_ready(model.apply(model.params, *map(jnp.asarray, _inputs(config, 0))))
    return peak_memory()


def _torch_peak(folder: pathlib.Path, config: dict[str, Any]) -> int:
    _torch_pass(_torch_module(folder), *_inputs(config, 0))
    return peak_memory()


def _read_and_transpose(path: pathlib.Path) -> list[np.ndarray]:
    orders = {4: (2, 3, 1, 0), 2: (1, 0)}
    kept = []
    with path.open("rb") as file:
        for tensor in sorted(read_header(path).values(), key=lambda tensor: tensor.start):
            file.seek(tensor.start)
            values = np.fromfile(file, np.float32, (tensor.stop - tensor.start) // 4).reshape(tensor.shape)
            kept.append(np.ascontiguousarray(values.transpose(orders.get(values.ndim))))
    return kept


def _torch_module(folder: pathlib.Path) -> Any:
    import diffusers
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(_threads())
    return getattr(diffusers, SD14["_class_name"]).from_pretrained(folder).eval()


def _torch_pass(module: Any, x: np.ndarray, t: np.ndarray, context: np.ndarray) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return module(torch.from_numpy(x), torch.tensor(float(t)), torch.from_numpy(context)).sample


def _torch_steps(folder: pathlib.Path, images: np.ndarray, steps: int) -> bench_training.Twin | None:
    """Steps of :mod:`scaling.bench.training` in PyTorch."""
    if not has_torch():
        return None
    import diffusers
    import torch  # pyright: ignore[reportMissingImports]

    recipe, scheduling = bench_training.RECIPE, bench_training.SCHEDULER
    network, noising = (getattr(diffusers, config["_class_name"]) for config in (bench_training.NETWORK, scheduling))
    module = network.from_pretrained(folder, low_cpu_mem_usage=False).train()
    scheduler, data = noising.from_config(scheduling), torch.from_numpy(images.copy())
    params = list(module.parameters())
    average = [param.detach().clone() for param in params]
    optimizer = torch.optim.Adam(params, lr=recipe.learning_rate)

    def loss(images: Any, times: Any, noise: Any) -> Any:
        out = module(scheduler.add_noise(images, noise, times), times).sample
        return torch.nn.functional.mse_loss(out, noise)

    def run() -> float:
        value = torch.tensor(0.0)
        for _ in range(steps):
            rows = torch.randint(len(data), (recipe.batch_size,))
            times = torch.randint(scheduling["num_train_timesteps"], (recipe.batch_size,))
            batch = data[rows]
            value = loss(batch, times, torch.randn_like(batch))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - recipe.ema)
        return float(value.detach())

    def of_arrays(images: np.ndarray, times: np.ndarray, noise: np.ndarray) -> float:
        with torch.no_grad():
            tensors = [torch.from_numpy(np.array(part)) for part in (images, times.astype(np.int64), noise)]
            return float(loss(*tensors))

    return bench_training.Twin(run, of_arrays)


def _torch_twin(kernels: Sequence[np.ndarray], y: np.ndarray) -> bench_jacobian.Twin | None:
    """:func:`scaling.bench.jacobian.denoise` in PyTorch, and its Jacobian."""
    if not has_torch():
        return None
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(_threads())
    weights = [torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))) for kernel in kernels]
    point, side = torch.from_numpy(y), math.isqrt(y.size)

    def denoise(y: Any) -> Any:
        x = y.reshape(1, 1, side, side)
        for kernel in weights[:-1]:
            x = torch.relu(torch.nn.functional.conv2d(x, kernel, padding=1))
        return y - torch.nn.functional.conv2d(x, weights[-1], padding=1).reshape(-1)

    return _torch_derivatives(denoise, point, weights[1], side)


def _torch_unet(folder: str, y: np.ndarray, timestep: float, sigma: float) -> bench_jacobian.Twin | None:
    """A network of the zoo as :func:`scaling.as_denoiser` makes it a denoiser, in PyTorch, and its Jacobian."""
    if not has_torch():
        return None
    import diffusers
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(_threads())
    model = getattr(diffusers, bench_training.NETWORK["_class_name"])
    module = model.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    alpha = (1 + sigma**2) ** -0.5

    def denoise(y: Any) -> Any:
        return y - sigma * module(alpha * y.reshape(1, *shape), torch.tensor(timestep)).sample.reshape(-1)

    shape = y.shape
    kernel = module.get_submodule(bench_jacobian.CONVOLUTION).weight
    return _torch_derivatives(denoise, torch.from_numpy(y.reshape(-1)), kernel, shape[-1])


def _torch_derivatives(denoise: Callable[[Any], Any], point: Any, kernel: Any, side: int) -> bench_jacobian.Twin:
    import torch  # pyright: ignore[reportMissingImports]

    def row_by_row() -> Any:
        leaf = point.clone().requires_grad_()
        out = denoise(leaf)
        return torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in out])

    def convolve(batch: int) -> Any:
        with torch.no_grad():
            return torch.nn.functional.conv2d(torch.ones(batch, kernel.shape[1], side, side), kernel, padding=1)

    return bench_jacobian.Twin(
        lambda chunk: torch.func.jacrev(denoise, chunk_size=chunk)(point).numpy(), row_by_row, convolve
    )


if __name__ == "__main__":
    main()
