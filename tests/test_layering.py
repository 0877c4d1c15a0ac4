"""Dependencies point one way: a module imports from the lines of ``ORDER`` above its own. None is circular."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [  # those of one line know nothing of each other
    ["arguments", "environment", "files", "terminal"],
    ["selection", "architecture", "model_folders"],
    ["patterns", "statistics", "distributed"],
    ["recorder"],
    ["schedules", "solvers", "distributions", "layers"],
    ["criteria"],
    ["policies"],
    ["pruning"],
    ["oneshot", "inspection"],
    ["models"],
    [""],  # sparse_train/__init__.py, for users and not for what is above
    ["data", "export", "report"],
    ["evaluation"],
    ["callbacks", "integrations"],
    ["cli"],
]
LEVEL = {f"sparse_train.{name}".rstrip("."): level for level, names in enumerate(ORDER) for name in names}


def place(name: str) -> str:
    """The entry of ``ORDER`` that a module, or a name in it, belongs to."""
    while name not in LEVEL:
        name = name.rpartition(".")[0]
    return name


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each import of the package, also of those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not looked at"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == "sparse_train")


def upward(module: str, source: str) -> list[str]:
    own = place(module)
    return [
        f"line {line} imports {name}"
        for line, name in imports(source)
        if place(name) != own and LEVEL[place(name)] >= LEVEL[own]
    ]


def modules() -> dict[str, Path]:
    paths = {path.relative_to(ROOT): path for path in (ROOT / "sparse_train").rglob("*.py")}
    paths |= {Path("sparse_train") / path.relative_to(ROOT): path for path in (ROOT / "callbacks").rglob("*.py")}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): each for path, each in paths.items()}


def graph() -> dict[str, set[str]]:
    """Each module and those of the package that it imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        # "from package import module" and "from module import name"
        names = {name for _, name in imports(path.read_text())}
        found[module] = {name if name in known else name.rpartition(".")[0] for name in names} & set(known) - {module}
    return found


def test_nothing_imports_what_is_built_on_it():
    found = {str(path.relative_to(ROOT)): upward(module, path.read_text()) for module, path in modules().items()}
    assert not {path: lines for path, lines in found.items() if lines}


def test_no_import_is_circular_inside_folders_either():
    TopologicalSorter(graph()).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_every_module_has_a_place():
    assert len(modules()) > 50
    assert [module for module in modules() if place(module) == "sparse_train"] == ["sparse_train"]


def test_an_upward_import_is_found_wherever_it_is():
    inside = "def late():\n    from sparse_train.policies import Fixed"
    assert upward("sparse_train.layers.masks", inside) == ["line 2 imports sparse_train.policies.Fixed"]
    assert upward("sparse_train.pruning.updater", "from sparse_train.layers import masks") == []
    assert upward("sparse_train.schedules", "import sparse_train.solvers")  # beside it
    assert upward("sparse_train.layers.masks", "from sparse_train import prune")
