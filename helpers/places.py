"""Where the project's files are: never below the working directory, which is another one in every notebook."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the project's own."""
    return Path(os.environ.get(variable) or PROJECT / default).resolve()
