"""Messages are read however they are written, or set aside; and what a row says twice is said once."""

import json

import numpy as np
import pandas as pd
import pytest
from test_sources import assistant, system, user

from helpers.data import sources
from helpers.data.turns import DOUBLED, Row
from helpers.lm import encoding

ASKED, BEST, WORST = "What is red?", "A rose.", "Snow."
TURN = (("user", ASKED),)
UNREAD = "messages written as text that cannot be read"


@pytest.fixture
def read(tmp_path):
    def read(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return sources.read(str(path))

    return read


# --- Messages as text ---


def of_numpy(value):
    return str(np.array(value, dtype=object)) if isinstance(value, list) else repr(value)


def by(write):
    """A pair of messages that are written as text."""
    return {name: write([user(ASKED), assistant(text)]) for name, text in (("chosen", BEST), ("rejected", WORST))}


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        repr,
        of_numpy,
        lambda messages: of_numpy(messages).replace("\n", ""),
        lambda messages: json.dumps({"messages": messages}),
        lambda messages: repr({"conversations": messages}),
        lambda messages: {"messages": messages},
        lambda messages: json.dumps(json.dumps(messages)),
        lambda messages: json.dumps([json.dumps(messages)]),
        lambda messages: json.dumps([{**message, "name": None} for message in messages]),
    ],
)
def test_messages_are_read_however_they_are_written(read, write):
    assert read(by(write)).rows == (Row(TURN, BEST, WORST),)
    assert read({"prompt": ASKED, **by(write)}).rows == (Row(TURN, BEST, WORST),)


def test_a_list_that_was_asked_for_is_an_answer(read):
    row = {"prompt": "A JSON list, please.", "chosen": '["blue"]', "rejected": '["no"]'}
    assert read(row).rows == (Row(*row.values()),)


def test_messages_that_pandas_wrote_from_parquet_are_read(tmp_path):
    """Arrays of objects, whose text has line ends between messages, and no commas."""
    said = "It's } {'a'} \"b\"\n[1]"
    before = [user(ASKED), assistant(said), user("Why? " * 20)]
    rows = [{"chosen": [*before, assistant(BEST)], "rejected": [*before, assistant(WORST)]}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "a.csv", index=False)
    assert "}\n {" in (tmp_path / "a.csv").read_text()
    found = sources.read(str(tmp_path / "a.csv"))
    assert found.rows == sources.read(str(tmp_path / "a.parquet")).rows
    assert found.rows == (Row((*TURN, ("assistant", said), ("user", "Why? " * 20)), BEST, WORST),)


@pytest.mark.parametrize(
    "write",
    [
        lambda text: json.dumps({**assistant(text), "name": None}),
        lambda text: repr({**assistant(text), "name": None}),
        lambda text: json.dumps([{"type": "text", "text": text}]),
        lambda text: [{"type": "text", "text": text}],
        lambda text: repr([text]),
    ],
)
def test_one_answer_is_read_however_it_is_written(read, write):
    (found,) = read({"prompt": ASKED, "chosen": write(BEST), "rejected": write(WORST)}).rows
    assert (found.chosen, found.rejected) == (BEST, WORST)


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_a_prompt_and_a_system_are_read_however_they_are_written(read, write):
    row = {"chosen": BEST, "rejected": WORST}
    assert read({"prompt": repr([ASKED]), **row}).rows == (Row(ASKED, BEST, WORST),)
    told = (("system", "Be brief."), *TURN)
    for words in (system("Be brief."), [system("Be brief.")]):
        assert read({"prompt": write([user(ASKED)]), "system": write(words), **row}).rows == (Row(told, BEST, WORST),)
    with pytest.raises(ValueError, match="a system prompt that is no text"):
        read({"prompt": ASKED, "system": write(user("Hi.")), **row})


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'assistant', 'content': array(['A rose.'], dtype=object)}]",
        '[{"role": "assistant", "content": "A ro',
        "[{'from': 'gpt', 'value': 'A rose.'} ... {'from': 'gpt', 'value': 'Snow.'}]",
        '{"messages": [{"role": "assistant", "content": "A rose."}], "model": "m"}',
        '[[{"role": "assistant", "content": "A rose."}]]',
        '[{"role": "assistant", "content": "A rose."}, 3]',
        "[{'role': 'assistant', 'content': __import__('os').getcwd()}]",
    ],
)
def test_text_that_is_like_messages_and_is_none_is_set_aside(read, text):
    with pytest.raises(ValueError, match=f"hold none but {UNREAD}"):
        read({"prompt": ASKED, "chosen": text, "rejected": WORST})


