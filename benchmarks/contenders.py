"""What is timed: ours and others' ways to the same states, and our generation with and without a vector.

Each factory prepares what a user prepares once (a wrapped model, a tokenizer) and returns the call that is timed. The
others read the prompts in arrival order, `BATCH` at a time, as their users do; ours takes all of them at once.
"""

from collections.abc import Callable

import nnsight
import torch
from nnsight import TransformersModel
from repeng.extract import batched_get_hiddens
from torch import Tensor

from benchmarks.subject import LAYERS, Subject, tokenizer
from helpers.lm import activations, architecture, batches, decoding, likelihoods, tilts

BATCH = 16
SITE = f"resid[{LAYERS // 2}]"
DOSES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
GENERATE_PROMPTS, SWEEP_PROMPTS = 16, 4
NEW_TOKENS = 40
VECTORS, ANSWERS = 20, 16  # whose KL is computed, and the prompts whose second halves stand for answers

Call = Callable[[], Tensor]


def ours(s: Subject) -> Call:
    """helpers.lm.activations at all L + 2 sites: (N, L + 2, d)."""
    sites = architecture.sites(s.model)
    sequences = [batches.Tokens(prompt) for prompt in s.prompts]

    def call() -> Tensor:
        states = activations.hidden_states(s.model, sequences, sites)
        return torch.stack([states[site, "prompt_last"] for site in sites], dim=1)

    return call


def plain(s: Subject) -> Call:
    """A forward pass with logits, right-padded, without a KV cache; it keeps the last token's logits (N, vocabulary).
    It reads no hidden state: what it takes is a lower bound for reading them in arrival order."""

    @torch.no_grad()
    def call() -> Tensor:
        kept = []
        for batch in chunks(s.prompts):
            inputs, attended = batches.right_padded(batch)
            logits = s.model(input_ids=inputs, attention_mask=attended, use_cache=False).logits
            kept.append(logits[torch.arange(len(batch)), attended.sum(dim=1) - 1])
        return torch.cat(kept)

    return call


def repeng(s: Subject) -> Call:
    """repeng's own extraction, which `ControlVector.train` calls, at all of its layers: (N, L, d).
    Its layers are the entries of transformers' `hidden_states`: resid[1] to resid[L - 1] and, as the last, `final`. It
    reads two sites fewer than ours, for it has no name for resid[0] and none for the last block's own output."""
    tokens = tokenizer()
    layers = list(range(LAYERS))

    def call() -> Tensor:
        states = batched_get_hiddens(s.model, tokens, s.texts, layers, batch_size=BATCH)
        return torch.stack([torch.from_numpy(states[layer]) for layer in layers], dim=1)

    return call


def nnsight_trace(s: Subject, stopped: bool) -> Call:
    """nnsight's trace of a list of prompts, as its README shows: all L + 2 sites at the last token, (N, L + 2, d).
    Its `TransformersModel` (`LanguageModel` is the deprecated name) pads on the left, so the last token is at -1. The
    forward pass runs to its end, as in the README's examples, or is `stopped` before the unembedding, at its best."""
    model = TransformersModel(s.model, tokenizer=tokenizer(), task="text-generation")

    @torch.no_grad()
    def call() -> Tensor:
        kept = []
        for batch in chunks(s.texts):
            with model.trace(batch) as tracer:
                rows = nnsight.save([])
                rows.append(model.model.layers[0].input[:, -1])
                for block in model.model.layers:
                    rows.append(block.output[:, -1])
                rows.append(model.model.norm.output[:, -1])
                if stopped:
                    tracer.stop()
            kept.append(torch.stack(list(rows), dim=1))
        return torch.cat(kept)

    return call


def generate(s: Subject, deltas: Tensor | None, n_prompts: int) -> Call:
    """Greedy answers to the first prompts: (arms, n_prompts, NEW_TOKENS) ids; deltas: (arms, d), None for no hook."""
    tokens = tokenizer()
    site = None if deltas is None else SITE
    prompts = s.prompts[:n_prompts]
    return lambda: torch.tensor(decoding.sample(s.model, tokens, prompts, NEW_TOKENS, None, site, deltas))


def sweep_in_runs(s: Subject, deltas: Tensor) -> Call:
    """The sweep as a loop, a batch a dose."""
    runs = [generate(s, delta[None], SWEEP_PROMPTS) for delta in deltas]
    return lambda: torch.cat([run() for run in runs])


def doses(s: Subject) -> Tensor:
    """What the sweep adds at SITE: DOSES times a random direction as long as the states there are, (doses, d)."""
    states = activations.hidden_states(s.model, [batches.Tokens(p) for p in s.prompts[:BATCH]], [SITE])
    length = states[SITE, "prompt_last"].norm(dim=1).mean()
    direction = torch.randn(states[SITE, "prompt_last"].shape[1], generator=torch.Generator().manual_seed(0))
    return torch.tensor(DOSES)[:, None] * direction / direction.norm() * length


def chunks(rows: list) -> list[list]:
    """The rows in arrival order, BATCH at a time."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


def kl_of_vectors(s: Subject, by_algebra: bool) -> Call:
    """KL(goal || model + v) of VECTORS vectors at `final`, summed over each of ANSWERS answers: (VECTORS, ANSWERS). By
    one product of matrices for all of them (helpers.lm.tilts), or by a softmax each. The goal is another vector's."""
    answered = [batches.Tokens(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in s.prompts[:ANSWERS]]
    W, generator = architecture.unembedding(s.model).weight, torch.Generator().manual_seed(0)
    *vectors, own = torch.randn(VECTORS + 1, W.shape[1], generator=generator)
    deltas = torch.stack(vectors)
    goal = [log_p.add(W @ own).log_softmax(-1) for log_p in likelihoods.response_distributions(s.model, answered)]

    def algebra() -> Tensor:
        base = likelihoods.response_distributions(s.model, answered)
        return torch.stack([tilts.kl_to_goal(q, p, W @ deltas.T).sum(1) for q, p in zip(base, goal)], dim=1)

    def softmax() -> Tensor:
        return torch.from_numpy(likelihoods.kl_to(goal, s.model, answered, deltas))

    return algebra if by_algebra else softmax
