"""Training: DPO as TRL and as the paper have it."""

import copy
import math
import random

import pandas as pd
import pytest
import torch
from conftest import LAYERS, WIDTH, bytes_of, tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from helpers import atlas, gradients, metrics, models, preferences, training
from helpers.profiles import Recipe

WORLD = atlas.Atlas(20, seed=0)


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
    assert trl_loss(made) == pytest.approx(expected, rel=1e-6) and abs(expected - math.log(2)) > 1e-3


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
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [sorted(zip(*(dataset[column][:] for column in columns))) for dataset in (theirs, ours)]
    assert rows[0] == rows[1]
    longest = [len(prompt) + max(map(len, answers)) for prompt, *answers in zip(*(ours[c][:] for c in columns))]
    assert ours["length"][:] == longest == sorted(longest)
