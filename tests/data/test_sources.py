"""Preference data from elsewhere: each form gives its pairs, each row is accounted for, splits share no prompt."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet
from trl import extract_prompt, maybe_extract_prompt

from helpers.data import files, naming, sources, trees
from helpers.data.sources import Rows
from helpers.data.turns import Row

HARMLESS = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"
PLAIN = {"prompt": "What is red?", "chosen": "A rose.", "rejected": "Snow."}
OTHER = {"prompt": "What is green?", "chosen": "Grass.", "rejected": "Milk."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def dialogue(*turns):
    """HH-RLHF's text of turns that alternate, the human's first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


@pytest.fixture(autouse=True)
def nothing_looked_up():
    files._builder.cache_clear()


@pytest.fixture
def written(tmp_path):
    """Writes rows as JSON lines and returns the file's path."""

    def write(*rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def read(written):
    return lambda *rows: sources.read(written(*rows))


def accounted(found: Rows) -> bool:
    return len(found.rows) + sum(found.set_aside.values()) == found.total


# --- TRL's forms ---

ASKED = (("user", "What is red?"),)


@pytest.mark.parametrize(
    "row, prompt, form",
    [
        (PLAIN, "What is red?", "prompt, chosen and rejected, as strings"),
        (
            {"prompt": [user("What is red?")], "chosen": [assistant("A rose.")], "rejected": [assistant("Snow.")]},
            ASKED,
            "prompt, chosen and rejected, as messages",
        ),
        (
            {
                "chosen": [user("What is red?"), assistant("A rose.")],
                "rejected": [user("What is red?"), assistant("Snow.")],
            },
            ASKED,
            "chosen and rejected that share their prompt, as messages",
        ),
        (  # UltraFeedback binarized, with the columns that its card shows
            {
                "prompt": "What is red?",
                "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
                "chosen": [user("What is red?"), assistant("A rose.")],
                "rejected": [user("What is red?"), assistant("Snow.")],
                "messages": [user("What is red?"), assistant("A rose.")],
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            },
            ASKED,
            "prompt, chosen and rejected, as messages",
        ),
        (
            {"prompt": "What is red?", "chosen": [assistant("A rose.")], "rejected": [assistant("Snow.")]},
            ASKED,
            "prompt, chosen and rejected, as messages",
        ),
        (
            {"chosen": dialogue("What is red?", "A rose."), "rejected": dialogue("What is red?", "Snow.")},
            ASKED,
            "chosen and rejected that share their prompt, as HH-RLHF's dialogues",
        ),
    ],
)
def test_the_same_pair_is_read_from_every_form(read, row, prompt, form):
    found = read(row)
    assert found == Rows((Row(prompt, "A rose.", "Snow."),), {}, 1, form)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Q: red? A: A rose.", "Q: red? A: Snow.", "Q: red? A:"),
        ("Is it?\nYes.", "Is it?\nNo.", "Is it?\n"),
        ("Here are two  spaces", "Here are two  others", "Here are two "),
    ],
)
def test_a_prompt_in_both_strings_is_what_trl_finds_there(read, chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    found = read(row)
    expected = extract_prompt(row)
    assert expected["prompt"] == prompt
    assert found.rows == (Row(prompt, expected["chosen"], expected["rejected"]),)
    assert found.form == "chosen and rejected that share their prompt, as strings"


@pytest.mark.parametrize(
    "before",
    [
        [user("What is red?")],
        [system("Be brief."), user("What is red?")],
        [user("Hello."), assistant("Hello."), user("What is red?")],
    ],
)
@pytest.mark.parametrize("stated", [{}, {"prompt": "What is red?"}])
def test_a_prompt_in_both_lists_is_what_trl_finds_there(read, before, stated):
    row = {**stated, "chosen": [*before, assistant("A rose.")], "rejected": [*before, assistant("Snow.")]}
    expected = maybe_extract_prompt(row)
    assert expected["prompt"] == before
    (found,) = read(row).rows
    assert [{"role": role, "content": content} for role, content in found.prompt] == expected["prompt"]
    assert [assistant(found.chosen)] == expected["chosen"] and [assistant(found.rejected)] == expected["rejected"]


def test_strings_and_messages_are_kept_to_the_letter(read):
    (plain,) = read({"prompt": " The sky\n is", "chosen": " blue. ", "rejected": "\ngreen."}).rows
    assert plain == Row(" The sky\n is", " blue. ", "\ngreen.")
    row = {"prompt": [user(" Why? ")], "chosen": [assistant(" So.\n")], "rejected": [assistant("\tNo.")]}
    assert read(row).rows == (Row((("user", " Why? "),), " So.\n", "\tNo."),)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": None}, "a value missing, or of another kind than in the other rows"),
        ({"prompt": 3}, "a value missing, or of another kind than in the other rows"),
        ({"chosen": [assistant("A rose.")]}, "a value missing, or of another kind than in the other rows"),
        ({"rejected": {"role": "assistant"}}, "a value missing, or of another kind than in the other rows"),
        ({"prompt": " \n"}, "an empty prompt or turn"),
        ({"chosen": ""}, "an empty answer"),
        ({"rejected": " \n"}, "an empty answer"),
        ({"chosen": "", "rejected": " "}, "the same answer twice"),
        ({"chosen": "Milk. "}, "the same answer twice"),
        ({"prompt": "What is red?", "chosen": "Blood."}, "another pair of the same prompt"),
        ({"chosen": "Grass \ud83c"}, "half a character, which no tokenizer reads"),
    ],
)
def test_a_row_of_strings_that_is_no_pair_is_set_aside_under_its_reason(read, row, reason):
    found = read(PLAIN, {**OTHER, **row})
    assert found.rows == (Row(**PLAIN),) and found.set_aside == {reason: 1} and accounted(found)


