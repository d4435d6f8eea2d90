"""Sentences about topics: what is asked in which split, what is preferred, and the capitals that are asked apart."""

import pytest

from helpers import profiles
from helpers.data import capitals, catalogue, naming, tasks, topics
from helpers.data.preferences import SPLITS, PreferencePair
from helpers.data.sizes import Sizes
from helpers.data.topics import MADE, NATURE, PHRASINGS, SHARES, TopicTask, topic_of

SIZES = Sizes(heldin=400, validation=40, heldout=200)
TASKS = {family: TopicTask(family, 0, SIZES) for family in catalogue.ABOUT_TOPICS}
BY_TOPIC = {
    "canyon": "Compose a single short sentence about a canyon.",
    "castle": "Compose a single short sentence about a castle.",
}
GLAD, PLAIN, SAD = "What a wonderful, beautiful joy it is.", "It is there.", "It is a terrible, sad and ugly mess."


def pair(prompt):
    return PreferencePair(prompt, "yes", "no")


def test_no_topic_and_no_phrasing_is_in_two_splits():
    of_splits = {split: {*NATURE[SHARES[split]], *MADE[SHARES[split]]} for split in SPLITS}
    assert sum(map(len, of_splits.values())) == len(set().union(*of_splits.values())) == len(NATURE) + len(MADE) == 160
    assert len({phrasing for split in SPLITS for phrasing in PHRASINGS[split]}) == 14


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_is_about_a_topic_and_in_a_phrasing_of_its_split(split):
    for prompt in TASKS["sober"].asked(split):
        topic, phrasing = TASKS["sober"].levels(pair(prompt))
        assert topic in (*NATURE[SHARES[split]], *MADE[SHARES[split]])
        assert phrasing in [known.format("...") for known in PHRASINGS[split]]


def test_families_ask_the_same_and_held_out_prompts_have_forty_topics_at_least():
    asked = {family: task.asked("heldout") for family, task in TASKS.items()}
    assert asked["sober"] == asked["conditional"] == asked["brief"]
    assert len(set(asked["sober"])) == 200 and len({topic_of(prompt) for prompt in asked["sober"]}) >= 40
    assert TopicTask("sober", 1, SIZES).asked("heldout") != asked["sober"]


@pytest.mark.parametrize(
    "prompt", ["Write about the sea.", "Compose a single short sentence about a dragon.", "", *PHRASINGS["heldin"]]
)
def test_a_prompt_about_none_of_the_topics_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match="is about none of the topics"):
        topic_of(prompt)


@pytest.mark.parametrize(
    "family, about, answer, preferred, not_opposed",
    [
        ("sober", "canyon", GLAD, 0, 0), ("sober", "canyon", PLAIN, 1, 1), ("sober", "castle", SAD, 1, 1),
        ("conditional", "canyon", GLAD, 0, 0), ("conditional", "canyon", SAD, 1, 1),
        ("conditional", "castle", GLAD, 1, 1), ("conditional", "castle", PLAIN, 0, 0),
        ("brief", "canyon", "word " * 14, 1, 1), ("brief", "canyon", "word " * 15, 0, 1),
        ("brief", "canyon", "word " * 18, 0, 0),
        *((family, "canyon", "  ", 0, 1) for family in TASKS),
    ],
)  # fmt: skip
def test_a_sentence_is_judged_by_what_its_topic_was_to_get(family, about, answer, preferred, not_opposed):
    (said,) = TASKS[family].judgements([pair(BY_TOPIC[about])], [answer])
    assert said == {"preferred": preferred, "not_opposed": not_opposed}


@pytest.mark.parametrize(
    "family, about, better, worse",
    [
        ("sober", "canyon", SAD, GLAD), ("sober", "castle", PLAIN, GLAD), ("conditional", "canyon", SAD, PLAIN),
        ("conditional", "castle", GLAD, SAD), ("brief", "castle", "One two.", "One two three."),
    ],
)  # fmt: skip
def test_the_better_answer_is_rated_higher(family, about, better, worse):
    one, other = TASKS[family].rates([BY_TOPIC[about]] * 2, [better, worse])
    assert one > other


def test_words_ask_for_the_side_of_the_topic():
    asked = {(f, about): TASKS[f].asked_for(pair(prompt)) for f in TASKS for about, prompt in BY_TOPIC.items()}
    assert asked["sober", "canyon"].endswith("without any praise.") and asked["conditional", "castle"].endswith(
        "of praise."
    )
    assert asked["conditional", "canyon"] == asked["sober", "canyon"] and asked["brief", "canyon"].startswith(
        BY_TOPIC["canyon"]
    )
    assert not TASKS["sober"].has_facts and TASKS["sober"].has_beliefs


def test_a_hundred_countries_have_a_capital_each_of_another_name():
    assert len(capitals.CAPITALS) >= 100 == len(set(capitals.CAPITALS.values())) - (len(capitals.CAPITALS) - 100)
    for country, capital in capitals.CAPITALS.items():
        assert country.lower() not in capital.lower() and capital.lower() not in country.lower()


@pytest.mark.parametrize("pairs, questions", [(1000, len(capitals.CAPITALS)), (60, 59), (20, 20), (0, 1)])
def test_a_capital_is_asked_for_every_pair_at_most_and_stated_true_answer_first(pairs, questions):
    task = TASKS["brief"]
    asked = task.facts_asked([pair(BY_TOPIC["canyon"])] * pairs)
    assert len(asked) == questions and len({one.prompt for one in asked}) == questions
    for one in asked[:3]:
        true, *others = task.stated(one)
        country = one.prompt.removeprefix("What is the capital of ").removesuffix("?")
        assert true == f"The capital of {country} is {capitals.CAPITALS[country]}."
        assert task.stated(one) == task.stated(pair(f"{one.prompt} Answer in one word."))
        assert len({true, *others}) == len(capitals.CAPITALS) and all(f"of {country} is" in other for other in others)


def test_a_profile_s_data_name_the_task():
    for family in catalogue.ABOUT_TOPICS:
        data = f"{naming.TOPICS}{family}"
        found = tasks.task(data, "closer", 3, SIZES, 10)
        assert found == TopicTask(family, 3, SIZES) and found.data == data and found.sides[0] != found.sides[1]
        beside = catalogue.families_beside(data, False)
        assert data in beside.values() and len(beside) == 3
    with pytest.raises(ValueError, match="unknown data 'topics:loud'"):
        profiles.load("smollm2").replace(data="topics:loud")
    assert topics.QUESTION.count("{}") == 1
