"""Which task a profile's data name, and that all that decides one is in its fields."""

import json

import pytest

from helpers.data import catalogue, judges, naming, rows_task, tasks
from helpers.data.atlas_task import AtlasTask
from helpers.data.rows_task import RowsTask
from helpers.data.sizes import Sizes
from helpers.data.stories import StoryTask
from helpers.stages import keys
from helpers.world import grammar

SIZES = Sizes()
PINNED = f"owner/name@{'0123456789' * 4}"


def task(data: str, score: str = "sentiment", seed: int = 0):
    return tasks.task(data, score, seed, SIZES, 100)


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    return path


@pytest.mark.parametrize(
    "data, source",
    [
        ("pairs.jsonl", "pairs.jsonl"),
        ("../data/pairs.parquet", "../data/pairs.parquet"),
        ("onpolicy:/data/pairs.json.gz", "/data/pairs.json.gz"),
        ("Anthropic/hh-rlhf/harmless-base@main:train", "Anthropic/hh-rlhf/harmless-base@main:train"),
        ("onpolicy:owner/name", "owner/name"),
        ("onpolicy:vader", None),
        ("onpolicy:vader-conditional", None),
        ("atlas:tone+refusal", None),
    ],
)
def test_data_name_a_file_or_a_hub_id_or_are_made_here(data, source):
    assert naming.source_of(data) == source and catalogue.is_known(data)


@pytest.mark.parametrize(
    "data", ["pairs.txt", "name", "onpolicy:name", "atlas:tone/refusal", "atlas:tone+tone", "owner/name with space", ""]
)
def test_data_that_are_neither_are_unknown(data):
    assert not catalogue.is_known(data)


def test_the_task_is_the_one_that_the_data_name():
    assert task("onpolicy:vader") == StoryTask("onpolicy:vader", 0, SIZES)
    for family in (*grammar.FAMILIES, "tone+belief"):
        made = task(f"atlas:{family}")
        assert made == AtlasTask(tuple(family.split("+")), 100, 0, SIZES) and made.data == f"atlas:{family}"
    assert task(f"onpolicy:{PINNED}") == RowsTask(PINNED, "onpolicy:", "sentiment", 0, SIZES, "sentiment", PINNED)
    assert not task(PINNED).is_on_policy


def test_preferences_on_one_base_are_compared_with_each_other():
    assert list(catalogue.families_beside("atlas:belief", ready_partner=False)) == [
        "tone", "refusal", "conditional", "belief", "tone+refusal",
    ]  # fmt: skip
    stories = catalogue.families_beside("onpolicy:vader-conditional", ready_partner=False)
    assert stories == {"happy": "onpolicy:vader", "conditional": "onpolicy:vader-conditional"}
    assert all(map(catalogue.is_known, (*stories.values(), *catalogue.families_beside("atlas:tone", False).values())))
    assert catalogue.families_beside("owner/name", False) == {"pairs": "owner/name"}
    assert catalogue.families_beside("atlas:tone", True) == {"pairs": "atlas:tone"}


# --- What decides a task ---


def key(made) -> dict:
    return keys.digests({"task": made})


def test_another_content_of_a_file_or_another_judge_is_another_task(pairs_file, monkeypatch):
    found = [key(task(str(pairs_file))), key(task(f"onpolicy:{pairs_file}"))]
    assert key(task(str(pairs_file))) == found[0]
    pairs_file.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "c"}))
    found.append(key(task(str(pairs_file))))
    for url in ("http://a/v1", "http://b/v1"):
        monkeypatch.setenv("JUDGE_BASE_URL", url)
        monkeypatch.setenv("JUDGE_MODEL", "m")
        found.append(key(task(str(pairs_file), "geval")))
    for source in ("owner/one@main", "owner/other@main"):
        monkeypatch.setenv("TOXICITY_MODEL", source)
        found.append(key(task(str(pairs_file), "nontoxic")))
    assert len({str(one) for one in found}) == len(found)


def test_what_the_atlas_draws_depends_on_no_story_and_no_judge():
    reached, packages = keys._reached("helpers.data.atlas_task")
    assert not reached & {
        "helpers.data.stories",
        "helpers.data.judges",
        "helpers.data.rows_task",
        "helpers.lm.decoding",
    }
    assert not packages & {"vaderSentiment", "openai", "datasets"}
    reached, packages = keys._reached("helpers.data.stories")
    assert "helpers.data.sentiment" in reached and "vaderSentiment" in packages
    assert not reached & {"helpers.world.grammar", "helpers.data.atlas_task", "helpers.data.judges"}
    assert "openai" not in packages


def test_a_missing_file_is_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        task(str(tmp_path / "none.jsonl"))


def test_there_is_a_judge_s_content_id_for_every_score():
    assert all(judges.content_id(score) or score == "geval" for score in catalogue.SCORES)


def test_every_score_that_a_profile_can_name_has_a_judge():
    assert tuple(rows_task.SCORES) == catalogue.SCORES
