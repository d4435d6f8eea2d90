"""The public forms of preference data, as one table of columns, and how a row of one becomes a pair."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from helpers.data import messages, turns
from helpers.data.messages import Unusable
from helpers.data.turns import Row
from helpers.lm.encoding import Message, Prompt

HISTORY = "history"  # LLaMA-Factory's column of earlier turns, beside an instruction
PROMPTS = (("prompt",), ("question",), ("instruction", "input", HISTORY), ("query",), ("input",))
SCORES = tuple(
    tuple(name.format(side) for side in ("chosen", "rejected"))
    for name in ("score_{}", "{}_score", "rating_{}", "{}_rating")
)


# --- Which of several answers is preferred ---


def _as_they_stand(answers: list, label) -> tuple:
    if len(answers) != 2:
        raise Unusable(f"{len(answers)} answers, where two were expected")
    return tuple(answers)


def _in_a_list(answers: list, label) -> tuple:
    """LLaMA-Factory's: the preferred one first."""
    if not isinstance(answers[0], list):
        raise Unusable(messages.MISSING)
    return _as_they_stand(answers[0], label)


def _by_number(answers: list, label) -> tuple:
    """PKU-SafeRLHF's: the number of the preferred one."""
    number = _label(label)
    if number not in (0, 1):
        raise Unusable("no number of the preferred answer")
    return answers[int(number)], answers[1 - int(number)]


def _first_if_one(answers: list, label) -> tuple:
    """SHP's: 1 where the first is preferred, else 0."""
    return _by_number(answers[::-1], label)


def _by_sign(answers: list, label) -> tuple:
    """HelpSteer's: below zero where the first is preferred."""
    number = _number(label)
    if number is None:
        raise Unusable("no number of the preferred answer")
    if number == 0:
        raise Unusable("answers as good as each other")
    return _by_number(answers, int(number > 0))


def best_and_worst(text: str, by: str, sign: int) -> Callable[[list, object], tuple]:
    """Of a list of answers those of the highest and the lowest number under `by`; with a sign of -1 the other way."""

    def choose(answers: list, label) -> tuple:
        listed = answers[0] if isinstance(answers[0], list) else []
        numbers = [(_number(one.get(by)), one.get(text)) for one in listed if isinstance(one, dict)]
        rated = sorted((one for one in numbers if one[0] is not None), key=lambda one: -sign * one[0])
        if len(rated) < 2:
            raise Unusable("fewer than two ranked answers")
        if rated[0][0] == rated[-1][0]:
            raise Unusable("answers all of one rank")
        return rated[0][1], rated[-1][1]

    return choose


def _number(value) -> float | None:
    """A number, or a text that is one, as tables hold them; None for all else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def _label(value) -> float | None:
    """0 or 1, or false or true, as a number or a text; any other number as it is, None for all else."""
    if isinstance(value, str):
        value = {"false": False, "true": True}.get(value.strip().lower(), value)
    return float(value) if isinstance(value, bool) else _number(value)


# --- Rows that are made of several ---


def _labelled(records: Sequence[dict]) -> list[dict]:
    """KTO's rows, an answer each: of those of one prompt the first that is wanted and the first that is not, and as
    their label whether each has one."""
    by_prompt: dict[str, dict] = {}
    labels = [_label(record.get("label")) for record in records]
    unwanted = -1 if -1 in labels else 0
    for record, label in zip(records, labels):
        key = json.dumps([record.get("prompt"), *map(record.get, turns.SYSTEMS)], sort_keys=True, default=str)
        merged = by_prompt.setdefault(key, {**record, "completion": [None, None], "label": True})
        if label in (1, unwanted):
            side = 0 if label == 1 else 1
            merged["completion"][side] = merged["completion"][side] or record.get("completion")
        else:
            merged["label"] = False
    return list(by_prompt.values())


def _of_both_labels(answers: list, are_labelled) -> tuple:
    if None in answers[0]:
        unknown = "a label that is neither 1 or true nor 0, -1 or false"
        raise Unusable("no answer of the other label to its prompt" if are_labelled else unknown)
    return tuple(answers[0])


# --- The table ---


@dataclass(frozen=True)
class Form:
    """Which columns hold what, in lower case, as names are compared.

    prompt: the first there must be, and of the others each that there is goes below it; none where the answers hold it.
    answers, label: what `choose` makes the preferred and the other answer of. merge: what makes items of rows.
    """

    name: str
    prompt: tuple[str, ...]
    answers: tuple[str, ...]
    label: str = ""
    choose: Callable[[list, object], tuple] = _as_they_stand
    merge: Callable[[Sequence[dict]], list[dict]] = list

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that a row of this form has."""
        return tuple(filter(None, (*self.prompt[:1], *self.answers, self.label)))

    @property
    def reads(self) -> tuple[str, ...]:
        """All columns that are read of it, but for scores."""
        return (*self.needs, *self.prompt, *turns.SYSTEMS)

    def chosen_and_rejected(self, record: dict) -> tuple:
        """The two answers of a row, as they stand there. Raises Unusable."""
        label = record.get(self.label) if self.label else None
        return self.choose([record.get(name) for name in self.answers], label)


