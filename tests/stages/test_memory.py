"""What a process has freed goes back to the system where it has held much."""

import os
import subprocess
import sys

import pytest

from helpers import places
from helpers.stages import memory

FREED = """
import psutil
from helpers.stages import memory
held = [b"x" * 2**24 for _ in range(32)]
pinned = b"x" * 2**20
del held
before = psutil.Process().memory_info().rss
memory.MUCH = before {more}
memory.give_back_much()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("more, returned", [("- 1", True), ("+ 2**26", False)], ids=["it holds more", "it holds less"])
def test_what_was_freed_is_given_back_where_a_process_holds_much(more, returned):
    # What the Makefile sets at least.
    kept = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
    command = [sys.executable, "-c", FREED.format(more=more)]
    found = subprocess.run(command, env=os.environ | kept, cwd=places.PROJECT, capture_output=True, check=True)
    assert (int(found.stdout) > 2**28) == returned


def test_nothing_is_asked_of_a_system_that_cannot_take_memory_back(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.give_back()  # it has no malloc_trim to call
