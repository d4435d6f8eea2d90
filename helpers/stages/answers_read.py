"""Given answers as a model reads them: its states, and how likely it holds them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.lm import activations, architecture, batches, likelihoods
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def answer_states(role: Role, answers: Sequence[Tokens]) -> dict[str, Tensor]:
    """A model's states at `final` over each answer, (N, d) float32: "mean", of the states at the answer's tokens
    (`response_mean`), and "sum", of those that predict them, one token earlier.

    Raises ValueError for an answer that is empty.
    """
    with role.opened() as model:
        return _read(model, answers, f"states of answers, {role.name}")


@stage
def answer_logps(role: Role, answers: Sequence[Tokens]) -> list[float]:
    """A model's log-probability of each answer, nats."""
    with role.opened() as model:
        return likelihoods.response_logps(model, answers, progress=f"log-probabilities, {role.name}").tolist()


@torch.no_grad()
def _read(model: nn.Module, answers: Sequence[Tokens], progress: str) -> dict[str, Tensor]:
    architecture.check_sequences(model, [tokens.ids if tokens.prompt and tokens.response else [] for tokens in answers])
    found = {}

    def compute(batch: list[int]) -> None:
        some = [answers[i] for i in batch]
        inputs, attended = batches.right_padded([tokens.ids for tokens in some], model.device)
        with activations.reading(model, [FINAL], lambda _, states: found.update(zip(batch, _reduced(states, some)))):
            architecture.decoder(model)(input_ids=inputs, attention_mask=attended, use_cache=False)
        bar.update(len(batch))

    with tqdm(total=len(answers), desc=progress, leave=False) as bar:
        for _ in batches.shrinking([len(tokens.ids) for tokens in answers], batches.MAX_BATCH_TOKENS, compute):
            pass
    mean, total = (torch.stack(rows) for rows in zip(*(found[i] for i in range(len(answers)))))
    return {"mean": mean, "sum": total}


def _reduced(states: Tensor, some: Sequence[Tokens]) -> list[tuple[Tensor, Tensor]]:
    """The mean over each answer's tokens and the sum over those that predict them, (d,) float32 each, of a batch's
    states, (batch, tokens, d)."""
    found = []
    for row, tokens in zip(states.float(), some):
        start, end = len(tokens.prompt), len(tokens.ids)
        found.append((row[start:end].mean(0).cpu(), row[start - 1 : end - 1].sum(0).cpu()))
    return found
