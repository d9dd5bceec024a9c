"""The layout of the package: imports point down, modules stay short, documents name files that exist."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vpns_hf"
# From top to bottom; a folder or module imports only itself and what follows it.
FLOORS = (
    "cli",
    "experiments",
    "report",
    "training",
    "methods",
    "scores",
    "latency",
    "export",
    "model",
    "inference",
    "hub",
    "saved_folder",
    "saved_files",
    "locks",
    "masking",
    "storage",
    "data",
    "pixels",
    "label_mapping",
    "metrics",
    "evaluate_module",
    "values",
    "version",
)
MAX_LINES = 400
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def import_graph(package: Path) -> dict[str, set[str]]:
    """Map every module below a package to the modules of the package that it imports, inside functions, too.

    The package's own `__init__` is left out, and so are imports that only type checkers follow.
    """
    paths = {_module_name(package, path): path for path in package.rglob("*.py")}
    graph = {name: _imports(name, path, set(paths)) for name, path in paths.items()}
    return {name: imported - {package.name} for name, imported in graph.items() if name != package.name}


def _module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, modules: set[str]) -> set[str]:
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {
        target
        for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8")))
        for target in _targets(node, folder, modules)
        if target in modules
    }


def _runtime_nodes(node: ast.AST):
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    for child in ast.iter_child_nodes(node):
        yield from _runtime_nodes(child)


def _targets(node: ast.AST, folder: str, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = folder.split(".")
    above = parents[: len(parents) - node.level + 1] if node.level else []
    source = ".".join([*above, *([node.module] if node.module else [])])
    submodules = [f"{source}.{alias.name}" for alias in node.names]
    return [submodule if submodule in modules else source for submodule in submodules]


def floor(module: str) -> str:
    return module.split(".")[1]


def upward_imports(graph: dict[str, set[str]], floors: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if floors.index(floor(target)) < floors.index(floor(module))
    ]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_graph_follows_every_form_of_import(tmp_path):
    package = write(
        tmp_path / "house",
        {
            "__init__.py": "from .top import roof",
            "base.py": "import house.top.roof",
            "top/__init__.py": "from .roof import tiles",
            "top/roof.py": "def tiles():\n    from .. import base\n    from . import wall",
            "top/wall.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .roof import tiles\n"
            "from ..base import house",
        },
    )
    assert import_graph(package) == {
        "house.base": {"house.top.roof"},
        "house.top": {"house.top.roof"},
        "house.top.roof": {"house.base", "house.top.wall"},
        "house.top.wall": {"house.base"},
    }
    assert upward_imports(import_graph(package), ("top", "base")) == ["house.base imports house.top.roof"]


def test_every_folder_has_its_floor():
    assert {floor(module) for module in import_graph(PACKAGE)} <= set(FLOORS)


def test_imports_point_down():
    assert upward_imports(import_graph(PACKAGE), FLOORS) == []


def test_no_modules_import_each_other_in_a_circle():
    # Raises a CycleError that names the circle.
    TopologicalSorter(import_graph(PACKAGE)).prepare()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:vpns_hf|recipes|tests|benchmarks)/[\w./-]+\.(?:py|md|yaml)\b", text))
    assert named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
