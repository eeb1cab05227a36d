r"""The jackknife: how far an estimate reaches, from the estimates without one observation each.

.. math:: t_{n-1} \sqrt{\tfrac{n-1}{n} \sum_i (\theta_{(i)} - \bar\theta)^2}, \qquad
          \bar\theta = \frac1n \sum_i \theta_{(i)}

:math:`\theta_{(i)}` is the estimate without observation i :cite:`tukey58`, and t a quantile of Student's distribution.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

__all__ = ["jackknife_error", "jackknife_reach"]


def jackknife_error(without: Float[np.ndarray, " n"]) -> float:
    """Standard error of an estimate, from the estimates without one of n >= 2 observations each."""
    return math.sqrt((len(without) - 1) * without.var())


def jackknife_reach(without: Float[np.ndarray, " n"], confidence: float) -> float:
    """Half the width of the interval that covers the truth with probability ``confidence``."""
    return float(stdtrit(len(without) - 1, (1 + confidence) / 2)) * jackknife_error(without)
