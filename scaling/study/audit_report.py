"""An audit as a report in words and as one HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markdown_it import MarkdownIt

from scaling.measures.copies import RATIO
from scaling.measures.neighbors import Training, rows_of
from scaling.study.audit import RISK
from scaling.study.pictures import contact_sheet, to_bytes, to_picture
from sims.store.files import write_text
from sims.study.tables import literal, markdown

__all__ = ["SHOWN", "page", "report", "write"]

SHOWN = 24
"""Copied images that reports list, and pictures show."""


def report(audit: Mapping[str, Any]) -> str:
    """The audit in words, as Markdown."""
    drawn, copied, sigma = audit["samples"], audit["copied"], audit["setting"]["coverage_sigma"]
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
        _distance(audit["distance"]) + " The interval covers the choice of samples from this model by this sampler, "
        "not other samplers, prompts or trainings.",
        "",
    ]
    if drawn["not_finite"]:
        lines += [f"{drawn['not_finite']} samples are not finite, and count as no copies.", ""]
    if copied:
        body = [
            [literal(entry["image"]), entry["copies"], entry["exact"], entry["near"], _coverage(entry)]
            for entry in copied[:SHOWN]
        ]
        head = [
            "training image",
            "copies among the samples",
            "times, exactly",
            "times, nearly",
            f"coverage, σ = {sigma:g}",
        ]
        lines += [
            "## Which images, and how often they stand in the training data",
            "",
            markdown(head, body),
            "",
            *_rest(copied),
        ]
    if audit["membership"]:
        body = [
            [
                literal(name),
                f"{each['area']:.3f} ({each['low']:.3f} to {each['high']:.3f})",
                each["train"],
                each["held_out"],
            ]
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
        body = [
            [literal(entry["image"]), ", ".join(map(literal, entry["scores"])), _coverage(entry)]
            for entry in audit["at_risk"][:SHOWN]
        ]
        above = f"scores above those of all but {100 * RISK:g} % of held-out images"
        lines += [
            f"## At risk, although never generated here: {len(audit['at_risk'])}",
            "",
            markdown(["training image", above, f"coverage, σ = {sigma:g}"], body),
            "",
            *_rest(audit["at_risk"]),
            "Of training images that are as safe as held-out ones, about that share would stand here by chance, for "
            "each score.",
            "",
        ]
    if copied or audit["at_risk"]:
        lines += [
            f"The coverage of an image is the sum of exp(-d²/2σ²) over all other training images at distances d, over "
            f"pixels in [-1, 1], for noise σ = {sigma:g}: far below 1, no other image competes with it at this noise, "
            "and a model that fits the data exactly returns it. Each exact repeat of an image adds 1, though repeats "
            "make copying easier.",
            "",
        ]
    if audit.get("contamination"):
        lines += [_contamination(audit["contamination"]), ""]
    if audit.get("against"):
        then = audit["against"]
        was = f"{100 * then['share']:.3g} % ({100 * then['low']:.3g} to {100 * then['high']:.3g} %)"
        lines += [
            "## Against the earlier audit",
            "",
            f"The share of copies was {was}"
            + ("" if then["same_training_data"] else ", with other training data")
            + ("" if then["same_distance"] else ", by another distance")
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
    # Names are escaped by the report; nothing in it is a link or a picture from elsewhere.
    markup = (
        MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink", "html_inline"])
    )
    body = [markup.render(report(audit))]
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


def _distance(used: Mapping[str, Any]) -> str:
    """By what samples and images were compared, in words."""
    mirrors = " or its mirror image" if used["mirrors"] else ""
    rule = (
        f"A copy is a sample at least {1 / RATIO:.0f} times nearer to a training image{mirrors} than to any other image"
    )
    if not used["identity"]:
        return f"{rule}; images within {used['near']:g} (root mean square over pixels in [-1, 1]) count as one."
    return (
        f"{rule}. Samples and images are compared by {literal(used['features'])}, of unit length, not by pixels; "
        f"images whose vectors are within {used['near']:g} (a chord, from 0 to 2) count as one. How often an image "
        f"stands in the training data is counted in pixels, nearly: within {used['pixel_near']:g} (root mean square, "
        "of pixels in [-1, 1])."
    )


def _coverage(entry: Mapping[str, Any]) -> str:
    return f"{entry['coverage']:.2g}" if entry["coverage"] else "below 1e-300"


def _rest(entries: Sequence[Any]) -> list[str]:
    return [f"And {len(entries) - SHOWN} more, in audit.json.", ""] if len(entries) > SHOWN else []


def _contamination(found: Mapping[str, Any]) -> str:
    differ = "".join(f", {name}s" for name in found["augment"])
    return (
        f"**Invariant contamination ratio** at {literal(found['tap'])}, timestep {found['timestep']}: "
        f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}, jackknife over images, 95 %), of "
        f"{found['images']} training images in {found['views']} views each (noise{differ}). Near 0 features differ far "
        "more between images than between views of one, near 1 they show little but the view. We know it second-hand "
        "(arXiv 2606.09718): there it falls in training and, with few data, rises again before copies appear, so "
        "compare it between checkpoints at one setting."
    )
