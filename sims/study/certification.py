"""What the theorems say about given data: conditions that hold, the regime of lowest objective, and a certificate.

Everything is closed-form or deterministic; nothing is trained. Numbers come from :mod:`dae_theory.structures`,
:mod:`dae_theory.conditions` and :mod:`dae_theory.certificate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dae_theory import conditions
from dae_theory.affine_gates import Memorized, memorize
from dae_theory.affine_minimizers import (
    affine_cells,
    affine_generalizing_cost,
    affine_generalizing_minimizer,
    affine_memorizing_minimizer,
)
from dae_theory.certificate import certify
from dae_theory.minimizers import block_minimizer
from dae_theory.model import live_columns
from dae_theory.risk import exact_objective
from dae_theory.structures import Structure, compare_structures
from sims.data import datasets
from sims.study.tables import markdown
from sims.sweeps.spec import Spec

__all__ = ["CLEAR", "as_text", "certification", "only_data", "regime"]

CLEAR = 3.0
"""Standard deviations of the noise that a margin must exceed: less than one draw in seven hundred crosses it."""


def certification(spec: Spec, *, max_size: int = 1500, told: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Conditions, predicted regime and certificate for the data of ``spec`` at each of its σ, as JSON values.

    The clusters of the generalizing candidate are the classes of the data set, or one cluster of all rows if it has no
    classes. If no unit is live, the reason replaces the certificate. The Hessian is diagonalized if it has at most
    ``max_size`` rows. ``told`` is called with a line before whatever may take long. ``ValueError`` for more than one n,
    width or penalty, and for errors of the data set.

    With ``biases`` the candidates are those of :mod:`dae_theory.affine_minimizers`: the network that memorizes every
    row it can, if there are two rows and as many units as rows, and the affine one.
    """
    data = only_data(spec, "certify one at a time")
    rows, width, penalty = jnp.asarray(data.train), spec.width[0], spec.penalty[0]
    facts = datasets.describe(data) | {"width": width, "penalty": penalty}
    if spec.biases[0]:
        facts |= {"biases": True}
        entries = [_with_biases(rows, sigma, penalty, width, max_size, told or _silent) for sigma in spec.sigma]
    else:
        entries = [
            _at(rows, data.train_labels, sigma, penalty, width, max_size, told or _silent) for sigma in spec.sigma
        ]
    return {"data": facts, "certificates": entries}


def only_data(spec: Spec, advice: str, *, every: bool = False) -> datasets.Dataset:
    """The data of a spec of which only σ may have several values, or all of its training rows, as float64.

    ``ValueError`` with ``advice`` for several values of another axis, and for errors of the data set.
    """
    for name in ("dataset", "separation", "duplicates", "num_samples", "width", "penalty", "biases"):
        if len(getattr(spec, name)) > 1:
            raise ValueError(f"{name} has {len(getattr(spec, name))} values: {advice}; only sigma may vary.")
    n, duplicates = spec.num_samples[0], spec.duplicates[0]
    return datasets.load(
        spec.source(spec.dataset[0], *spec.separation),
        num_samples=None if every else n,
        held_out=spec.held_out_size,
        seed=spec.split_seed,
        center=spec.center,
        separable=spec.separable,
        duplicates=duplicates,
        singles=n - math.prod(datasets.parse_duplicates(duplicates)) if duplicates else 0,
        dtype=np.float64,
    )


def regime(data: np.ndarray, structure: Structure) -> str:
    """``memorizing`` if every block with units is one distinct row, ``generalizing`` if none is, else ``hybrid``."""
    live = [block for block, rank in enumerate(structure.ranks) if rank]
    single = [len(np.unique(data[structure.labels == block], axis=0)) == 1 for block in live]
    if not single:
        return "empty"
    return "memorizing" if all(single) else "hybrid" if any(single) else "generalizing"


