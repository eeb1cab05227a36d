"""Every command of the README runs, in its order, with tiny sizes, and prints what it is for."""

import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from sims.terminal import parse_command

pytestmark = pytest.mark.tiny

ROOT = pathlib.Path(__file__).parents[1]

RUNS = {
    "sims demo": ("--num-samples 2,8 --sigma 0.5,1 --width 4 --steps 4 --seeds 2", "## Where memorization ends"),
    "paper_figs phase_diagram": ("", "phase_diagram.png"),
    "sims sweep": ("--num-samples 2,4 --sigma 0.5,1 --width 4 --steps 4 --seeds 2", "Diverged: 0 of 8."),
    "sims transitions": ("", "sigma\testimate\tlow\thigh"),
    "sims certify": ("", ": memorizing, certified"),
    "scaling zoo": ("", "fashion-dit"),
    "scaling inspect": ("", '"taps"'),
    "scaling sample": ("--steps 2", "runs/samples/sheet.png"),
    "scaling extract": ("", "runs/codes/results.zarr"),
    "sims ask": ("--num-samples 6", "# Does it memorize?"),
    "scaling train": ("--channels 8 --batch-size 2 --steps 2", "runs/unet/membership.json"),
    "scaling detect": ("--num 6 --detectors std", "# Memorization detection"),
    "scaling audit": ("--samples 4 --steps 2 --detectors std --scored 6", "# Audit of a diffusion model"),
    "scaling jacobian": ("--rank 2 --num 1", "runs/jacobian"),
    "paper_figs list": ("", "phase_diagram"),
}
"""By the beginning of a command: what makes it short, and a part of what it prints."""


def commands():
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith("python -m"):
                yield command.removeprefix("python -m ")


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    found = list(commands())
    assert {" ".join(command.split()[:2]) for command in found} == set(RUNS)
    for command in found:
        start = " ".join(command.split()[:2])
        shorter, expected = RUNS[start]
        module, *argv = shlex.split(f"{command} {shorter}")
        if module == "paper_figs":
            from paper_figs import __main__ as figures

            code = figures._run(figures._parse([module, *argv]))
        else:
            args = parse_command(argv, f"python -m {module}", "", f"{module}.commands", packages(module))
            code = args.run(args)
        assert code == 0, capsys.readouterr().err
        assert expected in capsys.readouterr().out, command


def packages(module):
    import importlib

    return importlib.import_module(f"{module}.commands").COMMANDS
