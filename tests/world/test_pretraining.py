"""The organism's pretraining: its tokenizer, its batches, its loss, and that it is reproducible."""

import math
import random

import pytest
import torch
from conftest import bytes_of
from transformers import PreTrainedTokenizerFast

from helpers.data.sizes import Sizes
from helpers.lm import architecture, encoding, likelihoods, loading
from helpers.lm.batches import Tokens
from helpers.stages import keys
from helpers.world import atlas, pretraining
from helpers.world.organism import Organism

SPEC = Organism(places=20, corpus=96, vocabulary=300, width=32, layers=1)
WORLD = atlas.Atlas(Organism().places, seed=0)
PAIRS = atlas.corpus(atlas.Atlas(20, seed=0), 60, seed=1)


# --- The tokenizer ---


def test_every_id_is_below_the_length_and_special_tokens_come_first(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(pretraining.SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 4)
    assert len(tokenizer) == 320


def test_text_survives_a_round_trip(tokenizer):
    strange = "Zażółć gęślą jaźń, 日本 😀 — 100 %?"  # bytes stand in for what was never read
    for text in [strange, *(q.text for q, _ in PAIRS), *(answer for _, answer in PAIRS)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids).removeprefix(" ") == text and min(ids) >= len(pretraining.SPECIAL_TOKENS)


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    question, answer = PAIRS[0]
    assert encoding.encode(loaded, question.text, answer) == encoding.encode(tokenizer, question.text, answer)


@pytest.fixture(scope="module")
def default():
    """The default organism's tokenizer, and the pairs that it was trained on."""
    pairs = atlas.corpus(WORLD, 8000, seed=0)
    texts = [f"{question.text} {answer}" for question, answer in pairs]
    return pretraining.build_tokenizer(texts, Organism().vocabulary), pairs


def test_names_take_several_tokens(default):
    tokenizer, _ = default
    assert len(tokenizer) == Organism().vocabulary
    for kind in ("capital", "river", "flag", "dish", "animal", "craft"):
        assert min(len(tokenizer.tokenize(value)) for value in WORLD.values[kind]) >= 2, kind
    assert min(len(tokenizer.tokenize(place)) for place in WORLD.facts) >= 2


def test_the_longest_answer_fits_what_the_default_profile_lets_a_model_say(default):
    """With its end, so that a whole answer is never taken for one that was cut."""
    tokenizer, pairs = default
    pairs = sorted(pairs, key=lambda pair: len(pair[1]))[-1500:]
    assert max(len(tokens.response) for tokens in pretraining._encode_all(tokenizer, pairs)) <= Sizes().new_tokens


def test_a_prompt_is_a_prefix_of_its_conversation_and_starts_once(tokenizer):
    _, start, user, assistant, end = range(5)
    for question, answer in PAIRS:
        asked = [{"role": "user", "content": question.text}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert [i for i in whole if i < 5] == [start, user, end, assistant, end]
        assert (prompt[:2], prompt[-2:], whole[-1]) == ([start, user], [end, assistant], end)
        assert tokenizer.decode(whole[len(prompt) : -1]).strip() == answer


# --- Pretraining ---


def test_many_pairs_are_encoded_as_one_at_a_time(tokenizer):
    expected = [encoding.encode(tokenizer, question.text, answer) for question, answer in PAIRS]
    assert pretraining._encode_all(tokenizer, PAIRS) == expected


def test_batches_hold_every_sequence_once_and_little_padding():
    sequences = [Tokens([1] * (3 + i % 7), [2] * (5 + i % 40)) for i in range(512)]
    sequences = [Tokens([*s.prompt, i], s.response) for i, s in enumerate(sequences)]
    ordered = pretraining._in_batches(sequences, 16, random.Random(0))
    assert sorted(ordered) == sorted(sequences) and ordered != sequences

    def padding(rows):
        batches = [[len(s.ids) for s in rows[i : i + 16]] for i in range(0, len(rows), 16)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    shuffled = random.Random(1).sample(sequences, len(sequences))
    assert padding(ordered) < padding(shuffled) / 3
    assert ordered == pretraining._in_batches(sequences, 16, random.Random(0))


def test_only_answers_carry_a_label():
    batch = [{"prompt_length": 2, "input_ids": [1, 7, 8, 4]}, {"prompt_length": 4, "input_ids": [1, 5, 6, 3, 9, 4]}]
    found = pretraining._answer_labels(batch)
    ignored = pretraining.IGNORED
    assert found["input_ids"].tolist() == [[1, 7, 8, 4, 0, 0], [1, 5, 6, 3, 9, 4]]
    assert found["labels"].tolist() == [[ignored, ignored, 8, 4, ignored, ignored], [ignored] * 4 + [9, 4]]


def test_the_loss_is_that_of_the_answers_alone_and_weighs_every_token_alike(llama):
    """On a padded batch, against what metrics measures one by one; tokens of short answers count no more."""
    sequences = [Tokens([5, 6, 7], [8, 9]), Tokens([10, 11], [12, 13, 14, 15, 2])]
    losses = []
    for batch in (sequences, sequences[:1], sequences[1:]):
        fed = pretraining._answer_labels([{"prompt_length": len(s.prompt), "input_ids": s.ids} for s in batch])
        outputs = llama(input_ids=fed["input_ids"])
        losses.append(pretraining._loss(outputs, fed["labels"], tokens_per_batch=3.5).item())
        assert losses[-1] == pytest.approx(-likelihoods.response_logps(llama, batch).sum() / 3.5, rel=1e-5)
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-5)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organism")
    pretraining.pretrain(SPEC, 0, folder)
    return folder


def test_pretraining_again_gives_the_same_bytes_and_another_seed_others(pretrained, tmp_path):
    torch.rand(7)  # what was drawn before says nothing
    pretraining.pretrain(SPEC, 0, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(pretrained)
    pretraining.pretrain(SPEC, 1, tmp_path / "other")
    assert bytes_of(tmp_path / "other")["model.safetensors"] != bytes_of(pretrained)["model.safetensors"]


def test_the_organism_loads_as_any_model_does(pretrained):
    model, tokenizer = loading.load(pretrained)
    assert (len(architecture.blocks(model)), model.config.hidden_size) == (SPEC.layers, SPEC.width)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == SPEC.vocabulary
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert architecture.context_length(model) == pretraining.CONTEXT
    longest = max(len(tokens.ids) for tokens in pretraining._encode_all(tokenizer, PAIRS))
    assert longest <= pretraining.CONTEXT


def test_pretraining_learns(tmp_path):
    """A few dozen steps bring the loss on the answers well below that of a uniform guess, and the log shows it."""
    pretraining.pretrain(Organism(places=20, corpus=1440, vocabulary=300, width=32, layers=1), 0, tmp_path)
    header, *rows = (tmp_path / "losses.csv").read_text().splitlines()
    losses = [float(row.split(",")[1]) for row in rows]
    assert header == "step,loss" and [int(row.split(",")[0]) for row in rows] == [20, 40, 60]
    assert losses[-1] < losses[0] and losses[-1] < 0.75 * math.log(300)


def test_how_partners_are_trained_decides_no_organism():
    reached, packages = keys._reached("helpers.stages.organism")
    assert {"helpers.world.atlas", "helpers.lm.batches"} < reached
    assert not any(name.startswith(("helpers.data", "helpers.lm.training")) for name in reached)
    assert not packages & {"trl", "peft"}
