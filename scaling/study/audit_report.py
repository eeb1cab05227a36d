"""An audit as a report in words and as one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scaling.measures.copies import RATIO
from scaling.measures.neighbors import Training, rows_of
from scaling.study.audit import RISK
from scaling.study.pictures import contact_sheet, to_bytes, to_picture
from sims.store.files import write_text
from sims.study.tables import markdown

__all__ = ["SHOWN", "page", "report", "write"]

SHOWN = 24
"""Copied images that reports list, and pictures show."""


def report(audit: Mapping[str, Any]) -> str:
    """The audit in words, as Markdown."""
    drawn, copied = audit["samples"], audit["copied"]
    share = f"{100 * drawn['share']:.3g} % ({100 * drawn['low']:.3g} to {100 * drawn['high']:.3g} %, Wilson, 95 %)"
    lines = [
        "# Audit of a diffusion model",
        "",
        f"**{drawn['copies']} of {drawn['count']} samples are copies of training images: {share}.** "
        + (
            f"They are of {len(copied)} of the {audit['training']['images']} training images."
            if copied
            else "So many samples exclude, at 95 %, that more than "
            f"{100 * drawn['excluded_above']:.3g} % of samples are copies; smaller shares they cannot exclude."
        ),
        "",
        f"A copy is a sample at least {1 / RATIO:.0f} times nearer to a training image than to any other image; images "
        f"within {audit['setting']['near']:g} (root mean square over pixels in [-1, 1]) count as one. The interval "
        "covers the choice of samples from this model by this sampler, not other samplers, prompts or trainings.",
        "",
    ]
    if drawn["not_finite"]:
        lines += [f"{drawn['not_finite']} samples are not finite, and count as no copies.", ""]
    if copied:
        body = [[entry["image"], entry["copies"], entry["exact"], entry["near"]] for entry in copied[:SHOWN]]
        lines += [
            "## Which images, and how often they stand in the training data",
            "",
            markdown(["training image", "copies among the samples", "times, exactly", "times, nearly"], body),
            *([f"and {len(copied) - SHOWN} more, in audit.json"] if len(copied) > SHOWN else []),
            "",
        ]
    if audit["membership"]:
        body = [
            [name, f"{each['area']:.3f} ({each['low']:.3f} to {each['high']:.3f})", each["train"], each["held_out"]]
            for name, each in audit["membership"].items()
        ]
        lines += [
            "## Can training images be told from others?",
            "",
            markdown(["score", "AUROC", "training images", "held-out images"], body),
            "",
            "The probability that a training image scores higher than a held-out one, with DeLong's 95 % interval over "
            "images; 1/2 means that the score does not tell. It is over all training images: few that are memorized "
            "may hide among many that are not, and stand in the next list.",
            "",
        ]
    if audit["at_risk"]:
        body = [[entry["image"], ", ".join(entry["scores"])] for entry in audit["at_risk"][:SHOWN]]
        lines += [
            f"## At risk, although never generated here: {len(audit['at_risk'])}",
            "",
            markdown(["training image", f"scores above those of all but {100 * RISK:g} % of held-out images"], body),
            "",
            "Of training images that are as safe as held-out ones, about that share would stand here by chance, for "
            "each score.",
            "",
        ]
    if audit.get("against"):
        then = audit["against"]
        was = f"{100 * then['share']:.3g} % ({100 * then['low']:.3g} to {100 * then['high']:.3g} %)"
        lines += [
            "## Against the earlier audit",
            "",
            f"The share of copies was {was}"
            + ("" if then["same_training_data"] else ", with other training data")
            + f". {len(then['newly_copied'])} images are copied now and were not then, {len(then['no_longer_copied'])} "
            "the other way round"
            + (
                "; the intervals overlap, so chance alone may explain the difference."
                if max(then["low"], drawn["low"]) <= min(then["high"], drawn["high"])
                else "; the intervals do not overlap."
            ),
            "",
        ]
    return "\n".join(lines)


def page(audit: Mapping[str, Any], drawn: xr.Dataset, training: Training, *, pictures: bool = True) -> str:
    """One HTML page of the audit that needs no other file, with copies beside their originals if they are kept."""
    body = [f"<p>{html.escape(line)}</p>" if line[:1] not in "#|" else _tag(line) for line in _blocks(report(audit))]
    if pictures and "images" in drawn and training.shape[0] in (1, 3):
        copied = np.flatnonzero(drawn.distance.values < RATIO * drawn.second.values)[:SHOWN]
        if len(copied):
            originals = rows_of(training.images, drawn.nearest.values[copied].tolist()).reshape(-1, *training.shape)
            pairs = np.stack([drawn.images.values[copied], originals], axis=1)
            sheet = contact_sheet(to_bytes(pairs.reshape(-1, *training.shape)), min(12, 2 * len(copied)))
            data = io.BytesIO()
            to_picture(sheet).save(data, format="PNG")
            encoded = base64.b64encode(data.getvalue()).decode()
            body.append(
                "<h2>Copies, each with its training image on the right</h2>"
                f'<img alt="samples beside training images" src="data:image/png;base64,{encoded}">'
            )
    style = (
        "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #999;padding:.2em .6em;text-align:left}img{max-width:100%;image-rendering:pixelated}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit</title><style>{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def write(
    out: str | Path, audit: Mapping[str, Any], drawn: xr.Dataset, training: Training, *, pictures: bool = True
) -> list[Path]:
    """Write ``audit.json``, ``audit.md`` and ``audit.html``; returns their paths."""
    folder = Path(out)
    texts = {
        "audit.json": json.dumps(audit, indent=1),
        "audit.md": report(audit),
        "audit.html": page(audit, drawn, training, pictures=pictures),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _blocks(text: str) -> list[str]:
    return [block for block in text.split("\n\n") if block.strip()]


def _tag(block: str) -> str:
    if block.startswith("#"):
        level = len(block) - len(block.lstrip("#"))
        return f"<h{level}>{html.escape(block.lstrip('# ').strip())}</h{level}>"
    head, _, *rows = [
        [html.escape(cell.strip()) for cell in line.strip("|").split(" | ")] for line in block.splitlines()
    ]
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"
