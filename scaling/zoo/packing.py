"""A trained run as a small folder to distribute: weights in float16 if the outputs allow, and a model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.bridge.export import save_pipeline
from scaling.bridge.loading import Pipeline, load_pipeline
from scaling.measures.copies import copy_share
from scaling.study.examination import draw_samples, sample_conditions, sampled_prompts
from scaling.training.captions import from_labels
from scaling.training.corpus import GROUPS, Corpus
from scaling.training.run import RECORD, read_corpus, read_spec
from scaling.training.spec import TrainSpec
from sims.store.files import own_folder, read_json, write_text

__all__ = ["ETAS", "TOLERANCE", "pack"]

TOLERANCE = 1e-2
"""Largest difference of an output, relative to its root mean square, that float16 weights may make."""

SAMPLES, SAMPLER_STEPS, CHECKED = 200, 40, 32
ETAS = {"copies": 0.0, "copies_with_fresh_noise": 1.0}
"""The samplers' shares of fresh noise, by the name of the count in the card."""


def pack(trained: str | Path, out: str | Path, name: str, flags: Sequence[str]) -> Path:
    """Write the finished run in ``trained`` into the folder ``out`` as the model ``name``; returns it.

    ``flags`` are those of ``python -m scaling train`` that made it, for the card. ``ValueError`` for a run that is not
    finished.
    """
    trained, out = Path(trained), Path(out)
    record = read_json(trained / RECORD)
    if record.get("trained") != record.get("steps"):
        raise ValueError(f"the training in {trained} is not finished; run the same command again.")
    spec = read_spec(trained)
    corpus, pipeline = read_corpus(spec), load_pipeline(trained)
    rounded = _rounded(pipeline)
    difference = _difference(pipeline, rounded, corpus)
    packed = rounded if difference <= TOLERANCE else pipeline
    # What tells that the folder is this model's is written first, so that an interrupted packing can be repeated.
    claim(out)
    out.mkdir(parents=True, exist_ok=True)
    for part in ("membership.json", "prompts.json", "tokenizer"):
        source = trained / part
        if source.is_dir():
            shutil.copytree(source, out / part, dirs_exist_ok=True)
        elif source.exists():
            shutil.copyfile(source, out / part)
    save_pipeline(packed, out)
    facts = _facts(pipeline if packed is pipeline else load_pipeline(out, "float32"), spec, corpus)
    facts["difference"] = difference if packed is not pipeline else 0.0
    facts["loss"] = record["loss"][-1][1]
    facts["devices"] = sorted({session["device"]["kind"] for session in record["sessions"] if "device" in session})
    write_text(out / "card.json", json.dumps({"name": name, "flags": list(flags), **facts}, indent=1) + "\n")
    write_text(out / "README.md", _card(name, flags, spec, facts, read_json(out / "membership.json")))
    return out


def claim(out: Path) -> None:
    """``ValueError`` if ``out`` holds other files than a model of :func:`pack`."""
    own_folder(out, ["membership.json"])


def _rounded(pipeline: Pipeline) -> Pipeline:
    def half(model: Any) -> Any:
        return dataclasses.replace(model, params={k: v.astype(jnp.float16) for k, v in model.params.items()})

    return pipeline._replace(
        network=half(pipeline.network), text_encoders=tuple(half(encoder) for encoder in pipeline.text_encoders)
    )


def _difference(exact: Pipeline, rounded: Pipeline, corpus: Corpus) -> float:
    """Largest difference of outputs with rounded weights, computed in float32, relative to their root mean square."""
    count, steps = CHECKED, exact.schedule.num_train_timesteps
    images = jnp.asarray(corpus.images[np.arange(count) % len(corpus.images)])
    x = images + jax.random.normal(jax.random.key(0), images.shape, images.dtype)
    t = jnp.arange(count) * steps // count
    captions = from_labels(corpus) if exact.text_encoders else None
    outs = []
    for pipeline in (exact, rounded):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (pipeline.network, pipeline.text_encoders))
        given = sample_conditions(pipeline._replace(network=wide[0], text_encoders=wide[1]), corpus, captions, count)
        outs.append(wide[0].apply(wide[0].params, x, t, **({} if given is None else given._asdict()))[0])
    scale = float(jnp.sqrt(jnp.mean(jnp.square(outs[0]))))
    return float(jnp.max(jnp.abs(outs[0] - outs[1]))) / scale


