"""A training run in a folder: killed anywhere it resumes bit for bit, and at the end it is a pipeline for diffusers.

The folder holds ``training.json`` (the spec, and the environments that computed it) and ``checkpoint.safetensors`` (the
whole state, replaced atomically). When training is complete it also holds the pipeline (``model_index.json``, ``unet``
or ``transformer``, ``scheduler``; for text ``text_encoder`` and ``tokenizer``), ``membership.json`` (rows of the data
set under ``duplicated``, ``train`` and ``held_out``) and ``prompts.json``. The same spec with more steps continues it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dae_theory.checks import check_integer
from dae_theory.types import PRNGKey
from scaling.bridge.export import save_pipeline
from scaling.bridge.loading import Pipeline
from scaling.diffusion.schedules import Schedule
from scaling.diffusion.schedules import from_config as read_schedule
from scaling.models.model import Model, initialize
from scaling.training import captions as captioning
from scaling.training import corpus as corpora
from scaling.training.architectures import network_config, scheduler_config, text_config
from scaling.training.captions import Captions
from scaling.training.checkpoints import digest, restore, save
from scaling.training.corpus import Corpus
from scaling.training.spec import Recipe, TrainSpec
from scaling.training.steps import Examples, Networks, TrainState, advance, initial_weights, start
from scaling.training.tokenization import copy_tokenizer, encode, fit_tokenizer
from sims import store
from sims.store import checksum
from sims.store.files import own_folder, read_json, write_text

__all__ = ["TrainSpec", "config_of", "read_corpus", "read_spec", "train"]

RECORD, CHECKPOINT = "training.json", "checkpoint.safetensors"
PATHS = ("dataset", "captions", "tokenizer")
"""Fields of the spec that are paths; the identity of a run has digests of what they hold instead."""

CHUNK = 20
"""Steps per compiled call, after which the losses are checked."""
CURVE = 100
"""Points of the recorded loss curve."""


class Prepared(NamedTuple):
    """What a run needs before its first step."""

    corpus: Corpus
    captions: Captions | None
    tokenizer: Any
    tokenizer_files: dict[str, str]
    schedule: Schedule
    models: dict[str, Model]
    examples: Examples


def train(
    spec: TrainSpec,
    out: str | Path,
    *,
    save_every: int = 500,
    devices: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_steps: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Train as ``spec`` says, or resume, in the folder ``out``; returns the folder.

    Args:
        spec: data, network and training.
        out: the folder, empty or with a run of the same spec.
        save_every: steps between checkpoints.
        devices: split a batch over at most this many devices, as many as divide it (default: all).
        provenance: recorded beside the environment.
        on_steps: called with ``(done, total, loss)``, the loss as text.

    ``ValueError`` for bad input, for a folder that holds something else, and when the loss is no longer finite; then
    the last good checkpoint remains.
    """
    out = Path(out)
    check_integer("save_every", save_every, minimum=1)
    with store.locked(out) as check:
        ours = own_folder(out, (RECORD,))
        ready = _prepare(spec)
        identity = _identity(spec, ready)
        earlier = read_json(out / RECORD) if ours else {"sessions": []}
        if ours:
            _check_same(out, earlier, identity)
        recipe, networks = spec.recipe(), _networks(ready)
        state = start(ready.models, recipe)
        losses = np.zeros(0, np.float32)
        if (out / CHECKPOINT).exists():
            state, losses = restore(out / CHECKPOINT, state, identity)
        if len(losses) > spec.steps:
            raise ValueError(f"{out} has {len(losses)} steps already, more than {spec.steps}: choose another folder.")
        sharding, whole = _shardings(recipe.batch_size, devices)
        session = [{**store.environment(), **(provenance or {})}] if len(losses) < spec.steps else []
        paths = {name: getattr(spec, name) for name in PATHS}
        # A continued run keeps the earlier loss curve and model until it has new ones.
        record = {**earlier, **identity, "paths": paths, "steps": spec.steps}
        record["sessions"] = [*earlier["sessions"], *session]
        repeats = int(np.sum(ready.corpus.first != np.arange(ready.corpus.size)))
        record |= {"repeats": repeats} if repeats else {}
        write_text(out / RECORD, json.dumps(record, indent=1))
        state, examples = jax.device_put((state, ready.examples), whole)
        key = jax.random.fold_in(jax.random.key(spec.seed), 1)
        while len(losses) < spec.steps:
            if on_steps is not None:
                on_steps(len(losses), spec.steps, f"loss {np.mean(losses[-CHUNK:]):.4f}" if len(losses) else "")
            stop = min(len(losses) + CHUNK, spec.steps, (len(losses) // save_every + 1) * save_every)
            state, new = _advanced(state, key, examples, stop - len(losses), networks, recipe, sharding)
            losses = np.concatenate([losses, new.astype(np.float32)])
            due = len(losses) == spec.steps or len(losses) % save_every == 0
            _check_finite(out, losses, state if due else None)
            if due:
                check()
                save(out / CHECKPOINT, state, losses, identity)
        check()
        _write_results(out, spec, ready, state.ema if recipe.ema else state.params)
        record |= {"trained": spec.steps, "loss": _curve(losses)}
        write_text(out / RECORD, json.dumps(record, indent=1))
        if on_steps is not None:
            on_steps(spec.steps, spec.steps, f"loss {np.mean(losses[-CHUNK:]):.4f}")
    return out


def read_spec(folder: str | Path) -> TrainSpec:
    """The spec of a run; ``ValueError`` if the folder holds none."""
    record = read_json(Path(folder) / RECORD)
    known = {field.name for field in dataclasses.fields(TrainSpec)}
    given: dict[str, Any] = {**record.get("spec", {}), **record.get("paths", {}), "steps": record.get("steps")}
    if given.keys() != known:
        differing = ", ".join(sorted(given.keys() ^ known))
        raise ValueError(f"{folder}: {RECORD} was written by another version: the fields {differing} differ.")
    return TrainSpec(**{**given, "channels": tuple(given["channels"])})


def read_corpus(spec: TrainSpec) -> Corpus:
    """The images that the spec trains on, and those that it holds out."""
    return corpora.load(
        spec.dataset,
        num_samples=spec.num_samples,
        duplicates=spec.duplicates,
        singles=spec.singles,
        variants=spec.variants,
        held_out=spec.held_out,
        offset=spec.offset,
        seed=spec.split_seed,
        resolution=spec.resolution,
        gray=spec.gray,
        skip_bad=spec.skip_bad,
    )


def config_of(spec: TrainSpec, corpus: Corpus) -> dict[str, Any]:
    """The config.json of the network that ``spec`` trains; ``ValueError`` if the images do not fit it."""
    return network_config(
        spec.arch,
        corpus.images.shape[1:],
        channels=spec.channels,
        layers=spec.layers,
        heads=spec.heads,
        patch_size=spec.patch_size,
        context=spec.text_channels,
        num_classes=int(max(corpus.labels.max(), 0)) + 1,
    )


def _prepare(spec: TrainSpec) -> Prepared:
    corpus = read_corpus(spec)
    text, captions, tokenizer, condition, null = spec.arch == "unet2d_condition", None, None, None, None
    files: dict[str, str] = {}
    schedule = read_schedule(
        scheduler_config(
            prediction=spec.prediction, timesteps=spec.timesteps, beta_schedule=spec.beta_schedule, text=text
        )
    )
    config = config_of(spec, corpus)
    key = jax.random.fold_in(jax.random.key(spec.seed), 0)
    models = {"network": _initial(jax.random.fold_in(key, 0), json.dumps(config))}
    if text:
        if spec.captions == "labels":
            captions = captioning.from_labels(corpus)
        else:
            captions = captioning.from_file(corpus, spec.captions)
        texts = (*captions.prompts, "")
        # Not in the run's folder, which may turn out to hold another run.
        with tempfile.TemporaryDirectory() as temporary:
            fit = functools.partial(copy_tokenizer, spec.tokenizer) if spec.tokenizer else fit_tokenizer
            tokenizer = fit(texts, temporary)
            files = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(temporary).iterdir())}
        *ids, empty = encode(tokenizer, texts)
        condition, null = jnp.asarray(np.stack(ids)[captions.of]), jnp.asarray(empty)
        config = text_config(
            len(tokenizer),
            tokenizer.model_max_length,
            tokenizer.eos_token_id,
            channels=spec.text_channels,
            layers=spec.text_layers,
        )
        models["text_encoder"] = _initial(jax.random.fold_in(key, 1), json.dumps(config))
    elif spec.arch == "dit":
        condition = jnp.asarray(np.maximum(corpus.labels, 0).astype(np.int32))
        null = jnp.asarray(np.int32(config["num_embeds_ada_norm"]))
    rows = jnp.asarray(corpora.training_rows(corpus))
    examples = Examples(jnp.asarray(corpus.images), rows, condition, null)
    return Prepared(corpus, captions, tokenizer, files, schedule, models, examples)


