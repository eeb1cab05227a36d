"""Does a two-layer autoencoder on these data memorize at this noise? The theory's answer, and training beside it.

Closed forms for given samples, with and without biases: which conditions hold, how many samples can be memorized and at
what price, which regime the objectives predict, and up to which n. Numbers come from :mod:`dae_theory.price`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dae_theory.checks import check_finite, check_integer, check_level
from dae_theory.convexity import project_on_hulls
from dae_theory.price import Price, pays_up_to, price_of_memory
from dae_theory.types import Scalar
from sims.data.datasets import separable_rows
from sims.study.certification import CLEAR
from sims.study.tables import markdown
from sims.sweeps.spec import Spec

__all__ = ["as_text", "ask", "sizes_up_to"]

TOLERANCE = 1e-4
"""Relative error of squared distances to hulls: far below what the answer is rounded to."""

NAMED = 12
"""Rows that the page names of each kind; ``ask.json`` has all."""

SEARCHED = 256
"""Rows among which a separable set is sought, which is a greedy search."""


def ask(
    data: Float[np.ndarray, "n d"],
    *,
    sigma: Scalar | Sequence[float],
    width: int | None = None,
    penalty: Scalar = 1e-3,
    train: bool = False,
    steps: int = 4000,
    seeds: int = 3,
    seed: int = 0,
    held_out: Float[np.ndarray, "m d"] | None = None,
    told: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The theory's answer for the rows of ``data``, as JSON values.

    Args:
        data: samples as rows, in the order in which smaller sets are made of them.
        sigma: noise levels > 0, in the units of the data.
        width: units p >= 1; one for each row by default.
        penalty: λ >= 0.
        train: whether to train networks too, with and without biases, on all rows.
        steps: of that training, by Adam.
        seeds: repetitions of it.
        seed: of its starts and noise.
        held_out: rows never trained on, for the gap of trained networks; needed for ``train``.
        told: called with a line before whatever may take long.

    ``ValueError`` for fewer than two distinct rows, values that are not finite, and numbers out of range. Samples that
    no network can memorize are counted in the answer; they are no error.

    Example:
        >>> turns = 2 * np.pi * np.arange(5) / 5
        >>> answer = ask(3 * np.stack([np.cos(turns), np.sin(turns)], axis=1), sigma=0.1)["answers"][0]
        >>> answer["without_biases"]["regime"], answer["with_biases"]["pays_up_to"]
        ('not covered', 4)
    """
    rows = np.asarray(data, np.float64)
    check_finite("data", rows)
    levels = [float(level) for level in np.atleast_1d(np.asarray(sigma, float))]
    for level in levels:
        check_level("sigma", level, zero=False)
    check_level("penalty", penalty)
    width = len(rows) if width is None else check_integer("width", width, minimum=1)
    if train and held_out is None:
        raise ValueError("train needs held_out: rows never trained on, beside which memorizing shows.")
    told = told or _silent
    distinct, first = np.unique(rows, axis=0, return_index=True)
    if len(distinct) < 2:
        raise ValueError(f"data has {len(rows)} rows but {len(distinct)} distinct one; two or more are needed.")
    facts = {
        "num_samples": len(rows),
        "num_distinct": len(distinct),
        "dim": rows.shape[1],
        "num_constant_pixels": int(np.sum(np.ptp(rows, axis=0) == 0)),
        "width": width,
        "penalty": float(penalty),
    }
    kept = rows[np.sort(first)]
    told(f"comparing {len(kept)} distinct rows of {rows.shape[1]} values")
    prices: list[list[Price]] = [[] for _ in levels]
    whole = project_on_hulls(kept, tolerance=TOLERANCE)
    for size in sizes_up_to(len(kept)):
        told(f"{size} rows: hulls, gates and objectives at {len(levels)} noise levels")
        some = kept[:size]
        hulls = whole if size == len(kept) else project_on_hulls(some, tolerance=TOLERANCE)
        for level, found in zip(levels, prices, strict=True):
            found.append(price_of_memory(some, level, penalty, width=width, hulls=hulls))
    facts |= {
        "repeats": np.setdiff1d(np.arange(len(rows)), first).tolist(),
        "inside_hull": np.sort(first)[whole.distances == 0].tolist(),
    }
    answers = [_answer(level, found, width) for level, found in zip(levels, prices, strict=True)]
    result: dict[str, Any] = {"data": facts | {"num_separable": _num_separable(kept)}, "answers": answers}
    if train:
        told(f"training {2 * len(levels) * seeds} networks of {width} units, {steps} steps each")
        _add_trained(result, rows, np.asarray(held_out), levels, width, float(penalty), steps, seeds, seed)
    return result


