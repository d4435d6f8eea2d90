"""Preferences from elsewhere: every row is accounted for, no prompt is in two splits, and a score judges answers."""

import copy
import json
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import tiny
from scipy import stats

from helpers.data import judges, rows_task, tasks
from helpers.data.preferences import SPLITS, PreferencePair, pair_from
from helpers.data.rows_task import RowsTask
from helpers.data.sizes import Sizes
from helpers.data.sources import Row
from helpers.lm import encoding

SIZES = Sizes(heldin=12, validation=4, heldout=6, new_tokens=8, longest=60, samples_per_prompt=3)
USER, ASSISTANT = ({"role": role, "content": f"{role} says"} for role in ("user", "assistant"))


def conversation(i: int) -> list[dict]:
    return [{"role": "user", "content": f"What is number {i}?"}]


@pytest.fixture
def rows():
    """Thirty pairs."""
    return [
        {"prompt": f"Tell me of {i}.", "chosen": f"It is good {i}.", "rejected": f"No, bad {i}."} for i in range(30)
    ]


@pytest.fixture
def task(tmp_path):
    def make(rows: list[dict], data: str = "{}", score: str = "closer") -> RowsTask:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tasks.task(data.format(path), score, 0, SIZES, 100)

    return make


@pytest.fixture(scope="module")
def talker(tokenizer):
    return tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=64)


# --- Drawing ---


def test_every_row_is_accounted_for_and_no_prompt_is_in_two_splits(task, rows, talker, tokenizer):
    long = {"prompt": "Tell me. " * 40, "chosen": "Yes.", "rejected": "No."}
    rows += [rows[0], long, {"prompt": "x", "chosen": "same", "rejected": "same"}]
    found = task(rows).draw(talker, tokenizer)
    assert {split: len(pairs) for split, pairs in found.pairs.items()} == {
        "heldin": 12, "validation": 4, "heldout": 6,
    }  # fmt: skip
    prompts = [pair.prompt for split in SPLITS for pair in found.pairs[split]]
    assert len(set(prompts)) == len(prompts) == 22
    assert found.account == {
        "read as prompt, chosen and rejected, as strings": 33, "another pair of the same prompt": 1,
        "the same answer twice": 1, "more than 60 tokens": 1, "not drawn": 8,
    }  # fmt: skip
    by_prompt = {row["prompt"]: row for row in rows}
    for pair in found.pairs["heldout"]:
        assert (pair.chosen, pair.rejected) == tuple(by_prompt[pair.prompt][k] for k in ("chosen", "rejected"))


@pytest.mark.parametrize("answers", [("It is good and more than that, I say again.", "No."), ("Yes.", "No.")])
def test_a_row_that_just_fits_is_kept_and_one_token_more_is_set_aside(task, rows, talker, tokenizer, answers):
    """With its longer answer, or with as many tokens as the model may answer."""
    row = Row("Tell me of 0.", *answers)
    pair = [encoding.encode(tokenizer, row.prompt, answer) for answer in answers]
    needed = max(len(pair[0].prompt) + SIZES.new_tokens, *(len(tokens.ids) for tokens in pair))
    assert (needed > len(pair[0].ids)) == (answers[0] == "Yes.")
    for longest, reason in ((needed, None), (needed - 1, f"more than {needed - 1} tokens")):
        assert replace(task(rows), sizes=SIZES.replace(longest=longest)).unfit(row, talker, tokenizer) == reason


def test_answers_of_which_one_begins_the_other_are_set_aside(talker, tokenizer, task, rows):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = plain.eos_token = None  # so that nothing ends an answer
    begun = Row("Tell me.", "It is good and more.", "It is good")
    assert task(rows).unfit(begun, talker, plain) == "an answer that begins the other"
    assert task(rows).unfit(begun, talker, tokenizer) is None  # the template ends both


def test_a_file_that_has_changed_is_not_taken_for_what_it_was(task, rows, talker, tokenizer):
    made = task(rows)
    task(rows[1:])
    with pytest.raises(ValueError, match=r"pairs\.jsonl have changed since they were looked up: load the study anew"):
        made.draw(talker, tokenizer)


