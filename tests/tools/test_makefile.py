"""Make runs each notebook when it has to and not otherwise, and its edges are what the notebooks' code says."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers.places import PROJECT

COMMITTED = sorted(path.stem for path in (PROJECT / "notebooks").glob("[0-9]*.ipynb"))
# Stands in for the environment's python: notes which notebook it was asked to run, and writes it unless it is `broken`;
# asked for none, it refuses what is `missing`.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m tools.headless" ] || { echo "other: $*" >> calls; exit 0; }
if [ "$3" = "--profile" ]; then case "$*" in *missing*) exit 2;; esac; exit 0; fi
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
        if not key.startswith(("MAKE", "MFLAGS", "PROFILE", "MODEL", "DPO_MODEL", "DATA", "DSTEER_"))
    }
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=60)


@cache
def edges(folder: Path = PROJECT) -> dict[str, set[str]]:
    """notebook -> the notebooks that make runs before it, from make's own database."""
    database = make(folder, "-pn", "PROFILE=atlas", "help").stdout
    found = {}
    for target, prerequisites in re.findall(r"^build/atlas/(\d\w*)\.ipynb:(.*)$", database, flags=re.MULTILINE):
        found.setdefault(target, set()).update(re.findall(r"build/atlas/(\d\w*)\.ipynb", prerequisites))
    return found


def ledger_calls(name: str) -> set[str]:
    """What a notebook's code calls of the ledger."""
    cells = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    nodes = [n for cell in cells if cell.cell_type == "code" for n in ast.walk(ast.parse(cell.source))]
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "claims"}


# --- What depends on what ---


@pytest.mark.parametrize("name", COMMITTED)
def test_a_notebook_depends_on_those_before_it_whose_claims_it_reads_and_on_nothing_else(name):
    reads = ledger_calls(name) & {"load", "add_controls"}
    before = {other for other in COMMITTED if other < name and "record" in ledger_calls(other)}
    assert edges().get(name, set()) == (before if reads else set())


def test_some_notebook_reads_the_ledger_and_worlds_are_not_waited_for():
    assert any(edges().values()) and not any("worlds" in name for before in edges().values() for name in before)


# --- What runs when ---


SOURCES = {  # made-up notebooks, by what they have to do with the ledger
    "00_base": "print('claims')",
    "01_own": "claims.record(p, 'C1', e, 1, 'f')",
    "02_adding": "claims.record(p, 'C2', e, 1, 'g')\nclaims.add_controls(p, 'C1', {})",
    "03_late": "claims.record(p, 'C3', e, 1, 'h')",
    "04_score": "ledger = claims.load(p)",
    "10_worlds": "claims.record(p, 'C1', e, 1, 'w')",
}
FIGURES = sorted(SOURCES.keys() - {"10_worlds"})  # what `make figures` runs
READ = {"02_adding": {"01_own"}, "04_score": {"01_own", "02_adding", "03_late"}}


def with_readers(name: str) -> set[str]:
    """A notebook and all that read what it enters."""
    return {name}.union(*(with_readers(other) for other, before in READ.items() if name in before))


@pytest.fixture
def project(tmp_path):
    """The Makefile with a small house, made-up notebooks and a python that only takes notes."""
    for name in ("Makefile", "pyproject.toml", "predictions.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in ("helpers/lm/loading.py", "profiles/atlas.toml", "notebooks/one_page.ipynb", "tools/page.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, source in SOURCES.items():
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / "notebooks" / f"{name}.ipynb")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def test_make_sees_who_reads_what_in_the_notebooks_code(project):
    assert {name: before for name, before in edges(project).items() if before} == READ


