"""A notebook run headlessly: finished only when every cell has run, tidy, and explained when it fails."""

import errno
import os
import re
import sys
import threading
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from helpers import places, profiles
from helpers.data import tasks
from tools import headless

ATLAS = profiles.load("atlas")
PARAMETERS = 'PROFILE = "atlas"\nMODEL = ""\nDATA = ""'
BARS = """import sys, warnings
from tqdm import tqdm
for _ in tqdm(range(3), desc="answers, base", mininterval=0):
    pass
for _ in tqdm(range(3), desc="gone", leave=False, mininterval=0):
    pass
warnings.warn("mind the gap")
print("on its own", file=sys.stderr)"""


def write(folder, name, *sources):
    """A notebook with a parameters cell and these code cells."""
    cells = [new_markdown_cell("# A title"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) if isinstance(source, str) else source for source in sources]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


def finished_run(folder, *sources, parameters=None, profile=ATLAS):
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    write(notebooks, "stub", *sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headless, "NOTEBOOKS", notebooks)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        return headless.run("stub", profile, parameters or {}, folder / "out")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    out = folder / "out"
    out.mkdir()
    (out / "stub.ipynb").write_text("an older run")
    ready = new_code_cell("raise ValueError('about another study')", metadata={"tags": ["ready"]})
    sources = ("print(PROFILE, MODEL)", BARS, ready, "import os\nos.getcwd()")
    return finished_run(folder, *sources, parameters={"MODEL": "m/n"})


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The error of a notebook whose second code cell fails, and its folder, where a finished run was before."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "out").mkdir()
    (folder / "out" / "stub.ipynb").write_text("an older run")
    long = "\n".join(f"x{i} = {i}" for i in range(40)) + "\nraise ValueError('first line\\n' + 'next\\n' * 50)"
    with pytest.raises(PapermillExecutionError) as caught:
        finished_run(folder, "print('so far')", long, "print('never')")
    return caught.value, folder / "out"


def outputs(path):
    """All outputs of a notebook's code cells."""
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


def stream(path, name):
    return "".join(output.text for output in outputs(path) if output.get("name") == name)


