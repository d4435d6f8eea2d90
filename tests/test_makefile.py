"""Make runs each notebook when it has to and not otherwise, and its edges are what the notebooks' code says."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers import artifacts
from helpers.study import SHOWN_IN, Study

PROJECT = artifacts.PROJECT
COMMITTED = sorted(path.stem for path in (PROJECT / "notebooks").glob("[0-9]*.ipynb"))
NOT_SHOWN = {  # in any notebook
    "profile", "task", "source", "tokenizer", "sites", "playing", "answers", "steered", "compare", "has", "trains",
    "ready", "adapter", "train", "train_by_parts", "pairs", "ends", "ended",
}  # fmt: skip

# Stands in for the environment's python: notes which notebook it was asked to run, and writes it unless it is `broken`.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m helpers.headless" ] || { echo "other: $*" >> calls; exit 0; }
[ "$4 $6 $8 ${10}" = "--profile --model --dpo-model --data" ] || exit 9
echo "$3|$5|$7|$9|${11}" >> calls
folder=build/$(basename "$5" .toml)
if [ "$(cat broken 2>/dev/null)" = "$3" ]; then : > "$folder/$3.partial.ipynb"; exit 1; fi
: > "$folder/$3.ipynb"
"""


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MAKE", "MFLAGS", "PROFILE", "MODEL", "DPO_MODEL", "DATA"))
    }
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=60)


def edges(folder: Path = PROJECT) -> dict[str, set[str]]:
    """notebook -> the notebooks that make runs before it, from make's own database."""
    database = make(folder, "-pn", "PROFILE=atlas", "help").stdout
    found = {}
    for target, prerequisites in re.findall(r"^build/atlas/(\d\w*)\.ipynb:(.*)$", database, flags=re.MULTILINE):
        found.setdefault(target, set()).update(re.findall(r"build/atlas/(\d\w*)\.ipynb", prerequisites))
    return found


def asked_of(name: str, variable: str) -> set[str]:
    """The attributes of a variable that a notebook's code names."""
    cells = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    nodes = [n for cell in cells if cell.cell_type == "code" for n in ast.walk(ast.parse(cell.source))]
    return {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == variable
    }


def read_by(name: str) -> set[str]:
    """The notebooks that show what this one asks its study, `s`, for, and the earlier ones whose claims it reads."""
    shown = {SHOWN_IN[stage] for stage in asked_of(name, "s") & SHOWN_IN.keys()}
    recorded = {other for other in COMMITTED if other < name and "record" in asked_of(other, "claims")}
    return (shown | (recorded if "load" in asked_of(name, "claims") else set())) - {name}


EDGES = edges()
NAMES = sorted(set(EDGES) | set(SHOWN_IN.values()))
FIGURES = [name for name in NAMES if name != "10_scaling"]  # what `make figures` runs


def with_dependants(name: str) -> set[str]:
    """A notebook and all that read it, directly or not."""
    return {name}.union(*(with_dependants(other) for other, before in EDGES.items() if name in before))


# --- What depends on what ---


def test_make_knows_exactly_the_committed_notebooks():
    assert COMMITTED and set(COMMITTED) == set(NAMES)


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebook_depends_on_those_that_show_what_it_reads(name):
    assert EDGES.get(name, set()) == read_by(name)


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebook_says_itself_which_others_it_reads(name):
    first = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source
    (reads,) = re.findall(r"^\| \*\*Reads\*\* \|(.*)\|$", first, flags=re.MULTILINE)
    said = set(re.findall(r"\((\d\d)\)", reads))
    upstream = {other for other in NAMES if name in with_dependants(other) - {other}}
    assert {other[:2] for other in EDGES.get(name, set())} <= said <= {other[:2] for other in upstream}


def test_every_stage_is_shown_somewhere_or_is_known_not_to_be():
    public = {name for name in vars(Study) if not name.startswith("_")} | {"profile", "task"}
    assert public == SHOWN_IN.keys() | NOT_SHOWN and not SHOWN_IN.keys() & NOT_SHOWN


# --- What runs when ---


