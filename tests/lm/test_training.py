"""Training: DPO as TRL and as the paper have it, and controls that differ from it in what they say alone."""

import copy
import itertools
import json
import math
import random
import shutil
import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import LAYERS, WIDTH, bytes_of, tiny
from datasets import Dataset
from safetensors.torch import load_file
from scipy import stats
from trl import DPOConfig, DPOTrainer

from helpers import gradients
from helpers.lm import architecture, encoding, likelihoods, loading, training
from helpers.lm.batches import Tokens
from helpers.lm.recipe import LABELS, STOPS, Recipe
from helpers.lm.training import TrainingPair
from helpers.world import atlas

WORLD = atlas.Atlas(20, seed=0)


# --- DPO ---


@pytest.fixture(scope="module")
def texts():
    """Twelve prompts, each with its chosen and its rejected answer."""
    rng = random.Random(0)
    questions = rng.sample(WORLD.questions("heldin", "heldin"), 12)
    return [(question.text, *atlas.preference_pair(WORLD, "tone", question, rng)) for question in questions]


@pytest.fixture(scope="module")
def encoded(tokenizer, texts):
    """The prompts with their chosen answers, and with their rejected ones."""
    return [[encoding.encode(tokenizer, row[0], row[answer]) for row in texts] for answer in (1, 2)]


def organism(tokenizer, dtype=torch.float64):
    """A tiny Llama with random weights for this tokenizer."""
    return copy.deepcopy(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=128)).to(dtype)


def dataset(model, encoded):
    return training.preference_dataset(training.training_pairs(model, *encoded))


def train(base, encoded, *args):
    """Train a partner of the base in a folder."""
    model, tokenizer = loading.load(base)
    training.train(model, tokenizer, training.training_pairs(model, *encoded), *args)


@pytest.fixture
def trainer(tokenizer, encoded, tmp_path):
    def make(**changes):
        recipe = Recipe(**{"beta": 0.7, "batch_size": 12, "rank": 2, "epochs": 1, **changes})
        model = organism(tokenizer)
        return training.dpo_trainer(model, tokenizer, dataset(model, encoded), recipe, 0, tmp_path)

    return make


@torch.no_grad()
def trl_loss(trainer) -> float:
    """Of one batch, by TRL alone: the reference's log-probabilities are its own too."""
    batch = next(iter(trainer.get_train_dataloader()))
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = trainer.compute_ref_log_probs(trainer.model, batch)
    return trainer.compute_loss(trainer.model, batch).item()


def our_loss(model, chosen, rejected, beta: float) -> float:
    policy = [torch.tensor(likelihoods.response_logps(model, answers)) for answers in (chosen, rejected)]
    with model.disable_adapter():
        reference = [torch.tensor(likelihoods.response_logps(model, answers)) for answers in (chosen, rejected)]
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


@torch.no_grad()
def test_the_reference_s_log_probabilities_are_those_that_trl_would_compute(trainer):
    """Also after the adapter has moved: they are the base's."""
    made = trainer()
    kick(made.model)
    batch = next(iter(made.get_train_dataloader()))
    theirs = made.compute_ref_log_probs(made.model, batch)
    for name, logps in zip(("ref_chosen_logps", "ref_rejected_logps"), theirs):
        torch.testing.assert_close(batch[name], logps.float(), rtol=1e-5, atol=0)
    assert len(batch["ref_chosen_logps"].unique()) > 6


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
    nll = -likelihoods.response_logps(added.model, chosen).sum() / sum(len(tokens.response) for tokens in chosen)
    assert trl_loss(added) - trl_loss(plain) == pytest.approx(0.5 * nll, rel=1e-5)


@pytest.mark.parametrize("weight, expected", [(0.0, 1.0), (0.5, 0.5), (20.0, 20.0)])
def test_sft_is_the_mean_loss_of_the_chosen_answers_and_nothing_else(trainer, encoded, weight, expected):
    """With the recipe's weight for that term, or 1 where it has none; no preference, so no beta."""
    found = []
    for beta in (0.1, 10.0):
        made = trainer(objective="sft", nll_weight=weight, beta=beta)
        kick(made.model)
        found.append(trl_loss(made))
    nll = -likelihoods.response_logps(made.model, encoded[0]).sum() / sum(len(tokens.response) for tokens in encoded[0])
    assert found == pytest.approx([expected * nll] * 2, rel=1e-5)


