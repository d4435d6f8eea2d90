"""Preference data from elsewhere: files and data sets of the Hugging Face hub, read as pairs and split.

Forms, recognised by their columns and by what these hold: TRL's preference data (its "Dataset formats and types":
prompt, chosen and rejected, or the prompt as what the two share; strings or messages), UltraFeedback binarized (Cui et
al. 2023, arXiv:2310.01377), the dialogues of HH-RLHF (Bai et al. 2022, arXiv:2204.05862) and the message trees of
OASST1 (Köpf et al. 2023, arXiv:2304.07327). Each row read is kept, or counted under the reason why it is not. Nothing
that is read can execute: no data set's script, no pickle.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import eq

from helpers.data.files import from_hub, local_file, rows_of
from helpers.lm.encoding import Message, Prompt

ACCEPTED = (
    "prompt, chosen and rejected, or chosen and rejected alone, as strings or as lists of messages; HH-RLHF's "
    "dialogues; or OASST1's messages with message_id, parent_id, role, text and rank"
)
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's; without the blank line it is part of what was said
_ROLES = {"Human": "user", "Assistant": "assistant", "prompter": "user", "assistant": "assistant"}
_SENTENCES = re.compile(r".*[.?!:\n]", re.DOTALL)
_BROKEN = re.compile("[\ud800-\udfff]")  # JSON can escape one half of a character of two
_OASST = {"message_id", "parent_id", "role", "text", "rank"}
_READ = {"prompt", "chosen", "rejected", *_OASST, "deleted", "review_result"}  # other columns stay unread


@dataclass(frozen=True)
class Row:
    """A prompt, the answer preferred and the one not."""

    prompt: Prompt
    chosen: str
    rejected: str
    is_shared: bool = field(default=False, repr=False, compare=False)  # the prompt is what two texts begin with

    @property
    def opening(self) -> str:
        """The first user turn, or the whole of a plain prompt, each run of white space as one space. It ties rows
        together when they are split: many dialogues come with longer versions of themselves, and of one question two
        pairs of texts share different beginnings of an answer, so there a last sentence without an end is left out."""
        text = self.prompt
        if not isinstance(text, str):
            text = next(content for role, content in text if role == "user")
        whole = _SENTENCES.match(text) if self.is_shared else None
        return " ".join((whole[0] if whole else text).split())


@dataclass(frozen=True)
class Rows:
    """The pairs of a source, in its order, and how many of its `total` rows were set aside for each reason. `total`
    counts rows, except of OASST1: there it counts the prompts that have answers, each of which could be a pair."""

    rows: tuple[Row, ...]
    set_aside: dict[str, int]
    total: int
    form: str  # what the rows were recognised as


class _Unusable(Exception):
    """A row is no pair; the message is the reason that it is counted under."""


def read(source: str) -> Rows:
    """The preference pairs of a local file or of a data set of the Hugging Face hub, one for each prompt.

    source: a .jsonl, .json or .parquet file, gzipped (.gz) or not, or `owner/name[/folder][@revision][:split]`; the
    split is train_prefs, train or the only one where none is named. Raises FileNotFoundError or ValueError with one
    sentence that names the source and the remedy.
    """
    path = local_file(source)
    records, columns = from_hub(source, _READ) if path is None else rows_of(path, _READ)
    if not records:
        raise ValueError(f"The data {source} hold no rows: give {ACCEPTED}.")
    form, items, row_of = _recognised(records)
    if form is None:
        names = ", ".join(map(repr, columns))
        raise ValueError(f"The data {source} hold no preferences in their columns {names}: give {ACCEPTED}.")
    kept, set_aside = {}, Counter()
    for item in items:
        try:
            row = row_of(item)
            if row.prompt in kept:
                raise _Unusable("another pair of the same prompt")
            kept[row.prompt] = row
        except _Unusable as reason:
            set_aside[str(reason)] += 1
    if not kept:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in set_aside.items()) or "no answers"
        raise ValueError(f"The data {source}, read as {form}, hold no pair but {reasons}: mend or replace them.")
    return Rows(tuple(kept.values()), dict(set_aside), len(items), form)


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


def _recognised(records: list[dict]) -> tuple[str | None, list, Callable[..., Row]]:
    """The form of most records, the items that are each to be a pair, and what makes a pair of one."""
    records = _without_nesting(records)
    if set().union(*records) >= _OASST:
        return _of_trees(records)
    forms = Counter(form for form in map(_form, records) if form in _FORMS)
    form = forms.most_common(1)[0][0] if forms else None
    name, make = _FORMS.get(form, (None, None))

    def parse(record: dict) -> Row:
        if _form(record) != form:
            raise _Unusable("a value missing, or of another kind than in the other rows")
        return make(record)

    return name, records, parse


def _form(record: dict) -> tuple:
    """The kinds of value in prompt, chosen and rejected."""
    values = [record.get(column) for column in ("prompt", "chosen", "rejected")]
    kinds = tuple(_KIND_OF.get(type(value), "other") for value in values)
    if kinds == (None, "text", "text") and all(value.lstrip().startswith("Human:") for value in values[1:]):
        return (None, "dialogue", "dialogue")
    return kinds


def _of_strings(record: dict) -> Row:
    """The prompt as it is or, where it is HH-RLHF's text up to the assistant's turn, the dialogue that it is."""
    prompt = record["prompt"]
    turns = _dialogue(prompt) if prompt.lstrip().startswith("Human:") else ()
    if turns and turns[-1] == ("assistant", ""):
        return _row(turns[:-1], record["chosen"].strip(), record["rejected"].strip())
    return _row(prompt, record["chosen"], record["rejected"])


def _of_shared_text(record: dict) -> Row:
    """The prompt is what both begin with, but for one space at its end: TRL's extract_prompt."""
    chosen, rejected = record["chosen"], record["rejected"]
    end = sum(takewhile(bool, map(eq, chosen, rejected)))
    end -= chosen[:end].endswith(" ")
    return replace(_row(chosen[:end], chosen[end:], rejected[end:]), is_shared=True)


