"""Tables as Markdown, CSV and Parquet, and means with standard errors as they stand in them."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sims.data.folders import printable

__all__ = ["csv_text", "literal", "markdown", "mean_and_error", "parquet_bytes", "standard_error"]


def markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table without a newline at its end. ``ValueError`` for a row of another length than the head."""
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells under {len(head)} heads: {list(row)}.")
        lines.append(_line(row))
    return "\n".join(lines)


def literal(text: Any) -> str:
    r"""Text of a user, such as the name of a file, within a line of Markdown that shows it as it is.

    >>> print(literal("a_b <b>*[x](y)"))
    a_b \<b\>\*[x\](y)
    """
    # Underscores within words are none, nor are brackets that no link follows.
    marks = r"[\\`*<>&~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])"
    return re.sub(marks, r"\\\g<0>", printable(text))


def csv_text(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV. Text that a spreadsheet would run as a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    runs = ("=", "+", "@")
    writer.writerows([[f"'{v}" if isinstance(v, str) and v.startswith(runs) else v for v in row] for row in rows])
    return text.getvalue()


def parquet_bytes(columns: Mapping[str, Any]) -> bytes | None:
    """A table as a Parquet file; None if pyarrow is not installed, which comes with ``pip install .[data]``."""
    if importlib.util.find_spec("pyarrow") is None:
        return None
    import pandas as pd

    data = io.BytesIO()
    pd.DataFrame(dict(columns)).to_parquet(data, engine="pyarrow", index=False)
    return data.getvalue()


def standard_error(values: Float[np.ndarray, "*n"]) -> tuple[float, float]:
    r"""Mean of the finite values and its standard error; NaN where there are too few (none, or one).

    .. math:: \bar v = \frac1m \sum_i v_i, \qquad \sqrt{\frac{1}{m (m - 1)} \sum_i (v_i - \bar v)^2}
    """
    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if finite.size else math.nan
    return mean, float(finite.std(ddof=1) / math.sqrt(finite.size)) if finite.size > 1 else math.nan


def mean_and_error(values: Float[np.ndarray, "*n"], *, missing: str = "not defined") -> str:
    """``0.123 ± 0.004``, of the finite values; one value has no error, and without any it is ``missing``."""
    mean, error = standard_error(values)
    if math.isnan(mean):
        return missing
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} ± {error:.1g}"


def _line(cells: Sequence[Any]) -> str:
    shown = (str(cell).replace("|", "\\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in shown)
