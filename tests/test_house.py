"""The structure of the house: who may import whom, and what each room may use."""

import ast
import importlib
import itertools
import pathlib
import pkgutil
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("dae_theory", "sims", "scaling", "paper_figs")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
THEORY_MAY_USE = {"jax", "jaxtyping", "lazy_loader", "numpy", "optax", "scipy", "dae_theory"}
STANDARD_LIBRARY_IN_THEORY = {
    "__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "numbers", "types", "typing",
}  # fmt: skip

# Rooms inside the rooms: what each may import of its own package, ground floor first. CONTRIBUTING.md prints it.
ARROWS = {
    "sims": {
        "flags": "",
        "interrupts": "",
        "terminal": "interrupts",
        "presets": "",
        "data": "",
        "store": "",
        "sweeps": "data store flags",
        "study": "sweeps data store",
        "bench": "sweeps study data store terminal",
        "commands": "sweeps study data store flags presets terminal",
        "__main__": "commands interrupts terminal",
    },
    "scaling": {
        "backend": "",
        "models": "backend",
        "diffusion": "models backend",
        "bridge": "diffusion models backend",
        "training": "bridge diffusion models backend",
        "measures": "bridge diffusion models backend",
        "detection": "measures bridge diffusion models backend",
        "steering": "measures bridge diffusion models backend",
        "study": "detection steering training measures bridge diffusion models backend",
        "zoo": "study detection steering training measures bridge diffusion models backend",
        "commands": "zoo study detection steering training measures bridge diffusion models backend",
        "bench": "zoo study detection steering training measures bridge diffusion models backend",
        "__main__": "commands backend",
    },
}


def imports(path):
    """Top-level packages and full module names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests"}
    assert not tops & above, f"{path} imports {tops & above}, which stand above {room}"
    if room != "paper_figs":
        assert "matplotlib" not in tops, f"{path} plots outside paper_figs"
    if "bench" not in path.parts:
        assert not tops & {"torch", "torchax"}, f"{path} imports torch outside a benchmark"
    assert not tops & {"pickle", "dill", "joblib"}, f"{path} can unpickle"
    if room == "dae_theory":
        stray = tops - THEORY_MAY_USE - STANDARD_LIBRARY_IN_THEORY
        assert not stray, f"{path} imports {stray}; theory is formulas only"


def inner_room(name):
    """``sims.store.files`` as ("sims", "store"); the package itself as ("sims", "")."""
    package, _, rest = name.partition(".")
    return package, rest.split(".")[0]


def stray_arrows(name, source):
    """Imports in ``source``, the module ``name``, that go to an inner room it may not import."""
    package, room = inner_room(name)
    if package not in ARROWS or not room:
        return []
    allowed = {room, *ARROWS[package][room].split()}
    targets = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # From a package itself, a name is one of its rooms or what one of them exports.
            whole = node.module == package
            targets += [f"{node.module}.{alias.name}" if whole else node.module for alias in node.names]
    return [t for t in targets if inner_room(t)[0] == package and inner_room(t)[1] not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_between_inner_rooms_follow_the_arrows(path):
    stray = stray_arrows(name_of(path), path.read_text())
    assert not stray, f"{path} imports {stray}; see ARROWS"


def test_a_planted_arrow_is_found():
    up = "from scaling.study.examination import examine"
    assert stray_arrows("scaling.measures.codes", up) == ["scaling.study.examination"]
    assert stray_arrows("scaling.measures.codes", "def f():\n    from scaling import zoo\n") == ["scaling.zoo"]
    assert stray_arrows("sims.store.files", "import sims.sweeps.engine") == ["sims.sweeps.engine"]
    assert not stray_arrows("scaling.zoo.packing", up)


def test_every_inner_room_has_its_arrows():
    for package, arrows in ARROWS.items():
        rooms = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
        rooms -= {"__init__", "__pycache__"}
        assert rooms <= arrows.keys(), f"{package}: {rooms - arrows.keys()} stand in no floor of ARROWS"
        order = list(arrows)
        for room, allowed in arrows.items():
            assert all(order.index(other) < order.index(room) for other in allowed.split()), f"{room} imports upward"


def test_contributing_prints_the_arrows():
    printed = dict(
        re.findall(r"^\| `([\w.]+)` \| [^|]+ \|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    )
    held = {f"{package}.{room}": names for package, arrows in ARROWS.items() for room, names in arrows.items()}
    held = {room: names for room, names in held.items() if not room.endswith("__main__")}
    assert {room: names.replace(",", " ").split() for room, names in printed.items()} == {
        room: names.split() for room, names in held.items()
    }


def test_there_are_no_import_cycles():
    known = {name_of(path): path for path in MODULES}
    graph = {}
    for name, path in known.items():
        targets = set()
        tree = ast.parse(path.read_text())
        # Imports inside functions run later and cannot close a cycle at import time.
        for node in tree.body:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = {t for t in targets if t in known and t != name and not name.startswith(t + ".")}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name]) if name in path else ""
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            # A package's own __init__ re-exports its modules; they may not import it back at import time.
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_modules_stay_small_enough_to_read():
    long = {str(p.relative_to(ROOT)): n for p in MODULES if (n := p.read_text().count("\n")) > 420}
    assert not long, f"about 400 lines is the limit: {long}"


def test_no_module_is_hidden_by_a_function_of_its_name():
    for face in (*ROOT.glob("*/__init__.py*"), *ROOT.glob("*/*/__init__.py*")):
        exported = {
            alias.asname or alias.name
            for node in ast.parse(face.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module is not None
            for alias in node.names
        }
        modules = {path.stem for path in face.parent.glob("*.py")} - {"__init__", "__main__"}
        assert not exported & modules, f"{face} exports {exported & modules}, which hides modules of that name"


def test_libraries_print_nothing_and_set_nothing():
    for path in MODULES:
        # A worker of a cluster, and a process that joins others, are programs of their own.
        if path.stem in ("__main__", "processes", "cluster") or {"bench", "commands"} & set(path.parts):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        assert not names & {"print", "jax.config.update", "np.random.seed"}, f"{path} prints or sets global state"
        assert not any(name.endswith("PRNGKey") for name in names), f"{path} uses an old-style key"


def test_the_theory_page_names_what_exists():
    """Every row of its tables has a test; tests and functions named there exist."""
    lines = (ROOT / "dae_theory" / "THEORY.md").read_text().splitlines()
    rows = [a for a, b in itertools.pairwise(lines) if a.startswith("| ") and not b.startswith("|---")]
    assert rows
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        tests = [name.split("::") for name in names if "::" in name]
        assert tests, f"no test in {row}"
        for path, test in tests:
            functions = {n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)}
            assert test in functions, f"{path} has no {test}"
        for name in (name for name in names if "::" not in name):
            pkgutil.resolve_name(name if name.split(".")[0] in ROOMS else f"dae_theory.{name}")


@pytest.mark.parametrize("package", ["dae_theory", "sims", "scaling", "paper_figs"])
def test_packages_tell_their_version(package):
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {importlib.import_module(package).__version__}\n" in citation
