"""The summary of a run, for the commands that end with one."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["summary_of", "write_summary"]


def summary_of(results: xr.Dataset, record: dict[str, Any]) -> str:
    """Markdown from the results and the record of a sweep (:func:`sims.store.reading.read`).

    ``ValueError`` for the run of another command.
    """
    from sims.study import report

    if "num_samples" not in record["spec"] or "measures" not in record["spec"]:
        what = ", ".join(map(str, results.data_vars))
        raise ValueError(
            f"this run is no sweep: it has {what}. The summary of a run of `python -m scaling` is the summary.md in "
            "its folder; its arrays open with xarray.open_zarr(DIR/results.zarr)."
        )

    # A record that was lost and written anew has no sessions.
    facts = record["sessions"][-1]["data"] if record["sessions"] else []
    return report.summary(results, record["spec"], facts, record["sessions"])


def write_summary(out: pathlib.Path, results: xr.Dataset, record: dict[str, Any], quiet: bool) -> None:
    """Write ``summary.md`` into the folder ``out``, and print it unless ``quiet``."""
    from sims.store.files import write_text

    text = summary_of(results, record)
    write_text(out / "summary.md", text)
    if not quiet:
        print(text)
        print(f"Written: {out}/results.zarr, {out}/spec.json, {out}/summary.md")