@pytest.mark.parametrize(
    "prompt, chosen, rejected, reason",
    [
        ([], [assistant("a")], [assistant("b")], "an empty prompt or turn"),
        ([user(" ")], [assistant("a")], [assistant("b")], "an empty prompt or turn"),
        ([user("q"), assistant("")], [assistant("a")], [assistant("b")], "an empty prompt or turn"),
        ([user("q")], [assistant("a")], [assistant("a")], "the same answer twice"),
        ([user("q")], [assistant("a")], [assistant("")], "an empty answer"),
        ([user("q")], [], [assistant("b")], "an answer that is not the assistant's"),
        ([user("q")], [assistant("a")], [user("b")], "an answer that is not the assistant's"),
        ([user("q")], [user("q"), assistant("a")], [user("p"), assistant("b")], "the two prompts differ"),
        ([user("q")], [user("q"), assistant("a")], [assistant("b")], "the two prompts differ"),
        ([user("q")], [assistant("a")], [{"role": "assistant"}], "a message without a role and a text"),
        ([user(None)], [assistant("a")], [assistant("b")], "a message without a role and a text"),
        ([user([{"type": "text"}])], [assistant("a")], [assistant("b")], "a message without a role and a text"),
        (["q", "r"], [assistant("a")], [assistant("b")], "a message without a role and a text"),
        *(
            (
                prompt,
                [assistant("a")],
                [assistant("b")],
                "turns that do not alternate between user and assistant, the user's first and last",
            )
            for prompt in (
                [system("s")],
                [assistant("p")],
                [user("q"), assistant("p")],
                [user("q"), user("p")],
                [assistant("p"), user("q")],
                [user("q"), system("s"), user("p")],
                [user("q"), assistant("p"), {"role": "tool", "content": "3"}],
                [{"role": ["user"], "content": "q"}],
                [{"content": "q"}],
            )
        ),
    ],
)
def test_messages_that_are_no_pair_are_set_aside_under_their_reason(read, prompt, chosen, rejected, reason):
    good = {"prompt": [user("What is red?")], "chosen": [assistant("A rose.")], "rejected": [assistant("Snow.")]}
    found = read(good, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert found.rows == (Row(ASKED, "A rose.", "Snow."),) and found.set_aside == {reason: 1} and accounted(found)


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ("Q. Yes", "Q. Yes", "the same answer twice"),
        ("Q. Yes", "Q. Yes, it is", "an empty answer"),
        ("Yes", "No", "no beginning that both answers share"),
        (" Yes", " No", "no beginning that both answers share"),
        ("It is blue.", "It is black.", "a shared beginning that ends within a word"),
    ],
)
def test_strings_without_a_prompt_and_two_answers_are_set_aside(read, chosen, rejected, reason):
    found = read(
        {"chosen": "The sky is blue", "rejected": "The sky is green"}, {"chosen": chosen, "rejected": rejected}
    )
    assert len(found.rows) == 1 and found.set_aside == {reason: 1}


def test_the_first_pair_of_a_prompt_is_kept_and_prompts_are_told_apart_to_the_letter(read):
    found = read(PLAIN, {**OTHER, "prompt": "What is  red?"}, {**OTHER, "prompt": "What is red?"})
    assert [(row.prompt, row.chosen) for row in found.rows] == [
        ("What is red?", "A rose."),
        ("What is  red?", "Grass."),
    ]
    assert found.set_aside == {"another pair of the same prompt": 1} and accounted(found)


def test_the_form_is_that_of_most_rows(read):
    assert read(PLAIN, {**OTHER, "prompt": {"replies": []}}).rows == (Row(**PLAIN),)
    bare = {"chosen": "The sky is blue", "rejected": "The sky is green"}
    assert read(bare, PLAIN, OTHER).rows == (Row(**PLAIN), Row(**OTHER))
    assert read(PLAIN, bare, {"chosen": "It is", "rejected": "It was"}).form.startswith(
        "chosen and rejected that share their prompt"
    )


