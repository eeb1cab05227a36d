"""Names of the built-in measures (:mod:`sims.sweeps.measures`); imports nothing, so that command lines start fast."""

from __future__ import annotations

__all__ = ["DEFAULT", "NAMES"]

DEFAULT: tuple[str, ...] = (
    "objective",
    "train_error",
    "held_out_error",
    "gap",
    "distance_to_empirical_train",
    "distance_to_empirical_held_out",
    "distance_to_population_train",
    "distance_to_population_held_out",
    "distance_to_closed_form",
    "conditions_hold",
    "num_live_columns",
    "num_aligned_columns",
    "std_train",
    "std_held_out",
    "l4_over_l2_train",
    "l4_over_l2_held_out",
)
"""Measures taken when none are named."""

NAMES: tuple[str, ...] = (
    *DEFAULT,
    "participation_ratio_train",
    "participation_ratio_held_out",
    "hoyer_train",
    "hoyer_held_out",
    "kurtosis_train",
    "kurtosis_held_out",
    "diverged",
)
"""All built-in measures, in the order of :data:`sims.sweeps.measures.MEASURES`."""