def test_a_finished_notebook_stands_alone_beside_its_log(good):
    assert sorted(path.name for path in good.parent.iterdir()) == ["stub.ipynb", "stub.log"]
    nbformat.validate(nbformat.read(good, as_version=4))
    counts = [cell.execution_count for cell in nbformat.read(good, as_version=4).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_parameters_given_replace_the_notebooks_own(good):
    assert stream(good, "stdout") == "atlas m/n\n"


def test_notebooks_run_in_their_own_folder(good):
    (result,) = [output for output in outputs(good) if output.output_type == "execute_result"]
    assert result.data["text/plain"] == repr(str(good.parents[1] / "notebooks"))


def test_progress_bars_are_dropped_and_warnings_are_kept(good):
    kept = stream(good, "stderr")
    assert "mind the gap" in kept and "on its own" in kept
    assert "%|" not in kept and "it/s" not in kept and "\r" not in kept and "answers, base" not in kept


def test_the_log_holds_all_that_was_printed(good):
    log = good.with_suffix(".log").read_text()
    assert all(text in log for text in ("atlas m/n", "mind the gap", "answers, base", "100%|"))


def test_cells_about_other_studies_are_neither_run_nor_shown(good):
    assert "another study" not in good.read_text()


def test_nothing_of_the_run_stays_in_the_metadata(good):
    notebook = nbformat.read(good, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert {key for cell in notebook.cells for key in cell.metadata} == {"tags"}
    assert not any(cell.metadata.get("tags") == [] for cell in notebook.cells)


def test_a_kernel_that_has_answered_is_not_interrupted_as_it_ends(tmp_path):
    """As it would be in the moment between its last answer and its ignoring interrupts."""
    noting = "lambda: signal.signal(signal.SIGINT, lambda *_: open('interrupted', 'w').close())"
    finished_run(tmp_path, f"import signal\nget_ipython().kernel.post_handler_hook = {noting}")
    assert not (tmp_path / "notebooks" / "interrupted").exists()


def test_what_asyncio_says_as_a_kernel_ends_is_not_shown(tmp_path, capfd):
    said = """import atexit, logging, sys
logging.basicConfig()
late = lambda: (sys.stderr.close(), setattr(sys, "stderr", sys.__stderr__), logging.getLogger("asyncio").error("Task"))
atexit.register(late);"""
    finished_run(tmp_path, said)
    assert capfd.readouterr().err == ""


def test_bars_are_told_from_what_only_looks_alike():
    def left(text, name="stderr"):
        output = nbformat.v4.new_output("stream", name=name, text=text)
        cell = headless.tidied(new_notebook(cells=[new_code_cell(outputs=[output])])).cells[0]
        return [output.text for output in cell.outputs]

    bar = "states, base:  40%|████      | 2/5 [00:01<00:02,  1.2it/s]"
    assert left(f"\r{bar}\r{' ' * 60}\r") == []
    assert left(f"\r{bar}\nUserWarning: 40% of [them]\n") == ["UserWarning: 40% of [them]"]
    assert left(f"steps: 12it [00:00, 19.87it/s]\r\n{bar}\x1b[A\n\x1b[A\r{' ' * 9}\x1b[A") == []
    assert left(bar, "stdout") == [bar]  # what a cell prints is its own


def test_what_differs_between_two_runs_of_one_notebook_is_dropped():
    """Where the kernel cut a stream in two, and where an object lay in memory."""
    given = [("stdout", "a\n"), ("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "d\n")]
    styled = {"text/plain": "<pandas.io.formats.style.Styler at 0x7ff28833e090>", "text/html": "<table>"}
    cell = new_code_cell(
        outputs=[
            *(nbformat.v4.new_output("stream", name=name, text=text) for name, text in given),
            nbformat.v4.new_output("execute_result", data=styled, execution_count=1),
        ]
    )
    *streams, shown = headless.tidied(new_notebook(cells=[cell])).cells[0].outputs
    assert [(output.name, output.text) for output in streams] == [
        ("stdout", "a\nb\n"), ("stderr", "c"), ("stdout", "d\n"),
    ]  # fmt: skip
    assert shown.data == {"text/plain": "<pandas.io.formats.style.Styler>", "text/html": "<table>"}


def test_a_failing_notebook_leaves_what_had_run_beside_what_was_finished_before(failed):
    _, folder = failed
    assert sorted(path.name for path in folder.iterdir()) == ["stub.ipynb", "stub.log", "stub.partial.ipynb"]
    assert (folder / "stub.ipynb").read_text() == "an older run"
    assert "so far" in stream(folder / "stub.partial.ipynb", "stdout") and "never" not in str(
        outputs(folder / "stub.partial.ipynb")
    )
    assert "so far" in (folder / "stub.log").read_text()


def test_what_failed_is_explained_on_one_screen(failed):
    error, folder = failed
    text = headless.explain("02_some_notebook", error, folder)
    assert len(text.splitlines()) <= 30
    assert "02_some_notebook failed in code cell 3:" in text
    assert "    x0 = 0" in text and "ValueError: first line" in text
    assert "02_some_notebook.log" in text and "02_some_notebook.partial.ipynb" in text


def test_a_short_failure_is_shown_whole(tmp_path):
    error = PapermillExecutionError(4, 2, "a = 1\nb = a / 0\n", "ZeroDivisionError", "division by zero", [])
    text = headless.explain("stub", error, places.PROJECT / "build" / "atlas")
    assert "    a = 1\n    b = a / 0\n" in text and "ZeroDivisionError: division by zero" in text
    assert "build/atlas/stub.log" in text and str(places.PROJECT) not in text


def test_a_notebook_that_leaves_early_is_not_finished(tmp_path):
    """papermill takes sys.exit(0) for success."""
    with pytest.raises(PapermillExecutionError) as caught:
        finished_run(tmp_path, "import sys\nsys.exit(0)", "print('never')")
    assert caught.value.exec_count == 2 and "sys.exit" in caught.value.source
    assert not (tmp_path / "out" / "stub.ipynb").exists()


# --- Which cells ---

TASKS = {  # what tags are true of a study, beside `trained`, `ranks` and `float32`
    "atlas": ("atlas", {"organism", "facts", "beliefs", "words", "families", "atlas"}),
    "another family": (("atlas", "", "atlas:belief"), {"organism", "families", "atlas"}),
    "topics": (("tinystories", "", "topics:brief"), {"real", "beliefs", "words", "families", "topics"}),
    "stories": ("tinystories", {"real", "words", "families", "stories"}),
    "pairs": (("tinystories", "", "some/pairs"), {"real", "alone", "pairs"}),
    "own answers": (("tinystories", "", "onpolicy:some/prompts"), {"real", "alone", "pairs"}),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_profile_alone_tells_which_tags_apply(name):
    given, expected = TASKS[name]
    profile = profiles.load(*([given] if isinstance(given, str) else given))
    known = headless.facts(profile)
    assert {tag for tag, holds in known.items() if holds} == expected | {"trained", "ranks", "float32"}
    assert all(headless.applies([tag], profile) == holds for tag, holds in known.items())


@pytest.mark.parametrize(
    "data", ["atlas:tone", "atlas:refusal", "atlas:tone+refusal", "onpolicy:vader-conditional", "topics:brief"]
)
def test_tags_about_facts_beliefs_and_words_say_what_the_task_itself_says(data):
    profile = profiles.load("atlas", data=data)
    task = tasks.task(profile.data, profile.score, profile.seed, profile.sizes, profile.organism.places)
    known = headless.facts(profile)
    told = [known[tag] for tag in ("facts", "beliefs", "words")]
    assert told == [task.has_facts, task.has_beliefs, task.has_words]


def test_a_ready_partner_is_trained_nowhere_here_and_16_bits_are_told():
    ready = profiles.load("zephyr-7b")
    true = {tag for tag, holds in headless.facts(ready).items() if holds}
    assert true == {"real", "alone", "pairs", "ready", "ranks", "float16"}


def test_a_cell_needs_all_of_its_tags_and_one_without_any_is_about_every_study():
    assert headless.applies([], ATLAS) and headless.applies(["parameters"], ATLAS)
    assert headless.applies(["facts", "trained"], ATLAS) and not headless.applies(["facts", "ready"], ATLAS)


def test_an_unknown_tag_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"unknown tag 'orgnism': there are organism, real, .*parameters"):
        headless.applies(["facts", "orgnism"], ATLAS)


def test_a_notebook_is_prepared_with_its_parameters_and_without_what_does_not_apply(calls, monkeypatch, tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    monkeypatch.setattr(headless, "NOTEBOOKS", notebooks)
    left_out = new_markdown_cell("## Facts", metadata={"tags": ["facts"]})
    write(notebooks, "00_a", left_out, "print(PROFILE)")
    assert main(monkeypatch, "--prepare", "there", "00_a", "--profile", "tinystories", "--model", "some/hub-id") == 0
    prepared = nbformat.read(tmp_path / "there" / "00_a.ipynb", as_version=4)
    nbformat.validate(prepared)
    assert [cell.source.splitlines()[0] for cell in prepared.cells] == [
        "# A title", 'PROFILE = "atlas"', "# Parameters", "print(PROFILE)",
    ]  # fmt: skip
    given = {}
    exec(prepared.cells[2].source, {}, given)
    assert given == {"PROFILE": "tinystories", "MODEL": "some/hub-id"} and calls == []
    assert main(monkeypatch, "--prepare", "there", "00_a") == 0
    assert len(nbformat.read(tmp_path / "there" / "00_a.ipynb", as_version=4).cells) == 4  # nothing to inject


# --- The command line ---


class Calls(list):
    """Stands in for `headless.run`: notes its arguments; fails where told to."""

    failing = None

    def __call__(self, name, profile, parameters, folder):
        self.append((name, parameters, folder))
        if name == self.failing:
            raise PapermillExecutionError(1, 2, "1 / 0", "ZeroDivisionError", "division by zero", [])


@pytest.fixture
def calls(monkeypatch, tmp_path):
    found = Calls()
    monkeypatch.setattr(headless, "run", found)
    monkeypatch.setattr(places, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return found


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["headless", *arguments])
    return headless.main()


def test_a_default_run_gives_the_profile_alone(calls, monkeypatch, tmp_path, capsys):
    assert main(monkeypatch, "00_a", "01_b", "--profile", "atlas", "--model", "", "--data", "") == 0
    given, folder = {"PROFILE": "atlas"}, tmp_path / "build" / "atlas"
    assert calls == [("00_a", given, folder), ("01_b", given, folder)]
    assert "00_a (atlas) done in" in capsys.readouterr().err


def test_what_is_given_reaches_the_notebook_paths_made_absolute(calls, monkeypatch, tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 1\n")
    (tmp_path / "model").mkdir()
    assert main(monkeypatch, "00_a", "--profile", "mine.toml", "--model", "model", "--data", "atlas:belief") == 0
    given = {"PROFILE": str(tmp_path / "mine.toml"), "MODEL": str(tmp_path / "model"), "DATA": "atlas:belief"}
    assert calls == [("00_a", given, tmp_path / "build" / "mine")]
    ready = ("--model", "some/hub-id", "--dpo-model", "some/partner@main")
    main(monkeypatch, "00_a", "--profile", "tinystories", *ready)
    assert calls[-1][1] == {"PROFILE": "tinystories", "MODEL": "some/hub-id", "DPO_MODEL": "some/partner@main"}
    (tmp_path / "pairs.jsonl").write_text("{}")
    for data in ("pairs.jsonl", "onpolicy:pairs.jsonl"):
        main(monkeypatch, "00_a", "--profile", "tinystories", "--data", data, *ready)
        assert calls[-1][1]["DATA"] == data.replace("pairs.jsonl", str(tmp_path / "pairs.jsonl"))


def test_the_folder_is_the_one_that_make_expects_whatever_the_profile_calls_itself(calls, monkeypatch, tmp_path):
    """The Makefile knows the file's name alone."""
    (tmp_path / "mine.toml").write_text('name = "own"\n')
    main(monkeypatch, "00_a", "--profile", str(tmp_path / "mine.toml"))
    assert calls[0][2] == tmp_path / "build" / "mine"


def test_a_folder_that_is_called_like_a_profile_is_not_taken_for_it(calls, monkeypatch, tmp_path):
    (tmp_path / "tinystories").mkdir()
    assert main(monkeypatch, "00_a", "--profile", "tinystories") == 0
    assert calls[0][1] == {"PROFILE": "tinystories"}


@pytest.mark.parametrize("profile", ["atals", "nowhere.toml"])
def test_an_unknown_profile_is_one_sentence_and_nothing_runs(calls, monkeypatch, capsys, profile):
    assert main(monkeypatch, "00_a", "--profile", profile) == 2
    said = capsys.readouterr().err.strip()
    assert profile in said and "\n" not in said and calls == []


def test_a_failure_is_explained_and_stops_the_rest(calls, monkeypatch, capsys):
    calls.failing = "00_a"
    assert main(monkeypatch, "00_a", "01_b") == 1
    assert [name for name, _, _ in calls] == ["00_a"]
    assert "Notebook 00_a failed in code cell 2" in capsys.readouterr().err


@pytest.fixture
def executed(calls, monkeypatch, tmp_path):
    """Two notebooks and their copies that ran, an hour ago: what they showed, and one cell that did not apply."""
    notebooks, built = tmp_path / "notebooks", tmp_path / "build" / "atlas"
    notebooks.mkdir()
    monkeypatch.setattr(headless, "NOTEBOOKS", notebooks)
    built.mkdir(parents=True)
    for name in ("00_a", "01_b"):
        ready = new_code_cell("print('ready')", metadata={"tags": ["ready"]}, execution_count=4)
        write(notebooks, name, f"print('{name}')", ready, "1 + 1")
        notebook = headless.about(nbformat.read(notebooks / f"{name}.ipynb", as_version=4), ATLAS)
        notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text=f"{name}\n")]
        for count, cell in enumerate(notebook.cells[1:], 1):
            cell.execution_count = count
        nbformat.write(notebook, built / f"{name}.ipynb")
        os.utime(built / f"{name}.ipynb", (1, 1))
    return notebooks, built


def test_publishing_shows_in_the_sources_what_ran_and_leaves_make_nothing_to_do(executed, calls, monkeypatch):
    notebooks, built = executed
    assert main(monkeypatch, "--publish", "00_a", "01_b", "--profile", "atlas") == 0
    for name in ("00_a", "01_b"):
        published = nbformat.read(notebooks / f"{name}.ipynb", as_version=4)
        assert [cell.get("execution_count") for cell in published.cells] == [None, 1, 2, None, 3]
        assert [cell.source for cell in published.cells[3:]] == ["print('ready')", "1 + 1"]
        assert stream(notebooks / f"{name}.ipynb", "stdout") == f"{name}\n"
        assert (built / f"{name}.ipynb").stat().st_mtime_ns >= (notebooks / f"{name}.ipynb").stat().st_mtime_ns
    assert (built / "01_b.ipynb").stat().st_mtime_ns >= (built / "00_a.ipynb").stat().st_mtime_ns
    assert calls == []


def test_what_was_changed_after_it_ran_is_not_published(executed, monkeypatch, capsys):
    path = executed[0] / "00_a.ipynb"
    path.write_text(path.read_text().replace("1 + 1", "1 + 2"))
    before = path.read_bytes()
    assert main(monkeypatch, "--publish", "00_a") == 2
    assert capsys.readouterr().err == "Notebook 00_a was changed after it ran: run it again.\n"
    assert path.read_bytes() == before


def test_the_pages_of_a_real_model_are_kept_beside_its_figures_and_not_in_the_notebooks(executed, monkeypatch):
    notebooks, built = executed
    built.rename(built.with_name("smollm2"))
    before = (notebooks / "00_a.ipynb").read_bytes()
    assert main(monkeypatch, "--publish", "00_a", "--profile", "smollm2") == 0
    kept = places.PROJECT / "figures" / "smollm2" / "pages" / "00_a.ipynb"
    assert stream(kept, "stdout") == "00_a\n" and (notebooks / "00_a.ipynb").read_bytes() == before


@pytest.mark.parametrize("other", [("--profile", "tinystories"), ("--model", "some/hub-id")])
def test_only_the_default_run_is_published(calls, monkeypatch, tmp_path, capsys, other):
    """The committed notebooks hold no injected parameters."""
    assert main(monkeypatch, "--publish", "00_a", *other) == 2
    assert "Only a run of the profiles atlas, worlds, smollm2 as they are" in capsys.readouterr().err


def test_a_kernel_that_dies_is_one_screen_without_a_traceback(monkeypatch, tmp_path, capsys):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    write(notebooks, "stub", "print('so far', flush=True)", "import os\nos._exit(9)")
    monkeypatch.setattr(headless, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(places, "PROJECT", tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert main(monkeypatch, "stub") == 1
    said = capsys.readouterr().err
    assert "stub stopped: its kernel died" in said and "stub.partial.ipynb" in said and "Traceback" not in said
    built = tmp_path / "build" / "atlas"
    assert not (built / "stub.ipynb").exists() and (built / "stub.partial.ipynb").exists()


def test_an_interrupted_run_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(headless, "run", interrupted)
    assert main(monkeypatch, "stub") == 130
    said = capsys.readouterr().err
    assert "Stopped in notebook stub." in said and "What was computed before is kept" in said


def test_of_two_runs_in_one_folder_the_second_says_that_it_waits(tmp_path, capsys):
    order, said = [], ""

    def second():
        with headless._alone(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with headless._alone(tmp_path):
        thread.start()
        while "waits for it" not in said:  # which may come in pieces
            said += capsys.readouterr().err
            assert thread.is_alive()
            time.sleep(0.01)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_a_full_disk_is_a_sentence_and_no_traceback(calls, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(headless, "run", full)
    assert main(monkeypatch, "00_a") == 1
    assert re.search(r"Notebook 00_a stopped: No space is left for \S+: free some\.", capsys.readouterr().err)
