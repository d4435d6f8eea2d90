"""Every built-in profile is valid, a TOML file extends one, and what is wrong in it is named."""

import pickle
import re

import pytest
from pydantic import ValidationError

from helpers import profiles
from helpers.data import catalogue, naming
from helpers.data.sizes import Sizes
from helpers.lm.recipe import LABELS, OBJECTIVES, Recipe
from helpers.profiles import BUILT_IN, FOLDER, Profile
from helpers.stages.health import Health
from helpers.world.organism import Organism


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


# --- Built-in profiles ---


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_profile_is_valid(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert {0.0, 1.0} <= set(profile.doses) and list(profile.doses) == sorted(profile.doses)
    assert profile.recipes and 0 < profile.health.max_fact_loss <= 1
    assert catalogue.is_known(profile.data)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_profile_holds_can_be_written_in_a_file(name):
    """Each field given back as TOML would hold it, lists for tuples, changes nothing."""
    table = profiles.load(name).model_dump()
    table["doses"], table["grid"] = list(table["doses"]), {name: list(x) for name, x in table["grid"].items()}
    assert Profile(**table) == profiles.load(name)


UNSEEN = "HuggingFaceTB/smollm2-135M-SFT-Only"  # known by its name alone


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_hub_model_and_data_set_of_a_built_in_profile_is_pinned_to_a_commit(name):
    profile = profiles.load(name)
    for source in {profile.model, profile.dpo_model, naming.source_of(profile.data) or ""} - {UNSEEN}:
        assert "/" not in source or re.search(r"@[0-9a-f]{40}(:\w+)?$", source), source


def test_the_default_profile_is_the_embedded_organism():
    atlas = profiles.load("atlas")
    assert atlas.replace(sizes=atlas.sizes.replace(heldout=240)) == Profile(name="atlas")
    assert profiles.load("atlas").model == profiles.EMBEDDED


def test_smoke_is_the_default_profile_with_less_to_do():
    smoke, atlas = profiles.load("smoke"), profiles.load("atlas")
    parts = {name: getattr(atlas, name) for name in ("organism", "recipe", "grid", "sizes", "doses")}
    assert smoke.replace(name="atlas", **parts) == atlas
    assert len(smoke.recipes) == smoke.sizes.seeds == 1
    assert smoke.sizes.heldout >= 5  # as many singular values are drawn


@pytest.mark.parametrize("name", ["atals", "", "atlas.tml"])
def test_an_unknown_profile_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"Unknown profile '{name}': give one of atlas, .*tinystories.*\.toml file"):
        profiles.load(name)


# --- Settings ---


@pytest.mark.parametrize("part", [Organism(), Recipe(), Health(), Sizes(), Profile(name="atlas")])
def test_settings_cannot_be_changed_and_are_told_apart_by_what_they_hold(part):
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, next(iter(type(part).model_fields)), 1)
    again = pickle.loads(pickle.dumps(part))
    assert again == part == part.replace() and hash(again) == hash(part)


def test_a_changed_copy_is_checked_as_the_first_was():
    changed = Recipe().replace(beta=2, epochs=3)
    assert (changed, type(changed.beta)) == (Recipe(beta=2.0, epochs=3), float) and changed != Recipe()
    with pytest.raises(ValueError, match=r"^recipe\.epochs must be at least 1, got 0\.$"):
        Recipe().replace(epochs=0)
    with pytest.raises(ValueError, match=r"^profile\.name must be given, got \{'seed': 3\}\.$"):
        Profile(seed=3)


# --- What replaces a profile's sources ---


def test_model_and_data_are_replaced_where_given():
    profile = profiles.load("atlas", model="some/model", data="atlas:belief")
    assert (profile.model, profile.data) == ("some/model", "atlas:belief")
    assert profile.replace(model="atlas", data="atlas:tone") == profiles.load("atlas")
    assert profiles.load("atlas", model="", data=None) == profiles.load("atlas")


