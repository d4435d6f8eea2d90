"""Every public form gives its pair, and nothing of a row is read wrongly in silence."""

import gzip
import json

import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet
from test_sources import TREE, assistant, system, user

from helpers.data import forms, sources, trees, turns
from helpers.data.messages import MISSING
from helpers.data.turns import Row
from helpers.places import PROJECT

ASKED = "What is red?"
TURN = (("user", ASKED),)
BEST, WORST = "A rose.", "Snow."
RATED = [("A car.", 3.0), (BEST, 8.5), (WORST, 1.0)]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def read(tmp_path):
    def read(*rows, prompts=False, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return (sources.read_prompts if prompts else sources.read)(str(path))

    return read


# Columns as these data sets are known to have them (none was downloaded here); the words are ours.
PUBLIC = {
    "Orca pairs": (
        [{"system": "", "question": ASKED, "chosen": BEST, "rejected": WORST}],
        ASKED,
    ),
    "Orca pairs with a system prompt": (
        [{"system": "Be brief.", "question": ASKED, "chosen": BEST, "rejected": WORST}],
        (("system", "Be brief."), *TURN),
    ),
    "Orca pairs by distilabel": (
        [{"system": "", "input": ASKED, "chosen": BEST, "rejected": WORST, "generations": [BEST, WORST],
          "rating": [9, 2]}],
        ASKED,
    ),
    "Alpaca-style DPO": (
        [{"instruction": "What is this?", "input": "It is red.", "chosen": BEST, "rejected": WORST}],
        "What is this?\nIt is red.",
    ),
    "Alpaca-style DPO without an input": (
        [{"instruction": ASKED, "input": "", "output": BEST, "chosen": BEST, "rejected": WORST}],
        ASKED,
    ),
    "chosen and rejected responses": (
        [{"instruction": ASKED, "chosen_response": BEST, "rejected_response": WORST}],
        ASKED,
    ),
    "PKU-SafeRLHF": (
        [{"prompt": ASKED, "response_0": WORST, "response_1": BEST, "is_response_0_safe": True, "better_response_id": 1,
          "safer_response_id": 0}],
        ASKED,
    ),
    "SHP": (
        [{"post_id": "x", "history": ASKED, "human_ref_A": BEST, "human_ref_B": WORST, "labels": 1, "score_A": 9}],
        ASKED,
    ),
    "SHP, the second preferred": (
        [{"post_id": "x", "history": ASKED, "human_ref_A": WORST, "human_ref_B": BEST, "labels": 0}],
        ASKED,
    ),
    "HelpSteer 3": (
        [{"domain": "general", "context": [user(ASKED)], "response1": BEST, "response2": WORST,
          "overall_preference": -2}],
        TURN,
    ),
    "HelpSteer 3, the second preferred": (
        [{"context": [user("Hi."), assistant("Hi."), user(ASKED)], "response1": WORST, "response2": BEST,
          "overall_preference": 3}],
        (("user", "Hi."), ("assistant", "Hi."), *TURN),
    ),
    "HelpSteer 2": (
        [{"prompt": ASKED, "response_1": WORST, "response_2": BEST, "preference_strength": 1}],
        ASKED,
    ),
    "Nectar": (
        [{"prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ", "answers": [
            {"answer": text, "model": "m", "rank": 9.0 - score} for text, score in RATED], "turns": 1}],
        TURN,
    ),
    "raw UltraFeedback": (
        [{"source": "x", "instruction": ASKED, "models": ["m"], "completions": [
            {"response": text, "model": "m", "overall_score": score} for text, score in RATED]}],
        ASKED,
    ),
    "KTO rows that share a prompt": (
        [{"prompt": ASKED, "completion": WORST, "label": False}, {"prompt": ASKED, "completion": BEST, "label": True}],
        ASKED,
    ),
    "KTO rows as messages": (
        [{"prompt": [user(ASKED)], "completion": [assistant(text)], "label": text == BEST} for text in (BEST, WORST)],
        TURN,
    ),
    "LLaMA-Factory's Alpaca form": (
        [{"instruction": ASKED, "input": "", "output": [BEST, WORST]}],
        ASKED,
    ),
    "LLaMA-Factory's ShareGPT form": (
        [{"conversations": [human(ASKED)], "chosen": gpt(BEST), "rejected": gpt(WORST)}],
        TURN,
    ),
    "persona evaluations": (
        [{"question": ASKED, "statement": "Roses are.", "label_confidence": 0.9, "answer_matching_behavior": " Yes",
          "answer_not_matching_behavior": " No"}],
        ASKED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_form_gives_its_pair(read, name):
    rows, prompt = PUBLIC[name]
    found = read(*rows)
    answers = (" Yes", " No") if name == "persona evaluations" else (BEST, WORST)
    assert found.rows == (Row(prompt, *answers),) and found.total == 1 and not found.set_aside


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": -1}, "no number of the preferred"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "no number of the preferred answer"),
        (
            {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0},
            "answers as good as each other",
        ),
        ({"context": "q", "response1": "a", "response2": "b", "overall_preference": "A"}, "no number of the preferred"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "fewer than two ranked answers"),
        ({"instruction": "q", "completions": [{"response": x, "overall_score": 2} for x in "ab"]}, "all of one rank"),
        ({"prompt": "q", "completion": "a", "label": True}, "no answer of the other label to its prompt"),
        ({"instruction": "q", "output": ["a", "b", "c"]}, "3 answers, where two were expected"),
        ({"instruction": "q", "output": "a"}, MISSING),
    ],
)
def test_a_row_that_names_no_preferred_answer_is_not_guessed_at(read, row, reason):
    with pytest.raises(ValueError, match=f"hold none but .*{reason}"):
        read(row)


TABLES = {
    "PKU-SafeRLHF": ["prompt,response_0,response_1,better_response_id", f"{ASKED},{WORST},{BEST},1"],
    "SHP": ["history,human_ref_A,human_ref_B,labels", f"{ASKED},{WORST},{BEST},0"],
    "HelpSteer 3": ["context,response1,response2,overall_preference", f"{ASKED},{BEST},{WORST},-2"],
    "KTO": ["prompt,completion,label", f"{ASKED},{WORST},False", f"{ASKED},{BEST},True"],
    "scores": ["prompt,chosen,rejected,score_chosen,score_rejected", f"{ASKED},{BEST},{WORST},5,1"],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_text_has_numbers_and_labels_too(tmp_path, name):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(TABLES[name]))
    assert sources.read(str(path)).rows == (Row(ASKED, BEST, WORST),)


def test_scores_of_a_table_that_contradict_the_pair_set_it_aside(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,chosen,rejected,score_chosen,score_rejected\n{ASKED},{BEST},{WORST},1,5")
    with pytest.raises(ValueError, match="a chosen answer scored below the other"):
        sources.read(str(path))


def test_rows_of_one_label_are_paired_across_rows_and_prompts_are_counted(read):
    rows = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
        ("q", "good", True), ("p", "only", True), ("q", "bad", False), ("q", "worse", False))]  # fmt: skip
    found = read(*rows)
    assert found.rows == (Row("q", "good", "bad"),) and found.total == 2
    assert found.set_aside == {"no answer of the other label to its prompt": 1}


