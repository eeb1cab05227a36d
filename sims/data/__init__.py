"""Rows to train on, from the embedded digits, mixtures, images, IDX, CIFAR-10, ``.npy`` and ``.npz`` files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
