"""TruthfulQA's multiple choice against a forward pass a token, and every form that its rows come in."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_vector
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.data import truthfulqa
from helpers.data.unavailable import Unavailable
from helpers.lm import likelihoods, steering

ROWS = [
    {
        "question": "What is red?",
        "mc1_targets": {"choices": ["A rose.", "The sea.", "Milk."], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["A rose.", "Blood is.", "The sea.", "Milk."], "labels": [1, 1, 0, 0]},
    },
    {
        "question": "Who sees?",
        "mc1_targets": {"choices": ["No one.", "All who look."], "labels": [0, 1]},
        "mc2_targets": {"choices": ["No one.", "All who look.", "Some."], "labels": [0, 1, 1]},
    },
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def reader():
    """A model that reads characters, and its tokenizer."""
    characters = sorted({*"QA:\n <>/", *map(chr, range(97, 123)), *(c for row in ROWS for c in json.dumps(row))})
    vocabulary = {"\n": len(characters), **{c: i for i, c in enumerate(characters)}}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": len(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@torch.no_grad()
def logp_by_hand(model, tokenizer, start: str, answer: str) -> float:
    """log p(answer | start), a forward pass a token."""
    ids, found = tokenizer(start)["input_ids"], 0.0
    for token in tokenizer(answer)["input_ids"]:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        found += (logits[token] - logits.logsumexp(-1)).item()
        ids = [*ids, token]
    return found


def truthful_by_hand(logp) -> tuple[list, list]:
    """MC1 and MC2 of ROWS in probabilities, as their paper words them."""
    rose, blood, sea, milk = (np.exp(logp("What is red?", a)) for a in ("A rose.", "Blood is.", "The sea.", "Milk."))
    none, all_, some = (np.exp(logp("Who sees?", answer)) for answer in ("No one.", "All who look.", "Some."))
    mc1 = [float(rose > sea and rose > milk), float(all_ > none)]
    return mc1, [(rose + blood) / (rose + blood + sea + milk), (all_ + some) / (none + all_ + some)]


def test_mc1_and_mc2_are_those_of_probabilities_by_hand(reader):
    model, tokenizer = reader
    mc1, mc2 = truthful_by_hand(lambda q, a: logp_by_hand(model, tokenizer, f"Q: {q}\nA:", f" {a}"))
    found = truthfulqa.truthfulqa(model, tokenizer, ROWS)
    assert found.mc1.tolist() == mc1 and found.mc2 == pytest.approx(mc2, rel=1e-4)
    assert (found.mc2 > 0).all() and (found.mc2 < 1).all()


def test_a_chat_model_is_asked_by_its_template(reader, monkeypatch):
    model, tokenizer = reader
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    _, mc2 = truthful_by_hand(lambda q, a: logp_by_hand(model, tokenizer, f"<user>{q}</><assistant>", f"{a}</>"))
    assert truthfulqa.truthfulqa(model, tokenizer, ROWS).mc2 == pytest.approx(mc2, rel=1e-4)


def test_arms_are_scored_together_as_they_are_apart(reader):
    model, tokenizer = reader
    deltas = torch.stack([torch.zeros(16), *(10 * random_vector(6, 16))])
    found = truthfulqa.truthfulqa(model, tokenizer, ROWS, deltas)
    assert found.mc1.shape == found.mc2.shape == (7, 2)
    for arm, delta in enumerate(deltas):
        with steering.added(model, "final", delta):
            alone = truthfulqa.truthfulqa(model, tokenizer, ROWS)
        assert found.mc1[arm].tolist() == alone.mc1.tolist()
        assert found.mc2[arm] == pytest.approx(alone.mc2, abs=1e-4)
    assert set(found.mc1.ravel()) == {0.0, 1.0}


def test_mc1_wants_the_best_answer_ahead_and_mc2_survives_any_length(reader, monkeypatch):
    """Log-probabilities that no float holds the exponential of, and a tie, which is not ahead."""
    values = {"A rose.": -2000, "Blood is.": -2001, "The sea.": -2000, "Milk.": -2002}
    values |= {"No one.": -900, "All who look.": -899, "Some.": -np.inf}
    order = ["A rose.", "The sea.", "Milk.", "Blood is.", "No one.", "All who look.", "Some."]
    monkeypatch.setattr(likelihoods, "response_logps", lambda *_: np.array([values[answer] for answer in order], float))
    found = truthfulqa.truthfulqa(*reader, ROWS)
    assert found.mc1.tolist() == [0.0, 1.0]
    red, sight = np.exp([0, -1, 0, -2]), np.exp([0, 1])
    assert found.mc2 == pytest.approx([red[:2].sum() / red.sum(), sight[1] / sight.sum()])


def as_authors_write(row):
    """The form of the authors' mc_task.json."""
    return {name: v if name == "question" else dict(zip(v["choices"], v["labels"])) for name, v in row.items()}


WRITERS = {
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "task.json": lambda path: path.write_text(json.dumps([as_authors_write(row) for row in ROWS])),
}


@pytest.mark.parametrize("form", WRITERS)
def test_rows_come_from_a_file_in_every_form_there_is(form, reader, tmp_path, monkeypatch):
    WRITERS[form](tmp_path / f"rows.{form}")
    monkeypatch.setenv("TRUTHFULQA", str(tmp_path / f"rows.{form}"))
    rows = truthfulqa.truthfulqa_rows()
    assert [row["question"] for row in rows] == ["What is red?", "Who sees?"]
    for found, expected in zip(truthfulqa.truthfulqa(*reader, rows), truthfulqa.truthfulqa(*reader, ROWS)):
        np.testing.assert_array_equal(found, expected)


def test_rows_come_from_the_hub_where_no_file_is_named(monkeypatch):
    asked = []
    monkeypatch.delenv("TRUTHFULQA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or ROWS)
    assert truthfulqa.truthfulqa_rows() == ROWS
    commit = truthfulqa.TRUTHFULQA.partition("@")[2]
    assert asked == [(("truthfulqa/truthful_qa", "multiple_choice"), {"split": "validation", "revision": commit})]


@pytest.mark.parametrize(
    "source, text", [("none.json", None), ("half.json", "[{"), ("one.json", "{}"), ("other.jsonl", '{"question": "Q"}')]
)
def test_rows_that_cannot_be_had_are_unavailable(source, text, tmp_path, monkeypatch):
    if text:
        (tmp_path / source).write_text(text)
    monkeypatch.setenv("TRUTHFULQA", str(tmp_path / source))
    with pytest.raises(Unavailable, match=r"TruthfulQA cannot be read from .*set TRUTHFULQA to a JSON"):
        truthfulqa.truthfulqa_rows()


def test_without_the_hub_rows_are_unavailable(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.delenv("TRUTHFULQA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(Unavailable, match="connect to the Hugging Face hub"):
        truthfulqa.truthfulqa_rows()


@pytest.mark.parametrize(
    "name, labels, says",
    [
        ("mc1_targets", [1, 1, 0], "row 1 has 2 true of 3 mc1_targets"),
        ("mc1_targets", [0, 0, 0], "row 1 has 0 true of 3 mc1_targets"),
        ("mc2_targets", [1, 1, 1], "row 1 has 3 true of 3 mc2_targets"),
    ],
)
def test_a_row_without_true_and_false_answers_is_refused(name, labels, says, reader):
    row = {**ROWS[0], name: {"choices": ["A rose.", "The sea.", "Milk."], "labels": labels}}
    with pytest.raises(ValueError, match=says):
        truthfulqa.truthfulqa(*reader, [ROWS[1], row])
