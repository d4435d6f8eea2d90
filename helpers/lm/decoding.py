"""Sampling answers, for many prompts and many steering doses in one batch.

All arms of a comparison (doses, directions, loading) use the same random numbers for the same prompt and draw: adding
Gumbel noise to the logits and taking the maximum samples exactly from the softmax (the Gumbel-max trick), and the noise
depends only on the seed, the prompt's index, how many draws there are, which of them it is, and the step. Arms then
differ by what was done to the model alone, and up to rounding a sample depends on no other that shares its batch.

What arms and draws have in common is computed once: draws of one arm share all states and logits until they say
different things. Steering at `final` moves what the unembedding reads and no state that a later token attends to, so
arms share their states there too.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from helpers.lm import activations, architecture, batches, encoding, steering

MAX_ROWS = 4096  # answers decoded at once
MAX_APART = 1024  # and of a small model on a processor, where each needs keys and values of its own
MAX_LOGITS = 2**26  # in memory at once
# Of a large model on a processor, where memory is scarcer: with a row of logits go its keys and values.
MAX_LOGITS_OF_LARGE, MAX_TOKENS_OF_LARGE = 2**24, 2**14
MAX_IDLE = 0.25  # share of the branches in the cache that no row continues any more
SPANS = ("response", "prompt", "all")


class GumbelNoise:
    """Gumbel noise for the logits of some prompts' answers: with it, the greedy choice is a sample at a temperature."""

    def __init__(self, prompts: Iterable[int], seed: int, draws: int = 1, temperature: float = 1.0):
        self.draws = draws
        self.temperature = temperature
        self.generators = {i: torch.Generator().manual_seed(seed * 1_000_003 + i) for i in prompts}

    def added(self, logits: Tensor, prompts: Tensor, draws: Tensor | int = 0) -> Tensor:
        """Logits, (rows, vocabulary), over the temperature, with the noise of each row's prompt and draw, (rows,), at
        its next step.

        Rows of one prompt and draw share their noise, which is the same whichever other rows there are.
        """
        present, row = prompts.unique(return_inverse=True)
        shape = (self.draws, logits.shape[1])
        uniform = torch.stack([torch.rand(shape, generator=self.generators[i]) for i in present.tolist()])
        gumbel = uniform.clamp_(1e-10, 1 - 1e-7).log_().neg_().log_().neg_()  # in place: there are many
        return (logits.float() / self.temperature).add_(gumbel[row, draws].to(logits.device))


