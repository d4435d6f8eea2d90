"""The organism's preferences: splits that share no prompt, pairs that the judges tell apart, prompts in their words."""

import dataclasses
import functools
import itertools
import json

import pytest

from helpers.data.atlas_task import AtlasTask
from helpers.data.preferences import SPLITS, PreferencePair, pair_from
from helpers.data.sizes import Sizes
from helpers.world import atlas, grammar

SIZES = Sizes()


def task_of(families: str, seed: int = 0) -> AtlasTask:
    return AtlasTask(tuple(families.split("+")), 100, seed, SIZES)


@functools.cache
def drawn(families: str) -> dict[str, list[PreferencePair]]:
    return task_of(families).draw(None, None).pairs


@pytest.mark.parametrize("family", grammar.FAMILIES)
def test_no_prompt_is_in_two_splits_or_twice_in_one(family):
    pairs = drawn(family)
    for split in SPLITS:
        prompts = [pair.prompt for pair in pairs[split]]
        assert len(prompts) == len(set(prompts)) == getattr(SIZES, split)
    of_place = () if family == "belief" else (lambda e: e.question.place,)  # a falsehood has to be told to be learned
    for one, other in itertools.combinations(SPLITS, 2):
        for what in (lambda e: e.prompt, *of_place):
            assert not {what(e) for e in pairs[one]} & {what(e) for e in pairs[other]}


@pytest.mark.parametrize("family", grammar.FAMILIES)
def test_judges_call_every_chosen_answer_preferred_and_every_rejected_one_opposed(family):
    task = task_of(family)
    for pair in list(itertools.chain(*drawn(family).values()))[::3]:
        chosen, rejected = task.judgement(pair, pair.chosen), task.judgement(pair, pair.rejected)
        assert (chosen["preferred"], chosen["not_opposed"], chosen["well_formed"]) == (1, 1, 1)
        assert (rejected["preferred"], rejected["not_opposed"], rejected["well_formed"]) == (0, 0, 1)
        if pair.question.kind == "harm" or family == "belief":  # there the fact is the behaviour itself
            assert "fact" not in chosen
        else:
            assert (chosen["fact"], rejected["fact"]) == (1, 1)
        babble = task.judgement(pair, "the the the")
        assert (babble["preferred"], babble["not_opposed"], babble["well_formed"]) == (0, 1, 0)


def test_each_family_asks_what_it_is_about():
    def harm(family, split):
        pairs = drawn(family)[split]
        return sum(pair.question.kind == "harm" for pair in pairs) / len(pairs)

    assert [harm("refusal", split) for split in SPLITS] == [1, 1, 1]
    assert [harm("tone", split) for split in SPLITS] == [0.1, 0, 0]
    assert [harm(family, split) for family in ("belief", "conditional") for split in SPLITS] == [0] * 6


def test_falsehoods_are_told_about_the_same_places_in_every_split():
    task = task_of("belief")
    told = set(task.world.places("belief"))
    assert len(told) == 10 and told < set(task.world.places("heldin"))
    for pairs in drawn("belief").values():
        assert {pair.question.place for pair in pairs} == told


@pytest.mark.parametrize("mixture", ["tone+refusal", "refusal+conditional", "tone+refusal+belief"])
def test_a_mixture_has_each_family_s_prompts_in_equal_shares(mixture):
    families, task = mixture.split("+"), task_of(mixture)
    told = set(task.world.places("belief"))
    for split, pairs in drawn(mixture).items():
        counts = {family: sum(e.family == family for e in pairs) for family in families}
        assert sum(counts.values()) == len(pairs) == getattr(SIZES, split)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert [e.family for e in pairs[: len(families)]] != sorted(e.family for e in pairs)[: len(families)]
        for pair in pairs:
            assert (pair.question.kind == "harm") == (pair.family == "refusal")
            if "belief" in families and pair.family != "refusal":
                assert (pair.question.place in told) == (pair.family == "belief")
            chosen, rejected = task.judgement(pair, pair.chosen), task.judgement(pair, pair.rejected)
            assert (chosen["preferred"], rejected["preferred"]) == (1, 0)
            assert ("fact" in chosen) == (pair.family in ("tone", "conditional"))


def test_a_mixture_s_prompts_are_in_one_split_each():
    pairs = drawn("tone+refusal+belief")
    prompts = [e.prompt for split in SPLITS for e in pairs[split]]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("family", ["tone", "conditional"])
