"""Answers scored after a prompt that is read once, against plain passes and TRL's own training."""

import copy

import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURES, WIDTH, random_ids, random_vector, tiny, with_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.lm import architecture, batches, likelihoods, shared_prompts, training
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair

SYSTEM = random_ids(4, 99)
BEGUN = random_ids(3, 98)  # how all answers to one of the prompts begin
TURNS = [[*SYSTEM, *random_ids(n, n)] for n in (3, 9, 1)]
SEQUENCES = [
    *(Tokens(TURNS[0], [*BEGUN, *random_ids(n, 20 + n)]) for n in (2, 5, 1, 4)),
    *(Tokens(TURNS[1], random_ids(n, 40 + n)) for n in (6, 1)),
    Tokens(TURNS[0], []),
    Tokens(TURNS[2], random_ids(3, 60)),
    Tokens(TURNS[0], BEGUN),
]
ALONE = [Tokens([7], random_ids(4, 1)), Tokens([7], random_ids(1, 2)), Tokens([7, 8], random_ids(2, 3))]
SHARING = ["llama", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "opt", "phi", "falcon", "gptj"]
FILLED = [s for s in SEQUENCES if s.response]


@pytest.fixture(autouse=True)
def no_model_is_small(monkeypatch):
    """Small ones are read plainly."""
    monkeypatch.setattr(architecture, "SMALL", 0)


def test_a_tree_holds_once_what_answers_begin_with_and_no_last_token():
    tree = shared_prompts._tree([1, 2], [[3, 4, 5], [3, 4, 6], [7], [3, 8, 9, 9]])
    assert tree.ids == [1, 2, 3, 4, 8, 9] and tree.parents == [-1, 0, 1, 2, 2, 4]
    assert tree.predicting == [[1, 2, 3], [1, 2, 3], [1], [1, 2, 4, 5]]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5]]
    assert [row.nonzero()[0].tolist() for row in tree.ancestors()] == seen


@pytest.mark.parametrize("model_type", SHARING)
@pytest.mark.parametrize("sequences", [SEQUENCES, ALONE, SEQUENCES[:1], SEQUENCES[4:5]])
def test_log_probabilities_are_those_of_plain_passes(model_type, sequences):
    model, deltas = tiny(model_type), torch.stack([torch.zeros(WIDTH), random_vector(WIDTH)])
    assert shared_prompts.agrees(model, sequences)
    for given in (None, deltas):
        found = shared_prompts._shared_logps(model, sequences, given, None)
        expected = likelihoods.response_logps(model, sequences, given)
        assert found == pytest.approx(expected.reshape(found.shape), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("model_type", ["mistral", "bloom", "llama", "gpt2"])
def test_any_model_s_answers_are_scored(model_type):
    """Mistral's window slides over padding, and Bloom knows positions by its mask: they are read plainly."""
    model, deltas = tiny(model_type), random_vector(3, WIDTH)
    assert shared_prompts.agrees(model, SEQUENCES) == (model_type in ("llama", "gpt2"))
    for given in (None, deltas):
        found = shared_prompts.answer_logps(model, SEQUENCES, given)
        expected = likelihoods.response_logps(model, SEQUENCES, given)
        assert found.shape == expected.shape and found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_a_recurrent_model_does_not_share():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    recurrent = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    with pytest.raises(shared_prompts.NotShared):
        shared_prompts.answer_states(recurrent, FILLED)
    assert not shared_prompts.agrees(recurrent, FILLED)


def test_where_logits_are_capped_deltas_are_added_to_the_states(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "gemma2", ARCHITECTURES["gemma"])
    model = tiny("gemma2", final_logit_softcapping=2.0)
    deltas = random_vector(2, WIDTH)
    assert shared_prompts._biases(model, deltas) is None
    found = shared_prompts._shared_logps(model, SEQUENCES, deltas, None)
    assert found == pytest.approx(likelihoods.response_logps(model, SEQUENCES, deltas), rel=1e-5, abs=1e-4)


def test_scores_do_not_depend_on_what_fits_into_memory(llama, monkeypatch):
    deltas = random_vector(2, WIDTH)
    together = shared_prompts._shared_logps(llama, SEQUENCES, deltas, None)
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 20)
    assert shared_prompts._shared_logps(llama, SEQUENCES, deltas, None) == pytest.approx(together, rel=1e-5)


def test_what_cannot_be_scored_is_refused(llama):
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        shared_prompts.answer_logps(llama, [Tokens([], [4])])
    with pytest.raises(ValueError, match="does not fit a model of width"):
        shared_prompts.answer_logps(llama, SEQUENCES, random_vector(2, WIDTH + 1))


@pytest.mark.parametrize("sequences", [FILLED, ALONE])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt2", "phi"])
def test_gradients_are_those_of_a_plain_pass(model_type, sequences):
    model = with_adapter(tiny(model_type))

    def gradients(states):
        loss = (states * random_vector(*states.shape)).sum()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        return torch.autograd.grad(loss, weights)

    states, of_token = shared_prompts.answer_states(model, sequences)
    inputs, attended = batches.right_padded([s.ids for s in sequences])
    plain = architecture.decoder(model)(input_ids=inputs, attention_mask=attended, use_cache=False)[0]
    plain = torch.cat([row[len(s.prompt) - 1 : len(s.ids) - 1] for row, s in zip(plain, sequences)])
    torch.testing.assert_close(states[of_token], plain, rtol=1e-4, atol=1e-4)
    for found, expected in zip(gradients(states[of_token]), gradients(plain), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("rank, nll_weight", [(2, 0.5), (0, 0.0)])
def test_training_has_trl_s_own_losses_and_metrics(tokenizer, tmp_path, monkeypatch, rank, nll_weight):
    base, read = copy.deepcopy(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=128)), []
    rows = [Tokens([*SYSTEM, *random_ids(2 + i % 5, i)], random_ids(1 + i % 4, i + 50)) for i in range(8)]
    others = [Tokens(row.prompt, random_ids(1 + i % 3, i + 90)) for i, row in enumerate(rows)]
    pairs = [TrainingPair(*both, (-20.0, -20.0)) for both in zip(rows, others)]
    recipe = Recipe(beta=1.0, learning_rate=1e-2, epochs=3, batch_size=4, rank=rank, nll_weight=nll_weight)
    whole = shared_prompts.answer_states
    monkeypatch.setattr(shared_prompts, "answer_states", lambda *args: read.append(1) or whole(*args))
    logs = []
    for small in (True, False):
        monkeypatch.setattr(architecture, "is_small", lambda model, small=small: small)
        folder = tmp_path / str(small)
        training.train(copy.deepcopy(base), tokenizer, pairs, recipe, 0, folder)
        logs.append(pd.read_csv(folder / "log.csv"))
        assert bool(read) == (not small)  # small models are trained as ever
    assert len(read) == 1 + 6  # it was tried first, then used at every step
    assert logs[0]["loss"].nunique() == 6
    pd.testing.assert_frame_equal(logs[1], logs[0], rtol=1e-3, atol=1e-4)
