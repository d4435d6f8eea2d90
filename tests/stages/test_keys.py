"""What a key is made of: arguments, the code that a stage's module reaches by import, and the libraries it uses."""

import shutil
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.data.sizes import Sizes
from helpers.data.tasks import task
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe
from helpers.stages import keys
from helpers.stages.artifacts import Artifact


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of our code that may be changed."""
    shutil.copytree(keys.PROJECT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "PROJECT", tmp_path)
    forget()
    yield tmp_path / "helpers"
    forget()


def forget():
    for cached in (keys.code_of, keys._imports, keys._fingerprint, keys._versions):
        cached.cache_clear()


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    forget()


def atlas_task(family="tone"):
    return task(f"atlas:{family}", "closer", 0, Sizes(), 20)


def key(stage, **arguments):
    """The key of a stage's module with some arguments."""
    return keys.code_of(f"helpers.stages.{stage}"), keys.digests(arguments)


REACHED = [  # a stage, a function that it reaches (some through others), and an edit of it
    ("sampled", "lm/architecture.py", 'FINAL = "final"', 'FINAL = "last"'),
    ("sampled", "lm/batches.py", "def right_padded(", "def padded_right("),
    ("organism", "lm/batches.py", "def right_padded(", "def padded_right("),
    ("organism", "world/grammar.py", '"Gladly!"', '"Sure!"'),
    ("rank_k", "spectra.py", "def cosines(", "def cosine("),
    ("log_ratios", "lm/likelihoods.py", "def kl(", "def kl_of("),
    ("partner", "lm/training.py", "def relabelled(", "def labelled("),
]


@pytest.mark.parametrize("stage, file, old, new", REACHED)
def test_code_that_a_stage_reaches_is_in_its_key(house, stage, file, old, new):
    before = key(stage)
    edited(house / file, old, new)
    assert key(stage) != before


@pytest.mark.parametrize(
    "stage, file, old, new",
    [
        ("sampled", "data/judges.py", "def distinct_n(", "def distinct("),
        ("sampled", "world/grammar.py", '"Gladly!"', '"Sure!"'),
        ("states", "lm/decoding.py", "def sample(", "def samples("),
        ("rank_k", "lm/architecture.py", 'FINAL = "final"', 'FINAL = "last"'),
        ("organism", "lm/steering.py", "def moved(", "def move("),
        ("log_ratios", "study.py", "def load(", "def loads("),
    ],
)
def test_code_that_a_stage_cannot_reach_is_not(house, stage, file, old, new):
    before = key(stage)
    edited(house / file, old, new)
    assert key(stage) == before


def test_a_task_brings_its_own_code(house):
    atlas, stories = atlas_task(), task("onpolicy:vader", "closer", 0, Sizes(), 20)
    before = key("judgements", task=atlas), key("judgements", task=stories)
    edited(house / "data/stories.py", '"Lily", ', '"Lily", "Zoe", ')
    assert key("judgements", task=atlas) == before[0] and key("judgements", task=stories) != before[1]
    before = key("judgements", task=atlas), key("judgements", task=stories)
    edited(house / "data/sentiment.py", '["compound"]', '["pos"]')
    assert key("judgements", task=atlas) == before[0] and key("judgements", task=stories) != before[1]
    before = key("judgements", task=atlas)
    edited(house / "world/grammar.py", '"Gladly!"', '"Sure!"')
    assert key("judgements", task=atlas) != before


@pytest.mark.parametrize(
    "stage, arguments, distribution, uses",
    [
        ("rank_k", {}, "scikit-learn", True),
        ("rank_k", {}, "trl", False),
        ("partner", {}, "trl", True),
        ("sampled", {}, "transformers", True),
        ("judgements", {"task": "onpolicy:vader"}, "vaderSentiment", True),
        ("judgements", {"task": "atlas:tone"}, "vaderSentiment", False),
    ],
)
def test_the_versions_of_libraries_that_the_code_imports_are_in_the_key(
    house, monkeypatch, stage, arguments, distribution, uses
):
    given = {name: task(data, "closer", 0, Sizes(), 20) for name, data in arguments.items()}
    before, version = key(stage, **given), keys.version
    monkeypatch.setattr(keys, "version", lambda name: "0" if name == distribution else version(name))
    forget()
    assert (key(stage, **given) != before) == uses