def test_the_documents_name_every_column_of_every_form():
    told = (PROJECT / "docs" / "models-and-data.md").read_text().lower()
    columns = {name for form in forms.FORMS for name in (*form.needs, *form.prompt)} | {*trees.NEEDS, *turns.SYSTEMS}
    assert [name for name in columns if f"`{name}`" not in told] == []


# --- What stands beside the answers ---


def test_names_are_read_in_any_case_and_an_exact_one_first(read):
    assert read({"Prompt": ASKED, "Chosen": BEST, "REJECTED": WORST}).rows == (Row(ASKED, BEST, WORST),)
    assert read({"Prompt": "another", "prompt": ASKED, "chosen": BEST, "rejected": WORST}).rows[0].prompt == ASKED


def test_every_column_that_is_not_read_is_named(read):
    found = read({"id": 3, "Source": "x", "prompt": ASKED, "chosen": BEST, "rejected": WORST, "score_chosen": 2})
    assert found.unread == ("id", "Source", "score_chosen")  # one score alone says nothing of the pair
    assert found.account == {
        "read as prompt, chosen and rejected, as strings": 1,
        "column 'id' not read": 1,
        "column 'Source' not read": 1,
        "column 'score_chosen' not read": 1,
    }


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_of_a_column_is_the_first_turn(read, column):
    told = (("system", "You are a pirate."), *TURN)
    row = {column: "You are a pirate.", "prompt": ASKED, "chosen": BEST, "rejected": WORST}
    assert read(row).rows == (Row(told, BEST, WORST),)
    messages = {"chosen": [user(ASKED), assistant(BEST)], "rejected": [user(ASKED), assistant(WORST)]}
    assert read({column: "You are a pirate.", **messages}).rows == (Row(told, BEST, WORST),)
    whole = {"role": "system", "content": "You are a pirate."}
    both = {name: [whole, *said] for name, said in messages.items()}
    assert read({column: "You are a pirate.", **both}).rows == (Row(told, BEST, WORST),)
    with pytest.raises(ValueError, match="two system prompts that disagree"):
        read({column: "You are a nurse.", **both})