def sample(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], new_tokens: int,
    seed: int | None, site: str | None = None, deltas: Tensor | None = None, span: str = "response",
    progress: str | None = None, draws: int = 1, temperature: float = 1.0,
) -> list[list[list[int]]]:  # fmt: skip
    """Answer every prompt `draws` times per arm: [arm * draws + draw][prompt] -> token ids, up to and without what ends
    an answer (`encoding.ends`).

    seed: None decodes greedily, which is worth one draw at any temperature. deltas: what each arm adds at `site`,
    (arms, d), or its own for every prompt and, at `final`, every token (`steering.by_prompt`); None is one arm that
    adds nothing. span: "response" steers every position that predicts a token of the response, so from the prompt's
    last token on; "prompt" the prompt's own positions alone, the last among them; "all" both. Where memory does not
    suffice, batches are halved. Raises ValueError for an empty prompt or one that leaves no room for the answer,
    and for deltas of another shape or of no arm.
    """
    architecture.check_sequences(model, prompts, new_tokens)
    deltas = _checked(model, site, deltas, span, len(prompts))
    arms = 1 if deltas is None else len(deltas)
    each = arms * draws  # answers to a prompt
    answers = [[[]] * len(prompts) for _ in range(each)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    apart = draws if _leaves_states(site) else each
    step = _prompts_at_once(model, each, apart, max(map(len, prompts), default=1))

    def compute(chunk: list[int]) -> tuple[list[int], list[list[int]]]:
        chosen = [order[i] for i in chunk]
        noise = None if seed is None else GumbelNoise(chosen, seed, draws, temperature)
        return chosen, _decode(model, tokenizer, prompts, chosen, arms, draws, new_tokens, noise, site, deltas, span)

    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:
        for chunk, decoded in batches.shrinking([1] * len(order), step, compute):
            for row, ids in enumerate(decoded):
                answers[row % each][chunk[row // each]] = ids
            bar.update(len(chunk))
    return answers


def _prompts_at_once(model: nn.Module, each: int, apart: int, longest: int) -> int:
    """How many prompts of at most so many tokens are answered in one batch, `each` of them so many times; `apart` of
    these are taken to say different things."""
    on_processor, is_small = model.device.type == "cpu", architecture.is_small(model)
    logits = MAX_LOGITS_OF_LARGE if on_processor and not is_small else MAX_LOGITS
    most = min(MAX_ROWS, logits // architecture.vocabulary(model)) // each
    if on_processor:
        most = min(most, MAX_APART // apart if is_small else MAX_TOKENS_OF_LARGE // longest)
    return max(1, most)


def _checked(model: nn.Module, site: str | None, deltas: Tensor | None, span: str, prompts: int) -> Tensor | None:
    """Deltas for every prompt and token, (arms, prompts, tokens, d), where there are any."""
    if (site is None) != (deltas is None):
        raise ValueError("To steer give both a site and deltas, and neither otherwise.")
    if span not in SPANS:
        raise ValueError(f"Unknown span {span!r}: choose from {', '.join(SPANS)}.")
    if deltas is None:
        return None
    steering.check(model, site, deltas)
    found = steering.by_prompt(deltas, prompts)
    if found.shape[2] > 1 and (site, span) != (architecture.FINAL, "response"):
        raise ValueError(
            f"A delta for each token of an answer can be added at {architecture.FINAL!r} alone, span 'response'."
        )
    return found


@torch.no_grad()
def _decode(model, tokenizer, prompts, chunk, arms, draws, new_tokens, noise, site, deltas, span) -> list[list[int]]:
    """The answers to a chunk of prompts: a prompt's arms one after the other, and an arm's draws."""
    ends = torch.tensor(encoding.ends(tokenizer), dtype=torch.long)
    branches = _Branches(model, *_left_padded([prompts[i] for i in chunk], tokenizer.pad_token_id, model.device))
    rows = _rows(chunk, arms, draws)
    if deltas is not None:
        deltas = deltas[:, chunk].transpose(0, 1).flatten(0, 1).to(model.device)  # (prompts * arms, tokens, d)
    width = branches.length
    first, stop = {"response": (width - 1, None), "prompt": (0, width), "all": (0, None)}[span]
    if _leaves_states(site) or span == "response":
        branches.read_all_but_last()
    if not _leaves_states(site):
        branches.split(arms)
        rows.branch = rows.source
    said = torch.full((len(rows.index), new_tokens), -1)
    with _read_by_source(model, branches, rows, site, deltas, first, stop):
        for step in range(new_tokens):
            logits = branches.read()[rows.readers()[2].to(model.device)]
            tokens = (noise.added(logits, rows.prompt, rows.draw) if noise else logits).argmax(dim=-1).cpu()
            going = ~torch.isin(tokens, ends)
            said[rows.index[going], step] = tokens[going]
            rows.keep(going)
            if not len(rows.index) or step == new_tokens - 1:
                break
            rows.branch = branches.continued(rows.branch, tokens[going])
    return [[token for token in answer if token >= 0] for answer in said.tolist()]


def _leaves_states(site: str | None) -> bool:
    """Whether steering at a site leaves alone all that a later token looks at."""
    return site in (None, architecture.FINAL)


@dataclass
class _Rows:
    """The answers of a batch that have not ended, one a prompt, arm and draw."""

    index: Tensor  # in the batch
    prompt: Tensor
    source: Tensor  # prompt and arm together: what is added, and without sharing where it goes
    draw: Tensor
    branch: Tensor  # which of the branches it continues

    def keep(self, going: Tensor) -> None:
        """Drop the other rows; going: (rows,), true or false."""
        if not going.all():
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[going])

    def readers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the unembedding reads: each branch with each source that continues it, (readers,) both, and which of
        them is each row's. Rows that differ in their draw alone are one."""
        sources = int(self.source.max()) + 1
        distinct, of_row = (self.branch * sources + self.source).unique(return_inverse=True)
        return distinct // sources, distinct % sources, of_row


def _rows(chunk: Sequence[int], arms: int, draws: int) -> _Rows:
    """All rows of some prompts, in the order of prompts, arms and draws."""
    index = torch.arange(len(chunk) * arms * draws)
    source = index // draws
    return _Rows(index, torch.tensor(chunk)[source // arms], source, index % draws, source // arms)


class _Branches:
    """Token sequences, and the keys and values of what has been read of them.

    Rows that have said the same, and were steered alike wherever a later token looks, continue one branch.
    """

    def __init__(self, model: nn.Module, ids: Tensor, attended: Tensor):
        """ids, attended: (branches, tokens), padded on the left."""
        self.model = model
        self.ids = ids
        self.attended = attended
        self.cache: Cache | None = None
        # transformers' `generate` asks in the same way; Bloom's, for one, knows positions by its mask
        self.takes_positions = "position_ids" in signature(architecture.causal_lm(model).forward).parameters

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """In tokens, with the padding and what is not read yet."""
        return self.ids.shape[1]

    def read(self) -> Tensor:
        """Read what is unread: the logits after it, (branches, vocabulary), in `_read_by_source` (readers,
        vocabulary)."""
        lm = architecture.causal_lm(self.model)
        unread = self.length if self.cache is None else 1
        inputs = lm.prepare_inputs_for_generation(  # Phi-3's reads all anew where its scale of positions changes
            self.ids, next_sequence_length=unread, past_key_values=self.cache, attention_mask=self.attended,
            use_cache=True, **self._positions(self.attended),
        )  # fmt: skip
        out = lm(**inputs)
        self._keep(out)
        return out.logits[:, -1]

    def read_all_but_last(self) -> None:
        """Read the beginning, which all rows of a branch share, without its logits, and leave the last token unread."""
        if self.length == 1:
            return
        ids, attended = self.ids[:, :-1], self.attended[:, :-1]
        decoder = architecture.decoder(self.model)
        self._keep(decoder(input_ids=ids, attention_mask=attended, use_cache=True, **self._positions(attended)))

    def _positions(self, attended: Tensor) -> dict[str, Tensor]:
        return {"position_ids": (attended.cumsum(dim=1) - 1).clamp(min=0)} if self.takes_positions else {}

    def _keep(self, out: ModelOutput) -> None:
        self.cache = getattr(out, "past_key_values", None)
        if self.cache is None:
            name = type(architecture.causal_lm(self.model)).__name__
            raise ValueError(
                f"{name} keeps no keys and values of what it has read, so it cannot be sampled from: this architecture "
                "is not supported, or the model is being trained."
            )

    def split(self, n: int) -> None:
        """Put n branches in the place of each."""
        self._select(torch.arange(len(self)).repeat_interleave(n))

    def continued(self, branch: Tensor, tokens: Tensor) -> Tensor:
        """Continue the rows' branches by a token each, both (rows,): which branch is now whose."""
        vocabulary = int(tokens.max()) + 1
        distinct, now = (branch * vocabulary + tokens).unique(return_inverse=True)
        parents, tokens = distinct // vocabulary, distinct % vocabulary
        divides = len(parents.unique()) < len(parents)
        if divides or len(parents) < (1 - MAX_IDLE) * len(self):
            self._select(parents)
            self._append(tokens)
            return now
        # moving what is cached would cost more than to read on, some token 0, where no row is left
        self._append(torch.zeros(len(self), dtype=torch.long).index_put((parents,), tokens))
        return branch

    def _append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids)], dim=1)
        self.attended = torch.cat([self.attended, self.attended.new_ones(len(self), 1)], dim=1)

    def _select(self, branch: Tensor) -> None:
        branch = branch.to(self.ids.device)
        self.ids, self.attended = self.ids[branch], self.attended[branch]
        if self.cache is not None:
            self.cache.reorder_cache(branch)


@contextmanager
def _read_by_source(
    model: nn.Module, branches: _Branches, rows: _Rows, site: str | None, deltas: Tensor | None, first: int,
    stop: int | None,
) -> Iterator[None]:  # fmt: skip
    """Inside, the unembedding reads a state for each of the rows' readers, that of its branch's last token, and each
    source's deltas, (sources, tokens, d), are added at `site`, from position `first` until before `stop`.

    The hooks see branches and rows as they are at each pass, between which both change.
    """
    moved = partial(steering.moved, start=first, stop=stop)

    def in_block(states: Tensor) -> Tensor:
        of_branches = deltas.new_zeros(len(branches), states.shape[-1])
        of_branches[rows.branch] = deltas[rows.source, 0]
        return moved(states, of_branches, branches.length - states.shape[1])

    def at_final(states: Tensor) -> Tensor:
        branch, source, _ = (x.to(states.device) for x in rows.readers())
        last, position = states[branch, -1:], branches.length - 1
        if site != architecture.FINAL:
            return last
        token = min(max(position - first, 0), deltas.shape[1] - 1)
        return moved(last, deltas[source, token], position)

    with ExitStack() as stack:
        if not _leaves_states(site):
            stack.enter_context(activations.hooked(model, site, in_block))
        stack.enter_context(activations.hooked(model, architecture.FINAL, at_final))
        yield


def _left_padded(ids: Sequence[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids))
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return inputs, attended


def texts(tokenizer: PreTrainedTokenizerBase, answers: Sequence[list[int]]) -> list[str]:
    """The answers as text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
