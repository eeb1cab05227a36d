"""Whole experiments on deep models, each a resumable run: examination, series, Jacobians, generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
