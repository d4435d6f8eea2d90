"""Training: the tokenizer, the organism's pretraining, and DPO as TRL and as the paper have it."""

import copy
import math
import random

import pandas as pd
import pytest
import torch
from conftest import LAYERS, WIDTH, tiny
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from helpers import atlas, gradients, metrics, models, preferences, training
from helpers.activations import Tokens
from helpers.profiles import Organism, Recipe

SPEC = Organism(places=20, corpus=96, vocabulary=300, width=32, layers=1)
WORLD = atlas.Atlas(20, seed=0)
PAIRS = atlas.corpus(WORLD, 60, seed=1)


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- The tokenizer ---


def test_every_id_is_below_the_length_and_special_tokens_come_first(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(training.SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 4)
    assert len(tokenizer) == 320


def test_text_survives_a_round_trip(tokenizer):
    strange = "Zażółć gęślą jaźń, 日本 😀 — 100 %?"  # bytes stand in for what was never read
    for text in [strange, *(q.text for q, _ in PAIRS), *(answer for _, answer in PAIRS)]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids).removeprefix(" ") == text and min(ids) >= len(training.SPECIAL_TOKENS)


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    question, answer = PAIRS[0]
    assert preferences.encode(loaded, question.text, answer) == preferences.encode(tokenizer, question.text, answer)


def test_names_take_several_tokens():
    """With the default profile's vocabulary, on the world it was trained on."""
    world = atlas.Atlas(Organism().places, seed=0)
    texts = [f"{question.text} {answer}" for question, answer in atlas.corpus(world, 8000, seed=0)]
    tokenizer = training.build_tokenizer(texts, Organism().vocabulary)
    assert len(tokenizer) == Organism().vocabulary
    for kind in ("capital", "river", "flag", "dish", "animal", "craft"):
        assert min(len(tokenizer.tokenize(value)) for value in world.values[kind]) >= 2, kind
    assert min(len(tokenizer.tokenize(place)) for place in world.facts) >= 2


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
    expected = [preferences.encode(tokenizer, question.text, answer) for question, answer in PAIRS]
    assert training._encode_all(tokenizer, PAIRS) == expected


def test_batches_hold_every_sequence_once_and_little_padding():
    sequences = [Tokens([1] * (3 + i % 7), [2] * (5 + i % 40)) for i in range(512)]
    sequences = [Tokens([*s.prompt, i], s.response) for i, s in enumerate(sequences)]
    ordered = training._in_batches(sequences, 16, random.Random(0))
    assert sorted(ordered) == sorted(sequences) and ordered != sequences

    def padding(rows):
        batches = [[len(s.ids) for s in rows[i : i + 16]] for i in range(0, len(rows), 16)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    shuffled = random.Random(1).sample(sequences, len(sequences))
    assert padding(ordered) < padding(shuffled) / 3
    assert ordered == training._in_batches(sequences, 16, random.Random(0))


def test_only_answers_carry_a_label():
    batch = [{"prompt_length": 2, "input_ids": [1, 7, 8, 4]}, {"prompt_length": 4, "input_ids": [1, 5, 6, 3, 9, 4]}]
    found = training._answer_labels(batch)
    ignored = training.IGNORED
    assert found["input_ids"].tolist() == [[1, 7, 8, 4, 0, 0], [1, 5, 6, 3, 9, 4]]
    assert found["labels"].tolist() == [[ignored, ignored, 8, 4, ignored, ignored], [ignored] * 4 + [9, 4]]


def test_labels_give_the_loss_of_the_answers_alone(llama):
    """The Trainer's loss on a padded batch is the mean over answer tokens of what metrics measures one by one."""
    sequences = [Tokens([5, 6, 7], [8, 9]), Tokens([10, 11], [12, 13, 14, 15, 2])]
    rows = [{"prompt_length": len(s.prompt), "input_ids": s.ids} for s in sequences]
    loss = llama(**training._answer_labels(rows)).loss.item()
    assert loss == pytest.approx(-metrics.response_logps(llama, sequences).sum() / 7, rel=1e-5)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organism")
    training.pretrain(SPEC, 0, folder)
    return folder


def test_pretraining_again_gives_the_same_bytes_and_another_seed_others(pretrained, tmp_path):
    torch.rand(7)  # what was drawn before says nothing
    training.pretrain(SPEC, 0, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(pretrained)
    training.pretrain(SPEC, 1, tmp_path / "other")
    assert bytes_of(tmp_path / "other")["model.safetensors"] != bytes_of(pretrained)["model.safetensors"]


def test_the_organism_loads_as_any_model_does(pretrained):
    model, tokenizer = models.load(pretrained)
    assert (len(models.blocks(model)), model.config.hidden_size) == (SPEC.layers, SPEC.width)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == SPEC.vocabulary
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert models.context_length(model) == training.CONTEXT
    longest = max(len(tokens.ids) for tokens in training._encode_all(tokenizer, PAIRS))
    assert longest <= training.CONTEXT


def test_pretraining_learns(tmp_path):
    """A few dozen steps bring the loss on the answers well below that of a uniform guess, and the log shows it."""
    training.pretrain(Organism(places=20, corpus=1440, vocabulary=300, width=32, layers=1), 0, tmp_path)
    header, *rows = (tmp_path / "losses.csv").read_text().splitlines()
    losses = [float(row.split(",")[1]) for row in rows]
    assert header == "step,loss" and [int(row.split(",")[0]) for row in rows] == [20, 40, 60]
    assert losses[-1] < losses[0] and losses[-1] < 0.75 * math.log(300)


# --- DPO ---


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(0)
    questions = rng.sample(WORLD.questions("heldin", "heldin"), 12)
    return [preferences.Example(q.text, *atlas.preference_pair(WORLD, "tone", q, rng), question=q) for q in questions]


@pytest.fixture(scope="module")
def encoded(tokenizer, examples):
    return preferences.encode_pairs(tokenizer, examples)


def organism(tokenizer, dtype=torch.float64):
    """A tiny Llama with random weights for this tokenizer."""
    return copy.deepcopy(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=128)).to(dtype)


@pytest.fixture
def trainer(tokenizer, encoded, tmp_path):
    def make(**changes):
        recipe = Recipe(**{"beta": 0.7, "batch_size": 12, "rank": 2, "epochs": 1, **changes})
        model = organism(tokenizer)
        return training.dpo_trainer(model, tokenizer, training.preference_dataset(*encoded), recipe, 0, tmp_path)

    return make


def trl_loss(trainer) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()


def our_loss(model, chosen, rejected, beta: float) -> float:
    policy = [torch.tensor(metrics.response_logps(model, answers)) for answers in (chosen, rejected)]
    with model.disable_adapter():
        reference = [torch.tensor(metrics.response_logps(model, answers)) for answers in (chosen, rejected)]
    return gradients.dpo_loss(*policy, *reference, beta).item()


def kick(model) -> None:
    """Small random numbers in every lora_B, which start at zero (TRL works in float32: margins stay modest)."""
    generator = torch.Generator().manual_seed(0)
    kicked = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(kicked) == 7 * LAYERS and not any(parameter.any() for parameter in kicked)
    for parameter in kicked:
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_the_loss_is_log_2_before_the_first_step(trainer):
    assert trl_loss(trainer()) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_trls_loss_is_the_papers(trainer, encoded, beta):
    made = trainer(beta=beta)
    kick(made.model)
    expected = our_loss(made.model, *encoded, beta)
    assert trl_loss(made) == pytest.approx(expected, rel=1e-6) and abs(expected - math.log(2)) > 0.01


def test_the_added_term_is_the_mean_loss_of_the_chosen_answers(trainer, encoded):
    """TRL's "sft" loss, weighted: the negative log-probability a token, over all chosen tokens of the batch."""
    chosen, _ = encoded
    plain, added = trainer(), trainer(nll_weight=0.5)
    for made in (plain, added):
        kick(made.model)
    nll = -metrics.response_logps(added.model, chosen).sum() / sum(len(tokens.response) for tokens in chosen)
    assert trl_loss(added) - trl_loss(plain) == pytest.approx(0.5 * nll, rel=1e-5)


def test_only_the_adapter_on_the_blocks_is_trained(trainer):
    made = trainer()
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".layers." in name for name in trained)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)


