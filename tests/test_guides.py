"""The README and the guides are true: their Python runs, their commands parse, their pictures and links exist."""

import pathlib
import re
import shlex

import pytest

from sims.terminal import parse_command

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [
    ROOT / name for name in ("sims/SCALE.md", "scaling/GUIDE.md", "paper_figs/RESULTS.md", "dae_theory/BEYOND.md")
]
PAGES = [
    README,
    *GUIDES,
    ROOT / "scaling/PARITY.md",
    ROOT / "scaling/SUPPORT.md",
    ROOT / "dae_theory/THEORY.md",
    ROOT / "CONTRIBUTING.md",
]


def blocks(language):
    """Every fenced block of a language, with the page and its number there."""
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)):
            yield pytest.param(page, text, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    for block in blocks("bash"):
        page, text = block.values
        for line in text.splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith("python -m"):
                yield pytest.param(page, command, id=command.removeprefix("python -m "))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize(("page", "code"), list(blocks("python")))
def test_python_blocks_run(page, code, capsys, tmp_path, monkeypatch):
    import jax

    monkeypatch.chdir(tmp_path)
    # Readers run with JAX's defaults, not with this suite's strict ones.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        exec(compile(code, str(page), "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands_parse(page, command, tmp_path, monkeypatch):
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.S)):
        assert number == 0, "one spec file a page"
        (tmp_path / "grid.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    module, *argv = shlex.split(command)[2:]
    if module == "paper_figs":
        from paper_figs import __main__ as figures

        args = figures._parse([module, *argv])
        assert args.name in ("list", "all", *figures.FIGURES)
    elif module in ("sims", "scaling"):
        import importlib

        package = importlib.import_module(f"{module}.commands")
        args = parse_command(argv, f"python -m {module}", "", package.__name__, package.COMMANDS)
        if hasattr(args, "spec"):
            from sims.commands import options

            options.spec_from_flags(args)
    else:
        package, _, rest = module.partition(".")
        assert package in ("sims", "scaling")
        assert rest == "bench"
        bench = __import__(f"{module}.__main__", fromlist=["_parse"])
        bench._parse([module, *argv])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_and_links_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), f"{target}#{anchor}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README.read_text(), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_readme_fits_on_two_screens():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_guides_begin_with_a_table_of_contents(guide):
    listed = re.findall(r"^\* \[[^\]]*\]\(#([^)]*)\)", guide.read_text(), flags=re.M)
    sections = anchors(guide)[1:]
    second = re.findall(r"^## (.*)$", re.sub(r"```.*?```", "", guide.read_text(), flags=re.S), flags=re.M)
    assert len(second) == len(listed)
    assert set(listed) <= set(sections)
