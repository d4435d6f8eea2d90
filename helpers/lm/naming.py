"""How a model is named: a folder, a GGUF file or a hub id."""

from pathlib import Path

GGUF = ".gguf"


def refuse_missing(name: str | Path) -> None:
    """Raise FileNotFoundError for a name that is a path, and where there is no such folder or GGUF file."""
    name, path = str(name), Path(name).expanduser()
    if name.endswith(GGUF):
        if not path.is_file():
            raise FileNotFoundError(f"The model file {name} does not exist: give an existing {GGUF} file.")
    elif path.is_file():
        raise FileNotFoundError(
            f"The model {name} is a file: give the folder that holds it with its configuration and its tokenizer."
        )
    elif looks_local(name) and not path.is_dir():
        raise FileNotFoundError(f"The model folder {name} does not exist: give an existing folder or a hub id.")


def looks_local(name: str) -> bool:
    """Whether a name can be no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