FORMS = (
    Form("PKU-SafeRLHF, the better response preferred", ("prompt",), ("response_0", "response_1"),
         "better_response_id", _by_number),
    Form("SHP", ("history",), ("human_ref_a", "human_ref_b"), "labels", _first_if_one),
    Form("HelpSteer 3", ("context",), ("response1", "response2"), "overall_preference", _by_sign),
    Form("HelpSteer 2", ("prompt",), ("response_1", "response_2"), "preference_strength", _by_sign),
    Form("Nectar, its best and its worst answer", ("prompt",), ("answers",),
         choose=best_and_worst("answer", "rank", -1)),
    Form("UltraFeedback, its best and its worst completion", ("instruction",), ("completions",),
         choose=best_and_worst("response", "overall_score", 1)),
    Form("KTO, two answers of one prompt", ("prompt",), ("completion",), "label", _of_both_labels, _labelled),
    Form("persona evaluations", ("question",), ("answer_matching_behavior", "answer_not_matching_behavior")),
    *(
        Form(f"{prompt[0]}, {answers[0]} and {answers[1]}", prompt, answers)
        for answers in (("chosen", "rejected"), ("chosen_response", "rejected_response"))
        for prompt in PROMPTS
    ),
    Form("LLaMA-Factory's ShareGPT pairs", ("conversations",), ("chosen", "rejected")),
    Form("LLaMA-Factory's Alpaca pairs", ("instruction", "input", HISTORY), ("output",), choose=_in_a_list),
    Form("chosen and rejected that share their prompt", (), ("chosen", "rejected")),
)  # fmt: skip


def form_of(record: dict) -> Form | None:
    """The first form of the table whose columns a row has."""
    return next((form for form in FORMS if all(record.get(name) is not None for name in form.needs)), None)


def nearest(columns: Sequence[str]) -> Form:
    """The form that has the most of some columns; of several the one that lacks the fewest, and of these rather one of
    chosen and rejected; where none has any, the plain one."""
    has = {name.lower() for name in columns}
    plain = next(form for form in FORMS if form.needs == ("prompt", "chosen", "rejected"))

    def rank(form: Form) -> tuple:
        return -len(has & {*form.needs}), len({*form.needs} - has), "chosen" not in form.answers

    return min(FORMS, key=rank) if any(has & {*form.needs} for form in FORMS) else plain


def scores_read(columns: Collection[str]) -> set[str]:
    """Those of some columns that score one answer, where another scores the other."""
    return {name for both in SCORES if {*both} <= {*columns} for name in both}


def columns_read() -> set[str]:
    """All columns that any form is read from."""
    of_forms = {name for form in FORMS for name in form.reads} | {name for prompt in ALONE for name in prompt}
    return of_forms | {name for both in SCORES for name in both}


ANSWERS = ("chosen", "rejected")
NO_PROMPT = "no prompt"
ALONE = (*PROMPTS, ("messages",), ("conversations",), ("context",), ("history",))  # where prompts alone are


# --- A row's parts ---


def pair(form: Form, record: dict) -> Row:
    """The pair in a row of a form. Raises Unusable."""
    _check_scores(record)
    chosen, rejected = messages.both_said(*form.chosen_and_rejected(record))
    are_strings = isinstance(chosen, str)
    if are_strings != isinstance(rejected, str):
        raise Unusable(messages.MISSING)
    if are_strings and not form.prompt:
        return turns.of_shared_text(chosen, rejected, record)
    prompt = _prompt(form.prompt, record) if form.prompt else ()
    if not are_strings:
        prompt, chosen, rejected = turns.of_dialogues(prompt, chosen, rejected)
    elif not isinstance(prompt, str):
        chosen, rejected = chosen.strip(), rejected.strip()
    if not form.prompt:  # a dialogue's own turns are told apart already
        return turns.checked(turns.with_system(prompt, record), chosen, rejected)
    return turns.answered(prompt, record, chosen, rejected)


