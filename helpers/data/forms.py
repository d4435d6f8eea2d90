"""The public forms of preference data, as one table of columns, and how a row of one becomes a pair."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helpers.data import turns
from helpers.data.turns import Row, Unusable
from helpers.lm.encoding import Message, Prompt

PROMPTS = (("prompt",), ("question",), ("instruction", "input"), ("query",), ("input",))
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
        raise Unusable(turns.MISSING)
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
    """KTO's rows, an answer each: of those of one prompt the first that is wanted and the first that is not."""
    by_prompt: dict[str, dict] = {}
    for record in records:
        key = json.dumps([record.get("prompt"), *map(record.get, turns.SYSTEMS)], sort_keys=True, default=str)
        merged = by_prompt.setdefault(key, {**record, "completion": [None, None]})
        label = _label(record.get("label"))
        if label in (0, 1):
            side = 0 if label else 1
            merged["completion"][side] = merged["completion"][side] or record.get("completion")
    return list(by_prompt.values())


def _of_both_labels(answers: list, label) -> tuple:
    if None in answers[0]:
        raise Unusable("no answer of the other label to its prompt")
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
        """All columns that are read of it."""
        return (*self.needs, *self.prompt, *turns.SYSTEMS, *(name for both in SCORES for name in both))

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
    Form("LLaMA-Factory's Alpaca pairs", ("instruction", "input"), ("output",), choose=_in_a_list),
    Form("chosen and rejected that share their prompt", (), ("chosen", "rejected")),
)  # fmt: skip


def form_of(record: dict) -> Form | None:
    """The first form of the table whose columns a row has."""
    return next((form for form in FORMS if all(record.get(name) is not None for name in form.needs)), None)


def nearest(columns: Sequence[str]) -> Form:
    """The form that lacks the fewest of its columns; of several the one that has the most."""
    has = {name.lower() for name in columns}
    return min(FORMS, key=lambda form: (len(set(form.needs) - has), -len(form.needs)))


def columns_read() -> set[str]:
    """All columns that any form is read from."""
    return {name for form in FORMS for name in form.reads} | {name for prompt in ALONE for name in prompt}


ALONE = (*PROMPTS, ("messages",), ("conversations",), ("context",), ("history",))  # where prompts alone are


# --- A row's parts ---


def pair(form: Form, record: dict) -> Row:
    """The pair in a row of a form. Raises Unusable."""
    _check_scores(record)
    chosen, rejected = map(turns.said, form.chosen_and_rejected(record))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unusable(turns.MISSING)
    stated = _prompt(form.prompt, record) if form.prompt else ()
    if not isinstance(chosen, str):
        prompt, chosen, rejected = turns.of_dialogues(stated, chosen, rejected)
        return turns.checked(turns.with_system(prompt, record), chosen, rejected)
    if not form.prompt:
        return turns.of_shared_text(chosen, rejected, record)
    if not isinstance(stated, str):
        return turns.checked(turns.with_system(stated, record), chosen.strip(), rejected.strip())
    was_doubled = turns.is_doubled(stated, chosen, rejected)
    if was_doubled:
        chosen, rejected = (answer[len(stated) :].lstrip() for answer in (chosen, rejected))
    return turns.checked(turns.with_system(stated, record), chosen, rejected, was_doubled=was_doubled)


def kind(form: Form, record: dict) -> str | None:
    """What both answers in a row of a form are, in a word; None where they are no two of a kind."""
    try:
        both = set(map(_kind, form.chosen_and_rejected(record)))
    except Unusable:
        return None
    return both.pop() if len(both) == 1 else None


def _kind(answer) -> str:
    said = turns.said(answer)
    if isinstance(said, str):
        return "strings"
    return "HH-RLHF's dialogues" if isinstance(answer, str) and answer.lstrip().startswith("Human:") else "messages"


def prompt_columns(record: dict) -> tuple[str, ...]:
    """The columns that a row's prompt is read from, whatever answers it has or lacks; none where it has none."""
    alone = next((columns for columns in ALONE if record.get(columns[0]) is not None), None)
    form = form_of(record)
    return alone or (form.reads if form else ())


def prompt_alone(record: dict) -> Row:
    """The prompt of a row, whatever answers it has or lacks. Raises Unusable."""
    columns = prompt_columns(record)
    if not columns:
        raise Unusable("no prompt")
    if columns not in ALONE:
        return Row(pair(form_of(record), record).prompt, "", "")
    prompt = _prompt(columns, record)
    asked = prompt if isinstance(prompt, str) else _up_to_the_user(prompt)
    return turns.checked(turns.with_system(asked, record))


def _up_to_the_user(said: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(said[: max((i for i, (role, _) in enumerate(said, start=1) if role == "user"), default=0)])


def _prompt(columns: Sequence[str], record: dict) -> Prompt:
    """The prompt in some columns, as text or as turns. HH-RLHF's text is a dialogue where it ends before an answer."""
    said = turns.said(record[columns[0]], is_prompt=True)
    if not isinstance(said, str):
        return said
    below = [record.get(name) for name in columns[1:]]
    return "\n".join([said, *(text for text in below if isinstance(text, str) and text.strip())])


def _check_scores(record: dict) -> None:
    """Raise Unusable where a row's own scores of its answers do not prefer the chosen one."""
    for names in SCORES:
        chosen, rejected = (_number(record.get(name)) for name in names)
        if chosen is not None and rejected is not None and chosen <= rejected:
            raise Unusable("answers scored alike" if chosen == rejected else "a chosen answer scored below the other")