def test_a_model_of_one_s_own_does_not_inherit_a_partner_that_was_trained_from_another(toml):
    tulu = 'extends = "tulu3-8b"\n'
    assert profiles.load(toml(f'{tulu}model = "owner/base"')).dpo_model == ""
    assert profiles.load(toml(f'{tulu}model = "owner/base"\ndpo_model = "owner/dpo"')).dpo_model == "owner/dpo"
    assert profiles.load(toml(f"{tulu}seed = 3")).dpo_model == profiles.load("tulu3-8b").dpo_model != ""
    assert profiles.load("tulu3-8b", model="owner/base").dpo_model == ""
    held = toml('model = "owner/base"\n[wheel]\npackage = "held"\nversion = "1"\nsha256 = "0"\nfile = "held/m.gguf"\n')
    assert profiles.load(held).wheel.file == "held/m.gguf" and profiles.load(held, model="owner/other").wheel is None
    given = profiles.load("tulu3-8b", model="owner/base", dpo_model="owner/dpo")
    assert (given.model, given.dpo_model) == ("owner/base", "owner/dpo")


def test_a_partner_needs_the_base_that_it_was_trained_from():
    with pytest.raises(ValueError, match=r"the ready partner 'owner/dpo' needs the base .*: give MODEL= too"):
        profiles.load("atlas", dpo_model="owner/dpo")


@pytest.mark.parametrize("prefix", ["", "onpolicy:"])
def test_a_folder_of_data_is_refused_as_a_folder(tmp_path, prefix):
    with pytest.raises(ValueError, match=r"are a folder: give one file of it, \.jsonl, \.json, \.parquet"):
        profiles.load("smoke", data=f"{prefix}{tmp_path}")


# --- TOML files ---


def test_a_toml_file_extends_a_built_in_profile(toml):
    profile = profiles.load(
        toml(
            'extends = "tinystories"\nseed = 3\ndoses = [1, 0, -0.5]\n[sizes]\nheldin = 7\n'
            "[recipe]\nepochs = 9\n[grid]\nbeta = [2, 1]\nlearning_rate = []\nstop = [0.5, 1]\n"
        )
    )
    parent = profiles.load("tinystories")
    assert (profile.name, profile.seed, profile.doses) == ("mine", 3, (-0.5, 0.0, 1.0))
    assert profile.sizes == parent.sizes.replace(heldin=7)
    tried = [(2.0, 0.5), (2.0, 1.0), (1.0, 0.5), (1.0, 1.0)]
    assert profile.recipes == tuple(Recipe(epochs=9, beta=beta, stop=stop) for beta, stop in tried)
    assert profile.trained_by(Recipe(rank=3)).recipes == (Recipe(rank=3),)
    assert (profile.model, profile.health) == (parent.model, parent.health)


def test_a_toml_file_that_extends_none_has_the_defaults_and_may_name_itself(toml):
    assert profiles.load(toml('name = "own"')) == Profile(name="own")
    assert profiles.load(toml(""), model="m").model == "m"


@pytest.mark.parametrize(
    "alone, data, compared",
    [
        (False, "atlas:tone", ["tone", "refusal", "conditional", "belief", "tone+refusal"]),
        (True, "atlas:belief", ["belief"]),
        (True, "atlas:tone+belief", ["tone+belief"]),
        (True, "topics:brief", ["brief"]),
        (False, "topics:sober", ["sober", "conditional", "brief"]),
        (False, "owner/pairs", ["pairs"]),
    ],
)
def test_a_preference_is_compared_with_the_others_on_its_base_or_stands_alone(toml, alone, data, compared):
    one = profiles.load(toml(f"[extent]\nalone = {str(alone).lower()}\n"), data=data)
    assert list(one.families) == compared and data in one.families.values()


def test_a_built_in_profile_s_file_is_that_profile():
    assert profiles.load(str(FOLDER / "gpt2.toml")) == profiles.load("gpt2")