def sizes_up_to(n: int) -> list[int]:
    """2, 4, 8, ..., and n."""
    return sorted({n, *(2**k for k in range(1, n.bit_length()) if 2**k <= n)})


def _answer(sigma: float, prices: Sequence[Price], width: int) -> dict[str, Any]:
    whole = prices[-1]
    clear = [price for price in prices if price.hull > CLEAR * sigma]
    holds = whole.cosine < 0 and whole.num_samples <= width
    regime = _regime(whole.memorizing < whole.generalizing)
    # Closed forms whose gates are within the noise say that memorizing is not what they describe, and no more.
    if regime == "memorizing" and whole not in clear:
        regime = "undecided"
    return {
        "sigma": sigma,
        "without_biases": {
            "condition_holds": bool(holds),
            "regime": _regime(whole.plain_memorizing < whole.plain_generalizing) if holds else "not covered",
            "pays_up_to": pays_up_to(prices, biases=False),
        },
        "with_biases": {
            "condition_holds": whole.memorizable == whole.num_samples and whole in clear,
            "regime": regime,
            "pays_up_to": pays_up_to(clear),
        },
        "prices": [price._asdict() for price in prices],
    }


def _regime(memorizes: bool) -> str:
    return "memorizing" if memorizes else "generalizing"


def _num_separable(rows: Float[np.ndarray, "n d"]) -> int:
    """The largest count for which the greedy search finds rows with pairwise negative cosines; at least 1."""
    found = 1
    some = rows[np.linalg.norm(rows, axis=1) > 0][:SEARCHED]
    while found < len(some):
        try:
            separable_rows(some, found + 1)
        except ValueError:
            break
        found += 1
    return found


def _add_trained(
    result: dict[str, Any],
    rows: Float[np.ndarray, "n d"],
    held_out: Float[np.ndarray, "m d"],
    levels: Sequence[float],
    width: int,
    penalty: float,
    steps: int,
    seeds: int,
    seed: int,
) -> None:
    from sims.data.arrays import of_array
    from sims.sweeps.engine import sweep

    spec = Spec(
        num_samples=(len(rows),),
        width=(width,),
        penalty=(penalty,),
        sigma=tuple(levels),
        biases=(False, True),
        steps=steps,
        seeds=seeds,
        seed=seed,
        held_out=len(held_out),
    )
    # The rows that are held out are drawn anew: which rows are trained on is then a matter of the seed.
    pool = np.concatenate([rows, held_out])
    found = sweep(spec, ["gap", "train_error", "held_out_error", "num_aligned_columns"], data=of_array(pool))
    for answer in result["answers"]:
        for name, biases in (("without_biases", False), ("with_biases", True)):
            here = found.sel(biases=biases).isel(sigma=levels.index(answer["sigma"]))
            values = {key: np.asarray(here[key]).ravel() for key in ("gap", "train_error", "held_out_error")}
            answer[name]["trained"] = {
                **{key: float(value.mean()) for key, value in values.items()},
                "gap_spread": float(values["gap"].std(ddof=1)) if seeds > 1 else None,
                "aligned_columns": float(np.asarray(here["num_aligned_columns"]).mean()),
                "regime": _regime(bool(values["gap"].mean() > 0.5)),
            }


