"""The notation of repeated rows, ``KxM``: K rows, M times each. Imports nothing, so that command lines start fast."""

from __future__ import annotations

__all__ = ["parse_duplicates"]


def parse_duplicates(text: str) -> tuple[int, int]:
    """``"20x60"`` as (20, 60): 20 rows, 60 times each. ``ValueError`` unless both are positive integers."""
    try:
        count, times = (int(part) for part in text.lower().split("x"))
    except ValueError:
        count = times = 0
    if count < 1 or times < 1:
        raise ValueError(f"duplicates must be KxM, K rows M times each, as in 20x60; got {text!r}.")
    return count, times
