"""The cache: the same arguments give the same bytes, and damage is found and mended."""

import errno
import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import bytes_of

from helpers import places
from helpers.stages import artifacts, keys


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


def fetch(make, x=1, name="made"):
    """The artefact of a stage that fills its folder by `make`."""

    def made(folder: Path, x) -> None:
        make(folder)

    made.__name__ = made.__qualname__ = name
    made.__module__ = "helpers.stages.tables"  # some module of ours: a stage's code counts
    return artifacts.stage(made)(x)


def test_code_is_read_when_a_stage_is_made_and_not_when_it_is_called(monkeypatch):
    """In between a file may have been edited, which the running process knows nothing of."""
    keys.code_of.cache_clear()
    make, _ = returning(3)
    monkeypatch.setattr(keys, "_reached", lambda module: pytest.fail("read again"))
    assert make() == 3


def read(artifact):
    return json.loads((artifact.path / "a.json").read_text())


def returning(value, **options):
    """A stage that returns a value and counts how often it is made."""
    calls = []

    def made(x=1, quick=True):
        calls.append(quick)
        return value

    made.__module__ = "helpers.stages.tables"
    return artifacts.stage(made, **options), calls


def stored(root):
    """The bytes of all that lies in the cache; the locks beside it are empty files."""
    found = bytes_of(root)
    assert all(content == b"" for name, content in found.items() if name.startswith(".locks/"))
    return {name: content for name, content in found.items() if not name.startswith(".locks/")}


def test_the_same_key_is_made_once_and_gives_the_same_bytes(root):
    make = Maker()
    first = fetch(make, {"y": [2.5, None]})
    kept = bytes_of(first.path)
    second = fetch(make, {"y": [2.5, None]})
    assert make.calls == 1 and second == first and bytes_of(second.path) == kept
    assert first.path.parent == root and first.path.name.startswith("made-")
    assert read(first) == {"text": "content", "call": 1}
    assert len({fetch(make, x).key for x in (1, 2, "1", None, [1])} | {fetch(make, 1, "other").key}) == 6


def test_the_manifest_lists_every_file_with_its_checksum_and_a_checksum_of_each_argument():
    made, other = fetch(Maker()), fetch(Maker(), 2)
    manifest, another = (json.loads((a.path / artifacts.MANIFEST).read_text()) for a in (made, other))
    assert sorted(manifest["files"]) == ["a.json", "deep/b.bin"]
    assert (manifest["stage"], manifest["key"]) == ("made", made.key)
    assert manifest["arguments"].keys() == {"x"} and manifest["arguments"] != another["arguments"]


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "é"]}, [[1, [2]], []], {}, 0.1 + 0.2])
def test_a_value_comes_back_as_it_was(value):
    stage, calls = returning(value)
    assert stage() == value and stage() == value and calls == [True]


def test_a_table_and_tensors_come_back_as_they_were():
    table = pd.DataFrame({"text": ["a", "b"], "ids": [[1], []], "x": [0.1, 1 / 3]})
    stage, calls = returning(table)
    assert all(pd.testing.assert_frame_equal(stage(), table) is None for _ in range(2)) and calls == [True]
    tensors = {"v": torch.randn(3, dtype=torch.float64), "w": torch.arange(4)}
    stage, calls = returning(tensors)
    for found in (stage(x=2), stage(x=2)):
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert calls == [True]


def test_what_is_read_is_shared_by_those_who_ask_for_the_same(root):
    stage, calls = returning([[1, 2], [3]], read=lambda kept: tuple(map(tuple, kept)))
    first = stage(x=1)
    assert first == ((1, 2), (3,)) and stage(x=1) is first and calls == [True]
    other = stage(x=2)
    assert other == first and other is not first
    found = next(root.glob("made-*/value.json"))
    found.write_text("[[9]]")  # sharing does not hide damage
    with pytest.warns(UserWarning, match="It is computed again"):
        assert stage(x=1) == stage(x=2) == first
    assert len(calls) == 3


@pytest.mark.parametrize("options", [{"is_unfinished": bool, "read": tuple}, {"read": tuple, "fills": True}])
def test_only_finished_values_are_shared(options):
    def made(folder: Path) -> None:
        pytest.fail("made")

    made.__module__ = "helpers.stages.tables"
    with pytest.raises(AssertionError, match="what is read is a value, and finished"):
        artifacts.stage(made, read=tuple) if options.pop("fills", False) else returning(3, **options)


def test_what_was_read_long_ago_is_read_again(monkeypatch):
    monkeypatch.setattr(artifacts, "READ", 2)
    stage, calls = returning([1], read=tuple)
    first, _, _ = stage(x=1), stage(x=2), stage(x=3)
    again = stage(x=1)
    assert again == first and again is not first and len(calls) == 3


def test_what_decides_only_how_a_thing_is_computed_is_in_no_key():
    stage, calls = returning(3, unkeyed=["quick"])
    assert stage(quick=True) == stage(quick=False) == 3 and calls == [True]
    stage, calls = returning(3)
    assert stage(x=5, quick=True) == stage(x=5, quick=False) == 3 and calls == [True, False]


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
    make, bystander = Maker(), fetch(Maker("other"), 2)
    made, untouched = fetch(make, 1), bytes_of(bystander.path)
    do(made.path)
    with pytest.raises(artifacts.DamagedArtifact, match=message):
        artifacts.verify(made.path, made.key)
    with pytest.warns(UserWarning, match=f"{made.path.name}.*{message}.*computed again"):
        mended = fetch(make, 1)
    assert make.calls == 2 and mended == made
    assert read(mended)["call"] == 2
    assert bytes_of(bystander.path) == untouched
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(make, 1)
    assert make.calls == 2


