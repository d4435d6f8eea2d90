"""Rows from a file or the hub.

JSON is read by Python's own reader: `datasets` reads dates in strings as dates and "1" as 1 where another row has a
number. Parquet is read by pyarrow, as `datasets` reads it, but without a copy in a cache.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import datasets
import pyarrow
from pyarrow import parquet

from helpers.data.messages import is_message
from helpers.data.naming import HUB_ID, SEPARATORS, local_file
from helpers.lm import hub

datasets.disable_progress_bars()  # they would stay in the notebooks
DEFAULT_SPLITS = ("train_prefs", "train")  # the pairs among UltraFeedback's splits, and what most call theirs
WRAPPERS = (*DEFAULT_SPLITS, "data", "rows", "examples", "instances")  # names of a list of rows in one object
_COMMIT = re.compile("[0-9a-f]{40}")


class _Twice(Exception):
    """A name that stands twice in one row."""


def content_id(source: str) -> str:
    """What decides the rows of a source: the sha256 of a local file, or a hub id, with its commit unless it names one.
    Raises FileNotFoundError or ValueError for data that cannot be had."""
    path = local_file(source)
    if path is None:
        is_pinned = _COMMIT.fullmatch(HUB_ID.fullmatch(source)["revision"] or "")
        return source if is_pinned else f"{source} {_builder(source).hash}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of(path: Path, columns: Collection[str] = ()) -> tuple[list[dict], list[str]]:
    """The rows of a file (naming.SUFFIXES), gzipped or not, and its columns. Raises ValueError for any other.
    columns: those, in lower case, that a parquet file is read for besides its text, all by default; Python cannot hold
    whatever may be in others."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        name = path.name.removesuffix(".gz")
        if name.endswith(".parquet"):
            return _from_arrow(parquet.ParquetFile(io.BytesIO(content)).read(), columns)
        text = content.decode("utf-8-sig")
        separator = SEPARATORS.get(Path(name).suffix)
        records = _from_json(text, path) if separator is None else _from_table(text, separator, path)
    except _Twice as name:
        raise ValueError(f"The data file {path} has the name '{name}' twice in a row: leave out all but one.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"The data file {path} cannot be read ({_headline(error)}): get or write it anew.") from error
    return records, list(dict.fromkeys(column for record in records for column in record))


def _from_table(text: str, separator: str, path: Path) -> list[dict]:
    """The rows of a table of text with a line of names; an empty field is none."""
    csv.field_size_limit(2**31 - 1)  # by default an answer of more than 128 KB is an error
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        _refuse_twice(filter(str.strip, table.fieldnames or ()))
        rows = list(table)
    except csv.Error as error:
        raise ValueError(f"The data file {path} is no table near line {table.line_num} ({error}): mend it.") from error
    for n, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"The data file {path} has another number of fields in row {n} than names: mend it.")
    return [{name: value or None for name, value in row.items()} for row in rows]


def _from_json(text: str, path: Path) -> list[dict]:
    """The objects of one list, or one a line, or one after the other, or a list in an object, or an object of columns,
    whatever the file's suffix. Only \\n ends a line here: a JSON string may hold what Unicode counts as other line
    ends."""
    if text.lstrip().startswith("["):
        records = _parsed(text, 1, path)
    else:
        try:
            records = [_parsed(line, n, path) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        except ValueError:
            records = _over_several_lines(text)
            if records is None:
                raise
        if len(records) == 1 and isinstance(records[0], dict):
            records = _unwrapped(records[0])
    for n, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"The data file {path} has no object as its row {n}: make each row an object of columns.")
    return records


def _over_several_lines(text: str) -> list | None:
    """Objects one after the other, each over as many lines as it likes; None where they are not."""
    decoder, found, at = json.JSONDecoder(object_pairs_hook=_object), [], 0
    try:
        while at < len(text):
            if text[at].isspace():
                at += 1
                continue
            one, at = decoder.raw_decode(text, at)
            found.append(one)
    except (ValueError, RecursionError):
        return None
    return found


