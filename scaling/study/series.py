r"""Series of networks that differ in one thing: the number of training images, or how often some of them repeat.

:func:`transition` trains two networks for every n and seed, on disjoint halves of the data but from the same initial
weights and noise. It examines both (:mod:`scaling.study.examination`) and measures whether they draw the same images
from the same noise, as networks that generalize do :cite:`kadkhodaie24`. :func:`duplication` trains one network for
every number of repeats, seed and training time. :func:`two_layer` trains two-layer autoencoders on equally many rows
of the same data.

Every network has its own folder under ``OUT/models``. A unit of work is one n, or one number of repeats, and one seed;
its results are written when it is complete. An interrupted series resumes, also in the middle of a training.
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
from scaling.study import examination
from scaling.study.examination import check, examine
from scaling.study.settings import STANDARD, ExaminationSetting
from scaling.training import corpus as corpora
from scaling.training.captions import from_labels
from scaling.training.run import PATHS, config_of, read_corpus, train
from scaling.training.spec import TrainSpec
from sims import Spec, store, sweep
from sims.data.arrays import of_array
from sims.store import Region, checksum
from sims.store.files import write_npz
from sims.store.filling import Computed
from sims.sweeps import processes

__all__ = ["agreement", "duplication", "transition", "two_layer"]

VARIED = ("num_samples", "duplicates", "offset", "held_out", "split_seed", "seed", "steps")
"""Fields of the training spec that a series sets itself."""

OnUnit: TypeAlias = Callable[[int, int, str], None]
Job: TypeAlias = tuple[Callable[..., xr.Dataset], tuple[Any, ...], str]
"""A function of this module, its arguments, and a label for progress bars."""


def transition(
    base: TrainSpec,
    num_samples: Sequence[int],
    out: str | Path,
    *,
    seeds: int = 3,
    setting: ExaminationSetting = STANDARD,
    workers: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_unit: OnUnit | None = None,
) -> xr.Dataset:
    """Train and examine networks on growing training sets, two on disjoint rows for every n and seed.

    The same call resumes. Results have the variables of :func:`scaling.study.examination.examine` and
    :func:`scaling.study.examination.gap` over ``num_samples``, ``seed`` and ``half``, and over ``num_samples`` and
    ``seed`` the :func:`agreement` of the halves' samples, drawn by the first sampler of ``setting.etas``, and
    ``agreement_unpaired``, its value by chance.

    Args:
        base: data set, network and training; the series sets the numbers of images and the seeds.
        num_samples: training-set sizes n, increasing; training sets of one seed are nested.
        out: folder of the run; the networks are in ``models/n00010-seed0-half1`` and so on.
        seeds: number of seeds, each with its own rows, initial weights, noise and samples.
        setting: how much to examine.
        workers: number of processes that train in parallel and share the cores.
        provenance: recorded in the run beside the environment.
        on_unit: called with ``(done, total, label)`` at the start and after each unit.

    ``ValueError``, before anything is trained, for n that do not increase, data sets too small for two disjoint halves,
    conditional networks, and what :func:`scaling.study.examination.check` refuses.
    """
    sizes = [check_integer("num_samples", n, minimum=1) for n in num_samples]
    if not sizes or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"num_samples must increase, got {', '.join(map(str, num_samples))}.")
    if base.arch != "unet2d":
        raise ValueError(f"arch is {base.arch!r}: a series over n trains unconditional networks, unet2d.")
    if sizes[0] < 2:
        raise ValueError(
            f"num_samples begins at {sizes[0]}: the test for copies compares the distances to two images, so give at "
            "least 2."
        )
    whole = read_corpus(dataclasses.replace(base, num_samples=1, duplicates="", singles=0, held_out=0, offset=0))
    most, held_out = sizes[-1], len(np.unique(whole.first)) - 2 * sizes[-1]
    if held_out < setting.images + 2:
        raise ValueError(
            f"{base.dataset} has {whole.size} rows: two disjoint halves of {most} leave {max(held_out, 0)} to hold "
            f"out, too few to examine {setting.images} and to fit the population to the rest; ask for fewer "
            "(--num-samples, --images) or take a larger data set."
        )
    member = dataclasses.replace(base, duplicates="", singles=0, held_out=held_out, split_seed=0, seed=0)
    of_each = examination.template(setting, whole.images.shape[1:])
    template = _template(
        {"num_samples": sizes, "seed": list(range(check_integer("seeds", seeds, minimum=1)))},
        {"half": [0, 1]},
        of_each.assign(gap=examination.gap(of_each)),
        ("agreement", "agreement_unpaired"),
    )
    spec = _identity("transition", member, setting, whole)

    def job(at: Mapping[str, int]) -> Job:
        n, seed = sizes[at["num_samples"]], at["seed"]
        of_seed = dataclasses.replace(member, num_samples=n, seed=seed, split_seed=seed)
        return _halves, (of_seed, most, str(out), setting), f"n {n}, seed {seed}"

    check(setting, member.timesteps, held_out)
    return _fill(out, spec, template, ("num_samples", "seed"), job, workers, provenance, on_unit)


def duplication(
    base: TrainSpec,
    duplicates: Sequence[str],
    steps: Sequence[int],
    out: str | Path,
    *,
    seeds: int = 3,
    setting: ExaminationSetting = STANDARD,
    workers: int = 1,
    provenance: Mapping[str, Any] | None = None,
    on_unit: OnUnit | None = None,
) -> xr.Dataset:
    """Train and examine networks some of whose training images repeat, after several training times.

    The same call resumes. Results have the variables of :func:`scaling.study.examination.examine` over ``duplicates``,
    ``seed`` and ``steps``.

    Args:
        base: data set, network and training, with ``base.singles`` images trained on once each.
        duplicates: numbers of repeats, one network each: ``"KxM"`` repeats K images M times.
        steps: training times, increasing; a longer training continues the shorter one.
        out: folder of the run; the networks are in ``models/20x60-seed0-steps1000`` and so on.
        seeds: as for :func:`transition`, and so are the arguments below.
        setting: how much to examine.
        workers: number of processes.
        provenance: recorded in the run beside the environment.
        on_unit: called with ``(done, total, label)``.

    ``ValueError`` for repeats that are malformed or occur twice, steps that do not increase, and data sets that are too
    small.
    """
    times = [check_integer("steps", value, minimum=1) for value in steps]
    if not times or any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"steps must increase, got {', '.join(map(str, steps))}.")
    if not duplicates or len(set(duplicates)) < len(duplicates):
        raise ValueError(f"duplicates must be different KxM, such as 20x60; got {', '.join(duplicates)}.")
    member = dataclasses.replace(base, num_samples=None, split_seed=0, seed=0)
    of_each = [read_corpus(dataclasses.replace(member, duplicates=value)) for value in duplicates]
    template = _template(
        {"duplicates": list(duplicates), "seed": list(range(check_integer("seeds", seeds, minimum=1)))},
        {"steps": times},
        examination.template(setting, of_each[0].images.shape[1:]),
    )
    spec = _identity("duplication", member, setting, of_each[0])

    def job(at: Mapping[str, int]) -> Job:
        value, seed = duplicates[at["duplicates"]], at["seed"]
        of_seed = dataclasses.replace(member, duplicates=value, seed=seed, split_seed=seed)
        return _times, (of_seed, times, str(out), setting), f"{value}, seed {seed}"

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
    """Train two-layer autoencoders on equally many rows of the same images, one for each σ, by a sweep of :mod:`sims`.

    Writes the images, as the deep networks see them, to ``out/images.npz`` and the sweep to ``out/two_layer``.

    Args:
        base: data set and resolution.
        num_samples: training-set sizes n.
        out: folder of the series.
        seeds: number of seeds.
        sigmas: noise levels.
        width: hidden units.
        steps: training steps.
        on_unit: as for :func:`sims.sweep`.
    """
    whole = read_corpus(dataclasses.replace(base, num_samples=None, duplicates="", singles=0, held_out=0, offset=0))
    order = np.argsort(whole.rows)
    images, labels = whole.images[order].transpose(0, 2, 3, 1), whole.labels[order]
    write_npz(Path(out) / "images.npz", {"images": images, "labels": labels}, compress=True)
    # Known by a digest of its values: the folder of the series may be moved.
    source = of_array(images)._replace(labels=labels)
    spec = Spec(
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
    return sweep(spec, measures, out=Path(out) / "two_layer", data=source, on_unit=on_unit)


def agreement(
    first: Float[np.ndarray, "n ..."], second: Float[np.ndarray, "n ..."], mean: Float[np.ndarray, " ..."]
) -> tuple[float, float]:
    """Mean cosine between images of one noise, and between images of neighboring ones, about the ``mean`` image."""
    a, b = (np.reshape(images - mean, (len(images), -1)).astype(np.float64) for images in (first, second))
    a, b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (a, b))
    return float(np.mean(np.sum(a * b, axis=1))), float(np.mean(np.sum(a * np.roll(b, 1, axis=0), axis=1)))


def _halves(spec: TrainSpec, offset: int, out: str, setting: ExaminationSetting) -> xr.Dataset:
    """Train and examine the two networks of one n and seed."""
    halves = []
    for half in (0, 1):
        folder = Path(out) / "models" / f"n{spec.num_samples:05d}-seed{spec.seed}-half{half}"
        results = _examined(dataclasses.replace(spec, offset=half * offset), folder, setting)
        halves.append(results.assign(gap=examination.gap(results)))
    mean = read_corpus(spec).held_out.mean(axis=0)
    first, second = (results.samples.isel(eta=0).values for results in halves)
    paired, unpaired = agreement(first, second, mean)
    return _along("half", halves).assign(agreement=paired, agreement_unpaired=unpaired)


def _times(spec: TrainSpec, steps: Sequence[int], out: str, setting: ExaminationSetting) -> xr.Dataset:
    """Train one network, and examine it after each of ``steps``; each has its own folder."""
    results, before = [], None
    for count in steps:
        folder = Path(out) / "models" / f"{spec.duplicates}-seed{spec.seed}-steps{count}"
        if before is not None and not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(before, partial)
            partial.replace(folder)
        results.append(_examined(dataclasses.replace(spec, steps=count), folder, setting))
        before = folder
    return _along("steps", results)


def _along(dim: str, results: Sequence[xr.Dataset]) -> xr.Dataset:
    """Examinations with the same labels, along a new first dimension."""
    # One data set; the types of xarray allow for a tree of them.
    joined: Any = xr.concat(results, dim, data_vars="all", coords="minimal", compat="override", join="exact")
    return joined


def _examined(spec: TrainSpec, folder: Path, setting: ExaminationSetting) -> xr.Dataset:
    train(spec, folder)
    corpus = read_corpus(spec)
    captions = from_labels(corpus) if spec.arch == "unet2d_condition" else None
    # Another key than the training's, and the same for every training set, so that networks differ in nothing else.
    key = jax.random.fold_in(jax.random.key(spec.seed), 2)
    return examine(key, load_pipeline(folder), corpus, setting, captions)


def _identity(command: str, member: TrainSpec, setting: ExaminationSetting, corpus: corpora.Corpus) -> dict[str, Any]:
    fixed = {k: v for k, v in dataclasses.asdict(member).items() if k not in (*PATHS, *VARIED)}
    if command == "transition":
        fixed["steps"] = member.steps
    listed = parse_config(config_of(member, corpus)).taps(np.float32)
    check_names(listed, *setting.taps)
    check_order(listed, setting.source, setting.taps[0])
    spec = {"command": command, "train": fixed, "setting": dataclasses.asdict(setting), "data": checksum(corpus.images)}
    return json.loads(json.dumps(spec))


def _template(
    outer: Mapping[str, list[Any]], inner: Mapping[str, list[Any]], of_each: xr.Dataset, shared: Sequence[str] = ()
) -> xr.Dataset:
    """The variables of ``of_each``, dimensions of the series first; ``shared`` are one number per unit."""
    coords = {**outer, **inner, **{name: labels.values for name, labels in of_each.coords.items()}}
    arrays = {name: (tuple(outer), np.float32) for name in shared}
    arrays |= {
        str(name): ((*outer, *inner, *variable.dims), variable.dtype) for name, variable in of_each.data_vars.items()
    }
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
    """Compute and write the pending units of the run in ``out``; returns all results."""
    check_integer("workers", workers, minimum=1)

    def job_of(region: Region) -> Job:
        return job({dim: region[dim].start for dim in dims})

    def compute(regions: list[Region]) -> Iterator[Computed]:
        for number, results, wall_s in _computed([job_of(region) for region in regions], workers):
            # A unit has length one along the outer dimensions.
            values = {str(name): variable.values[None, None] for name, variable in results.data_vars.items()}
            yield regions[number], values, wall_s

    def report(done: int, total: int, region: Region | None) -> None:
        if on_unit is not None:
            on_unit(done, total, "" if region is None else job_of(region)[2])

    with store.open_run(
        out, spec, template, dict.fromkeys(dims, 1), {**store.environment(), **(provenance or {})}
    ) as run:
        store.fill_units(run, compute, on_unit=report)
    return store.load(out)


def _computed(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, xr.Dataset, float]]:
    """The number, the results and the seconds of each job, as jobs finish."""
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
    """Set up one of ``workers`` processes, which is a program of its own."""
    processes.share_cores(workers)
    limit_blas_threads()


def _timed(function: Callable[..., xr.Dataset], *args: Any) -> tuple[xr.Dataset, float]:
    begin = time.perf_counter()
    results = function(*args)
    return results, time.perf_counter() - begin