@pytest.mark.parametrize("words", [[system("Be brief.")], system("Be brief."), ["Be brief."]])
def test_a_system_prompt_in_messages_is_read_as_one(read, words):
    row = {"prompt": ASKED, "chosen": BEST, "rejected": WORST}
    assert read(row | {"system": words}).rows == (Row((("system", "Be brief."), *TURN), BEST, WORST),)
    for none in ([], None):
        assert read(row | {"system": none}).rows == (Row(ASKED, BEST, WORST),)
    with pytest.raises(ValueError, match="a system prompt that is no text"):
        read(row | {"system": [user("Hi.")]})


def test_one_question_under_two_systems_is_two_prompts_and_one_opening(read):
    rows = [
        {"system": f"You are a {who}.", "prompt": ASKED, "chosen": who, "rejected": "no"} for who in ("cook", "spy")
    ]
    found = read(*rows).rows
    assert len(found) == 2 and {row.opening for row in found} == {ASKED}


def test_a_system_turn_that_the_prompt_alone_has_is_kept(read):
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, user(ASKED)],
        "chosen": [user(ASKED), assistant(BEST)],
        "rejected": [user(ASKED), assistant(WORST)],
    }
    assert read(row).rows == (Row((("system", "Be brief."), *TURN), BEST, WORST),)


def test_turns_before_the_answers_go_on_from_the_prompt_or_the_row_is_set_aside(read):
    row = {
        "prompt": [user("Hi.")],
        "chosen": [assistant("Hi."), user(ASKED), assistant(BEST)],
        "rejected": [assistant("Hi."), user(ASKED), assistant(WORST)],
    }
    assert read(row).rows == (Row((("user", "Hi."), ("assistant", "Hi."), *TURN), BEST, WORST),)
    other = {"prompt": "Why?", "chosen": [user(ASKED), assistant(BEST)], "rejected": [user(ASKED), assistant(WORST)]}
    with pytest.raises(ValueError, match="a prompt that is not what stands before the answers"):
        read(other)


def test_a_prompt_that_both_answers_repeat_is_taken_off_and_said(read):
    row = {"prompt": ASKED, "chosen": f"{ASKED}\n{BEST}", "rejected": f"{ASKED} {WORST}"}
    found = read(row)
    assert found.rows == (Row(ASKED, BEST, WORST),)
    assert found.account["the prompt taken off the beginning of both answers"] == 1
    assert read({"prompt": "A", "chosen": "Apple", "rejected": "Apply"}).rows == (Row("A", "Apple", "Apply"),)
    with pytest.raises(ValueError, match="one answer alone that begins with the prompt"):
        read({**row, "rejected": WORST})


def test_whole_dialogues_beside_their_prompt_are_split_once(read):
    asked = f"\n\nHuman: {ASKED}\n\nAssistant:"
    found = read({"prompt": asked, "chosen": f"{asked} {BEST}", "rejected": f"{asked} {WORST}"})
    assert found.rows == (Row(TURN, BEST, WORST),)


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_messages_that_were_written_as_text_are_messages(read, written):
    row = {"chosen": written([user(ASKED), assistant(BEST)]), "rejected": written([user(ASKED), assistant(WORST)])}
    assert read(row).rows == (Row(TURN, BEST, WORST),)
    one = {"chosen": written(assistant(BEST)), "rejected": written(assistant(WORST))}
    assert read({"prompt": ASKED} | one).rows == (Row(TURN, BEST, WORST),)
    listed = {"prompt": ASKED, "chosen": '[{"a": 1}]', "rejected": "[{3}]"}  # an answer may be a list of its own
    assert read(listed).rows == (Row(**listed),)


