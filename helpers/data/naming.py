"""How a profile names its data: a file of rows, a hub id, or what is made here."""

import re
from pathlib import Path

PLAIN, CONDITIONAL = "onpolicy:vader", "onpolicy:vader-conditional"  # stories, by the sentiment that is preferred
SEPARATORS = {".csv": ",", ".tsv": "\t"}  # of the fields in a line
SUFFIXES = (".jsonl", ".json", ".parquet", *SEPARATORS)  # of files of rows; each may end in .gz
FORMATS = f"{', '.join(SUFFIXES)} (.gz too)"
ON_POLICY = "onpolicy:"  # before a source of which only the prompts are taken, for the model to answer
PROMPTS = "prompts:"  # the same, for a ready partner: nothing is preferred
TOPICS = "topics:"  # before a preference about sentences on topics, which are made here too
_SEGMENT = r"[\w-][\w.-]*"
HUB_ID = re.compile(
    rf"(?P<name>{_SEGMENT}/{_SEGMENT})(?:/(?P<folder>{_SEGMENT}(?:/{_SEGMENT})*))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)


def source_of(data: str) -> str | None:
    """The file or hub id that a profile's data take their pairs or prompts from; None where they are made here."""
    source = split_prefix(data)[1]
    return source if is_file(source) or HUB_ID.fullmatch(source) else None


def split_prefix(data: str) -> tuple[str, str]:
    """What stands before a source, "" where nothing does, and the source."""
    before = next((prefix for prefix in (ON_POLICY, PROMPTS) if data.startswith(prefix)), "")
    return before, data.removeprefix(before)


def is_file(source: str) -> bool:
    """Whether a source is named as a file of rows is, be it there or not."""
    return source.removesuffix(".gz").endswith(SUFFIXES)


def local_file(source: str) -> Path | None:
    """The file that a source names; None where it is a hub id. Raises FileNotFoundError or ValueError where it is
    neither."""
    refuse_folder(source)  # which `datasets` would read in place of a hub id of the same name
    path = Path(source).expanduser()
    named = is_file(path.name)
    if path.is_file():
        if not named:
            raise ValueError(f"The data file {source} is of no kind that is read: give {FORMATS}.")
        return path
    if named or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"The data file {source} does not exist: give the path of one, {FORMATS}, or a hub id such as "
            "Anthropic/hh-rlhf/harmless-base."
        )
    return None


def refuse_folder(source: str) -> None:
    """Raise ValueError for data that are a folder, which a hub id may be the name of too."""
    if Path(source).expanduser().is_dir():
        raise ValueError(f"The data {source} are a folder: give one file of it, {FORMATS}.")
