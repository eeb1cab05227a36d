"""Data sets: training and held-out rows from digits, mixtures, images, IDX, CIFAR-10, ``.npy`` and ``.npz`` files.

``formats`` reads files, ``readers`` turns sources into rows, ``datasets`` splits, centers and repeats them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