def _unwrapped(record: dict) -> list:
    """The rows of a file that is one object: a list under a name (WRAPPERS, or the only one), or as many lists as there
    are columns, or as many objects of rows' names, or one of each row, or the columns' names and the rows apart, as
    pandas writes them."""
    listed = {name: rows for name, rows in record.items() if isinstance(rows, list) and _are_rows(rows)}
    for name in (*WRAPPERS, *(listed if len(record) == 1 else ())):
        if name in listed:
            return listed[name]
    columns = list(record.values())
    names, rows = (listed if isinstance(listed := record.get(name), list) else [] for name in ("columns", "data"))
    if names and rows and all(isinstance(row, list) for row in rows):
        return [_object(list(zip(map(str, names), row))) for row in rows]
    if columns and all(map(str.isdigit, record)) and all(isinstance(row, dict) for row in columns):
        return columns
    if columns and all(isinstance(column, dict) and all(map(str.isdigit, column)) for column in columns):
        return [{name: column.get(row) for name, column in record.items()} for row in columns[0]]
    if all(isinstance(column, list) and not any(isinstance(one, dict) for one in column) for column in columns) and (
        len(set(map(len, columns))) == 1
    ):
        return [dict(zip(record, row)) for row in zip(*columns)]
    return [record]


def _are_rows(listed: list) -> bool:
    """Whether these are objects, and no messages of one row."""
    return bool(listed) and all(isinstance(one, dict) for one in listed) and not all(map(is_message, listed))


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object. A number or a flag may stand in it twice: none is an answer or a prompt."""
    if len(dict(pairs)) < len(pairs):
        _refuse_twice(name for name, value in pairs if isinstance(value, str | list | dict))
    return dict(pairs)


def _refuse_twice(names: Iterable[str]) -> None:
    """Raise _Twice where one of some names stands there twice, and the first would be lost."""
    for name, n in Counter(names).items():
        if n > 1:
            raise _Twice(name)


def _parsed(text: str, line: int, path: Path):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # the latter where brackets are nested without end
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(
            f"The data file {path} is not JSON in line {line} ({_headline(error)}): mend it, so that there is one "
            "object a line or one list of objects."
        ) from error


def _from_arrow(table: pyarrow.Table, columns: Collection[str]) -> tuple[list[dict], list[str]]:
    _refuse_twice(table.column_names)
    read = [one.name for one in table.schema if not columns or one.name.lower() in columns or _is_text(one.type)]
    return table.select(read).to_pylist(), table.column_names


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether values are texts, lists of texts, or messages, or a list of these."""
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return _is_text(kind.value_type)
    if pyarrow.types.is_struct(kind):
        fields = {field.name: None for field in kind if _is_text(field.type)}
        return is_message(fields) and len(fields) == kind.num_fields
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


@contextmanager
def _asking_the_hub(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any of half a dozen libraries' own; unchained, since it may quote what was sent
        raise ValueError(
            f"The data {source} are not a local file and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}): check the id, your network and your access, or give a local copy with "
            "DATA=<file>."
        ) from None


@cache  # for a process, a branch stays at one commit
def _builder(source: str) -> datasets.DatasetBuilder:
    """What reads a data set of the hub at the commit that its revision names today: a branch moves."""
    hub.offline_without_a_network()
    named = HUB_ID.fullmatch(source)
    with _asking_the_hub(source):
        builder = datasets.load_dataset_builder(named["name"], data_dir=named["folder"], revision=named["revision"])
    asked, found = named["revision"] or "", builder.hash or ""
    if _COMMIT.fullmatch(asked) and _COMMIT.fullmatch(found) and asked != found:
        raise ValueError(  # without a network the library takes the latest copy that it has, whatever was asked for
            f"The data {source} are in the cache at commit {found} alone: connect to the hub, or ask for that commit."
        )
    return builder


def from_hub(source: str, columns: Collection[str] = ()) -> tuple[list[dict], list[str]]:
    """The rows of a split of a data set of the hub, with some columns or all, and the names of all its columns.
    Raises ValueError where it cannot be had."""
    name, split, builder = *HUB_ID.fullmatch(source).group("name", "split"), _builder(source)
    with _asking_the_hub(source):
        builder.download_and_prepare()
        splits = builder.as_dataset()
    wanted = [split] if split else splits if len(splits) == 1 else DEFAULT_SPLITS
    found = [one for one in wanted if one in splits]
    if not found:
        example = f"{name}:{next(iter(splits))}"
        raise ValueError(f"The data set {name} has the splits {', '.join(splits)}: name one, as in {example}.")
    return _from_arrow(splits[found[0]].with_format("arrow")[:], columns)


def _headline(error: Exception) -> str:
    return str(error).partition("\n")[0]
