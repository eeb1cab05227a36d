"""Results on disk that survive any kill: atomic files, a labeled array store, and the loop that fills it.

``open_run`` begins or resumes a run, ``fill_units`` computes its pending units, ``fill`` does so in batches of items,
and ``load`` reads the results.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
