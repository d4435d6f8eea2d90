"""Preference data from elsewhere: files and data sets of the Hugging Face hub, read as pairs and split.

What forms there are stands in forms.py, and in trees.py for OASST1. Each row read is kept, or counted under the reason
why it is not; what is read in another way than it stands there, and what is not read, is said. Nothing that is read can
execute: no data set's script, no pickle.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from helpers.data import forms, trees, turns
from helpers.data.files import from_hub, local_file, rows_of
from helpers.data.turns import Row, Unusable

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
        doubled = sum(row.was_doubled for row in self.rows)
        noted = {"the prompt taken off the beginning of both answers": doubled} if doubled else {}
        unread = {f"column {name!r} not read": self.total for name in self.unread}
        return {f"read as {self.form}": self.total, **unread, **noted, **self.set_aside}


def read(source: str) -> Rows:
    """The preference pairs of a local file or of a data set of the Hugging Face hub, one for each prompt.

    source: a file of rows (naming.SUFFIXES), gzipped (.gz) or not, or `owner/name[/folder][@revision][:split]`; the
    split is train_prefs, train or the only one where none is named. Raises FileNotFoundError or ValueError with one
    sentence that names the source and the remedy.
    """
    records, columns = _records(source)
    form, items, row_of, reads = _recognised(records, source, columns)
    found = _kept(source, form, items, row_of)
    refused = found.set_aside.get(turns.NO_BEGINNING, 0) + found.set_aside.get(turns.WITHIN_A_WORD, 0)
    if 2 * refused > found.total:
        raise ValueError(
            f"The data {source} have no column for the prompt, and in {refused} of {found.total} rows the answers "
            f"share no beginning that could be one: name a column of {_quoted(columns)} prompt, or add it."
        )
    unread = [name for name in columns if name.lower() not in reads]
    return Rows(found.rows, found.set_aside, found.total, form, tuple(unread))


def read_prompts(source: str) -> Rows:
    """The prompts of a source alone, whatever answers it has: each once. Errors as of `read`."""
    records, columns = _records(source)
    found = _kept(source, "prompts alone", trees.without_nesting(records), forms.prompt_alone)
    used = {name for names in forms.ALONE for name in names}
    unread = [name for name in columns if name.lower() not in used | {*turns.SYSTEMS}]
    return Rows(found.rows, found.set_aside, found.total, found.form, tuple(unread))


def _records(source: str) -> tuple[list[dict], list[str]]:
    """The rows of a source, the names of their columns in lower case, and the columns as they are named there."""
    path, read_columns = local_file(source), forms.columns_read() | trees.READS
    records, columns = from_hub(source, read_columns) if path is None else rows_of(path, read_columns)
    if not records:
        raise ValueError(f"The data {source} hold no rows: give {ACCEPTED}.")
    exact = {name for name in columns if name == name.lower()}
    named = {name: name.lower() for name in columns if name.lower() == name or name.lower() not in exact}
    return [{named[name]: value for name, value in row.items() if name in named} for row in records], columns


def _kept(source: str, form: str, items: list, row_of: Callable[..., Row]) -> Rows:
    """The row of each item, the first of each prompt. Raises ValueError where there is none."""
    kept, set_aside = {}, Counter()
    for item in items:
        try:
            row = row_of(item)
            if row.prompt in kept:
                raise Unusable("another pair of the same prompt")
            kept[row.prompt] = row
        except Unusable as reason:
            set_aside[str(reason)] += 1
    no_beginning = {turns.NO_BEGINNING, turns.WITHIN_A_WORD} & set_aside.keys()  # of which `read` says more
    if not kept and not no_beginning:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in set_aside.items()) or "no answers"
        raise ValueError(f"The data {source}, read as {form}, hold none but {reasons}: mend or replace them.")
    return Rows(tuple(kept.values()), dict(set_aside), len(items), form)


def _recognised(records: list[dict], source: str, columns: list[str]) -> tuple[str, list, Callable[..., Row], set[str]]:
    """The form of most records, the items that are each to be a pair, what makes a pair of one, and the columns read.
    Raises ValueError where there is no form."""
    records = trees.without_nesting(records)
    if set().union(*records) >= {*trees.NEEDS}:
        return "OASST1 message trees", *trees.pairs(records), trees.READS
    fitting = Counter(form for form in map(forms.form_of, records) if form is not None)
    if not fitting:
        near = forms.nearest(columns)
        lacks = [name for name in near.needs if name not in {column.lower() for column in columns}]
        without = f"lacks {_quoted(lacks)}" if lacks else "has no value in some of them"
        raise ValueError(
            f"The data {source} hold no preferences in their columns {_quoted(columns)}: the nearest form, "
            f"{near.name}, needs {_quoted(near.needs)}, and this {without}; give {ACCEPTED}."
        )
    form = fitting.most_common(1)[0][0]
    items = form.merge([record for record in records if forms.form_of(record) is form]) + [
        record for record in records if forms.form_of(record) is not form
    ]
    kinds = Counter(filter(None, (forms.kind(form, item) for item in items if forms.form_of(item) is form)))
    kind = kinds.most_common(1)[0][0] if kinds else None
    if not form.prompt and kind == "strings":
        _refuse_a_prompt_elsewhere(records, source, columns)

    def parse(record: dict) -> Row:
        row = forms.pair(form, record) if forms.form_of(record) is form else None
        if row is None or forms.kind(form, record) != kind:
            raise Unusable(turns.MISSING)
        return row

    return f"{form.name}, as {kind}" if kind else form.name, items, parse, {*form.reads}


def _refuse_a_prompt_elsewhere(records: list[dict], source: str, columns: list[str]) -> None:
    """Raise ValueError where pairs have no prompt by name, and a column of sentences that may be one."""
    for name in columns:
        if name.lower() in {"chosen", "rejected", *turns.SYSTEMS}:
            continue
        said = [value for record in records if isinstance(value := record.get(name.lower()), str) and " " in value]
        own = [record for record in records if record.get(name.lower()) in (record["chosen"], record["rejected"])]
        if 2 * len(said) > len(records) and 2 * len(set(said)) > len(said) and 2 * len(own) < len(records):
            raise ValueError(
                f"The data {source} have a column {name!r}, which may be the prompt and is not read as one: name it "
                "prompt, or leave it out."
            )


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
