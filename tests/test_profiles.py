"""Every built-in profile is valid, a TOML file extends one, and what is wrong in it is named."""

import dataclasses
import re

import pytest

from helpers import preferences, profiles
from helpers.profiles import BUILT_IN, Profile, Recipe


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_profile_is_valid(name):
    profile = profiles.load(name)
    assert profile is BUILT_IN[name] or profile == BUILT_IN[name]
    assert profile.name == name
    assert {0.0, 1.0} <= set(profile.doses) and list(profile.doses) == sorted(profile.doses)
    assert profile.recipes and 0 < profile.health.max_fact_loss < 1
    assert preferences.task(profile).profile is profile


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_profile_survives_a_round_trip_through_toml_s_types(name):
    """What `_merge` accepts is what a Profile holds: each field given back as TOML would hold it changes nothing."""
    table = dataclasses.asdict(BUILT_IN[name])
    table["recipes"], table["doses"] = list(table["recipes"]), list(table["doses"])
    assert profiles._merge(BUILT_IN["atlas"], table, "here") == BUILT_IN[name]


def test_the_default_profile_is_the_embedded_organism():
    assert profiles.load("atlas").model == profiles.EMBEDDED


def test_smoke_is_the_default_profile_with_less_to_do():
    smoke, atlas = BUILT_IN["smoke"], BUILT_IN["atlas"]
    assert (
        dataclasses.replace(smoke, name="atlas", recipes=atlas.recipes, sizes=atlas.sizes, doses=atlas.doses) == atlas
    )
    assert len(smoke.recipes) == smoke.sizes.seeds == 1
    assert smoke.sizes.heldout >= 5  # notebook 05 draws five singular values


def test_model_and_data_are_replaced_where_given():
    profile = profiles.load("atlas", model="some/model", data="atlas:belief")
    assert (profile.model, profile.data) == ("some/model", "atlas:belief")
    assert dataclasses.replace(profile, model="atlas", data="atlas:tone") == BUILT_IN["atlas"]
    assert profiles.load("atlas", model="", data=None) == BUILT_IN["atlas"]


def test_a_toml_file_extends_a_built_in_profile(toml):
    profile = profiles.load(
        toml(
            'extends = "tinystories"\nseed = 3\ndoses = [1, 0, -0.5]\n[sizes]\nheldin = 7\n'
            "[[recipes]]\nbeta = 2\n[[recipes]]\nepochs = 9\n"
        )
    )
    parent = BUILT_IN["tinystories"]
    assert (profile.name, profile.seed, profile.doses) == ("mine", 3, (-0.5, 0.0, 1.0))
    assert profile.sizes == dataclasses.replace(parent.sizes, heldin=7)
    assert profile.recipes == (Recipe(beta=2.0), Recipe(epochs=9))
    assert (profile.model, profile.health) == (parent.model, parent.health)


def test_a_toml_file_extends_atlas_where_it_names_none_and_may_name_itself(toml):
    assert profiles.load(toml('name = "own"')) == dataclasses.replace(BUILT_IN["atlas"], name="own")
    assert profiles.load(toml(""), model="m").model == "m"


@pytest.mark.parametrize(
    "text, message",
    [
        ('extends = "atals"', "extends = 'atals' is not a built-in profile.*atlas"),
        ("sede = 1", "unknown field 'sede'; there are name, model"),
        ("[sizes]\nheldinn = 1", "sizes: unknown field 'heldinn'; there are heldin"),
        ("[[recipes]]\nbetta = 1.0", "recipes: unknown field 'betta'; there are beta"),
        ('seed = "1"', "seed must be of type int, got '1'"),
        ("seed = 1.5", "seed must be of type int, got 1.5"),
        ("seed = true", "seed must be of type int, got True"),
        ("model = 3", "model must be of type str, got 3"),
        ('[health]\nmin_preferred = "a lot"', "health: min_preferred must be of type float, got 'a lot'"),
        ("doses = 1.0", "doses must be a list, got 1.0"),
        ('doses = [0.0, "1"]', "doses must be of type float, got '1'"),
        ("sizes = 3", "sizes must be a table, got 3"),
        ("recipes = [3]", "recipes must be a table, got 3"),
        ("[recipes]\nbeta = 1.0", "recipes must be a list"),
        ("doses = [0.5, 1.0]", "doses must contain 0 and 1"),
        ("doses = [0.0, 2.0]", "doses must contain 0 and 1"),
        ("recipes = []", "at least one DPO recipe"),
        ("seed = ", "is not valid TOML"),
        ('dtype = "float33"', "dtype must be one of float32"),
        ("seed = -1", "profile.seed must be at least 0, got -1"),
        ("extends = ['atlas']", r"extends = \['atlas'\] is not a built-in profile"),
        ('name = "../../elsewhere"', "name must be letters, digits, -, _ and \\."),
        ('name = "atlas"', "'atlas' is a built-in profile, whose figures it would replace: rename it"),
        ('data = "pairs.csv"', "unknown data 'pairs.csv'; there are atlas:tone, .*onpolicy:vader"),
        ('data = "atlas:mood"', "unknown data 'atlas:mood'; there are .*, mixtures .* such as atlas:tone"),
        ('data = "atlas:tone+mood"', r"unknown data 'atlas:tone\+mood'"),
        ('data = "atlas:tone+tone"', r"unknown data 'atlas:tone\+tone'"),
        ('data = "onpolicy:vader+vader"', r"unknown data 'onpolicy:vader\+vader'"),
        ("[sizes]\nheldout = 0", "sizes: sizes.heldout must be at least 2, got 0"),
        ("[sizes]\nnew_tokens = 0", "sizes.new_tokens must be at least 1, got 0"),
        ("[[recipes]]\nepochs = 0", "recipe.epochs must be at least 1, got 0"),
        ("[[recipes]]\nrank = -1", "recipe.rank must be at least 0, got -1"),
        ("[organism]\nlayers = 0", "organism.layers must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_in_a_toml_file_is_refused_by_name(toml, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        profiles.load(toml(text))
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective", "ppo", "A recipe's objective must be one of dpo, sft, got 'ppo'."),
        ("objective", "", "A recipe's objective must be one of dpo, sft, got ''."),
        ("labels", "swapped", "A recipe's labels must be one of true, shuffled, reversed, got 'swapped'."),
    ],
)
def test_a_recipe_s_words_are_checked_wherever_they_come_from(toml, field, value, message):
    for make in (
        lambda: Recipe(**{field: value}),
        lambda: dataclasses.replace(Recipe(), **{field: value}),
        lambda: profiles.load(toml(f'[[recipes]]\n{field} = "{value}"')),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).endswith(message)


def test_a_model_s_folder_is_found_beside_the_file_that_names_it(toml, tmp_path, monkeypatch):
    (tmp_path / "models" / "own").mkdir(parents=True)
    path = toml('model = "models/own"')
    monkeypatch.chdir("/")
    assert profiles.load(path).model == str((tmp_path / "models" / "own").resolve())
    assert profiles.load(toml('model = "some/hub-id"')).model == "some/hub-id"


@pytest.mark.parametrize("objective", profiles.OBJECTIVES)
@pytest.mark.parametrize("labels", profiles.LABELS)
def test_a_control_s_recipe_can_be_written_in_toml(toml, objective, labels):
    text = f'[[recipes]]\nobjective = "{objective}"\nlabels = "{labels}"\nseed = 2\nrank = 0\n[sizes]\nseeds = 5'
    profile = profiles.load(toml(text))
    assert profile.recipes == (Recipe(objective=objective, labels=labels, seed=2, rank=0),)
    assert profile.sizes.seeds == 5


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine\.toml is not valid TOML"):
        profiles.load(str(tmp_path / "mine.toml"))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"profile file nowhere\.toml does not exist"):
        profiles.load("nowhere.toml")


