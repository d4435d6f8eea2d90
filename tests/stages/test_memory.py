"""What a process has freed goes back to the system where it has held much."""

import os
import subprocess
import sys

import psutil
import pytest

from helpers import places
from helpers.stages import memory

FREED = """
import psutil
from helpers.stages import memory
held = [b"x" * 2**26 for _ in range(8)]
pinned = b"x" * 2**20
del held
before = psutil.Process().memory_info().rss
memory.MUCH = {much}
memory.give_back_much()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("much, returned", [(2**28, True), (2**40, False)], ids=["it held more", "it held less"])
def test_what_was_freed_is_given_back_where_a_process_has_held_much(much, returned):
    kept = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1073741824")  # as in the Makefile
    command = [sys.executable, "-c", FREED.format(much=much)]
    found = subprocess.run(command, env=os.environ | kept, cwd=places.PROJECT, capture_output=True, check=True)
    assert (int(found.stdout) > 2**28) == returned


def test_nothing_is_asked_of_a_system_that_cannot_take_memory_back(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    before = psutil.Process().memory_info().rss
    memory.give_back()
    assert abs(psutil.Process().memory_info().rss - before) < 2**24