def test_built_in_profiles_that_extend_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    for one, other in (("atlas", "gpt2"), ("gpt2", "atlas")):
        (tmp_path / f"{one}.toml").write_text(f'extends = "{other}"')
    with pytest.raises(ValueError, match=r"gpt2\.toml: extends = 'atlas' is not a built-in profile"):
        profiles.load("atlas")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("labels", LABELS)
def test_a_control_s_recipe_can_be_written_in_toml(toml, objective, labels):
    text = f'[recipe]\nobjective = "{objective}"\nlabels = "{labels}"\nseed = 2\nrank = 0\n[sizes]\nseeds = 5'
    profile = profiles.load(toml(text))
    assert profile.recipe == Recipe(objective=objective, labels=labels, seed=2, rank=0)
    assert profile.sizes.seeds == 5


def test_paths_in_a_toml_file_are_beside_it_and_hub_ids_are_left_alone(toml, tmp_path, monkeypatch):
    for name in ("models/base", "partner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text("")
    path = toml('extends = "gpt2"\nmodel = "models/base"\ndpo_model = "partner"\ndata = "onpolicy:pairs.jsonl"\n')
    monkeypatch.chdir("/")
    found = profiles.load(path)
    assert (found.model, found.dpo_model) == (str(tmp_path / "models" / "base"), str(tmp_path / "partner"))
    assert found.data == f"onpolicy:{tmp_path / 'pairs.jsonl'}"
    assert profiles.load(toml('extends = "gpt2"\nmodel = "owner/base@main"\n')).model == "owner/base@main"


@pytest.mark.parametrize(
    "text, message",
    [
        ('extends = "atals"', "extends = 'atals' is not a built-in profile.*atlas"),
        ("extends = ['atlas']", r"extends = \['atlas'\] is not a built-in profile"),
        ("seed = ", "is not valid TOML"),
        ("sede = 1", "profile: unknown field 'sede'; there are name, model"),
        ("self = 1", "profile: unknown field 'self'; there are name, model"),
        ("[sizes]\nheldinn = 1", "sizes: unknown field 'heldinn'; there are heldin"),
        ("[recipe]\nbetta = 1.0", "recipe: unknown field 'betta'; there are beta"),
        ('seed = "1"', "profile.seed must be of type int, got '1'"),
        ("seed = 1.5", "profile.seed must be of type int, got 1.5"),
        ("seed = true", "profile.seed must be of type int, got True"),
        ("seed = -1", "profile.seed must be at least 0, got -1"),
        ("model = 3", "profile.model must be of type str, got 3"),
        ('[health]\nmax_fact_loss = "a lot"', "health.max_fact_loss must be of type float, got 'a lot'"),
        ("[health]\nmax_fact_loss = true", "health.max_fact_loss must be of type float, got True"),
        ("sizes = 3", "profile.sizes must be a table, got 3"),
        ("doses = 1.0", "profile.doses must be a list, got 1.0"),
        ('doses = [0.0, "1"]', r"profile.doses\[1\] must be of type float, got '1'"),
        ("doses = [0.5, 1.0]", "doses must contain 0 and 1"),
        ("doses = [0.0, 2.0]", "doses must contain 0 and 1"),
        ("[grid]\nbeta = 1.0", "grid.beta must be a list, got 1.0"),
        ("recipe = []", r"profile.recipe must be a table, got \[\]"),
        ("[recipe]\nstop = 0.3", "recipe.stop must be 0.0, .* or 1.0, got 0.3"),
        ("[recipe]\nrank = 0\nstop = 0.5", "recipe.stop must be 1 at rank 0: whole models are kept at their run's end"),
        ("[recipe]\nepochs = 0", "recipe.epochs must be at least 1, got 0"),
        ("[recipe]\nrank = -1", "recipe.rank must be at least 0, got -1"),
        ("[sizes]\nheldout = 0", "sizes.heldout must be at least 2, got 0"),
        ("[sizes]\nnew_tokens = 0", "sizes.new_tokens must be at least 1, got 0"),
        ('[extent]\npartners = ["SFT"]', "extent.partners must be SFT, shuffled, reversed, beside .*; got SFT"),
        ('[extent]\nspans = ["answer"]', r"extent.spans\[0\] must be 'response', 'prompt' or 'all', got 'answer'"),
        (
            "[extent]\nstops = [0.4, 1.0]",
            "extent.stops must be among 0.0, .* every stop of the grid; got 0.4, 1.0",
        ),
        ("[extent]\nstops = [1.0]\n[grid]\nstop = [0.5, 1.0]", r"got 1.0 beside grid.stop = \[0.5, 1.0\]"),
        ("[organism]\nlayers = 0", "organism.layers must be at least 1, got 0"),
        ("[organism]\nwidth = 72", "organism.width must be a multiple of 32, got 72"),
        ("[organism]\nwidth = 0", "organism.width must be at least 32, got 0"),
        ("[organism]\nplaces = 1", "organism.places must be at least 20, got 1"),
        ('dtype = "float33"', "profile.dtype must be 'float32', 'bfloat16', 'float16' or 'float64', got 'float33'"),
        ('device = "tpu"', "profile.device must be 'cpu', 'cuda', 'mps', 'auto' or 'spread', got 'tpu'"),
        ('quantize = "8bit"', "profile.quantize must be '' or '4bit', got '8bit'"),
        ('score = "mood"', "profile.score must be 'closer', 'sentiment', 'refusal', 'nontoxic' or 'geval', got 'mood'"),
        ('name = "../../elsewhere"', "name must be letters, digits, -, _ and \\."),
        ('name = "atlas"', "'atlas' is a built-in profile, whose figures it would replace: rename it"),
        ('data = "pairs.txt"', "unknown data 'pairs.txt'; there are atlas:tone, .*onpolicy:vader"),
        ('data = "atlas:mood"', "unknown data 'atlas:mood'; there are .*, mixtures .* such as atlas:tone"),
        ('data = "atlas:tone+mood"', r"unknown data 'atlas:tone\+mood'"),
        ('data = "atlas:tone+tone"', r"unknown data 'atlas:tone\+tone'"),
        ('data = "onpolicy:vader+vader"', r"unknown data 'onpolicy:vader\+vader'"),
        ('data = ""', "unknown data ''"),
    ],
)
def test_what_is_wrong_in_a_toml_file_is_refused_by_name(toml, text, message):
    with pytest.raises(ValueError, match=rf"mine\.toml.* ?{message}") as caught:
        profiles.load(toml(text))
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective", "ppo", "recipe.objective must be 'dpo' or 'sft', got 'ppo'."),
        ("objective", "", "recipe.objective must be 'dpo' or 'sft', got ''."),
        ("labels", "swapped", "recipe.labels must be 'true', 'shuffled' or 'reversed', got 'swapped'."),
    ],
)
def test_a_recipe_s_words_are_checked_wherever_they_come_from(toml, field, value, message):
    for make in (
        lambda: Recipe(**{field: value}),
        lambda: Recipe().replace(**{field: value}),
        lambda: profiles.load(toml(f'[recipe]\n{field} = "{value}"')),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value).endswith(message)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine\.toml is not valid TOML"):
        profiles.load(str(tmp_path / "mine.toml"))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"profile file nowhere\.toml does not exist"):
        profiles.load("nowhere.toml")


def test_a_byte_order_mark_and_a_home_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_text("{}")
    path = tmp_path / "mine.toml"
    path.write_bytes('extends = "smoke"\ndata = "~/pairs.jsonl"'.encode("utf-8-sig"))
    assert profiles.load(str(path)).data == str(tmp_path / "pairs.jsonl")
    assert profiles.resolved("onpolicy:~/pairs.jsonl") == f"onpolicy:{tmp_path / 'pairs.jsonl'}"
