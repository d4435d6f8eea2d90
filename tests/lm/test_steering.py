"""Steering adds lambda * v at one site, everywhere it should and nowhere else, and a vector knows its model."""

import copy
import dataclasses
import itertools
import json
import re

import pytest
import torch
from conftest import ARCHITECTURES, WIDTH, hook_count, random_ids, random_vector, recorded, tiny, with_adapter

from helpers.lm import architecture, steering
from helpers.lm.steering import SteeringVector

close = torch.testing.assert_close
LENGTH = 12  # beyond the sliding window of the tiny Mistral
IDS = torch.tensor([random_ids(LENGTH, 1), random_ids(LENGTH, 2), random_ids(LENGTH, 3)])
V = random_vector(WIDTH)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def all_states(model, path, delta=None, site=None, start=0, stop=None):
    """site -> states of a plain pass, steered where a delta is given; recorded by hooks that are none of helpers'."""
    if delta is None:
        with recorded(model, path) as found:
            model(input_ids=IDS, use_cache=False)
        return found
    with steering.added(model, site, delta, start, stop), recorded(model, path) as found:
        model(input_ids=IDS, use_cache=False)
    return found


def vector(model, v=V, site="resid[2]", name="v") -> SteeringVector:
    return SteeringVector(
        v, site, "prompt_last", name, architecture.signature(model), "float32", 3.5, 7, "atlas", "abc"
    )


@pytest.mark.parametrize("dose", [1.0, -2.5])
def test_exactly_dose_times_v_is_added_at_one_site_and_earlier_sites_are_untouched(model_type, model, dose):
    path = ARCHITECTURES[model_type][1]
    before = all_states(model, path)
    sites = architecture.sites(model)
    for i, site in enumerate(sites):
        after = all_states(model, path, dose * V, site)
        assert torch.equal(after[site], before[site] + dose * V)
        for earlier in sites[:i]:
            assert torch.equal(after[earlier], before[earlier])
        for later in sites[i + 1 :]:
            assert (after[later] - before[later]).abs().max() > 1e-3


def test_only_positions_from_the_start_on_are_steered(model_type, model):
    path = ARCHITECTURES[model_type][1]
    before = all_states(model, path)
    for site in architecture.sites(model):
        after = all_states(model, path, V, site, start=5)
        assert torch.equal(after[site][:, :5], before[site][:, :5])
        assert torch.equal(after[site][:, 5:], before[site][:, 5:] + V)


@pytest.mark.parametrize("v", [V, random_vector(3, WIDTH, seed=4)], ids=["one vector", "one a row"])
def test_each_row_may_start_elsewhere(llama, v):
    starts = torch.tensor([0, 4, LENGTH])
    before = all_states(llama, "model.layers")["resid[1]"]
    after = all_states(llama, "model.layers", v, "resid[1]", starts)["resid[1]"]
    for row, start in enumerate(starts):
        delta = v if v.ndim == 1 else v[row]
        assert torch.equal(after[row, :start], before[row, :start])
        assert torch.equal(after[row, start:], before[row, start:] + delta)


def test_positions_from_the_stop_on_are_untouched(model_type, model):
    path = ARCHITECTURES[model_type][1]
    before = all_states(model, path)
    for site in architecture.sites(model):
        after = all_states(model, path, V, site, start=2, stop=5)
        for untouched in (slice(0, 2), slice(5, None)):
            assert torch.equal(after[site][:, untouched], before[site][:, untouched])
        assert torch.equal(after[site][:, 2:5], before[site][:, 2:5] + V)


def test_rows_that_start_elsewhere_stop_together(llama):
    before = all_states(llama, "model.layers")["resid[2]"]
    after = all_states(llama, "model.layers", V, "resid[2]", torch.tensor([0, 4, 9]), stop=7)["resid[2]"]
    for row, span in enumerate((slice(0, 7), slice(4, 7), slice(0, 0))):
        expected = before[row].clone()
        expected[span] += V
        assert torch.equal(after[row], expected)


def test_without_a_stop_the_last_position_is_steered_and_a_stop_at_the_start_steers_nothing(model):
    plain = logits(model)
    with steering.added(model, "resid[1]", V, stop=LENGTH):
        whole = logits(model)
    with steering.added(model, "resid[1]", V):
        assert torch.equal(logits(model), whole)
    with steering.added(model, "resid[1]", V, start=3, stop=3):
        assert torch.equal(logits(model), plain)