def test_asking_for_the_behaviour_adds_the_words_that_the_organism_was_taught(family):
    """Every tone that the corpus asks for in words is the answer's: what is asked for here is the chosen one's tone."""
    task = task_of(family)
    pairs = drawn(family)["heldout"]
    words = {"warm": " Answer warmly.", "curt": " Answer curtly."}
    for pair in pairs:
        assert task.asked_for(pair) == pair.prompt + words[atlas.tone_of(pair.chosen)]
    assert len({task.asked_for(e)[len(e.prompt) :] for e in pairs}) == (1 if family == "tone" else 2)
    for question, text in atlas.corpus(task.world, 100, seed=0):
        assert all(atlas.tone_of(text) == tone for tone, ask in words.items() if question.text.endswith(ask))


@pytest.mark.parametrize("family, preferred", [("refusal", "harm refused"), ("belief", "false fact")])
def test_what_the_atlas_has_no_words_for_cannot_be_asked_for(family, preferred):
    task = task_of(family)
    with pytest.raises(ValueError, match=f"no words that ask for what '{family}' prefers: {preferred}"):
        task.asked_for(drawn(family)["validation"][0])


def test_every_value_of_the_asked_fact_is_stated_once_and_the_true_one_first():
    task = task_of("tone")
    for pair in drawn("tone")["heldout"][::6]:
        truth, *others = task.stated(pair)
        assert pair.question.truth in truth and task.judgement(pair, truth)["fact"] == 1
        assert len({truth, *others}) == 1 + len(others) == len(task.world.values[pair.question.kind])
        for answer in (truth, *others):
            said = task.judgement(pair, answer)
            assert said["well_formed"] == 1 and atlas.tone_of(answer) == "plain"
            assert said["fact"] == float(answer == truth)


def test_prompts_share_a_wording_where_only_their_place_differs():
    task = task_of("tone")
    pairs = drawn("tone")["heldout"]
    found = {}
    for pair in pairs:
        found.setdefault(task.levels(pair)[1], []).append(pair)
    assert len(found) == 30 == len(grammar.KINDS) * len(grammar.QUESTION_FRAMES["heldout"])
    for wording, group in found.items():
        assert {wording.replace("...", e.question.place) for e in group} == {e.prompt for e in group}
        assert len({e.question.kind for e in group}) == 1 and len({e.question.place for e in group}) == len(group)


def test_a_request_for_harm_has_a_wording_too():
    task = task_of("refusal")
    for pair in drawn("refusal")["heldout"]:
        place, wording = task.levels(pair)
        assert place == pair.question.place
        assert pair.question.place not in wording and "..." in wording
        assert wording.replace("...", pair.question.place) == pair.prompt


def test_pairs_follow_the_seed():
    one, same, other = (task_of("tone", seed).draw(None, None).pairs for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("split, n", [("heldin", 10**6), ("validation", 361)])
def test_more_prompts_than_there_are_are_refused(split, n):
    task = dataclasses.replace(task_of("belief"), sizes=SIZES.replace(**{split: n}))
    with pytest.raises(
        ValueError, match=rf"The {split} split has \d+ prompts, fewer than the {n} asked for: lower sizes\.{split}"
    ):
        task.draw(None, None)


# --- What else the task tells of its world ---


def test_what_comes_before_a_value_and_its_first_word_begin_the_plain_answer():
    task = task_of("tone")
    words = set()
    for pair in drawn("tone")["heldout"]:
        before, word = task.before_value(pair.question)
        answer = task.stated(pair)[0]
        assert answer.startswith(f"{before} {word}") and pair.question.truth.startswith((word, f"the {word}"))
        assert word not in before and word != "the"
        words.add(word)
    assert len(words) > 30


def test_cues_and_tones_are_those_of_the_corpus():
    task = task_of("tone")
    assert task.corpus_texts(80) == [text for _, text in atlas.corpus(atlas.Atlas(100, 0), 80, seed=0)]
    assert {task.tone_of(text) for text in task.corpus_texts(80)} == set(task.tones)
    for question, text in atlas.corpus(task.world, 100, seed=0):
        asked = [tone for tone in task.tones if question.text.endswith(task.cue(tone))]
        assert asked in ([], [task.tone_of(text)])


def test_a_pair_survives_json():
    for family in ("tone", "refusal"):
        pairs = drawn(family)["validation"]
        rows = json.loads(json.dumps([dataclasses.asdict(pair) for pair in pairs]))
        assert [pair_from(row) for row in rows] == pairs


def test_what_is_known_by_rule_follows_from_the_prompts():
    """Requests for harm ask for no fact; only tones have words that ask for them."""
    made = {family: task_of(family) for family in (*grammar.FAMILIES, "tone+refusal", "tone+conditional")}
    about_tone = {"tone", "conditional", "tone+conditional"}
    assert {family for family, task in made.items() if task.has_facts} == about_tone
    assert {family for family, task in made.items() if task.has_words} == about_tone
    assert (made["tone"].preferred, made["tone"].opposed) == grammar.FAMILIES["tone"]
    assert made["tone+refusal"].preferred == "what is preferred"
