"""The content-addressed cache of trained and measured things.

An artefact is a folder. Its key is the sha256 of everything that decides its content: the stage's name, its
parameters, the keys of what it was made from, the code that makes it and the libraries that code runs on. A folder is
filled under a temporary name, gets a manifest of checksums and is then renamed, so a half-written artefact is never
mistaken for a finished one; checksums are verified each time it is read.
"""

import ast
import hashlib
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "numpy")
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # a file that `make` leaves where something is missing for now, such as a judge's answer


_making = ContextVar("making", default=True)
_tried_here: set[Path] = set()  # what this process left unfinished


class DamagedArtifact(Exception):
    """An artefact on disk is not what its manifest says."""


class NotCached(Exception):
    """An artefact is missing and may not be made here (`nothing_made`)."""


@dataclass(frozen=True)
class Artifact:
    """A finished, verified folder and the key that names it."""

    path: Path
    key: str

    def read_json(self, name: str):
        return json.loads((self.path / name).read_text())


def fetch(
    stage: str,
    params: dict,
    make: Callable[[Path], None],
    upstream: Iterable[Artifact] = (),
    code: Iterable = (),
) -> Artifact:
    """Return the artefact of a stage, making it if it is missing or damaged.

    `make(folder)` writes the content; `params` must be JSON; `code` are the modules and functions whose source decides
    the content. If `make` raises, nothing is stored and nothing already stored is touched. What it leaves UNFINISHED is
    taken as it is by this process and made again by the next, which keeps it, with a warning, where that fails.
    """
    key = key_of(stage, params, [artifact.key for artifact in upstream], [fingerprint(c) for c in code])
    path = root() / f"{stage}-{key[:16]}"
    with _alone(path):
        return _verified_or_made(path, key, stage, params, make)


def _alone(path: Path) -> FileLock:
    """One process at a time makes an artefact; the others wait for it and find it made."""
    locks = root() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / path.name)


def _verified_or_made(path: Path, key: str, stage: str, params: dict, make: Callable[[Path], None]) -> Artifact:
    if path.exists():
        try:
            verify(path, key)
            if not (path / UNFINISHED).exists() or path in _tried_here or not _making.get():
                return Artifact(path, key)
        except DamagedArtifact as damage:
            warnings.warn(f"{damage} It is computed again.", stacklevel=3)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not _making.get():
        raise NotCached(f"The artefact {path.name} is not in the cache.")
    try:
        _write(path, key, stage, params, make)
    except Exception as error:
        if not path.exists():
            raise
        warnings.warn(f"The artefact {path.name} stays unfinished: {error}", stacklevel=3)
        _tried_here.add(path)
    return Artifact(path, key)


@contextmanager
def nothing_made() -> Iterator[None]:
    """Inside, `fetch` raises NotCached where it would have to make something."""
    token = _making.set(False)
    try:
        yield
    finally:
        _making.reset(token)


def root() -> Path:
    """Where artefacts live: `artifacts/` in the project, or the folder that DSTEER_ARTIFACTS names."""
    return folder_from("DSTEER_ARTIFACTS", "artifacts")


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the project's own; never the working directory's."""
    return Path(os.environ.get(variable) or PROJECT / default).resolve()


def key_of(stage: str, params: dict, upstream_keys: list[str], code_fingerprints: list[str]) -> str:
    content = [stage, params, upstream_keys, code_fingerprints, {name: version(name) for name in LIBRARIES}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def fingerprint(source_of) -> str:
    """The sha256 of a module's, class's or function's syntax tree: comments, layout and docstrings do not count."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(source_of)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def verify(path: Path, key: str) -> None:
    """Raise DamagedArtifact unless the folder holds exactly the files its manifest lists, with their checksums."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        recorded_key, recorded = manifest["key"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"The artefact {path.name} has no readable manifest ({error}).") from error
    if recorded_key != key:
        raise DamagedArtifact(f"The artefact {path.name} was stored under another key.")
    found = _checksums(path)
    if found != recorded:
        wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
        raise DamagedArtifact(f"The artefact {path.name} is damaged: {', '.join(wrong)} missing or changed.")


def _write(path: Path, key: str, stage: str, params: dict, make: Callable[[Path], None]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        make(partial)
        manifest = {"stage": stage, "key": key, "params": params, "files": _checksums(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        shutil.rmtree(path, ignore_errors=True)  # one left unfinished
        partial.rename(path)
        if (path / UNFINISHED).exists():
            _tried_here.add(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder) != Path(MANIFEST))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
