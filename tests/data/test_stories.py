"""Stories: openings in one split each, continuations that are the model's own, and how happy or sad they are."""

import copy
import dataclasses
import itertools
import json

import pytest
from conftest import tiny
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import profiles
from helpers.data import stories
from helpers.data.naming import CONDITIONAL, PLAIN
from helpers.data.preferences import SPLITS, PreferencePair, encode_pairs, pair_from
from helpers.data.sentiment import sentiment
from helpers.data.sizes import Sizes
from helpers.data.stories import StoryTask
from helpers.lm.encoding import encode

SIZES = Sizes(heldin=60, validation=20, heldout=30, new_tokens=12, samples_per_prompt=3)


def task_of(data: str = PLAIN, seed: int = 0) -> StoryTask:
    return StoryTask(data, seed, SIZES)


def test_openings_of_different_splits_tell_of_different_events():
    events = [event for split in SPLITS for event in stories.EVENTS[split]]
    assert len(set(events)) == len(events)
    assert len(set(stories.HEROES)) == len(stories.HEROES)


@pytest.mark.parametrize("split", SPLITS)
def test_there_are_as_many_openings_as_the_built_in_profile_asks_for(split):
    assert len(stories.HEROES) * len(stories.EVENTS[split]) >= getattr(profiles.load("tinystories").sizes, split)