@pytest.mark.parametrize("answer", [
    '["A rose."]', "['A' 'rose']", '"[1, 2]"', '[{"type": "text"}]', '[{"type": "rose", "n": 3}]', "[A rose] {1}", "[]",
    "{role: content}", '{"value": 3}', '[1](from) "role"',
])  # fmt: skip
def test_an_answer_in_brackets_of_its_own_is_kept_to_the_letter(read, answer):
    row = {"prompt": ASKED, "chosen": answer, "rejected": WORST}
    assert read(row).rows == (Row(**row),)


@pytest.mark.parametrize("more", [{"tool_calls": [{"id": 1}]}, {"reasoning_content": "So."}, {"images": ["a.png"]}])
def test_a_message_of_more_than_text_is_set_aside(read, more):
    row = {"prompt": [user(ASKED)], "chosen": [assistant(BEST)], "rejected": [assistant(WORST)]}
    with pytest.raises(ValueError, match="hold none but a message of more than text"):
        read(row | {"chosen": [assistant(BEST) | more]})
    none = dict.fromkeys(more)
    assert read(row | {"chosen": [assistant(BEST) | none | {"id": 3}]}).rows == (Row(TURN, BEST, WORST),)


# --- What is said twice ---

CHAT = "<|user|>\nWhat is red?\n<|assistant|>"
TOLD = (("system", "Be brief."), *TURN)


@pytest.mark.parametrize(
    "prompt, before, read_as",
    [
        (CHAT, CHAT, CHAT),
        ("Q: red? A:", "Q: red? A:", "Q: red? A:"),
        (f" {ASKED}", f"{ASKED} ", f" {ASKED}"),
        (f"\n{ASKED}", f"\n{ASKED}\n", f"\n{ASKED}"),
        (f"{ASKED} ", f"{ASKED} ", f"{ASKED} "),
        ("Be brief.\r\nWhat is red?", "Be brief.\nWhat is red?\n", "Be brief.\r\nWhat is red?"),
        ("Be brief.\nWhat is red?", "Be brief.\r\nWhat is red?\r\n", "Be brief.\nWhat is red?"),
        ("什么东西是红色的？", "什么东西是红色的？", "什么东西是红色的？"),
        ("Red", "Red ", "Red"),
        ([user(ASKED)], f"{ASKED}\n", TURN),
        ([user(ASKED)], ASKED, TURN),
        ([system("Be brief."), user(ASKED)], f"Be brief.\n\n{ASKED}\n", TOLD),
        ([user(ASKED)], encoding.plain(TURN) + " ", TURN),
        ([system("Be brief."), user(ASKED)], encoding.plain(TOLD) + " ", TOLD),
    ],
)
def test_a_prompt_that_stands_before_both_answers_is_taken_off(read, prompt, before, read_as):
    found = read({"prompt": prompt, "chosen": before + BEST, "rejected": before + WORST})
    assert found.rows == (Row(read_as, BEST, WORST),)
    assert found.account.get(DOUBLED) == (None if before.startswith("\n\nHuman") else 1)  # a dialogue is split instead


