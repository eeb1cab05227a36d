"""Analysis of finished sweeps: transitions with intervals, summaries, tables, and certificates of given data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
