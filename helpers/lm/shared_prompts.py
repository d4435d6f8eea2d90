"""Answers that share a prompt, scored without reading it once for each of them.

All that is read of a prompt and its answers is one tree of tokens: answers part where they first differ, and each token
looks at those above it. A batch is read in two passes: the beginning of all its prompts (a chat template's system turn)
once, and after it every prompt's tree, a row each. Only states that predict an answer's token reach the unembedding.
The numbers are those of plain passes up to rounding, and gradients flow through the cache.

Small models are not read so: one pass costs them little, and what was measured with them stays bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from inspect import signature
from types import MethodType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from helpers.lm import activations, architecture, batches, likelihoods, steering, tilts
from helpers.lm.batches import Tokens


class NotShared(Exception):
    """A model's cache does not allow its answers to be read after a beginning that they share."""


# --- States ---


class _Tree(NamedTuple):
    """Tokens that are read after others: `ids`, the number of the one before each, `parents` (-1: the beginning that
    is not in the tree), and where the answers' tokens are predicted: the numbers of states, a list an answer."""

    ids: list[int]
    parents: list[int]
    predicting: list[list[int]]

    def ancestors(self) -> np.ndarray:
        """Which tokens each one looks at, itself among them: (tokens, tokens) of bool."""
        found = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found


def _tree(prompt: Sequence[int], answers: Sequence[list[int]]) -> _Tree:
    """The tree of a prompt, one token at least, and its answers, whose last tokens are not read."""
    ids, parents, predicting = list(prompt), list(range(-1, len(prompt) - 1)), []
    known: dict[tuple[int, int], int] = {}  # the number of a token that is read after another
    for answer in answers:
        at = [len(prompt) - 1]
        for token in answer[:-1]:
            if (at[-1], token) not in known:
                known[at[-1], token] = len(ids)
                ids.append(token)
                parents.append(at[-1])
            at.append(known[at[-1], token])
        predicting.append(at)
    return _Tree(ids, parents, predicting)


