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
    """The area under the ROC curve of every row of scores; ties count one half.

    ``positives`` are the scores of n images that should be high, ``negatives`` those of m images that should be low.
    The area is the Mann-Whitney statistic divided by n m.

    >>> float(auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])))
    0.875
    """
    pairs = positives.shape[-1] * negatives.shape[-1]
    return np.asarray(stats.mannwhitneyu(positives, negatives, axis=-1).statistic / pairs)
