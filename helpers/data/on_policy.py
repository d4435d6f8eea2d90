"""On-policy pairs: of a model's own answers to a prompt the best and the worst."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.data.preferences import SPLITS, Drawn, PreferencePair, begins, pair_about
from helpers.data.sizes import Sizes
from helpers.lm import decoding, encoding
from helpers.lm.batches import Tokens
from helpers.lm.encoding import Prompt

Rated = tuple[float, str, Tokens]  # how good an answer is, its text, and its prompt and itself as token ids


def best_and_worst(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: dict[str, list[Prompt]],
    rates: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]], sizes: Sizes, seed: int,
) -> Drawn:  # fmt: skip
    """On-policy pairs: for each prompt of each split the best and the worst of the model's own answers, as sampled.

    rates: how good answers to prompts are, nan where that is not known. A prompt whose answers are all as good, or
    whose worst and best answer begin alike to the end of one, makes no pair. Raises ValueError where fewer than two
    prompts of a split make one.
    """
    pairs, unjudged, k = {}, 0, sizes.samples_per_prompt
    for split, prompts in asked.items():
        ids = [encoding.encode(tokenizer, prompt).prompt for prompt in prompts]
        draws = decoding.sample(
            model, tokenizer, ids, sizes.new_tokens, seed + 1 + SPLITS.index(split), draws=k,
            temperature=sizes.temperature, progress=f"answers to choose from, {split}",
        )  # fmt: skip
        tokens = [Tokens(prompt, said[i]) for i, prompt in enumerate(ids) for said in draws]
        texts = decoding.texts(tokenizer, [one.response for one in tokens])
        repeated = [prompt for prompt in prompts for _ in range(k)]
        rated = list(zip(rates(repeated, texts), texts, tokens))
        unjudged += sum(np.isnan(rate) for rate, text, _ in rated if text)
        found = [extremes(prompt, rated[i * k : (i + 1) * k]) for i, prompt in enumerate(prompts)]
        pairs[split] = [pair for pair in found if pair is not None]
        if len(pairs[split]) < 2:
            raise ValueError(
                f"Of {len(prompts)} prompts of the {split} split {len(pairs[split])} have answers that the score tells "
                f"apart ({unjudged} answers were not judged): take another score, or more sizes.samples_per_prompt."
            )
    lost = sum(map(len, asked.values())) - sum(map(len, pairs.values()))
    return Drawn(pairs, {"answers that the score does not tell apart": lost, "answers not judged": int(unjudged)})


def extremes(prompt: Prompt, rated: Sequence[Rated]) -> PreferencePair | None:
    """The pair of the best and the worst answer to a prompt; None where they do not differ."""
    ranked = sorted((one for one in rated if one[1] and not np.isnan(one[0])), key=lambda one: one[0])
    if not ranked or ranked[0][0] == ranked[-1][0] or begins(ranked[0][2], ranked[-1][2]):
        return None
    (_, rejected, worst), (_, chosen, best) = ranked[0], ranked[-1]
    return pair_about(prompt, chosen, rejected, sampled=(best, worst))