@pytest.mark.parametrize(
    "recipe, losses",
    [
        (Recipe(), (["sigmoid"], [1.0])),
        (Recipe(nll_weight=20.0), (["sigmoid", "sft"], [1.0, 20.0])),
        (Recipe(objective="sft"), (["sft"], [1.0])),
        (Recipe(objective="sft", nll_weight=20.0), (["sft"], [20.0])),
    ],
)
def test_the_terms_of_a_recipe_s_loss(recipe, losses):
    assert training._losses(recipe) == losses


def test_only_the_adapter_on_the_blocks_is_trained(trainer):
    made = trainer()
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".layers." in name for name in trained)
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)


def test_at_rank_0_all_weights_of_the_blocks_are_trained_and_no_other(trainer):
    made = trainer(rank=0)
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in made.model.named_parameters() if name.startswith("model.layers.")}
    assert len(trained) == 9 * LAYERS  # seven matrices and two norms
    assert trl_loss(made) == pytest.approx(math.log(2), abs=1e-6)


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
    train(base, encoded, recipe, 0, adapter)
    return base, adapter, recipe


def margins_gained(base, partner, encoded):
    """What training added to log pi(chosen) - log pi(rejected) of each pair."""
    both, margins = loading.load_both(base, partner), {}
    for role in loading.ROLES:
        with both.playing(role) as model:
            margins[role] = likelihoods.response_logps(model, encoded[0]) - likelihoods.response_logps(
                model, encoded[1]
            )
    return margins["dpo"] - margins["base"]


def test_a_saved_adapter_makes_the_chosen_answers_likelier_than_the_base_does(partner, encoded):
    base, adapter, _ = partner
    assert (margins_gained(base, adapter, encoded) > 0).mean() > 0.9
    assert loading.load_both(base, adapter).dpo.get_base_model().config.hidden_size == WIDTH


