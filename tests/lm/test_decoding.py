"""Samples are exact, comparable between arms, and do not depend on what else is in the batch."""

import copy
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONTEXT, LAYERS, WIDTH, random_ids, random_vector, tiny, with_adapter
from scipy import stats
from transformers import AutoModelForCausalLM, Phi3Config

from helpers.lm import architecture, decoding, encoding, loading, steering

END = 2
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=END, chat_template=None)
PROMPTS = [random_ids(length, seed) for seed, length in enumerate([7, 3, 12, 3, 1, 9])]
V = 2 * random_vector(WIDTH)


def sample(model, prompts=PROMPTS, new_tokens=8, seed=5, **kwargs):
    return decoding.sample(model, TOKENIZER, prompts, new_tokens, seed, **kwargs)


@torch.no_grad()
def next_probabilities(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()


def answer_probabilities(model, prompt) -> dict[tuple, float]:
    """Every answer of at most two tokens, and its exact probability."""
    first = next_probabilities(model, prompt)
    exact = {(): first[END]}
    for a in set(range(len(first))) - {END}:
        second = next_probabilities(model, [*prompt, a])
        exact |= {((a, b) if b != END else (a,)): first[a] * second[b] for b in range(len(second))}
    return exact


@pytest.mark.parametrize("dose", [None, 0.5])
def test_sampled_answers_have_the_model_s_own_distribution(dose):
    model, prompt, n = tiny("llama", vocab_size=5), [3, 4, 1], 4000
    if dose is None:
        answers, exact = sample(model, [prompt] * n, 2)[0], answer_probabilities(model, prompt)
    else:
        answers = sample(model, [prompt] * n, 2, site="final", deltas=dose * V[None])[0]
        with steering.added(model, "final", dose * V, start=len(prompt) - 1):
            exact = answer_probabilities(model, prompt)
    counts = Counter(map(tuple, answers))
    assert set(counts) <= set(exact)
    rare = [a for a, p in exact.items() if p * n < 5]
    cells = [[a] for a in exact if a not in rare] + ([rare] if rare else [])
    observed = np.array([sum(counts[a] for a in cell) for cell in cells])
    expected = n * np.array([sum(exact[a] for a in cell) for cell in cells])
    assert len(cells) > 8
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def test_an_answer_stops_at_whatever_ends_it_first(llama, monkeypatch):
    one, more = sample(llama, new_tokens=30)[0], Counter()
    others = [token for answer in one for token in answer][:3]
    monkeypatch.setattr(encoding, "ends", lambda tokenizer: [END, *others])
    for answer, longer in zip(sample(llama, new_tokens=30)[0], one):
        first = next((i for i, token in enumerate(longer) if token in others), len(longer))
        more[first < len(longer)] += 1
        assert answer == longer[:first]
    assert more[True]


def test_two_seeds_give_two_samples_and_one_seed_the_same(llama):
    assert sample(llama, seed=5) == sample(llama, seed=5) != sample(llama, seed=6)


def test_two_prompts_that_are_equal_get_samples_of_their_own(llama):
    answers = sample(llama, [PROMPTS[0]] * 6)[0]
    assert len(set(map(tuple, answers))) == 6


def test_arms_share_their_random_numbers(model):
    """Arms without a dose are identical, to each other and to a run without a hook; a dosed arm is not."""
    deltas = torch.stack([torch.zeros(WIDTH), V, torch.zeros(WIDTH)])
    arms = sample(model, site="resid[1]", deltas=deltas)
    assert arms[0] == arms[2] == sample(model)[0]
    assert arms[1] != arms[0]


@pytest.mark.parametrize("span", decoding.SPANS)
def test_an_arm_does_not_depend_on_the_other_arms(llama, span):
    together = sample(llama, site="resid[2]", deltas=torch.stack([-V, 0.5 * V, V]), span=span)
    assert len(together) == 3
    assert together[1] == sample(llama, site="resid[2]", deltas=0.5 * V[None], span=span)[0]


@pytest.mark.parametrize("seed", [5, None])
def test_an_answer_does_not_depend_on_batch_mates(model, seed):
    deltas = torch.stack([torch.zeros(WIDTH), V])
    together = sample(model, seed=seed, site="resid[2]", deltas=deltas)
    alone = sample(model, PROMPTS[:1], seed=seed, site="resid[2]", deltas=deltas)
    assert [arm[0] for arm in together] == [arm[0] for arm in alone]


@pytest.mark.parametrize("site", ["resid[1]", "final"])
def test_answers_do_not_depend_on_when_ended_rows_leave(model, monkeypatch, site):
    kwargs = {"site": site, "deltas": torch.stack([0 * V, V, -V]), "new_tokens": 12}
    whole = sample(model, **kwargs)
    for idle in (0, 0.5, 1):
        monkeypatch.setattr(decoding, "MAX_IDLE", idle)
        assert sample(model, **kwargs) == whole


@pytest.mark.parametrize("site", ["final", "resid[1]"])
def test_draws_of_one_prompt_have_the_model_s_own_distribution(site):
    """Together and beside another arm, each draw independent of the others."""
    model, prompt, n = tiny("llama", vocab_size=5), [3, 4, 1], 4000
    deltas = torch.stack([0 * V, 0.5 * V])
    both = sample(model, [prompt], 2, site=site, deltas=deltas, draws=n)
    with steering.added(model, site, 0.5 * V, start=len(prompt) - 1):
        steered = answer_probabilities(model, prompt)
    for answers, exact in zip((both[:n], both[n:]), (answer_probabilities(model, prompt), steered)):
        counts = Counter(tuple(answer[0]) for answer in answers)
        likely = [a for a, p in exact.items() if p * n >= 5]
        assert sum(counts[a] for a in exact) == n
        rare = [a for a in exact if a not in likely]
        cells = [[a] for a in likely] + ([rare] if rare else [])
        observed = np.array([sum(counts[a] for a in cell) for cell in cells])
        expected = n * np.array([sum(exact[a] for a in cell) for cell in cells])
        assert stats.chisquare(observed, expected * n / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize("site", ["final", "resid[1]"])
def test_arms_share_the_random_numbers_of_each_draw_and_do_not_depend_on_each_other(llama, site):
    deltas = torch.stack([0 * V, 0.3 * V])
    both = sample(llama, site=site, deltas=deltas, draws=4)
    alone = sample(llama, site=site, deltas=deltas[1:], draws=4)
    assert both[4:] == alone and both[:4] == sample(llama, draws=4)
    assert len({str(draw) for draw in both[:4]}) == 4


def test_a_greedy_answer_is_one_whatever_the_draws(llama):
    assert sample(llama, seed=None, draws=1)[0] == sample(llama, seed=None)[0]


def said_alone(model, prompt, i, delta, new_tokens, seed) -> list[int]:
    """An answer by plain forward passes of one sequence, without a cache."""
    noise, ids = decoding.GumbelNoise([i], seed), []
    with steering.added(model, "final", delta, start=len(prompt) - 1):
        while len(ids) < new_tokens:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[:, -1]
            ids.append(noise.added(logits, torch.tensor([i])).argmax().item())
            if ids[-1] == END:
                return ids[:-1]
    return ids


def test_arms_that_share_their_states_at_final_say_what_each_says_alone(model):
    prompts = PROMPTS[:4]
    deltas = torch.stack([0 * V, 0.5 * V, -V])[:, None].repeat(1, len(prompts), 1)
    deltas[2, ::2] *= 0.1  # some prompts have deltas of their own
    arms = sample(model, prompts, new_tokens=10, site="final", deltas=deltas)
    for arm, own in zip(arms, deltas):
        for i, (prompt, delta) in enumerate(zip(prompts, own)):
            assert arm[i] == said_alone(model, prompt, i, delta, 10, seed=5)
    assert arms[0] != arms[1] != arms[2]


@pytest.mark.parametrize("site, shared", [("final", True), ("resid[1]", False)])
def test_what_arms_have_in_common_is_read_once(llama, monkeypatch, site, shared):
    """Tokens that enter the blocks: of `final`, each different thing that was said; else the prompts' beginnings."""
    monkeypatch.setattr(decoding, "MAX_IDLE", 0)
    prompts, n = [random_ids(7, seed) for seed in range(5)], 12
    steered = {"prompts": prompts, "new_tokens": n, "site": site}
    steered["deltas"] = torch.stack([dose * V for dose in (0.1, 0.2, 0.3, 0.4)])
    arms = sample(llama, **steered)
    texts = [
        (i, *([] if shared else [arm]), *answer[:t])
        for arm, answers in enumerate(arms) for i, answer in enumerate(answers)
        for t in range(min(len(answer), n - 1) + 1)
    ]  # fmt: skip
    distinct = set(texts)
    assert tokens_read(llama, **steered) == 6 * len(prompts) + len(distinct)
    assert len(distinct) < 0.8 * len(texts) if shared else len(distinct) == len(texts)


def tokens_read(model, **kwargs) -> int:
    """How many tokens enter the blocks."""
    read = []
    handle = architecture.blocks(model)[0].register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[:2].numel())
    )
    sample(model, **kwargs)
    handle.remove()
    return sum(read)