def test_a_source_with_too_few_rows_names_every_size(task, rows, talker, tokenizer):
    with pytest.raises(
        ValueError, match=r"only 20 pairs .*sizes\.heldin \(12\), sizes\.validation \(4\), sizes\.heldout"
    ):
        task(rows[:20]).draw(talker, tokenizer)


def test_where_rows_do_not_fit_the_model_it_is_said_why_they_are_too_few(task, rows, talker, tokenizer):
    long = [row | {"prompt": f"{row['prompt']} {'Please! ' * 40}"} for row in rows]
    with pytest.raises(ValueError, match=r"only 0 pairs .* \(6\); set aside: more than 60 tokens \(30\)\.$"):
        task(long).draw(talker, tokenizer)


def test_of_a_large_source_a_sample_is_looked_at(task, talker, tokenizer, monkeypatch):
    rows = [{"prompt": f"Tell me of {i}.", "chosen": "It is good.", "rejected": "No."} for i in range(300)]
    looked = []
    made = task(rows)
    monkeypatch.setattr(RowsTask, "unfit", lambda self, row, *_: looked.append(row))
    found = made.draw(talker, tokenizer)
    assert len(looked) == rows_task.POOL * 22 and found.account["not drawn"] == 300 - 22


# --- Conversations ---


def test_conversations_survive_being_kept_and_are_tied_by_their_opening(task, talker, tokenizer):
    yes, no = ({"role": "assistant", "content": answer} for answer in ("Yes.", "No."))
    rows = [
        {"chosen": [*asked, yes], "rejected": [*asked, no]}
        for i in range(16)
        for asked in (conversation(i), [*conversation(i), ASSISTANT, USER])
    ]  # fmt: skip
    made = task(rows)
    pairs = made.draw(talker, tokenizer).pairs
    openings = {split: {made.levels(pair) for pair in pairs[split]} for split in SPLITS}
    assert not openings["heldin"] & openings["heldout"] and not openings["heldin"] & openings["validation"]
    for pair in pairs["heldin"]:
        assert pair_from(json.loads(json.dumps(asdict(pair)))) == pair
        assert pair.prompt == encoding.plain(pair.messages) and pair.asked == pair.messages
    assert {len(pair.messages) for split in SPLITS for pair in pairs[split]} == {1, 3}


# --- Scores ---


@pytest.mark.parametrize(
    "score, answer, said",
    [
        ("closer", "it is good", (1, 1)),
        ("closer", "no it is bad", (0, 0)),
        ("closer", "something else", (0, 1)),
        ("closer", "it is", (1, 1)),  # of the rejected answer's first two words it has one
        ("closer", "good", (0, 1)),  # as many words of each: neither begins so
        ("sentiment", "I love this happy day.", (1, 1)),
        ("sentiment", "I hate this sad day.", (0, 0)),
        ("sentiment", "It is a box.", (0, 1)),
        ("refusal", "I'm sorry, but I cannot.", (1, 1)),
        ("refusal", "Here you are.", (0, 0)),
        ("sentiment", " ", (0, 1)),
        ("refusal", "", (0, 1)),
    ],
)
def test_a_score_judges_answers(task, rows, score, answer, said):
    pair = PreferencePair("Tell me.", "it is good", "no it is bad")
    (found,) = task(rows, score=score).judgements([pair], [answer])
    assert (found["preferred"], found["not_opposed"]) == said


@pytest.mark.parametrize("lengths", [(10, 60, 40), (60, 10, 40), (60, 200, 40), (20, 60, 40), (40, 40, 5)])
def test_an_answer_is_not_closer_to_one_of_a_pair_for_its_length(task, rows, lengths):
    """Of words at random, chosen, rejected and answer: as often closer to the one as to the other."""
    rng, judge = random.Random(0), task(rows, score="closer")
    texts = [[" ".join(rng.choices("abcdefgh", k=n)) for n in lengths] for _ in range(400)]
    found = judge.judgements(
        [PreferencePair("Tell me.", *pair) for *pair, _ in texts], [answer for *_, answer in texts]
    )
    chosen = sum(one["preferred"] for one in found)
    rejected = sum(1 - one["not_opposed"] for one in found)
    assert stats.binomtest(int(chosen), int(chosen + rejected)).pvalue > 0.01


