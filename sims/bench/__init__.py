"""Timings of the theory and of sweeps beside their rivals: ``python -m sims.bench``."""
