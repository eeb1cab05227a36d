r"""Series of networks that differ in one thing: the number of training images, or how often some of them repeat.

:func:`transition` trains two networks on disjoint halves for every n and seed, from one start and one noise, and asks
of both what :mod:`scaling.study.examination` asks, and whether they draw the same images from the same noise: where networks
generalize they do :cite:`kadkhodaie24`. :func:`duplication` trains one network for each number of copies, seed and
training time. :func:`two_layer` trains the two-layer autoencoder on as many rows of the same data.

Each network lies in a folder of its own under ``OUT/models``; a unit of work, which counts when it is written, is what
belongs to one n, or number of copies, and one seed. A killed series goes on where it was, inside a training too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

from dae_theory.checks import check_integer
from scaling.backend import limit_blas_threads
from scaling.bridge.loading import load_pipeline
from scaling.models.model import parse_config
from scaling.models.taps import check_names, check_order
from scaling.study.examination import STANDARD, Setting, check, examine, variables
from scaling.training import corpus as corpora
from scaling.training.captions import from_labels
from scaling.training.corpus import GROUPS
from scaling.training.run import PATHS, TrainSpec, config_of, read_corpus, train
from sims import Spec, store, sweep
from sims.store import checksum
from sims.store.files import write_npz
from sims.sweeps import processes

__all__ = ["NUM_SAMPLES", "agreement", "duplication", "transition", "two_layer"]

NUM_SAMPLES = (10, 30, 100, 300, 750)
"""Training images if nothing is asked; digits has twice as many as the last, and some to hold out."""

VARIED = ("num_samples", "duplicates", "offset", "held_out", "split_seed", "seed", "steps")
"""Fields of the spec that a series sets."""

OnUnit: TypeAlias = Callable[[int, int, str], None]
Job: TypeAlias = tuple[Callable[..., dict[str, np.ndarray]], tuple[Any, ...], str]
"""A function of the module, what it takes, and what to call it."""


def transition(
    base: TrainSpec,
    num_samples: Sequence[int],
    out: str | Path,
    *,
    seeds: int = 3,
    setting: Setting = STANDARD,
    workers: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_unit: OnUnit | None = None,
) -> xr.Dataset:
    """Networks of growing n, two on disjoint rows for every seed, kept in the folder ``out``; the same call resumes.

    Args:
        base: data set, network and training; its numbers of images and seeds are set by the series.
        num_samples: training-set sizes n, increasing; of a seed they are nested.
        out: the folder; ``models/n00010-seed0-half1`` and so on hold the networks.
        seeds: each with its own rows, start, noise and samples.
        setting: how much is looked at.
        workers: processes side by side, each with its part of the cores.
        provenance: recorded beside the environment.
        on_unit: ``(done, total, label)``, told at the start and after each unit.

    Returns over ``num_samples``, ``seed`` and ``half`` what :func:`scaling.study.examination.examine` does, ``gap``, 1 minus
    the error on training images over that on held-out ones, as in :mod:`sims.sweeps.measures`; and over the first two
    ``agreement`` and, as what chance gives, ``agreement_unpaired`` (:func:`agreement`), of samples with the first of
    the setting's ``etas``. ``ValueError`` for n that do not increase, data sets too small for two disjoint halves, and
    networks with a condition; before anything is trained also for what :func:`scaling.study.examination.check` refuses.
    """
    sizes = [check_integer("num_samples", n, minimum=1) for n in num_samples]
    if not sizes or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"num_samples must increase, got {', '.join(map(str, num_samples))}.")
    if base.arch != "unet2d":
        raise ValueError(f"arch is {base.arch!r}: a series over n is of networks without a condition, unet2d.")
    if sizes[0] < 2:
        raise ValueError(f"num_samples begins at {sizes[0]}: copies are told by two distances, so give at least 2.")
    whole = read_corpus(dataclasses.replace(base, num_samples=1, duplicates="", singles=0, held_out=0, offset=0))
    most, kept = sizes[-1], whole.size - 2 * sizes[-1]
    if kept < setting.images + 2:
        raise ValueError(
            f"{base.dataset} has {whole.size} rows: two disjoint halves of {most} leave {max(kept, 0)} to hold out, of "
            f"which {setting.images} are looked at and the population is fitted to the rest; take fewer "
            "(--num-samples, --images) or a larger data set."
        )
    member = dataclasses.replace(base, duplicates="", singles=0, held_out=kept, split_seed=0, seed=0)
    own = {"gap": ({"sigma": list(setting.sigmas)}, np.float32)}
    template = _template(
        {"num_samples": sizes, "seed": list(range(check_integer("seeds", seeds, minimum=1)))},
        {"half": [0, 1]},
        variables(setting, whole.images.shape[1:]) | own,
        ("agreement", "agreement_unpaired"),
    )
    spec = _identity("transition", member, setting, whole)

    def job(at: Mapping[str, int]) -> Job:
        n, seed = sizes[at["num_samples"]], at["seed"]
        of_seed = dataclasses.replace(member, num_samples=n, seed=seed, split_seed=seed)
        return _halves, (of_seed, most, str(out), setting), f"n {n}, seed {seed}"

    check(setting, member.timesteps, kept)
    return _fill(out, spec, template, ("num_samples", "seed"), job, workers, provenance, on_unit)


def duplication(
    base: TrainSpec,
    duplicates: Sequence[str],
    steps: Sequence[int],
    out: str | Path,
    *,
    seeds: int = 3,
    setting: Setting = STANDARD,
    workers: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_unit: OnUnit | None = None,
) -> xr.Dataset:
    """Networks some of whose training images repeat, for every number of copies, seed and training time.

    ``duplicates`` are ``"KxM"``, K images M times beside ``base.singles`` that are there once; ``steps`` increase.
    Returns what :func:`scaling.study.examination.examine` does over ``duplicates``, ``seed`` and ``steps``. Other arguments
    as for :func:`transition`. ``ValueError`` for repeats and steps that make no sense, and what the data set lacks.
    """
    asked = [check_integer("steps", value, minimum=1) for value in steps]
    if not asked or any(b <= a for a, b in itertools.pairwise(asked)):
        raise ValueError(f"steps must increase, got {', '.join(map(str, steps))}.")
    if not duplicates or len(set(duplicates)) < len(duplicates):
        raise ValueError(f"duplicates must be different KxM, such as 20x60; got {', '.join(duplicates)}.")
    member = dataclasses.replace(base, num_samples=None, split_seed=0, seed=0)
    of_each = [read_corpus(dataclasses.replace(member, duplicates=value)) for value in duplicates]
    template = _template(
        {"duplicates": list(duplicates), "seed": list(range(check_integer("seeds", seeds, minimum=1)))},
        {"steps": asked},
        variables(setting, of_each[0].images.shape[1:]),
    )
    spec = _identity("duplication", member, setting, of_each[0])

    def job(at: Mapping[str, int]) -> Job:
        value, seed = duplicates[at["duplicates"]], at["seed"]
        of_seed = dataclasses.replace(member, duplicates=value, seed=seed, split_seed=seed)
        return _times, (of_seed, asked, str(out), setting), f"{value}, seed {seed}"

    for corpus in of_each:
        check(setting, member.timesteps, len(corpus.held_out))
    return _fill(out, spec, template, ("duplicates", "seed"), job, workers, provenance, on_unit)


def two_layer(
    base: TrainSpec,
    num_samples: Sequence[int],
    out: str | Path,
    *,
    seeds: int = 3,
    sigmas: Sequence[float] = STANDARD.sigmas,
    width: int = 64,
    steps: int = 2000,
    on_unit: Callable[..., None] | None = None,
) -> xr.Dataset:
    """The two-layer autoencoder on as many rows of the same images, a network for each σ: a sweep of :mod:`sims`.

    The images as the deep networks see them lie in ``out/images.npz``, the results in ``out/two_layer``.
    """
    whole = read_corpus(dataclasses.replace(base, num_samples=None, duplicates="", singles=0, held_out=0, offset=0))
    order = np.argsort(whole.rows)
    file = Path(out) / "images.npz"
    images, labels = whole.images[order].transpose(0, 2, 3, 1), whole.labels[order]
    write_npz(file, {"images": images, "labels": labels}, compress=True)
    spec = Spec(
        dataset=(f"npz:{file}?values=-1:1",),
        num_samples=tuple(num_samples),
        sigma=tuple(sigmas),
        held_out=whole.size - 2 * max(num_samples),
        width=(width,),
        penalty=(1e-3,),
        batch_size=(128,),
        schedule="cosine",
        steps=steps,
        seeds=seeds,
    )
    measures = ("gap", "train_error", "held_out_error", "std_train", "std_held_out", "l4_over_l2_train")
    return sweep(spec, measures, out=Path(out) / "two_layer", on_unit=on_unit)


def agreement(
    first: Float[np.ndarray, "n ..."], second: Float[np.ndarray, "n ..."], mean: Float[np.ndarray, " ..."]
) -> tuple[float, float]:
    """Mean cosine between images of one noise, and between images of neighboring ones, about the ``mean`` image."""
    a, b = (np.reshape(images - mean, (len(images), -1)).astype(np.float64) for images in (first, second))
    a, b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (a, b))
    return float(np.mean(np.sum(a * b, axis=1))), float(np.mean(np.sum(a * np.roll(b, 1, axis=0), axis=1)))


def _halves(spec: TrainSpec, offset: int, out: str, setting: Setting) -> dict[str, np.ndarray]:
    """The two networks of one n and seed, trained and looked at."""
    found = []
    for half in (0, 1):
        mine = dataclasses.replace(spec, offset=half * offset)
        folder = Path(out) / "models" / f"n{spec.num_samples:05d}-seed{spec.seed}-half{half}"
        found.append(_examined(mine, folder, setting))
        error = found[-1]["error"]
        found[-1]["gap"] = 1 - error[GROUPS.index("train")] / error[GROUPS.index("held_out")]
    mean = read_corpus(spec).held_out.mean(axis=0)
    # Of the first sampler, both from one noise.
    paired, unpaired = agreement(found[0]["samples"][0], found[1]["samples"][0], mean)
    stacked = {name: np.stack([one[name] for one in found]) for name in found[0]}
    return stacked | {"agreement": np.asarray(paired), "agreement_unpaired": np.asarray(unpaired)}


def _times(spec: TrainSpec, steps: Sequence[int], out: str, setting: Setting) -> dict[str, np.ndarray]:
    """One training, looked at after each of ``steps``; each of them keeps its own folder."""
    found, before = [], None
    for count in steps:
        folder = Path(out) / "models" / f"{spec.duplicates}-seed{spec.seed}-steps{count}"
        if before is not None and not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(before, partial)
            partial.replace(folder)
        found.append(_examined(dataclasses.replace(spec, steps=count), folder, setting))
        before = folder
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def _examined(spec: TrainSpec, folder: Path, setting: Setting) -> dict[str, np.ndarray]:
    train(spec, folder)
    corpus = read_corpus(spec)
    captions = from_labels(corpus) if spec.arch == "unet2d_condition" else None
    # Not the training's key; the same whatever the training set is, so that networks differ in nothing else.
    key = jax.random.fold_in(jax.random.key(spec.seed), 2)
    return examine(key, load_pipeline(folder), corpus, setting, captions)


def _identity(command: str, member: TrainSpec, setting: Setting, corpus: corpora.Corpus) -> dict[str, Any]:
    fixed = {k: v for k, v in dataclasses.asdict(member).items() if k not in (*PATHS, *VARIED)}
    if command == "transition":
        fixed["steps"] = member.steps
    listed = parse_config(config_of(member, corpus)).taps(np.float32)
    check_names(listed, *setting.taps)
    check_order(listed, setting.source, setting.taps[0])
    spec = {"command": command, "train": fixed, "setting": setting._asdict(), "data": checksum(corpus.images)}
    return json.loads(json.dumps(spec))


def _template(
    outer: Mapping[str, list[Any]],
    inner: Mapping[str, list[Any]],
    listed: Mapping[str, tuple[dict[str, list[Any]], Any]],
    shared: Sequence[str] = (),
) -> xr.Dataset:
    """Of each variable the dimensions of the series, then its own; ``shared`` are numbers of a unit."""
    coords: dict[str, Any] = {**outer, **inner}
    arrays: dict[str, Any] = {name: (tuple(outer), np.float32) for name in shared}
    for name, (dims, dtype) in listed.items():
        coords |= dims
        arrays[name] = ((*outer, *inner, *dims), dtype)
    return store.blank(coords, arrays)


def _fill(
    out: str | Path,
    spec: Mapping[str, Any],
    template: xr.Dataset,
    dims: tuple[str, str],
    job: Callable[[Mapping[str, int]], Job],
    workers: int,
    provenance: Mapping[str, Any] | None,
    on_unit: OnUnit | None,
) -> xr.Dataset:
    """Compute and write the units that the run still lacks."""
    check_integer("workers", workers, minimum=1)
    told = {**store.environment(), **(provenance or {})}
    with store.open_run(out, spec, template, dict.fromkeys(dims, 1), told) as run:
        units = store.pending(run)
        done, total = store.progress(run)
        if on_unit is not None:
            on_unit(done, total, "")
        jobs = [job({dim: unit[dim].start for dim in dims}) for unit in units]
        for number, values, wall_s in _computed(jobs, workers):
            # A unit has length one along its dimensions.
            store.write_chunk(
                run, units[number], {k: np.asarray(v)[None, None] for k, v in values.items()}, wall_s=wall_s
            )
            done += 1
            if on_unit is not None:
                on_unit(done, total, jobs[number][2])
    return store.load(out)


def _computed(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, dict[str, np.ndarray], float]]:
    """The number, the values and the seconds of each job, as they end."""
    if workers == 1 or len(jobs) < 2:
        for number, (function, args, _) in enumerate(jobs):
            yield number, *_timed(function, *args)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (workers,)) as pool:
        running = {pool.submit(_timed, function, *args): number for number, (function, args, _) in enumerate(jobs)}
        try:
            for future in as_completed(running):
                yield running[future], *future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin(workers: int) -> None:
    """In a process that is one of so many: a program of its own."""
    processes.share_cores(workers)
    limit_blas_threads()


def _timed(function: Callable[..., dict[str, np.ndarray]], *args: Any) -> tuple[dict[str, np.ndarray], float]:
    begin = time.perf_counter()
    values = function(*args)
    return values, time.perf_counter() - begin
