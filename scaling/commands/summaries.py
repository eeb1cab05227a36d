"""Summaries of series: cells of their tables, and the files that the commands write."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["cell", "share_cell", "write_summary"]

SHOWN = 16
"""Samples of each network on the sheet."""


def cell(values: xr.DataArray) -> str:
    """Mean and standard error over seeds; "-" without finite values."""
    from sims.study.tables import mean_and_error

    return mean_and_error(values.values, missing="-")


def share_cell(copied: xr.DataArray, done: xr.DataArray | None) -> str:
    """The share of copies over seeds (seed, drawn) that are ``done``, with its interval over seeds and samples."""
    from scaling.measures.copies import share_over_networks

    # Those that are not computed yet have no samples.
    finished = copied if done is None else copied.isel(seed=done.values)
    counts = finished.sum("drawn").values.astype(int).tolist()
    if not counts:
        return "-"
    share = share_over_networks(counts, [finished.sizes["drawn"]] * len(counts))
    return f"{share.share:.3f} ({share.low:.3f} to {share.high:.3f})"


def write_summary(out: str, results: xr.Dataset, text: str, dims: tuple[str, ...]) -> str:
    """Write ``text`` as summary.md and samples as samples.png, one line for each network over ``dims``.

    Returns the list of what the run wrote, to print.
    """
    import numpy as np

    from scaling.study.pictures import contact_sheet, to_bytes, write_png
    from sims.store.files import write_text

    folder, files = Path(out), ["results.zarr", "spec.json", "summary.md", "models"]
    write_text(folder / "summary.md", text)
    samples = results.samples.isel(eta=0).transpose(*dims, "sample", "channel", "height", "width").values
    samples = samples.reshape(-1, *samples.shape[len(dims) :])[:, :SHOWN]
    tiles = samples.reshape(-1, *samples.shape[2:])
    networks = list(itertools.product(*(results[dim].values for dim in dims)))
    if tiles.shape[1] in (1, 3):
        # Networks that are not trained yet have no samples.
        pictures = to_bytes(np.nan_to_num(tiles))
        labels = [", ".join(f"{dim} {value}" for dim, value in zip(dims, network, strict=True)) for network in networks]
        write_png(folder / "samples.png", contact_sheet(pictures, samples.shape[1], row_labels=labels))
        files.insert(3, "samples.png")
    return f"Written: {', '.join(f'{out}/{name}' for name in files)}"
