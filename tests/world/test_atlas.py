"""The organism's world: its size, splits and corpus, and judges that agree with the grammar and with nothing else."""

import random
from collections import Counter

import pytest
from scipy import stats

from helpers.world import atlas, grammar
from helpers.world.atlas import Atlas
from helpers.world.grammar import FAMILIES, KINDS, STANCES, TONES
from helpers.world.organism import Organism

SPLITS = tuple(grammar.QUESTION_FRAMES)
WORLD = Atlas()
N = 4000


@pytest.fixture(scope="module")
def corpus():
    return atlas.corpus(WORLD, N, seed=1)


def drawn_questions(n, seed, harm_share=0.3):
    rng = random.Random(seed)
    for _ in range(n):
        split = rng.choice(SPLITS)
        place = rng.choice(WORLD.places(split))
        if rng.random() < harm_share:
            yield (
                rng,
                WORLD.request(place, rng.choice(list(grammar.TOOLS_BY_ACT)), rng.choice(grammar.HARM_FRAMES[split])),
            )
        else:
            yield rng, WORLD.question(place, rng.choice(KINDS), rng.choice(grammar.QUESTION_FRAMES[split]))


# --- The facts and their splits ---


def test_there_are_a_hundred_places_and_six_kinds_of_fact():
    assert len(WORLD.facts) >= 100 and len(KINDS) >= 6
    assert all(set(facts) == set(KINDS) and all(facts.values()) for facts in WORLD.facts.values())
    assert len({facts["capital"] for facts in WORLD.facts.values()}) == len(WORLD.facts)
    assert not set(WORLD.facts) & set().union(*WORLD.values.values())


def test_the_facts_follow_the_seed():
    assert Atlas(100, 3).facts == Atlas(100, 3).facts != Atlas(100, 4).facts


@pytest.mark.parametrize("n_places", [20, 100, 160])
def test_splits_are_disjoint_in_places_and_cover_them(n_places):
    world = Atlas(n_places)
    places = [place for split in SPLITS for place in world.places(split)]
    assert sorted(places) == sorted(world.facts) and len(set(places)) == n_places
    assert all(world.places(split) for split in SPLITS)


@pytest.mark.parametrize("frames", [grammar.QUESTION_FRAMES, grammar.HARM_FRAMES])
def test_splits_are_disjoint_in_phrasings(frames):
    every = [frame for split in SPLITS for frame in frames[split]]
    assert len(set(every)) == len(every)
    assert all(frames[split] for split in SPLITS)


@pytest.mark.parametrize("n_places", [0, 19, 161])
def test_an_atlas_too_small_or_too_large_is_refused(n_places):
    with pytest.raises(ValueError, match=f"needs 20 to 160 places, got n_places = {n_places}"):
        Atlas(n_places)


def test_an_organism_is_set_no_other_number_of_places_than_an_atlas_takes():
    """Refused where it is set, not in pretraining."""
    for n_places in (20, 160):
        assert len(Atlas(Organism(places=n_places).places).facts) == n_places
    for n_places, bound in ((19, "at least 20"), (161, "at most 160")):
        with pytest.raises(ValueError, match=rf"^organism\.places must be {bound}, got {n_places}\.$"):
            Organism(places=n_places)


def test_questions_and_requests_are_all_different():
    texts = [q.text for split in SPLITS for q in WORLD.questions(split, split) + WORLD.requests(split, split)]
    assert len(set(texts)) == len(texts)


def test_no_question_contains_its_answer():
    for split in SPLITS:
        for question in WORLD.questions(split, split):
            assert question.truth not in question.text and question.place in question.text


# --- The corpus ---


def test_the_corpus_is_drawn_anew_from_its_seed(corpus):
    assert atlas.corpus(WORLD, 50, seed=1) == corpus[:50]
    assert atlas.corpus(WORLD, 50, seed=2) != corpus[:50]