@pytest.fixture
def project(tmp_path):
    """A copy of the project with empty notebooks and a python that only takes notes."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "notebooks").mkdir()
    for name in NAMES:
        (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def ran(project: Path, *arguments: str) -> list[str]:
    """Run `make figures` and return the notebooks that it ran, in order."""
    time.sleep(0.02)  # so that what was touched since the last run is newer than what that run wrote
    (project / "calls").unlink(missing_ok=True)
    done = make(project, "figures", *arguments)
    assert done.returncode == 0, done.stderr
    calls = project / "calls"
    return [line.split("|")[0] for line in calls.read_text().splitlines()] if calls.exists() else []


def touch(path: Path) -> None:
    time.sleep(0.02)
    path.touch()


def test_make_runs_every_notebook_after_those_it_reads_and_nothing_the_second_time(project):
    order = ran(project)
    assert sorted(order) == FIGURES
    assert all(order.index(before) < order.index(name) for name in order for before in EDGES.get(name, ()))
    assert (project / "calls").read_text().splitlines()[0] == f"{order[0]}|atlas|||"
    assert ran(project) == []
    assert ran(project, "-j4") == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_touched_notebook_runs_again_with_its_dependants_and_no_other(project, name):
    ran(project)
    touch(project / "notebooks" / f"{name}.ipynb")
    assert set(ran(project)) == with_dependants(name) & set(FIGURES)
    assert ran(project) == []


def test_scaling_runs_on_request_after_what_it_reads_and_nothing_else(project):
    done = make(project, "scaling")
    assert done.returncode == 0, done.stderr
    called = [line.split("|")[0] for line in (project / "calls").read_text().splitlines()]
    assert called[-1] == "10_scaling" and set(called[:-1]) == EDGES["10_scaling"]


def test_a_changed_helper_or_environment_runs_all_again(project):
    ran(project)
    touch(project / "helpers" / "atlas.py")
    assert sorted(ran(project)) == FIGURES
    touch(project / ".venv" / "installed")
    assert sorted(ran(project)) == FIGURES
    assert ran(project) == []


@pytest.mark.parametrize("choice", ["MODEL=some/model", "DPO_MODEL=some/partner", "DATA=atlas:belief"])
def test_another_model_or_data_runs_all_again_and_back_again(project, choice):
    ran(project)
    assert sorted(ran(project, choice)) == FIGURES
    assert choice.split("=")[1] in (project / "calls").read_text().splitlines()[-1].split("|")
    assert ran(project, choice) == []
    assert sorted(ran(project)) == FIGURES


def test_profiles_have_their_own_folders_and_a_changed_profile_file_runs_all_again(project):
    ran(project)
    (project / "mine.toml").write_text("seed = 1\n")
    assert sorted(ran(project, "PROFILE=mine.toml")) == FIGURES
    assert (project / "build" / "mine" / f"{NAMES[0]}.ipynb").exists()
    assert ran(project, "PROFILE=mine.toml") == [] and ran(project) == []
    touch(project / "mine.toml")
    assert sorted(ran(project, "PROFILE=mine.toml")) == FIGURES


def test_a_failing_notebook_stops_make_and_leaves_no_finished_file(project):
    broken = "02_dpo_lora"
    (project / "broken").write_text(broken)
    done = make(project, "figures")
    assert done.returncode != 0 and broken in done.stderr
    finished = {path.stem for path in (project / "build" / "atlas").glob("*.ipynb")}
    assert not with_dependants(broken) & finished
    assert f"{broken}.partial" in finished
    (project / "broken").unlink()
    assert set(ran(project)) == set(FIGURES) - finished  # what had run is not run again


# --- The other targets ---


def test_help_lists_every_target_with_what_it_does():
    text = (PROJECT / "Makefile").read_text()
    targets = set(" ".join(re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)).split()) - {"always"}
    listed = dict(re.findall(r"^([a-z-]+) +(\S.*)$", make(PROJECT, "help").stdout, flags=re.MULTILINE))
    assert listed.keys() == targets and len(targets) > 5


def test_help_is_what_make_does_by_default_and_runs_nothing(project):
    assert make(project).stdout == make(project, "help").stdout != ""
    assert not (project / "calls").exists() and not (project / "build").exists()


def test_clean_keeps_what_was_trained_and_the_environment(project):
    ran(project)
    (project / "artifacts").mkdir()
    assert make(project, "clean").returncode == 0
    assert not (project / "build").exists()
    assert (project / "artifacts").exists() and (project / ".venv" / "bin" / "python").exists()
    assert make(project, "distclean").returncode == 0
    assert not (project / "artifacts").exists() and not (project / ".venv").exists()


def test_a_changed_list_of_dependencies_renews_the_environment_before_any_notebook(project):
    """Here by a python that is too old, so that make stops there and says which one it needs."""
    touch(project / "pyproject.toml")
    old = project / "old"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 9\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9); $2"\n'
    )
    old.chmod(0o755)
    done = make(project, "figures", "PYTHON=./old")
    assert done.returncode != 0 and "Python 3.11 or newer is needed: make PYTHON=<one>." in done.stderr
    assert not (project / "calls").exists()
