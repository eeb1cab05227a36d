"""The comparison of representation and loss on hard cases, in words, as a table and as a sheet of altered images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from scaling.study.alterations import ALTERATIONS, alter
from scaling.study.items import MEMBERS, Items
from scaling.study.pictures import contact_sheet, to_bytes, write_png
from scaling.study.stress import CASES, FALSE_POSITIVE_RATE, SCORES, Finding
from sims.store.files import write_text
from sims.study.tables import csv_text, markdown

__all__ = ["report", "verdict", "write"]

SHOWN = 12
"""Images in a row of the sheet."""

MORE, LESS = "the representation tells more", "the loss tells more"

Findings: TypeAlias = Mapping[tuple[str, str], Finding]
"""By case and score."""


def verdict(representation: Finding, loss: Finding) -> str:
    """Which of the two tells, in words: by 95 % intervals of both areas and of their difference."""
    tells = [each.area.low > 0.5 for each in (representation, loss)]
    difference = representation.difference
    assert difference is not None
    if difference.low > 0:
        return MORE if tells[0] else "neither tells"
    if difference.high < 0:
        return LESS if tells[1] else "neither tells"
    if representation.area.value == loss.area.value == 1:
        return "both tell all apart"
    return {
        (True, True): "both tell; no difference shown",
        (True, False): "the representation tells; no difference shown",
        (False, True): "the loss tells; no difference shown",
        (False, False): "neither tells",
    }[tells[0], tells[1]]


def report(findings: Sequence[Finding], *, reference: str = "") -> str:
    """The report as Markdown; ``reference`` names the reference model if it is not the Gaussian."""
    of = {(each.case, each.score): each for each in findings}
    first = {name: of[CASES[0].name, name].option for name in SCORES}
    lines = [
        "# Does the representation know something that the loss does not?",
        "",
        *_answer(of),
        "",
        "## Chosen once, on images as they are",
        "",
        _areas(of, SCORES[:4]),
        "",
        *(f"* {case.name}: {case.words}." for case in CASES),
        "",
        f"Items: memorized / others. Representation: {first['representation']}. Loss: the denoising error at "
        f"{first['loss']}. Calibrated loss: the error of {reference or 'a Gaussian'} over that of the model, at "
        f"{first['calibrated loss']}. Combined: logistic regression on representation and loss. All were chosen or "
        "fitted on one half of the images as they are, and every case is rated on the other half, with DeLong's 95 % "
        "intervals over images, one-sided where a score separates all; differences are paired. In the case of "
        "near-duplicates both groups are of the same images, which makes the intervals too wide.",
        "",
        "## Chosen anew for each case",
        "",
        _areas(of, SCORES[4:], options=True),
        "",
        "Place and noise level were chosen on one half of the case's own images: what each tells where it tells most. "
        "A user who does not know how images were altered cannot choose so.",
        "",
        f"## Found at a threshold that {100 * FALSE_POSITIVE_RATE:g} % of the unaltered others exceed",
        "",
        markdown(
            ["case", *SCORES[:4]],
            [[case.name, *(_shares(of[case.name, name]) for name in SCORES[:4])] for case in CASES],
        ),
        "",
        "The share of the case's memorized images above the threshold, with the exact binomial 95 % interval, and "
        "after the stroke that of its others: a threshold set on images as they are meets altered ones.",
        "",
    ]
    return "\n".join(lines)


def write(
    out: str | Path, findings: Sequence[Finding], items: Items, *, reference: str = "", seed: int = 0
) -> list[Path]:
    """Write ``summary.md``, ``stress.csv`` and ``alterations.png``; returns their paths."""
    folder = Path(out)
    files = [folder / "summary.md", folder / "stress.csv"]
    write_text(files[0], report(findings, reference=reference))
    spread = [f"{name}{end}" for name in ("area", "difference", "found", "false") for end in ("", "_low", "_high")]
    rows = [[*each[:5], *itertools.chain(*(part or ("", "", "") for part in each[5:]))] for each in findings]
    write_text(files[1], csv_text([*Finding._fields[:5], *spread], rows))
    if items.images is not None and items.images.shape[1] in (1, 3):
        shown = items.images[np.isin(items.groups, MEMBERS)][:SHOWN]
        every = np.concatenate([shown, *(alter(shown, name, seed=seed) for name in ALTERATIONS)])
        files.append(folder / "alterations.png")
        write_png(files[2], contact_sheet(to_bytes(every), len(shown), row_labels=("as they are", *ALTERATIONS)))
    return files


def _answer(of: Findings) -> list[str]:
    """What the tables say, in sentences."""

    def cases(names: list[str]) -> str:
        return f"in {len(names)} of {len(CASES)} cases ({', '.join(names)})" if names else "in no case"

    def sentence(scores: Sequence[str], how: str) -> str:
        said = {case.name: verdict(*(of[case.name, name] for name in scores)) for case in CASES}
        better, worse = ([name for name, words in said.items() if words == each] for each in (MORE, LESS))
        return (
            f"**{how}, the representation tells memorized images better than the loss {cases(better)}; the loss tells "
            f"them better {cases(worse)}.**"
        )

    helped = [
        case.name
        for case in CASES
        if of[case.name, "combined"].area.low > max(of[case.name, name].area.value for name in SCORES[:2])
    ]
    return [
        sentence(SCORES[:2], "With place and noise level chosen once"),
        "",
        sentence(SCORES[4:], "With both chosen anew for each case"),
        "",
        "In the other cases their difference lies within its interval. Each interval misses in one case of twenty by "
        f"chance. The combined score's interval lies above both areas {cases(helped)}.",
    ]


def _areas(of: Findings, scores: Sequence[str], *, options: bool = False) -> str:
    head = ["case", "items", *scores, "representation less loss", "in words"]
    body = []
    for case in CASES:
        each = [of[case.name, name] for name in scores]
        difference = each[0].difference
        assert difference is not None
        areas = [f"{one.area.text()} at {one.option}" if options else one.area.text() for one in each]
        count = f"{each[0].num_positives} / {each[0].num_negatives}"
        body.append([case.name, count, *areas, difference.text(), verdict(*each[:2])])
    return markdown(head, body)


def _shares(finding: Finding) -> str:
    assert finding.found is not None
    assert finding.false is not None
    return f"{finding.found.text()} / {finding.false.value:.3f}"