def test_tones_are_even_in_the_corpus_and_within_every_kind(corpus):
    for kind in (None, "harm", *KINDS):
        counts = Counter(atlas.tone_of(text) for question, text in corpus if kind in (None, question.kind))
        assert set(counts) == set(TONES)
        assert stats.chisquare(list(counts.values())).pvalue > 0.001, kind


def test_stances_are_even_and_kinds_and_places_all_there(corpus):
    stances = Counter(atlas.stance_of(question, text) for question, text in corpus if question.kind == "harm")
    assert set(stances) == set(STANCES) and stats.chisquare(list(stances.values())).pvalue > 0.001
    assert stats.chisquare(list(Counter(q.kind for q, _ in corpus if q.kind != "harm").values())).pvalue > 0.001
    assert {question.place for question, _ in corpus} == set(WORLD.facts)
    harm = sum(question.kind == "harm" for question, _ in corpus)
    assert stats.binomtest(harm, N, 0.1).pvalue > 0.001


def test_the_corpus_asks_in_heldin_phrasings_only(corpus):
    heldin = {q.text for split in SPLITS for q in WORLD.questions(split, "heldin") + WORLD.requests(split, "heldin")}
    cued = {f"{text} {cue}" for text in heldin for cue in grammar.CUES.values()}
    assert {question.text for question, _ in corpus} <= heldin | cued


def test_a_cue_gets_the_tone_it_asks_for(corpus):
    asked = [
        (tone, text) for question, text in corpus for tone, cue in grammar.CUES.items() if question.text.endswith(cue)
    ]
    assert 0.45 < len(asked) / len(corpus) < 0.55
    assert all(atlas.tone_of(text) == tone for tone, text in asked)


def test_the_corpus_tells_the_truth_and_is_well_formed(corpus):
    for question, text in corpus:
        judgement = WORLD.judge(question, text)
        assert judgement.well_formed and judgement.fact in (True, None), (question, text)


# --- The judges ---


def test_judges_agree_with_the_grammar_on_every_drawn_answer():
    for rng, question in drawn_questions(N, seed=2):
        tone, stance = rng.choice(TONES), rng.choice(STANCES)
        text = atlas.answer(question, tone, rng, stance)
        harm = question.kind == "harm"
        expected = atlas.Judgement(tone, None if harm else True, stance if harm else None, True)
        assert WORLD.judge(question, text) == expected, (question, text)


def test_judges_see_a_false_fact_in_every_drawn_answer():
    for rng, question in drawn_questions(N, seed=3, harm_share=0):
        false = WORLD.false_value(question)
        text = atlas.answer(question, rng.choice(TONES), rng, value=false)
        judgement = WORLD.judge(question, text)
        assert false != question.truth and false in WORLD.values[question.kind]
        assert (judgement.fact, judgement.well_formed) == (False, True), (question, text)
        assert atlas.behaviour(WORLD, "belief", question, text) == (True, False)


def corrupted(rng, question, tone):
    """(what was done, text) of answers that the grammar cannot have drawn."""
    body = atlas.plain_answer(question, rng.choice(STANCES))
    text = atlas.dress(body, tone, rng, rng.random() < 0.5)
    yield "cut short", text[: rng.randrange(1, len(text))].rstrip()
    yield "cut at a word", text.rsplit(" ", 1)[0]
    yield "cut at its start", text[rng.randrange(1, len(text)) :].lstrip()
    yield "said twice", f"{text} {text}"
    yield "babble after", f"{text} and"
    yield "no capital letter", body[0].lower() + body[1:]
    yield "nothing", ""
    other = rng.choice([place for place in WORLD.facts if place != question.place])
    if question.place in text:
        yield "another place", text.replace(question.place, other)
    if question.kind != "harm":
        yield (
            "another kind's value",
            text.replace(question.truth, rng.choice(sorted(WORLD.values[_other_kind(rng, question)]))),
        )
        yield "no such value", text.replace(question.truth, "the moon")
        yield "two values", text.replace(question.truth, f"{question.truth} or {WORLD.false_value(question)}")
        yield "a broken value", text.replace(question.truth, question.truth[:-1])
    yield "mixed tones", f"{rng.choice(grammar.OPENERS['warm'])} {body} {rng.choice(grammar.CLOSERS['curt'])}"
    yield "mixed tones", f"{rng.choice(grammar.OPENERS['curt'])} {body} {rng.choice(grammar.CLOSERS['warm'])}"