def as_text(result: dict[str, Any]) -> str:
    """The result of :func:`certification` as Markdown tables."""
    data = result["data"]
    lines = [
        "# Certificate",
        "",
        f"{data['num_samples']} rows of {data['name']} in dimension {data['dim']}, width {data['width']}, "
        f"penalty {data['penalty']:g}{', with biases' if data.get('biases') else ''}.",
    ]
    for entry in result["certificates"]:
        lines += ["", f"## sigma = {entry['sigma']:g}: {_heading(entry)}", "", entry["search"].capitalize() + ".", ""]
        structures = [
            (s["name"], s["regime"], f"{s['objective']:.6g}", s["units"], _number(s["margin"]), _yes(s["holds"]))
            for s in entry["structures"]
        ]
        checked = [
            (row["name"], _yes(row["holds"]), _number(row["slack"]), row["explanation"]) for row in entry["conditions"]
        ]
        values = [(name.replace("_", " "), _number(value)) for name, value in entry["certificate"].items()]
        lines += [markdown(("structure", "regime", "objective", "units", "margin", "trusted"), structures), ""]
        lines += [markdown(("condition", "holds", "slack", ""), checked), ""]
        lines += [markdown(("certificate", ""), values)]
    return "\n".join(lines) + "\n"


def _silent(line: str) -> None:
    del line


def _at(
    rows: Any,
    classes: np.ndarray,
    sigma: float,
    penalty: float,
    width: int,
    max_size: int,
    told: Callable[[str], None],
) -> dict[str, Any]:
    labels = classes if np.all(classes >= 0) else np.zeros(len(classes), int)
    # No gate separates equal rows of two classes: they take the class of the first one.
    _, first, inverse = np.unique(np.asarray(rows), axis=0, return_index=True, return_inverse=True)
    told(f"sigma = {sigma:g}: comparing structures of {len(rows)} rows")
    candidates = compare_structures(rows, labels[first][inverse.ravel()], sigma, penalty, width)
    best = candidates[0]
    ranks = best.ranks
    entry = {
        "sigma": sigma,
        "regime": regime(np.asarray(rows), best),
        "search": f"best of {best.search}: {best.name}",
        "structures": [
            {
                "name": s.name,
                "regime": regime(np.asarray(rows), s),
                "objective": s.energy,
                "units": sum(s.ranks),
                "ranks": s.ranks,
                "margin": _finite(s.margin),
                "holds": s.holds,
            }
            for s in candidates
        ],
    }
    if not any(ranks):
        reason = {"left_out": "no direction lowers the objective by more than its penalty: the minimizer is zero"}
        return entry | {"conditions": [], "certificate": reason}
    told(f"sigma = {sigma:g}: conditions of the {len(ranks)} clusters")
    checked = conditions.check_conditions(rows, best.labels, sigma, penalty, ranks, width=width)
    dae = block_minimizer(rows, best.labels, sigma, penalty, ranks, width=width)
    checks = [row._asdict() | {"slack": _finite(row.slack)} for row in conditions.rows(checked)]
    return entry | {"conditions": checks, "certificate": _certificate(dae, rows, sigma, penalty, max_size, told)}


def _with_biases(
    rows: Any, sigma: float, penalty: float, width: int, max_size: int, told: Callable[[str], None]
) -> dict[str, Any]:
    """The entry of one noise level, for networks with biases."""
    told(f"sigma = {sigma:g}: comparing structures of {len(rows)} rows, with biases")
    n, rank = len(rows), min(width, rows.shape[1])
    affine = affine_generalizing_minimizer(rows, sigma, penalty, rank, width=width)
    energy = affine_generalizing_cost(rows, sigma, penalty, rank)
    candidates = [("one affine map, gates beyond all rows", "generalizing", affine, energy)]
    checks: list[dict[str, Any]] = []
    repeats = n - len(np.unique(np.asarray(rows), axis=0))
    if 2 <= n <= width and not repeats:
        found = memorize(np.asarray(rows), sigma, penalty)
        memorizing = affine_memorizing_minimizer(rows, sigma, penalty, width=width, memorized=found)
        candidates.append(("every row its own unit", "memorizing", memorizing, found.objective))
        checks = _hull_conditions(found, sigma)
    else:
        reason = (
            "one row needs no gate"
            if n < 2
            else f"{repeats} rows repeat others, which the closed form with biases does not know"
            if repeats
            else f"{n} rows need as many units; there are {width}"
        )
        checks = [{"name": "distinct_units", "holds": False, "slack": float(width - n), "explanation": reason}]
    candidates.sort(key=lambda candidate: candidate[3])
    structures = []
    for name, kind, dae, objective in candidates:
        cells = affine_cells(dae, rows)
        live = int(np.sum(live_columns(dae, tolerance=1e-12)))
        structures.append(
            {
                "name": name,
                "regime": kind if live else "empty",
                "objective": objective,
                "units": live,
                "margin": _finite(cells.margin),
                "holds": cells.margin > CLEAR * sigma,
            }
        )
    best = candidates[0][2]
    entry = {
        "sigma": sigma,
        "regime": structures[0]["regime"],
        "search": f"best of the {len(candidates)} closed forms with biases: {structures[0]['name']}",
        "structures": structures,
        "conditions": checks,
    }
    return entry | {"certificate": _certificate(best, rows, sigma, penalty, max_size, told)}