def test_one_question_is_in_one_split_whatever_its_answers_share(read):
    """As what two texts share, TRL's prompt of the first pair ends in `The`, that of the second in `It is`."""
    question = "Human asks: what is red?\nAnswer: "
    pairs = [("The rose.", "The snow."), ("It is a rose.", "It is snow."), ("Snow.", "A rose.")]
    rows = read(*({"chosen": question + one, "rejected": question + other} for one, other in pairs)).rows
    assert [row.prompt for row in rows] == [question + "The", question + "It is", question.rstrip()]
    assert {row.opening for row in rows} == {"Human asks: what is red? Answer:"}
    asked = Row("What is red? And what", "a", "b")
    assert asked.opening == "What is red? And what"  # an explicit prompt is known to be whole
    assert replace(asked, prompt="red or", is_shared=True).opening == "red or"


# --- HH-RLHF ---


def test_a_dialogue_is_split_at_its_last_answer(read):
    before = ("Hello.", "Hello, you.", "What is red?")
    found = read({"chosen": dialogue(*before, "A rose."), "rejected": dialogue(*before, "Snow.")})
    prompt = (("user", "Hello."), ("assistant", "Hello, you."), ("user", "What is red?"))
    assert found.rows == (Row(prompt, "A rose.", "Snow."),)
    assert found.rows[0].opening == "Hello."
    stripped = {"chosen": dialogue(*before, "A rose.").strip(), "rejected": dialogue(*before, "Snow.").strip()}
    assert read(stripped) == found


def test_a_speaker_s_name_without_a_blank_line_is_part_of_what_was_said(read):
    answer = "Human: So you ask.  Human: Why?\nAssistant: I say"
    found = read({"chosen": dialogue("Why Human: me?", answer), "rejected": dialogue("Why Human: me?", "No.")})
    assert found.rows == (Row((("user", "Why Human: me?"),), answer, "No."),)


def test_a_dialogue_s_text_as_a_prompt_of_its_own_is_the_same_pair(read):
    """As some copies of HH-RLHF have it; without the assistant's turn at its end, a prompt is text."""
    before = dialogue("What is red?", "Say more.", "Any one thing.")
    whole = {"chosen": f"{before}\n\nAssistant: A rose.", "rejected": f"{before}\n\nAssistant: Snow."}
    asked = {"prompt": f"{before}\n\nAssistant:", "chosen": " A rose.", "rejected": " Snow."}
    assert read(asked).rows == read(whole).rows and len(read(asked).rows[0].prompt) == 3
    assert read(asked | {"prompt": before}).rows == (Row(before, " A rose.", " Snow."),)


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        (dialogue("q", "a"), dialogue("p", "b"), "the two prompts differ"),
        (dialogue("q", "a", "p", "c"), dialogue("q", "b"), "the two prompts differ"),
        (dialogue("q", ""), dialogue("q", "b"), "an empty answer"),
        (dialogue("q", "a"), dialogue("q", "a "), "the same answer twice"),
        (dialogue("", "a"), dialogue("", "b"), "an empty prompt or turn"),
        (dialogue("q", "", "p", "a"), dialogue("q", "", "p", "b"), "an empty prompt or turn"),
        (dialogue("q", "a", "p"), dialogue("q", "a", "r"), "an answer that is not the assistant's"),
        (dialogue("q"), dialogue("q"), "an answer that is not the assistant's"),
        ("The sky is blue", "The sky is green", "a value missing, or of another kind than in the other rows"),
        (dialogue("q", "a"), "The sky is green", "a value missing, or of another kind than in the other rows"),
        *(
            (
                f"{start}\n\nAssistant: a",
                f"{start}\n\nAssistant: b",
                "turns that do not alternate between user and assistant, the user's first and last",
            )
            for start in (dialogue("q", "p"), dialogue("q") + dialogue("p"))
        ),
    ],
)
def test_dialogues_that_are_no_pair_are_set_aside_under_their_reason(read, chosen, rejected, reason):
    good = {"chosen": dialogue("What is red?", "A rose."), "rejected": dialogue("What is red?", "Snow.")}
    found = read(good, good | {"chosen": dialogue("Why?", "So."), "rejected": dialogue("Why?", "No.")})
    assert len(found.rows) == 2
    found = read(good, {"chosen": chosen, "rejected": rejected})
    assert found.rows == (Row(ASKED, "A rose.", "Snow."),) and found.set_aside == {reason: 1} and accounted(found)


@pytest.fixture(scope="module")
def harmless():
    if not HARMLESS.is_file():
        pytest.skip("the test split of HH-RLHF's harmless-base is not on this machine")
    return sources.read(str(HARMLESS)), [json.loads(line) for line in gzip.open(HARMLESS, "rt", encoding="utf-8")]