@pytest.mark.parametrize(
    "answer", ['{"from": "GBP", "to": "USD", "value": 3}', '{"role": "admin", "content": "all"}', '{"role": "x"}']
)
def test_an_answer_that_is_json_of_its_own_is_kept_to_the_letter(read, answer):
    row = {"prompt": ASKED, "chosen": answer, "rejected": "{}"}
    assert read(row).rows == (Row(**row),)


def test_one_row_of_messages_is_no_table_and_no_tree(read):
    row = {"prompt": user(ASKED), "chosen": assistant(BEST), "rejected": assistant(WORST)}
    assert read(row, name="one.json").rows == read(row, row).rows == (Row(TURN, BEST, WORST),)


def test_messages_of_other_makes_are_messages(read):
    parts = {name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for name, text in
             (("chosen", BEST), ("rejected", WORST))}  # fmt: skip
    assert read({"prompt": [user(ASKED)], **parts}).rows == (Row(TURN, BEST, WORST),)
    share = {"chosen": [human(ASKED), gpt(BEST)], "rejected": [human(ASKED), gpt(WORST)]}
    assert read(share).rows == (Row(TURN, BEST, WORST),)
    assert read({"prompt": ASKED, "chosen": assistant(BEST), "rejected": assistant(WORST)}).rows[0].chosen == BEST
    assert read({"prompt": ASKED, "chosen": [BEST], "rejected": [WORST]}).rows == (Row(ASKED, BEST, WORST),)
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    with pytest.raises(ValueError, match="a message of more than text"):
        read({"prompt": [picture], "chosen": [assistant(BEST)], "rejected": [assistant(WORST)]})


@pytest.mark.parametrize("names", forms.SCORES)
def test_scores_that_contradict_the_pair_set_it_aside(read, names):
    rows = [
        {"prompt": f"q{i}", "chosen": BEST, "rejected": WORST, names[0]: chosen, names[1]: rejected}
        for i, (chosen, rejected) in enumerate([(5, 1), (1, 5), (3, 3.0), (None, 2)])
    ]
    found = read(*rows)
    assert [row.prompt for row in found.rows] == ["q0", "q3"]
    assert found.set_aside == {"a chosen answer scored below the other": 1, "answers scored alike": 1}


def test_earlier_turns_of_a_history_stand_before_the_instruction(read):
    told = (("user", "Hi."), ("assistant", "Hello."), ("user", "What is this?\nRed."))
    rows = {"instruction": "What is this?", "input": "Red.", "chosen": BEST, "rejected": WORST}
    for history in ([["Hi.", "Hello."]], '[["Hi.", "Hello."]]'):
        assert read(rows | {"history": history}).rows == (Row(told, BEST, WORST),)
        assert read(rows | {"history": history}, prompts=True).rows == (Row(told, "", ""),)
    system = read(rows | {"history": [["Hi.", "Hello."]], "system": "Be brief."}).rows[0].prompt
    assert system == (("system", "Be brief."), *told)
    listed = {"instruction": ASKED, "output": [BEST, WORST], "history": [["Hi.", "Hello."]]}
    assert read(listed).rows == (Row((*told[:2], *TURN), BEST, WORST),)
    for none in ([], None):
        assert read({**listed, "history": none}).rows == (Row(ASKED, BEST, WORST),)
    for other in (["Hi.", "Hello."], [["Hi."]], "Hi.", 3, {"q": "a"}):
        with pytest.raises(ValueError, match="a history that is no list of questions and answers"):
            read({**listed, "history": other})


@pytest.mark.parametrize("more", [True, ["Red."], {"text": "Red."}])
def test_an_input_that_is_no_text_is_not_left_out_in_silence(read, more):
    with pytest.raises(ValueError, match="hold none but an input that is not text"):
        read({"instruction": "What is this?", "input": more, "chosen": BEST, "rejected": WORST})


@pytest.mark.parametrize("instruction, more, prompt", [
    ("", ASKED, ASKED), (" ", ASKED, ASKED), (ASKED, float("nan"), ASKED), (ASKED, " ", ASKED),
    (ASKED, 0, f"{ASKED}\n0"),
])  # fmt: skip
def test_of_an_instruction_and_an_input_an_empty_one_leaves_no_trace(read, instruction, more, prompt):
    row = {"instruction": instruction, "input": more, "chosen": BEST, "rejected": WORST}
    assert read(row).rows == (Row(prompt, BEST, WORST),)


