"""Benchmarks of deep models beside PyTorch: ``python -m scaling.bench``. Each row is a function in a module here."""
