"""Run a notebook headlessly with papermill: `python -m tools.headless <name> --profile atlas`.

The executed notebook appears in build/<profile>/ only when every cell has run. Until then it is `<name>.partial.ipynb`,
beside `<name>.log` with all that the cells printed; both stay after a failure. Cells whose tags do not apply to the
profile (`facts`) are neither run nor shown.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
from filelock import FileLock, Timeout
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from helpers import places, profiles
from helpers.data import catalogue, naming
from helpers.lm.naming import refuse_missing
from helpers.profiles import EMBEDDED, Profile
from helpers.world import grammar

NOTEBOOKS = places.PROJECT / "notebooks"
DEFAULT_PROFILE = "atlas"
PUBLISHED = (DEFAULT_PROFILE, "worlds")  # whose pages are notebooks/ as they are committed
BESIDE = ("smollm2",)  # whose executed pages are committed beside their figures
PAGES = "pages"  # in a profile's folder of figures: those pages
PAPERMILL_TAGS = ("parameters", "injected-parameters")
WIDGET = "application/vnd.jupyter.widget-view+json"
BAR, UP = r"\d+(%\|.*|it )\[\d\d:.*\]", "\x1b[A"  # of tqdm, its end known or not; and what takes it up a line
SHOWN_LINES = 12  # of a failed cell
SHOWN_ERROR_LINES = 6  # of what it raised


class Tee:
    """Writes to the terminal and to a log."""

    def __init__(self, *streams: TextIO):
        self.streams = streams

    def write(self, text: str) -> None:
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


# A kernel warns of its unencrypted port, which is on loopback, and asyncio of the kernel's tasks that its end cuts off.
QUIET = ("log_level=ERROR", "exec_lines=__import__('logging').getLogger('asyncio').setLevel('CRITICAL')")


class Kernel(AsyncKernelManager):
    """A kernel that ends without being interrupted first: where it still puts its last answer away, it reports that."""

    async def _async_interrupt_kernel(self) -> None:
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


def applies(tags: Iterable[str], profile: Profile) -> bool:
    """Whether a cell with these tags is about a study: every tag must be true of its profile (`facts`).
    Raises ValueError for a tag that is not known."""
    known = facts(profile) | dict.fromkeys(PAPERMILL_TAGS, True)
    for tag in tags:
        if tag not in known:
            raise ValueError(f"A cell has the unknown tag {tag!r}: there are {', '.join(known)}.")
    return all(known[tag] for tag in tags)


@cache
def facts(profile: Profile) -> dict[str, bool]:
    """What a cell's tag asks of a study, from its profile alone."""
    from_elsewhere, atlas = naming.source_of(profile.data) is not None, profile.data.startswith(catalogue.ATLAS)
    about_tone = atlas and grammar.are_about_tone(catalogue.mixed_families(profile.data))
    topics = profile.data.startswith(naming.TOPICS)
    several = len(profile.families) > 1
    return {
        "organism": profile.model == EMBEDDED,  # the base is pretrained here
        "real": profile.model != EMBEDDED,
        "facts": about_tone,  # known by rule, and stated
        "beliefs": about_tone or topics,  # can be asked for
        "words": about_tone or not (atlas or from_elsewhere),  # that ask for the behaviour
        "trained": not profile.dpo_model,  # the partner, here
        "ready": bool(profile.dpo_model),
        "ranks": bool(profile.extent.ranks),  # of other adapters are trained
        "families": several,  # are compared
        "alone": not several,
        "atlas": atlas,  # where pairs come from
        "topics": topics,
        "stories": not (atlas or topics or from_elsewhere),
        "pairs": from_elsewhere,
        "float16": profile.dtype in ("bfloat16", "float16"),
        "float32": profile.dtype in ("float32", "float64"),
    }


def about(notebook: NotebookNode, profile: Profile) -> NotebookNode:
    """The notebook without the cells that do not apply to a study."""
    notebook.cells = [cell for cell in notebook.cells if applies(cell.metadata.get("tags", ()), profile)]
    return notebook


def prepare(name: str, profile: Profile, parameters: dict[str, str], folder: Path) -> None:
    """Write notebooks/<name>.ipynb as `run` would run it into a folder, and do not run it."""
    notebook = about(load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), profile)
    given = _not_its_own(notebook, parameters)
    notebook = parameterize_notebook(notebook, given) if given else notebook
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(tidied(notebook), folder / f"{name}.ipynb")