def test_pairs_of_several_answers_to_one_question_are_one_pair(read):
    rows = [{"chosen": f"Explain it, please. {one}", "rejected": f"Explain it, please. {other}"} for one, other in
            (("x", "y"), ("z", "w"), ("u", "v"))]  # fmt: skip
    assert read(*rows).set_aside == {"another pair of the same prompt": 2}


def test_a_beginning_in_a_script_without_spaces_is_a_prompt(read):
    asked, best, worst = "天空是什么颜色？", "天空是蓝色的。", "我不知道。"
    assert read({"chosen": asked + best, "rejected": asked + worst}).rows == (Row(asked, best, worst),)


@pytest.mark.parametrize("history", [
    [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}], [["Hi.", "Ho."]],
])  # fmt: skip
def test_earlier_turns_may_be_messages_and_a_gap_is_none(read, history):
    row = {"instruction": ASKED, "chosen": BEST, "rejected": WORST}
    earlier = (("user", "Hi."), ("assistant", "Ho."), ("user", ASKED))
    assert read(row | {"history": history}).rows == (Row(earlier, BEST, WORST),)
    assert read(row | {"history": float("nan")}).rows == (Row(ASKED, BEST, WORST),)


def test_sets_of_sets_are_an_answer(read):
    row = {"prompt": "What is the power set of {1}?", "chosen": "{{}, {1}}", "rejected": "I do not know."}
    assert read(row).rows == (Row(*row.values()),)


def test_labels_may_be_one_and_minus_one(read):
    def rows(*labels):
        return [{"prompt": ASKED, "completion": c, "label": label} for c, label in zip((WORST, BEST), labels)]

    for labels in ((-1, 1), ("-1", "1"), (0, 1), (-1.0, 1.0)):
        assert read(*rows(*labels)).rows == (Row(ASKED, BEST, WORST),)
    with pytest.raises(ValueError, match="a label that is neither 1 or true nor 0, -1 or false"):
        read(*rows("bad", "good"))
    neither = read(*rows(-1, 1), {"prompt": "q", "completion": "a", "label": 0})  # between the two
    assert neither.set_aside == {"a label that is neither 1 or true nor 0, -1 or false": 1}


# --- Where no column is the prompt ---


def test_answers_without_a_beginning_to_share_are_refused_with_the_columns(read):
    pairs = [("Gladly.", "No."), ("Of course.", "Never."), ("The sky is blue", "The sky is green")]
    with pytest.raises(ValueError, match=r"no column for the prompt, and in 2 of 3 rows .*'topic', 'chosen'"):
        read(*({"topic": "x", "chosen": one, "rejected": other} for one, other in pairs))


def test_a_column_of_sentences_that_may_be_the_prompt_is_named(read):
    rows = [{"asks": f"What is {n}?", "chosen": f"It is {n}, yes", "rejected": f"It is {n}, no"} for n in range(4)]
    with pytest.raises(ValueError, match="have a column 'asks', which may be the prompt and is not read as one"):
        read(*rows)
    said = [{**row, "asks": row["chosen"]} for row in rows]
    with pytest.raises(ValueError, match="have a column 'asks'"):
        read(rows[0])
    assert len(read(*said).rows) == 4  # a copy of an answer is no prompt
    assert len(read(*({**row, "asks": "the same words"} for row in rows)).rows) == 4


PREFER = [{"chosen": f"I would say that {n} is so", "rejected": f"I would say that {n} is not"} for n in range(12)]
QUESTIONS = ("What is red?", "Which car is the fastest of all", "Why so late?")


@pytest.mark.parametrize("asked", [
    [QUESTIONS[n % 3] for n in range(12)],
    [QUESTIONS[n % 2] for n in range(12)],
    [("什么东西是红色的呢", "哪一辆汽车是最快的")[n % 2] for n in range(12)],
    [("赤いものは何？", "なぜですか。")[n % 2] for n in range(12)],
    [[QUESTIONS[n % 3]] for n in range(12)],
    [[QUESTIONS[n % 3], "Red."] for n in range(12)],
    [[user(QUESTIONS[n % 3])] for n in range(12)],
    [user(QUESTIONS[n % 3]) for n in range(12)],
    [json.dumps([user(QUESTIONS[n % 3])]) for n in range(12)],
    [f"Write {n}" for n in range(12)],
])  # fmt: skip
@pytest.mark.parametrize("prompts", [False, True])
def test_a_question_that_several_pairs_share_may_be_the_prompt(read, asked, prompts):
    with pytest.raises(ValueError, match="have a column 'asks', which may be the prompt and is not read as one"):
        read(*({**row, "asks": one} for row, one in zip(PREFER, asked)), prompts=prompts)


