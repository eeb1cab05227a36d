"""The paper's figures by command: ``python -m paper_figs list|NAME|all``.

The only room that plots. Each module ``fig_NAME`` has ``compute(spec) -> arrays`` and ``draw(arrays) -> Figure``,
apart.
"""