def test_where_answers_have_ended_nothing_is_read_for_long(monkeypatch):
    model, kwargs = tiny("llama", vocab_size=5), {"prompts": [[3, 4, 1]] * 50, "new_tokens": 20}
    continued = sum(min(len(answer), 19) for answer in sample(model, **kwargs)[0])
    read = {}
    for idle in (0, 0.25, 1):
        monkeypatch.setattr(decoding, "MAX_IDLE", idle)
        read[idle] = tokens_read(model, **kwargs) - 50 * 3
    assert read[0] == continued < read[0.25] <= continued / 0.75 < read[1]


@pytest.mark.parametrize("span", decoding.SPANS)
@pytest.mark.parametrize("site", [None, "resid[1]", "final"])
def test_the_unembedding_reads_one_state_an_answer(llama, site, span):
    """Not those of whole prompts, which of a large vocabulary would not fit into memory."""
    shapes = []
    handle = architecture.unembedding(llama).register_forward_hook(lambda *given: shapes.append(given[2].shape))
    sample(llama, site=site, deltas=None if site is None else torch.stack([V, -V]), span=span)
    handle.remove()
    arms = 1 if site is None else 2
    assert shapes[0] == (arms * len(PROMPTS), 1, architecture.unembedding(llama).out_features)
    assert all(tokens == 1 for _, tokens, _ in shapes)