@pytest.mark.parametrize("values", [
    ["ultrachat-long-name", "sharegpt"],
    ["closed qa", "open qa", "creative writing"],
    ["Llama 2 70B Chat", "GPT 4 Turbo", "Claude 3 Opus"],
    ["Anthropic/hh-rlhf", "https://en.wikipedia.org/wiki/List_of_all_the_red_things"],
    [f"{n:08x}-1d2b-4c3d-8e4f-{n:012x}" for n in range(12)],
    [f"data/part {n % 2}/rows.jsonl" for n in range(12)],
    [["math", "open ended question"], ["code"]],
    ["开放问答", "封闭问答"],
    ["开放式问题的回答和写作", "开放式问题的回答和写作"],
    ["Answer the question as well as you can.", "Answer the question as well as you can."],
    [{"source": "one of many sources that are read"}, {"source": "x"}],
    [0.5, 3, None],
    [None, *QUESTIONS, None, None, None],
    [[row["chosen"], row["rejected"]] for row in PREFER],
])  # fmt: skip
def test_a_column_of_names_and_categories_is_no_prompt(read, values):
    rows = [{**row, "kind": values[n % len(values)]} for n, row in enumerate(PREFER)]
    assert len(read(*rows).rows) == 12


@pytest.mark.parametrize("kind", [
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    pyarrow.list_(pyarrow.string()),
    pyarrow.large_string(),
    pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
    pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string()}),
], ids=str)  # fmt: skip
def test_a_column_of_parquet_that_may_be_the_prompt_is_named_whatever_its_kind(tmp_path, kind):
    def told(text):
        if pyarrow.types.is_struct(kind):
            return human(text)
        if pyarrow.types.is_list(kind):
            return [user(text) if pyarrow.types.is_struct(kind.value_type) else text]
        return text

    asked = [told(QUESTIONS[n % 3]) for n in range(12)]
    if pyarrow.types.is_dictionary(kind):
        column = pyarrow.array(asked).dictionary_encode()
    else:
        column = pyarrow.array(asked, kind)
    answers = {name: [row[name] for row in PREFER] for name in PREFER[0]}
    parquet.write_table(pyarrow.table({**answers, "asks": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="have a column 'asks', which may be the prompt"):
        sources.read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("pairs", [
    [("The sky is blue.", "The sea is green."), ("The rose.", "The snow."), ("I do, yes.", "I never do.")],
    [("I can't do it.", "I can."), ("I can't say.", "I can say it."), ("A well-known rose.", "A well known rose.")],
    [("I can’t do it.", "I can do it."), ("It is a well-known car.", "It is a well-made car."), ("Yes", "No")],
    [(f"I am sorry, but I cannot say {n}", f"I am sorry, but I know {n}") for n in range(4)],
])  # fmt: skip
@pytest.mark.parametrize("prompts", [False, True])
def test_beginnings_that_are_shared_by_chance_are_no_prompts(read, pairs, prompts):
    rows = [{"chosen": one, "rejected": other} for one, other in pairs]
    with pytest.raises(ValueError, match=r"have no column for the prompt, and in . of . rows the answers share no"):
        read(*rows, prompts=prompts)


@pytest.mark.parametrize("pair", [("I can't", "I can"), ("well-known", "well known"), ("I can’t", "I can.")])
def test_a_word_with_a_mark_in_it_is_one_word(read, pair):
    good = [{"chosen": f"The sky {n} is blue", "rejected": f"The sky {n} is green"} for n in range(2)]
    found = read(*good, {"chosen": f"We know that {pair[0]} it", "rejected": f"We know that {pair[1]} it"})
    assert found.set_aside == {turns.WITHIN_A_WORD: 1}
    quoted = read({"chosen": "It says 'yes'", "rejected": "It says 'no'"})
    assert quoted.rows == (Row("It says '", "yes'", "no'"),)


def test_messages_that_may_be_the_prompt_are_named(read):
    rows = [
        {"messages": [user(f"Who are you, {n}?")], "chosen": f"I am {n}, Bob.", "rejected": f"I am {n}, Tim."}
        for n in range(3)
    ]
    with pytest.raises(ValueError, match="have a column 'messages', which may be the prompt and is not read as one"):
        read(*rows)


def test_a_null_prompt_gives_way_to_the_column_that_holds_it(read):
    row = {"prompt": None, "question": ASKED, "chosen": "It is a rose", "rejected": "It is snow"}
    assert read(row).rows == (Row(ASKED, "It is a rose", "It is snow"),)


def test_the_nearest_form_is_named_with_what_it_lacks(read):
    with pytest.raises(ValueError, match=r"the nearest form, SHP, needs 'history', .*, and this lacks 'labels'; give"):
        read({"history": "q", "human_ref_A": "a", "human_ref_B": "b"})


@pytest.mark.parametrize("row, form, lacks", [
    ({"prompt": "q", "chosen": "a"}, "prompt, chosen and rejected", "'rejected'"),
    ({"question": "q", "chosen": "a"}, "question, chosen and rejected", "'rejected'"),
    ({"prompt": "q", "response_0": "a", "response_1": "b"}, "PKU-SafeRLHF, .*", "'better_response_id'"),
    ({"question": "q", "answer": "a"}, "question, chosen and rejected", "'chosen', 'rejected'"),
    ({"text": "q", "good": "a", "bad": "b"}, "prompt, chosen and rejected", "'prompt', 'chosen', 'rejected'"),
])  # fmt: skip
def test_the_nearest_form_is_the_one_that_has_most_of_the_columns(read, row, form, lacks):
    with pytest.raises(ValueError, match=f"the nearest form, {form}, needs .*, and this lacks {lacks}; give"):
        read(row)


# --- Prompts alone ---


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": ASKED}, ASKED),
        ({"question": ASKED, "answer": "x"}, ASKED),
        ({"instruction": "What is this?", "input": "Red."}, "What is this?\nRed."),
        ({"prompt": ASKED, "chosen": "same", "rejected": "same"}, ASKED),
        ({"prompt": ASKED, "chosen": "", "rejected": None}, ASKED),
        ({"messages": [user(ASKED), assistant(BEST)]}, TURN),
        ({"conversations": [human(ASKED), gpt(BEST)]}, TURN),
        ({"prompt": [user(ASKED)], "system": "Be brief."}, (("system", "Be brief."), *TURN)),
        ({"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:"}, TURN),
        ({"chosen": [user(ASKED), assistant(BEST)], "rejected": [user(ASKED), assistant(WORST)]}, TURN),
    ],
)
def test_prompts_alone_are_read_whatever_answers_there_are(read, row, prompt):
    assert read(row, prompts=True).rows == (Row(prompt, "", ""),)


