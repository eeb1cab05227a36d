"""``python -m paper_figs``: the paper's figures, computed and drawn by command."""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

from sims.interrupts import end_quietly_during_imports

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

FIGURES = tuple(sorted(path.stem.removeprefix("fig_") for path in pathlib.Path(__file__).parent.glob("fig_*.py")))
"""Names of the figures; the module is ``paper_figs.fig_NAME``."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    end_quietly_during_imports()
    from sims.terminal import run_program

    run_program(_run, _parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from absl.flags import argparse_flags

    parser = argparse_flags.ArgumentParser(prog="python -m paper_figs", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", metavar="list|NAME|all", help="which figure; list names them")
    parser.add_argument("--quick", action="store_true", help="a small version in seconds, to try it out")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/figures"), help="folder (runs/figures)")
    parser.add_argument("--run", metavar="DIR", help="draw this finished run instead of computing; `list` says of what")
    return parser.parse_args(argv[1:])


def _run(args: argparse.Namespace) -> int:
    from sims.terminal import guarded

    return guarded(_draw)(args)


def _draw(args: argparse.Namespace) -> None:
    if args.name == "list":
        for name in FIGURES:
            print(f"{name:16s} {_module(name).SUMMARY}")
        return
    for name in FIGURES if args.name == "all" else (args.name,):
        print("\n".join(str(path) for path in make(name, args.out, quick=args.quick, run=args.run)))


def make(name: str, out: pathlib.Path, *, quick: bool = False, run: str | None = None) -> list[pathlib.Path]:
    """Compute, draw and save one figure; returns the files. ``ValueError`` for an unknown name or an unsuitable run."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from paper_figs import artifacts

    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; known are {', '.join(FIGURES)} (or list, all).")
    module = _module(name)
    if run is None:
        spec: dict[str, Any] = module.QUICK if quick else module.SPEC
        arrays = module.compute(spec)
    else:
        from sims import store

        arrays = module.from_run(run)
        spec = store.read_spec(run)["spec"]
    with mpl.rc_context(fname=artifacts.STYLE), mpl.rc_context({"backend": "agg"}):
        figure = module.draw(arrays)
        paths = artifacts.save(name, figure, arrays, spec, out)
        plt.close(figure)
    return paths


def _module(name: str) -> Any:
    return importlib.import_module(f"paper_figs.fig_{name}")


if __name__ == "__main__":
    main()
