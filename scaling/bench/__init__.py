"""Timings of deep models beside PyTorch: ``python -m scaling.bench``."""