def kind(form: Form, record: dict) -> str | None:
    """What both answers in a row of a form are, in a word; None where they are no two of a kind."""
    try:
        both = set(map(_kind, form.chosen_and_rejected(record)))
    except Unusable:
        return None
    return both.pop() if len(both) == 1 else None


def _kind(answer) -> str:
    said = messages.said(answer)
    if isinstance(said, str):
        return "strings"
    return "HH-RLHF's dialogues" if isinstance(answer, str) and answer.lstrip().startswith("Human:") else "messages"


def prompt_columns(record: dict) -> tuple[str, ...]:
    """The columns that a row's prompt is read from, whatever answers it has or lacks; none where it has none."""
    alone = next((columns for columns in ALONE if record.get(columns[0]) is not None), None)
    return alone or (ANSWERS if any(record.get(name) for name in ANSWERS) else ())


def has_bare_answers(record: dict) -> bool:
    """Whether a row has no column for its prompt, and two answers that are plain strings."""
    form = form_of(record)
    return bool(form) and prompt_columns(record) == ANSWERS and kind(form, record) == "strings"


def prompt_alone(record: dict) -> Row:
    """The prompt of a row, whatever answers it has or lacks. Raises Unusable."""
    columns = prompt_columns(record)
    if not columns:
        raise Unusable(NO_PROMPT)
    if columns in ALONE:
        prompt = _prompt(columns, record)
        return turns.answered(prompt if isinstance(prompt, str) else _up_to_the_user(prompt), record)
    said = [messages.said(record[name]) for name in ANSWERS if record.get(name)]
    asked = {_up_to_the_user(turns) for turns in said if not isinstance(turns, str)}
    if not asked and len(said) == 2:
        return replace(turns.of_shared_text(*said, record), chosen="", rejected="")
    if len(asked) != 1:
        raise Unusable("the two prompts differ" if asked else NO_PROMPT)
    return turns.answered(asked.pop(), record)


def _up_to_the_user(said: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(said[: max((i for i, (role, _) in enumerate(said, start=1) if role == "user"), default=0)])


def _prompt(columns: Sequence[str], record: dict) -> Prompt:
    """The prompt in some columns, as text or as turns. HH-RLHF's text is a dialogue where it ends before an answer.
    Raises Unusable."""
    said = messages.said(record[columns[0]], is_prompt=True)
    below = [record.get(name) for name in columns[1:] if name != HISTORY]
    below = [str(one) if _number(one) is not None else one for one in below if one == one]  # nan is a gap
    below = [text for text in below if text is not None and str(text).strip()]
    if below and not (isinstance(said, str) and all(isinstance(text, str) for text in below)):
        raise Unusable("an input that is not text, or stands beside a prompt that is not")
    earlier = _earlier(record.get(HISTORY)) if HISTORY in columns[1:] else ()
    if isinstance(said, str):
        said = "\n".join(filter(str.strip, [said, *below]))
    return (*earlier, *((("user", said),) if isinstance(said, str) else said)) if earlier else said


def _earlier(history) -> tuple[Message, ...]:
    """The turns in a list of questions and their answers, or of messages. Raises Unusable."""
    if history is None or history != history:  # nan is a gap
        return ()
    pairs = messages.parsed(history) if isinstance(history, str) and history.strip() else history or []
    if isinstance(pairs, list) and pairs and all(map(messages.is_message, pairs)):
        return messages.said(pairs)
    if not (isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)):
        raise Unusable("a history that is no list of questions and answers")
    return tuple((role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair))


def _check_scores(record: dict) -> None:
    """Raise Unusable where a row's own scores of its answers do not prefer the chosen one."""
    for names in SCORES:
        chosen, rejected = (_number(record.get(name)) for name in names)
        if chosen is not None and rejected is not None and chosen <= rejected:
            raise Unusable("answers scored alike" if chosen == rejected else "a chosen answer scored below the other")
