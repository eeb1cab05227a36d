"""One network, trained with checkpoints: its weights, and its measures during training.

``OUT/state.safetensors`` is the complete training state at the last recorded step, from which a killed run resumes with
bitwise equal results; ``OUT/weights.safetensors`` has W₁ (``w1``) and W₂ (``w2``) after the last step, and b₁ and b₂ if
there are any; ``OUT/course.json`` the measures at every recorded step, and ``OUT/spec.json`` the spec.
"""

from __future__ import annotations

import functools
import hashlib
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

from dae_theory import AffineDae, ReluDae
from dae_theory.model import Dae
from sims import store
from sims.store.files import own_folder, read_json, replace_file, write_text
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

    with store.locked(out) as check:
        _claim(out, {"single": {**spec.to_dict(), "measures": list(chosen)}}, [facts(world, spec)])
        state = start(
            init_key,
            data.train.shape[1],
            recipe,
            learning_rate=learning_rate,
            init_scale=init_scale,
            dtype=data.train.dtype,
        )
        belongs = _sha256(json.dumps([spec.to_dict(), list(chosen)]))
        state, course = _restore(out / "state.safetensors", state, belongs)
        for num_steps in segments_of(spec)[len(course) :]:
            state, values = go(state, data, jnp.asarray(num_steps))
            row = {"step": int(state.step), **{n: np.asarray(v).tolist() for n, v in zip(chosen, values, strict=True)}}
            course.append(row)
            check()
            _save_state(out / "state.safetensors", state, course, belongs)
            if on_record is not None:
                on_record(int(state.step), spec.steps)
        check()
        save_dae(out / "weights.safetensors", state.dae)
        write_text(out / "course.json", json.dumps(course, indent=1))
    return course


def save_dae(path: pathlib.Path, dae: Dae) -> None:
    """Write a network as safetensors, with the tensors ``w1`` and ``w2``, each (d, p), and ``b1`` and ``b2`` if any."""
    tensors = {name: np.ascontiguousarray(part) for name, part in dae._asdict().items()}
    replace_file(path, lambda partial: safetensors.numpy.save_file(tensors, partial))


def load_dae(path: str | pathlib.Path) -> Dae:
    """Read a network written by :func:`save_dae`; ``ValueError`` if the file is not one."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path} as safetensors ({error}); it should be a run's weights.") from error
    shapes = {name: value.shape for name, value in tensors.items()}
    shape = shapes.get("w1", ())
    expected = {"w1": shape, "w2": shape}
    kind = AffineDae if "b1" in shapes else ReluDae
    if kind is AffineDae:
        expected |= {"b1": shape[1:], "b2": shape[:1]}
    if shapes != expected or len(shape) != 2:
        raise ValueError(f"{path} should hold w1 and w2 of one shape (d, p), and may hold biases; it holds {shapes}.")
    return kind(**{name: jnp.asarray(part) for name, part in tensors.items()})


def _claim(out: pathlib.Path, identity: dict[str, Any], facts: list[dict[str, Any]]) -> None:
    """Write the spec and the environment, or check that the folder holds the same spec."""
    path = out / "spec.json"
    if not own_folder(out, (path.name,)):
        write_text(path, json.dumps({**identity, "environment": environment(), "data": facts}, indent=1))
        return
    try:
        stored = read_json(path).get("single")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out.") from error
    requested = json.loads(json.dumps(identity["single"]))
    if not isinstance(stored, dict):
        raise ValueError(f"{out} holds something other than a single run; choose another --out.")
    different = [
        f"{k} is {stored.get(k)!r} there, {requested.get(k)!r} here" for k in requested if stored.get(k) != requested[k]
    ]
    if different:
        raise ValueError(f"{out} holds another run: {'; '.join(different)}. Choose another --out.")


def _save_state(path: pathlib.Path, state: TrainState, course: list[Row], belongs: str) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    record = {"rows": course, "belongs": belongs, "checksum": _digest(leaves, course)}
    # One entry: safetensors writes several in no fixed order.
    metadata = {"course": json.dumps(record)}
    tensors = {str(i): leaf for i, leaf in enumerate(leaves)}
    replace_file(path, lambda partial: safetensors.numpy.save_file(tensors, partial, metadata))


def _restore(path: pathlib.Path, state: TrainState, belongs: str) -> tuple[TrainState, list[Row]]:
    """The state and course at the last checkpoint, or ``state`` and no course if there is none.

    ``ValueError`` if the file is damaged or of another run. Checkpoints of earlier versions have no checksum.
    """
    if not path.exists():
        return state, []
    leaves, tree = jax.tree.flatten(state)
    again = "move it away to train from the start"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            stored = [file.get_tensor(str(i)) for i in range(len(leaves))]
            record = json.loads(file.metadata()["course"])
        if isinstance(record, list):
            record = {"rows": record, "belongs": belongs, "checksum": _digest(stored, record)}
        course = record["rows"]
        if record["checksum"] != _digest(stored, course):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}.") from error
    alike = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(stored, leaves, strict=True))
    if not alike or record["belongs"] != belongs:
        raise ValueError(f"{path} is the state of another run; {again}.")
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in stored]), course


def _digest(leaves: list[np.ndarray], course: list[Row]) -> str:
    return _sha256(" ".join([*map(store.checksum, leaves), json.dumps(course)]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