@functools.partial(jax.jit, static_argnames="config")
def _initial(key: PRNGKey, config: str) -> Model:
    """Initial weights of the network of a config.json; as text it is hashable, and a series compiles this once."""
    return initial_weights(initialize(key, json.loads(config)))


def _networks(ready: Prepared) -> Networks:
    text = ready.models.get("text_encoder")
    return Networks(ready.models["network"].apply, None if text is None else text.apply, ready.schedule)


def _identity(spec: TrainSpec, ready: Prepared) -> dict[str, Any]:
    """The spec without its steps, with digests in place of paths."""
    fields = {name: value for name, value in dataclasses.asdict(spec).items() if name not in ("steps", *PATHS)}
    data = {"images": checksum(ready.corpus.images), "held_out": checksum(ready.corpus.held_out)}
    if ready.captions is not None:
        data["prompts"] = digest([ready.captions.prompts, np.asarray(ready.examples.condition).tolist()])
    # Whole configurations: a default that changed between versions makes another network.
    configs = {name: json.loads(model.source) for name, model in ready.models.items()}
    configs["scheduler"] = ready.schedule.config
    return json.loads(json.dumps({"format": 1, "spec": fields, "data": data, "config": configs}))


def _check_same(out: Path, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    parts = [(part, record.get(part) or {}, identity[part]) for part in ("spec", "data", "config")]
    differences = [
        f"{part} {name} is {json.dumps(stored.get(name))} there and {json.dumps(given.get(name))} here"
        for part, stored, given in parts
        for name in sorted(stored.keys() | given.keys())
        if stored.get(name) != given.get(name)
    ]
    if differences:
        raise ValueError(f"{out} holds another training run: {'; '.join(differences)}. Choose another folder.")


def _shardings(batch_size: int, devices: int | None) -> tuple[jax.sharding.NamedSharding | None, Any]:
    """Shardings of the batch and of the state, which every device holds whole; the former is None on one device."""
    available = jax.devices()
    most = len(available) if devices is None else check_integer("devices", devices, minimum=1, maximum=len(available))
    count = max(n for n in range(1, most + 1) if batch_size % n == 0)
    if count == 1:
        return None, available[0]
    mesh = jax.sharding.Mesh(np.asarray(available[:count]), ("batch",))
    split, whole = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()
    return jax.sharding.NamedSharding(mesh, split), jax.sharding.NamedSharding(mesh, whole)


_steps = jax.jit(advance, static_argnames=("networks", "recipe", "max_steps", "sharding"), donate_argnames=("state",))


def _advanced(
    state: TrainState,
    key: PRNGKey,
    examples: Examples,
    num_steps: int,
    networks: Networks,
    recipe: Recipe,
    sharding: jax.sharding.NamedSharding | None,
) -> tuple[TrainState, np.ndarray]:
    """The state ``num_steps`` later, and the loss before each step."""
    state, losses = _steps(
        state, key, examples, num_steps, networks=networks, recipe=recipe, max_steps=CHUNK, sharding=sharding
    )
    return state, np.asarray(losses)[:num_steps]


def _check_finite(out: Path, losses: np.ndarray, state: TrainState | None) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if not len(bad) and (state is None or _all_finite(state)):
        return
    step = int(bad[0]) if len(bad) else len(losses)
    saved = out / CHECKPOINT
    where = f"the last good state is in {saved}" if saved.exists() else "there is no checkpoint yet"
    raise ValueError(
        f"training diverged: after {step} steps the loss is no longer finite; {where}. Start again in another folder "
        "with a lower --learning-rate, a --warmup, or --clip 1."
    )


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.ema))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _write_results(out: Path, spec: TrainSpec, ready: Prepared, params: Mapping[str, Mapping[str, jax.Array]]) -> None:
    trained = {name: dataclasses.replace(model, params=dict(params[name])) for name, model in ready.models.items()}
    encoders = (trained["text_encoder"],) if "text_encoder" in trained else ()
    tokenizers = (ready.tokenizer,) if encoders else ()
    members: dict[str, Any] = dict(corpora.membership(ready.corpus))
    if ready.corpus.files:
        members["files"] = ready.corpus.files
    write_text(out / "membership.json", json.dumps(members))
    if ready.captions is not None:
        write_text(out / "prompts.json", json.dumps(captioning.records(ready.captions, ready.corpus), indent=1))
    for name, text in ready.tokenizer_files.items():
        write_text(out / "tokenizer" / name, text)
    save_pipeline(Pipeline(trained["network"], ready.schedule, None, encoders, tokenizers, {}), out)


def _curve(losses: np.ndarray) -> list[tuple[int, float]]:
    """Mean losses over intervals of equal length, each with its last step."""
    length = math.ceil(len(losses) / CURVE)
    ends = range(length, len(losses) + length, length)
    return [(min(end, len(losses)), float(np.mean(losses[end - length : end]))) for end in ends]