@pytest.mark.parametrize("prompt", [ASKED, [user(ASKED)]])
def test_a_prompt_that_both_messages_repeat_is_taken_off(read, prompt):
    row = {"chosen": [assistant(f"{ASKED}\n{BEST}")], "rejected": [assistant(f"{ASKED} {WORST}")]}
    found = read({"prompt": prompt, **row})
    assert found.rows == (Row(TURN, BEST, WORST),) and found.account[DOUBLED] == 1
    whole = {name: [user(ASKED), *said] for name, said in row.items()}
    assert read({"prompt": prompt, **whole}).rows == (Row(TURN, BEST, WORST),)
    with pytest.raises(ValueError, match="one answer alone that begins with the prompt"):
        read({"prompt": prompt, **row, "rejected": [assistant(WORST)]})


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("A", "Apple", "Apply"),
        ("C", "C++ is", "C# is"),
        ("Hello!", "Hello!I am", "Hello!You are"),
        ("Good morning", "Good morning! So?", "Good morning, you."),
        ("你好！", "你好！请问", "你好！我"),
        ("the red", "the redder", "the reddest"),
        ("Is it well", "Is it well-known", "Is it well-made"),
        (ASKED, ASKED, WORST),
    ],
)
def test_an_answer_that_only_happens_to_begin_so_is_kept(read, prompt, chosen, rejected):
    assert read({"prompt": prompt, "chosen": chosen, "rejected": rejected}).rows == (Row(prompt, chosen, rejected),)


def test_a_greeting_is_answered_with_itself_in_a_conversation(read):
    row = {"prompt": [user("Hello")], "chosen": [assistant("Hello you.")], "rejected": [assistant("Hello there.")]}
    assert read(row).rows == (Row((("user", "Hello"),), "Hello you.", "Hello there."),)


@pytest.mark.parametrize("prompt", [ASKED, [user(ASKED)], [system("Be brief."), user(ASKED)]])
@pytest.mark.parametrize(
    "before",
    [
        "User: {}\nAssistant: ",
        "### Instruction:\n{}\n\n### Response:\n",
        "<|im_start|>system\nYou are so.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] {} [/INST] ",
        "Q: {}\nA: ",
    ],
)
def test_answers_that_repeat_the_prompt_after_a_name_are_set_aside(read, prompt, before):
    begun = before.format(ASKED)
    for chosen, rejected in ((begun + BEST, begun + WORST), (begun + BEST, WORST)):
        with pytest.raises(ValueError, match="hold none but an answer that repeats the prompt after a speaker's name"):
            read({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    own = {"prompt": ASKED, "chosen": f"The user asks: {ASKED}", "rejected": "User: a word."}
    assert read(own).rows == (Row(**own),)


@pytest.mark.parametrize("prompt", ["Be brief.\n\nWhat is red?", "Be  brief. What is red?"])
def test_a_system_that_the_prompt_begins_with_is_told_once(read, prompt):
    row = {"system": "Be brief.", "chosen": BEST, "rejected": WORST}
    assert read({"prompt": prompt, **row}).rows == (Row(prompt, BEST, WORST),)
    assert read({"prompt": [user(prompt)], **row}).rows == (Row((("user", prompt),), BEST, WORST),)
    assert read({"prompt": "Be briefer.", **row, "system": "Be brief"}).rows[0].prompt[0] == ("system", "Be brief")
    doubled = {"prompt": prompt, "system": "Be brief.", "chosen": f"{prompt} {BEST}", "rejected": f"{prompt} {WORST}"}
    assert read(doubled).rows == (Row(prompt, BEST, WORST),)


def test_answers_that_repeat_the_system_and_the_prompt_lose_both(read):
    row = {"prompt": ASKED, "system": "Be brief."}
    answers = {"chosen": f"Be brief.\n{ASKED}\n{BEST}", "rejected": f"Be brief.\n{ASKED}\n{WORST}"}
    assert read(row | answers).rows == (Row(TOLD, BEST, WORST),)
    alone = {"chosen": f"{ASKED}\n{BEST}", "rejected": f"{ASKED}\n{WORST}"}
    assert read(row | alone).rows == (Row(TOLD, BEST, WORST),)