def test_a_dose_of_zero_changes_not_one_bit(model):
    plain = logits(model)
    for site in architecture.sites(model):
        for zero in (torch.zeros(WIDTH), -torch.zeros(WIDTH), torch.zeros(3, WIDTH), 0.0 * V):
            with steering.added(model, site, zero):
                assert torch.equal(logits(model), plain)


def test_a_zero_row_changes_not_one_bit_beside_other_doses(model):
    plain = logits(model)
    doses = torch.tensor([0.0, 1.0, -3.0])
    for site in architecture.sites(model):
        with steering.added(model, site, doses[:, None] * V):
            steered = logits(model)
        assert torch.equal(steered[0], plain[0])
        assert (steered[1:] - plain[1:]).abs().amax((1, 2)).min() > 1e-3


def test_a_zero_dose_keeps_even_the_sign_of_zeros():
    model = copy.deepcopy(tiny("llama"))
    model.model.embed_tokens.weight.copy_(-0.0 * model.model.embed_tokens.weight.abs())
    states = all_states(model, "model.layers", torch.zeros(WIDTH), "resid[0]")["resid[0]"]
    assert states.signbit().all()


def test_doses_in_one_batch_equal_doses_one_by_one(model):
    doses = torch.tensor([0.5, 1.0, -3.0])
    for site in architecture.sites(model):
        with steering.added(model, site, doses[:, None] * V):
            together = logits(model)
        for row, dose in enumerate(doses):
            with steering.added(model, site, dose * V):
                close(together[row], logits(model, IDS[row : row + 1])[0], atol=1e-4, rtol=1e-4)


def test_adding_at_final_is_a_constant_logit_bias(model_type):
    model = copy.deepcopy(tiny(model_type)).double()
    W = model.get_output_embeddings().weight
    for dose in (0.5, -4.0):
        with steering.added(model, "final", dose * V.double()):
            bias = logits(model)
        bias = bias - logits(model)
        close(bias, (dose * W @ V.double()).expand_as(bias), atol=1e-10, rtol=0)


@pytest.mark.parametrize("site", ["resid[0]", "resid[2]", "resid[3]", "final"])
def test_steering_does_not_depend_on_the_kv_cache(model, site):
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    asked = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    runs = []
    for use_cache in (True, False):
        with steering.added(model, site, 2 * V, start=LENGTH - 1):
            runs.append(model.generate(**inputs, **asked, use_cache=use_cache))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=1e-3, rtol=1e-3)
    with steering.added(model, site, 2 * V, start=LENGTH - 1):
        at_once = logits(model, runs[0].sequences)[:, LENGTH - 1 : -1]
    close(torch.stack(runs[0].logits, 1), at_once, atol=1e-3, rtol=1e-3)
    unsteered = logits(model, runs[0].sequences)[:, LENGTH - 1 : -1]
    assert (at_once - unsteered).abs().amax((0, 2)).min() > 1e-2  # at every step, the cached ones too


@torch.no_grad()
def continued(model, cache, ids):
    """The logits of tokens read one after the other from a KV cache, which is left as it was."""
    cache, found = copy.deepcopy(cache), []
    for token in ids.T:
        found.append(model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("site", ["resid[0]", "resid[2]", "final"])
def test_a_stop_counts_what_the_kv_cache_holds(model, site):
    """Beyond the stop not one bit changes: what a steered prompt leaves behind is in the cache alone."""
    prompt, answer = IDS[:, :7], IDS[:, 7:]
    with steering.added(model, site, V, stop=7), torch.no_grad():
        steered = model(input_ids=prompt, use_cache=True)
        inside = continued(model, steered.past_key_values, answer)
    assert torch.equal(inside, continued(model, steered.past_key_values, answer))
    with steering.added(model, site, V, stop=7):
        close(inside, logits(model)[:, 7:], atol=1e-3, rtol=1e-3)
    with steering.added(model, site, V, stop=9), torch.no_grad():  # the next two tokens too
        beyond = continued(model, steered.past_key_values, answer)
    assert ((beyond - inside)[:, :2].abs().amax((0, 2)) > 1e-2).all()
    unsteered = logits(model)
    assert (steered.logits - unsteered[:, :7]).abs().max() > 1e-2
    if site == "final":  # which no later token attends to
        close(inside, unsteered[:, 7:], atol=1e-3, rtol=1e-3)
    else:
        assert (inside - unsteered[:, 7:]).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["response", 0])
