"""Rows of detection: one image by its codes, the whole table on a network of the zoo, and a search for copies."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import zoo
from scaling.bench.setting import Bench
from scaling.bench.unet import DETECTOR_TAP, hooked
from scaling.detection.detectors import DETECTORS, score_batch
from scaling.detection.options import DetectionSetting
from scaling.detection.probes import Batch
from scaling.diffusion.schedules import from_config
from scaling.measures.neighbors import nearest_images, of_array
from scaling.models.model import Condition
from scaling.study.detection import score_items
from scaling.study.items import from_record
from sims.bench.timing import Row, compare

__all__ = ["audit_search", "detect", "detect_all"]

SIZES = {"samples": 1000, "images": 60_000, "values": 784}
"""Of a search as large as that of an audit on Fashion-MNIST."""


def detect(bench: Bench) -> Row:
    """The row ``detect``: the standard deviation of the codes of one image, noise included, beside a hooked pass."""
    model, module = bench.model, bench.module
    image, _, prompt = bench.inputs(0)
    schedule = from_config({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
    null = Condition(context=jnp.asarray(prompt))
    batch = Batch(model, schedule, jnp.arange(1), jnp.asarray(image), null, null)
    setting = DetectionSetting(taps=(DETECTOR_TAP,))

    def ours() -> np.ndarray:
        return score_batch(jax.random.key(0), batch, [DETECTORS["std"]], setting)["std"]

    def theirs() -> Any:
        return hooked(module, DETECTOR_TAP, *bench.inputs(0)).amax((2, 3)).std(correction=0)

    notes = {"tap": DETECTOR_TAP} | ({} if module is None else {"rival": "diffusers"})
    return compare("detect", ours, None if module is None else theirs, bench.repeats, notes=notes)


def detect_all(bench: Bench) -> Row:
    """The row ``detect_all``: every detector that the zoo's network of digits allows, once, compilation included."""
    pipeline = zoo.load("digits-10" if bench.quick else "digits")
    name = "digits-10" if bench.quick else "digits"
    items, _ = from_record("digits", pipeline, zoo.membership(name), num=2 if bench.quick else 100)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            score_items(pipeline, items, folder)

    measured = compare("detect_all", ours, None, 1, warm_up=False)
    return measured._replace(notes={"items": len(items.groups), "network": name})


def audit_search(bench: Bench) -> Row:
    """The row ``audit_search``: exact nearest neighbors, beside blocked products of matrices in numpy."""
    sizes = {name: size // 20 if bench.quick else size for name, size in SIZES.items()}
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (sizes["images"], sizes["values"])).astype(np.float32)
    samples = random.uniform(-1, 1, (sizes["samples"], sizes["values"])).astype(np.float32)
    found = nearest_images(samples, of_array(images))[0][:, 0]
    notes = {**sizes, "rival": "numpy", "agreement": float(np.mean(found == blocked(samples, images)))}
    return compare(
        "audit_search",
        functools.partial(nearest_images, samples, of_array(images)),
        functools.partial(blocked, samples, images),
        bench.repeats,
        notes=notes,
    )


def blocked(queries: np.ndarray, rows: np.ndarray, *, size: int = 16_384) -> np.ndarray:
    """The nearest row of each query by products of blocks, as a flat index of faiss computes them."""
    best, numbers = np.full(len(queries), np.inf, np.float32), np.zeros(len(queries), np.int64)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        squares = np.einsum("ij,ij->i", block, block)[None, :] - 2 * (queries @ block.T)
        own = squares.argmin(axis=1)
        values = squares[np.arange(len(queries)), own]
        better = values < best
        best[better], numbers[better] = values[better], own[better] + start
    return numbers