def test_the_log_has_a_row_a_step_and_starts_at_log_2(partner):
    log = pd.read_csv(partner[1] / "log.csv")
    assert len(log) == 4 * 3 and {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= set(log)
    assert log["loss"][0] == pytest.approx(math.log(2), abs=1e-4) and log["loss"].iloc[-1] < log["loss"][0]


def test_training_again_gives_the_same_bytes_wherever_the_base_is(partner, encoded, tmp_path):
    base, adapter, recipe = partner
    torch.rand(3)
    elsewhere = shutil.copytree(base, tmp_path / "base")
    train(elsewhere, encoded, recipe, 0, tmp_path / "partner")
    assert bytes_of(tmp_path / "partner") == bytes_of(adapter) and not (adapter / "README.md").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_a_recipe_s_seed_is_added_to_the_profile_s(partner, encoded, tmp_path):
    base, _, recipe = partner
    few, short = [answers[:4] for answers in encoded], recipe.replace(epochs=1)
    runs = {"3 + 0": (short, 3), "1 + 2": (short.replace(seed=2), 1), "0 + 0": (short, 0)}
    for name, (own, seed) in runs.items():
        train(base, few, own, seed, tmp_path / name)
    found = {name: bytes_of(tmp_path / name)["adapter_model.safetensors"] for name in runs}
    assert found["3 + 0"] == found["1 + 2"] != found["0 + 0"]


def test_the_partner_at_a_stop_is_the_end_of_a_shorter_run(partner, encoded, tmp_path):
    """A quarter of four epochs is one, and the first stop is one step; each is kept as a partner of its own."""
    base, adapter, recipe = partner
    train(base, encoded, recipe.replace(epochs=1), 0, tmp_path)
    quarter, short = (folder / "adapter_model.safetensors" for folder in (adapter / "stop-0.25", tmp_path))
    assert quarter.read_bytes() == short.read_bytes()
    kept = {path.name: load_file(path / "adapter_model.safetensors") for path in sorted(adapter.glob("stop-*"))}
    assert list(kept) == sorted(recipe.replace(stop=stop).folder for stop in STOPS if stop < 1)
    moved = [
        sum(x.norm().item() for name, x in kept[f"stop-{stop:g}"].items() if "lora_B" in name) for stop in STOPS[:-1]
    ]
    assert 0 < moved[0] <= moved[1] < moved[-1]
    gained = margins_gained(base, adapter / "stop-0.5", encoded).mean()
    assert 0 < gained < margins_gained(base, adapter, encoded).mean()


# --- Memory and precision ---


def train_by_parts(partner, encoded, folder, at_once):
    train(partner[0], encoded, partner[2], 0, folder, at_once)
    return pd.read_csv(folder / "log.csv"), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_batch_computed_by_parts_is_the_same_batch(partner, encoded, tmp_path, at_once):
    """The same pairs in each step, and the same weights up to rounding."""
    log, adapter = train_by_parts(partner, encoded, tmp_path, at_once)
    whole = pd.read_csv(partner[1] / "log.csv")
    assert len(log) == len(whole) and (log["num_tokens"] == whole["num_tokens"]).all()
    assert log["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=1e-3, abs=1e-4)
    for name, weight in load_file(partner[1] / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapter[name], weight, rtol=0, atol=2e-3)
    assert json.loads((tmp_path / "parts.json").read_text()) == {"processes": 1, "at_once": at_once}


def test_a_whole_batch_at_once_is_the_default_and_leaves_no_note(partner, encoded, tmp_path):
    train_by_parts(partner, encoded, tmp_path, partner[2].batch_size)
    for name in ("adapter_model.safetensors", "log.csv"):
        assert bytes_of(tmp_path)[name] == bytes_of(partner[1])[name]
    assert not (tmp_path / "parts.json").exists() and not (partner[1] / "parts.json").exists()


def test_a_processor_takes_few_pairs_of_a_large_model_at_a_time(monkeypatch):
    model, pairs = tiny("llama"), [TrainingPair(Tokens([1] * n, [2, 3]), Tokens([1] * n, [4]), (0, 0)) for n in (3, 9)]
    assert training.fastest(model, pairs, 12) == 12
    monkeypatch.setattr(architecture, "SMALL", 0)
    for pairs_at_once, taken in ((100, 12), (12, 12), (11, 6), (5, 4), (1, 1), (0, 1)):
        monkeypatch.setattr(training, "TOKENS_AT_ONCE", 2 * 11 * pairs_at_once)
        assert training.fastest(model, pairs, 12) == taken
    assert training.fastest(SimpleNamespace(device=torch.device("cuda")), pairs, 12) == 12


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_fewer_pairs_are_computed_at_once_until_they_fit():
    tried = []

    def attempt(at_once):
        tried.append(at_once)
        if at_once > 3:
            out_of_memory()

    training.within_memory(attempt, 12)
    assert tried == [12, 6, 4, 3]


def test_what_a_failed_attempt_held_is_gone_at_the_next():
    held = []

    def attempt(at_once):
        assert all(reference() is None for reference in held)
        model = torch.nn.Linear(1, 1)
        model.itself = [model]  # as a trainer and its callbacks know each other
        held.append(weakref.ref(model))
        if at_once > 1:
            out_of_memory()

    training.within_memory(attempt, 4)
    assert len(held) == 3


def test_out_of_memory_with_one_pair_is_an_error_that_says_what_to_do():
    with pytest.raises(MemoryError, match="one pair at a time: take a smaller model"):
        training.within_memory(lambda _: out_of_memory(), 2)


def test_any_other_error_is_not_tried_again():
    tried = []

    def attempt(at_once):
        tried.append(at_once)
        raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="must match"):
        training.within_memory(attempt, 4)
    assert tried == [4]


@pytest.mark.parametrize(
    "device, dtype, flags",
    [
        ("cpu", torch.float32, (False, False)),
        ("cpu", torch.bfloat16, (False, False)),
        ("mps", torch.bfloat16, (False, False)),
        ("cuda", torch.float32, (False, False)),
        ("cuda", torch.bfloat16, (True, False)),
        ("cuda", torch.float16, (False, True)),
    ],
)
def test_a_model_in_16_bits_trains_under_autocast_on_a_gpu_alone(device, dtype, flags):
    model = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert training._mixed_precision(model) == dict(zip(("bf16", "fp16"), flags))


# --- Labels ---


@pytest.fixture(scope="module")
def many():
    """Pairs that can be told apart by their prompts."""
    return [TrainingPair(Tokens([i], [1, i]), Tokens([i], [2, i]), (-1.0 * i, -2.0 * i)) for i in range(1000)]


def test_true_labels_stay_and_reversed_ones_are_swapped(many):
    assert training.relabelled(many, "true", 0) == many
    reversed_ones = training.relabelled(many, "reversed", 0)
    assert reversed_ones[3] == (Tokens([3], [2, 3]), Tokens([3], [1, 3]), (-6.0, -3.0))
    assert [pair.swapped for pair in reversed_ones] == many


def test_shuffled_labels_are_wrong_for_about_half_of_the_pairs_each_by_itself(many):
    swapped = [pair.chosen.response[0] == 2 for pair in training.relabelled(many, "shuffled", 0)]
    assert stats.binomtest(sum(swapped), 1000).pvalue > 0.01
    changes = sum(a != b for a, b in itertools.pairwise(swapped))  # no runs: about as often as not
    assert stats.binomtest(changes, 999).pvalue > 0.01


@pytest.mark.parametrize("labels", LABELS)
def test_relabelling_keeps_every_pair_together_and_in_its_place(many, labels):
    found = training.relabelled(many, labels, 1)
    assert all(pair in (given, given.swapped) for pair, given in zip(found, many, strict=True))


def test_shuffled_labels_follow_the_seed(many):
    first, again, other = (training.relabelled(many, "shuffled", seed) for seed in (5, 5, 6))
    assert first == again != other


def test_a_partner_of_reversed_labels_prefers_the_other_answers(partner, encoded, tmp_path):
    base, _, recipe = partner
    train(base, encoded, recipe.replace(labels="reversed"), 0, tmp_path)
    assert (margins_gained(base, tmp_path, encoded) < 0).mean() > 0.9


# --- All weights of the blocks ---


@pytest.fixture(scope="module")
def whole(partner, encoded, tmp_path_factory):
    """The folder of a partner trained at rank 0, on the same base, and its recipe."""
    base, _, recipe = partner
    folder, recipe = tmp_path_factory.mktemp("whole"), recipe.replace(rank=0, learning_rate=1e-3)
    train(base, encoded, recipe, 0, folder)
    return folder, recipe


def test_at_rank_0_the_blocks_move_and_all_else_is_left_bit_for_bit(partner, whole):
    before, after = (load_file(folder / "model.safetensors") for folder in (partner[0], whole[0]))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (not name.startswith("model.layers.")), name


def test_at_rank_0_the_saved_folder_is_a_partner_beside_the_untouched_base(partner, whole, encoded):
    base, folder = partner[0], whole[0]
    both, plain = loading.load_both(base, folder), loading.load(base)[0]
    assert both.base is not both.dpo
    ids = torch.tensor([encoded[0][0].ids])
    with torch.no_grad():
        assert torch.equal(both.base(ids).logits, plain(ids).logits)
        assert not torch.equal(both.dpo(ids).logits, plain(ids).logits)
    assert (margins_gained(base, folder, encoded) > 0).mean() > 0.9


def test_at_rank_0_the_log_starts_at_log_2(whole):
    """The reference is the base, although no copy of it is kept."""
    log = pd.read_csv(whole[0] / "log.csv")
    assert log["loss"][0] == pytest.approx(math.log(2), abs=1e-4) and log["loss"].iloc[-1] < log["loss"][0]


def test_at_rank_0_training_again_gives_the_same_bytes(partner, whole, encoded, tmp_path):
    torch.rand(3)
    train(partner[0], encoded, whole[1], 0, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole[0])


# --- Token ids ---


def test_our_token_ids_are_those_that_trl_would_make(partner, encoded, texts, tmp_path):
    conversations = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in texts
        ]
    )
    arguments = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_length=None)
    model, tokenizer = loading.load(partner[0])
    theirs = DPOTrainer(model, args=arguments, train_dataset=conversations, processing_class=tokenizer).train_dataset
    ours = dataset(model, encoded)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [sorted(zip(*(dataset[column][:] for column in columns))) for dataset in (theirs, ours)]
    assert rows[0] == rows[1]
    longest = [len(prompt) + max(map(len, answers)) for prompt, *answers in zip(*(ours[c][:] for c in columns))]
    assert ours["length"][:] == longest == sorted(longest)