def as_text(result: dict[str, Any]) -> str:
    """One page of plain words and tables, as Markdown."""
    data = result["data"]
    n, distinct = data["num_samples"], data["num_distinct"]
    lines = [
        "# Does it memorize?",
        "",
        f"{n} samples of {data['dim']} values ({distinct} distinct), {data['width']} units, penalty "
        f"{data['penalty']:g}.",
    ]
    if data["num_constant_pixels"]:
        lines.append(f"{data['num_constant_pixels']} values are the same in all samples; they change nothing below.")
    for name, meaning in (
        ("repeats", "repeat an earlier sample"),
        ("inside_hull", "lie inside the hull of the others"),
    ):
        if data[name]:
            lines.append(f"{_rows(data[name])} {meaning}.")
    for answer in result["answers"]:
        lines += ["", f"## At noise sigma = {answer['sigma']:g}", "", *_words(answer, data), "", _table(answer)]
        rows = [(name.replace("_", " "), answer[name]["trained"]) for name in ("without_biases", "with_biases")
                if "trained" in answer[name]]  # fmt: skip
        if rows:
            cells = [
                (name, t["regime"], f"{t['gap']:.3g}", f"{t['train_error']:.4g}", f"{t['held_out_error']:.4g}",
                 f"{t['aligned_columns']:.3g}") for name, t in rows
            ]  # fmt: skip
            heads = ("trained", "regime", "gap", "error, training", "error, held out", "aligned columns")
            lines += ["", markdown(heads, cells)]
    return "\n".join(lines) + "\n"


def _words(answer: dict[str, Any], data: dict[str, Any]) -> list[str]:
    sigma, whole = answer["sigma"], answer["prices"][-1]
    plain, biased = answer["without_biases"], answer["with_biases"]
    lines = ["**Without biases.**"]
    if plain["condition_holds"]:
        lines.append(
            f"All cosines are negative (largest {whole['cosine']:.3g}), so the theorem applies: {plain['regime']}."
        )
    elif whole["cosine"] >= 0:
        lines.append(
            f"The largest cosine between two samples is {whole['cosine']:.3g}, and the theorem needs it below 0: it "
            f"says nothing about all of them. {_separable(data['num_separable'])}"
        )
    else:
        lines.append(f"{whole['num_samples']} samples need as many units; there are {data['width']}.")
    lines += ["", "**With biases.**"]
    inside = whole["num_samples"] - whole["memorizable"]
    lines.append(
        f"{whole['memorizable']} of {whole['num_samples']} samples can be memorized"
        + (f"; {inside} lie inside the hull of the others or are not worth the penalty. " if inside else ". ")
        + f"The median distance to the hull of the others is {whole['hull']:.3g}, {whole['hull'] / sigma:.3g} sigma"
        + ("." if whole["hull"] > CLEAR * sigma else f": less than {CLEAR:g}, so the closed forms are rough here.")
    )
    if whole["memorizable"] and whole["hull"] > CLEAR * sigma:
        lines.append(
            f"A memorizing unit multiplies noise by {whole['gain']:.3g}; the objective is {whole['memorizing']:.4g}, "
            f"against {whole['generalizing']:.4g} for generalizing."
        )
    upto = biased["pays_up_to"]
    lines.append(
        f"Prediction: **{biased['regime']}**. "
        + (
            "Memorizing pays for none of the sets in the table whose hulls are clear of the noise."
            if upto is None
            else f"Memorizing pays up to the largest set, n = {upto}."
            if upto == whole["num_samples"]
            else f"Of the sets in the table, memorizing pays up to n = {upto}."
        )
    )
    return lines


def _rows(numbers: Sequence[int]) -> str:
    some = ", ".join(map(str, numbers[:NAMED]))
    return f"Rows {some}{f' and {len(numbers) - NAMED} more' if len(numbers) > NAMED else ''}"


def _separable(count: int) -> str:
    if count < 2:
        return "No two of them have a negative cosine, as far as a greedy search finds."
    return f"A greedy search finds {count} of them with negative cosines."


def _table(answer: dict[str, Any]) -> str:
    heads = ("n", "memorizable", "hull", "gate", "gain", "memorizing", "generalizing", "largest cosine")
    rows = []
    for p in answer["prices"]:
        numbers = {name: f"{p[name]:.4g}" for name in ("hull", "gate", "gain", "memorizing", "generalizing", "cosine")}
        if p["hull"] <= CLEAR * answer["sigma"]:
            numbers["memorizing"] = "rough"
        rows.append((str(p["num_samples"]), str(p["memorizable"]), *numbers.values()))
    return markdown(heads, rows)


def _silent(line: str) -> None:
    del line