def test_a_file_in_the_folder_s_place_is_damage_too(root):
    made = fetch(Maker())
    kept = bytes_of(made.path)
    made.path.rename(root / "aside")
    made.path.write_text("no folder")
    with pytest.warns(UserWarning, match="computed again"):
        assert bytes_of(fetch(Maker()).path) == kept


def test_an_exception_in_make_stores_nothing_and_touches_nothing_else(root):
    fetch(Maker(), 2)
    before = stored(root)

    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(fail, 1)
    assert stored(root) == before
    make = Maker()
    fetch(make, 1)
    assert make.calls == 1


def test_what_an_interrupted_run_left_behind_is_neither_used_nor_kept(root):
    made = fetch(Maker())
    made.path.rename(made.path.with_name(f".partial-{made.path.name}"))  # as if killed before the rename
    (root / f".partial-{made.path.name}" / "rubbish").write_text("")
    make = Maker()
    again = fetch(make)
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
        return fetch(make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len(calls) == 1 and len(set(found)) == 1
    assert (found[0].path / "a").read_text() == "made"


def test_one_artefact_is_made_while_another_is():
    """A stage makes what it is made from, should that be missing: only the same artefact waits for itself."""
    inner = Maker()
    outer = fetch(lambda folder: (folder / "a").write_text(fetch(inner, name="inner").key), name="outer")
    assert inner.calls == 1 and (outer.path / "a").read_text() == fetch(inner, name="inner").key


# --- Where nothing may be made ---


def test_where_nothing_is_made_what_is_cached_is_returned_and_what_is_missing_is_named(root):
    make = Maker()
    made = fetch(make, 1)
    before = stored(root)
    with artifacts.nothing_made():
        assert fetch(make, 1) == made
        with pytest.raises(artifacts.NotCached, match=r"The artefact made-[0-9a-f]{16} is not in the cache\."):
            fetch(make, 2)
    assert make.calls == 1 and stored(root) == before


def test_nothing_is_made_inside_alone_and_an_exception_ends_it():
    make = Maker()
    with pytest.raises(artifacts.NotCached), artifacts.nothing_made():
        fetch(make)
    assert make.calls == 0
    fetch(make)
    assert make.calls == 1


def test_where_nothing_is_made_inside_where_nothing_is_made_it_stays_so():
    with artifacts.nothing_made():
        with artifacts.nothing_made():
            pass
        with pytest.raises(artifacts.NotCached):
            fetch(Maker())


def test_where_nothing_is_made_a_damaged_artefact_is_missing_and_can_be_made_afterwards():
    make = Maker()
    truncate(fetch(make).path)
    with artifacts.nothing_made(), pytest.warns(UserWarning), pytest.raises(artifacts.NotCached):
        fetch(make)
    assert read(fetch(make))["call"] == 2


def test_an_argument_that_no_key_can_tell_of_is_refused_before_anything_is_made(root):
    make = Maker()
    with pytest.raises(TypeError, match="The argument 'x' holds a object"):
        fetch(make, object())
    assert make.calls == 0 and not root.exists()


def test_the_root_is_in_the_project_wherever_one_stands(tmp_path, monkeypatch, root):
    assert artifacts.root() == root
    monkeypatch.delenv("DSTEER_ARTIFACTS")
    monkeypatch.chdir(tmp_path)
    assert artifacts.root() == places.PROJECT / "artifacts"
    monkeypatch.setenv("DSTEER_ARTIFACTS", "")
    assert artifacts.root() == places.PROJECT / "artifacts"


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
    first = fetch(make)
    assert fetch(make) == first and make.calls == 1
    monkeypatch.setattr(artifacts, "_tried_here", set())  # as in another process
    with artifacts.nothing_made():
        assert fetch(make) == first and make.calls == 1
    again = fetch(make)
    assert again == first and make.calls == 2 and read(again)["call"] == 2
    monkeypatch.setattr(artifacts, "_tried_here", set())
    assert fetch(make) == first and make.calls == 2


def test_what_is_unfinished_stays_where_making_it_again_fails(root, monkeypatch):
    fetch(Patchy(misses=1))
    kept = stored(root)
    monkeypatch.setattr(artifacts, "_tried_here", set())

    def fail(folder):
        raise OSError("no network")

    with pytest.warns(UserWarning, match="stays unfinished: no network"):
        assert read(fetch(fail))["call"] == 1
    with pytest.raises(OSError, match="no network"):
        fetch(fail, 2)
    assert stored(root) == kept


def test_a_full_disk_loses_nothing_and_leaves_no_half_an_artefact(root):
    def filling(folder):
        (folder / "half.json").write_text("[1, ")
        raise OSError(errno.ENOSPC, "full")

    kept = fetch(Maker(), 1)
    before = bytes_of(kept.path), sorted(path.name for path in root.iterdir())
    with pytest.raises(
        OSError, match=r"^No space is left for \S+: free some, or name another with DSTEER_ARTIFACTS=\. "
    ):
        fetch(filling, 2)
    assert (bytes_of(kept.path), sorted(path.name for path in root.iterdir())) == before
    assert fetch(Maker(), 2).path.exists()  # as soon as there is room