def _facts(pipeline: Pipeline, spec: TrainSpec, corpus: Corpus) -> dict[str, Any]:
    captions = from_labels(corpus) if pipeline.text_encoders else None
    by_kind = {}
    if captions is not None:
        kinds = np.asarray(captions.kinds)[sampled_prompts(captions, SAMPLES)]
        by_kind = {str(kind): kinds == kind for kind in np.unique(kinds)}
    shares = {}
    for name, eta in ETAS.items():
        _, copies = draw_samples(jax.random.key(1), pipeline, corpus, captions, SAMPLES, SAMPLER_STEPS, eta)
        of_repeated = int(np.sum(corpus.counts[copies.nearest[copies.is_copy]] > 1))
        shares[name] = {**copy_share(copies)._asdict(), "of_repeated": of_repeated}
        if by_kind:
            shares[name]["by_kind"] = {k: [int(copies.is_copy[at].sum()), int(at.sum())] for k, at in by_kind.items()}
    models = (pipeline.network, *pipeline.text_encoders)
    return {
        "parameters": sum(value.size for model in models for value in model.params.values()),
        "dataset": spec.dataset,
        "duplicates": spec.duplicates,
        "seed": spec.seed,
        "steps": spec.steps,
        "training_rows": int(corpus.counts.sum()),
        **shares,
    }


def _of_kinds(share: dict[str, Any]) -> str:
    """Copies by the kind of prompt; empty for models without prompts."""
    counts = [f"{kind} {count} of {total}" for kind, (count, total) in share.get("by_kind", {}).items()]
    return f"; by kind of prompt: {', '.join(counts)}" if counts else ""


def _card(
    name: str, flags: Sequence[str], spec: TrainSpec, facts: dict[str, Any], members: dict[str, list[int]]
) -> str:
    groups = {name: members[name] for name in GROUPS}
    how = {
        "unet2d": "without a condition",
        "unet2d_condition": "prompts by turns, of every kind equally many",
        "dit": "classes by turns",
    }[spec.arch]
    stored = f"float16; outputs differ from float32 by at most {facts['difference']:.1g} of their root mean square"
    lines = [
        f"# {name}",
        "",
        "A small diffusion model for the study of memorization, trained by the authors of this software.",
        "",
        f"* data: {spec.dataset}{f', {spec.resolution} x {spec.resolution} pixels' if spec.resolution else ''}; "
        f"{len(groups['duplicated'])} images repeated ({spec.duplicates or 'none'}), {len(groups['train'])} once, "
        f"{len(groups['held_out'])} held out",
        f"* network: {spec.arch}, {facts['parameters']:,} parameters; seed {spec.seed}, {spec.steps} steps of batch "
        f"{spec.batch_size}, last losses {facts['loss']:.3g}",
        *([f"* trained on: {', '.join(facts['devices'])}"] if facts["devices"] else []),
        f"* command: `python -m scaling train {' '.join(flags)} --out DIR`",
        f"* weights: {stored if facts['difference'] else 'float32'}",
        *(
            f"* copies among {share['total']} samples ({SAMPLER_STEPS} steps of DDIM, η = {eta:g}, {how}): "
            f"{share['count']} ({share['share']:.3f}, 95 % interval {share['low']:.3f} to {share['high']:.3f}), "
            f"{share['of_repeated']} of them of repeated images{_of_kinds(share)}"
            for share, eta in ((facts[name], eta) for name, eta in ETAS.items())
        ),
        "",
        "Rows of the data set, also in `membership.json`:",
        "",
        *(f"* {group}: {', '.join(map(str, rows)) or 'none'}" for group, rows in groups.items()),
    ]
    return "\n".join(lines) + "\n"
