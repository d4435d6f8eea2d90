"""The cache: the same key gives the same bytes, any change another key, and damage is found and mended."""

import importlib.util
import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import bytes_of

from helpers import artifacts
from helpers.artifacts import Artifact, fetch


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Writes two files and counts how often."""

    def __init__(self, text="content"):
        self.text, self.calls = text, 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "a.json").write_text(json.dumps({"text": self.text, "call": self.calls}))
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(bytes(range(9)))


def stored(root):
    """The bytes of all that lies in the cache; the locks beside it are empty files."""
    found = bytes_of(root)
    assert all(content == b"" for name, content in found.items() if name.startswith(".locks/"))
    return {name: content for name, content in found.items() if not name.startswith(".locks/")}


def module(path, source):
    """A module from source text, read anew."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_same_key_is_made_once_and_gives_the_same_bytes(root):
    make = Maker()
    first = fetch("stage", {"x": 1, "y": [2.5, None]}, make)
    kept = bytes_of(first.path)
    second = fetch("stage", {"y": [2.5, None], "x": 1}, make)  # the order of parameters says nothing
    assert make.calls == 1 and second == first and bytes_of(second.path) == kept
    assert first.path.parent == root and first.path.name.startswith("stage-")
    assert first.read_json("a.json") == {"text": "content", "call": 1}


def test_the_manifest_lists_every_file_with_its_checksum_and_what_it_was_made_from():
    made = fetch("stage", {"x": 1}, Maker())
    manifest = made.read_json(artifacts.MANIFEST)
    assert sorted(manifest["files"]) == ["a.json", "deep/b.bin"]
    assert (manifest["stage"], manifest["params"], manifest["key"]) == ("stage", {"x": 1}, made.key)


def test_any_change_of_what_decides_the_content_gives_another_key(tmp_path, monkeypatch):
    one, two = (fetch("up", {"n": n}, Maker()) for n in (1, 2))
    code = module(tmp_path / "one.py", "def f():\n    return 1\n\n\ndef g():\n    return 3\n")
    other = module(tmp_path / "two.py", "def f():\n    return 2\n\n\ndef g():\n    return 3\n")

    def key(stage="stage", params=None, upstream=(one,), code=(code,)):
        return fetch(stage, {"x": 1} if params is None else params, Maker(), upstream, code).key

    keys = [
        key(), key(stage="stage2"), key(params={"x": 2}), key(params={"x": 1.5}), key(params={"x": 1, "y": 0}),
        key(upstream=(two,)), key(upstream=(one, two)), key(upstream=(two, one)), key(upstream=()),
        key(code=(other,)), key(code=()), key(code=(code.f,)), key(code=(code.g,)),
    ]  # fmt: skip
    monkeypatch.setattr(artifacts, "version", lambda name: "0.0")
    assert len(set(keys)) == len(keys) and key() not in keys


def test_upstream_counts_by_key_and_not_by_place(tmp_path):
    made = fetch("up", {}, Maker())
    moved = Artifact(tmp_path / "elsewhere", made.key)
    assert fetch("stage", {}, Maker(), [made]).key == fetch("stage", {}, Maker(), [moved]).key


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
def test_comments_docstrings_and_layout_do_not_change_the_fingerprint(tmp_path, old, new):
    assert old in SOURCE
    before = artifacts.fingerprint(module(tmp_path / "before.py", SOURCE))
    assert artifacts.fingerprint(module(tmp_path / "after.py", SOURCE.replace(old, new))) == before


@pytest.mark.parametrize(
    "old, new",
    [
        ("x + y", "x - y"), ("y=1", "y=2"), ("import os", "import sys"), ("class C", "class D"), ("@property\n", ""),
        ("    return x + y", '    return "A docstring."'),
    ],
)  # fmt: skip
def test_code_changes_the_fingerprint(tmp_path, old, new):
    assert old in SOURCE
    before = artifacts.fingerprint(module(tmp_path / "before.py", SOURCE))
    assert artifacts.fingerprint(module(tmp_path / "after.py", SOURCE.replace(old, new))) != before