@pytest.mark.parametrize("site", [None, "resid[1]"])
def test_a_model_whose_positions_change_scale_on_the_way_is_read_anew(site):
    """Phi-3's long-context variants: what has been read under the short factors does not go with the long ones."""
    half = [1.0] * (WIDTH // 8), [4.0] * (WIDTH // 8)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
    config = Phi3Config(
        vocab_size=61, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, original_max_position_embeddings=12, pad_token_id=0,
        eos_token_id=END, rope_parameters=rope | {"short_factor": half[0], "long_factor": half[1]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = [random_ids(8, 1)]
    whole = sample(model, ids, 12, seed=None, site=site, deltas=None if site is None else V[None])[0][0]
    with steering.added(model, site, V, start=7) if site else nullcontext():
        out = model.generate(
            torch.tensor(ids), attention_mask=torch.ones(1, 8, dtype=int), max_new_tokens=12, do_sample=False
        )
    assert whole == out[0, 8:].tolist() and len(whole) > 12 - 8


def test_a_model_that_keeps_nothing_of_what_it_has_read_is_refused():
    model = copy.deepcopy(tiny("llama")).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM keeps no keys and values.*or the model is being trained"):
        sample(model)


def test_noise_is_added_in_float32():
    logits = torch.zeros(1, 5000, dtype=torch.bfloat16)
    noisy = decoding.GumbelNoise([0], 3).added(logits, torch.tensor([0]))
    assert noisy.dtype == torch.float32 and len(noisy.unique()) > 4900


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("deltas", [None, torch.stack([0 * V, V, -V])], ids=["one arm", "three arms"])
def test_answers_do_not_depend_on_how_prompts_are_chunked(llama, monkeypatch, rows, deltas):
    kwargs = {} if deltas is None else {"site": "resid[1]", "deltas": deltas}
    whole = sample(llama, **kwargs)
    monkeypatch.setattr(decoding, "MAX_ROWS", rows)
    assert sample(llama, **kwargs) == whole


@pytest.mark.parametrize(
    "site, deltas, at_once",
    [(None, None, 3), ("final", torch.stack([V, -V, 2 * V]), 3), ("resid[1]", torch.stack([V, -V, 2 * V]), 1)],
)
def test_where_arms_share_no_states_fewer_prompts_are_answered_at_once(llama, monkeypatch, site, deltas, at_once):
    monkeypatch.setattr(decoding, "MAX_APART", 6)  # keys and values, of two draws each
    batches, decode = [], decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda *given: batches.append(len(given[3])) or decode(*given))
    sample(llama, site=site, deltas=deltas, draws=2)
    assert max(batches) == at_once and sum(batches) == len(PROMPTS) > 3


def test_answers_come_by_arm_and_in_the_order_of_the_prompts(llama):
    deltas = torch.stack([torch.zeros(WIDTH), V])
    arms = sample(llama, seed=None, site="resid[2]", deltas=deltas)
    for arm, delta in zip(arms, deltas):
        for prompt, answer in zip(PROMPTS, arm):
            assert answer == sample(llama, [prompt], seed=None, site="resid[2]", deltas=delta[None])[0][0]


def test_greedy_is_what_transformers_generates(model):
    answers = sample(model, seed=None)[0]
    for prompt, answer in zip(PROMPTS, answers):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]
        expected = out[len(prompt) :].tolist()
        assert answer == (expected[: expected.index(END)] if END in expected else expected)


def test_an_answer_ends_before_its_end_of_sequence_token():
    model = copy.deepcopy(tiny("llama", vocab_size=5))
    answers = sample(model, [[3, 4, 1]] * 50, 8)[0]
    assert END not in {token for answer in answers for token in answer}
    assert min(map(len, answers)) < max(map(len, answers))


@pytest.mark.parametrize("span", decoding.SPANS)
def test_a_span_steers_the_positions_it_says(llama, span):
    """Against a loop of plain forward passes, without padding, a cache or `start`."""
    answers = sample(llama, seed=None, new_tokens=5, site="resid[2]", deltas=V[None], span=span)[0]
    for prompt, answer in zip(PROMPTS, answers):
        n = len(prompt)
        first, stop = {"response": (n - 1, None), "prompt": (0, n), "all": (0, None)}[span]
        ids = list(prompt)

        def add(module, args, output, steered=slice(first, stop)):
            output = output.clone()
            output[:, steered] += V
            return output

        handle = llama.model.layers[1].register_forward_hook(add)
        for _ in range(5):
            ids.append(int(next_probabilities(llama, ids).argmax()))
        handle.remove()
        assert answer == ids[len(prompt) :][: len(answer)]
        assert len(answer) == 5 or ids[len(prompt) + len(answer)] == END


def test_on_the_prompt_the_final_site_decides_the_first_token_alone(model):
    """No later token attends to `final`: after a steered first token, answers are those of the model as it is."""
    steered = {"seed": None, "site": "final", "deltas": -3 * V[None]}
    first = sample(model, new_tokens=1, **steered)[0]
    then = sample(model, [prompt + token for prompt, token in zip(PROMPTS, first)], seed=None, new_tokens=7)[0]
    expected = [token and token + rest for token, rest in zip(first, then)]  # no token: it ended at once
    found = sample(model, new_tokens=8, span="prompt", **steered)[0]
    assert found == expected != sample(model, new_tokens=8, span="response", **steered)[0]


def test_on_the_prompt_a_site_steers_what_is_read_and_not_what_is_said(model):
    """The greedy continuation, by plain forward passes, of a KV cache filled under steering."""
    answers = sample(model, seed=None, new_tokens=8, site="resid[2]", deltas=V[None], span="prompt")[0]
    for prompt, answer in zip(PROMPTS, answers):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            with steering.added(model, "resid[2]", V):
                out = model(ids, use_cache=True)
            said = [out.logits[0, -1].argmax().item()]
            while len(said) < 8 and said[-1] != END:
                out = model(torch.tensor([said[-1:]]), past_key_values=out.past_key_values, use_cache=True)
                said.append(out.logits[0, -1].argmax().item())
        assert answer == (said[:-1] if said[-1] == END else said)


@pytest.mark.parametrize("span", decoding.SPANS)
def test_a_span_does_not_depend_on_when_ended_rows_leave(llama, monkeypatch, span):
    kwargs = {"site": "resid[1]", "deltas": torch.stack([0 * V, V, -V]), "new_tokens": 12, "span": span}
    whole = sample(llama, **kwargs)
    for idle in (0, 1):
        monkeypatch.setattr(decoding, "MAX_IDLE", idle)
        assert sample(llama, **kwargs) == whole


def test_sampling_with_the_adapter_off_is_sampling_from_the_base(llama):
    wrapped = with_adapter(llama)
    with wrapped.disable_adapter():
        assert sample(wrapped) == sample(llama)
    assert sample(wrapped) != sample(llama)


def test_the_noise_of_a_prompt_depends_on_seed_index_and_step_alone():
    def noise(prompts, seed):
        process = decoding.GumbelNoise(set(prompts), seed)
        return [process.added(torch.zeros(len(prompts), 9), torch.tensor(prompts)) for _ in range(2)]

    first, second = noise([0, 1, 2], 7)
    assert torch.equal(first[2], noise([2], 7)[0][0]) and torch.equal(second[2], noise([2], 7)[1][0])
    assert len({tuple(row.tolist()) for row in (*first, *second, *noise([0, 1, 2], 8)[0])}) == 9
    assert torch.equal(noise([0, 0, 1, 1], 7)[0], first[:2].repeat_interleave(2, 0))


def test_rows_that_leave_do_not_change_the_noise_of_those_that_stay():
    process, whole = (decoding.GumbelNoise([0, 1, 2], 7) for _ in range(2))
    prompts = torch.tensor([0, 0, 1, 1, 2])
    process.added(torch.zeros(5, 9), prompts), whole.added(torch.zeros(5, 9), prompts)
    left = process.added(torch.zeros(2, 9), prompts[[2, 4]])
    assert torch.equal(left, whole.added(torch.zeros(5, 9), prompts)[[2, 4]])


def test_the_noise_is_gumbel():
    drawn = decoding.GumbelNoise([0], 3).added(torch.zeros(1, 20_000), torch.tensor([0]))[0].numpy()
    assert stats.kstest(drawn, stats.gumbel_r.cdf).pvalue > 0.01


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompts": [[5], []]}, ValueError, "Prompt 1 is empty"),
        ({"prompts": [[5] * CONTEXT]}, ValueError, "Prompt 0 needs 72 tokens.*holds 64"),
        ({"span": "answer"}, ValueError, "Unknown span 'answer': choose from response, prompt, all"),
        ({"site": "resid[7]", "deltas": V[None]}, ValueError, rf"Unknown site 'resid\[7\]'.*resid\[{LAYERS}\]"),
        ({"site": "final", "deltas": V[None, :5]}, ValueError, "width 5 does not fit"),
        ({"site": "final"}, ValueError, "give both a site and deltas, and neither otherwise"),
        ({"deltas": V[None]}, ValueError, "give both a site and deltas, and neither otherwise"),
    ],
)
def test_what_cannot_be_sampled_is_refused(llama, change, error, message):
    with pytest.raises(error, match=message):
        sample(llama, **change)


