"""Where the project's files are: never below the working directory, which is another one in every notebook."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PROJECT = Path(__file__).resolve().parents[1]
FULL, LOCKED = (errno.ENOSPC, errno.EDQUOT), (errno.EROFS, errno.EACCES, errno.EPERM)


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the project's own."""
    return Path(os.environ.get(variable) or PROJECT / default).resolve()


@contextmanager
def writing(folder: Path, variable: str = "") -> Iterator[None]:
    """Inside, a folder that is full or cannot be written to is told of in one sentence, as an OSError.

    variable: of the environment, which names another folder.
    """
    elsewhere = f", or name another with {variable}=" if variable else ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number in FULL:
            said = f"No space is left for {folder}: free some{elsewhere}"
        elif number in LOCKED and _is_about(folder, error):
            said = f"The folder {folder} cannot be written to: change that{elsewhere}"
        else:
            raise
        raise OSError(f"{said}. What was computed before is kept.") from error


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error, which safetensors has in its words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _is_about(folder: Path, error: OSError | SafetensorError) -> bool:
    """Whether the file that could not be opened, if one is named, is in a folder or is what the folder would be in."""
    name = getattr(error, "filename", None)
    return name is None or Path(name).is_relative_to(folder) or folder.is_relative_to(name)


@contextmanager
def whole(path: Path, variable: str = "") -> Iterator[Path]:
    """A file to write in another's place, which takes that place when it is whole. Raises OSError as `writing` does."""
    partial = path.with_name(f".partial-{path.name}")
    with writing(path.parent, variable):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
