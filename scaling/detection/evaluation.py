r"""How well a score separates two groups of images: the area under the ROC curve.

.. math:: \mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

for a positive and a negative image drawn at random; 1/2 is chance.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

__all__ = ["auroc"]


def auroc(positives: Float[np.ndarray, "*s n"], negatives: Float[np.ndarray, "*s m"]) -> Float[np.ndarray, "*s"]:
    """The area under the ROC curve of every row of scores, ties counting one half.

    ``positives`` are scores of n images that should be high, ``negatives`` of m that should be low; it is the
    Mann-Whitney statistic divided by n m.
    """
    pairs = positives.shape[-1] * negatives.shape[-1]
    return np.asarray(stats.mannwhitneyu(positives, negatives, axis=-1).statistic / pairs)
