"""Hidden states are those of a plain forward pass, however sequences are batched, and bad input is refused."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, CONTEXT, LAYERS, WIDTH, hook_count, random_ids, recorded, tiny, with_adapter

from helpers.lm import activations, architecture, batches
from helpers.lm.batches import Tokens

close = torch.testing.assert_close
SEQUENCES = [
    Tokens(random_ids(p, 10 * p + r), random_ids(r, p + r)) for p, r in [(3, 2), (11, 5), (1, 1), (6, 9), (2, 14)]
]


def forward_states(model, tokens: Tokens, path: str) -> dict[str, torch.Tensor]:
    """site -> (T, d) of one unpadded sequence: transformers' own report, and a hook on the last block."""
    with torch.no_grad(), recorded(model, path) as found:
        reported = model(torch.tensor([tokens.ids]), output_hidden_states=True, use_cache=False).hidden_states
    states = {f"resid[{l}]": reported[l][0] for l in range(LAYERS)}
    return states | {f"resid[{LAYERS}]": found[f"resid[{LAYERS}]"][0], "final": reported[-1][0]}


def test_states_are_those_of_a_plain_forward_pass_at_every_site(model_type, model):
    sites = architecture.sites(model)
    read = activations.hidden_states(model, SEQUENCES, sites, activations.POSITIONS)
    for i, sequence in enumerate(SEQUENCES):
        states = forward_states(model, sequence, ARCHITECTURES[model_type][1])
        assert list(states) == sites
        for site in sites:
            n = len(sequence.prompt)
            close(read[site, "prompt_last"][i], states[site][n - 1], atol=1e-4, rtol=1e-4)
            close(read[site, "response_mean"][i], states[site][n:].mean(0), atol=1e-4, rtol=1e-4)


def test_the_last_residual_stream_is_before_the_final_norm_and_final_is_after_it(llama):
    read = activations.hidden_states(llama, SEQUENCES, [f"resid[{LAYERS}]", "final"])
    before, after = read[f"resid[{LAYERS}]", "prompt_last"], read["final", "prompt_last"]
    close(llama.model.norm(before), after)
    assert (before - after).abs().max() > 0.1


def test_states_do_not_depend_on_batch_mates(model):
    together = activations.hidden_states(model, SEQUENCES, architecture.sites(model))
    for i, sequence in enumerate(SEQUENCES):
        alone = activations.hidden_states(model, [sequence], architecture.sites(model))
        for key, rows in together.items():
            close(rows[i], alone[key][0], atol=1e-4, rtol=1e-4)


def test_states_do_not_depend_on_the_padding_side(model_type, model):
    """Against a left-padded pass as `generate` makes it, with the position ids that such a pass needs."""
    short, long = SEQUENCES[0].prompt, SEQUENCES[1].prompt
    gap = len(long) - len(short)
    inputs = torch.tensor([[0] * gap + short, long])
    attended = torch.tensor([[0] * gap + [1] * len(short), [1] * len(long)])
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    extra = {} if model_type == "bloom" else {"position_ids": positions}  # bloom derives its own from the mask
    with torch.no_grad(), recorded(model, ARCHITECTURES[model_type][1]) as states:
        model(input_ids=inputs, attention_mask=attended, use_cache=False, **extra)
    read = activations.hidden_states(model, [Tokens(short), Tokens(long)], architecture.sites(model))
    for site in architecture.sites(model):
        close(read[site, "prompt_last"], states[site][:, -1], atol=1e-4, rtol=1e-4)


def test_states_that_go_to_files_are_those_that_stay_in_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 20)
    of = (model, SEQUENCES, architecture.sites(model), activations.POSITIONS)
    in_memory, read = activations.hidden_states(*of), activations.hidden_states(*of, folder=tmp_path)
    found = activations.Stored(activations.stored(tmp_path))
    assert found.keys() == in_memory.keys() and len(list(tmp_path.iterdir())) == len(found)
    for key, states in in_memory.items():
        assert torch.equal(found[key], states) and torch.equal(read[key], states)
    found["final", "prompt_last"][:] = 0  # what is read is nobody else's
    assert found["final", "prompt_last"].any()


def test_rows_keep_their_order_over_many_small_batches(llama, monkeypatch):
    sites = ["resid[1]"]
    at_once = activations.hidden_states(llama, SEQUENCES, sites)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    one_by_one = activations.hidden_states(llama, SEQUENCES, sites)
    close(at_once["resid[1]", "prompt_last"], one_by_one["resid[1]", "prompt_last"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 20, 64, 10_000])
def test_batches_hold_every_index_once_and_few_tokens(max_tokens):
    lengths = [random_ids(1, seed)[0] for seed in range(40)]
    found = list(batches.batches(lengths, max_tokens))
    assert sorted(i for batch in found for i in batch) == list(range(40))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