def answer_states(model: nn.Module, sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """The states at `final` that predict the responses' tokens, (states, d), and which of them predicts each token of
    the responses, end to end, (tokens,). Answers that begin alike share states.

    Sequences without a response are passed over; one must have some. Raises NotShared.
    """
    by_prompt = _by_prompt(sequences)
    common = _common_start([prompt[:-1] for prompt in by_prompt]) if len(by_prompt) > 1 else ()
    trees = [
        _tree(prompt[len(common) :], [sequences[i].response for i in group]) for prompt, group in by_prompt.items()
    ]
    states = _read(model, list(common), trees)
    rows, nodes, of_state, n = [], [], {}, 0
    for row, (tree, group) in enumerate(zip(trees, by_prompt.values())):
        used = sorted(set().union(*tree.predicting))
        number = {node: n + k for k, node in enumerate(used)}
        of_state |= {i: [number[node] for node in at] for i, at in zip(group, tree.predicting)}
        rows += [row] * len(used)
        nodes += used
        n += len(used)
    return states[rows, nodes], torch.tensor([state for i in sorted(of_state) for state in of_state[i]])


def _by_prompt(sequences: Sequence[Tokens]) -> dict[tuple[int, ...], list[int]]:
    """Which sequences have each prompt, of those that have a response."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if sequence.response:
            found.setdefault(tuple(sequence.prompt), []).append(i)
    return found


def _common_start(rows: Sequence[Sequence[int]]) -> Sequence[int]:
    """The tokens that all rows begin with; of rows in order, the first and the last differ earliest."""
    one, other = min(rows), max(rows)
    same = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:same]


def _read(model: nn.Module, common: list[int], trees: Sequence[_Tree]) -> Tensor:
    """The states at `final` of every tree's tokens, read after the tokens that all have in common, (trees, tokens, d),
    padded on the right."""
    lm, decoder = architecture.causal_lm(model), architecture.decoder(model)
    if "position_ids" not in signature(decoder.forward).parameters:  # Bloom's, for one, knows positions by its mask
        raise NotShared("Tokens beside each other cannot be given one position.")
    inputs, _ = batches.right_padded([tree.ids for tree in trees], lm.device)
    seen = np.zeros((len(trees), 1, inputs.shape[1], len(common) + inputs.shape[1]), dtype=bool)
    seen[..., : len(common)] = True
    positions = np.zeros(inputs.shape, dtype=int)
    for row, tree in enumerate(trees):
        looks, n = tree.ancestors(), len(tree.ids)
        seen[row, 0, :n, len(common) : len(common) + n] = looks
        positions[row, :n] = len(common) + looks.sum(1) - 1
    blank = np.arange(inputs.shape[1])
    seen[..., blank, len(common) + blank] = True  # padding looks at itself, since it must look at something
    hidden = torch.finfo(lm.dtype).min
    mask = torch.zeros(seen.shape, dtype=lm.dtype).masked_fill(~torch.from_numpy(seen), hidden).to(lm.device)
    given = {"attention_mask": mask, "position_ids": torch.from_numpy(positions).to(lm.device), "use_cache": True}
    if common:
        cache = decoder(input_ids=torch.tensor([common], device=lm.device), use_cache=True).past_key_values
        _check(cache, seen.shape[-1])
        cache.reorder_cache(torch.zeros(len(trees), dtype=torch.long, device=lm.device))
        given["past_key_values"] = cache
    out = decoder(input_ids=inputs, **given)
    _check(getattr(out, "past_key_values", None), seen.shape[-1])
    return out[0]


def _check(cache: Cache | None, positions: int) -> None:
    """Raise NotShared for a cache that is more than keys and values of all positions."""
    if not isinstance(cache, Cache):
        raise NotShared("There are no keys and values of what was read.")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotShared(f"A {type(layer).__name__} cannot be continued in several ways.")
        if layer.is_sliding and layer.sliding_window < positions:
            raise NotShared("A window that slides over padding would hold fewer tokens.")


@torch.no_grad()
def agrees(model: nn.Module, sequences: Sequence[Tokens]) -> bool:
    """Whether a model's states are those of plain passes, as the shortest and longest of the sequences tell: to half
    of the digits that its numbers have. False where there is no response."""
    few = _extremes(sequences)
    if not few:
        return False
    try:
        states, of_token = answer_states(model, few)
    except NotShared:
        return False
    plain = torch.cat([states_of_one[:-1] for states_of_one in likelihoods.response_states(model, few)])
    error = (states[of_token.to(states.device)].float().cpu() - plain).norm(dim=1) / plain.norm(dim=1)
    digits = max(torch.finfo(dtype).eps for dtype in (states.dtype, plain.dtype))
    return bool((error <= digits**0.5).all())


def _extremes(sequences: Sequence[Tokens]) -> list[Tokens]:
    """The shortest and the longest answer to each of a few prompts: the shortest and longest ones, and those of the
    longest answer and sequence. No batch of the sequences is wider."""
    answers = [
        sorted((sequences[i] for i in group), key=lambda s: len(s.response)) for group in _by_prompt(sequences).values()
    ]
    if not answers:
        return []
    prompt, answer, whole = (lambda a: len(a[-1].prompt)), (lambda a: len(a[-1].response)), (lambda a: len(a[-1].ids))
    few = [min(answers, key=prompt), *(max(answers, key=size) for size in (prompt, answer, whole))]
    return [tokens for group in few for tokens in (group[0], group[-1])]


# --- Training ---


def share_prompts(model: nn.Module) -> None:
    """Let a model with TRL's fused head read prompts that answers share once: from now on, its forward pass with
    `fused_lm_head=True` does. What it puts out is laid out as before. A batch that cannot be read so is read as TRL
    does."""
    lm = architecture.causal_lm(model)
    by_trl = lm.forward

    @wraps(type(lm).forward)  # PEFT and transformers look at its parameters
    def forward(self, *args, fused_lm_head: bool = False, **kwargs) -> ModelOutput:
        if not fused_lm_head:
            return by_trl(*args, **kwargs)
        try:
            return _scored(self, partial(by_trl, fused_lm_head=True), kwargs)
        except NotShared:
            return by_trl(*args, fused_lm_head=True, **kwargs)

    lm.forward = MethodType(forward, lm)


def _scored(lm: PreTrainedModel, fused: Callable[..., ModelOutput], inputs: dict) -> ModelOutput:
    """What TRL's fused forward pass says of the answers' tokens, of whose states it is given no others, and 0
    elsewhere."""
    labelled = inputs["labels"] != -100
    sequences = _unpadded(inputs["input_ids"], inputs["attention_mask"], labelled)
    if not labelled.any():
        raise NotShared("There is no answer.")
    states, of_token = answer_states(lm, sequences)
    read = pad(states[of_token.to(states.device)], (0, 0, 0, 1))[None]  # the last state predicts nothing
    labels = pad(inputs["labels"][labelled], (1, 0))[None]  # and the first token is not predicted
    with activations.hooked(lm, architecture.FINAL, lambda _: read):
        out = fused(input_ids=labels[:, :1], labels=labels)
    where = labelled[:, 1:]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(where.shape).masked_scatter(where, values)

    return type(out)(**{name: spread(values) if values.ndim == 2 else values for name, values in out.items()})


def _unpadded(ids: Tensor, attended: Tensor, labelled: Tensor) -> list[Tokens]:
    """Rows padded on the right, (batch, tokens), whose last tokens, the response, are labelled."""
    lengths, answers = attended.sum(dim=1).tolist(), labelled.sum(dim=1).tolist()
    return [Tokens(row[: n - a], row[n - a : n]) for row, n, a in zip(ids.tolist(), lengths, answers)]


# --- Log-probabilities ---


@torch.no_grad()
def answer_logps(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None = None, progress: str | None = None
) -> np.ndarray:
    """`likelihoods.response_logps` for many answers to each prompt: the sum over the response's tokens of
    log pi(y_t | x, y_<t), in nats, (N,), or (arms, N) with `deltas`, (arms, d), each added at `final`.

    A small model, and one that cannot share what it has read, is read plainly. Raises ValueError for an empty prompt, a
    sequence that is too long, and deltas that do not fit.
    """
    if architecture.is_small(model):
        return likelihoods.response_logps(model, sequences, deltas, progress)
    architecture.check_sequences(model, [s.ids if s.prompt else [] for s in sequences])
    if deltas is not None:
        steering.by_prompt(deltas, len(sequences))
        steering.check(model, architecture.FINAL, deltas)
    try:
        if (deltas is None or deltas.ndim == 2) and agrees(model, sequences):
            logps = _shared_logps(model, sequences, deltas, progress)
            return logps[0] if deltas is None else logps
    except NotShared:
        pass
    return likelihoods.response_logps(model, sequences, deltas, progress)


def _shared_logps(
    model: nn.Module, sequences: Sequence[Tokens], deltas: Tensor | None, progress: str | None
) -> np.ndarray:
    """(arms, N); an empty response has 0."""
    parts, biases = _parts(sequences), None if deltas is None else _biases(model, deltas)
    logps = np.zeros((1 if deltas is None else len(deltas), len(sequences)))

    def compute(batch: list[int]) -> tuple[list[int], np.ndarray]:
        members = sorted(i for part in batch for i in parts[part])
        chosen = [sequences[i] for i in members]
        states, of_token = answer_states(model, chosen)
        targets = torch.tensor([token for s in chosen for token in s.response])
        by_token = _token_logps(model, states, of_token, targets, deltas, biases).double().numpy()
        return members, np.add.reduceat(by_token, np.cumsum([0, *(len(s.response) for s in chosen[:-1])]), axis=1)

    held = [len(_tree(sequences[part[0]].prompt, [sequences[i].response for i in part]).ids) for part in parts]
    with tqdm(total=sum(map(len, parts)), desc=progress, disable=progress is None, leave=False) as bar:
        for members, found in batches.shrinking(held, batches.MAX_BATCH_TOKENS, compute):
            logps[:, members] = found
            bar.update(len(members))
    return logps


def _parts(sequences: Sequence[Tokens]) -> list[list[int]]:
    """Which sequences share a prompt, in parts that fit into a batch."""
    found = []
    for group in _by_prompt(sequences).values():
        step = max(1, batches.MAX_BATCH_TOKENS // max(len(sequences[i].ids) for i in group))
        found += [group[start : start + step] for start in range(0, len(group), step)]
    return found


def _biases(model: nn.Module, deltas: Tensor) -> Tensor | None:
    """What each arm's delta adds to the logits, (arms, vocabulary); None where that is no constant."""
    try:
        return torch.stack([steering.bias_on_logits(model, delta) for delta in deltas])
    except steering.NoBias:
        return None


def _token_logps(
    model: nn.Module, states: Tensor, of_token: Tensor, targets: Tensor, deltas: Tensor | None, biases: Tensor | None
) -> Tensor:
    """The log-probabilities of targets, (tokens,), each after one of the states, (states, d): (arms, tokens)."""
    found = torch.empty(1 if deltas is None else len(deltas), len(targets))
    step = max(1, likelihoods.MAX_LOGITS // (4 * architecture.vocabulary(model)))  # probabilities in float64 among them
    at = torch.device("cpu") if states.device.type == "mps" else states.device  # MPS has no float64
    tilt = None if biases is None else biases.to(at)
    for start in range(0, len(states), step):
        here = (of_token >= start) & (of_token < start + step)
        row, target = (of_token[here] - start).to(at), targets[here].to(at)
        if deltas is not None and tilt is None:
            arms = (_unembedded(model, states[start : start + step] + delta.to(states)) for delta in deltas)
            told = torch.stack([logits.to(at).log_softmax(1)[row, target] for logits in arms])
        else:
            logps = _unembedded(model, states[start : start + step]).to(at).log_softmax(1)
            told = logps[row, target][None]
            if tilt is not None:  # all arms at once: a bias tilts what is there (lm/tilts.py)
                told = told + tilt[:, target] - tilts.log_partitions(logps.double().exp(), tilt.T)[row].T
        found[:, here] = told.float().cpu()
    return found


def _unembedded(model: nn.Module, states: Tensor) -> Tensor:
    """The logits that the model itself makes of states at `final`, (states, d), its scale and soft cap included:
    (states, vocabulary). It reads one token, in whose place they are put."""
    with activations.hooked(model, architecture.FINAL, lambda _: states[None]):
        lm = architecture.causal_lm(model)
        logits = lm(input_ids=torch.zeros((1, 1), dtype=torch.long, device=lm.device), use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