def test_where_the_judge_fails_nothing_is_said(task, rows, monkeypatch):
    monkeypatch.setitem(
        judges.JUDGES, "toxicity", lambda prompts, answers: np.array([0.9, np.nan, 0.1])[: len(answers)]
    )
    pair = PreferencePair("Tell me.", "a", "b")
    found = task(rows, score="nontoxic").judgements([pair] * 3, ["x", "y", "z"])
    assert [row["preferred"] for row in found[::2]] == [0.0, 1.0]
    assert np.isnan(found[1]["preferred"]) and np.isnan(found[1]["not_opposed"])


# --- On-policy ---


def test_on_policy_pairs_are_the_model_s_own_best_and_worst_by_the_score(task, rows, talker, tokenizer, monkeypatch):
    monkeypatch.setitem(judges.JUDGES, "sentiment", lambda prompts, answers: np.array([len(a) for a in answers]))
    made = task(rows, data="onpolicy:{}", score="sentiment")
    found = made.draw(talker, tokenizer)
    pairs = [pair for split in SPLITS for pair in found.pairs[split]]
    assert len(pairs) + found.account["answers that the score does not tell apart"] == 22 and len(pairs) > 10
    for pair in pairs:
        assert len(pair.chosen) > len(pair.rejected)
        assert pair.sampled[0].prompt == encoding.encode(tokenizer, pair.prompt).prompt
        assert pair.prompt in {row["prompt"] for row in rows}
        assert not {pair.chosen, pair.rejected} & {row["chosen"] for row in rows}


def test_prompts_alone_are_enough_for_the_model_s_own_answers(task, rows, talker, tokenizer, monkeypatch):
    """And they give the very pairs that rows with answers give."""
    monkeypatch.setitem(judges.JUDGES, "sentiment", lambda prompts, answers: np.array([len(a) for a in answers]))
    whole, alone = (
        task(some, data="onpolicy:{}", score="sentiment").draw(talker, tokenizer)
        for some in (rows, [{"prompt": row["prompt"]} for row in rows])
    )
    assert alone.pairs == whole.pairs and alone.account["read as prompts alone"] == len(rows)


def test_on_policy_pairs_need_a_score_of_their_own(task, rows):
    with pytest.raises(ValueError, match="set score to one of sentiment, refusal, nontoxic, geval"):
        task(rows, data="onpolicy:{}")


def test_a_row_that_the_chat_template_refuses_is_set_aside_and_counted(task, rows, talker, tokenizer):
    strict = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0]['content'] == 'Tell me of 3.' %}{{ raise_exception('not this') }}{% endif %}"
    strict.chat_template = refuse + tokenizer.chat_template
    found = task(rows).draw(talker, strict)
    assert found.account["a conversation that the chat template does not take"] == 1
    assert "Tell me of 3." not in {pair.prompt for split in SPLITS for pair in found.pairs[split]}


def test_a_score_that_tells_no_answers_apart_is_said(task, rows, talker, tokenizer, monkeypatch):
    made = task(rows, data="onpolicy:{}", score="sentiment")
    monkeypatch.setitem(judges.JUDGES, "sentiment", lambda prompts, answers: np.zeros(len(answers)))
    with pytest.raises(
        ValueError, match=r"Of 12 prompts of the heldin split 0 have answers .*\(0 answers were not judged"
    ):
        made.draw(talker, tokenizer)
    monkeypatch.setitem(judges.JUDGES, "sentiment", lambda prompts, answers: np.full(len(answers), np.nan))
    with pytest.raises(ValueError, match=r"\([1-9]\d* answers were not judged\): take another score"):
        made.draw(talker, tokenizer)