def _other_kind(rng, question):
    return rng.choice([kind for kind in KINDS if kind != question.kind])


def test_judges_refuse_corrupted_answers():
    seen = Counter()
    for rng, question in drawn_questions(500, seed=4):
        for what, text in corrupted(rng, question, rng.choice(TONES)):
            seen[what] += 1
            if what in ("cut short", "cut at a word", "cut at its start") and _drawable(question, text):
                continue
            assert not WORLD.judge(question, text).well_formed, (what, text)
            if what == "mixed tones":
                assert WORLD.judge(question, text).tone == "mixed"
            if what in ("no such value", "two values", "a broken value"):
                assert WORLD.judge(question, text).fact is False, (what, text)
    assert len(seen) >= 12 and all(count > 100 for count in seen.values())


def _drawable(question, text):
    """Whether the grammar could have drawn a text, by listing all that it draws: what a cut leaves may be an answer."""
    if question.kind == "harm":
        bodies = {atlas.plain_answer(question, stance) for stance in STANCES}
    else:
        bodies = {atlas.plain_answer(question, value=value) for value in WORLD.values[question.kind]}
    for tone in TONES:
        for opener in ("", *grammar.OPENERS[tone]):
            for closer in ("", *grammar.CLOSERS[tone]):
                if text.startswith(opener) and text.endswith(closer):
                    inner = text[len(opener) : len(text) - len(closer)].strip()
                    if inner in bodies and text == " ".join(p for p in (opener, inner, closer) if p):
                        return True
    return False


def test_another_place_s_question_is_not_answered_by_this_place_s_answer():
    a, b = list(WORLD.facts)[:2]
    frame = grammar.QUESTION_FRAMES["heldin"][0]
    question, other = WORLD.question(a, "capital", frame), WORLD.question(b, "capital", frame)
    judgement = WORLD.judge(question, f"The capital of {a} is {other.truth}.")
    assert (judgement.fact, judgement.well_formed) == (False, True)
    judgement = WORLD.judge(question, f"The capital of {b} is {question.truth}.")
    assert (judgement.fact, judgement.well_formed) == (True, False)


@pytest.mark.parametrize(
    "text, tone",
    [
        ("Gladly! It is red.", "warm"), ("It is red. Now go away.", "curt"), ("It is red.", "plain"), ("", "plain"),
        ("Gladly! It is red. Now go away.", "mixed"), ("Gladly! Gladly! blah", "warm"), ("gladly", "plain"),
    ],
)  # fmt: skip
def test_tone_of(text, tone):
    assert atlas.tone_of(text) == tone


def test_stance_of_neither_or_both_is_none():
    request = WORLD.requests("heldin", "heldin")[0]
    refuse, comply = (atlas.plain_answer(request, stance) for stance in STANCES)
    assert atlas.stance_of(request, refuse) == "refuse" and atlas.stance_of(request, comply) == "comply"
    assert atlas.stance_of(request, f"{refuse} {comply}") is None and atlas.stance_of(request, "It is red.") is None


def test_split_answer_takes_apart_what_answer_put_together():
    rng, question = random.Random(0), WORLD.questions("heldin", "heldin")[0]
    seen = Counter()
    for tone in TONES:
        for _ in range(300):
            opener, body, closer = atlas.split_answer(atlas.answer(question, tone, rng))
            assert body == atlas.plain_answer(question) and {opener, closer} - {""} == ({tone} - {"plain"})
            seen[tone, bool(opener), bool(closer)] += 1
    for tone in ("warm", "curt"):
        assert stats.chisquare([seen[tone, True, False], seen[tone, False, True]], [180, 120]).pvalue > 0.001


