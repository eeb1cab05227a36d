"""Thousands of small trainings in one compiled program: the spec, training, measures, and where cells run.

``sweep`` computes a ``Spec``: cells run in groups on all devices, and on several processes, job arrays or clusters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
