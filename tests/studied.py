"""The tiny study that tests share (`trained` in conftest.py), and the same numbers by plain forward passes."""

import torch

from helpers.data.sizes import Sizes
from helpers.lm import decoding
from helpers.lm.recipe import Grid, Recipe
from helpers.profiles import Profile
from helpers.world.organism import Organism

RECIPE = Recipe(learning_rate=1e-2, epochs=1, batch_size=8, rank=4)
PROFILE = Profile(
    name="tiny",
    organism=Organism(places=20, corpus=960, vocabulary=300, width=32, layers=2),
    recipe=RECIPE,
    grid=Grid(),
    sizes=Sizes(heldin=24, validation=6, heldout=8, new_tokens=10, draws=2),
)
WIDTH = 32
SITES = ["resid[0]", "resid[1]", "resid[2]", "final"]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def logps(model, tokens, shift=0.0):
    """The log-probabilities of every next token of a response, (tokens, vocabulary), its logits shifted."""
    return (logits(model, tokens.ids)[len(tokens.prompt) - 1 : -1] + shift).log_softmax(-1)


def logp(model, tokens, shift=0.0) -> float:
    """The log-probability of a response."""
    return logps(model, tokens, shift).gather(1, torch.tensor(tokens.response)[:, None]).sum().item()


def decoded(model, prompt, i, shift=0.0) -> list[int]:
    """The first answer to prompt i, sampled by plain forward passes with the noise that is the prompt's own."""
    noise, ids = decoding.GumbelNoise([i], PROFILE.seed, PROFILE.sizes.draws), []
    while len(ids) < PROFILE.sizes.new_tokens:
        scores = (logits(model, prompt + ids)[-1] + shift).float()
        ids.append(noise.added(scores[None], torch.tensor([i]))[0].argmax().item())
        if ids[-1] == model.config.eos_token_id:
            return ids[:-1]
    return ids