def test_training_moves_the_adapter_and_leaves_the_base_bit_for_bit(trainer, tokenizer):
    made = trainer(batch_size=4, epochs=2, learning_rate=1e-2)
    made.train()
    weights = made.model.get_base_model().state_dict()
    for name, before in organism(tokenizer).state_dict().items():
        assert torch.equal(weights[name.replace("_proj.weight", "_proj.base_layer.weight")], before), name
    assert all(parameter.any() for name, parameter in made.model.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def partner(tokenizer, encoded, tmp_path_factory):
    """A base model's folder and its DPO adapter's, trained for a few steps."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model = organism(tokenizer, torch.float32)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = Recipe(beta=1.0, learning_rate=1e-2, epochs=4, batch_size=4, rank=2)
    training.train_dpo(*models.load(base), *encoded, recipe, 0, adapter)
    return base, adapter, recipe


def test_a_saved_adapter_makes_the_chosen_answers_likelier_than_the_base_does(partner, encoded):
    base, adapter, _ = partner
    pair = models.load_pair(base, adapter)
    margins = {}
    for role in models.ROLES:
        with pair.role(role) as model:
            margins[role] = metrics.response_logps(model, encoded[0]) - metrics.response_logps(model, encoded[1])
    assert (margins["dpo"] > margins["base"]).mean() > 0.9
    assert pair.model.get_base_model().config.hidden_size == WIDTH


def test_the_log_has_a_row_a_step_and_starts_at_log_2(partner):
    log = pd.read_csv(partner[1] / "log.csv")
    assert len(log) == 4 * 3 and {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= set(log)
    assert log["loss"][0] == pytest.approx(math.log(2), abs=1e-4) and log["loss"].iloc[-1] < log["loss"][0]


def test_training_again_gives_the_same_adapter(partner, encoded, tmp_path):
    base, adapter, recipe = partner
    torch.rand(3)
    training.train_dpo(*models.load(base), *encoded, recipe, 0, tmp_path)
    assert bytes_of(tmp_path)["adapter_model.safetensors"] == bytes_of(adapter)["adapter_model.safetensors"]
    assert bytes_of(tmp_path)["log.csv"] == bytes_of(adapter)["log.csv"]


def test_our_token_ids_are_those_that_trl_would_make(partner, encoded, examples, tmp_path):
    conversations = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": e.prompt}],
                "chosen": [{"role": "assistant", "content": e.chosen}],
                "rejected": [{"role": "assistant", "content": e.rejected}],
            }
            for e in examples
        ]
    )
    arguments = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_length=None)
    model, tokenizer = models.load(partner[0])
    theirs = DPOTrainer(model, args=arguments, train_dataset=conversations, processing_class=tokenizer).train_dataset
    ours = training.preference_dataset(*encoded)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert theirs[column][:] == ours[column][:]
