"""What detectors found, as a report, tables and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from scaling.detection.detectors import Detector
from scaling.detection.evaluation import threshold_at
from scaling.detection.options import DetectionSetting
from scaling.measures.copies import Copies
from scaling.study.detection import OverSeeds, Row, columns, finite_items
from scaling.study.items import Items
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from sims.store.files import write_bytes, write_text
from sims.study.tables import csv_text, markdown, parquet_bytes

__all__ = ["SHOWN", "report", "seed_lines", "write_sheet", "write_tables"]

SHOWN = 48
"""Items on the sheet."""


def report(
    results: xr.Dataset,
    detectors: Sequence[Detector],
    rows: Sequence[Row],
    setting: DetectionSetting,
    *,
    false_positive_rate: float = 0.01,
) -> str:
    """The report as Markdown: what was scored, how well each detector tells, and what each costs."""
    counts = {name: int(np.sum(results.group.values == name)) for name in dict.fromkeys(results.group.values.tolist())}
    bad = int(np.sum(~finite_items(results, [detector.name for detector in detectors])))
    lines = [
        "# Memorization detection",
        "",
        f"{results.sizes['image']} items: {', '.join(f'{count} {name}' for name, count in counts.items())}."
        + (f" {bad} have scores that are not finite, and count for nothing below." if bad else ""),
        "",
        *_prompt_lines(results),
    ]
    if not rows:
        lines += [
            "No detector can be rated: that takes at least two items that are known to be memorized and two that are "
            "known not to be, four of each where a tap or noise level is chosen. Give --known-members and "
            "--known-others, or a model with a record of its training (membership.json). Scores are in scores.csv.",
            "",
        ]
    for positive, negative in dict.fromkeys((row.positives, row.negatives) for row in rows):
        these = [row for row in rows if (row.positives, row.negatives) == (positive, negative)]
        lines += [*_table(these, positive, negative, false_positive_rate), ""]
    if rows:
        lines += [_reading(false_positive_rate), ""]
    lines += ["## Cost", "", _costs(detectors, setting, float(results.seconds.mean())), ""]
    return "\n".join(lines)


def seed_lines(rows: Sequence[OverSeeds]) -> list[str]:
    """The section on several runs as lines of Markdown."""
    if not rows:
        return []
    head = ["detector", "at", "others", "items", "mean AUROC", "lowest to highest"]
    body = [
        [
            row.detector,
            row.option or "-",
            row.negatives.replace("_", " "),
            f"{row.num_positives} / {row.num_negatives}",
            row.area.text(),
            f"{row.lowest:.3f} to {row.highest:.3f}",
        ]
        for row in rows
    ]
    return [
        f"## Mean over {rows[0].seeds} runs",
        "",
        markdown(head, body),
        "",
        f"The mean area over {rows[0].seeds} runs with other seeds, with its 95 % interval over seeds and items, and "
        "the lowest and highest area of a run.",
        "",
    ]


def write_tables(
    out: str | Path,
    results: xr.Dataset,
    detectors: Sequence[Detector],
    rows: Sequence[Row],
    text: str,
    *,
    false_positive_rate: float = 0.01,
    nearest: Copies | None = None,
    names: Sequence[str] = (),
) -> list[Path]:
    """Write ``summary.md``, ``scores.csv`` (a line for each item) and ``evaluation.csv``; returns their paths.

    With pyarrow also ``scores.parquet``, the same table in full precision. It has every score under every tap and level
    (``std@mid_block``), and, where items of another group than the training's are known, the share of them with a lower
    score (``..._percentile``). With ``nearest`` it has the number of the nearest training image among them, its row or
    file if ``names`` has those of the training images, its distance, and whether the ratio test calls the item a copy
    of it.
    """
    folder = Path(out)
    table: dict[str, Any] = {
        "number": range(results.sizes["image"]),
        **{name: results[name].values.tolist() for name in ("name", "group", "prompt", "kind")},
    }
    groups = results.group.values
    reference = np.isin(groups, ("held_out", "others"))
    for detector in detectors:
        for label, values in columns(results, detector.name):
            table[label] = values
            known = np.sort(values[reference & np.isfinite(values)])
            if len(known):
                table[f"{label}_percentile"] = 100 * np.searchsorted(known, values) / len(known)
                table[f"{label}_flagged"] = (values > threshold_at(known, false_positive_rate)).astype(int)
    if nearest is not None:
        table["nearest_training_image"] = nearest.nearest
        if names:
            # Bytes of a file's name that are not UTF-8 cannot be written as text.
            shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
            table["nearest_training_name"] = [shown[number] for number in nearest.nearest.tolist()]
        table["distance"], table["distance_ratio"] = nearest.distance, nearest.ratio
        table["is_copy"] = nearest.is_copy.astype(int)
    files = [folder / "summary.md", folder / "scores.csv", folder / "evaluation.csv"]
    write_text(files[0], text)
    write_text(files[1], csv_text(list(table), zip(*map(_shown, table.values()), strict=True)))
    head = [
        *Row._fields[:6],
        *("area", "area_low", "area_high", "rate", "rate_low", "rate_high"),
        *("false_positive_rate_high", "threshold", "resolution"),
    ]
    body = [
        [*row[:6], *row.area, *row.rate.flagged_positives, row.rate.flagged_negatives.high, *row.rate[::3]]
        for row in rows
    ]
    write_text(files[2], csv_text(head, body))
    if (data := parquet_bytes(table)) is not None:
        files.append(folder / "scores.parquet")
        write_bytes(files[3], data)
    return files


def _shown(column: Any) -> Any:
    """Six digits of what is computed in floating point."""
    if isinstance(column, np.ndarray):
        return [f"{value:.6g}" for value in column] if column.dtype.kind == "f" else column.tolist()
    return column


def _table(rows: Sequence[Row], positive: str, negative: str, rate: float) -> list[str]:
    names = {"train": "trained on once", "held_out": "never trained on", "others": "others, as given"}
    kind = "" if positive == "all" else f" by a {positive} prompt"
    head = ["detector", "at", "items", "AUROC", f"found at {100 * rate:g} %", "false alarms at most", "less the first"]
    body = [
        [
            row.detector,
            row.option or "-",
            f"{row.num_positives} / {row.num_negatives}",
            row.area.text(),
            row.rate.flagged_positives.text(),
            f"{row.rate.flagged_negatives.high:.3f}",
            "-" if row.difference is None else row.difference.text(),
        ]
        for row in rows
    ]
    return [f"## Memorized{kind} against {names[negative]}", "", markdown(head, body)]


def _reading(rate: float) -> str:
    return (
        "Items: memorized / others. AUROC: the probability that a memorized item scores higher than another, with "
        "DeLong's 95 % interval, one-sided where the groups separate. Found: the share of memorized items above the "
        f"threshold that at most {100 * rate:g} % of these others exceed, with the exact binomial interval; with fewer "
        f"than {round(1 / rate)} others that means above all of them. False alarms: the upper end of the exact 95 % "
        "interval for the rate of other such images. Less the first: the area less that of the table's first detector "
        "on the same images, with DeLong's paired interval. All intervals cover the choice of items, not other models "
        'or noise. Where a tap or noise level stands under "at", it was chosen on one half of the items, and the '
        "numbers are from the other half."
    )


def _prompt_lines(results: xr.Dataset) -> list[str]:
    groups, prompts = results.group.values, results.prompt.values
    if not any(prompts):
        return []
    counts = [f"{len(set(prompts[groups == name]))} of {name}" for name in dict.fromkeys(groups.tolist())]
    return [
        f"Distinct prompts: {', '.join(counts)}. Scores of prompts differ among items of one prompt by their noise "
        "alone: intervals take items as independent, and are too narrow where prompts are few.",
        "",
    ]


def _costs(detectors: Sequence[Detector], setting: DetectionSetting, seconds: float) -> str:
    body = [[each.name, ", ".join(each.needs), f"{each.passes(setting):g}", each.source or "-"] for each in detectors]
    return (
        f"{markdown(['detector', 'needs', 'passes', 'source'], body)}\n\n"
        "Passes of the network per item, a derivative along a direction counted as two; detectors that share a probe "
        f"share its passes. All together took {seconds:.3g} s per item, compilation included."
    )


def write_sheet(
    out: str | Path,
    results: xr.Dataset,
    detector: Detector,
    items: Items,
    *,
    nearest: Copies | None = None,
    train: Float[np.ndarray, "m c h w"] | None = None,
) -> list[Path]:
    """Write ``sheet.png``: images by falling score of ``detector``, each with the nearest training image beside it.

    Writes nothing for prompts alone, and for images that are neither gray nor color.
    """
    if items.images is None or items.images.shape[1] not in (1, 3):
        return []
    values = results[detector.name].transpose(..., "image").values.reshape(-1, len(items.groups))[0]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:SHOWN]
    tiles = items.images[order]
    if nearest is not None and train is not None:
        tiles = np.stack([tiles, train[nearest.nearest[order]]], axis=1).reshape(-1, *tiles.shape[1:])
    write_png(Path(out) / "sheet.png", contact_sheet(to_bytes(tiles), min(12, len(tiles))))
    return [Path(out) / "sheet.png"]