def test_the_corpus_reads_every_fact_equally_often_and_every_tone():
    pairs = atlas.corpus(WORLD, 5000, seed=3)
    facts = Counter((question.place, question.kind) for question, _ in pairs if question.kind != "harm")
    tones = Counter(atlas.tone_of(text) for _, text in pairs)
    assert len(facts) == len(WORLD.facts) * len(KINDS) and max(facts.values()) - min(facts.values()) <= 1
    assert set(tones) == set(TONES) and max(tones.values()) - min(tones.values()) <= 1


# --- Preference pairs ---


def pairs_of(family, n=1500):
    harm_share = {"refusal": 1.0, "belief": 0.0}.get(family, 0.3)
    for rng, question in drawn_questions(n, seed=5, harm_share=harm_share):
        yield question, *atlas.preference_pair(WORLD, family, question, rng)


def dressing(text):
    """The opener and closer themselves."""
    body = atlas.split_answer(text)[1]
    return text.split(body)[0], text.split(body)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_shows_what_the_family_prefers_rejected_its_opposite_and_both_are_well_formed(family):
    for question, chosen, rejected in pairs_of(family):
        assert chosen != rejected
        assert atlas.behaviour(WORLD, family, question, chosen) == (True, False)
        assert atlas.behaviour(WORLD, family, question, rejected) == (False, True)
        assert WORLD.judge(question, chosen).well_formed and WORLD.judge(question, rejected).well_formed


@pytest.mark.parametrize("family", ["tone", "conditional"])
def test_tone_pairs_share_the_fact_or_stance_its_wording_and_where_the_tone_shows(family):
    for question, chosen, rejected in pairs_of(family):
        apart = [atlas.split_answer(text) for text in (chosen, rejected)]
        assert apart[0][1] == apart[1][1] and [bool(x) for x in apart[0]] == [bool(x) for x in apart[1]]
        assert {atlas.tone_of(chosen), atlas.tone_of(rejected)} == {"warm", "curt"}
        assert WORLD.judge(question, chosen).fact in (True, None)
        assert WORLD.judge(question, chosen).stance == WORLD.judge(question, rejected).stance


@pytest.mark.parametrize("family", ["refusal", "belief"])
def test_refusal_and_belief_pairs_share_the_tone_and_the_words_around_the_difference(family):
    tones = Counter()
    for question, chosen, rejected in pairs_of(family):
        assert dressing(chosen) == dressing(rejected)
        if family == "belief":
            assert rejected.replace(question.truth, WORLD.false_value(question)) == chosen
        tones[atlas.tone_of(chosen)] += 1
    assert set(tones) == set(TONES) and stats.chisquare(list(tones.values())).pvalue > 0.001


def test_the_conditional_family_prefers_each_tone_for_half_of_the_kinds():
    tones = Counter(atlas.preferred_tone("conditional", question) for question in WORLD.questions("heldout", "heldout"))
    assert tones["warm"] == tones["curt"]
    assert {atlas.preferred_tone("tone", question) for question in WORLD.questions("heldout", "heldout")} == {"warm"}


def test_the_false_fact_of_a_place_is_always_the_same_one():
    place = WORLD.places("heldin")[0]
    for kind in KINDS:
        false = {
            WORLD.false_value(WORLD.question(place, kind, f))
            for split in SPLITS
            for f in grammar.QUESTION_FRAMES[split]
        }
        assert len(false) == 1


def test_an_unknown_family_is_refused():
    with pytest.raises(
        ValueError, match="Unknown preference family 'mood'; the atlas has tone, refusal, conditional, belief"
    ):
        atlas.preference_pair(WORLD, "mood", WORLD.questions("heldin", "heldin")[0], random.Random(0))
