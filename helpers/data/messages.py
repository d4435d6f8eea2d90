"""What a value says: a text, or the turns of a conversation.

A text may be plain, the dialogue of HH-RLHF (Bai et al. 2022, arXiv:2204.05862), messages (`role` and `content`, or
ShareGPT's `from` and `value`), or messages written as JSON or as Python or numpy shows them. Nothing that is read can
execute.
"""

import ast
import json
import re
import warnings

from helpers.lm.encoding import Message

MISSING = "a value missing, or of another kind than in the other rows"
ROLES = dict.fromkeys(("user", "human", "prompter"), "user") | {"system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
LISTS = ("messages", "conversations", "conversation")  # names of a conversation in an object of its own
MORE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "images", "audio")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's; without the blank line it is part of what was said
_OPENS = re.compile(r'\s*"?\s*[\[{]')
_KEY = r"""["']{}\\*["']\s*:\s*"""  # in quotes that may be escaped
_SPEAKS = re.compile(_KEY.format("(?:role|from)") + rf"""\\*["'](?:{"|".join(ROLES)}|tool|function)\\*["']""", re.I)
_BETWEEN = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|\}\s+(?=\{)""", re.DOTALL)  # a string, or two objects


class Unusable(Exception):
    """A row is no pair; the message is the reason that it is counted under."""


def said(value, is_prompt: bool = False) -> str | tuple[Message, ...]:
    """A text, or the turns of a conversation. Raises Unusable."""
    if isinstance(value, str):
        boxed = _boxed(value) if is_prompt else None
        value = _decoded(value if boxed is None else boxed)
    value = _bare(value)
    if isinstance(value, str):
        turns = _dialogue(value) if value.lstrip().startswith("Human:") else ()
        if is_prompt:
            return turns[:-1] if turns and turns[-1] == ("assistant", "") else value
        return turns or value
    if not isinstance(value, list):
        raise Unusable(MISSING)
    return tuple(map(_message, value))


def both_said(chosen, rejected) -> tuple[str | tuple[Message, ...], ...]:
    """What two answers say. Lists of one text, both written as text, are these texts: one alone may be meant so."""
    boxed = [_boxed(answer) for answer in (chosen, rejected)]
    return tuple(map(said, (chosen, rejected) if None in boxed else boxed))


def parsed(text: str):
    """The value that JSON, or what Python or numpy shows of one, stands for; None where it is neither."""

    def with_commas(text: str):
        return ast.literal_eval(_BETWEEN.sub(lambda found: found[1] or "}, ", text))

    for parse in (json.loads, ast.literal_eval, with_commas):  # the latter two read literals alone, and run nothing
        try:
            with warnings.catch_warnings(action="ignore"):  # of a backslash that Python's literals do not know
                return parse(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def is_message(value) -> bool:
    """Whether a value says who speaks, and what, in OpenAI's words or in ShareGPT's."""
    return isinstance(value, dict) and any(names <= value.keys() for names in ({"role", "content"}, {"from", "value"}))


def _boxed(value) -> str | None:
    """The text in a list of one that is written as Python shows it, as tables hold lists; None where there is none.
    Written as JSON it may be what was asked for, unless JSON is in it once more."""
    found = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    if not (isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)):
        return None
    is_shown = value.strip() == repr(found)  # Python would take numpy's ['a' 'b'] for one text
    return found[0] if is_shown or _OPENS.match(found[0]) else None


def _decoded(text: str):
    """The messages, or parts of a text, that stand written in place of a text; any other text as it is.
    Raises Unusable for messages that cannot be read."""
    if not _OPENS.match(text):
        return text
    found = parsed(text)
    if isinstance(found, str):
        inner = _decoded(found)
        return text if inner == found else inner
    value = _bare(found)
    if isinstance(value, str) and isinstance(found, list) and isinstance(found[0], dict):
        return value
    is_own = isinstance(found, dict) and not _SPEAKS.search(text)  # JSON with such keys that nobody speaks
    if isinstance(value, list) and value and all(map(is_message, value)) and not is_own:
        return value
    keys = [re.search(_KEY.format(one), text) and re.search(_KEY.format(other), text)
            for one, other in (("role", "content"), ("from", "value"))]  # fmt: skip
    if any(keys) and _SPEAKS.search(text):
        raise Unusable("messages written as text that cannot be read")
    return text


def _bare(value):
    """Messages in a list, or a text, without the object or list round them; any other value as it is."""
    if isinstance(value, dict):
        name = next(iter(value)) if len(value) == 1 else None
        value = value[name] if name in LISTS else [value]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    is_parts = isinstance(value, list) and value and all(map(_is_part, value))
    return _content(value) if is_parts else value


def _is_part(value) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


def _message(message) -> Message:
    if not isinstance(message, dict):
        raise Unusable("a message without a role and a text")
    if any(message.get(name) for name in MORE):
        raise Unusable("a message of more than text")
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    return ROLES.get(role.lower(), role) if isinstance(role, str) else role, _content(content)


def _content(content):
    """The text of a list of parts; what is no such list as it is, and None for parts without a text."""
    if not (isinstance(content, list) and content and all(isinstance(part, dict) for part in content)):
        return content
    if any(part.get("type", "text") != "text" for part in content):
        raise Unusable("a message of more than text")
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _dialogue(text: str) -> tuple[Message, ...]:
    """The turns of HH-RLHF's text, without the white space that belongs to its marks."""
    parts = _SPEAKER.split("\n\n" + text.lstrip())
    return tuple((ROLES[speaker.lower()], said.strip()) for speaker, said in zip(parts[1::2], parts[2::2]))
