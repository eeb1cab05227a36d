r"""Measures of trained networks: pure functions ``(params, data, spec) -> array``.

``params`` is the network, ``data`` has training and held-out rows, ``spec`` the cell's numbers. :data:`MEASURES` lists
the built-in measures; a sweep takes any other function of this signature as well. Averages are over the first
``eval_samples`` rows with ``eval_draws`` noise draws each, and with more draws of each where there are fewer rows, so
that a measure of two rows is as precise as one of 256. Draw i has the same ε in every cell of a seed (common random
numbers), so differences between cells have smaller errors than their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dae_theory import (
    AffineDae,
    GaussianMixture,
    block_minimizer,
    denoise,
    empirical_denoiser,
    encode,
    merge_parallel_columns,
    mixture_denoiser,
    spikiness,
)
from dae_theory.affine_gates import memorize
from dae_theory.affine_minimizers import memorizing_parts
from dae_theory.conditions import Checks, check_conditions
from dae_theory.model import Dae, live_columns
from dae_theory.types import PRNGKey, Scalar
from sims.sweeps.measure_names import DEFAULT

__all__ = ["DEFAULT", "MEASURES", "CellData", "CellSpec", "Measure", "diverged", "noisy_pairs"]


class CellData(NamedTuple):
    """The data of a cell."""

    train: Float[Array, "n d"]
    held_out: Float[Array, "m d"]
    population: GaussianMixture
    """The law of the data: exact for synthetic mixtures, else fitted to the labeled training pool."""
    key: PRNGKey
    """Of the evaluation noise; the same for all cells of a seed."""


class CellSpec(NamedTuple):
    """A cell's numbers; σ and λ are traced, the rest is static."""

    sigma: Scalar
    penalty: Scalar
    eval_samples: int
    eval_draws: int
    identity: tuple[int, ...]
    """For each training row the index of the distinct row that it repeats."""


Measure: TypeAlias = Callable[[Dae, CellData, CellSpec], Array]
"""The signature of a measure."""


