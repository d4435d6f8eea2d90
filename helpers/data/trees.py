"""OASST1 (Köpf et al. 2023, arXiv:2304.07327): messages, a row each, that are trees together."""

from collections.abc import Callable, Sequence

from helpers.data.forms import best_and_worst
from helpers.data.messages import ROLES, Unusable
from helpers.data.turns import Row, checked
from helpers.lm.encoding import Message

NEEDS = ("message_id", "parent_id", "role", "text", "rank")
READS = {*NEEDS, "deleted", "review_result"}


def are_trees(records: Sequence[dict]) -> bool:
    """Whether rows are messages of trees."""
    return set().union(*records) >= {*NEEDS}


def without_nesting(records: list[dict]) -> list[dict]:
    """OASST1's tree files hold a tree a row, each message in its parent's `replies`: its messages instead, in rows."""
    prompts = [record["prompt"] for record in records if isinstance(record.get("prompt"), dict)]
    trees = [prompt for prompt in prompts if {"message_id", "replies"} & prompt.keys()]  # another is one message
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


def pairs(records: Sequence[dict]) -> tuple[list[tuple[str, list[dict]]], Callable[[tuple], Row]]:
    """The messages that have answers, with these, and what makes a pair of one: of its answers those of the lowest
    rank, which is the best, and of the highest."""
    messages = {str(record.get("message_id")): record for record in records}
    answers: dict[str, list[dict]] = {}
    for record in records:
        if record.get("role") == "assistant":
            answers.setdefault(str(record.get("parent_id")), []).append(record)
    choose = best_and_worst("text", "rank", -1)

    def pair(item: tuple[str, list[dict]]) -> Row:
        asked, given = item
        best, worst = choose([list(filter(_stands, given))], None)
        return checked(_path(asked, messages), best, worst)

    return list(answers.items()), pair


def _path(message_id: str | None, messages: dict[str, dict]) -> tuple[Message, ...]:
    """The conversation from a tree's root to a message."""
    turns = []
    while message_id is not None:
        message = messages.get(str(message_id))
        if message is None or not _stands(message) or len(turns) == len(messages):  # the last: a tree that is a ring
            raise Unusable("a turn of the conversation missing or deleted")
        turns.append((ROLES.get(str(message.get("role")).lower()), message.get("text")))
        message_id = message.get("parent_id")
    return tuple(reversed(turns))


def _stands(message: dict) -> bool:
    """Whether a message was neither deleted nor found wanting in review."""
    return not message.get("deleted") and message.get("review_result") is not False