@pytest.mark.parametrize("name", ["atals", "", "atlas.tml"])
def test_an_unknown_profile_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"Unknown profile '{name}': give one of atlas, tinystories.*\.toml file"):
        profiles.load(name)


def test_a_profile_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        profiles.load("atlas").seed = 1
    assert isinstance(hash(profiles.load("atlas")), int)
    assert Profile("atlas") == BUILT_IN["atlas"]


def test_a_model_of_one_s_own_does_not_inherit_a_partner_that_was_trained_from_another(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "tulu3-8b"\nmodel = "owner/base"\n')
    assert profiles.load(str(path)).dpo_model == ""
    path.write_text('extends = "tulu3-8b"\nmodel = "owner/base"\ndpo_model = "owner/dpo"\n')
    assert profiles.load(str(path)).dpo_model == "owner/dpo"
    path.write_text('extends = "tulu3-8b"\nseed = 3\n')
    assert profiles.load(str(path)).dpo_model == profiles.load("tulu3-8b").dpo_model != ""
    assert profiles.load("tulu3-8b", model="owner/base").dpo_model == ""
    given = profiles.load("tulu3-8b", model="owner/base", dpo_model="owner/dpo")
    assert (given.model, given.dpo_model) == ("owner/base", "owner/dpo")


def test_every_hub_model_and_data_set_of_a_built_in_profile_is_pinned_to_a_commit():
    for profile in profiles.BUILT_IN.values():
        named = [profile.model, profile.dpo_model, profiles.source_of(profile.data) or ""]
        for name in named:
            assert "/" not in name or re.search(r"@[0-9a-f]{40}(:\w+)?$", name), name


def test_paths_in_a_toml_file_are_beside_it_and_hub_ids_are_left_alone(tmp_path):
    for name in ("base", "partner"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.jsonl").write_text("")
    path = tmp_path / "mine.toml"
    path.write_text('extends = "gpt2"\nmodel = "base"\ndpo_model = "partner"\ndata = "onpolicy:pairs.jsonl"\n')
    found = profiles.load(str(path))
    assert (found.model, found.dpo_model) == (str(tmp_path / "base"), str(tmp_path / "partner"))
    assert found.data == f"onpolicy:{tmp_path / 'pairs.jsonl'}"
    path.write_text('extends = "gpt2"\nmodel = "owner/base@main"\n')
    assert profiles.load(str(path)).model == "owner/base@main"


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("score", "mood", "score must be one of 'closer', 'sentiment', 'refusal', 'nontoxic', 'geval', got 'mood'"),
        ("device", "tpu", "device must be one of 'cpu', 'cuda', 'mps', 'auto', 'spread', got 'tpu'"),
        ("quantize", "8bit", "quantize must be one of '', '4bit', got '8bit'"),
    ],
)
def test_what_a_profile_cannot_be_is_refused_with_what_it_can(field, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        dataclasses.replace(profiles.load("gpt2"), **{field: value})


@pytest.mark.parametrize("prefix", ["", "onpolicy:"])
def test_a_folder_of_data_is_refused_as_a_folder(tmp_path, prefix):
    with pytest.raises(ValueError, match=r"are a folder: give one file of it, \.jsonl, \.json, \.parquet"):
        profiles.load("smoke", data=f"{prefix}{tmp_path}")
