"""Many cheap worlds: data sets, training, sweeps, measures over sweeps, and the results store.

``sweep(Spec(...))`` trains a network for every combination of a spec's axes and returns one labeled array; ``python -m
sims`` does the same from the command line and resumes what was cut.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