def run(name: str, profile: Profile, parameters: dict[str, str], folder: Path) -> Path:
    """Execute notebooks/<name>.ipynb and return the finished copy in `folder`. Raises PapermillExecutionError."""
    folder.mkdir(parents=True, exist_ok=True)
    finished, partial, log = (folder / f"{name}{end}" for end in (".ipynb", ".partial.ipynb", ".log"))
    notebook = about(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4), profile)
    nbformat.write(notebook, partial)
    with log.open("w") as file:
        papermill.execute_notebook(
            partial, partial, _not_its_own(notebook, parameters), cwd=NOTEBOOKS, progress_bar=False,
            stdout_file=file, stderr_file=Tee(sys.stderr, file), kernel_manager_class=Kernel,
            extra_arguments=[f"--IPKernelApp.{setting}" for setting in QUIET],
        )  # fmt: skip
    notebook = nbformat.read(partial, as_version=4)
    _check_that_all_ran(notebook)
    nbformat.write(tidied(notebook), partial)
    partial.rename(finished)
    return finished


def _check_that_all_ran(notebook: NotebookNode) -> None:
    """Raise PapermillExecutionError for a cell that left early: papermill takes sys.exit(0) for success."""
    for i, cell in enumerate(notebook.cells):
        for at in cell.get("outputs", []):
            if at.output_type == "error":
                raise PapermillExecutionError(i, cell.execution_count, cell.source, at.ename, at.evalue, at.traceback)


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Drop what should not be kept, or would differ between two runs: progress bars, timings and paths in the metadata,
    addresses in memory, where a stream was cut in two. Warnings and errors stay."""
    described = ("kernelspec", "language_info")
    notebook.metadata = {key: notebook.metadata[key] for key in described if key in notebook.metadata}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if cell.metadata.get(key)}
        if cell.cell_type == "code":
            cell.outputs = reduce(_with, cell.outputs, [])
    return notebook


def _with(outputs: list[NotebookNode], output: NotebookNode) -> list[NotebookNode]:
    """The outputs and what is kept of one more, added to the last where both are of one stream."""
    shown = output.get("data", {})
    if WIDGET in shown:  # a library's own bar: an empty box where no kernel runs
        return outputs
    if "text/plain" in shown:  # an object without a text of its own has its address there, beside a richer form
        shown["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", shown["text/plain"])
    if output.get("name") == "stderr":
        pieces = re.split(r"[\r\n]+", output.text.replace(UP, ""))
        output.text = "\n".join(p for p in pieces if p.strip() and not re.search(BAR, p))
        if not output.text:
            return outputs
    if outputs and "name" in output and outputs[-1].get("name") == output.name:
        outputs[-1].text += output.text
        return outputs
    return [*outputs, output]


def explain(name: str, error: PapermillExecutionError, folder: Path) -> str:
    """What failed, in one screen."""
    source = "\n".join(f"    {line}" for line in _first_lines(error.source.strip(), SHOWN_LINES))
    raised = "\n".join(_first_lines(f"{error.ename}: {error.evalue}", SHOWN_ERROR_LINES))
    failed = f"Notebook {name} failed in code cell {error.exec_count}:"
    return "\n\n".join([failed, source, raised, _what_is_kept(name, folder)])


def _what_is_kept(name: str, folder: Path) -> str:
    inside = folder.is_relative_to(places.PROJECT)
    at = (folder.relative_to(places.PROJECT) if inside else folder) / name
    return (
        f"All that it printed: {at}.log\nAll that it had run: {at}.partial.ipynb\n"
        "What was computed before is kept: mend the cause and run the same command again."
    )


def _first_lines(text: str, n: int) -> list[str]:
    lines = text.splitlines()
    return lines if len(lines) <= n else [*lines[:n], "..."]


def publish(names: list[str], folder: Path) -> None:
    """Put what executed notebooks show into their sources, so that the committed ones carry the outputs of a real run.
    A cell that did not run, since it is about other studies, stays without outputs. The executed copies are touched
    afterwards, since nothing in them is out of date."""
    for name in names:
        source, executed = _as_it_ran(name, folder)
        ran = {cell.id: cell for cell in executed.cells}
        for i, cell in enumerate(source.cells):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            source.cells[i] = ran.get(cell.id, cell)
        source.metadata = executed.metadata
        nbformat.write(source, NOTEBOOKS / f"{name}.ipynb")
        (folder / f"{name}.ipynb").touch()


def publish_beside(names: list[str], folder: Path, figures: Path) -> None:
    """Copy executed notebooks, as they ran, into a folder beside their figures."""
    (figures / PAGES).mkdir(parents=True, exist_ok=True)
    for name in names:
        _, executed = _as_it_ran(name, folder)
        nbformat.write(executed, figures / PAGES / f"{name}.ipynb")


def _as_it_ran(name: str, folder: Path) -> tuple[NotebookNode, NotebookNode]:
    """A notebook's source and its executed copy. Raises ValueError where the source was changed in between."""
    source, executed = (nbformat.read(at / f"{name}.ipynb", as_version=4) for at in (NOTEBOOKS, folder))
    ran = {cell.id: cell for cell in executed.cells}
    if any(cell.source != ran[cell.id].source for cell in source.cells if cell.id in ran):
        raise ValueError(f"Notebook {name} was changed after it ran: run it again.")
    return source, executed


