"""The rules of the house: imports go down its levels, modules stay small, and nothing in it names a notebook."""

import ast
import re
from graphlib import TopologicalSorter

import nbformat
import pytest

from helpers.places import PROJECT

# What may import only what stands before it, or its own level.
LEVELS = (
    ("helpers", "helpers.places", "helpers.settings"),
    ("helpers.evidence", "helpers.estimates", "helpers.gradients", "helpers.spectra"),
    ("helpers.lm",),
    ("helpers.world",),
    ("helpers.data",),
    ("helpers.stages",),
    ("helpers.profiles", "helpers.figures", "helpers.claims"),
    ("helpers.chapters",),
    ("helpers.study",),
    ("helpers.experiments",),
    ("helpers.explorer",),
    ("tools",),
)
SHELF = {"study", "gradients", "spectra", "estimates", "claims", "figures"}
ABOVE = {"experiments", "explorer"}  # which a notebook may import too, and one looks inside a model
MOST_LINES = {"module": 350, "class": 200, "function": 40}

PATHS = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("helpers", "tools")
    for path in sorted((PROJECT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def imported(tree: ast.AST) -> set[str]:
    """Our modules that code imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else node.module for name in inner}
    return found & PATHS.keys()


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def level(name: str) -> int:
    """Where a module stands; every module must stand somewhere."""
    room = "tools" if name.startswith("tools") else ".".join(name.split(".")[:2])
    (found,) = [i for i, members in enumerate(LEVELS) if room in members]
    return found


@pytest.mark.parametrize("name", PATHS)
def test_a_module_imports_from_its_own_level_or_below(name):
    assert {other for other in IMPORTS[name] if level(other) > level(name)} == set()


def test_imports_form_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # CycleError names it


def test_the_rules_see_an_import_that_runs_up_wherever_it_stands():
    inside = "def f():\n    from helpers.stages import artifacts\n    import helpers.lm.loading, json\n"
    assert imported(ast.parse(inside)) == {"helpers.stages.artifacts", "helpers.lm.loading"}
    assert imported(ast.parse("from helpers.estimates import Estimate")) == {"helpers.estimates"}
    assert level("helpers.stages.artifacts") > level("helpers.lm.loading") > level("helpers.estimates")


def lines_of(tree: ast.AST, *kinds: type) -> dict[str, int]:
    """How many lines each class or function has, decorators left out."""
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("name", PATHS)
def test_modules_classes_and_functions_are_short(name):
    tree = TREES[name]
    sizes = {
        "module": {name: len(PATHS[name].read_text().splitlines())},
        "class": lines_of(tree, ast.ClassDef),
        "function": lines_of(tree, ast.FunctionDef, ast.AsyncFunctionDef),
    }
    for kind, most in MOST_LINES.items():
        assert {thing: n for thing, n in sizes[kind].items() if n > most} == {}, kind


def test_the_shelf_is_thin():
    assert sum(len(PATHS[f"helpers.{name}"].read_text().splitlines()) for name in SHELF) <= 1250


@pytest.mark.parametrize("name", PATHS)
def test_nothing_names_a_notebook(name):
    text = PATHS[name].read_text()
    assert re.findall(r"(?i)notebooks? \d\d?\b", text) == []
    assert [notebook.stem for notebook in NOTEBOOKS if notebook.stem in text] == []


def bound(tree: ast.AST) -> set[str]:
    """The names of all variables and parameters."""
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return variables | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize("name", PATHS)
def test_no_variable_is_called_of(name):
    assert "of" not in bound(TREES[name])


# --- Notebooks ---


def code(path) -> ast.Module:
    cells = nbformat.read(path, as_version=4).cells
    return ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_from_the_shelf_and_what_stands_on_it(path):
    tree = code(path)
    allowed = {f"helpers.{name}" for name in SHELF | ABOVE | ({"lm"} if path.stem.startswith("01") else set())}
    assert {name for name in imported(tree) if not name.startswith(tuple(allowed))} == set()
    assert "of" not in bound(tree)