def test_a_method_has_a_fingerprint_of_its_own():
    assert artifacts.fingerprint(Maker.__call__) != artifacts.fingerprint(Maker.__init__)
    assert artifacts.fingerprint(Maker) != artifacts.fingerprint(Maker.__init__)


def truncate(folder):
    (folder / "a.json").write_text('{"text"')


def edit_keeping_the_size(folder):
    raw = bytearray((folder / "deep/b.bin").read_bytes())
    raw[3] ^= 1
    (folder / "deep/b.bin").write_bytes(raw)


DAMAGE = {
    "torn file": (truncate, "a.json missing or changed"),
    "edited file": (edit_keeping_the_size, "deep/b.bin missing or changed"),
    "missing file": (lambda f: (f / "deep/b.bin").unlink(), "deep/b.bin missing or changed"),
    "extra file": (lambda f: (f / "extra").write_text(""), "extra missing or changed"),
    "renamed file": (lambda f: (f / "a.json").rename(f / "c.json"), "a.json, c.json missing or changed"),
    "no manifest": (lambda f: (f / artifacts.MANIFEST).unlink(), "no readable manifest"),
    "torn manifest": (lambda f: (f / artifacts.MANIFEST).write_text('{"key": '), "no readable manifest"),
    "binary manifest": (lambda f: (f / artifacts.MANIFEST).write_bytes(b"\xff\x00"), "no readable manifest"),
    "empty manifest": (lambda f: (f / artifacts.MANIFEST).write_text("{}"), "no readable manifest"),
    "other manifest": (lambda f: (f / artifacts.MANIFEST).write_text("[]"), "no readable manifest"),
    "other key": (
        lambda f: (f / artifacts.MANIFEST).write_text(json.dumps({"key": "0", "files": {}})),
        "stored under another key",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_told_and_mended(damage):
    do, message = DAMAGE[damage]
    make, bystander = Maker(), fetch("stage", {"x": 2}, Maker("other"))
    made, untouched = fetch("stage", {"x": 1}, make), bytes_of(bystander.path)
    do(made.path)
    with pytest.raises(artifacts.DamagedArtifact, match=message):
        artifacts.verify(made.path, made.key)
    with pytest.warns(UserWarning, match=f"{made.path.name}.*{message}.*computed again"):
        mended = fetch("stage", {"x": 1}, make)
    assert make.calls == 2 and mended == made
    assert mended.read_json("a.json")["call"] == 2
    assert bytes_of(bystander.path) == untouched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch("stage", {"x": 1}, make)
    assert make.calls == 2


def test_a_file_in_the_folder_s_place_is_damage_too(root):
    made = fetch("stage", {}, Maker())
    kept = bytes_of(made.path)
    made.path.rename(root / "aside")
    made.path.write_text("no folder")
    with pytest.warns(UserWarning, match="computed again"):
        assert bytes_of(fetch("stage", {}, Maker()).path) == kept


def test_an_exception_in_make_stores_nothing_and_touches_nothing_else(root):
    fetch("stage", {"x": 2}, Maker())
    before = stored(root)

    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("stage", {"x": 1}, fail)
    assert stored(root) == before
    make = Maker()
    fetch("stage", {"x": 1}, make)
    assert make.calls == 1


def test_what_an_interrupted_run_left_behind_is_neither_used_nor_kept(root):
    made = fetch("stage", {}, Maker())
    made.path.rename(made.path.with_name(f".partial-{made.path.name}"))  # as if killed before the rename
    (root / f".partial-{made.path.name}" / "rubbish").write_text("")
    make = Maker()
    again = fetch("stage", {}, make)
    assert make.calls == 1 and not (again.path / "rubbish").exists()
    assert {name.split("/")[0] for name in stored(root)} == {again.path.name}


def test_of_several_that_ask_at_once_one_makes_it_and_the_others_wait():
    calls, others_ask = [], threading.Barrier(4)

    def make(folder):
        calls.append(folder)
        time.sleep(0.2)  # the others come meanwhile
        (folder / "a").write_text("made")

    def ask(_):
        others_ask.wait(timeout=10)
        return fetch("stage", {}, make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(calls) == 1 and len(set(found)) == 1
    assert (found[0].path / "a").read_text() == "made"


def test_one_artefact_is_made_while_another_is():
    """A stage makes what it is made from, should that be missing: only the same artefact waits for itself."""
    inner = Maker()
    outer = fetch("outer", {}, lambda folder: (folder / "a").write_text(fetch("inner", {}, inner).key))
    assert inner.calls == 1 and (outer.path / "a").read_text() == fetch("inner", {}, inner).key


# --- Where nothing may be made ---


def test_where_nothing_is_made_what_is_cached_is_returned_and_what_is_missing_is_named(root):
    make = Maker()
    made = fetch("stage", {"x": 1}, make)
    before = stored(root)
    with artifacts.nothing_made():
        assert fetch("stage", {"x": 1}, make) == made
        with pytest.raises(artifacts.NotCached, match=r"The artefact stage-[0-9a-f]{16} is not in the cache\."):
            fetch("stage", {"x": 2}, make)
    assert make.calls == 1 and stored(root) == before


def test_nothing_is_made_inside_alone_and_an_exception_ends_it():
    make = Maker()
    with pytest.raises(artifacts.NotCached), artifacts.nothing_made():
        fetch("stage", {}, make)
    assert make.calls == 0
    fetch("stage", {}, make)
    assert make.calls == 1


def test_where_nothing_is_made_inside_where_nothing_is_made_it_stays_so():
    with artifacts.nothing_made():
        with artifacts.nothing_made():
            pass
        with pytest.raises(artifacts.NotCached):
            fetch("stage", {}, Maker())


def test_where_nothing_is_made_a_damaged_artefact_is_missing_and_can_be_made_afterwards():
    make = Maker()
    truncate(fetch("stage", {}, make).path)
    with artifacts.nothing_made(), pytest.warns(UserWarning), pytest.raises(artifacts.NotCached):
        fetch("stage", {}, make)
    assert fetch("stage", {}, make).read_json("a.json")["call"] == 2


def test_parameters_that_are_not_json_are_refused_before_anything_is_made(root):
    make = Maker()
    with pytest.raises(TypeError, match="not JSON serializable"):
        fetch("stage", {"x": SimpleNamespace()}, make)
    assert make.calls == 0 and not root.exists()


def test_the_root_is_in_the_project_wherever_one_stands(tmp_path, monkeypatch, root):
    assert artifacts.root() == root
    monkeypatch.delenv("DSTEER_ARTIFACTS")
    monkeypatch.chdir(tmp_path)
    assert artifacts.root() == artifacts.PROJECT / "artifacts"
    monkeypatch.setenv("DSTEER_ARTIFACTS", "")
    assert artifacts.root() == artifacts.PROJECT / "artifacts"


class Patchy(Maker):
    """Is unfinished the first `misses` times that it is called."""

    def __init__(self, misses):
        super().__init__()
        self.misses = misses

    def __call__(self, folder):
        super().__call__(folder)
        if self.calls <= self.misses:
            (folder / artifacts.UNFINISHED).touch()


def test_what_is_unfinished_is_taken_by_this_process_and_made_again_by_the_next(monkeypatch):
    make = Patchy(misses=1)
    first = fetch("stage", {}, make)
    assert fetch("stage", {}, make) == first and make.calls == 1
    monkeypatch.setattr(artifacts, "_tried_here", set())  # as in another process
    with artifacts.nothing_made():
        assert fetch("stage", {}, make) == first and make.calls == 1
    again = fetch("stage", {}, make)
    assert again == first and make.calls == 2 and again.read_json("a.json")["call"] == 2
    monkeypatch.setattr(artifacts, "_tried_here", set())
    assert fetch("stage", {}, make) == first and make.calls == 2


def test_what_is_unfinished_stays_where_making_it_again_fails(root, monkeypatch):
    fetch("stage", {}, Patchy(misses=1))
    kept = stored(root)
    monkeypatch.setattr(artifacts, "_tried_here", set())

    def fail(folder):
        raise OSError("no network")

    with pytest.warns(UserWarning, match="stays unfinished: no network"):
        assert fetch("stage", {}, fail).read_json("a.json")["call"] == 1
    with pytest.raises(OSError, match="no network"):
        fetch("other stage", {}, fail)
    assert stored(root) == kept
