"""The committed notebooks: executed in order, nothing failed, easy to read, and nothing in them of the machine they ran
on."""

import ast
import re
import subprocess
import sys
from statistics import median

import nbformat
import pytest

from helpers import places, profiles
from tools import headless

PATHS = sorted((places.PROJECT / "notebooks").glob("*.ipynb"))
NUMBERED = [path for path in PATHS if path.stem != "one_page"]  # which a newcomer opens before the others
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|root|home|tmp|Users)\b")
COLUMNS = "110"


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def texts(path):
    """(where, text) of all that a reader can see: sources and outputs, pictures' bytes left out."""
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        yield f"cell {i}", cell.source
        for output in cell.get("outputs", []):
            yield f"output of cell {i}", output.get("text", "") + "\n".join(output.get("traceback", []))
            for kind, content in output.get("data", {}).items():
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    yield f"output of cell {i} ({kind})", str(content)


def test_notebooks_are_numbered_in_order():
    numbers = [path.stem[:2] for path in NUMBERED]
    assert numbers == [f"{i:02}" for i in range(len(NUMBERED))] and len(NUMBERED) > 10


@pytest.mark.parametrize("style", [["check"], ["format", "--check"]], ids=" ".join)
def test_their_code_is_as_ruff_has_it(style):
    command = [sys.executable, "-m", "ruff", *style, "--line-length", COLUMNS, *PATHS]
    done = subprocess.run(command, cwd=places.PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


STUDIES = {  # what leaves out different cells, each on top of a built-in profile
    "the organism": ("atlas",), "another family": ("atlas", None, "atlas:belief"), "stories": ("tinystories",),
    "a ready partner": ("zephyr-7b",), "pairs in 16 bits": ("llama2-7b",),
}  # fmt: skip


@pytest.mark.parametrize("study", STUDIES)
def test_what_is_left_for_a_study_uses_no_name_that_was_left_out(study, tmp_path):
    profile = profiles.load(*STUDIES[study])
    for path in PATHS:
        headless.prepare(path.stem, profile, {"PROFILE": "some"}, tmp_path)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", *tmp_path.glob("*.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "text, found",
    [
        ("/".join(["", "home", "somebody"]), True),
        ("see '/tmp/a'", True),
        ("/home", True),
        ("a/home/b", False),
        ("~/tmp/x", False),
        ("/working", False),
    ],
)
def test_machine_paths_are_told_from_others(text, found):
    assert bool(MACHINE_PATH.search(text)) == found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
class TestEachNotebook:
    def test_is_valid(self, path):
        nbformat.validate(nbformat.read(path, as_version=4))

    def test_opens_with_its_question_what_it_reads_and_writes_and_how_long_it_takes(self, path):
        first = nbformat.read(path, as_version=4).cells[0]
        title = f"# {path.stem[:2]} · " if path in NUMBERED else "# One page: "
        assert first.cell_type == "markdown" and first.source.startswith(title)
        assert re.search(r"\*\*Question\.\*\* .*\?", first.source, flags=re.DOTALL)
        for word in ("Reads", "Writes", "Takes"):
            assert re.search(rf"^\| \*\*{word}\*\* \| .*\w.* \|$", first.source, flags=re.MULTILINE), word

    def test_closes_with_what_was_found(self, path):
        headings = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.source.startswith("## ")]
        assert headings[-1].startswith("## What was found, and what would change our mind")

    def test_has_one_parameters_cell_with_the_defaults(self, path):
        (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
        given = {}
        exec(cell.source, {}, given)
        profile = "worlds" if path.stem.endswith("_worlds") else "atlas"
        assert given == {"PROFILE": profile, "MODEL": "", "DPO_MODEL": "", "DATA": ""}
        assert not any("injected-parameters" in c.metadata.get("tags", []) for c in code_cells(path))

    def test_was_run_once_from_top_to_bottom(self, path):
        """Cells about other studies than the default one were not."""
        atlas = profiles.load("atlas")
        ran = {cell.id: headless.applies(cell.metadata.get("tags", ()), atlas) for cell in code_cells(path)}
        counts = [cell.execution_count for cell in code_cells(path) if ran[cell.id]]
        assert counts == list(range(1, len(counts) + 1))
        assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path) if not ran[cell.id])

    def test_has_outputs_but_no_errors_warnings_or_widgets(self, path):
        assert any("image/png" in output.get("data", {}) for output in outputs(path))
        assert [
            output for output in outputs(path) if output.output_type == "error" or output.get("name") == "stderr"
        ] == []
        kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
        assert not any("widget" in kind for kind in kinds)
        assert "widgets" not in nbformat.read(path, as_version=4).metadata

    def test_names_no_path_of_a_machine(self, path):
        assert [(where, text[:80]) for where, text in texts(path) if MACHINE_PATH.search(text)] == []

    def test_has_short_code_cells(self, path):
        lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
        assert median(lengths) <= 8 and max(lengths) <= 20

    def test_keeps_no_metadata_of_a_run(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert set(notebook.metadata) <= {"kernelspec", "language_info"}
        assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_figure_is_saved_in_the_cell_that_draws_it(path):
    """A cell's end shows the figures that it drew, which lays them out; laid out once more, they get other bytes."""
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        saved = [call.args[0] for call in calls if ast.unparse(call.func).endswith("save_figure")]
        assert all(not isinstance(figure, ast.Name) or figure.id in made for figure in saved), cell.source
