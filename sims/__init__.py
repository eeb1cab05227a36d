"""Sweeps of small networks: data sets, training, measures, and a store of results.

``sweep(Spec(...))`` trains a network for every combination of a spec's axes and returns one labeled data set;
``python -m sims`` does the same from the command line and resumes interrupted runs.
"""

import lazy_loader

from dae_theory import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