def main() -> int:
    given = _arguments()
    try:
        profile = profiles.load(given.profile, given.model, given.data, given.dpo_model)
        known = {name: profiles.load(name) for name in (*PUBLISHED, *BESIDE)}
        if given.publish and profile not in known.values():
            raise ValueError(f"Only a run of the profiles {', '.join(known)} as they are can be published.")
        _check_sources(profile, given)
        folder = places.PROJECT / "build" / Path(given.profile).name.removesuffix(".toml")  # make's name for it
        if given.publish and profile.name in BESIDE:
            publish_beside(given.names, folder, places.PROJECT / "figures" / profile.name)
        elif given.publish:
            publish(given.names, folder)
        for name in given.names if given.prepare else ():
            prepare(name, profile, _parameters(given), Path(given.prepare))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.publish or given.prepare:
        return 0
    for name in ("TOXICITY_MODEL", "TRUTHFULQA"):
        if name in os.environ:
            os.environ[name] = profiles.resolved(os.environ[name])
    return next((code for name in given.names if (code := _reported(name, profile, _parameters(given), folder))), 0)


def _check_sources(profile: Profile, given: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for what no notebook need be started to refuse."""
    if profile.data.startswith(naming.PROMPTS) and any(name[0].isdigit() for name in given.names):
        raise ValueError(f"{profile.data!r} are prompts alone, which are for `make report`: give pairs with DATA=.")
    if given.profile == "report" and not (profile.dpo_model or given.data):
        raise ValueError("A page about your own model needs its partner as DPO_MODEL=, or pairs to train one as DATA=.")
    for source in filter(None, (given.model, given.dpo_model)):
        refuse_missing(source)
    if given.data and naming.source_of(profile.data) is not None:
        naming.local_file(naming.split_prefix(profile.data)[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb; none: what was chosen is checked alone")
    parser.add_argument("--profile", default=DEFAULT_PROFILE)
    parser.add_argument("--model", default="", help="replaces the profile's model: a hub id, a folder or a .gguf file")
    parser.add_argument("--dpo-model", default="", help="replaces its partner: a ready one, a hub id or a folder")
    parser.add_argument("--data", default="", help="replaces the profile's preference data")
    parser.add_argument("--publish", action="store_true", help="put what they showed into their sources instead")
    parser.add_argument("--prepare", metavar="FOLDER", help="write the notebooks as they would run there instead")
    return parser.parse_args()


def _parameters(given: argparse.Namespace) -> dict[str, str]:
    """What notebooks are told: names of profiles and hub ids as they are, paths absolute."""
    named = profiles.resolved(given.profile) if given.profile.endswith(".toml") else given.profile
    chosen = {"MODEL": given.model, "DPO_MODEL": given.dpo_model, "DATA": given.data}
    wanted = {"PROFILE": named} | {name: profiles.resolved(value) for name, value in chosen.items()}
    return {key: value for key, value in wanted.items() if value}


def _not_its_own(notebook: NotebookNode, parameters: dict[str, str]) -> dict[str, str]:
    """The parameters that differ from a notebook's own, so that a run as it stands needs no injected cell."""
    own = "\n".join(cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return {name: value for name, value in parameters.items() if f'{name} = "{value}"' not in own}


def _reported(name: str, profile: Profile, parameters: dict[str, str], folder: Path) -> int:
    """Run a notebook, say how it went, and return the exit status of that."""
    started = time.monotonic()
    print(f"{name} ({profile.name}) ...", file=sys.stderr, flush=True)
    try:
        with places.writing(folder), _alone(folder):
            run(name, profile, parameters, folder)
        status, said = 0, f"{name} ({profile.name}) done in {time.monotonic() - started:.0f} s"
    except PapermillExecutionError as error:
        status, said = 1, explain(name, error, folder)
    except DeadKernelError:
        died = f"Notebook {name} stopped: its kernel died, most often for want of memory."
        status, said = 1, f"{died}\n{_what_is_kept(name, folder)}"
    except OSError as error:
        status, said = 1, f"Notebook {name} stopped: {error}"
    except ValueError as error:  # a cell's unknown tag
        status, said = 2, f"Notebook {name}: {error}"
    except KeyboardInterrupt:
        status, said = 130, f"\nStopped in notebook {name}.\n{_what_is_kept(name, folder)}"
    print(said, file=sys.stderr, flush=True)
    return status


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it lasts, no other run writes its notebooks into the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another run is at work in {folder.name}: this one waits for it.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