@pytest.mark.parametrize("chosen, rejected", [(BEST, BEST), (BEST, ""), ("", "")])
def test_a_conversation_whose_answers_are_no_pair_still_has_its_prompt(read, chosen, rejected):
    both = dict(zip(("chosen", "rejected"), (chosen, rejected)))
    for row in (
        {name: f"\n\nHuman: {ASKED}\n\nAssistant: {text}" for name, text in both.items()},
        {name: [user(ASKED), assistant(text)] for name, text in both.items()},
        {"chosen": [user(ASKED), assistant(chosen)], "rejected": None},
        {"chosen": "", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {rejected}"},
    ):
        assert read(row, prompts=True).rows == (Row(TURN, "", ""),)
        assert read({**row, "score_chosen": 1, "score_rejected": 1}, prompts=True).rows == (Row(TURN, "", ""),)
    with pytest.raises(ValueError, match="the two prompts differ"):
        read({"chosen": [user(ASKED), assistant("a")], "rejected": [user("q"), assistant("b")]}, prompts=True)
    with pytest.raises(ValueError, match="hold none but no prompt"):
        read({"chosen": BEST, "rejected": ""}, prompts=True)


def test_columns_of_prompts_that_are_not_read_are_named(read):
    found = read({"prompt": ASKED, "context": "In a garden.", "question": "Which?", "answer": "x"}, prompts=True)
    assert found.unread == ("context", "question", "answer")
    both = read({"prompt": ASKED, "Prompt": "Another.", "chosen": BEST, "rejected": WORST})
    assert both.rows == (Row(ASKED, BEST, WORST),) and both.unread == ("Prompt",)


def test_prompts_of_message_trees_are_those_of_their_pairs(read):
    pairs, alone = read(*TREE), read(*TREE, prompts=True)
    assert [row.prompt for row in alone.rows] == [row.prompt for row in pairs.rows] and len(alone.rows) == 2


def test_rows_of_another_form_are_set_aside_whatever_they_lack(read):
    rows = [{"chosen": f"It is {n}, yes", "rejected": f"It is {n}, no", "note": "some words"} for n in range(3)]
    found = read(*rows, {"note": "no answers"}, {"chosen": None, "note": "none"})
    assert len(found.rows) == 3 and found.set_aside == {MISSING: 2} and found.total == 5


def test_a_row_without_a_prompt_is_none_of_the_prompts(read):
    found = read({"prompt": ASKED}, {"answer": "x"}, {"prompt": " "}, {"prompt": ASKED}, prompts=True)
    assert len(found.rows) == 1 and found.total == 4
    assert found.set_aside == {"no prompt": 1, "an empty prompt or turn": 1, "another pair of the same prompt": 1}
    assert found.unread == ("answer",)


# --- Files of other shapes ---

PAIRS = [{"prompt": f"What is {n}?", "chosen": "A rose,\nred.", "rejected": 'So "snow".'} for n in range(3)]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps({"data": PAIRS}, indent=1)),
        ("a.json", json.dumps({"version": 2, "train": PAIRS, "test": PAIRS[:1]})),
        ("a.json", json.dumps({name: [row[name] for row in PAIRS] for name in PAIRS[0]})),
        ("a.json", json.dumps({name: {str(i): row[name] for i, row in enumerate(PAIRS)} for name in PAIRS[0]})),
        ("a.json", pd.DataFrame(PAIRS).to_json(orient="split")),
        ("a.json", pd.DataFrame(PAIRS).to_json(orient="index")),
        ("a.json", pd.DataFrame(PAIRS).to_json(orient="table")),
        ("a.json", json.dumps({"validation": PAIRS})),
        ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in PAIRS)),
        ("a.jsonl", " ".join(json.dumps(row) for row in PAIRS)),
        ("a.csv", "prompt,chosen,rejected\n" + "".join(
            f'What is {n}?,"A rose,\nred.","So ""snow""."\n' for n in range(3))),
        ("a.tsv", "prompt\tchosen\trejected\r\n" + "".join(
            f'What is {n}?\t"A rose,\nred."\t"So ""snow""."\r\n' for n in range(3))),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_gives_the_same_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8-sig"))
    assert sources.read(str(path)).rows == tuple(Row(**row) for row in PAIRS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "prompt,chosen,chosen,rejected\nq,a,b,c\n"),
        ("a.tsv.gz", "prompt\tchosen\tchosen\nq\ta\tb\n"),
        ("a.jsonl", '{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}'),
        ("a.json", '[{"prompt": "q",\n"chosen": "a", "chosen": "b"}]'),
        ("a.json", '{"prompt": "q",\n"chosen": "a", "chosen": "b"}\n{"prompt": "p"}'),
        ("a.json", '{"columns": ["prompt", "chosen", "chosen"], "data": [["q", "a", "b"]]}'),
    ],
)
def test_a_name_that_stands_twice_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    with pytest.raises(ValueError, match=rf"{name} has the name 'chosen' twice in a row: leave out all but one\.$"):
        sources.read(str(path))


def test_a_column_of_parquet_that_stands_twice_is_refused(tmp_path):
    columns = [pyarrow.array([text]) for text in ("q", "a", "b", "c")]
    table = pyarrow.Table.from_arrays(columns, ["prompt", "chosen", "chosen", "rejected"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has the name 'chosen' twice in a row"):
        sources.read(str(tmp_path / "a.parquet"))


def test_two_columns_of_which_either_may_be_meant_are_refused(read):
    row = {"Prompt": ASKED, "PROMPT": "q", "chosen": BEST, "rejected": WORST}
    with pytest.raises(ValueError, match="have the columns 'Prompt', 'PROMPT' for one: leave out all but one"):
        read(row)
    assert read({"prompt": ASKED, "ID": 1, "Id": 2, "chosen": BEST, "rejected": WORST}).unread == ("ID", "Id")


def test_columns_without_a_name_may_be_several(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,chosen,rejected,,\n{ASKED},{BEST},{WORST},,\n")
    assert sources.read(str(path)).rows == (Row(ASKED, BEST, WORST),)
