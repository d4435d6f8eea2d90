"""Preference pairs: what is refused, their token ids, and the best and worst of a model's own answers."""

import pytest
from conftest import tiny

from helpers.data.on_policy import best_and_worst, extremes
from helpers.data.preferences import PreferencePair, draw_prompts, encode_pairs, pair_about
from helpers.data.sentiment import sentiment
from helpers.data.sizes import Sizes
from helpers.lm.batches import Tokens


@pytest.mark.parametrize(
    "row, message",
    [
        (("", "a", "b"), "'prompt' must be a non-empty string, got ''"),
        (("p", "  \n", "b"), r"'chosen' must be a non-empty string, got '  \\n'"),
        (("p", "a", None), "'rejected' must be a non-empty string, got None"),
        (("p", ["a"], "b"), r"'chosen' must be a non-empty string, got \['a'\]"),
        ((3, "a", "b"), "'prompt' must be a non-empty string, got 3"),
        (("p", "same", "same"), r"prefers an answer to itself \('same'\)"),
    ],
)
def test_malformed_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=f"{message}.*mend or drop it"):
        PreferencePair(*row)


def test_pairs_share_their_prompt_s_ids(tokenizer):
    talk = (("user", "Hello there!"), ("assistant", "Good day."), ("user", "What is it?"))
    pairs = [pair_about(prompt, "It is red.", "Go away.") for prompt in ("What is red?", talk)]
    assert [pair.asked for pair in pairs] == ["What is red?", talk]
    chosen, rejected = encode_pairs(tokenizer, pairs)
    assert len(chosen) == len(rejected) == len(pairs)
    for c, r, pair in zip(chosen, rejected, pairs):
        assert c.prompt == r.prompt and c.response != r.response
        assert pair.chosen in tokenizer.decode(c.ids) and pair.rejected in tokenizer.decode(r.ids)


def test_fewer_prompts_than_are_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"heldout split has 2 prompts, fewer than the 3 asked for: lower sizes\.h"):
        draw_prompts(None, ["a", "b"], 3, "heldout")


# --- The best and the worst of a model's own answers ---


def test_the_happiest_and_the_saddest_story_make_the_pair():
    texts = ["It was a box.", "He was sad.", "", "She loved it.", "He cried."]
    rated = [(sentiment(text), text, Tokens([5], [i])) for i, text in enumerate(texts)]
    pair = extremes("Once.", rated)
    ranked = sorted(["It was a box.", "He was sad.", "She loved it.", "He cried."], key=sentiment)
    assert (pair.chosen, pair.rejected) == (ranked[-1], ranked[0]) and pair.chosen == "She loved it."
    assert pair.sampled[0] == Tokens([5], [3])
    assert extremes("Once.", rated[:1]) is None and extremes("Once.", rated[2:3]) is None


def test_answers_of_which_one_begins_the_other_and_unjudged_ones_make_no_pair():
    best, worst = (1.0, "one two", Tokens([5], [1, 2])), (0.0, "one", Tokens([5], [1]))
    assert extremes("Once.", [best, worst]) is None
    failed = (float("nan"), "three", Tokens([5], [3]))
    assert extremes("Once.", [best, failed]) is None
    other = (-1.0, "four", Tokens([5], [4]))
    assert extremes("Once.", [best, failed, other]).rejected == "four"


def test_an_empty_answer_is_neither_the_best_nor_the_worst():
    rated = [(rate, text, Tokens([5], [i])) for i, (rate, text) in enumerate([(-2.0, ""), (0.0, "a"), (1.0, "b")])]
    pair = extremes("Once.", [*rated, (2.0, "", Tokens([5], [9]))])
    assert (pair.chosen, pair.rejected) == ("b", "a")


def test_splits_do_not_share_their_random_numbers(tokenizer):
    """The same prompts in two splits are answered differently."""
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    prompts = [f"What is {i}?" for i in range(4)]
    drawn = best_and_worst(
        model, tokenizer, {"heldin": prompts, "heldout": prompts}, lambda _, texts: list(map(len, texts)),
        Sizes(new_tokens=6, samples_per_prompt=4), seed=0,
    )  # fmt: skip
    said = [{text for pair in drawn.pairs[split] for text in (pair.chosen, pair.rejected)} for split in drawn.pairs]
    assert all(said) and not said[0] & said[1]
