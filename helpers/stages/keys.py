"""What decides a stage's content: its arguments, the code that it can reach, and the libraries that this code imports.

Nobody writes any of it by hand. Code is reached by import: a stage's module and all of ours that it imports, directly
or through others. What is imported by a name that is made up at run time is not seen.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel
from torch import Tensor

from helpers.places import PROJECT

OURS = "helpers"  # the package whose code counts
PLAIN = {bool, int, float, str, type(None)}


class Fixed(tuple):
    """Items that many stages are handed and that nobody changes: an argument that is digested once, as a list is."""

    @cached_property
    def digest(self) -> str:
        return _digest(list(self), "items")


def key_of(stage: Callable, arguments: dict) -> str:
    """The sha256 of a stage's name, its arguments and the code that it reaches.

    Raises TypeError for an argument of which it cannot be said what decides it.
    """
    content = [f"{stage.__module__}.{stage.__qualname__}", digests(arguments), code_of(stage.__module__)]
    return _sha256(json.dumps(content, sort_keys=True))


def digests(arguments: dict) -> dict[str, str]:
    """The sha256 of each argument's content."""
    return {
        name: value.digest if isinstance(value, Fixed) else _digest(value, name) for name, value in arguments.items()
    }


def _digest(value, name: str) -> str:
    return _sha256(json.dumps(_content(value, name), sort_keys=True))


def _content(value, name: str):
    """A value as JSON: data by what they hold, an object of ours by its fields and its module's code, and what has a
    `key` by that."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(getattr(value, "key", None), str):
        return ["key", value.key]
    if isinstance(value, BaseModel):
        return [type(value).__qualname__, value.model_dump(mode="json")]
    if isinstance(value, dict):
        return ["dict", [[_content(k, name), _content(v, name)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return value if _is_plain(value) else [_content(item, name) for item in value]
    if isinstance(value, pd.DataFrame):
        return ["table", _content(value.to_dict("list"), name)]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu().contiguous() if isinstance(value, Tensor) else np.ascontiguousarray(value)
        array = array.numpy() if isinstance(array, Tensor) else array
        return ["array", str(array.dtype), array.shape, _sha256(array.tobytes())]
    if is_dataclass(value) and type(value).__module__.startswith(f"{OURS}."):
        held = {field.name: _content(getattr(value, field.name), name) for field in fields(value)}
        return [type(value).__qualname__, code_of(type(value).__module__), held]
    raise TypeError(
        f"The argument {name!r} holds a {type(value).__name__}, which no key can be made of: give it a `key`."
    )


def _is_plain(value: list | tuple) -> bool:
    """Whether nothing but plain values is in a list, at any depth: told by their types, since there may be many."""
    level = value
    while level:
        nested = set(map(type, level)) - PLAIN
        if any(not issubclass(kind, list | tuple) or hasattr(kind, "key") for kind in nested):
            return False
        level = list(chain.from_iterable(item for item in level if type(item) in nested))
    return True


@cache
def code_of(module: str) -> str:
    """The sha256 of the code that a module of ours reaches, and of the versions of the distributions it imports."""
    ours, others = _reached(module)
    code = {name: _fingerprint(_path(name)) for name in ours}
    return _sha256(json.dumps([code, {name: _versions(name) for name in others}], sort_keys=True))


def _reached(module: str) -> tuple[set[str], set[str]]:
    """Our modules that a module reaches, itself among them, and the other packages that these import."""
    ours, others, waiting = set(), set(), [module]
    while waiting:
        name = waiting.pop()
        if name in ours:
            continue
        ours.add(name)
        for imported in _imports(_path(name)):
            if imported.split(".")[0] == OURS:
                waiting.append(imported)
            elif imported.split(".")[0] not in sys.stdlib_module_names:
                others.add(imported.split(".")[0])
    return ours, others


@cache
def _imports(path: Path) -> frozenset[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in within if name.split(".")[0] == OURS and _is_module(name)}
    return frozenset(found)


def _path(module: str) -> Path:
    path = PROJECT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_module(name: str) -> bool:
    return _path(name).exists()


@cache
def _fingerprint(path: Path) -> str:
    """The sha256 of a file's syntax tree: comments, layout and docstrings do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return _sha256(ast.dump(tree))


@cache
def _versions(package: str) -> dict[str, str]:
    """Of the distributions that an imported package comes from; none where it is not installed."""
    return {name: version(name) for name in _distributions().get(package, ())}


@cache
def _distributions() -> dict[str, list[str]]:
    return {package: sorted(set(names)) for package, names in packages_distributions().items()}


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