def test_steering_does_not_depend_on_the_padding_side(model, start):
    """The last logits of a left-padded prompt, as `generate` makes them, and of an unpadded one."""
    prompts = [random_ids(5, 7), random_ids(9, 8)]
    inputs = torch.tensor([[0] * 4 + prompts[0], prompts[1]])
    attended = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    with steering.added(model, "resid[1]", V, start=8 if start == "response" else 0):
        padded = model.generate(
            input_ids=inputs, attention_mask=attended, max_new_tokens=1, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        ).logits[0]  # fmt: skip
    for row, prompt in enumerate(prompts):
        with steering.added(model, "resid[1]", V, start=len(prompt) - 1 if start == "response" else 0):
            alone = logits(model, torch.tensor([prompt]))[0, -1]
        close(padded[row], alone, atol=1e-3, rtol=1e-3)


def test_steering_works_through_peft_and_the_adapter_off_is_the_base(model):
    wrapped = with_adapter(model)
    for site in architecture.sites(model):
        with steering.added(model, site, V):
            expected = logits(model)
        with wrapped.disable_adapter(), steering.added(wrapped, site, V):
            assert torch.equal(logits(wrapped), expected)
    with steering.added(wrapped, "resid[1]", V):
        assert (logits(wrapped) - expected).abs().max() > 1e-2


