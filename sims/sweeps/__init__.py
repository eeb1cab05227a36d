"""Thousands of small trainings in one compiled program: what is trained, measured, and where it runs.

``sweep`` computes a ``Spec``; its cells run in groups on all devices, and over processes, job arrays or clusters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