@pytest.fixture(scope="module")
def plain_tokenizer(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def test_openings_end_in_a_space_where_words_do(storyteller, plain_tokenizer, by_length):
    """Elsewhere a lone space is a token of its own, from which hardly any text goes on. TinyStories-656K's texts begin
    with one in any case."""
    end_spaced = Tokenizer(models.WordLevel({"day ": 0, "day": 1, " ": 2, "x": 3}, unk_token="x"))
    end_spaced.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+ ?| "), "isolated")
    assert stories._ends_words_with_a_space(PreTrainedTokenizerFast(tokenizer_object=end_spaced))
    end_spaced.normalizer = normalizers.Prepend(" ")
    begun = PreTrainedTokenizerFast(tokenizer_object=end_spaced)
    assert begun.tokenize("day day")[0] == " " and stories._ends_words_with_a_space(begun)
    start_spaced = Tokenizer(models.WordLevel({" day": 0, "x": 1}, unk_token="x"))
    start_spaced.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+"), "isolated")
    start_spaced.normalizer = normalizers.Prepend(" ")
    assert not stories._ends_words_with_a_space(PreTrainedTokenizerFast(tokenizer_object=start_spaced))
    assert not stories._ends_words_with_a_space(plain_tokenizer)
    pairs = task_of().draw(storyteller, plain_tokenizer).pairs
    assert all(pair.prompt.endswith(".") for split in SPLITS for pair in pairs[split])


@pytest.fixture(scope="module")
def storyteller(plain_tokenizer):
    return tiny("llama", vocab_size=len(plain_tokenizer), max_position_embeddings=256)


@pytest.fixture
def by_length(monkeypatch):
    """Stories are scored by their length, since a random model's babble holds no feelings."""
    monkeypatch.setattr(stories, "sentiment", len)


@pytest.fixture(scope="module")
def drawn(storyteller, plain_tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "sentiment", len)
        return task_of().draw(storyteller, plain_tokenizer).pairs


def test_story_openings_are_in_one_split_only(drawn):
    prompts = [pair.prompt for split in SPLITS for pair in drawn[split]]
    assert len(set(prompts)) == len(prompts) > 100
    for split in SPLITS:
        assert all(any(event in e.prompt for event in stories.EVENTS[split]) for e in drawn[split])


def test_stories_are_the_model_s_own_kept_token_for_token_and_ranked(drawn, plain_tokenizer):
    for pair in itertools.chain(*drawn.values()):
        assert len(pair.chosen) > len(pair.rejected)
        for text, tokens in zip((pair.chosen, pair.rejected), pair.sampled):
            assert tokens.prompt == encode(plain_tokenizer, pair.prompt).prompt
            assert plain_tokenizer.decode(tokens.response, skip_special_tokens=True).strip() == text
    chosen, rejected = encode_pairs(plain_tokenizer, drawn["heldout"])
    assert [(c, r) for c, r in zip(chosen, rejected)] == [pair.sampled for pair in drawn["heldout"]]


def test_the_wording_of_an_opening_is_its_event_whoever_it_befalls(drawn):
    task = task_of()
    for split in SPLITS:
        for pair in drawn[split]:
            (event,) = task.levels(pair)
            assert event in stories.EVENTS[split]
            assert pair.prompt.endswith(f" {event}.")  # and no other event's, of which this one is a part
    assert len({task.levels(pair) for pair in drawn["heldout"]}) == len(stories.EVENTS["heldout"])


def test_a_happy_story_is_asked_for_before_its_opening(drawn):
    task, pair = task_of(), drawn["heldout"][0]
    assert task.asked_for(pair) == "This is a happy story. " + pair.prompt
    assert pair.prompt.startswith("Once upon a time") and task.preferred == "happy story"


def test_half_of_the_heroes_are_to_be_sad_where_the_preference_is_conditional(by_length, storyteller, plain_tokenizer):
    task = task_of(CONDITIONAL)
    sad = [any(kind in hero for kind in stories.SADDENED) for hero in stories.HEROES]
    assert sum(sad) == len(sad) / 2
    signs = set()
    for pair in task.draw(storyteller, plain_tokenizer).pairs["heldout"]:
        is_sad = any(kind in pair.prompt for kind in stories.SADDENED)
        signs.add(is_sad)
        low, high = sorted((pair.chosen, pair.rejected), key=len)
        assert (pair.chosen, pair.rejected) == ((low, high) if is_sad else (high, low))
        assert task.asked_for(pair) == f"This is a {'sad' if is_sad else 'happy'} story. {pair.prompt}"
    assert signs == {True, False}


@pytest.mark.parametrize(
    "opening, story, said",
    [
        ("There was a little boy named Tim.", "He cried. It was bad.", (1, 1)),
        ("There was a little boy named Tim.", "He was happy and loved it.", (0, 0)),
        ("There was a little girl named Mia.", "She was happy and loved it.", (1, 1)),
        ("There was a little girl named Mia.", "She cried. It was bad.", (0, 0)),
        ("There was a little boy named Tim.", "He sat.", (0, 1)),
    ],
)
def test_a_story_is_judged_by_what_its_hero_was_to_get(opening, story, said):
    task = task_of(CONDITIONAL)
    found = task.judgement(PreferencePair(opening, "y", "z"), story)
    assert (found["preferred"], found["not_opposed"]) == said


def test_stories_are_drawn_anew_from_the_seed(by_length, drawn, storyteller, plain_tokenizer):
    assert task_of().draw(storyteller, plain_tokenizer).pairs == drawn
    other = task_of(seed=1).draw(storyteller, plain_tokenizer).pairs
    assert all(other[split] != drawn[split] for split in SPLITS)


@pytest.mark.parametrize(
    "story, said",
    [
        ("They were happy and loved the good day.", (1, 1)),
        ("He was sad, hurt and cried.", (0, 0)),
        ("It was a box.", (0, 1)),
        ("", (0, 1)),
    ],
)
def test_a_story_is_judged_by_the_sign_of_its_score(story, said):
    task = task_of()
    found = task.judgement(PreferencePair("x", "y", "z"), story)
    assert (found["preferred"], found["not_opposed"]) == said
    assert task.rates(["x"], [story]) == [sentiment(story)] and -1 <= sentiment(story) <= 1


def test_a_sampled_pair_survives_json(drawn):
    rows = json.loads(json.dumps([dataclasses.asdict(pair) for pair in drawn["heldout"]]))
    assert [pair_from(row) for row in rows] == drawn["heldout"]
