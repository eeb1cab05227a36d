"""From a data set and a seed to the data of a cell: training rows, held-out rows, and their distribution.

A seed permutes the training pool and cells take prefixes of it, so training sets are nested in n, and a seed gives the
same rows whatever the other axes are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dae_theory import GaussianMixture
from dae_theory import mixture as mx
from dae_theory.types import PRNGKey
from sims.data import datasets
from sims.data.readers import Source
from sims.sweeps.measures import CellData
from sims.sweeps.spec import Spec

__all__ = ["World", "cell_data", "facts", "make_world"]


class World(NamedTuple):
    """A data set ready for cells."""

    pool: np.ndarray
    """Rows that training sets are drawn from, (N, d)."""
    held_out: np.ndarray
    """Rows never trained on, (m, d)."""
    population: GaussianMixture
    """The distribution of the data: exact for synthetic mixtures, else fitted to the pool, one mode a label."""
    data: datasets.Dataset
    """The data set as loaded."""


def make_world(
    spec: Spec, dataset: str | None = None, separation: float | None = None, source: Source | None = None
) -> World:
    """Load one of the data sets of ``spec`` (default: the first one, at the first separation), or ``source``.

    ``ValueError`` if it is missing, damaged, or smaller than the largest n.
    """
    dataset = spec.dataset[0] if dataset is None else dataset
    if separation is None and spec.separation:
        separation = spec.separation[0]
    data = datasets.load(
        spec.source(dataset, separation) if source is None else source,
        held_out=spec.held_out_size,
        seed=spec.split_seed,
        center=spec.center and bool(spec.separable),
        separable=spec.separable,
        dtype=np.dtype(spec.dtype),
    )
    needed = max(max(spec.identity(n, repeats)) + 1 for n in spec.num_samples for repeats in spec.duplicates)
    if needed > len(data.train):
        raise ValueError(
            f"{needed} distinct training rows are asked for, but {data.name} has {len(data.train)} beside "
            f"{len(data.held_out)} held out; ask for fewer, or lower held_out."
        )
    population = data.mixture or mx.fit(jnp.asarray(data.train), data.train_labels, ridge=1e-3)
    return World(data.train, data.held_out, population, data)


def facts(world: World, spec: Spec) -> dict[str, Any]:
    """Facts to record about the data, as JSON values: sizes, norms, and for each n the largest cosine β between
    distinct rows at seed 0."""
    betas = []
    for num_samples in spec.num_samples:
        _, cell, identity = cell_data(world, spec, num_samples, 0)
        distinct = np.unique(identity, return_index=True)[1]
        betas.append(datasets.max_cosine(np.asarray(cell.train)[distinct]))
    most, data = max(spec.num_samples), world.data
    used = data._replace(train=data.train[:most], train_labels=data.train_labels[:most])
    return {**datasets.describe(used), "pool": len(data.train), "beta_by_num_samples": betas}


def cell_data(
    world: World, spec: Spec, num_samples: int, seed: int, duplicates: str | None = None
) -> tuple[PRNGKey, CellData, tuple[int, ...]]:
    """The key of training, the data of a cell, and for each training row the index of the distinct row that it repeats.

    They depend on ``seed``, ``num_samples`` and ``duplicates``, and on no other axis.
    """
    seed_key = jax.random.fold_in(jax.random.key(spec.seed), seed)
    rows_key, train_key, eval_key = jax.random.split(seed_key, 3)
    order = np.asarray(jax.random.permutation(rows_key, len(world.pool)))
    identity = np.asarray(spec.identity(num_samples, duplicates))
    train = world.pool[order[identity]]
    # Rows that the source itself repeats are one sample too.
    identity = np.unique(datasets.first_of_equal(train), return_inverse=True)[1]
    mean = train.mean(axis=0) if spec.center and not spec.separable else np.zeros(train.shape[1], train.dtype)
    population = world.population._replace(means=world.population.means - mean[None, :])
    data = CellData(jnp.asarray(train - mean), jnp.asarray(world.held_out - mean), population, eval_key)
    return train_key, data, tuple(identity.tolist())
