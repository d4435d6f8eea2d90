"""Worker processes: every item once, one thread each, and what fails is told here."""

import json
import os
import time

import pytest
import torch
from tqdm import tqdm

from helpers import parallel


def note(path):
    """What a worker is, left where this process finds it: that nothing was left before shows that it ran once."""
    with open(path, "x") as file:
        json.dump({"process": os.getpid(), "threads": torch.get_num_threads()}, file)


def refuse(path):
    raise KeyError(f"the worker of {path.name}")


def test_every_item_is_computed_once_with_one_thread_away_from_here(tmp_path):
    before = torch.get_num_threads(), vars(tqdm)["__init__"]
    parallel.each(note, [tmp_path / name for name in "abc"], "three")
    found = [json.loads((tmp_path / name).read_text()) for name in "abc"]
    assert [worker["threads"] for worker in found] == [1, 1, 1]
    assert os.getpid() not in {worker["process"] for worker in found} or os.cpu_count() == 1
    assert (torch.get_num_threads(), vars(tqdm)["__init__"]) == before


def keep_memory(path):
    """Long enough for loky to look at what the worker holds."""
    note(path)
    kept.append(b"x" * 320_000_000)
    time.sleep(1.1)


kept: list[bytes] = []


def test_a_worker_that_keeps_memory_is_kept(tmp_path, recwarn):
    """As malloc does that the Makefile tells to: a new worker has to import everything again."""
    paths = [tmp_path / str(i) for i in range(6)]
    parallel.each(keep_memory, paths, "six")
    assert len({json.loads(path.read_text())["process"] for path in paths}) <= 2
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_what_a_worker_raises_is_raised_here(tmp_path):
    with pytest.raises(KeyError, match="the worker of"):
        parallel.each(refuse, [tmp_path / "a", tmp_path / "b"], "two")


def test_for_no_items_no_worker_is_started(monkeypatch):
    monkeypatch.setattr(parallel, "Parallel", lambda *_, **__: pytest.fail("started workers"))
    parallel.each(note, [], "none")


def test_a_single_item_too_leaves_this_process_as_it_was(tmp_path, monkeypatch):
    threads, bar = torch.get_num_threads(), vars(tqdm)["__init__"]
    monkeypatch.setattr(tqdm, "__init__", bar)  # put back afterwards
    torch.set_num_threads(2)
    try:
        parallel.each(note, [tmp_path / "a"], "one")
        assert (torch.get_num_threads(), vars(tqdm)["__init__"]) == (2, bar)
    finally:
        torch.set_num_threads(threads)


def test_one_thread_ends_with_what_is_inside_and_an_exception_too():
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), parallel.one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("at_most, small", [(8, True), (7, False)])
def test_a_model_is_small_up_to_a_number_of_parameters(monkeypatch, at_most, small):
    monkeypatch.setattr(parallel, "SMALL", at_most)
    assert parallel.is_small(torch.nn.Linear(3, 2)) is small  # 3 x 2 weights and 2 biases