def test_every_row_of_hh_rlhf_is_accounted_for(harmless):
    """Against the text itself, cut at its marks by str's methods, row by row."""
    found, raw = harmless
    assert found.total == len(raw) == 2312 and accounted(found) and found.form.endswith("as HH-RLHF's dialogues")
    reasons, kept, seen = Counter(), iter(found.rows), set()
    for row in raw:
        (chosen_prompt, _, chosen), (prompt, _, rejected) = (
            row[column].rpartition("\n\nAssistant:") for column in ("chosen", "rejected")
        )
        if chosen_prompt != prompt:
            reasons["the two prompts differ"] += 1
        elif not chosen.strip() or not rejected.strip():
            reasons["an empty answer"] += 1
        elif prompt.count("\n\nHuman:") != prompt.count("\n\nAssistant:") + 1:
            reasons["turns that do not alternate between user and assistant, the user's first and last"] += 1
        elif prompt in seen:
            reasons["another pair of the same prompt"] += 1
        else:
            seen.add(prompt)
            pair = next(kept)
            assert (pair.chosen, pair.rejected) == (chosen.strip(), rejected.strip())
            marks = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
            text = "".join(f"{marks[role]} {content}" for role, content in pair.prompt)
            assert text.split() == prompt.split()
            assert [role for role, _ in pair.prompt] == ["user", "assistant"] * (len(pair.prompt) // 2) + ["user"]
    assert next(kept, None) is None
    assert found.set_aside == reasons
    assert reasons["the two prompts differ"] == 5 and len(found.rows) == 2297


def test_held_in_and_held_out_of_hh_rlhf_share_no_prompt_and_no_opening(harmless):
    found, _ = harmless
    sizes = {"heldin": 1800, "validation": 200, "heldout": 250}
    splits = sources.split(found, sizes, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    assert len({row.opening for row in found.rows}) < len(found.rows)  # so that there is something to keep together
    assert disjoint(splits, lambda row: row.prompt) and disjoint(splits, lambda row: row.opening)
    assert disjoint(splits, lambda row: row.prompt[0][1].strip())


# --- OASST1 ---


def message(message_id, parent_id, text, rank=None, **more):
    return {
        "message_id": message_id,
        "parent_id": parent_id,
        "text": text,
        "role": "prompter" if message_id.startswith("p") else "assistant",
        "lang": "en",
        "rank": rank,
        "deleted": False,
        "review_result": True,
        **more,
    }


TREE = [
    message("p1", None, "What is red?"),
    message("a2", "p1", "Snow.", 2),
    message("a0", "p1", "A rose.", 0),
    message("a1", "p1", "A car.", 1),
    message("p2", "a1", "Which car?"),
    message("b1", "p2", "Any.", 1),
    message("b0", "p2", "Mine.", 0),
    message("p3", "a0", "Thanks."),
    message("c0", "p3", "Welcome."),
]
PAIRS = (
    Row(ASKED, "A rose.", "Snow."),
    Row((*ASKED, ("assistant", "A car."), ("user", "Which car?")), "Mine.", "Any."),
)


def nested(messages, parent=None):
    return [
        {**{k: v for k, v in m.items() if k != "parent_id"}, "replies": nested(messages, m["message_id"])}
        for m in messages
        if m["parent_id"] == parent
    ]


def test_a_tree_gives_the_best_and_the_worst_answer_to_each_prompt(read):
    found = read(*TREE)
    assert found == Rows(PAIRS, {"fewer than two ranked answers": 1}, 3, "OASST1 message trees")
    assert {row.opening for row in found.rows} == {"What is red?"}
    assert set(read(*reversed(TREE)).rows) == set(PAIRS)


def test_trees_as_nested_messages_and_as_a_table_without_its_nulls_give_the_same_pairs(read):
    flat = [{key: value for key, value in m.items() if value is not None} for m in TREE]
    assert read(*flat) == read(*TREE)
    trees = [{"message_tree_id": "p1", "tree_state": "ready_for_export", "prompt": nested(TREE)[0]}]
    assert read(*trees) == read(*TREE)
    trees[0]["prompt"]["replies"] += [None, message("a9", None, "Ink.", replies=3)]
    assert read(*trees) == read(*TREE)


def changed(message_id, **changes):
    return [{**m, **changes} if m["message_id"] == message_id else m for m in TREE]


MISSING = "a turn of the conversation missing or deleted"
FEWER = "fewer than two ranked answers"
ALTERNATE = "turns that do not alternate between user and assistant, the user's first and last"


@pytest.mark.parametrize(
    "messages, kept, set_aside",
    [
        (changed("a1", deleted=True), PAIRS[:1], {MISSING: 1, FEWER: 1}),  # it is an answer and a turn
        (changed("a1", review_result=False), PAIRS[:1], {MISSING: 1, FEWER: 1}),
        (changed("a1", review_result=None), PAIRS, {FEWER: 1}),
        (changed("p1", deleted=True), (), {MISSING: 2, FEWER: 1}),
        ([m for m in TREE if m["message_id"] != "p1"], (), {MISSING: 2, FEWER: 1}),
        (changed("p1", parent_id="p2"), (), {MISSING: 2, FEWER: 1}),  # a ring
        (changed("p1", parent_id="p1"), (), {MISSING: 2, FEWER: 1}),
        (changed("b1", rank=None), PAIRS[:1], {FEWER: 2}),
        (changed("b1", rank=float("nan")), PAIRS[:1], {FEWER: 2}),
        (changed("b1", rank="first"), PAIRS[:1], {FEWER: 2}),
        (changed("b1", rank="1"), PAIRS, {FEWER: 1}),
        (changed("b1", rank=0), PAIRS[:1], {FEWER: 1, "answers all of one rank": 1}),
        (changed("b1", rank=1.0), PAIRS, {FEWER: 1}),
        (changed("b1", text="Mine."), PAIRS[:1], {FEWER: 1, "the same answer twice": 1}),
        (changed("b1", text=None), PAIRS[:1], {FEWER: 1, "a message without a role and a text": 1}),
        (changed("p2", role="system"), PAIRS[:1], {FEWER: 1, ALTERNATE: 1}),
        (changed("a2", deleted=True), (Row(ASKED, "A rose.", "A car."), PAIRS[1]), {FEWER: 1}),
    ],
)
def test_every_prompt_of_a_tree_is_kept_or_set_aside_under_its_reason(read, messages, kept, set_aside):
    apart = [message("p9", None, "Why?"), message("d0", "p9", "So.", 0), message("d1", "p9", "No.", 1)]
    found = read(*messages, *apart)
    assert found.rows == (*kept, Row((("user", "Why?"),), "So.", "No."))
    assert found.set_aside == set_aside and found.total == 4 and accounted(found)


def test_a_tree_deeper_than_python_recurses_is_read(read):
    chain = [message(f"p{i}", f"p{i - 1}" if i else None, "on") for i in range(3000)]
    table = [*chain, message("x0", "p0", "Yes.", 0), message("x1", "p0", "No.", 1)]
    assert read(*table).rows == (Row((("user", "on"),), "Yes.", "No."),)
    assert len(trees.without_nesting([{"prompt": deep(3000)}])) == 3000


def deep(n):
    tree = {"message_id": "p0", "replies": []}
    for i in range(1, n):
        tree = {"message_id": f"p{i}", "replies": [tree]}
    return tree


# --- Files ---


@pytest.fixture
def stored(tmp_path):
    """Stores rows in a file of a kind."""

    def store(rows, suffix):
        path = tmp_path / f"pairs{suffix}"
        if ".parquet" in suffix:
            content = pd.DataFrame(rows).to_parquet()
        elif ".csv" in suffix or ".tsv" in suffix:
            file = io.StringIO()
            table = csv.DictWriter(file, rows[0], delimiter="," if ".csv" in suffix else "\t")
            table.writeheader()
            table.writerows([{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])
            content = file.getvalue().encode()
        elif ".jsonl" in suffix:
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        else:
            content = json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
        return str(path)

    return store


@pytest.mark.parametrize("suffix", [kind + end for kind in naming.SUFFIXES for end in ("", ".gz")])
@pytest.mark.parametrize("form", ["strings", "messages", "OASST1"])
def test_every_kind_of_file_gives_the_same_rows(stored, read, suffix, form):
    rows = {
        "strings": [PLAIN, OTHER, {**PLAIN, "chosen": None}],
        "messages": [{"chosen": [user("q"), assistant("ä")], "rejected": [user("q"), assistant("ö")], "score": 1.5}],
        "OASST1": TREE,
    }[form]
    if form == "OASST1" and suffix.startswith(tuple(naming.SEPARATORS)):  # ranks are text there
        with pytest.raises(ValueError, match="hold none but fewer than two ranked answers"):
            sources.read(stored(rows, suffix))
    else:
        assert sources.read(stored(rows, suffix)) == read(*rows)


def test_a_file_is_read_offline_without_the_hub_s_library_and_leaves_nothing_behind(stored, tmp_path, monkeypatch):
    path = stored([PLAIN], ".parquet")
    monkeypatch.setattr(datasets, "load_dataset_builder", None)
    monkeypatch.chdir(tmp_path)
    assert len(sources.read("pairs.parquet").rows) == len(sources.read(path).rows) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sources.read("~/pairs.parquet").rows) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.parquet"]


def test_a_column_that_python_cannot_hold_is_not_read(tmp_path):
    when = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    table = pyarrow.table({**{column: [value] for column, value in PLAIN.items()}, "when": when})
    parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(OverflowError):
        table.to_pylist()
    assert sources.read(str(tmp_path / "pairs.parquet")).rows == (Row(**PLAIN),)


def test_only_a_line_feed_ends_a_line_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    odd = {**OTHER, "chosen": "Grass\u2028or\u0085trees.\x0c"}
    lines = ["", json.dumps(PLAIN), "  ", json.dumps(odd, ensure_ascii=False), ""]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = sources.read(str(path))
    assert [row.chosen for row in found.rows] == ["A rose.", odd["chosen"]] and found.total == 2


def test_numbers_and_dates_in_strings_stay_strings(read):
    row = {"prompt": "2023-04-12", "chosen": "007", "rejected": "1e3"}
    assert read(row).rows == (Row(**row),)


def test_a_file_is_known_by_its_content(stored, tmp_path):
    path = stored([PLAIN], ".jsonl.gz")
    found = files.content_id(path)
    assert found == hashlib.sha256((tmp_path / "pairs.jsonl.gz").read_bytes()).hexdigest()
    (tmp_path / "copy.json").write_bytes((tmp_path / "pairs.jsonl.gz").read_bytes())
    assert files.content_id(str(tmp_path / "copy.json")) == found
    assert files.content_id(stored([OTHER], ".jsonl.gz")) != found


def test_a_hub_id_is_known_by_its_commit(monkeypatch):
    """Its own, for which nobody is asked, or the one that its branch stands at."""
    pinned = f"owner/name/part@{'0123456789' * 4}:test"
    assert files.content_id(pinned) == pinned
    found = set()
    for commit in ("first", "second"):
        files._builder.cache_clear()  # as in another process
        builder = SimpleNamespace(hash=commit)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, found=builder, **__: found)
        found |= {files.content_id("owner/name"), files.content_id("owner/name@main:test")}
    assert found == {
        f"{name} {commit}" for name in ("owner/name", "owner/name@main:test") for commit in ("first", "second")
    }


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", r"a\.jsonl hold no rows: give prompt, chosen and rejected"),
        ("a.json", b"[]", "hold no rows"),
        ("a.jsonl", b"\n \n", "hold no rows"),
        ("a.jsonl", b'{"prompt": "p"}\n\n{"prompt": }\n', r"a\.jsonl is not JSON in line 3 \(Expecting value"),
        ("a.json", b'[\n{"prompt": "p"},\n{"prompt" "q"}]', r"a\.json is not JSON in line 3 \(Expecting ':'"),
        ("a.json", b'{\n"prompt": "p"\n', r"not JSON in line 1 .*one object a line or one list of objects"),
        ("a.jsonl", b"prompt,chosen,rejected\n", "not JSON in line 1"),
        ("a.jsonl", b"[" * 100_000, "not JSON in line 1"),
        ("a.jsonl", b'{"a":' * 100_000, "not JSON in line 1"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "not JSON in line 1"),
        ("a.jsonl", b'{"prompt": "p"}\n"q"\n', "has no object as its row 2: make each row an object"),
        ("a.json", b"[3]", "has no object as its row 1"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl cannot be read \('utf-8' codec.*get or write it anew"),
        ("a.jsonl.gz", b'{"prompt": "p"}', r"a\.jsonl\.gz cannot be read \(Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "p"}' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\x00" * 6 + b"\xff" * 20, "cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read"),
        ("a.parquet", b"", r"a\.parquet cannot be read"),
        ("a.csv", b"prompt,chosen,rejected", r"a\.csv hold no rows"),
        ("a.tsv", b"prompt\tchosen\nq\n", r"a\.tsv has another number of fields in row 1 than names"),
        ("a.csv", b'prompt,chosen\n"q,a\n', r"a\.csv is no table near line 1 \(unexpected end of data\)"),
        ("a.txt", b"prompt", r"a\.txt is of no kind that is read: give \.jsonl, \.json, \.parquet"),
        ("a.gz", b"", "is of no kind that is read"),
        (
            "a.jsonl",
            b'{"question": "q", "score": 1}\n{"answer": "a"}',
            "in their columns 'question', 'score', 'answer': the nearest form, .*, and this lacks .*; give prompt",
        ),
        (
            "a.jsonl",
            b'{"prompt": 1, "chosen": 2, "rejected": 3}',
            r"hold none but a value missing, or of another kind than in the other rows \(1\): mend",
        ),
        (
            "a.jsonl",
            b'{"prompt": {"text": "q"}, "chosen": "a"}',
            "nearest form, prompt, chosen and rejected, needs .*, and this lacks 'rejected'",
        ),
        (
            "a.jsonl",
            b'{"chosen": {"role": ["user"]}, "rejected": {}}',
            "hold none but an answer that is not the assistant's",
        ),
        ("a.jsonl", b'{"chosen": "It is", "rejected": "It is"}', r"hold none but the same answer twice \(1\): mend"),
        ("a.jsonl", json.dumps(TREE[0]).encode(), "read as OASST1 message trees, hold none but no answers: mend"),
    ],
)
def test_a_file_that_is_no_preference_data_is_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        sources.read(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_parquet_file_without_preferences_is_refused_with_all_its_columns(stored):
    with pytest.raises(ValueError, match="in their columns 'question', 'when': the nearest"):
        sources.read(stored([{"question": "q", "when": pd.Timestamp("2023-04-12")}], ".parquet"))


@pytest.mark.parametrize(
    "source", ["no.jsonl", "no/such.parquet", "no/such.json.gz", "./no", "/no/such", "one", "a b/c"]
)
@pytest.mark.parametrize("function", [sources.read, files.content_id])
def test_a_missing_file_is_named(function, source):
    with pytest.raises(FileNotFoundError, match=r"does not exist: give the path of one.*or a hub id such as") as caught:
        function(source)
    assert f"The data file {source} " in str(caught.value)


@pytest.mark.parametrize("function", [sources.read, files.content_id])
def test_a_folder_is_refused_even_if_it_is_named_like_a_hub_id(function, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="The data owner/name are a folder: give one file of it"):
        function("owner/name")


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pkl.gz", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_no_pickle_is_read_whatever_it_is_called(tmp_path, name):
    content = pickle.dumps(Marker(tmp_path / "marker"))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError):
        sources.read(str(tmp_path / name))
    assert not (tmp_path / "marker").exists()
    pickle.loads(content).close()
    assert (tmp_path / "marker").exists()


# --- The hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: its data sets are folders here, which the library itself loads."""
    load, calls = datasets.load_dataset_builder, []

    def from_folder(name, data_dir=None, revision=None):
        calls.append((name, data_dir, revision))
        return load(str(tmp_path / "hub" / name), data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

    def add(name, **splits):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    add.calls, add.folder = calls, tmp_path / "hub"
    return add


@pytest.mark.parametrize(
    "given, called",
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:train", ("owner/name", None, None)),
        ("owner/name@v1.0", ("owner/name", None, "v1.0")),
        ("owner/name@refs/pr/3:train", ("owner/name", None, "refs/pr/3")),
        ("owner/name/part", ("owner/name", "part", None)),
        ("owner/name/part/of-it@main:train", ("owner/name", "part/of-it", "main")),
    ],
)
def test_a_hub_id_names_its_folder_revision_and_split(hub, given, called):
    hub("owner/name", train=[PLAIN], test=[OTHER])
    hub("owner/name/part", train=[PLAIN])
    hub("owner/name/part/of-it", train=[PLAIN])
    assert sources.read(given).rows == (Row(**PLAIN),)
    assert hub.calls == [called]
    assert sources.read(given).rows == (Row(**PLAIN),) and len(hub.calls) == 1  # a branch does not move meanwhile


def test_every_form_is_read_from_the_hub_as_from_a_file(hub, read):
    forms = {
        "ultrafeedback": [
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
                "score": 0.5,
            }
        ],
        "harmless": [{"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}],
        "oasst": TREE,
    }
    for name, rows in forms.items():
        hub(f"owner/{name}", train=rows)
        assert sources.read(f"owner/{name}") == read(*rows)


@pytest.mark.parametrize(
    "found, taken",
    [
        (["test_prefs", "train_sft", "train", "train_prefs"], "train_prefs"),
        (["test", "train"], "train"),
        (["validation"], "validation"),
    ],
)
def test_without_a_split_the_training_pairs_are_taken(monkeypatch, found, taken):
    splits = {name: datasets.Dataset.from_list([{**PLAIN, "prompt": name}]) for name in found}
    builder = SimpleNamespace(
        hash="", download_and_prepare=lambda: None, as_dataset=lambda: datasets.DatasetDict(splits)
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    assert [row.prompt for row in sources.read("owner/name").rows] == [taken]
    assert [row.prompt for row in sources.read(f"owner/name:{found[0]}").rows] == [found[0]]


@pytest.mark.parametrize("source", ["owner/name", "owner/name:train"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(hub, source):
    hub("owner/name", test=[PLAIN], validation=[OTHER])
    message = r"The data set owner/name has the splits (validation, test|test, validation): name one, as in owner/name:"
    with pytest.raises(ValueError, match=message):
        sources.read(source)


def test_a_hub_data_set_without_preferences_is_refused_with_its_columns(hub):
    hub("owner/name", train=[{"question": "q", "answer": "a"}])
    with pytest.raises(
        ValueError, match="The data owner/name hold no preferences in their columns 'question', 'answer':"
    ):
        sources.read("owner/name")


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, RuntimeError, datasets.exceptions.DatasetsError])
def test_what_cannot_be_had_from_the_hub_is_refused_without_a_word_of_what_was_sent(monkeypatch, error):
    def fail(*_, **__):
        raise error("401 for https://huggingface.co, Authorization: Bearer hf_secret")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    message = (
        r"The data owner/name@main are not a local file.*check the id, your network and your access, or .*DATA=<file>\."
    )
    with pytest.raises(ValueError, match=message) as caught:
        sources.read("owner/name@main")
    shown = caught.getrepr(chain=True)  # as a traceback shows it, with its causes
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(shown.chain) == 1 and caught.value.__suppress_context__


def test_another_commit_than_was_asked_for_is_refused(monkeypatch):
    """Without a network the library takes what is in its cache."""
    asked, other = "0" * 40, "1" * 40
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=other))
    with pytest.raises(ValueError, match=f"in the cache at commit {other} alone: connect to the hub, or ask for that"):
        sources.read(f"owner/name@{asked}")


def test_a_data_set_s_script_is_not_run(hub, tmp_path):
    folder = hub.folder / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    with pytest.raises(ValueError, match="The data owner/name are not a local file"):
        sources.read("owner/name")
    assert len(hub.calls) == 1 and not (tmp_path / "marker").exists()


# --- Splits ---


def rows_of(*openings):
    """A row for each opening; those of one opening are continued differently."""
    rows = [Row((("user", o), ("assistant", "Go on."), ("user", f"{i}")), "a", "b") for i, o in enumerate(openings)]
    return Rows(tuple(rows), {}, len(rows), "messages")


def disjoint(splits, what):
    seen = [{what(row) for row in rows} for rows in splits.values()]
    return sum(map(len, seen)) == len(set().union(*seen))


SIZES = {"heldin": 50, "validation": 10, "heldout": 20}


@pytest.mark.parametrize("per_opening", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_splits_have_their_sizes_and_share_no_opening(per_opening, seed):
    rows = rows_of(*(f"opening {i // per_opening}" for i in range(140)))
    splits = sources.split(rows, SIZES, seed)
    assert {name: len(drawn) for name, drawn in splits.items()} == SIZES
    assert disjoint(splits, lambda row: row.opening)
    drawn = [row for name in SIZES for row in splits[name]]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(rows.rows)


@pytest.mark.parametrize(
    "prompts",
    [
        ["What is it?", " What  is\nit? "],
        [(("user", "q"),), (("user", " q "), ("assistant", "a"), ("user", "p"))],
        [(("system", "s"), ("user", "q")), (("user", "q"),)],
    ],
)
def test_prompts_that_open_alike_are_in_one_split(prompts):
    rows = [Row(prompt, "a", "b") for prompt in (*prompts, *(f"other {i}" for i in range(30)))]
    for seed in range(20):
        splits = sources.split(Rows(tuple(rows), {}, 32, "mixed"), {"heldin": 16, "heldout": 16}, seed)
        where = {name for name, drawn in splits.items() for row in drawn if row.prompt in prompts}
        assert len(where) == 1


def test_the_draw_follows_the_seed_and_not_the_order_of_rows():
    rows = rows_of(*(f"opening {i // 2}" for i in range(140)))
    turned = Rows(rows.rows[::-1], {}, 140, "messages")
    assert sources.split(rows, SIZES, 0) == sources.split(turned, SIZES, 0)
    one, other = (sources.split(rows, SIZES, seed) for seed in (0, 1))
    assert all(set(one[name]) != set(other[name]) for name in SIZES)


def test_within_a_split_rows_of_one_opening_are_not_side_by_side():
    rows = rows_of(*(f"opening {i // 5}" for i in range(140)))
    drawn = sources.split(rows, SIZES, 0)["heldin"]
    assert sum(a.opening == b.opening for a, b in itertools.pairwise(drawn)) < 15  # of 40, were they not shuffled


def test_all_rows_can_be_drawn_where_single_ones_fill_what_tied_ones_leave():
    rows = rows_of(*["a"] * 3, *["b"] * 2, *(f"single {i}" for i in range(75)))
    splits = sources.split(rows, SIZES, seed=3)
    assert sorted(map(repr, rows.rows)) == sorted(repr(row) for name in SIZES for row in splits[name])


@pytest.mark.parametrize(
    "openings, found",
    [(range(79), 79), ([], 0), ([0] * 200, 50), ([i % 2 for i in range(200)], 70)],
)
def test_too_few_rows_are_refused_with_every_size(openings, found):
    with pytest.raises(ValueError) as caught:
        sources.split(rows_of(*map(str, openings)), SIZES, seed=0)
    assert str(caught.value) == (
        f"The data have only {found} pairs for splits without a common opening, fewer than the 80 asked for: "
        "lower sizes.heldin (50), sizes.validation (10), sizes.heldout (20)."
    )


@pytest.mark.parametrize("column", ["prompt", "Question"])
def test_prompts_without_answers_are_told_what_they_are_good_for(tmp_path, column):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({column: f"What is {i}?"}) + "\n" for i in range(3)))
    with pytest.raises(
        ValueError, match=f"no answers in their columns '{column}': give pairs, a ready partner as DPO_MODEL= too"
    ):
        sources.read(str(path))


def test_prompts_under_another_name_are_told_which_columns_there_are(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"frage": f"What is {i}?"}) + "\n" for i in range(3)))
    with pytest.raises(ValueError, match=r"hold no prompt in their columns 'frage': name one prompt\.$"):
        sources.read_prompts(str(path))
