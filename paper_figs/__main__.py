"""``python -m paper_figs``: the paper's figures, computed and drawn by command."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, logging
from absl.flags import argparse_flags

FIGURES = {
    "columns": "columns of W1 beside their nearest training images, memorized against generalized (Fig. 3)",
    "codes": "a memorized and a generalized code, and histograms of spikiness (Fig. 4)",
    "phase_diagram": "the transition over n and sigma; --run DIR draws a finished sweep",
    "deep_series": "deep networks on more and more images beside the two-layer one; --run DIR draws a `transition`",
    "deep_duplication": "deep networks some of whose images repeat; --run DIR draws a `duplication`",
}
"""Name and summary; the module is ``paper_figs.fig_NAME``."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    logging.set_verbosity(logging.WARNING)
    app.run(_run, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(prog="python -m paper_figs", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", metavar="list|NAME|all", help="which figure; list names them")
    parser.add_argument("--quick", action="store_true", help="a small version in seconds, to try it out")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/figures"), help="folder (runs/figures)")
    parser.add_argument(
        "--run", metavar="DIR", help="draw this finished run (phase_diagram, deep_series, deep_duplication)"
    )
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> int:
    if args.name == "list":
        for name, summary in FIGURES.items():
            print(f"{name:16s} {summary}")
        return 0
    names = list(FIGURES) if args.name == "all" else [args.name]
    try:
        for name in names:
            print("\n".join(str(path) for path in make(name, args.out, quick=args.quick, run=args.run)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; figures already written are kept.", file=sys.stderr)
        return 130
    return 0


def make(name: str, out: pathlib.Path, *, quick: bool = False, run: str | None = None) -> list[pathlib.Path]:
    """Compute, draw and save one figure; returns the files. ``ValueError`` for an unknown name or an unsuited run."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from paper_figs import artifacts

    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; known are {', '.join(FIGURES)} (or list, all).")
    module = importlib.import_module(f"paper_figs.fig_{name}")
    spec: dict[str, Any] = module.QUICK if quick else module.SPEC
    if run is None:
        arrays = module.compute(spec)
    elif hasattr(module, "arrays_of_folder"):
        from sims import store

        spec = store.read_spec(run)["spec"]
        arrays = module.arrays_of_folder(run)
    elif hasattr(module, "arrays_of_run"):
        from sims import store

        spec = store.read_spec(run)["spec"]
        arrays = module.arrays_of_run(store.load(run))
    else:
        raise ValueError(f"figure {name!r} is not drawn from a sweep; leave --run out.")
    with mpl.rc_context(fname=artifacts.STYLE), mpl.rc_context({"backend": "agg"}):
        figure = module.draw(arrays)
        paths = artifacts.save(name, figure, arrays, spec, out)
        plt.close(figure)
    return paths


if __name__ == "__main__":
    main()