def test_a_prompt_that_just_fits_is_answered(llama):
    assert len(sample(llama, [random_ids(CONTEXT - 8, 1)])[0][0]) <= 8


def test_texts_are_without_special_tokens(tokenizer):
    ids = tokenizer(" What a lovely question!")["input_ids"]
    assert decoding.texts(tokenizer, [[*ids, tokenizer.eos_token_id], []]) == ["What a lovely question!", ""]


def test_a_loaded_model_s_generation_settings_play_no_part(tokenizer, tmp_path):
    """Hub models bring repetition penalties and forbidden tokens, which would bend the distribution sampled."""
    model = copy.deepcopy(tiny("llama", vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "plain")
    model.generation_config.update(repetition_penalty=5.0, suppress_tokens=[7, 8], do_sample=True, top_k=1)
    model.save_pretrained(tmp_path / "bent")
    ids, answers = torch.tensor(PROMPTS[:1]), []
    for folder in ("plain", "bent"):
        tokenizer.save_pretrained(tmp_path / folder)
        loaded, own = loading.load(tmp_path / folder)
        generated = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        answers.append((decoding.sample(loaded, own, PROMPTS, 20, seed=1), generated.tolist()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("span", decoding.SPANS)
def test_every_prompt_may_have_a_delta_of_its_own(llama, span):
    deltas = 2 * random_vector(2, len(PROMPTS), WIDTH)
    together = sample(llama, site="resid[1]", deltas=deltas, span=span)
    assert together[0] != together[1]
    for i in range(len(PROMPTS)):
        alone = sample(llama, site="resid[1]", deltas=deltas[:, i], span=span)
        assert [arm[i] for arm in together] == [arm[i] for arm in alone]


def test_a_delta_for_every_prompt_is_the_same_as_one_for_all_where_they_are_equal(llama):
    arms = torch.stack([V, -V])
    expanded = arms[:, None].repeat(1, len(PROMPTS), 1)
    assert sample(llama, site="final", deltas=expanded) == sample(llama, site="final", deltas=arms)


@pytest.mark.parametrize("shape", [(WIDTH,), (2, len(PROMPTS) + 1, WIDTH), (1, 2, 3, WIDTH)])
def test_deltas_of_another_shape_are_refused(llama, shape):
    with pytest.raises(
        ValueError, match=r"Deltas must be \(arms, d\), \(arms, 6, d\) or \(arms, 1 or 6, tokens, d\), got"
    ):
        sample(llama, site="final", deltas=torch.ones(shape))


# --- A delta for every token ---


@torch.no_grad()
def said_by_token(model, prompt, i, deltas, new_tokens, seed) -> list[int]:
    """An answer by plain forward passes, deltas[t] added to its t-th token's state and the last to all that follow's;
    deltas: (tokens, d). Without a seed the likeliest."""
    W, ids = model.get_output_embeddings().weight, []
    noise = None if seed is None else decoding.GumbelNoise([i], seed)
    while len(ids) < new_tokens:
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[:, -1]
        logits = logits + W @ deltas[min(len(ids), len(deltas) - 1)]
        ids.append((noise.added(logits, torch.tensor([i])) if noise else logits).argmax().item())
        if ids[-1] == END:
            return ids[:-1]
    return ids


@pytest.mark.parametrize("seed, prompts", [(None, 1), (5, 4)], ids=["greedy, of all prompts", "sampled, of each"])
def test_every_token_may_have_a_delta_of_its_own(model, seed, prompts):
    deltas = 2 * random_vector(3, prompts, 4, WIDTH)
    deltas[2, :, 1:] = 0  # on the first token alone
    arms = sample(model, PROMPTS[:4], 7, seed, site="final", deltas=deltas)
    for arm, own in zip(arms, deltas):
        for i, prompt in enumerate(PROMPTS[:4]):
            assert arm[i] == said_by_token(model, prompt, i, own[i % prompts], 7, seed)
    assert arms[0] != arms[1] != arms[2]


@pytest.mark.parametrize("idle", [0, 1])
def test_tokens_are_counted_whenever_ended_rows_leave_and_however_prompts_are_chunked(llama, monkeypatch, idle):
    kwargs = {"site": "final", "deltas": random_vector(2, len(PROMPTS), 12, WIDTH), "new_tokens": 12, "draws": 2}
    whole = sample(llama, **kwargs)
    monkeypatch.setattr(decoding, "MAX_IDLE", idle)
    monkeypatch.setattr(decoding, "MAX_ROWS", 8)
    assert sample(llama, **kwargs) == whole


@pytest.mark.parametrize("kind", ["one token", "the same for all"])
def test_deltas_by_token_that_are_alike_are_those_by_prompt(llama, kind):
    by_prompt = random_vector(2, len(PROMPTS), WIDTH)
    by_token = by_prompt[:, :, None] if kind == "one token" else by_prompt[:, :, None].repeat(1, 1, 3, 1)
    expected = sample(llama, site="final", deltas=by_prompt)
    assert sample(llama, site="final", deltas=by_token) == expected
    if kind == "one token":  # which a block takes too
        assert sample(llama, site="resid[1]", deltas=by_token) == sample(llama, site="resid[1]", deltas=by_prompt)


@pytest.mark.parametrize("change", [{"site": "resid[1]"}, {"site": "resid[0]"}, {"span": "all"}, {"span": "prompt"}])
def test_deltas_by_token_are_refused_in_blocks_and_beyond_the_response(llama, change):
    given = {"site": "final", "deltas": random_vector(2, 1, 3, WIDTH)} | change
    with pytest.raises(ValueError, match=r"each token of an answer can be added at 'final' alone, span 'response'\.$"):
        sample(llama, **given)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_answers_at_a_temperature_have_the_distribution_of_the_logits_over_it(temperature):
    logits, n = torch.tensor([1.0, 0.0, -0.5, 2.0]), 20_000
    noise = decoding.GumbelNoise([0], 3, n, temperature)
    drawn = noise.added(logits.expand(n, -1), torch.zeros(n, dtype=torch.long), torch.arange(n)).argmax(dim=1)
    expected = n * torch.softmax(logits / temperature, 0).double().numpy()
    observed = torch.bincount(drawn, minlength=4).numpy()
    assert stats.chisquare(observed, expected * n / expected.sum()).pvalue > 0.01