def _of_dialogues(record: dict) -> Row:
    """The last turns are the answers; what is before them is the prompt, or the prompt's own column if nothing is."""
    chosen, rejected = _dialogue(record["chosen"]), _dialogue(record["rejected"])
    if not all(dialogue and dialogue[-1][0] == "assistant" for dialogue in (chosen, rejected)):
        raise _Unusable("an answer that is not the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise _Unusable("the two prompts differ")
    stated = record.get("prompt") or []
    stated = (("user", stated),) if isinstance(stated, str) else _dialogue(stated)
    return _row(chosen[:-1] or stated, chosen[-1][1], rejected[-1][1])


def _dialogue(value: str | list) -> tuple[Message, ...]:
    """The turns of messages, or of HH-RLHF's text, without the white space that belongs to its marks."""
    if isinstance(value, str):
        parts = _SPEAKER.split("\n\n" + value.lstrip())
        return tuple((_ROLES[speaker], said.strip()) for speaker, said in zip(parts[1::2], parts[2::2]))
    if not all(isinstance(message, dict) for message in value):
        raise _Unusable("a message without a role and a text")
    return tuple((message.get("role"), message.get("content")) for message in value)


_KIND_OF = {str: "text", list: "messages", type(None): None}
_FORMS = {
    ("text", "text", "text"): ("prompt, chosen and rejected as strings", _of_strings),
    (None, "text", "text"): ("chosen and rejected as strings that share their prompt", _of_shared_text),
    (None, "dialogue", "dialogue"): ("HH-RLHF dialogues", _of_dialogues),
    ("messages", "messages", "messages"): ("prompt, chosen and rejected as messages", _of_dialogues),
    (None, "messages", "messages"): ("chosen and rejected as messages that share their prompt", _of_dialogues),
    ("text", "messages", "messages"): ("prompt as a string, chosen and rejected as messages", _of_dialogues),
}


def _without_nesting(records: list[dict]) -> list[dict]:
    """OASST1's tree files hold a tree a row, each message in its parent's `replies`: its messages instead, in rows."""
    trees = [record["prompt"] for record in records if isinstance(record.get("prompt"), dict)]
    if 2 * len(trees) <= len(records):
        return records
    messages, waiting = [], [(root, None) for root in reversed(trees)]
    while waiting:  # rather than a recursion, which a deep tree would exhaust
        message, parent = waiting.pop()
        messages.append({**message, "parent_id": parent})
        replies = message.get("replies")
        if isinstance(replies, list):
            waiting += [(reply, message.get("message_id")) for reply in reversed(replies) if isinstance(reply, dict)]
    return messages


def _of_trees(records: list[dict]) -> tuple[str, list, Callable[..., Row]]:
    messages = {str(record.get("message_id")): record for record in records}
    answers = defaultdict(list)
    for record in records:
        if record.get("role") == "assistant":
            answers[str(record.get("parent_id"))].append(record)
    return "OASST1 message trees", list(answers.items()), lambda item: _best_and_worst(*item, messages)


def _best_and_worst(asked: str, answers: list[dict], messages: dict[str, dict]) -> Row:
    """Of the answers to one message those of the lowest rank, which is the best, and of the highest."""
    ranked = [a for a in answers if _stands(a) and isinstance(a.get("rank"), int | float) and a["rank"] == a["rank"]]
    ranked.sort(key=lambda answer: answer["rank"])
    if len(ranked) < 2:
        raise _Unusable("fewer than two ranked answers")
    if ranked[0]["rank"] == ranked[-1]["rank"]:
        raise _Unusable("answers all of one rank")
    return _row(_path(asked, messages), ranked[0].get("text"), ranked[-1].get("text"))


def _path(message_id: str | None, messages: dict[str, dict]) -> tuple[Message, ...]:
    """The conversation from a tree's root to a message."""
    turns = []
    while message_id is not None:
        message = messages.get(str(message_id))
        if message is None or not _stands(message) or len(turns) == len(messages):  # the last: a tree that is a ring
            raise _Unusable("a turn of the conversation missing or deleted")
        turns.append((_ROLES.get(str(message.get("role"))), message.get("text")))
        message_id = message.get("parent_id")
    return tuple(reversed(turns))


def _stands(message: dict) -> bool:
    """Whether a message was neither deleted nor found wanting in review."""
    return not message.get("deleted") and message.get("review_result") is not False


def _row(prompt: Prompt, chosen: str, rejected: str) -> Row:
    """The row, checked. Raises _Unusable."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    said = [content for _, content in turns]
    if not all(isinstance(text, str) for text in (*said, chosen, rejected)):
        raise _Unusable("a message without a role and a text")
    if any(_BROKEN.search(text) for text in (*said, chosen, rejected)):
        raise _Unusable("half a character, which no tokenizer reads")
    if chosen.strip() == rejected.strip():
        raise _Unusable("the same answer twice")
    if not (chosen.strip() and rejected.strip()):
        raise _Unusable("an empty answer")
    if not (said and all(text.strip() for text in said)):
        raise _Unusable("an empty prompt or turn")
    roles = [role for role, _ in turns[turns[0][0] == "system" :]]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise _Unusable("turns that do not alternate between user and assistant, the user's first and last")
    return Row(prompt, chosen, rejected)
