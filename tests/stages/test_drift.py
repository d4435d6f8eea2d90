"""KL of a steered model from itself, against an explicit sum over the vocabulary."""

import torch
from studied import WIDTH, logps

from helpers.lm.architecture import unembedding
from helpers.lm.batches import Tokens


def test_drift_is_kl_of_the_steered_from_the_unsteered_summed_over_the_base_s_own_answers(trained, plain):
    deltas = torch.stack([0.5 * torch.ones(WIDTH), torch.zeros(WIDTH)])
    found = trained.drift(deltas).pivot(index="arm", columns="prompt", values="kl")
    shift = deltas[0].double() @ unembedding(plain["base"]).weight.double().T
    ids, end = trained.answers("base", "validation")["ids"], trained.lm.tokenizer.eos_token_id
    for i, (prompt, answer) in enumerate(zip(trained.prompts("validation"), ids)):
        whole = answer + [end] * (len(answer) < trained.profile.sizes.new_tokens)
        p, q = (logps(plain["base"], Tokens(prompt, whole), by).double() for by in (shift, 0.0))
        torch.testing.assert_close(found.loc[0, i], (p.exp() * (p - q)).sum().item(), atol=1e-4, rtol=1e-3)
    assert (found.loc[1].abs() < 1e-9).all() and (found.loc[0] > 0).all()
