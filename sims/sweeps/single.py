"""One network, trained with checkpoints: its weights, and its measures during training.

``OUT/state.safetensors`` is the complete training state at the last recorded step, from which a killed run resumes with
bitwise equal results; ``OUT/weights.safetensors`` has W₁ (``w1``) and W₂ (``w2``) after the last step,
``OUT/course.json`` the measures at every recorded step, and ``OUT/spec.json`` the spec.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Int

from dae_theory import ReluDae
from sims import store
from sims.store.files import own_folder, replace_file, write_text
from sims.store.provenance import environment
from sims.sweeps.engine import resolve_measures
from sims.sweeps.measures import CellData, Measure
from sims.sweeps.programs import segments_of, single_unit, unit_program
from sims.sweeps.spec import Spec
from sims.sweeps.train import TrainState, advance, start
from sims.sweeps.worlds import facts, make_world

__all__ = ["load_dae", "run", "save_dae"]

Row = dict[str, Any]


def run(
    spec: Spec,
    measures: Sequence[str | Measure] | None,
    out: str | pathlib.Path,
    *,
    on_record: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Train the one network that ``spec`` describes and write these four files; returns the rows of ``course.json``.

    The same call resumes an interrupted run and returns at once if it is finished. ``on_record(step, steps)`` is
    called after each record. ``ValueError`` if an axis has more than one value or ``out`` holds something else.
    """
    out = pathlib.Path(out)
    unit, numbers = single_unit(spec)
    chosen = resolve_measures(measures)
    world = make_world(spec)
    program, key, data = unit_program(spec, unit, world)
    init_key, step_key = jax.random.split(key)
    recipe, (penalty, learning_rate, init_scale, sigma) = program.recipe, numbers
    cell = program.evaluation._replace(sigma=sigma, penalty=penalty)

    @functools.partial(jax.jit, donate_argnums=0)
    def go(state: TrainState, data: CellData, num_steps: Int[Array, ""]) -> tuple[TrainState, tuple[Array, ...]]:
        rates = {"sigma": sigma, "penalty": penalty, "learning_rate": learning_rate}
        state = advance(state, step_key, data.train, num_steps, recipe, **rates)
        return state, tuple(jnp.asarray(measure(state.dae, data, cell)) for measure in chosen.values())

    with store.locked(out):
        _claim(out, {"single": {**spec.to_dict(), "measures": list(chosen)}}, [facts(world, spec)])
        state = start(
            init_key,
            data.train.shape[1],
            recipe,
            learning_rate=learning_rate,
            init_scale=init_scale,
            dtype=data.train.dtype,
        )
        state, course = _restore(out / "state.safetensors", state)
        for num_steps in segments_of(spec)[len(course) :]:
            state, values = go(state, data, jnp.asarray(num_steps))
            row = {"step": int(state.step), **{n: np.asarray(v).tolist() for n, v in zip(chosen, values, strict=True)}}
            course.append(row)
            _save_state(out / "state.safetensors", state, course)
            if on_record is not None:
                on_record(int(state.step), spec.steps)
        save_dae(out / "weights.safetensors", state.dae)
        write_text(out / "course.json", json.dumps(course, indent=1))
    return course


def save_dae(path: pathlib.Path, dae: ReluDae) -> None:
    """Write a network as safetensors with the tensors ``w1`` and ``w2``, each (d, p)."""
    tensors = {"w1": np.ascontiguousarray(dae.w1), "w2": np.ascontiguousarray(dae.w2)}
    replace_file(path, lambda partial: safetensors.numpy.save_file(tensors, partial))


def load_dae(path: str | pathlib.Path) -> ReluDae:
    """Read a network written by :func:`save_dae`; ``ValueError`` if the file is not one."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path} as safetensors ({error}); it should be a run's weights.") from error
    if set(tensors) != {"w1", "w2"} or tensors["w1"].ndim != 2 or tensors["w1"].shape != tensors["w2"].shape:
        shapes = {name: value.shape for name, value in tensors.items()}
        raise ValueError(f"{path} should hold w1 and w2 of one shape (d, p), but holds {shapes}.")
    return ReluDae(jnp.asarray(tensors["w1"]), jnp.asarray(tensors["w2"]))


def _claim(out: pathlib.Path, identity: dict[str, Any], facts: list[dict[str, Any]]) -> None:
    """Write the spec and the environment, or check that the folder holds the same spec."""
    path = out / "spec.json"
    if not own_folder(out, (path.name,)):
        write_text(path, json.dumps({**identity, "environment": environment(), "data": facts}, indent=1))
        return
    try:
        stored = json.loads(path.read_text()).get("single")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out or delete it.") from error
    requested = json.loads(json.dumps(identity["single"]))
    if stored is None:
        raise ValueError(f"{out} holds something other than a single run; choose another --out.")
    different = [
        f"{k} is {stored.get(k)!r} there, {requested.get(k)!r} here" for k in requested if stored.get(k) != requested[k]
    ]
    if different:
        raise ValueError(f"{out} holds another run: {'; '.join(different)}. Choose another --out.")


def _save_state(path: pathlib.Path, state: TrainState, course: list[Row]) -> None:
    tensors = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    metadata = {"course": json.dumps(course)}
    replace_file(path, lambda partial: safetensors.numpy.save_file(tensors, partial, metadata))


def _restore(path: pathlib.Path, state: TrainState) -> tuple[TrainState, list[Row]]:
    """The state and course at the last checkpoint, or ``state`` and no course if there is none."""
    if not path.exists():
        return state, []
    leaves, tree = jax.tree.flatten(state)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            stored = [file.get_tensor(str(i)) for i in range(len(leaves))]
            course = json.loads(file.metadata()["course"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to train from the start.") from error
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(stored, leaves, strict=True)):
        raise ValueError(f"{path} is the state of another network; delete it to train from the start.")
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in stored]), course