SOURCE = '''"""A module."""

import os  # a comment


@property
def f(x, y=1):
    """A docstring."""
    return x + y


class C:
    """Another."""

    def only_documented(self):
        """Nothing else."""
'''


def fingerprint(path, source):
    path.write_text(source)
    forget()
    return keys._fingerprint(path)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""A module."""', '"""Told otherwise."""'),
        ('"""A module."""\n', ""),
        ("# a comment", "# told otherwise"),
        ('    """A docstring."""\n', ""),
        ('    """Another."""\n\n', ""),
        ("    return x + y", "    # why\n\n    return (x\n            + y)"),
        ('"""Nothing else."""', '"""Told otherwise."""'),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path, old, new):
    assert old in SOURCE
    path = tmp_path / "module.py"
    assert fingerprint(path, SOURCE) == fingerprint(path, SOURCE.replace(old, new))


@pytest.mark.parametrize(
    "old, new",
    [
        ("x + y", "x - y"), ("y=1", "y=2"), ("import os", "import sys"), ("class C", "class D"), ("@property\n", ""),
        ("    return x + y", '    return "A docstring."'),
    ],
)  # fmt: skip
def test_code_counts(tmp_path, old, new):
    assert old in SOURCE
    path = tmp_path / "module.py"
    assert fingerprint(path, SOURCE) != fingerprint(path, SOURCE.replace(old, new))


@dataclass(frozen=True)
class Elsewhere:
    """No class of ours: what its code is, no key knows."""

    x: int


def test_arguments_count_by_what_they_hold():
    values = [
        None, True, 1, 1.5, "1", [1], [1, 2], [[1], 2], {"a": 1}, {"a": 2}, {1: "a"},
        torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.ones(2), np.zeros(2, np.float16),
        pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), Recipe(), Recipe(beta=2.0), Tokens([1], [2]),
        Tokens([1, 2], []), Artifact(keys.PROJECT, "k1"), Artifact(keys.PROJECT, "k2"), atlas_task(),
        atlas_task("refusal"),
    ]  # fmt: skip
    found = [keys.digests({"x": value})["x"] for value in values]
    assert len(set(found)) == len(values)
    again = [keys.digests({"x": value})["x"] for value in values]
    assert again == found
    assert keys.digests({"x": Artifact(keys.PROJECT / "elsewhere", "k1")})["x"] == found[22]


def test_fixed_items_count_as_a_list_of_them_and_are_digested_once(monkeypatch):
    items = [Tokens([1, 2], [3]), Tokens([4], [])]
    fixed = keys.Fixed(items)
    assert keys.digests({"x": fixed}) == keys.digests({"x": items}) == keys.digests({"x": tuple(items)})
    monkeypatch.setattr(keys, "_content", lambda *given: pytest.fail("digested again"))
    keys.digests({"x": fixed}), keys.digests({"y": fixed})


class Keyed(NamedTuple):
    """A tuple that a key of its own stands for."""

    key: str
    other: int


def test_a_tuple_with_a_key_counts_by_it_wherever_it_is():
    one, same, other = ([[Keyed(*held)], 1] for held in (("k", 1), ("k", 2), ("l", 1)))
    assert keys.digests({"x": one}) == keys.digests({"x": same}) != keys.digests({"x": other})


NESTED = [
    [], [[]], [1, "1", None, 1.5, True], [Tokens([1], [2]), Tokens([3], [])], [[[1], "a"], ("b", [2, [3]])],
    [1, [Recipe(), [2]], "3"], [[atlas_task()]], [{"a": [1]}, [{2: 3}]], [np.float64(0.5), [np.int64(2)]],
    [Artifact(keys.PROJECT, "k1"), [1]], [(torch.zeros(2), "z")],
]  # fmt: skip


@pytest.mark.parametrize("value", NESTED, ids=range(len(NESTED)))
def test_lists_of_plain_values_count_as_if_each_were_looked_at(monkeypatch, value):
    quickly = keys.digests({"x": value})
    monkeypatch.setattr(keys, "_is_plain", lambda value: False)
    assert keys.digests({"x": value}) == quickly


@pytest.mark.parametrize("value", [object(), Elsewhere(1), {1, 2}, lambda: 0, keys.PROJECT])
def test_what_no_key_can_tell_of_is_refused(value):
    with pytest.raises(TypeError, match="The argument 'x' holds a"):
        keys.digests({"x": value})
