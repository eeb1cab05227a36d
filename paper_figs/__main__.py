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
    parser.add_argument(
        "--select",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
        help="with --run: the value of an axis to draw (phase_diagram); again for other axes",
    )
    parser.add_argument(
        "--format",
        default="png",
        metavar="F[,F]",
        help="files of the picture: png, pdf, svg (default: png)",
    )
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
        paths = make(name, args.out, quick=args.quick, run=args.run, select=args.select, formats=args.format.split(","))
        print("\n".join(map(str, paths)))


def make(
    name: str,
    out: pathlib.Path,
    *,
    quick: bool = False,
    run: str | None = None,
    select: Sequence[str] = (),
    formats: Sequence[str] = ("png",),
) -> list[pathlib.Path]:
    """Compute, draw and save one figure; returns the files.

    ``select`` are ``AXIS=VALUE`` of the run to draw, for figures that take them; ``formats`` are those of the picture.
    ``ValueError`` for an unknown name, format or selection, and for an unsuitable run.
    """
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from paper_figs import artifacts

    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; known are {', '.join(FIGURES)} (or list, all).")
    if unknown := [kind for kind in formats if kind not in artifacts.FORMATS]:
        raise ValueError(f"unknown format {unknown[0]!r}; choose from {', '.join(artifacts.FORMATS)}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder.")
    module = _module(name)
    chooses = getattr(module, "SELECTS", False)
    if select and (run is None or not chooses):
        raise ValueError(
            "--select chooses from the axes of a run: give --run DIR too."
            if chooses
            else f"the figure {name} has no axes to select from; leave --select out."
        )
    if run is None:
        spec: dict[str, Any] = module.QUICK if quick else module.SPEC
        arrays = module.compute(spec)
    else:
        from sims import store

        arrays = module.from_run(run, select) if chooses else module.from_run(run)
        # Answers of `ask` are single files, without the record of a store.
        spec = module.spec_of(run) if hasattr(module, "spec_of") else store.read_spec(run)["spec"]
        spec |= {"select": list(select)} if select else {}
    with mpl.rc_context(fname=artifacts.STYLE), mpl.rc_context({"backend": "agg"}):
        figure = module.draw(arrays)
        paths = artifacts.save(name, figure, arrays, spec, out, formats)
        plt.close(figure)
    return paths


def _module(name: str) -> Any:
    return importlib.import_module(f"paper_figs.fig_{name}")


if __name__ == "__main__":
    main()
