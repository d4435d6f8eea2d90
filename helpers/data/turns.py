"""Rows of preference data: a text, a dialogue or messages as a prompt, and two answers to it.

A text may be plain, the dialogue of HH-RLHF (Bai et al. 2022, arXiv:2204.05862), messages (`role` and `content`, or
ShareGPT's `from` and `value`), or messages written as JSON. Nothing that is read can execute.
"""

import ast
import json
import re
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq

from helpers.lm.encoding import Message, Prompt

MISSING = "a value missing, or of another kind than in the other rows"
NO_BEGINNING = "no beginning that both answers share"
WITHIN_A_WORD = "a shared beginning that ends within a word"
SYSTEMS = ("system", "system_prompt")  # columns
ROLES = dict.fromkeys(("user", "human", "prompter"), "user") | {"system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's; without the blank line it is part of what was said
_SENTENCES = re.compile(r".*[.?!:\n]", re.DOTALL)
_BROKEN = re.compile("[\ud800-\udfff]")  # JSON can escape one half of a character of two


class Unusable(Exception):
    """A row is no pair; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Row:
    """A prompt, the answer preferred and the one not; both are empty where prompts alone were asked for."""

    prompt: Prompt
    chosen: str
    rejected: str
    is_shared: bool = field(default=False, repr=False, compare=False)  # the prompt is what two texts begin with
    was_doubled: bool = field(default=False, repr=False, compare=False)  # it stood before both answers once more

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


def checked(prompt: Prompt, *answers: str, **more) -> Row:
    """The row of a prompt and the chosen and the rejected answer, or of a prompt alone. Raises Unusable."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    said = [content for _, content in turns]
    if not all(isinstance(text, str) for text in (*said, *answers)):
        raise Unusable("a message without a role and a text")
    if any(_BROKEN.search(text) for text in (*said, *answers)):
        raise Unusable("half a character, which no tokenizer reads")
    if answers and answers[0].strip() == answers[1].strip():
        raise Unusable("the same answer twice")
    if not all(answer.strip() for answer in answers):
        raise Unusable("an empty answer")
    if not (said and all(text.strip() for text in said)):
        raise Unusable("an empty prompt or turn")
    roles = [role for role, _ in turns[turns[0][0] == "system" :]]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise Unusable("turns that do not alternate between user and assistant, the user's first and last")
    return Row(prompt, *(answers or ("", "")), **more)


def said(value, is_prompt: bool = False) -> str | tuple[Message, ...]:
    """A text, or the turns of a conversation."""
    if isinstance(value, str):
        value = _decoded(value, "user" if is_prompt else "assistant")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        turns = _dialogue(value) if value.lstrip().startswith("Human:") else ()
        if is_prompt:
            return turns[:-1] if turns and turns[-1] == ("assistant", "") else value
        return turns or value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Unusable(MISSING)
    return tuple(map(_message, value))


def _decoded(text: str, speaker: str):
    """Messages that were written as JSON, or as Python shows them, in place of the text, or a single one of a speaker;
    any other as it is."""
    if not re.match(r"\s*(\[\s*)?\{", text):
        return text
    for parse in (json.loads, ast.literal_eval):  # the latter reads literals alone, and runs nothing
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if is_message(found) and len(found) == 2 and _message(found)[0] == speaker:
            return [found]
        if isinstance(found, list) and all(map(is_message, found)):
            return found
    return text


def is_message(value) -> bool:
    """Whether a value says who speaks, and what, in OpenAI's words or in ShareGPT's."""
    return isinstance(value, dict) and any(names <= value.keys() for names in ({"role", "content"}, {"from", "value"}))


def _message(message) -> Message:
    if not isinstance(message, dict):
        raise Unusable("a message without a role and a text")
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        if any(part.get("type", "text") != "text" for part in content):
            raise Unusable("a message of more than text")
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return ROLES.get(role.lower(), role) if isinstance(role, str) else role, content


def _dialogue(text: str) -> tuple[Message, ...]:
    """The turns of HH-RLHF's text, without the white space that belongs to its marks."""
    parts = _SPEAKER.split("\n\n" + text.lstrip())
    return tuple((ROLES[speaker.lower()], said.strip()) for speaker, said in zip(parts[1::2], parts[2::2]))


def of_dialogues(stated: Prompt, chosen: tuple, rejected: tuple) -> tuple[tuple[Message, ...], str, str]:
    """The last turns are the answers; what is before them, and what the prompt's own column says, is the prompt."""
    if not all(turns and turns[-1][0] == "assistant" for turns in (chosen, rejected)):
        raise Unusable("an answer that is not the assistant's")
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise Unusable("the two prompts differ")
    return _joined(stated, before), chosen[-1][1], rejected[-1][1]


def _joined(stated: Prompt, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation that a prompt's column and the turns before the answers tell together."""
    if isinstance(stated, str):
        said = [content.strip() for role, content in before if role == "user" and isinstance(content, str)]
        if stated.strip() in (said[:1] + said[-1:]):
            return before
        stated = (("user", stated),)
    if not before:
        return stated
    if not stated or _without_system(stated) == before or _without_system(before) == stated or stated == before:
        return max(stated, before, key=len)  # one of them has the system's turn
    if before[0][0] == "assistant" and stated[-1][0] == "user":
        return (*stated, *before)
    raise Unusable("a prompt that is not what stands before the answers")


def _without_system(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return turns[bool(turns) and turns[0][0] == "system" :]


def of_shared_text(chosen: str, rejected: str, record: dict) -> Row:
    """The prompt is what both begin with, but for one space at its end: TRL's extract_prompt."""
    if chosen.strip() == rejected.strip():
        raise Unusable("the same answer twice")
    end = sum(takewhile(bool, map(eq, chosen, rejected)))
    if not chosen[:end].strip():
        raise Unusable(NO_BEGINNING)
    if chosen[end - 1].isalnum() and any(text[end : end + 1].isalnum() for text in (chosen, rejected)):
        raise Unusable(WITHIN_A_WORD)
    end -= chosen[:end].endswith(" ")
    return checked(with_system(chosen[:end], record), chosen[end:], rejected[end:], is_shared=True)


def is_doubled(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both answers begin with the prompt once more. Raises Unusable where one of them does."""
    ends = len(prompt.rstrip())
    begins = [answer.startswith(prompt) and answer[ends:][:1].isspace() for answer in (chosen, rejected)]
    if any(begins) and not all(begins):
        raise Unusable("one answer alone that begins with the prompt")
    return all(begins) and bool(prompt.strip())


def with_system(prompt: Prompt, record: dict) -> Prompt:
    """The prompt with the system's words of a column of their own as its first turn."""
    told = [words for name in SYSTEMS if (words := _system_words(record.get(name))).strip()]
    if not told:
        return prompt
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    has_one = bool(turns) and turns[0][0] == "system"
    words = {text.strip() for text in told} | ({str(turns[0][1]).strip()} if has_one else set())
    if len(words) > 1:
        raise Unusable("two system prompts that disagree")
    return turns if has_one else (("system", told[0]), *turns)


def _system_words(value) -> str:
    """What the system says in a column of its own: a text, or one message of its."""
    words = said(value) if value and isinstance(value, str | list | dict) else ""
    if isinstance(words, str):
        return words
    if len(words) != 1 or words[0][0] != "system" or not isinstance(words[0][1], str):
        raise Unusable("a system prompt that is no text")
    return words[0][1]