def ran(project: Path, *arguments: str) -> list[str]:
    """Run `make figures` and return the notebooks that it ran, in order."""
    time.sleep(0.02)  # so that what was touched since the last run is newer than what that run wrote
    (project / "calls").unlink(missing_ok=True)
    done = make(project, "figures", *arguments)
    assert done.returncode == 0, done.stderr
    calls = project / "calls"
    return [line.split("|")[0] for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize(
    ("given", "profile", "data"),
    [
        ((), "quick", ""),
        (("PROFILE=atlas",), "atlas", ""),
        (("MODEL=b", "DPO_MODEL=d"), "report", "prompts:profiles/prompts.jsonl"),
        (("MODEL=b", "DPO_MODEL=d", "DATA=q.csv"), "report", "prompts:q.csv"),
        (("MODEL=b", "DPO_MODEL=d", "DATA=prompts:q.csv", "PROFILE=mine.toml"), "mine.toml", "prompts:q.csv"),
        (("MODEL=b", "DATA=pairs.csv"), "report", "pairs.csv"),
    ],
)
def test_a_report_is_about_the_pair_and_the_prompts_that_are_given(project, given, profile, data):
    commands = make(project, "-n", "report", *given).stdout
    assert f'headless one_page --profile "{profile}"' in commands and f'--data "{data}"' in commands
    name = profile.removesuffix(".toml")
    assert f"tools.page build/{name}/one_page.ipynb figures/{name}/report.html" in commands


def test_a_report_without_a_pair_is_about_the_organism_that_was_trained_here(project):
    assert ran(project)
    assert 'headless one_page --profile "atlas"' in make(project, "-n", "report").stdout


def touch(path: Path) -> None:
    time.sleep(0.02)
    path.touch()


def test_make_runs_every_notebook_after_those_it_reads_and_nothing_the_second_time(project):
    order = ran(project)
    assert sorted(order) == FIGURES
    assert all(order.index(before) < order.index(name) for name in order for before in READ.get(name, ()))
    assert (project / "calls").read_text().splitlines()[0] == f"{order[0]}|atlas|||"
    assert ran(project) == []
    assert ran(project, "-j4") == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_touched_notebook_runs_again_with_its_readers_and_no_other(project, name):
    ran(project)
    touch(project / "notebooks" / f"{name}.ipynb")
    assert set(ran(project)) == with_readers(name)
    assert ran(project) == []


def test_worlds_run_on_request_and_nothing_else_with_it(project):
    done = make(project, "worlds")
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[0] for line in (project / "calls").read_text().splitlines()] == ["10_worlds"]


@pytest.mark.parametrize(
    "changed", ["helpers/lm/loading.py", "profiles/atlas.toml", "predictions.toml", ".venv/installed"]
)
def test_changed_code_predictions_profile_or_environment_run_all_again(project, changed):
    ran(project)
    touch(project / changed)
    assert sorted(ran(project)) == FIGURES
    assert ran(project) == []


@pytest.mark.parametrize("choice", ["MODEL=some/model", "DPO_MODEL=some/partner", "DATA=atlas:belief"])
def test_another_model_or_data_runs_all_again_and_back_again(project, choice):
    ran(project)
    assert sorted(ran(project, choice)) == FIGURES
    assert choice.split("=")[1] in (project / "calls").read_text().splitlines()[-1].split("|")
    assert ran(project, choice) == []
    assert sorted(ran(project)) == FIGURES


def test_a_choice_that_is_refused_changes_nothing(project):
    ran(project)
    done = make(project, "figures", "MODEL=some/missing")
    assert done.returncode != 0
    assert {path.stem for path in (project / "build" / "atlas").glob("*.ipynb")} == set(FIGURES)
    assert ran(project) == []


def test_profiles_have_their_own_folders_and_a_changed_profile_file_runs_all_again(project):
    ran(project)
    (project / "mine.toml").write_text("seed = 1\n")
    assert sorted(ran(project, "PROFILE=mine.toml")) == FIGURES
    assert (project / "build" / "mine" / "00_base.ipynb").exists()
    assert ran(project, "PROFILE=mine.toml") == [] and ran(project) == []
    touch(project / "mine.toml")
    assert sorted(ran(project, "PROFILE=mine.toml")) == FIGURES


def test_a_failing_notebook_stops_make_and_leaves_no_finished_file(project):
    broken = "03_late"
    (project / "broken").write_text(broken)
    done = make(project, "figures")
    assert done.returncode != 0 and broken in done.stderr
    finished = {path.stem for path in (project / "build" / "atlas").glob("*.ipynb")}
    assert not with_readers(broken) & finished
    assert f"{broken}.partial" in finished
    (project / "broken").unlink()
    assert set(ran(project)) == set(FIGURES) - finished  # what had run is not run again


# --- The other targets ---


def test_the_tests_run_every_notebook_and_those_that_read_the_ledger_last_and_in_order(project):
    commands = make(project, "-n", "test").stdout
    *_, together, in_order = re.findall(r"--nbmake --nbmake-timeout=\d+ (.*)", commands)
    names = [re.findall(r"build/test/notebooks/(\w+)\.ipynb", line) for line in (together, in_order)]
    assert names == [["10_worlds", "00_base", "01_own", "03_late", "one_page"], ["02_adding", "04_score"]]
    assert "-n 2" in together and "-n" not in in_order


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


def test_a_space_in_a_profile_s_path_is_refused_in_a_sentence(project):
    done = make(project, "figures", "PROFILE=my folder/mine.toml")
    assert done.returncode != 0 and "PROFILE=my folder/mine.toml has a space in it" in done.stderr
    assert not (project / "build").exists()
