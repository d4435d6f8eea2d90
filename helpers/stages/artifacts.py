"""The content-addressed cache: what a stage computes is kept under a key that says what decided it (keys.py).

An artefact is a folder. It is filled under a temporary name, gets a manifest of checksums and is then renamed, so that
a half-written one is never mistaken for a finished one; checksums are verified each time it is read.
"""

import functools
import hashlib
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import places
from helpers.stages import keys, memory

MANIFEST = "manifest.json"
VARIABLE = "DSTEER_ARTIFACTS"  # of the environment: where artefacts live instead
READ = 32  # artefacts of a stage that a process keeps as they were read, where its callers share them
UNFINISHED = "unfinished"  # a file that stands where something is missing for now, such as a judge's answer

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


def stage(
    make: Callable | None = None, *, unkeyed: Collection[str] = (), is_unfinished: Callable | None = None,
    read: Callable | None = None,
):  # fmt: skip
    """Keep what a function makes: called again with arguments of the same content, it is read.

    A function whose first parameter is `folder` fills that folder, and its callers get the Artifact, without giving a
    folder. Any other returns a table, named tensors or what JSON can hold (tuples come back as lists).
    unkeyed: parameters that decide how a thing is computed and not what.
    is_unfinished: whether something is missing for now in what was made: it is taken as it is by this process and made
    again by the next, which keeps it, with a warning, where that fails.
    read: makes what callers get of a returned value, once a process for READ of them at a time: none may change it.
    If the function raises, nothing is stored and nothing already stored is touched.
    """
    if make is None:
        return functools.partial(stage, unkeyed=unkeyed, is_unfinished=is_unfinished, read=read)
    keys.code_of(make.__module__)  # what is imported now: it may be edited while this process lives
    signature = inspect.signature(make)
    fills_a_folder = "folder" in signature.parameters
    assert not read or not (fills_a_folder or is_unfinished), "what is read is a value, and finished"
    given = functools.lru_cache(READ)(lambda artifact: read(_restored(artifact))) if read else _restored

    def filled(folder: Path, arguments: dict) -> None:
        made = make(folder, **arguments) if fills_a_folder else make(**arguments)
        if not fills_a_folder:
            _store(made, folder)
        if is_unfinished is not None and is_unfinished(made):
            (folder / UNFINISHED).touch()

    @functools.wraps(make)
    def fetch(*args, **kwargs):
        bound = signature.bind(*((None,) if fills_a_folder else ()), *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "folder"}
        keyed = {name: value for name, value in arguments.items() if name not in unkeyed}
        key = keys.key_of(make, keyed)
        artifact = _fetched(make.__name__.lstrip("_"), key, keyed, lambda folder: filled(folder, arguments))
        return artifact if fills_a_folder else given(artifact)

    return fetch


def _fetched(name: str, key: str, keyed: dict, fill: Callable[[Path], None]) -> Artifact:
    """The artefact of a key, made if it is missing or damaged. One process at a time makes it; the others wait."""
    path, locks = root() / f"{name}-{key[:16]}", root() / ".locks"
    with places.writing(root(), VARIABLE), _alone(locks, path.name):
        if path.exists() and _is_sound(path, key):
            return Artifact(path, key)
        if not _making.get():
            raise NotCached(f"The artefact {path.name} is not in the cache.")
        try:
            _write(path, {"stage": name, "key": key, "arguments": keys.digests(keyed)}, fill)
        except Exception as error:
            if not path.exists():
                raise
            warnings.warn(f"The artefact {path.name} stays unfinished: {error}", stacklevel=3)
            _tried_here.add(path)
    return Artifact(path, key)


@contextmanager
def _alone(locks: Path, name: str) -> Iterator[None]:
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / name):
        yield


def _is_sound(path: Path, key: str) -> bool:
    """Whether an artefact can be taken as it is. What is damaged is removed, with a warning."""
    try:
        verify(path, key)
    except DamagedArtifact as damage:
        warnings.warn(f"{damage} It is computed again.", stacklevel=4)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    return not (path / UNFINISHED).exists() or path in _tried_here or not _making.get()


def _write(path: Path, manifest: dict, fill: Callable[[Path], None]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        manifest["files"] = _checksums(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        shutil.rmtree(path, ignore_errors=True)  # one left unfinished
        partial.rename(path)
        memory.give_back_much()
        if (path / UNFINISHED).exists():
            _tried_here.add(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _store(made, folder: Path) -> None:
    if isinstance(made, pd.DataFrame):
        (folder / "table.json").write_text(json.dumps(made.to_dict("list")))
    elif isinstance(made, dict) and made and all(isinstance(value, Tensor) for value in made.values()):
        save_file(made, folder / "tensors.safetensors")
    else:
        (folder / "value.json").write_text(json.dumps(made))


def _restored(artifact: Artifact):
    folder = artifact.path
    if (folder / "tensors.safetensors").exists():
        return load_file(folder / "tensors.safetensors")
    if (folder / "table.json").exists():
        return pd.DataFrame(json.loads((folder / "table.json").read_text()))
    return json.loads((folder / "value.json").read_text())


def verify(path: Path, key: str) -> None:
    """Raise DamagedArtifact unless the folder holds exactly the files its manifest lists, with their checksums."""
    manifest = _manifest(path)
    if manifest["key"] != key:
        raise DamagedArtifact(f"The artefact {path.name} was stored under another key.")
    found, recorded = _checksums(path), manifest["files"]
    if found != recorded:
        wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
        raise DamagedArtifact(f"The artefact {path.name} is damaged: {', '.join(wrong)} missing or changed.")


def key_in(path: Path) -> str:
    """The key that an artefact's own manifest names. Raises DamagedArtifact where it has none."""
    return _manifest(path)["key"]


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return {name: manifest[name] for name in ("key", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(f"The artefact {path.name} has no readable manifest ({error}).") from error


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder) != Path(MANIFEST))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@contextmanager
def nothing_made() -> Iterator[None]:
    """Inside, a stage raises NotCached where it would have to make something."""
    token = _making.set(False)
    try:
        yield
    finally:
        _making.reset(token)


def root() -> Path:
    """Where artefacts live: `artifacts/` in the project, or the folder that DSTEER_ARTIFACTS names."""
    return places.folder_from(VARIABLE, "artifacts")
