"""Rows of preference data: a text or a conversation as a prompt, and two answers to it, each thing said once."""

import re
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq

from helpers.data.messages import Unusable, said
from helpers.lm import encoding
from helpers.lm.encoding import Message, Prompt

NO_BEGINNING = "no beginning that both answers share"
WITHIN_A_WORD = "a shared beginning that ends within a word"
DOUBLED = "the prompt taken off the beginning of both answers"
SYSTEMS = ("system", "system_prompt")  # columns
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces
_SENTENCES = re.compile(r".*[.?!:\n。？！：]", re.DOTALL)
_BROKEN = re.compile("[\ud800-\udfff]")  # JSON can escape one half of a character of two
_NAMES = (  # what a turn stands under in dialogues and chat templates
    r"\b(?:s|bos|begin_of_text|im_start|start_header_id|end_header_id|start_of_turn|sys|inst|system|user|human|prompter|"
    r"question|q|query|instruction|prompt|input)\b"
)
_NAMED_FIRST = re.compile(rf"\W*{_NAMES}\s*[^\w\s]", re.IGNORECASE)
_NAMED_LAST = re.compile(rf"{_NAMES}\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """A prompt, the answer preferred and the one not; both are empty where prompts alone were asked for."""

    prompt: Prompt
    chosen: str
    rejected: str
    is_shared: bool = field(default=False, repr=False, compare=False)  # the prompt is what two texts begin with
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)  # what does not stand so in the source

    @property
    def opening(self) -> str:
        """The first user turn, or the whole of a plain prompt, each run of white space as one space. It ties rows
        together when they are split: many dialogues come with longer versions of themselves, and of one question two
        pairs of texts share different beginnings of an answer, so there a last sentence without an end is left out."""
        whole = _SENTENCES.match(self._first) if self.is_shared else None
        return " ".join((whole[0] if whole else self._first).split())

    @property
    def is_brief(self) -> bool:
        """Whether two texts share no more than a word or two, as they may by chance: no sentence, and no prompt."""
        words = len(self._first) > 8 if UNSPACED.search(self._first) else len(self._first.split()) > 2
        return self.is_shared and not words and not _SENTENCES.match(self._first)

    @property
    def is_unfinished(self) -> bool:
        """Whether two texts share no whole sentence, so that it may be the answers' own beginning."""
        return self.is_shared and not _SENTENCES.fullmatch(self._first.rstrip())

    @property
    def _first(self) -> str:
        turns = (("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt
        return next(text for role, text in turns if role == "user")


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
    if any(_is_within_a_word(text, end) for text in (chosen, rejected)):
        raise Unusable(WITHIN_A_WORD)
    end -= chosen[:end].endswith(" ")
    return checked(with_system(chosen[:end], record), chosen[end:], rejected[end:], is_shared=True)


def _is_within_a_word(text: str, at: int) -> bool:
    before, after = re.search(r"[^\W_]['’-]?$", text[max(at - 2, 0) : at]), re.match(r"['’-]?[^\W_]", text[at : at + 2])
    return bool(before and after)


def answered(prompt: Prompt, record: dict, *answers: str) -> Row:
    """The row of a prompt that a record states and of two answers, or none: the system's words of a column of their own
    are its first turn, and what both answers repeat of it is taken off. Raises Unusable."""
    asked = with_system(prompt, record)
    row = checked(asked, *answers)
    said = [prompt] if isinstance(asked, str) else [text for _, text in asked]
    texts = [prompt] if isinstance(prompt, str) else []
    if not isinstance(asked, str):  # where one word is said, a greeting, it is often answered with itself
        texts += filter(_is_long, (said[-1], "\n".join(said), encoding.plain(asked)))
    for text in texts if answers else ():
        rests = [_goes_on(answer, text) for answer in answers]
        if None not in rests:
            return checked(asked, *rests, notes=(DOUBLED,))
        if any(rests):
            raise Unusable("one answer alone that begins with the prompt")
    if any(_is_named(answer, text) for answer in answers for text in filter(_is_long, (said[0], said[-1]))):
        raise Unusable("an answer that repeats the prompt after a speaker's name")
    return row


def _is_long(text: str) -> bool:
    """Whether a text is more than a word."""
    return len(re.findall(r"\w+", text)) > 1 or bool(UNSPACED.search(text) and len(text) > 5)


def _goes_on(answer: str, text: str) -> str | None:
    """What an answer goes on with where it begins with a text, and that is surely no part of what it says: white space
    follows, or the text is several words that end in a mark."""
    rest = _after(answer, text)
    is_apart = not rest or rest[0].isspace() or (_is_long(text) and not text.rstrip()[-1].isalnum())
    return rest.lstrip() if rest is not None and is_apart else None


def _after(whole: str, text: str) -> str | None:
    """What stands in a text after another that it begins with, whatever white space is in them; None where it does not,
    or goes on within a word."""
    words, at = text.split(), 0
    if not whole.lstrip().startswith(words[0]) or not " ".join(whole.split()).startswith(" ".join(words)):
        return None
    for word in words:
        at = whole.index(word, at) + len(word)
    return None if _is_within_a_word(whole, at) else whole[at:]


def _is_named(answer: str, text: str) -> bool:
    """Whether an answer begins as dialogues do, and a text stands in it after the name of who says it."""
    if not _NAMED_FIRST.match(answer):
        return False
    before, found, _ = " ".join(answer.split()).partition(" ".join(text.split()))
    return bool(found and _NAMED_LAST.search(before))


def with_system(prompt: Prompt, record: dict) -> Prompt:
    """The prompt with the system's words of a column of their own as its first turn, unless it begins with them."""
    told = [words for name in SYSTEMS if (words := _system_words(record.get(name))).strip()]
    if not told:
        return prompt
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    has_one = bool(turns) and turns[0][0] == "system"
    words = {text.strip() for text in told} | ({str(turns[0][1]).strip()} if has_one else set())
    if len(words) > 1:
        raise Unusable("two system prompts that disagree")
    first = turns[0][1] if turns and isinstance(turns[0][1], str) and _is_long(told[0]) else ""
    rest = _after(first, told[0])
    is_told = rest is not None and (rest.startswith("\n") or not told[0].rstrip()[-1].isalnum())
    return prompt if has_one or is_told else (("system", told[0]), *turns)


def _system_words(value) -> str:
    """What the system says in a column of its own: a text, or one message of its."""
    words = said(value, is_prompt=True) if value and isinstance(value, str | list | dict) else ""
    if isinstance(words, str):
        return words
    if len(words) != 1 or words[0][0] != "system" or not isinstance(words[0][1], str):
        raise Unusable("a system prompt that is no text")
    return words[0][1]
