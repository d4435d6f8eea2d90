"""Worker processes here: every item once, one thread each, and what fails is told here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from threadpoolctl import threadpool_info
from tqdm import tqdm

from helpers.stages import artifacts, bars, parallel


def note(path):
    """What a worker is, left where this process finds it: that nothing was left before shows that it ran once."""
    threads = max(torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info()))  # NumPy's too
    with open(path, "x") as file:
        json.dump({"process": os.getpid(), "threads": threads, "artefacts": str(artifacts.root())}, file)


def refuse(path):
    raise KeyError(f"the worker of {path.name}")


def keep_memory(path):
    """Long enough for loky to look at what the worker holds."""
    note(path)
    kept.append(b"x" * 320_000_000)
    time.sleep(1.1)


def count_slowly(item):
    for _ in tqdm(range(3), desc=f"within {item}", mininterval=0):
        time.sleep(0.7)


kept: list[bytes] = []


@pytest.fixture
def as_it_was(monkeypatch):
    """This process has two threads and tqdm's own bars, before and after."""
    threads, bar = torch.get_num_threads(), vars(tqdm)["__init__"]
    monkeypatch.setattr(tqdm, "__init__", bar)  # put back afterwards
    torch.set_num_threads(2)
    yield
    found = torch.get_num_threads(), vars(tqdm)["__init__"]
    torch.set_num_threads(threads)
    assert found == (2, bar)


def test_every_item_is_computed_once_with_one_thread_by_workers_that_may_keep_memory(
    tmp_path, recwarn, as_it_was, monkeypatch
):
    """As malloc does that the Makefile tells to: a new worker has to import everything again."""
    paths, shown = [tmp_path / str(i) for i in range(6)], []
    close = tqdm.close
    monkeypatch.setattr(tqdm, "close", lambda bar: (shown.append(f"{bar.desc} {bar.n}/{bar.total}"), close(bar)))
    parallel.each(keep_memory, paths, "six")
    assert shown[0] == "six 6/6"
    found = [json.loads(path.read_text()) for path in paths]
    assert [worker["threads"] for worker in found] == [1] * 6
    workers = {worker["process"] for worker in found}
    assert len(workers) <= max(2, os.cpu_count()) and os.getpid() not in workers
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_workers_wait_for_the_next_call(tmp_path, as_it_was):
    """Starting one takes several seconds of imports."""
    calls = [[tmp_path / f"{call}{i}" for i in range(2)] for call in "ab"]
    for paths in calls:
        parallel.each(keep_memory, paths, "two")
    first, then = ({json.loads(path.read_text())["process"] for path in paths} for paths in calls)
    assert first & then


def test_where_workers_are_is_shown_behind_the_bar(monkeypatch):
    shown = []
    monkeypatch.setattr(bars, "EVERY", 0.1)
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda bar, text: shown.append(text))
    parallel.each(count_slowly, ["a", "b"], "two")
    assert all(any(f"within {item} 1/3" in text for text in shown) for item in "ab")


def test_what_a_worker_raises_is_raised_here_by_a_single_item_too(tmp_path, as_it_was):
    with pytest.raises(KeyError, match="the worker of a"):
        parallel.each(refuse, [tmp_path / "a"], "one")


def test_for_no_items_no_worker_is_started(monkeypatch):
    monkeypatch.setattr(parallel, "_WithBar", lambda *_: pytest.fail("started workers"))
    parallel.each(note, [], "none")


def test_one_thread_ends_with_what_is_inside_and_an_exception_too():
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), parallel.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


def sleep(path):
    note(path)
    time.sleep(100)


def test_workers_end_soon_after_the_process_that_started_them_was_killed(tmp_path):
    """Even before they have imported what they compute with."""
    code = "import sys, pathlib, test_parallel as t; t.parallel.each(t.sleep, [pathlib.Path(sys.argv[1])], 'one')"
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "seen"], cwd=Path(__file__).parent)
    children = psutil.Process(parent.pid).children
    while not (workers := [child for child in children() if "LokyProcess" in " ".join(child.cmdline())]):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left