def test_two_vectors_add_up_at_one_site(llama):
    u = random_vector(WIDTH, seed=9)
    with steering.added(llama, "resid[1]", u), steering.added(llama, "resid[1]", V):
        both = logits(llama)
    with steering.added(llama, "resid[1]", u + V):
        close(both, logits(llama), atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_afterwards_even_after_an_exception(model):
    plain, before = logits(model), hook_count(model)
    for site in architecture.sites(model):
        with pytest.raises(RuntimeError, match="in the middle"), steering.added(model, site, V):
            assert hook_count(model) > before
            raise RuntimeError("in the middle")
        assert hook_count(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "site, delta, message",
    [
        ("resid[4]", V, r"Unknown site 'resid\[4\]'"),
        ("norm", V, "Unknown site 'norm'"),
        ("final", random_vector(5), "width 5 does not fit a model of width 32"),
        ("final", random_vector(3, 5), "width 5 does not fit"),
        ("final", V / 0, "not finite"),
        ("final", V * float("nan"), "not finite"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_no_hook(llama, site, delta, message):
    before = hook_count(llama)
    with pytest.raises(ValueError, match=message), steering.added(llama, site, delta):
        pass
    assert hook_count(llama) == before


# --- Deltas by prompt and token ---


@pytest.mark.parametrize(
    "shape, of",
    [
        ((2, 5), lambda given, arm, i, t: given[arm]),
        ((2, 3, 5), lambda given, arm, i, t: given[arm, i]),
        ((2, 3, 4, 5), lambda given, arm, i, t: given[arm, i, t]),
        ((2, 1, 4, 5), lambda given, arm, i, t: given[arm, 0, t]),
        ((2, 3, 1, 5), lambda given, arm, i, t: given[arm, i, 0]),
    ],
)
def test_by_prompt_says_what_each_arm_prompt_and_token_is_given(shape, of):
    given = random_vector(*shape)
    found = steering.by_prompt(given, 3)
    assert found.shape == (2, 3, shape[2] if len(shape) == 4 else 1, 5)
    for arm, i, t in itertools.product(*map(range, found.shape[:3])):
        assert torch.equal(found[arm, i, t], of(given, arm, i, t))


def test_of_one_prompt_every_shape_is_that_prompt_s():
    for shape in ((2, 5), (2, 1, 5), (2, 1, 4, 5)):
        given = random_vector(*shape)
        assert torch.equal(steering.by_prompt(given, 1).flatten(), given.flatten())


@pytest.mark.parametrize("shape", [(5,), (2, 4, 5), (2, 1, 5), (2, 2, 4, 5), (1, 2, 3, 4, 5)])
def test_deltas_of_another_shape_are_refused_by_their_shape(shape):
    """One prompt's deltas are every prompt's where they are told by token alone, lest (prompts, 1, d) pass for it."""
    expected = rf"\(arms, d\), \(arms, 3, d\) or \(arms, 1 or 3, tokens, d\), got shape {re.escape(str(shape))}\.$"
    with pytest.raises(ValueError, match=expected):
        steering.by_prompt(torch.ones(shape), 3)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (0, 1, 4, 5)])
def test_no_arm_at_all_is_refused(shape):
    with pytest.raises(ValueError, match=r"There is no arm to compute: give at least one delta\."):
        steering.by_prompt(torch.ones(shape), 3)


# --- SteeringVector ---


def test_a_vector_survives_saving_and_loading(llama, tmp_path):
    v = vector(llama)
    v.save(tmp_path / "new" / "folder")
    loaded = SteeringVector.load(tmp_path / "new" / "folder", "v")
    assert torch.equal(loaded.vector, v.vector)
    for f in dataclasses.fields(v):
        if f.name != "vector":
            assert getattr(loaded, f.name) == getattr(v, f.name)
    assert loaded.norm == pytest.approx(V.norm().item())


@pytest.mark.parametrize("dose", [1.0, -0.5, 0.0])
def test_applying_a_vector_adds_its_dose_at_its_site(llama, dose):
    with steering.added(llama, "resid[2]", dose * V, start=3):
        expected = logits(llama)
    with vector(llama).applied(llama, dose, start=3):
        assert torch.equal(logits(llama), expected)


def test_a_vector_fits_an_adapter_on_its_model(llama):
    vector(llama).check_fits(with_adapter(llama))


def reembedded(model):
    other = copy.deepcopy(model)
    other.lm_head.weight[3, 4] += 1e-3
    return other


@pytest.mark.parametrize(
    "other, what",
    [
        (lambda: tiny("llama", hidden_size=16), "width is 16.*32"),
        (lambda: tiny("llama", num_hidden_layers=2), "layers is 2.*3"),
        (lambda: tiny("mistral"), "architecture is MistralForCausalLM.*LlamaForCausalLM"),
        (lambda: reembedded(tiny("llama")), "unembedding is"),
    ],
)
def test_a_vector_is_refused_by_another_model(llama, other, what):
    with pytest.raises(ValueError, match=f"The steering vector v does not fit this model: {what}"):
        vector(llama).check_fits(other())
    with pytest.raises(ValueError, match="does not fit"), vector(llama).applied(other()):
        pass


@pytest.mark.parametrize("bad", [V / 0, random_vector(2, WIDTH)], ids=["not finite", "a matrix"])
def test_what_is_no_vector_is_refused(llama, bad):
    with pytest.raises(ValueError, match="must be one finite vector"):
        vector(llama, bad)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_missing_file_is_named(llama, tmp_path, suffix):
    vector(llama).save(tmp_path)
    (tmp_path / f"v.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"v\.{suffix} does not exist"):
        SteeringVector.load(tmp_path, "v")


@pytest.mark.parametrize("other", [3 * V, -V, V.flip(0)], ids=["longer", "opposite", "same norm"])
def test_files_that_do_not_belong_together_are_refused(llama, tmp_path, other):
    vector(llama).save(tmp_path)
    vector(llama, other, name="other").save(tmp_path)
    (tmp_path / "other.safetensors").replace(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="files of the steering vector v do not belong together"):
        SteeringVector.load(tmp_path, "v")


@pytest.mark.parametrize("torn", ["", "{", json.dumps({"norm": 1.0}), "[]"])
def test_a_torn_description_is_refused_by_name(llama, tmp_path, torn):
    vector(llama).save(tmp_path)
    (tmp_path / "v.json").write_text(torn)
    with pytest.raises(ValueError, match=r"v\.json"):
        SteeringVector.load(tmp_path, "v")


def test_a_torn_vector_file_is_refused_by_name(llama, tmp_path):
    vector(llama).save(tmp_path)
    whole = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"v\.safetensors"):
        SteeringVector.load(tmp_path, "v")
