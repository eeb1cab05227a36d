"""The README is true: its Python runs, its commands parse, its pictures exist."""

import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
(GRID,) = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
    for line in block.splitlines()
    if line.startswith("python -m")
]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, capsys):
    import jax

    # Readers run with JAX's defaults, not with this suite's strict ones.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        exec(compile(PYTHON[number], f"README block {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    (tmp_path / "grid.toml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    import paper_figs.__main__
    import scaling.commands
    import sims.commands
    from sims.terminal import parse_command

    module, *argv = shlex.split(command)[2:]
    if module == "paper_figs":
        args = paper_figs.__main__._parse([module, *argv])
    else:
        package = {"sims": sims, "scaling": scaling}[module].commands
        args = parse_command(argv, f"python -m {module}", None, package.__name__, package.COMMANDS)
    if hasattr(args, "spec"):
        from sims.commands import options as flags

        flags.spec_from_flags(args)


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", TEXT, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