def _hull_conditions(found: Memorized, sigma: float) -> list[dict[str, Any]]:
    """What takes the place of the theorem's inequalities: every row outside the hull of the others, by enough."""
    inside = int(np.sum(found.hulls == 0))
    kept = int(np.sum(found.gains > 0))
    return [
        {
            "name": "convex_position",
            "holds": inside == 0,
            "slack": float(found.hulls.min()),
            "explanation": f"every row outside the hull of the others; {inside} of {len(found.hulls)} are inside",
        },
        {
            "name": "hull_distance",
            "holds": bool(found.hulls.min() > CLEAR * sigma),
            "slack": float(found.hulls.min() - CLEAR * sigma),
            "explanation": f"distance from that hull above {CLEAR:g} sigma, so that noise seldom crosses a gate",
        },
        {
            "name": "penalty",
            "holds": kept == len(found.gains),
            "slack": float(found.gains.min()),
            "explanation": f"the penalty leaves every row a unit; {kept} of {len(found.gains)} have one",
        },
    ]


def _certificate(
    dae: Any, rows: Any, sigma: float, penalty: float, max_size: int, told: Callable[[str], None]
) -> dict[str, Any]:
    live = int(np.sum(live_columns(dae, tolerance=1e-12)))
    if not live:
        return {"left_out": "every direction is clipped: the minimizer is zero"}
    c = certify(dae, rows, sigma, penalty, max_size=max_size, told=lambda line: told(f"sigma = {sigma:g}: {line}"))
    return {
        "objective": float(exact_objective(c.refined, rows, sigma, penalty)),
        "gradient_norm": float(c.gradient_norm),
        "refined_gradient_norm": float(c.refined_gradient_norm),
        "converged": bool(c.converged),
        "distance_sq": float(c.distance_sq),
        "min_curvature": float(c.min_curvature),
        "min_curvature_modulo_symmetry": float(c.min_curvature_modulo_symmetry),
        "curvature_error": float(c.curvature_error),
        "num_live": int(c.num_live),
        "num_symmetries": int(c.num_symmetries),
        "num_rotations": int(c.num_rotations),
        "min_rotation_curvature": _finite(float(c.min_rotation_curvature)),
        "turn_change": _finite(float(c.turn.change)),
        "turn_degrees": float(c.turn.degrees),
        "new_unit_slack": float(c.dead.slack),
        "verdict": c.verdict,
        "strict": bool(c.strict),
    }


def _heading(entry: dict[str, Any]) -> str:
    """The regime, with what is known of it: certified, or predicted by energies alone."""
    if entry["regime"] == "empty":
        return "empty"
    certificate, met = entry["certificate"], all(row["holds"] for row in entry["conditions"])
    # Columns have norms of at most about 1, in both matrices.
    near = certificate.get("strict") and certificate["distance_sq"] < 1e-2 * certificate["num_live"]
    if near and met and entry["structures"][0]["holds"]:
        return f"{entry['regime']}, certified"
    conditions_are = "conditions hold" if met else "conditions fail"
    if certificate.get("strict"):
        distance = certificate["distance_sq"]
        certified = f"certified: a strict minimum at squared distance {distance:.2g}"
        return f"predicted: {entry['regime']} ({conditions_are}; {certified})"
    reason = certificate.get("verdict")
    return f"predicted: {entry['regime']} ({conditions_are}, not certified{f': {reason}' if reason else ''})"


def _finite(value: float) -> float | None:
    """None for an infinite slack, of a condition that always holds here: JSON has no infinity."""
    return float(value) if math.isfinite(value) else None


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return _yes(value) if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
