"""Where the project's files are: never below the working directory, which is another one in every notebook."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in FULL or f"(os error {errno.ENOSPC})" in str(error):  # as safetensors, which has no errno, says it
            said = f"No space is left for {folder}: free some{elsewhere}"
        elif number in LOCKED:
            said = f"The folder {folder} cannot be written to: change that{elsewhere}"
        else:
            raise
        raise OSError(f"{said}. What was computed before is kept.") from error


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
