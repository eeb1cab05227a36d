"""The paper's figures by command: ``python -m paper_figs list|NAME|all``.

The only package that plots. A figure is a module ``fig_NAME`` with ``SUMMARY``, ``SPEC`` and ``QUICK``, and three
functions apart: ``compute(spec) -> arrays``, ``from_run(folder) -> arrays`` and ``draw(arrays) -> Figure``.
"""

from dae_theory import __version__ as __version__