def test_states_with_the_adapter_off_are_the_base_s_and_hooks_work_through_peft(model):
    wrapped = with_adapter(model)
    sites = architecture.sites(model)
    expected = activations.hidden_states(model, SEQUENCES, sites)
    with wrapped.disable_adapter():
        off = activations.hidden_states(wrapped, SEQUENCES, sites)
    on = activations.hidden_states(wrapped, SEQUENCES, sites)
    for key in expected:
        assert torch.equal(off[key], expected[key])
        same = key[0] == "resid[0]"  # the adapter is on the blocks' linear layers, so what enters them is the base's
        assert torch.equal(on[key], expected[key]) == same


def test_states_come_as_float32_from_a_bfloat16_model(llama):
    read = activations.hidden_states(copy.deepcopy(llama).bfloat16(), SEQUENCES, ["final"])
    assert read["final", "prompt_last"].dtype == torch.float32
    assert read["final", "prompt_last"].shape == (len(SEQUENCES), WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_a_difference_of_states_rounded_each(dtype):
    """Of states with and without a displacement, whose coordinates are of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 2, WIDTH, dtype=torch.float64)
    states, moved = (scales * (2 + torch.rand(400, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(2))
    errors = (moved.to(dtype).double() - states.to(dtype).double() - (moved - states)).norm(dim=1)
    expected = activations.rounding(states, dtype)
    assert errors.square().mean().sqrt().item() == pytest.approx(expected.square().mean().sqrt().item(), rel=0.05)
    assert not activations.rounding(torch.zeros(1, 4), dtype).isnan().any()


def test_hooks_are_gone_after_an_exception(model):
    before = hook_count(model)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        activations.reading(model, architecture.sites(model), print),
    ):
        assert hook_count(model) == before + LAYERS + 2
        raise RuntimeError("in the middle")
    assert hook_count(model) == before


def test_hooks_are_gone_after_an_exception_in_the_forward_pass(llama):
    broken = copy.deepcopy(llama)
    broken.model.layers[1].mlp.down_proj.weight.data = torch.zeros(3, 3)
    before = hook_count(broken)
    with pytest.raises(RuntimeError):
        activations.hidden_states(broken, [Tokens([10])], ["resid[1]"])
    assert hook_count(broken) == before


def test_hooks_are_gone_when_a_later_site_is_unknown(llama):
    before = hook_count(llama)
    with pytest.raises(ValueError), activations.reading(llama, ["resid[1]", "resid[99]"], print):
        pass
    assert hook_count(llama) == before


@pytest.mark.parametrize(
    "sequences, sites, positions, message",
    [
        (SEQUENCES, ["resid[9]"], ["prompt_last"], r"Unknown site 'resid\[9\]'.*resid\[0\] to resid\[3\] and final"),
        (SEQUENCES, ["final"], ["prompt_first"], "Unknown position 'prompt_first'.*prompt_last, response_mean"),
        ([Tokens([5]), Tokens([], [4])], ["final"], ["prompt_last"], "Prompt 1 is empty"),
        ([Tokens([5] * CONTEXT, [4])], ["final"], ["prompt_last"], "Prompt 0 needs 65 tokens.*holds 64"),
        ([*SEQUENCES, Tokens([5])], ["final"], ["response_mean"], "Sequence 5 has no response.*prompt_last"),
        ([], ["final"], ["prompt_last"], "No prompts"),
    ],
)
def test_what_cannot_be_read_is_refused(llama, sequences, sites, positions, message):
    with pytest.raises(ValueError, match=message):
        activations.hidden_states(llama, sequences, sites, positions)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_states_are_refused_by_name(bad):
    broken = copy.deepcopy(tiny("llama"))
    broken.model.embed_tokens.weight[7] = bad
    sequences = [Tokens([5, 6]), Tokens([5, 7]), Tokens([7, 5])]
    with pytest.raises(ValueError, match=r"states at resid\[0\], prompt_last.*1 of 3.*first: prompt 1.*float32"):
        activations.hidden_states(broken, sequences, ["resid[0]"])


# --- Where memory does not suffice ---


def test_batches_shrink_until_they_fit_and_nothing_is_computed_twice():
    tried, made = [], []

    def compute(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        made.extend(batch)
        return batch

    found = list(batches.shrinking([5] * 20, 100, compute))
    assert sorted(made) == list(range(20)) and [i for batch in found for i in batch] == made
    assert tried[:4] == [20, 10, 5, 2] and set(tried[4:]) == {2}  # what fits is remembered


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_other_errors_and_a_single_row_that_does_not_fit_are_raised(error):
    def compute(batch):
        raise error

    with pytest.raises(type(error)):
        list(batches.shrinking([5], 100, compute))


def test_states_are_the_same_where_memory_sufficed_for_one_sequence_alone(llama, monkeypatch):
    expected = activations.hidden_states(llama, SEQUENCES, ["final"], activations.POSITIONS)
    read = activations._read

    def small(model, batch, *args):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(model, batch, *args)

    monkeypatch.setattr(activations, "_read", small)
    found = activations.hidden_states(llama, SEQUENCES, ["final"], activations.POSITIONS)
    for key, states in expected.items():
        close(found[key], states, atol=1e-5, rtol=1e-4)