def noisy_pairs(
    rows: Float[Array, "n d"], data: CellData, spec: CellSpec
) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
    """The first ``eval_samples`` rows, each repeated for every noise draw, and noisy versions of them.

    ``eval_samples eval_draws`` pairs, rounded up to as many for each row. With the default 1,024 pairs the standard
    error of a mean square in d dimensions is about :math:`\\sqrt{2/d}/32` of it: 0.6 % at d = 64, where seeds differ by
    several percent.
    """
    used = rows[: spec.eval_samples]
    if not len(used):
        raise ValueError(
            "there are no rows to measure on, because none is held out; hold out at least one (held_out, --held-out), "
            "or choose measures of training rows alone."
        )
    clean = jnp.repeat(used, -(-spec.eval_samples * spec.eval_draws // used.shape[0]), axis=0)

    def eps(i: Array) -> Float[Array, " d"]:
        return jax.random.normal(jax.random.fold_in(data.key, i), rows.shape[1:], rows.dtype)

    return clean, clean + spec.sigma * jax.vmap(eps)(jnp.arange(clean.shape[0]))


def objective(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """Monte Carlo estimate of the paper's objective, eq. (6), on training rows."""
    decay = jnp.sum(jnp.square(params.w1)) + jnp.sum(jnp.square(params.w2))
    return train_error(params, data, spec) + spec.penalty * decay


def diverged(params: Dae, data: CellData, spec: CellSpec) -> Bool[Array, ""]:
    """Whether training has diverged: the objective on training rows is NaN or infinite. Every sweep records it."""
    return ~jnp.isfinite(objective(params, data, spec))


def train_error(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − x‖² on training rows; σ²d for a network that returns its input."""
    return _mean_square(params, data.train, data, spec, lambda clean, noisy: clean)


def held_out_error(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − x‖² on rows never trained on."""
    return _mean_square(params, data.held_out, data, spec, lambda clean, noisy: clean)


def gap(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """Generalization gap, 1 − train error/held-out error: 0 for generalization, near 1 for memorization.

    NaN where the held-out error is not finite: the training has diverged.
    """
    held_out = held_out_error(params, data, spec)
    return jnp.where(jnp.isfinite(held_out), 1.0 - train_error(params, data, spec) / held_out, jnp.nan)


def distance_to_empirical_train(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − f_emp(y)‖² near training rows: the memorizing optimum, eq. (3)."""
    return _mean_square(params, data.train, data, spec, _empirical(data, spec))


def distance_to_empirical_held_out(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − f_emp(y)‖² near held-out rows."""
    return _mean_square(params, data.held_out, data, spec, _empirical(data, spec))


def distance_to_population_train(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − f_gt(y)‖² near training rows: the population's mixture optimum."""
    return _mean_square(params, data.train, data, spec, _population(data, spec))


def distance_to_population_held_out(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − f_gt(y)‖² near held-out rows."""
    return _mean_square(params, data.held_out, data, spec, _population(data, spec))


def distance_to_closed_form(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """E‖f(y) − f*(y)‖²/E‖f*(y)‖² near training rows, f* the memorizing closed form (Corollaries 3.2, 3.4).

    In function space, so it does not depend on symmetries of the weights. NaN if the closed form does not exist: more
    distinct rows than units, or a penalty that clips all of it to zero. For networks with biases it is that of
    :func:`dae_theory.affine_minimizers.affine_memorizing_minimizer` on the distinct rows, computed on the host, and NaN
    for a single row, where no gate is needed, and for repeated ones, whose larger weight it does not know.
    """
    if max(spec.identity) + 1 > params.w1.shape[1]:
        return jnp.full((), jnp.nan, data.train.dtype)
    if not isinstance(params, AffineDae):
        closed: Dae = block_minimizer(data.train, np.asarray(spec.identity), spec.sigma, spec.penalty, 1)
    elif 2 <= len(data.train) <= max(spec.identity) + 1:
        closed = _affine_minimizer(data, spec)
    else:
        return jnp.full((), jnp.nan, data.train.dtype)
    _, noisy = noisy_pairs(data.train, data, spec)
    target = jax.vmap(functools.partial(denoise, closed))(noisy)
    ours = jax.vmap(functools.partial(denoise, params))(noisy)
    return jnp.sum(jnp.square(ours - target)) / jnp.sum(jnp.square(target))


def _affine_minimizer(data: CellData, spec: CellSpec) -> AffineDae:
    n, d = data.train.shape

    def shaped(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, data.train.dtype)

    shapes = AffineDae(shaped(d, n), shaped(n), shaped(d, n), shaped(d))
    return jax.pure_callback(
        _affine_closed_form, shapes, data.train, spec.sigma, spec.penalty, vmap_method="sequential"
    )


def _affine_closed_form(rows: Any, sigma: Any, penalty: Any) -> AffineDae:
    """On the host, in NumPy alone: a callback must not start computations of JAX."""
    rows = np.asarray(rows)
    parts = memorizing_parts(rows, memorize(rows.astype(np.float64), float(sigma), float(penalty)))
    arrays: Any = [part.astype(rows.dtype) for part in parts]
    return AffineDae(*arrays)


def conditions_hold(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, " c"]:
    """1 or 0 for each inequality of Theorem 3.1 with every distinct row a cluster: whether it predicts memorization.

    In the order of :class:`dae_theory.conditions.Checks`; units beyond one per distinct row count as zero columns. NaN
    if there are more distinct rows than units, and for networks with biases, which the theorem is not about.
    """
    names = Checks._fields
    if max(spec.identity) + 1 > params.w1.shape[1] or isinstance(params, AffineDae):
        return jnp.full(len(names), jnp.nan, data.train.dtype)
    width = params.w1.shape[1]
    conditions = check_conditions(data.train, np.asarray(spec.identity), spec.sigma, spec.penalty, 1, width=width)
    return jnp.stack([check.holds for check in conditions.checks]).astype(data.train.dtype)


conditions_hold.labels = {"condition": Checks._fields}  # pyright: ignore[reportFunctionMemberAccess]


def num_live_columns(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """Number of live units, after merging parallel ones (cosine above 0.99)."""
    del spec
    merged = merge_parallel_columns(params, tolerance=0.01)
    return jnp.sum(live_columns(merged, tolerance=0.03)).astype(data.train.dtype)


def num_aligned_columns(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
    """Number of merged live units whose encoder column has cosine above 0.95 with a training row: stored images.

    With biases it is the decoder column, and the rows are seen from b₂.
    """
    del spec
    merged = merge_parallel_columns(params, tolerance=0.01)
    biased = isinstance(merged, AffineDae)
    columns, rows = (merged.w2, data.train - merged.b2[None, :]) if biased else (merged.w1, data.train)
    tiny = jnp.finfo(data.train.dtype).tiny
    unit = columns / jnp.maximum(jnp.linalg.norm(columns, axis=0), tiny)[None, :]
    rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1), tiny)[:, None]
    aligned = jnp.any(rows @ unit > 0.95, axis=0)
    return jnp.sum(aligned & live_columns(merged, tolerance=0.03)).astype(data.train.dtype)


def code_measure(name: str, rows: str) -> Measure:
    """The mean of a spikiness measure (a name of :data:`dae_theory.spikiness.MEASURES`) over codes of noisy rows.

    ``rows`` is ``"train"`` or ``"held_out"``.
    """
    of_code = spikiness.MEASURES[name]

    def measure(params: Dae, data: CellData, spec: CellSpec) -> Float[Array, ""]:
        _, noisy = noisy_pairs(getattr(data, rows), data, spec)
        return jnp.mean(jax.vmap(lambda y: of_code(encode(params, y)))(noisy))

    measure.__name__ = f"{name}_{rows}"
    measure.__doc__ = f"Mean {name} of the codes of noisy {rows.replace('_', '-')} rows."
    return measure


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        measure.__name__: measure
        for measure in (
            objective,
            train_error,
            held_out_error,
            gap,
            distance_to_empirical_train,
            distance_to_empirical_held_out,
            distance_to_population_train,
            distance_to_population_held_out,
            distance_to_closed_form,
            conditions_hold,
            num_live_columns,
            num_aligned_columns,
            *(code_measure(name, rows) for name in spikiness.MEASURES for rows in ("train", "held_out")),
            diverged,
        )
    }
)
"""Built-in measures by name, those of :data:`sims.sweeps.measure_names.NAMES`."""


def _mean_square(
    params: Dae,
    rows: Float[Array, "n d"],
    data: CellData,
    spec: CellSpec,
    target: Callable[[Float[Array, " d"], Float[Array, " d"]], Float[Array, " d"]],
) -> Float[Array, ""]:
    clean, noisy = noisy_pairs(rows, data, spec)
    error = jax.vmap(lambda x, y: denoise(params, y) - target(x, y))(clean, noisy)
    return jnp.mean(jnp.sum(jnp.square(error), axis=-1))


def _empirical(data: CellData, spec: CellSpec) -> Callable[[Array, Array], Array]:
    return lambda clean, noisy: empirical_denoiser(noisy, spec.sigma, data.train)


def _population(data: CellData, spec: CellSpec) -> Callable[[Array, Array], Array]:
    return lambda clean, noisy: mixture_denoiser(noisy, spec.sigma, data.population)
