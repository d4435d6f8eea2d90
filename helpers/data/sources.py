"""Preference data from elsewhere: files and data sets of the Hugging Face hub, read as pairs and split.

What forms there are stands in forms.py, and in trees.py for OASST1. Each row read is kept, or counted under the reason
why it is not; what is read in another way than it stands there, and what is not read, is said. Nothing that is read can
execute: no data set's script, no pickle.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from helpers.data import forms, messages, trees, turns
from helpers.data.files import from_hub, rows_of
from helpers.data.messages import Unusable
from helpers.data.naming import local_file
from helpers.data.turns import Row

_WORD = re.compile(r"\W*[^\W\d_]+(?:['’-][^\W\d_]+)*\W*")
SAME = "another pair of the same prompt"
ACCEPTED = "prompt, chosen and rejected, as strings or as lists of messages, or another form of docs/models-and-data.md"


@dataclass(frozen=True)
class Rows:
    """The pairs of a source, in its order, and how many of its `total` rows were set aside for each reason. `total`
    counts rows, except where several make one: of OASST1 it counts the prompts that have answers, of KTO the prompts.
    """

    rows: tuple[Row, ...]
    set_aside: dict[str, int]
    total: int
    form: str  # what the rows were recognised as
    unread: tuple[str, ...] = field(default=(), compare=False)  # columns

    @property
    def account(self) -> dict[str, int]:
        """What became of the rows, and what of them is not as it stood there: {what: rows}."""
        noted = Counter(note for row in self.rows for note in row.notes)
        unread = {f"column {name!r} not read": self.total for name in self.unread}
        return {f"read as {self.form}": self.total, **unread, **noted, **self.set_aside}


def read(source: str) -> Rows:
    """The preference pairs of a local file or of a data set of the Hugging Face hub, one for each prompt.

    source: a file of rows (naming.SUFFIXES), gzipped (.gz) or not, or `owner/name[/folder][@revision][:split]`; the
    split is train_prefs, train or the only one where none is named. Raises FileNotFoundError or ValueError with one
    sentence that names the source and the remedy.
    """
    records, columns = _records(source)
    found = _recognised(records, source, columns)
    _refuse_chance_beginnings(found, source, columns)
    return _not_empty(found, source)


def _refuse_chance_beginnings(found: Rows, source: str, columns: Collection[str]) -> None:
    """Raise ValueError where most answers share no beginning, or one that they may share by chance: a word or two, or
    an unfinished sentence that the answers of other rows begin with too."""
    unfinished = sum(row.is_unfinished for row in found.rows)
    by_chance = (turns.NO_BEGINNING, turns.WITHIN_A_WORD, *([SAME] if 2 * unfinished > len(found.rows) else []))
    refused = sum(row.is_brief for row in found.rows) + sum(found.set_aside.get(reason, 0) for reason in by_chance)
    if 2 * refused > found.total:
        raise ValueError(
            f"The data {source} have no column for the prompt, and in {refused} of {found.total} rows the answers "
            f"share no beginning that could be one: name a column of {_quoted(columns)} prompt, or add it."
        )


def read_prompts(source: str) -> Rows:
    """The prompts of a source alone, whatever answers it has: each once. Errors as of `read`."""
    records, columns = _records(source)
    items, prompt_of = trees.without_nesting(records), forms.prompt_alone
    if trees.are_trees(items):
        items, pair = trees.pairs(items)
        prompt_of, reads = lambda item: Row(pair(item).prompt, "", ""), trees.READS
    else:
        reads = {*turns.SYSTEMS} | {name for item in items for name in forms.prompt_columns(item)}
        _refuse_a_prompt_elsewhere([item for item in items if forms.has_bare_answers(item)], source, columns)
    found = _kept("prompts alone", items, prompt_of, columns, reads)
    _refuse_chance_beginnings(found, source, columns)
    return _not_empty(found, source)


def _records(source: str) -> tuple[list[dict], dict[str, str]]:
    """The rows of a source, and its columns: {the name there: the one that the rows have it under}, which is in lower
    case, and nothing for a column that another is taken for. Raises ValueError where two could be."""
    path, read_columns = local_file(source), forms.columns_read() | trees.READS
    records, columns = from_hub(source, read_columns) if path is None else rows_of(path, read_columns)
    if not records:
        raise ValueError(f"The data {source} hold no rows: give {ACCEPTED}.")
    exact = {name for name in columns if name == name.lower()}
    for key in read_columns - exact:
        alike = [name for name in columns if name.lower() == key]
        if len(alike) > 1:
            raise ValueError(f"The data {source} have the columns {_quoted(alike)} for one: leave out all but one.")
    named = {name: name.lower() if name in exact or name.lower() not in exact else "" for name in columns}
    return [{named[name]: value for name, value in row.items() if named[name]} for row in records], named


def _kept(
    form: str, items: list, row_of: Callable[..., Row], columns: dict[str, str], reads: Collection[str], others: int = 0
) -> Rows:
    """The row of each item, the first of each prompt; `others` are rows of another form."""
    kept, set_aside = {}, Counter({messages.MISSING: others} if others else {})
    for item in items:
        try:
            row = row_of(item)
            if row.prompt in kept:
                raise Unusable(SAME)
            kept[row.prompt] = row
        except Unusable as reason:
            set_aside[str(reason)] += 1
    unread = tuple(name for name, key in columns.items() if key not in reads)
    return Rows(tuple(kept.values()), dict(set_aside), len(items) + others, form, unread)


def _not_empty(found: Rows, source: str) -> Rows:
    """What was found. Raises ValueError where that is nothing."""
    if not found.rows and found.unread and set(found.set_aside) == {forms.NO_PROMPT}:
        raise ValueError(f"The data {source} hold no prompt in their columns {_quoted(found.unread)}: name one prompt.")
    if not found.rows:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in found.set_aside.items()) or "no answers"
        raise ValueError(f"The data {source}, read as {found.form}, hold none but {reasons}: mend or replace them.")
    return found


def _recognised(records: list[dict], source: str, columns: dict[str, str]) -> Rows:
    """The pairs in the form of most records. Raises ValueError where there is no form."""
    records = trees.without_nesting(records)
    if trees.are_trees(records):
        return _kept("OASST1 message trees", *trees.pairs(records), columns, trees.READS)
    by_form = defaultdict(list)
    for record in records:
        by_form[forms.form_of(record)].append(record)
    fitting = [form for form in by_form if form is not None]
    if not fitting:
        if {column.lower() for column in columns} <= {name for prompt in forms.PROMPTS for name in prompt}:
            raise ValueError(
                f"The data {source} hold prompts and no answers in their columns {_quoted(columns)}: give pairs, a "
                f"ready partner as DPO_MODEL= too, or let the model answer them itself with DATA=onpolicy:{source}."
            )
        raise ValueError(f"The data {source} hold no preferences in their columns {_nearest(columns)}.")
    form = max(fitting, key=lambda form: len(by_form[form]))
    items, others = form.merge(by_form[form]), len(records) - len(by_form[form])
    kinds = [forms.kind(form, item) for item in items]
    kind = next((kind for kind, _ in Counter(filter(None, kinds)).most_common(1)), None)
    if not form.prompt and kind == "strings":
        _refuse_a_prompt_elsewhere(by_form[form], source, columns)

    def parse(item: tuple[dict, str | None]) -> Row:
        record, its_kind = item
        row = forms.pair(form, record)
        if its_kind != kind:
            raise Unusable(messages.MISSING)
        return row

    name = f"{form.name}, as {kind}" if kind else form.name
    reads = {*form.reads} | forms.scores_read(columns.values())
    return _kept(name, list(zip(items, kinds)), parse, columns, reads, others)


def _nearest(columns: Collection[str]) -> str:
    """Columns that are of no form, the form that is nearest, and what they lack of it."""
    near, has = forms.nearest(columns), {column.lower() for column in columns}
    lacks = [name for name in near.needs if name not in has]
    without = f"lacks {_quoted(lacks)}" if lacks else "has no value in some of them"
    return (
        f"{_quoted(columns)}: the nearest form, {near.name}, needs {_quoted(near.needs)}, and this {without}; give "
        f"{ACCEPTED}"
    )


def _refuse_a_prompt_elsewhere(records: list[dict], source: str, columns: Collection[str]) -> None:
    """Raise ValueError where pairs have no prompt by name, and a column of sentences or of messages that may be one:
    one of a few values is a question of several pairs where these are sentences, and a category or a name elsewhere."""
    for name in columns:
        key, rows = name.lower(), len(records)
        if key in {*forms.ANSWERS, *turns.SYSTEMS}:
            continue
        said = Counter(str(value) for record in records if _may_be_a_prompt(value := record.get(key)))
        sentences = {str(value) for record in records if _is_a_sentence(value := record.get(key))}
        own = sum(_is_an_answer_s(record.get(key), record) for record in records)
        is_asked = 2 * len(said) > said.total() or (len(said) > 1 and 2 * len(sentences) > len(said))
        if is_asked and 2 * said.total() > rows and 2 * own < rows:
            raise ValueError(
                f"The data {source} have a column {name!r}, which may be the prompt and is not read as one: name it "
                "prompt, or leave it out."
            )


def _may_be_a_prompt(value) -> bool:
    return _is_a_sentence(value) or (isinstance(value, str) and " " in value)


def _is_a_sentence(value) -> bool:
    """Whether a value is messages, or more than a few words: five, three that end as sentences do, or, in a script
    without spaces, more than eight characters. Ids, addresses, categories and the names of models are not."""
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return all(map(messages.is_message, value if isinstance(value, list) else [value]))
    if isinstance(value, list):
        return any(isinstance(one, str) and _is_a_sentence(one) for one in value)
    if not isinstance(value, str):
        return False
    words, ends = sum(map(bool, map(_WORD.fullmatch, value.split()))), value.rstrip().endswith((".", "?", "!"))
    is_unspaced = turns.UNSPACED.search(value) and (len(value) > 8 or value.rstrip().endswith(("？", "。", "！")))
    return words > 4 or (ends and len(value.split()) > 2) or bool(is_unspaced)


def _is_an_answer_s(value, record: dict) -> bool:
    """Whether a value is an answer of its row, or a list with one."""
    answers = [record.get(name) for name in forms.ANSWERS]
    return value in answers or (isinstance(value, list) and any(one in answers for one in value))


def _quoted(names) -> str:
    return ", ".join(map(repr, names))


def split(rows: Rows, sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Draw as many rows for each split as `sizes` asks for; no opening, and so no prompt, is in two splits.
    The draw depends on the seed and the rows, not on their order. Raises ValueError where the rows are too few."""

    def lot(row: Row) -> str:
        return hashlib.sha256(f"{seed}/{row}".encode()).hexdigest()

    def room(name: str) -> int:
        return sizes[name] - len(splits[name])

    groups = defaultdict(list)
    for row in sorted(rows.rows, key=lot):
        groups[row.opening].append(row)
    splits, late = {name: [] for name in sizes}, []
    for group in groups.values():
        fitting = [name for name in sizes if room(name) >= len(group)]
        if fitting:
            splits[fitting[0]] += group
        else:
            late.append(group)
    for group in late:  # as much of it as there is room for in one split; the rest is in none
        name = max(sizes, key=room)
        splits[name] += group[: room(name)]
    n, asked = sum(map(len, splits.values())), sum(sizes.values())
    if n < asked:
        fields = ", ".join(f"sizes.{name} ({size})" for name, size in sizes.items())
        raise ValueError(
            f"The data have only {n} pairs for splits without a common opening, fewer than the {asked} asked for: "
            f"lower {fields}."
        )
    return {name: sorted(group, key=lot) for name, group in splits.items()}
